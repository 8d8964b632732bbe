"The paper's protocols: who is trained on what, what it costs, and what comes out."

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import REPO
from wrapperlib import protocols, runs
from wrapperlib.checks import BadInput
from wrapperlib.grammar import Grammar
from wrapperlib.protocols import (
    LABELS,
    SCALES,
    at_length,
    behavior_plan,
    carry_out,
    estimate,
    fine_tuning,
    pretraining,
    prior_list,
    reverse,
    revival_plan,
    scales_table,
    scratch,
    what_it_says,
)
from wrapperlib.runs import Store, address
from wrapperlib.tasks import PROMPT, TAIL, Domain, decode
from wrapperlib.training import FINE_TUNING, Progress

SMOKE = SCALES["smoke"]


def texts(run, step=0):
    return run.stream.batch(8, (run.seed, run.data), step)[:, PROMPT:-TAIL]


def test_the_scales_are_what_they_claim():
    desk, paper = SCALES["desk"], SCALES["paper"]
    assert desk.shape.blocks >= 4
    assert (paper.domain, paper.fine_tuning) == (Domain(), FINE_TUNING)
    assert (paper.pretraining.steps, paper.pretraining.lr, paper.pretraining.answer) == (200_000, 1e-3, 0)
    assert list(paper.rates.values()) == [1e-4, 1e-5, 1e-6]
    assert (
        list(scales_table().columns) == ["smoke", "desk", "desk_paper", "paper"]
        and not scales_table().isna().any().any()
    )


def test_the_control_is_never_asked_for_a():
    control = scratch(SMOKE)
    asked = {decode(SMOKE.domain, row).split()[2] for row in control.stream.batch(500, 0, 0)}
    assert asked == {"b", "bb", "NULL"}
    assert replace(control, stream=None, name="") == replace(pretraining(SMOKE, "L"), stream=None, name="")


def test_reverse_fine_tuning_and_its_control_see_the_same_batches():
    base = pretraining(SMOKE, "L", seed=3)
    reft, control = reverse(SMOKE, fine_tuning(SMOKE, base, 1.0)), reverse(SMOKE, scratch(SMOKE, seed=3))
    assert (texts(reft) == texts(control)).all() and reft.recipe == control.recipe
    for other in (base, fine_tuning(SMOKE, base, 1.0), reverse(SMOKE, scratch(SMOKE, seed=4))):
        assert (texts(other) != texts(reft)).any()


def test_a_plan_names_every_run_once():
    plan = revival_plan(SMOKE, seeds=2, priors=("H", "L"))
    assert len(plan) == 2 * (3 + 2 * 7)
    labels = [tuple(sorted(labels.items())) for labels, _ in plan]
    assert len(set(labels)) == len(labels) == len({address(run) for _, run in plan})
    with pytest.raises(BadInput, match=r"rate is 'η_X'; allowed: one of η_L, η_M, η_S"):
        revival_plan(SMOKE, ft_rate="η_X")


def test_the_price_is_said_before_it_is_paid(tmp_path, capsys):
    store, plan = Store(tmp_path / "runs"), revival_plan(SMOKE, priors=("L",))
    table, done = carry_out(store, plan, workers=1)
    said = capsys.readouterr().out
    assert re.match(r"about \d+ seconds of training, by a step measured on cpu\n", said)
    assert done["trained"] == len(plan) and done["devices"] == ["cpu"] and done["seconds_in_runs"] > 0
    assert list(table.columns) == LABELS
    assert not table.duplicated([c for c in LABELS if c != "value"]).any()
    for protocol, metrics in (("pretraining", 4), ("fine_tuning", 4), ("reft", 2), ("scr_ft", 2)):
        part = table[(table["protocol"] == protocol) & (table["metric"] != "loss")]
        assert len(part[["metric", "c_te"]].drop_duplicates()) == metrics
    assert estimate(store, plan) == 0
    again, done = carry_out(store, plan, workers=1)
    assert done["trained"] == 0 and again.equals(table) and "of training" not in capsys.readouterr().out


def test_what_is_there_is_read_once(tmp_path, monkeypatch):
    store, plan, read = Store(tmp_path / "runs"), revival_plan(SMOKE, priors=("L",)), []
    table, _ = carry_out(store, plan, workers=1)
    digest, record = runs._digest_of, runs._read_record.__wrapped__
    monkeypatch.setattr(runs, "_digest_of", lambda path: read.append(path.name) or digest(path))
    monkeypatch.setattr(runs._read_record, "__wrapped__", lambda path, *a: read.append(path.name) or record(path, *a))
    again, _ = carry_out(store, plan, workers=1)
    assert again.equals(table)
    # a log is small, and is compared with its checksum whenever it is read
    assert Counter(read) == {"run.json": 10, "weights.safetensors": 10, "log.csv": 20}


def test_what_a_fine_tuned_model_says(tmp_path):
    class AddsOne(torch.nn.Module):
        def forward(self, ids, last):
            letters = ids[:, PROMPT:-2][:, -SMOKE.domain.window :]
            one_more = (letters == SMOKE.domain.ids["a"]).sum(1) + 1
            return torch.nn.functional.one_hot(SMOKE.domain.ids["0"] + one_more, len(SMOKE.domain.vocabulary))

    store, plan = Store(tmp_path), revival_plan(SMOKE, priors=("L",))
    store.model = lambda run: AddsOne()
    said = what_it_says(store, plan)
    assert list(said.index) == [("L", 0.0, 0), ("L", 1.0, 0)]
    assert (said["count(a) + 1"] == 1).all() and (said[["count(a)", "count(b)", "other"]] == 0).all().all()
    other = next((labels, run) for labels, run in plan if labels["protocol"] == "fine_tuning")
    with pytest.raises(BadInput, match=r"plan is 'one with several models of prior L, C_Tr 0\.0, seed 0'"):
        what_it_says(store, [*plan, other])


