"Statistics and verdicts."

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from wrapperlib.checks import BadInput
from wrapperlib.claims import (
    REVIVAL_CLAIMS,
    Claim,
    Value,
    area,
    at_end,
    interval,
    judge,
    judge_revival,
    pick,
    steps_to,
    verdict_table,
    with_grounds,
)

RATES = {"η_L": 1e-3, "η_M": 3e-4, "η_S": 1e-4}


def exact(*values):
    return [Value(v, v, v) for v in values]


def test_interval_is_students():
    x = [0.2, 0.5, 0.4, 0.9]
    low, high = stats.t.interval(0.90, 3, np.mean(x), stats.sem(x))
    assert interval(exact(*x)) == pytest.approx((0.5, low, high))
    mean, low, high = interval(exact(2, 8), ratio=True)
    assert mean == pytest.approx(4) and low * high == pytest.approx(16)
    assert interval([Value(3, 1, 9)]) == (3, 1, 9)


@pytest.mark.parametrize(
    "side, threshold, values, verdict",
    [
        (">=", 3, (4, 5, 6), "holds"),
        (">=", 3, (1, 1.1, 0.9), "fails"),
        (">=", 3, (2, 3, 4), "inconclusive"),
        (">=", 3, (3, 3, 3), "holds"),
        ("<=", 0.2, (0, 0, 0), "holds"),
        ("<=", 0.2, (0.5, 0.6, 0.55), "fails"),
        ("<=", 0.2, (0.0, 0.4, 0.2), "inconclusive"),
    ],
)
def test_verdicts(side, threshold, values, verdict):
    assert judge(Claim("X", "", "", side, threshold, ""), exact(*values))["verdict"] == verdict


def test_one_seed_is_judged_by_its_measurement():
    claim = Claim("X", "", "", ">=", 0.95, "")
    assert judge(claim, [Value(0.96, 0.94, 0.97)])["verdict"] == "inconclusive"
    row = judge(claim, [Value(0.99, 0.97, 1.0)])
    assert (row["verdict"], row["interval_of"], row["seeds"]) == ("holds", "measurement", 1)


def test_a_claim_without_its_grounds_is_inconclusive():
    claims = {c.id: c for c in (Claim("A", "", "", ">=", 1, ""), Claim("B", "", "", ">=", 1, "", rests_on=("A",)))}
    for first, second in ((0, "inconclusive"), (2, "holds")):
        rows = [judge(claims["A"], exact(first)), judge(claims["B"], exact(5))]
        assert with_grounds(claims, rows)[1]["verdict"] == second
    assert {i for c in REVIVAL_CLAIMS.values() for i in c.rests_on} <= set(REVIVAL_CLAIMS)


def curve(steps, values):
    return pd.DataFrame(dict(step=steps, value=values))


def test_steps_to():
    found = steps_to(curve([0, 10, 20], [0.5, 0.9, 1.0]))
    assert (found.value, found.low, found.high) == pytest.approx((15, 10, 20))
    assert steps_to(curve([0, 10], [0.99, 0.2])).value == 1
    never = steps_to(curve([0, 10, 400], [0, 0.2, 0.9]))
    assert (never.value, never.low, never.high) == (400, 400, math.inf)
    shuffled = curve([20, 0, 10], [1.0, 0.5, 0.9])
    assert steps_to(shuffled).value == pytest.approx(15)


def test_a_censored_control_makes_a_ratio_a_lower_bound():
    ratio = steps_to(curve([0, 400], [0, 0.5])) / steps_to(curve([0, 20, 40], [0, 0.9, 1.0]))
    assert ratio.value == pytest.approx(400 / 30) and ratio.low == 10 and ratio.high == math.inf
    row = judge(Claim("X", "", "", ">=", 3, "", ratio=True), [ratio])
    assert row["verdict"] == "holds" and row["censored"] == [True] and row["interval"] == [10, None]
    assert (
        "∞" in verdict_table(with_grounds({"X": Claim("X", "", "", ">=", 3, "")}, [row])).loc["X", "value [interval]"]
    )


def test_area_and_end():
    flat = curve([0, 1, 10, 100], [0.0, 0.5, 0.5, 0.5])
    assert area(flat, 512).value == pytest.approx(0.5)
    assert area(flat, 512).low < 0.5 < area(flat, 512).high
    late = curve([0, 1, 10, 100], [0, 0, 0, 1.0])
    assert area(late, 512, log=True).value == pytest.approx(0.25)
    assert area(late, 512).value == pytest.approx(90 / 99 / 2)
    end = at_end(late, 100)
    assert end.value == 1 and end.low == pytest.approx(stats.binomtest(100, 100).proportion_ci(0.9, "wilson").low)


def experiment(seeds, reach):
    "A made-up revival experiment: who arrives when."
    steps = np.array([0, 1, 10, 30, 100, 300, 400])
    parts = []

    def add(seed, protocol, metric, c_te, values, **labels):
        parts.append(curve(steps, values).assign(protocol=protocol, metric=metric, c_te=c_te, seed=seed, **labels))

    for seed in range(seeds):
        for prior in "HML":
            for metric in ("acc_opt", "acc_oft"):
                add(seed, "pretraining", metric, 0.0, np.full(7, 1.0), prior=prior)
            add(seed, "fine_tuning", "acc_opt", 0.0, np.linspace(1, 0, 7), prior=prior, c_tr=1.0)
            add(seed, "fine_tuning", "acc_oft", 1.0, np.linspace(0, 1, 7), prior=prior, c_tr=1.0)
            for re_lr in (3e-4, 1e-4):
                add(
                    seed,
                    "reft",
                    "acc_opt",
                    0.0,
                    np.where(steps >= reach[prior], 1.0, 0.0),
                    prior=prior,
                    c_tr=1.0,
                    re_lr=re_lr,
                )
        for re_lr in (3e-4, 1e-4):
            add(seed, "scr_ft", "acc_opt", 0.0, np.where(steps >= reach["scr"], 1.0, 0.0), re_lr=re_lr)
    return pd.concat(parts, ignore_index=True).reindex(
        columns=["seed", "protocol", "prior", "c_tr", "c_te", "re_lr", "step", "metric", "value"]
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_revival_claims_hold_where_they_should_and_fail_where_they_should(seeds):
    wrapped = judge_revival(experiment(seeds, dict(H=1, M=1, L=30, scr=300)), RATES, 512)
    assert {row["id"]: row["verdict"] for row in wrapped} == dict.fromkeys(REVIVAL_CLAIMS, "holds")
    gone = {
        row["id"]: row["verdict"]
        for row in judge_revival(experiment(seeds, dict(H=300, M=300, L=300, scr=300)), RATES, 512)
    }
    about_speed = {i: v for i, v in gone.items() if i[:2] in ("C4", "C5")}
    assert len(about_speed) == 6 and "holds" not in about_speed.values()
    if seeds > 1:  # of one seed only the steps between evaluations are known, and they are too far apart here
        assert set(about_speed.values()) == {"fails"}


def test_claims_without_their_curves_are_left_out():
    table = experiment(1, dict(H=1, M=10, L=30, scr=300))
    only_h = judge_revival(table[table["prior"].isna() | (table["prior"] == "H")], RATES, 512)
    assert [row["id"] for row in only_h] == ["S1"]
    with pytest.raises(BadInput, match="results is"):
        pick(table, prior="X")
