"Probes against slow references, models whose readable places are known, and the controls."

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from wrapperlib.checks import BadInput
from wrapperlib.model import GPT, Shape, Site, read
from wrapperlib.probing import (
    PENALTY,
    Probes,
    Residuals,
    exact,
    gather,
    profile,
    protocol,
    residual_sites,
    shuffled,
)


def made_up(n=600, width=6, classes=4, noise=1.0, seed=0, sites=3):
    "Residuals in which a class can be told in part, better from site to site; tokens 10, 11, …"
    chance = np.random.default_rng(seed)
    y = chance.integers(0, classes, n)
    centres = chance.normal(size=(classes, width))
    mix = chance.normal(size=(sites, width, width))
    x = [(k * centres[y] + noise * chance.normal(size=(n, width))) @ mix[k] + 3 for k in range(sites)]
    names = tuple(f"blocks.{k}.residual" for k in range(sites))
    return Residuals(torch.tensor(np.stack(x), dtype=torch.float32), torch.from_numpy(y) + 10, names)


class Reveals(nn.Module):
    "Its first site shows noise, its second the last token."

    def __init__(self):
        super().__init__()
        self.token, self.embed = nn.Embedding(8, 8), Site()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].residual = Site()
        nn.init.eye_(self.token.weight)

    def forward(self, ids):
        noise = torch.randn(*ids.shape, 8, generator=torch.Generator().manual_seed(0))
        self.embed(noise)
        return self.blocks[0].residual(noise + 20 * self.token(ids))


def test_gather_keeps_the_last_position_of_every_site():
    model = GPT(20, 12, Shape(3, 2, 8))
    prompts = torch.randint(0, 20, (11, 9), generator=torch.Generator().manual_seed(0))
    data = gather(model, prompts, prompts[:, 0], 20, batch=4)
    assert data.sites == ("embed", "blocks.0.residual", "blocks.1.residual", "blocks.2.residual")
    assert data.x.shape == (4, 11, 8)
    for k, name in enumerate(data.sites):
        alone = torch.cat([read(model, prompt[None], [name])[name][:, -1] for prompt in prompts])
        assert torch.allclose(data.x[k], alone, atol=1e-6)
    assert torch.allclose(gather(model, prompts, prompts[:, 0], 20, last=True).x, data.x, atol=1e-6)
    some = gather(model, prompts, prompts[:, 0], 20, ["blocks.1.neurons"])
    assert some.x.shape == (1, 11, 32)


@pytest.mark.parametrize("fit", [exact, lambda data: protocol(data, 8, steps=400)], ids=["exact", "protocol"])
def test_what_is_there_is_read_and_what_is_not_is_not(fit):
    ids = torch.randint(0, 8, (1500, 5), generator=torch.Generator().manual_seed(1))
    learn, test = (gather(Reveals(), part, part[:, -1], 8) for part in (ids[:1000], ids[1000:]))
    table = profile(learn, test, fit)
    assert list(table.index) == list(residual_sites(Reveals())) == ["embed", "blocks.0.residual"]
    assert table.accuracy.iloc[1] == 1 and table.accuracy.iloc[0] < 0.25
    assert table.selectivity.iloc[1] > 0.7 and abs(table.selectivity.iloc[0]) < 0.1
    assert (table.majority == (test.y == learn.y.mode().values).float().mean().item()).all()


def test_literal_protocol_is_a_plain_linear_layer_for_each_site():
    data, steps = made_up(), 200
    ours = protocol(data, 15, literal=True, steps=steps, seed=4)
    for k, x in enumerate(data.x):
        linear = nn.Linear(x.shape[1], 15)
        nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
        optimiser, chance = torch.optim.AdamW(linear.parameters(), lr=1e-3), torch.Generator().manual_seed(4)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 1e-3 / 10 ** sum(step >= s for s in (100, 150, 175))
            some = torch.randint(len(x), (96,), generator=chance)
            optimiser.zero_grad()
            F.cross_entropy(linear(x[some]), data.y[some]).backward()
            optimiser.step()
        assert torch.allclose(ours.weight[k], linear.weight.T, atol=1e-5)
        assert torch.allclose(ours.bias[k, 0], linear.bias, atol=1e-5)


