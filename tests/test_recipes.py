"Levers, trials, and when a capability counts as there."

import numpy as np
import pandas as pd
import pytest
import torch

from wrapperlib import recipes
from wrapperlib.checks import BadInput
from wrapperlib.model import GPT
from wrapperlib.protocols import FAST, SCALES
from wrapperlib.recipes import (
    LEVERS,
    Drawn,
    Growing,
    _mean_of_what_is_there,
    arrivals,
    quicker,
    times_as_long,
    trial,
    trials,
)
from wrapperlib.tasks import PRIORS, Natural
from wrapperlib.training import Recipe, Stack, loss_of, one_step

TINY = dict(scale=SCALES["smoke"], every=2, samples=16)


def curve(recipe, seed, *points):
    rows = [dict(step=s, seconds=s / 10, samples=96 * s, counting=a, composition=a, indexing=b) for s, a, b in points]
    return pd.DataFrame(rows).assign(recipe=recipe, seed=seed)


def test_a_capability_is_there_at_its_first_evaluation_above_the_level():
    rows = curve("ours", 0, (10, 0.5, 0.1), (20, 0.99, 0.2), (30, 0.98, 0.995))
    found = arrivals(rows, "step").set_index("capability")
    assert dict(found["value"]) == dict(counting=20, composition=20, indexing=30) | {"all three": 30}
    assert not found["censored"].any()
    never = arrivals(curve("ours", 0, (10, 1.0, 0.1), (40, 1.0, 0.9)), "samples").set_index("capability")
    assert never.loc["indexing"].tolist()[2:] == [96 * 40, True] and never.loc["all three", "censored"]
    assert not never.loc["counting", "censored"]


def test_ratios_are_paired_by_seed_and_censored_ones_are_bounds():
    rows = [curve("ours", s, (10 * (s + 1), 1, 1)) for s in range(5)]
    rows += [curve("theirs", s, (40 * (s + 1), 1, 0.5)) for s in range(5)]
    found = quicker(arrivals(pd.concat(rows), "step"), "ours", "theirs")
    assert (
        (found["ratio"] == 4).all()
        and found.loc["indexing", "theirs_censored"] == 5
        and found.loc["counting", "theirs_censored"] == 0
        and (found["ours_censored"] == 0).all()
    )
    assert found.loc["indexing", "p"] == pytest.approx(1 / 252)  # all five later than all of ours: 1 of C(10, 5) orders
    same = quicker(arrivals(pd.concat(rows), "step"), "ours", "ours")
    assert (same["p"] > 0.4).all()


def test_ours_not_arriving_leaves_no_lower_bound():
    arrives = [curve("ours", s, (10, 1, 1)) for s in range(2)]
    rows = [*arrives, *(curve("ours", s, (10, 0.5, 0.5)) for s in range(2, 5))]
    rows += [curve("theirs", s, (40, 0.5, 0.5)) for s in range(5)]
    arrived = arrivals(pd.concat(rows), "step")
    assert (times_as_long(arrived, "ours", "theirs").T == [4, 4, 0, 0, 0]).all(axis=None)
    found = quicker(arrived, "ours", "theirs")
    assert (found[["ratio", "low", "high"]] == [0, 0, 4]).all(axis=None)
    assert (found["ours_censored"] == 3).all() and (found["theirs_censored"] == 5).all()
    # the two that arrived are the first two of ten in C(5, 2) of C(10, 2) orders; all others are tied
    assert found["p"].to_list() == pytest.approx([10 / 45] * 4)
    assert quicker(arrived[arrived["seed"] == 0], "ours", "theirs")["p"].isna().all()  # one seed is no test


def test_a_trial_is_a_function_of_its_seed_and_stops_when_all_is_there():
    one, again, other = (trial("fast", seed, 6, **TINY).drop(columns="seconds") for seed in (0, 0, 1))
    assert one.equals(again) and not one.drop(columns="seed").equals(other.drop(columns="seed"))
    assert list(one["step"]) == [2, 4, 6] and len(trial("fast", 0, 6, level=0.0, **TINY)) == 1
    with pytest.raises(BadInput, match="lever is 'magic'"):
        trial("magic", 0, 6, **TINY)


def test_trials_side_by_side_are_those_one_by_one():
    wanted = [("fast", 0, 4), ("paper", 0, 4)]
    rows = trials(wanted, workers=2, **TINY)
    assert list(rows["recipe"].unique()) == ["fast", "paper"]
    alone = pd.concat([trial(*what, **TINY) for what in wanted], ignore_index=True)
    assert rows.drop(columns="seconds").equals(alone.drop(columns="seconds"))


def test_trials_that_ended_are_kept_for_whoever_goes_on(tmp_path, monkeypatch):
    wanted = [("fast", 0, 4), ("paper", 0, 4)]
    first = trials(wanted[:1], workers=1, keep=tmp_path, **TINY)
    both = trials(wanted, workers=1, keep=tmp_path, **TINY)
    assert both[both["recipe"] == "fast"].equals(first)  # its seconds, too
    assert len(list(tmp_path.iterdir())) == 2

    def fails(*_, **__):
        raise AssertionError("nothing is tried again")

    monkeypatch.setattr(recipes, "trial", fails)
    assert trials(wanted, workers=1, keep=tmp_path, **TINY).equals(both)
    with pytest.raises(AssertionError):
        trials([("fast", 0, 5)], workers=1, keep=tmp_path, **TINY)


def test_no_lever_but_one_touches_the_prior(domain):
    from wrapperlib.recipes import _begin

    for name, lever in LEVERS.items():
        stream = _begin(name, lever, 0, 20, SCALES["desk"], (1.0, 0.0, 0.0))[1]
        asked = {int(row[2]) for step in (0, 19) for row in stream.batch(400, (0, 0), step)}
        b = {SCALES["desk"].domain.ids[x] for x in ("b", "bb", "c", "cc")}
        assert bool(asked & b) == (name == "operands balanced first"), name


def test_batches_grow(domain):
    stream = Growing(Natural(domain, PRIORS["H"]), until=3, share=0.25)
    assert [len(stream.batch(40, 0, step)) for step in range(5)] == [10, 10, 10, 40, 40]
    assert np.array_equal(stream.batch(40, 0, 4), stream.stream.batch(40, 0, 4))


def test_a_small_batch_counts_for_what_it_has(domain, shape):
    stream = Drawn(Growing(Natural(domain, PRIORS["H"]), until=1, share=0.25))
    model, recipe = GPT(len(domain.vocabulary), domain.row_length, shape), Recipe(batch=40, clip=1e9)
    _mean_of_what_is_there(model, stream)
    ids = torch.from_numpy(stream.batch(40, 0, 0))
    one_step(Stack([model]), {}, ids[None], recipe, 0)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    stream.asked_by_given = 1.0
    loss_of(model, ids, recipe).backward()
    assert all(torch.allclose(a, p.grad, rtol=1e-4, atol=1e-7) for a, p in zip(found, model.parameters()))
    stream.batch(40, 0, 1)
    assert len(ids) == 10 and stream.samples == 50
    rows = trial("small batches first", 0, 10, **TINY)
    whole = FAST["pretraining"].batch
    assert list(rows["samples"]) == [round(0.25 * whole) * min(s, 4) + whole * max(0, s - 4) for s in rows["step"]]
