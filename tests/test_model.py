"The model against an independent implementation, and its sites."

import pytest
import torch

from wrapperlib import bench
from wrapperlib.checks import BadInput
from wrapperlib.model import _HAS_ONEDNN, GPT, Shape, change, linear, read, site_names


@pytest.mark.parametrize("who, other", [("transformers", "as_gpt2"), ("transformer_lens", "as_hooked")])
def test_logits_are_those_of_other_implementations(who, other):
    pytest.importorskip(who)
    ours = GPT(vocabulary=50, context=40, shape=Shape(blocks=3, heads=4, width=32), seed=3).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1; make them count
        for p in ours.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    theirs = getattr(bench, other)(ours).eval()
    ids = torch.randint(0, 50, (4, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(ids)
        assert torch.allclose(ours(ids), getattr(logits, "logits", logits), atol=1e-5)


def test_paper_shape_has_about_three_million_parameters():
    assert 2.5e6 < sum(p.numel() for p in GPT(268, 259).parameters()) < 3.5e6


@pytest.fixture
def model(shape):
    return GPT(30, 20, shape, seed=0)


@pytest.fixture
def ids():
    return torch.randint(0, 30, (3, 20), generator=torch.Generator().manual_seed(0))


def test_every_site_reads_and_changes(model, ids):
    plain = model(ids)
    shapes = {
        "embed": (3, 20, 16),
        "attention": (3, 2, 20, 20),
        "attention_out": (3, 20, 16),
        "neurons": (3, 20, 64),
        "residual": (3, 20, 16),
    }
    for name in site_names(model):
        kind = name.split(".")[-1]
        assert read(model, ids, [name])[name].shape == shapes[kind]
        with change(model, {name: torch.zeros_like}):
            assert not torch.allclose(model(ids), plain)
    assert torch.equal(model(ids), plain)
    assert len(site_names(model)) == 1 + 4 * 2


def test_hooks_are_gone_after_an_error(model, ids):
    with pytest.raises(ZeroDivisionError), change(model, {"embed": lambda x: 1 / 0}):
        model(ids)
    assert not any(s._forward_hooks for s in site_names(model).values())


def test_fused_and_explicit_attention_agree_with_gradients(model, ids, monkeypatch):
    monkeypatch.setattr("wrapperlib.model._SHORT", 0)

    def gradients(explicit, last):
        with change(model, {f"blocks.{i}.attention": lambda x: None for i in range(2)} if explicit else {}):
            out = model(ids, last=last)
        model.zero_grad()
        out.square().sum().backward()
        return out, [p.grad.clone() for p in model.parameters()]

    for last in (False, True):
        (a, da), (b, db) = gradients(False, last), gradients(True, last)
        assert torch.allclose(a, b, atol=1e-5) and all(torch.allclose(x, y, atol=1e-4) for x, y in zip(da, db))


def test_last_is_the_last_position(model, ids):
    assert torch.allclose(model(ids)[:, -1], model(ids, last=True), atol=1e-6)


def test_the_future_is_not_seen(model, ids):
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 30
    assert torch.allclose(model(ids)[:, :12], model(changed)[:, :12], atol=1e-6)


@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda: Shape(width=100, heads=6), "width is 100"),
        (lambda: Shape(blocks=0), "blocks is 0"),
        (lambda: GPT(1, 10), "vocabulary is 1"),
        (
            lambda: read(GPT(5, 5, Shape(1, 1, 4)), torch.zeros(1, 5, dtype=int), ["blocks.9.residual"]),
            "site is 'blocks.9.residual'",
        ),
    ],
)
def test_bad_input_is_named(bad, says):
    with pytest.raises(BadInput, match=says):
        bad()


@pytest.mark.parametrize("rows", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("inputs, outputs", [(8, 24), (24, 8), (16, 16)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_maps_are_pytorchs(rows, inputs, outputs, biased, monkeypatch):
    monkeypatch.setattr("wrapperlib.model._ONEDNN", _HAS_ONEDNN)  # also where it is not the quicker one
    chance = torch.Generator().manual_seed(0)
    shapes = [(*rows, inputs), (outputs, inputs), (outputs,)][: 2 + biased]
    found = []
    for f in (linear, torch.nn.functional.linear):
        given = [torch.randn(s, generator=chance.manual_seed(i)).requires_grad_() for i, s in enumerate(shapes)]
        out = f(*given)
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        found.append([out, *(x.grad for x in given)])
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-3) for x, y in zip(*found))
    assert all(x.shape == y.shape for x, y in zip(*found))


def test_linear_maps_in_other_precisions_are_pytorchs_very_own():
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16
