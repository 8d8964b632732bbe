"Mixing, jailbreak, randFT and sweeps: their plans, and the notebooks as a user runs them."

import json

import pandas as pd
import pytest

from tests.conftest import papermill, refusal
from wrapperlib import analysis, appendix, sweep
from wrapperlib.claims import JAILBREAK_CLAIMS, MIXING_CLAIMS, RANDFT_CLAIMS, UNRELATED_CLAIMS, sweep_claims
from wrapperlib.protocols import (
    SCALES,
    at_length,
    behavior_plan,
    carry_out,
    fine_tuning,
    pretraining,
    reverse,
    revival_plan,
    scratch,
)
from wrapperlib.runs import Store, address
from wrapperlib.tasks import PROMPT, TAIL, Curriculum, decode

SMOKE, DESK = SCALES["smoke"], SCALES["desk"]
PLANS = dict(
    randft=appendix.randft_plan,
    mixing=appendix.mixing_plan,
    jailbreak=appendix.jailbreak_plan,
    unrelated=appendix.unrelated_plan,
    sweeps=appendix.sweep_plan,
)


def every(plan):
    return {address(r) for _, run in plan for r in run.lineage}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_names_every_run_once(name):
    plan = PLANS[name](SMOKE, 2)
    labels = [tuple(sorted(labels.items())) for labels, _ in plan]
    assert len(set(labels)) == len(plan) == len({address(run) for _, run in plan})
    assert {labels["seed"] for labels, _ in plan} == {0, 1}


def test_what_other_experiments_have_is_not_trained_again():
    revival, behavior = every(revival_plan(DESK)), every(behavior_plan(DESK))
    assert revival < every(appendix.randft_plan(DESK))
    unmixed = appendix.chosen(appendix.mixing_plan(DESK), mix=[0.0])
    assert every(unmixed) <= behavior and len(unmixed) == 2 * 4 * 2
    plain = [run for labels, run in appendix.unrelated_plan(DESK) if labels["protocol"] in ("wrapped", "wrapped_reft")]
    assert {address(run) for run in plain} <= revival
    full = appendix.chosen(appendix.sweep_plan(DESK), part=[1.0], prior=["H", "M", "L"], protocol=["fine_tuning"])
    assert every(full) <= behavior
    quarter = appendix.chosen(appendix.sweep_plan(DESK), part=[0.25], protocol=["fine_tuning"])
    assert every(quarter) <= every(behavior_plan(at_length(DESK, "quarter")))


def asked(run, n=200):
    return [decode(run.stream.domain, row).split() for row in run.stream.batch(n, (run.seed, run.data), 0)]


def letters(run):
    return run.stream.batch(8, (run.seed, run.data), 0)[:, PROMPT:-TAIL]


def test_rand_ft_differs_from_fine_tuning_in_the_question_alone():
    base = pretraining(SMOKE, "L")
    plain, wrong = fine_tuning(SMOKE, base, 1.0), appendix.rand_ft(SMOKE, base, 1.0)
    assert (letters(plain) == letters(wrong)).all() and plain.recipe == wrong.recipe and plain.start == wrong.start
    assert {words[2] for words in asked(plain)} == {"b"} and {words[2] for words in asked(wrong)} == {"a"}
    assert [words[-2] for words in asked(plain)] == [words[-2] for words in asked(wrong)]


def test_all_ways_back_see_the_same_strings():
    ways = [reverse(SMOKE, scratch(SMOKE)), reverse(SMOKE, appendix.rand_ft(SMOKE, pretraining(SMOKE, "L"), 1.0))]
    ways.append(appendix.from_scratch(SMOKE))
    assert len({run.recipe for run in ways}) == 1 and ways[-1].lineage == [ways[-1]]
    assert all((letters(run) == letters(ways[0])).all() for run in ways)


