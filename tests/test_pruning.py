"Pruning against finite differences, a model whose right rows are known, and what it promises about the model."

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wrapperlib.checks import BadInput
from wrapperlib.model import GPT, Shape
from wrapperlib.pruning import (
    answer_loss,
    at_random,
    later_half,
    matrices,
    pruned,
    row_means,
    scores,
    sweep,
    top,
    where,
)


def gpt(blocks=3, seed=0):
    "A small model in double precision whose biases are not zero."
    model = GPT(20, 12, Shape(blocks, 2, 8), seed).double()
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=chance, dtype=p.dtype))
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 20, (24, 12), generator=torch.Generator().manual_seed(0))


def same(before, model):
    return all(torch.equal(x, y) for x, y in zip(before.state_dict().values(), model.state_dict().values()))


class Voters(nn.Module):
    "Two blocks whose rows vote for one of four answers: what each row does to the loss can be read off."

    def __init__(self, votes):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in votes)
        for block, weight in zip(self.blocks, votes):
            block.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32))

    def forward(self, x):
        return sum(block(x) for block in self.blocks)


def voted_loss(model, ids):
    "Input is the one-hot of the first column, the answer is the second."
    return F.cross_entropy(model(F.one_hot(ids[:, 0], 4).float()), ids[:, 1])


@pytest.mark.parametrize("unit", ["row", "weight"])
def test_scores_are_the_derivative_of_scaling_a_unit(ids, unit):
    model, epsilon, chance = gpt(), 1e-4, torch.Generator().manual_seed(1)
    found = scores(model, ids, unit)
    for name, weight in matrices(model).items():
        bias = dict(model.named_parameters())[name[: -len("weight")] + "bias"]
        for _ in range(3):
            at = tuple(int(torch.randint(n, (), generator=chance)) for n in found[name].shape)
            seen = []
            for factor in (1 + epsilon, 1 - epsilon):
                with torch.no_grad():
                    kept = weight[at].clone(), bias[at[0]].clone()
                    weight[at] *= factor
                    if unit == "row":
                        bias[at[0]] *= factor
                    seen.append(answer_loss(model, ids).item())
                    weight[at], bias[at[0]] = kept
            assert found[name][at].item() == pytest.approx((seen[0] - seen[1]) / (2 * epsilon), rel=1e-4, abs=1e-9)


def test_scores_do_not_depend_on_how_samples_are_portioned(ids):
    whole, portioned = scores(gpt(), ids), scores(gpt(), ids, batch=7)
    assert all(torch.allclose(whole[name], portioned[name]) for name in whole)


def test_a_rows_score_is_the_sum_of_its_weights_where_there_is_no_bias():
    model, ids = Voters(torch.randn(2, 4, 4).tolist()), torch.randint(0, 4, (9, 2))
    rows, weights = (scores(model, ids, unit, voted_loss) for unit in ("row", "weight"))
    assert all(torch.allclose(rows[name], weights[name].sum(1)) for name in rows)


def test_the_rows_that_hold_the_answer_down_are_found():
    right = torch.eye(4) * 2  # block 0 votes for the letter itself
    wrong = torch.zeros(4, 4)
    wrong[3] = 5.0  # row 3 of block 1 votes for answer 3, whatever the letter is
    model, ids = Voters([right.tolist(), wrong.tolist()]), torch.tensor([[0, 0], [1, 1], [2, 2]])

    def measure(m):
        return {"accuracy": (m(F.one_hot(ids[:, 0], 4).float()).argmax(1) == ids[:, 1]).float().mean().item()}

    chosen = top(scores(model, ids, loss=voted_loss), 1)
    assert chosen["blocks.1.weight"].tolist() == [False, False, False, True] and not chosen["blocks.0.weight"].any()
    table = sweep(model, scores(model, ids, loss=voted_loss), [0, 1], measure)
    assert table.query("way == 'top'")["value"].tolist() == [0.0, 1.0]
    of_weights = scores(model, ids, "weight", voted_loss)
    single = sweep(model, of_weights, [3], measure)  # the three that ever see their letter
    assert single.query("way == 'top'")["value"].tolist() == [1.0]
    assert later_half(chosen) == 1.0


