"Levers, trials, and when a capability counts as there."

import numpy as np
import pandas as pd
import pytest

from wrapperlib.checks import BadInput
from wrapperlib.protocols import SCALES
from wrapperlib.recipes import LEVERS, Growing, arrivals, quicker, trial, trials
from wrapperlib.tasks import PRIORS, Natural

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
        and found.loc["indexing", "censored"] == 5
        and found.loc["counting", "censored"] == 0
    )
    assert found.loc["indexing", "p"] == pytest.approx(1 / 252)  # all five later than all of ours: 1 of C(10, 5) orders
    same = quicker(arrivals(pd.concat(rows), "step"), "ours", "ours")
    assert (same["p"] > 0.4).all()


def test_ours_not_arriving_leaves_no_lower_bound():
    rows = pd.concat([curve("ours", 0, (10, 0.5, 0.5)), curve("theirs", 0, (40, 1, 1))])
    assert (quicker(arrivals(rows, "step"), "ours", "theirs")["low"] == 0).all()


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