def test_mixed_in_is_what_pretraining_ended_with():
    for scale in (SMOKE, DESK):
        run = appendix.mixed(scale, pretraining(scale, "H"), 1.0, 0.5)
        families = {words[1] for words in asked(run, 400)}
        assert families == {"C", "CC", "I", "IC", "T"} and not isinstance(run.stream.other, Curriculum)
    assert appendix.mixed(SMOKE, pretraining(SMOKE, "H"), 1.0, 0.0) == fine_tuning(SMOKE, pretraining(SMOKE, "H"), 1.0)


def test_further_names_are_only_ever_asked_for_a_and_fine_tuning_never_uses_them():
    scale = appendix.with_names(DESK)
    base = appendix.named_pretraining(scale, "H")
    for step in (0, base.recipe.steps - 1):  # both parts of the curriculum
        rows = base.stream.batch(2000, (0, 0), step)
        words = [decode(scale.domain, row).split()[1:3] for row in rows]
        named = [operand for task, operand in words if task in ("J1", "J2")]
        assert set(named) == {"a"} and len(named) > 400
        assert {operand for task, operand in words if task == "C"} == {"a", "b", "c"}
    assert {words[1] for words in asked(fine_tuning(scale, base, 1.0))} == {"C"}
    back = appendix.reverse_by(scale, base, "J1")
    assert {tuple(words[1:3]) for words in asked(back)} == {("J1", "a")}
    assert (letters(back) == letters(appendix.reverse_by(scale, base, "C"))).all()
    assert [m.metric for m in back.measures] == ["acc_opt", "acc_oft", "acc_j1", "acc_j2"]


def test_an_unrelated_task_never_counts_and_its_control_never_counted_a():
    plan = appendix.unrelated_plan(SMOKE)
    for labels, run in plan:
        if labels["protocol"] in ("unrelated", "scr_unrelated"):
            assert {words[1] for words in asked(run)} == {labels["task"]}
        if labels["protocol"].startswith("scr"):
            assert run.lineage[0] == scratch(SMOKE)
    pairs = [
        [run for of, run in plan if of["protocol"] == p and of.get("task") == "T"]
        for p in ("unrelated", "scr_unrelated")
    ]
    assert {run.recipe for run in pairs[0]} == {run.recipe for run in pairs[1]}
    assert (letters(pairs[0][0]) == letters(pairs[1][0])).all()


def test_probes_by_name_know_which_names_question_they_read(tmp_path, monkeypatch):
    scale = appendix.with_names(SMOKE)
    base = appendix.named_pretraining(scale, "H")
    tuned = fine_tuning(scale, base, 1.0)
    plan = [(dict(protocol="fine_tuning", seed=0, prior="H", c_tr=1.0), tuned)]
    store = Store(tmp_path)
    carry_out(store, plan, workers=1)
    question = appendix.ProbingByName(samples=128)
    table = appendix.read_off(store, plan, scale, question, workers=1)
    assert set(table["protocol"]) == {"fine_tuning", "pretraining"} and set(table["name"]) == {"C", "J1", "J2"}
    assert set(table["metric"]) == {"accuracy", "shuffled", "selectivity", "majority", "says"}
    per = table.groupby(["protocol", "operand", "name", "metric"]).size()
    assert (per == SMOKE.shape.blocks + 1).all()
    assert appendix.read_off(store, plan, scale, question, workers=1).equals(table)
    here = analysis._kept(store, question, scale, tuned, False)
    others = analysis.sources_of(question) | dict(appendix="changed")
    assert len(others) == len(analysis.sources_of(question))  # this room's source is among those that count
    monkeypatch.setattr(analysis, "sources_of", lambda question: others)
    assert here != analysis._kept(store, question, scale, tuned, False)