def test_pruned_rows_are_silent_and_the_model_comes_back_bit_by_bit(ids):
    model = gpt()
    before, chosen = copy.deepcopy(model), top(scores(model, ids), 20)
    plain = model(ids)
    with pruned(model, chosen):
        for name, mask in chosen.items():
            linear = model.get_submodule(name.removesuffix(".weight"))
            out = linear(torch.randn(5, linear.in_features, dtype=torch.double))
            assert not out[:, mask].any() and out[:, ~mask].all()
    assert same(before, model) and torch.equal(model(ids), plain)
    with pytest.raises(ZeroDivisionError), pruned(model, chosen):
        raise ZeroDivisionError
    assert same(before, model)


def test_single_weights_leave_biases_alone(ids):
    model = gpt()
    chosen = top(scores(model, ids, "weight"), 30)
    with pruned(model, chosen):
        for name, mask in chosen.items():
            assert not matrices(model)[name][mask].any()
            assert model.get_submodule(name.removesuffix(".weight")).bias.all()


def test_means_are_those_of_a_loop_and_are_what_the_rows_then_give(ids):
    model, name = gpt(), "blocks.1.up.weight"
    prompts = ids[:, :-2]
    means = row_means(model, prompts, batch=5)
    inputs = []
    hook = model.blocks[1].up.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    for prompt in prompts:
        model(prompt[None])
    hook.remove()
    slow = torch.stack([model.blocks[1].up(x)[0, t] for x in inputs for t in range(prompts.shape[1])]).mean(0)
    assert torch.allclose(means[name], slow)
    chosen = {name: torch.arange(32) < 4}
    with pruned(model, chosen, means):
        out = model.blocks[1].up(inputs[0])[0]
        assert torch.allclose(out[:, :4], slow[:4].expand(10, 4))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=12, max_size=12), st.integers(0, 12), st.integers(0, 99))
def test_choices_nest_and_controls_keep_the_mix(values, k, seed):
    given_scores = {"blocks.0.a": torch.tensor(values[:4]), "blocks.1.a": torch.tensor(values[4:]).view(2, 4)}
    chosen = top(given_scores, k)
    flat = torch.cat([x.flatten() for x in chosen.values()])
    kept = torch.tensor(values)
    assert flat.sum() == k and (not 0 < k < 12 or kept[flat].min() >= kept[~flat].max())
    drawn = at_random(chosen, seed)
    assert [x.sum() for x in drawn.values()] == [x.sum() for x in chosen.values()]
    assert [x.shape for x in drawn.values()] == [x.shape for x in given_scores.values()]
    if k:
        fewer = top(given_scores, k - 1)
        for smaller, larger in ((fewer, chosen), (at_random(fewer, seed), drawn)):
            assert not any((smaller[name] & ~larger[name]).any() for name in larger)


def test_random_rows_differ_by_seed_and_cover_the_matrix():
    chosen = {"blocks.0.a": torch.arange(10) < 5}
    drawn = torch.stack([at_random(chosen, seed)["blocks.0.a"] for seed in range(200)]).float().mean(0)
    assert abs(drawn - 0.5).max() < 0.15


def test_random_units_are_drawn_among_those_that_are_asked_for():
    chosen = {"blocks.0.a": torch.ones(2, 3, dtype=torch.bool), "blocks.1.a": torch.zeros(4, 3, dtype=torch.bool)}
    among = {"blocks.0.a": torch.zeros(2, 3, dtype=torch.bool), "blocks.1.a": torch.arange(12).view(4, 3) < 7}
    fewer = {"blocks.0.a": torch.arange(6).view(2, 3) < 3, "blocks.1.a": chosen["blocks.1.a"]}
    for seed in range(20):
        drawn, less = at_random(chosen, seed, among), at_random(fewer, seed, among)
        assert sum(x.sum() for x in drawn.values()) == 6 and not any((x & ~among[n]).any() for n, x in drawn.items())
        assert sum(x.sum() for x in less.values()) == 3 and not any((x & ~drawn[n]).any() for n, x in less.items())
    with pytest.raises(BadInput, match="units to draw from is 5; allowed: at least 6"):
        at_random(chosen, 0, among | {"blocks.1.a": torch.arange(12).view(4, 3) < 5})


