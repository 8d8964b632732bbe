"Llama against Hugging Face's; through the loop, the store and the sites; writing with and without a cache."

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from wrapperlib import deletion
from wrapperlib.checks import BadInput
from wrapperlib.llama import Cache, LlamaShape, generate
from wrapperlib.model import change, read, site_names
from wrapperlib.probing import residual_sites
from wrapperlib.runs import Run, Store, sources_of, train_run, train_runs
from wrapperlib.training import Measure, Recipe, train

SMALL = LlamaShape(vocabulary=50, context=300, blocks=2, heads=2, width=16)


@pytest.fixture
def model():
    model = SMALL.model(3).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 4  # so that it has opinions
    return model


@pytest.fixture
def ids():
    return torch.randint(50, (3, 90), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Rising:
    "A stream of rows that count up from a random number."

    tokens: int = 50
    row_length: int = 12
    domain = property(lambda self: self)
    vocabulary = property(lambda self: range(self.tokens))

    def batch(self, n, seed, step, split="train"):
        chance = np.random.default_rng([*np.atleast_1d(seed), step, split == "test"])
        return (chance.integers(0, self.tokens, (n, 1)) + np.arange(self.row_length)) % self.tokens


def theirs(shape, model):
    "Hugging Face's Llama with our weights."
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    other = transformers.LlamaForCausalLM(config).eval()
    given = {"model.embed_tokens.weight": model.token.weight, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        given |= {f"{at}input_layernorm.weight": block.norm1.weight}
        given |= {f"{at}post_attention_layernorm.weight": block.norm2.weight}
        given |= {f"{at}self_attn.{n}_proj.weight": w for n, w in zip("qkv", block.attention.qkv.weight.chunk(3))}
        given |= {
            f"{at}self_attn.o_proj.weight": block.attention.out.weight,
            f"{at}mlp.down_proj.weight": block.down.weight,
        }
        given |= {f"{at}mlp.{n}_proj.weight": w for n, w in zip(("gate", "up"), block.up.weight.chunk(2))}
    missing = other.load_state_dict(given, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    return other


def test_it_is_hugging_faces(model, ids):
    other = theirs(SMALL, model)
    for t in (10, 90):  # the explicit attention and the fused
        with torch.no_grad():
            torch.testing.assert_close(model(ids[:, :t]), other(ids[:, :t]).logits, rtol=1e-4, atol=1e-4)


def test_the_papers_shape_has_91_million_parameters():
    shape = LlamaShape()
    block = 2 * shape.width + 4 * shape.width**2 + 3 * shape.width * shape.hidden
    assert shape.hidden == 2048
    assert round((shape.vocabulary * shape.width + shape.width + 12 * block) / 1e6) == 91
    counted = sum(p.numel() for p in SMALL.model(0).parameters())
    assert counted == 50 * 16 + 16 + 2 * (2 * 16 + 4 * 16**2 + 3 * 16 * 64)


def test_a_step_at_the_papers_shape():
    "Of a whole row of 1,024 tokens; the batch alone is smaller."
    paper = deletion.SIZES["paper"]
    shape = LlamaShape(paper.vocabulary, paper.context, paper.blocks, paper.heads, paper.width)
    model = shape.model(0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    log = train(model, Rising(8192, paper.length), replace(paper.pretraining, steps=1, batch=1), seed=0)
    assert sum(p.numel() for p in model.parameters()) > 90e6 and abs(log[-1]["value"] - np.log(8192)) < 1
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.gpu
def test_cuda_trains_and_writes_like_the_cpu(model):
    recipe, logs = Recipe(steps=60, batch=16, lr=1e-2, warmup=0.1), []
    for device in ("cpu", "cuda"):
        log = train(SMALL.model(0), Rising(), recipe, 0, device=device)
        logs.append([row["value"] for row in log if row["metric"] == "loss"])
    assert logs[1] == pytest.approx(logs[0], rel=0.05, abs=0.05)
    wanted = generate(model, [[1, 2], [3]], 20, temperature=0)
    assert generate(model.cuda(), [[1, 2], [3]], 20, temperature=0) == wanted


def test_the_last_position_alone_and_piece_by_piece_come_to_the_same(model, ids):
    model.double()  # with these weights a float's last digits grow to the fourth
    whole = model(ids)
    torch.testing.assert_close(model(ids, last=True), whole[:, -1])
    for cuts in ([1] * 90, [70, 1, 1, 18], [40, 30, 20]):
        cache, parts = Cache(SMALL, 3, 90, model.token.weight), []
        for part in ids.split(cuts, 1):
            parts.append(model(part, cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), whole)
    cache = Cache(SMALL, 3, 90, model.token.weight)
    model(ids[:, :80], last=True, cache=cache)
    torch.testing.assert_close(model(ids[:, 80:], last=True, cache=cache), whole[:, -1])


def test_sites_are_named_as_the_gpts_and_can_be_read_and_changed(model, ids):
    from wrapperlib.model import GPT, Shape

    gpt = GPT(50, 300, Shape(2, 2, 16))
    assert set(site_names(model)) == set(site_names(gpt)) and residual_sites(model) == residual_sites(gpt)
    seen = read(model, ids, ["blocks.0.attention", "blocks.1.neurons"])
    weights = seen["blocks.0.attention"]
    assert weights.shape == (3, 2, 90, 90) and seen["blocks.1.neurons"].shape == (3, 90, 64)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 90))
    assert weights.triu(1).abs().max() == 0
    before = model(ids)
    with change(model, {"blocks.0.residual": torch.zeros_like}):
        assert not torch.allclose(model(ids), before)
    torch.testing.assert_close(model(ids), before)


def one_by_one(model, prompt, n, end):
    "Greedy, the plain way."
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == end:
            break
    new = ids[len(prompt) :]
    return new[: new.index(end)] if end in new else new


@torch.no_grad()
def test_writing_is_what_one_text_alone_would_come_to(model):
    model.double()
    prompts = [[1], [2, 3, 4, 5, 6], [7] * 30, [9, 8]]
    chosen = one_by_one(model, prompts[1], 20, end=-1)[10]  # a token that does come
    for end in (-1, chosen):
        wanted = [one_by_one(model, p, 20, end) for p in prompts]
        for cached in (True, False):
            assert generate(model, prompts, 20, end, temperature=0, cached=cached) == wanted
    assert len(wanted[1]) <= 10


def test_what_is_drawn_does_not_depend_on_the_cache(model):
    model.double()  # or two tokens that are nearly as likely change places
    prompts = [[i, i + 1, i + 2][: 1 + i % 3] for i in range(16)]
    given = [generate(model, prompts, 100, end=-1, seed=5, cached=cached) for cached in (True, False)]
    assert given[0] == given[1] != generate(model, prompts, 100, end=-1, seed=6)
    assert all(len(text) == 100 for text in given[0])


def test_tokens_are_drawn_as_often_as_the_model_says(model):
    drawn = [text[0] for text in generate(model, [[4, 2]] * 4000, 1, end=-1)]
    share = torch.tensor(drawn).bincount(minlength=50) / 4000
    assert (share - model(torch.tensor([[4, 2]]), last=True)[0].softmax(-1)).abs().max() < 0.03


def test_bad_input_is_refused(model):
    for given, says in (
        (dict(heads=5), "width is 768; allowed: multiples of twice the heads"),
        (dict(blocks=0), "blocks is 0"),
        (dict(vocabulary=1), "vocabulary is 1"),
        (dict(context="long"), "context is 'long'"),
    ):
        with pytest.raises(BadInput, match=says):
            LlamaShape(**given)
    with pytest.raises(BadInput, match="tokens of prompt and story is 301; allowed: at most the model's context, 300"):
        generate(model, [[1]], 300)
    with pytest.raises(BadInput, match="prompts is '0 of at least 0 tokens"):
        generate(model, [], 3)
    with pytest.raises(BadInput, match="prompts is '2 of at least 0 tokens"):
        generate(model, [[1], []], 3)


def test_the_loop_trains_it_and_the_store_keeps_it(tmp_path):
    recipe = Recipe(steps=150, batch=16, lr=1e-2, warmup=0.1)
    run = Run(Rising(), recipe, SMALL, measures=(Measure("right", Rising(), n=64),))
    assert "llama" in sources_of(run)
    store = Store(tmp_path)
    train_run(store, run)
    log = store.log(run)
    assert log[log.metric == "right"].value.iloc[-1] == 1.0
    model = store.model(run)
    assert generate(model, [[7, 8, 9]], 5, end=-1, temperature=0) == [[10, 11, 12, 13, 14]]
    again = run.fresh_model()
    assert not torch.equal(again.token.weight, model.token.weight)


def test_models_side_by_side_are_trained_as_alone(tmp_path):
    runs = [Run(Rising(), Recipe(steps=3, batch=4, lr=1e-3), SMALL, seed) for seed in (0, 1)]
    train_runs(Store(tmp_path / "together"), runs)
    for run in runs:
        train_run(Store(tmp_path / "alone"), run)
        together, alone = (Store(tmp_path / p).model(run).state_dict() for p in ("together", "alone"))
        for name in alone:
            torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-5)