@pytest.mark.parametrize("penalty", [PENALTY, 0.3])
def test_exact_probes_are_at_the_minimum_that_scipy_finds(penalty):
    data = made_up()
    probes, (classes, width) = exact(data, penalty, tolerance=1e-6), (4, 6)
    for k, x in enumerate(data.x.double().numpy()):
        x = x - x.mean(0)
        factor = 1 / np.sqrt((x**2).mean())

        def loss(flat, x=factor * x):
            weight, bias = flat[:-classes].reshape(width, classes), flat[-classes:]
            logits = x @ weight + bias
            top = logits.max(1, keepdims=True)
            of_all = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
            chosen = logits[np.arange(len(x)), data.y.numpy() - 10]
            return (of_all - chosen).mean() + penalty / 2 * (weight**2).sum()

        found = minimize(loss, np.zeros(width * classes + classes), method="BFGS", options=dict(gtol=1e-6))
        weight = factor * found.x[:-classes].reshape(width, classes)
        assert np.allclose(probes.weight[k].numpy(), weight, atol=2e-3)
    assert probes.classes.tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("noise, classes", [(1.0, 4), (3.0, 6), (0.2, 3)])
def test_protocol_and_exact_agree_within_half_a_point(noise, classes):
    everything = made_up(8000, 16, classes, noise, seed=2)
    learn, test = (
        replace(everything, x=everything.x[:, part], y=everything.y[part]) for part in (slice(4000), slice(4000, None))
    )
    gap = np.subtract(exact(learn).accuracy(test), protocol(learn, 20).accuracy(test))
    assert abs(gap[1:]).max() < 0.005  # at the first site there is nothing to read


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-5, 5), st.integers(0, 50))
def test_reading_does_not_depend_on_scale_shift_or_rotation(scale, shift, seed):
    data = made_up(200)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)))[0]
    other = replace(data, x=scale * (data.x @ turn + shift))
    assert np.allclose(exact(data).accuracy(data), exact(other).accuracy(other), atol=0.02)


def test_a_place_where_nothing_varies_gives_the_most_frequent_class():
    data = replace(made_up(), x=torch.full((1, 600, 6), 0.7), sites=("embed",))
    y = torch.where(torch.arange(600) < 400, 13, data.y)
    data = replace(data, y=y)
    majority = (y == 13).float().mean().item()
    for probes in (exact(data), protocol(data, 15, steps=200), protocol(data, 15, literal=True, steps=200)):
        assert probes.accuracy(data) == pytest.approx([majority])


def test_shuffled_labels_are_the_same_labels_in_another_order():
    data = made_up()
    other = shuffled(data, seed=1)
    assert torch.equal(other.x, data.x) and torch.equal(other.y.sort().values, data.y.sort().values)
    assert not torch.equal(other.y, data.y) and torch.equal(other.y, shuffled(data, seed=1).y)


def test_shuffled_labels_can_be_learned_by_heart_but_not_read():
    few = made_up(n=30, width=40, sites=2)
    by_heart = shuffled(few)
    assert min(exact(by_heart, penalty=1e-4).accuracy(by_heart)) > 0.9
    many, test = made_up(n=3000, seed=3), made_up(n=3000, seed=3)
    assert max(exact(shuffled(many)).accuracy(shuffled(test, 9))) < 0.35


def test_accuracy_is_the_share_of_tokens_read_rightly():
    data = Residuals(torch.eye(3)[None], torch.tensor([7, 9, 9]), ("embed",))
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert Probes(weight[None], torch.zeros(1, 1, 2), torch.tensor([7, 9])).accuracy(data) == pytest.approx([2 / 3])


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(vocabulary=21), "vocabulary of the model is '20 tokens'.*21"),
        (dict(sites=["embed", "blocks.5.residual"]), "site is 'blocks.5.residual'; allowed: embed"),
        (dict(targets=torch.full((6,), 3)), r"targets is '\[3\] alone'"),
    ],
)
def test_bad_input_is_named_before_the_model_runs(change, says):
    model = GPT(20, 12, Shape(2, 2, 8))
    model.forward = None  # may not be called
    good = dict(prompts=torch.zeros(6, 9, dtype=int), targets=torch.arange(6), vocabulary=20)
    with pytest.raises(BadInput, match=says):
        gather(model, **(good | change))


def test_sets_that_cannot_be_probed_are_named():
    with pytest.raises(BadInput, match="targets"):
        Residuals(torch.zeros(1, 3, 2), torch.ones(3), ("embed",))
    data = made_up()
    with pytest.raises(BadInput, match="sites is 'embed, x, y'"):
        profile(data, replace(data, sites=("embed", "x", "y")))