def test_a_sweep_costs_one_backward_and_the_forward_passes_of_its_measures(ids):
    model, calls = gpt(), {"loss": 0, "measure": 0}

    def loss(m, part):
        calls["loss"] += 1
        return answer_loss(m, part)

    def measure(m):
        calls["measure"] += 1
        return {"loss": answer_loss(m, ids).item(), "other": 0.0}

    before = copy.deepcopy(model)
    table = sweep(model, scores(model, ids, loss=loss), range(11), measure, row_means(model, ids[:, :-2]), seed=3)
    assert calls == {"loss": 1, "measure": 33} and same(before, model)
    assert len(table) == 66 and list(table.columns) == ["way", "k", "metric", "value"]
    start = table.query("k == 0 and metric == 'loss'")["value"]
    assert (start == answer_loss(model, ids).item()).all()
    found = scores(model, ids)
    for way, chosen in (("top", top(found, 7)), ("random", at_random(top(found, 7), 3))):
        with pruned(model, chosen):
            alone = answer_loss(model, ids).item()
        assert table.query(f"way == '{way}' and k == 7 and metric == 'loss'")["value"].item() == alone


def test_everything_can_be_pruned(ids):
    model = gpt()
    total = sum(len(p) for p in matrices(model).values())
    table = sweep(model, scores(model, ids), [total], lambda m: {"x": answer_loss(m, ids).item()})
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attention.qkv, block.attention.out, block.up, block.down):
                linear.weight.zero_(), linear.bias.zero_()
    assert table.query("way == 'top'")["value"].item() == answer_loss(model, ids).item()


def test_where_counts_by_block_and_matrix(ids):
    model = gpt()
    chosen = top(scores(model, ids), 25)
    table = where(chosen)
    assert list(table.columns) == ["attention.qkv", "attention.out", "up", "down"] and list(table.index) == [0, 1, 2]
    for name, mask in chosen.items():
        _, block, matrix = name.removesuffix(".weight").split(".", 2)
        assert table.loc[int(block), matrix] == mask.sum()


def test_later_half_counts_a_middle_block_half():
    def share(*counts):
        return later_half({f"blocks.{i}.a.weight": torch.arange(5) < n for i, n in enumerate(counts)})

    assert share(0, 2) == 1 and share(2, 0) == 0 and share(1, 3) == 0.75
    assert share(1, 2, 1) == 0.5 and share(0, 2, 2) == 0.75
    assert share(0, 0) != share(0, 0)  # nan: nothing is anywhere


@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda m, ids: sweep(m, scores(m, ids), [0, 10_000], 0), "k is 10000; allowed: whole numbers from 0 to 216"),
        (lambda m, ids: sweep(m, scores(m, ids, "weight"), [10**6], 0), "k is 1000000"),
        (lambda m, ids: sweep(m, scores(m, ids), [True], 0), "k is True"),
        (lambda m, ids: sweep(m, scores(m, ids), [1.0], 0), "k is 1.0"),
        (lambda m, ids: sweep(m, scores(m, ids, "weight"), [1], 0, row_means(m, ids)), "means is .*that have a bias"),
        (lambda m, ids: sweep(m, scores(gpt(4), ids), [1], 0), "units is 'blocks.3"),
        (lambda m, ids: scores(m, ids, "column"), "unit is 'column'"),
        (lambda m, ids: top(scores(m, ids), -1), "k is -1"),
        (lambda m, ids: matrices(nn.Linear(2, 2)), "model is 'Linear'"),
        (lambda m, ids: pruned(m, top(scores(gpt(4), ids), 1)).__enter__(), "units is 'blocks.3"),
        (lambda m, ids: pruned(m, {"blocks.0.up.weight": torch.ones(5) > 0}).__enter__(), r"units is .*\(5,\)"),
        (
            lambda m, ids: pruned(m, top(scores(m, ids, "weight"), 1), row_means(m, ids)).__enter__(),
            "means is .*rows that have a bias",
        ),
    ],
)
def test_bad_input_is_named_before_any_work(ids, bad, says):
    with pytest.raises(BadInput, match=says):
        bad(gpt(), ids)