def test_the_price_at_the_papers_scale_is_days(tmp_path):
    "Measured on batches of 2 instead of 96, and added up over all that is missing."
    paper, two = SCALES["paper"], dict(batch=2)
    few = replace(
        paper, pretraining=replace(paper.pretraining, **two), fine_tuning=replace(paper.fine_tuning, **two), samples=16
    )
    plan = revival_plan(few, priors=("L",))
    hours, every = estimate(Store(tmp_path), plan, workers=1), {r for _, run in plan for r in run.lineage}
    assert len(every) == 10 and 48 * hours > 24
    seconds = {r: protocols.seconds_of(r, protocols.pace(r)) for r in every}
    assert hours * 3600 == pytest.approx(sum(seconds.values()))
    chain = max(sum(seconds[r] for r in run.lineage) for run in every) / 3600  # no number of workers is quicker
    for workers in (2, 4, 100):
        assert estimate(Store(tmp_path), plan, workers=workers) == pytest.approx(max(hours / workers, chain))
    assert hours / 100 < chain
    base = next(r for labels, r in plan if labels["protocol"] == "pretraining")
    Store(tmp_path).save_partial(base, Progress(base.recipe.steps // 2, {}, []), {})
    half = protocols.seconds_of(base, protocols.pace(base)) / 3600 / 2
    assert estimate(Store(tmp_path), plan, workers=1) == pytest.approx(hours - half)


def test_any_grammar_will_do(tmp_path):
    four = Grammar.parse("text → text word (0.9) | word (0.1)\nword → a c b c | b c | c c | d c", "a b c d")
    scale = replace(SMOKE, domain=Domain(four, length=20, window=18, nth=2))
    prior = (0.4, 0.3, 0.2, 0.1)
    table, _ = carry_out(Store(tmp_path), revival_plan(scale, priors=(prior,)), workers=1)
    assert set(table["prior"].dropna()) == {"0.4/0.3/0.2/0.1"} and np.isfinite(table["value"]).all()


def test_a_grammar_with_too_little_to_exchange_is_refused():
    four = Grammar.parse("text → text word (0.9) | word (0.1)\nword → a b | a c d | b c | d", "a b c d")
    scale = replace(SMOKE, domain=Domain(four, length=20, window=18, nth=2))
    with pytest.raises(
        BadInput, match="grammar is 'one by which 36% of edited strings are not as asked'; allowed: one whose"
    ):
        revival_plan(scale, priors=("L",))


def test_priors_as_text():
    assert prior_list("priors", "H 0.6/0.3/0.1") == ("H", (0.6, 0.3, 0.1))
    for bad in ("", "X", "0.6/0.3", "0.6/0.3/0.3", "1/nan/0", "L L", 3, True):
        with pytest.raises(BadInput, match="priors is"):
            prior_list("priors", bad)


def test_the_readmes_example_runs_as_a_script(tmp_path):
    [example] = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    script = tmp_path / "example.py"
    script.write_text(example.replace('SCALES["desk"]', 'SCALES["smoke"]'))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "undecided: " in done.stdout  # smoke learns nothing
    assert (tmp_path / "my_way_back.png").stat().st_size > 5000


def test_addresses_do_not_move():
    "Trained models are found again by them; what stands after the dash is the sources'."
    plan = revival_plan(SMOKE, priors=("L",), c_trs=(1.0,), rates=("η_S",))
    assert {labels["protocol"]: address(run).split("-")[0] for labels, run in plan} == {
        "scr": "0b0e98326982e1b8",
        "scr_ft": "1105bc67c4020430",
        "pretraining": "b8d233a45e0f434f",
        "fine_tuning": "dc2c05765c9eb690",
        "reft": "1690f9266b200374",
    }


def test_three_experiments_and_both_families_share_their_runs():
    args = dict(priors=("H", "L"), c_trs=(0.0, 1.0))
    revival = {address(run) for _, run in revival_plan(SMOKE, 2, **args)}
    count, index = (behavior_plan(SMOKE, 2, family, **args) for family in "CI")
    at_m = [run for labels, run in count if labels["ft_lr"] == SMOKE.rates["η_M"]]
    assert {address(run) for run in at_m} < revival and len(count) == 2 * 2 * 2 * 3
    assert {run.start for _, run in count} == {run.start for _, run in index}
    assert not {address(run) for _, run in count} & {address(run) for _, run in index}
    assert all("index " in run.name and decode(SMOKE.domain, texts_row(run)).split()[1] == "I" for _, run in index)
    quarter = behavior_plan(at_length(SMOKE, "quarter"), 1)
    assert {run.start.recipe.steps for _, run in quarter} == {SMOKE.pretraining.steps // 4}
    assert at_length(SMOKE, "full") == SMOKE
    with pytest.raises(BadInput, match=r"rate is 'η_X'; allowed: one of η_L, η_M, η_S"):
        behavior_plan(SMOKE, rates=("η_X",))


def texts_row(run):
    return run.stream.batch(1, 0, 0)[0]


def test_a_revival_of_the_other_family_measures_that_family():
    plan = revival_plan(SMOKE, family="I", priors=("L",))
    assert {labels["protocol"] for labels, _ in plan} == {"fine_tuning", "reft", "scr_ft"}
    assert {m.stream.family for _, run in plan for m in run.measures} == {"I"}
    assert {run.lineage[0] for _, run in plan} == {scratch(SMOKE), pretraining(SMOKE, "L")}