NAMES = ("exp_randft", "exp_mixing", "exp_jailbreak", "exp_sweeps")
FEW = dict(
    exp_randft=dict(priors="L", samples=128),
    exp_mixing=dict(priors="L", c_trs="0 1", rates="M", shares="0.5 0.001", samples=128),
    exp_jailbreak=dict(priors="L", c_trs="1", rates="M", samples=128),
    exp_sweeps=dict(priors="L", parts="1 0.05"),
)
CLAIMS = dict(
    exp_randft=RANDFT_CLAIMS,
    exp_mixing=MIXING_CLAIMS,
    exp_jailbreak=(*JAILBREAK_CLAIMS, *UNRELATED_CLAIMS),
    exp_sweeps=sweep_claims(),
)
FIGURES = dict(
    exp_randft={"back", "read"},
    exp_mixing={"acc_oft_L", "acc_opt_L", "read_L"},
    exp_jailbreak={"by_name", "read", "one_name", "unrelated"},
    exp_sweeps={"acc_oft", "acc_opt", "rate_grid", "length", "length_grid", "revival"},
)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("somewhere else")
    for name in NAMES:
        given = dict(scale="smoke", workers=1) | FEW[name]
        done = papermill(folder, name, *(word for key, value in given.items() for word in ("-p", key, str(value))))
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "outputs"


@pytest.mark.parametrize("name", NAMES)
def test_results_are_where_they_belong(smoke, name):
    place = smoke / name / "smoke"
    figures = {f"{figure}.{kind}" for figure in FIGURES[name] for kind in ("png", "svg")}
    assert {p.name for p in place.iterdir()} == {"results.csv", "claims.json", "provenance.json"} | figures
    judged = json.loads((place / "claims.json").read_text())
    assert [c["id"] for c in judged] == [c.id for c in CLAIMS[name]]
    assert {c["verdict"] for c in judged} <= {"holds", "fails", "inconclusive"}
    table = pd.read_csv(place / "results.csv")
    shares = table.query("metric not in ('loss', 'selectivity')")["value"]
    assert shares.between(0, 1).all() and len(table)
    labels = [c for c in table.columns if c != "value"]
    assert not table.duplicated(labels).any()


def test_experiments_share_their_runs(smoke):
    seen = set()
    for name in NAMES:
        told = json.loads((smoke / name / "smoke/provenance.json").read_text())["training"]
        asked = {*sweep.read(name, scale="smoke", **FEW[name]).runs}
        assert (told["reused"], told["trained"]) == (len(asked & seen), len(asked - seen)), name
        assert asked & seen or name == NAMES[0]
        seen |= asked


BAD = [
    ("exp_randft", dict(priors="Q"), "priors is 'Q'; allowed: names of priors"),
    ("exp_randft", dict(samples=1), "samples is 1; allowed: whole numbers from 64"),
    ("exp_mixing", dict(shares="0 0.5"), "shares is '0 0.5'; allowed: numbers above 0"),
    ("exp_mixing", dict(shares="half"), "shares is 'half'; allowed: different numbers from 0 to 1"),
    ("exp_mixing", dict(rates="XL"), "rates is 'XL'; allowed: some of L, M, S"),
    ("exp_jailbreak", dict(c_trs="0 2"), "c_trs is '0 2'; allowed: different numbers from 0 to 1"),
    ("exp_jailbreak", dict(task="index"), "parameter name is 'task'; allowed: scale, seeds"),
    ("exp_sweeps", dict(parts="0.5"), "parts is '0.5'; allowed: numbers above 0 and up to 1, among them 1"),
    ("exp_sweeps", dict(task="sort"), "task is 'sort'; allowed: one of count, index"),
    ("exp_sweeps", dict(scale="huge"), "scale is 'huge'; allowed: one of smoke"),
]


@pytest.mark.parametrize("name, given, says", BAD, ids=[f"{n} {g}" for n, g, _ in BAD])
def test_bad_parameters_are_refused_before_any_work(tmp_path, monkeypatch, name, given, says):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(name, given)
    assert not list(tmp_path.iterdir())
