"The whole paper, grids, and engines: kills, failures, two machines."

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.conftest import REPO, cells
from wrapperlib import deletion, faults, protocols, runs, sweep
from wrapperlib.checks import BadInput, NotWritten
from wrapperlib.llama import LlamaShape
from wrapperlib.protocols import SCALES, carry_out, pretraining, revival_plan
from wrapperlib.runs import FILES, Store, address, train_all
from wrapperlib.training import NotFinite, Progress

SMOKE = SCALES["smoke"]
SMALL = {"scale": "smoke", "prior": ["H", "L"], "seed": [0, 1]}


def command(folder, *arguments):
    "`python -m wrapperlib.sweep` in another folder."
    return subprocess.Popen(
        [sys.executable, "-m", "wrapperlib.sweep", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(store, run):
    return [(store.path(run) / name).read_bytes() for name in FILES]


def test_the_table_names_every_experiment_and_its_own_folder():
    named = [name for name, _ in sweep.EXPERIMENTS]
    assert set(named) == {p.stem for p in REPO.glob("nbs/exp_*.ipynb")}
    read = [sweep.read(name, scale="smoke", **given) for name, given in sweep.EXPERIMENTS]
    assert len({e.folder for e in read}) == len(read)
    assert {n for n in named if any("task: str" in "".join(c["source"]) for c in cells(n))} == {
        name for name, given in sweep.EXPERIMENTS if "task" in given
    }


@pytest.mark.parametrize("name", sorted({name for name, _ in sweep.EXPERIMENTS}))
def test_reading_trains_nothing_writes_nothing_and_finds_the_notebooks_plan(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seeds = dict(seeds=2) if "seeds" in sweep._parameters(name) else {}
    experiment = sweep.read(name, scale="smoke", out="results", **seeds)
    assert not list(tmp_path.iterdir()) and experiment.checked.out == Path("results")
    assert experiment.waits == ("stories are not tokenised yet" if name == "exp_stories" else "")
    asked = {0, 1} if seeds else {0}
    assert {labels["seed"] for labels, _ in experiment.plan} == (set() if experiment.waits else asked)
    if name == "exp_revival":
        assert experiment.plan == revival_plan(SMOKE, 2)


def listing(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_stories_are_found_and_never_made_by_what_only_looks(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    out, asked = tmp_path / "out", [("exp_stories", {})]

    def said():
        before = listing(tmp_path)
        row = sweep.status("smoke", device="cpu", out=str(out), experiments=asked).loc["exp_stories/smoke"]
        assert listing(tmp_path) == before
        return row["to train"], row["why"]

    not_yet = (0, "stories are not tokenised yet")
    assert said() == not_yet
    (out / "stories" / "of another source").mkdir(parents=True)
    assert said() == not_yet
    whole = sweep.read("exp_stories", keep=True, scale="smoke", device="cpu", out=str(out))
    n = 2 + (4 * 2 * 2 + 2) + (2 + 3 * 2 + 2) * 3 + 1  # pretraining, deletions and what only trains on, reFT, the judge
    assert len(whole.runs) == n and said() == (n, f"{n} × new")
    assert sweep.read("exp_stories", scale="smoke", out=str(out)).plan == whole.plan
    [tokens] = (out / "stories").glob("tales-*")
    (tokens / "test/F/shards.json").rename(tokens / "test/F/begun.json")
    assert said() == not_yet
    (tokens / "tokenizer.json").unlink()
    assert said() == not_yet

    def kinds(wanted, *_):
        assert all(run.stream.batch(50, 0, 0).max() < run.stream.train.vocabulary for run in wanted)
        return {sweep.kind(run): ((1.0, 0.0), 2**30) for run in wanted}

    monkeypatch.setattr(sweep, "measured_kinds", kinds)
    before = listing(tmp_path)
    costs = sweep.plan("smoke", device="cpu", experiments=asked)
    assert listing(tmp_path) == before and said() == not_yet
    assert costs.loc["exp_stories/smoke", "note"].startswith("stories are not tokenised yet; a few tales stand in")
    whole = sum(run.recipe.steps for run in whole.runs) / 3600
    assert list(costs["runs"]) == [n, n] and costs["hours on 1"].tolist() == pytest.approx([whole, whole])
    with monkeypatch.context() as without:
        without.setattr("wrapperlib.deletion.find_spec", lambda _: None)
        costs = sweep.plan("smoke", device="cpu", experiments=asked)
    assert costs["note"].tolist() == ["stories are not tokenised yet", "without exp_stories/smoke"]
    with pytest.raises(BadInput, match=r"of is 'exp_stories'; allowed: .* stories are not tokenised yet"):
        sweep.sweep(Store(tmp_path / "runs"), "exp_stories", dict(scale="smoke"))


def test_an_experiment_of_ones_own(tmp_path):
    source = (REPO / "nbs/exp_revival.ipynb").read_text()
    own = tmp_path / "exp_mine.ipynb"
    own.write_text(source)
    assert sweep.read(str(own), scale="smoke").plan == sweep.read("exp_revival", scale="smoke").plan
    own.write_text(source.replace("plan = protocols", "planned = protocols").replace("store, plan", "store, planned"))
    notebook = json.loads(own.read_text())
    notebook["cells"] = notebook["cells"][:5]
    own.write_text(json.dumps(notebook))
    with pytest.raises(BadInput, match="allowed: one that checks its parameters as p and sets plan"):
        sweep.read(str(own), scale="smoke")
    for missing in ("exp_none", str(tmp_path / "none.ipynb")):
        with pytest.raises(BadInput, match=r"experiment is .*allowed: exp_revival, exp_behavior"):
            sweep.read(missing)


def test_status_counts_each_run_once_and_says_why(tmp_path):
    asked = [("exp_revival", {}), ("exp_behavior", dict(task="count"))]
    store, plan = Store(tmp_path / "out" / "runs"), revival_plan(SMOKE)
    before = sweep.status("smoke", device="cpu", out=str(tmp_path / "out"), experiments=asked)
    assert not (tmp_path / "out").exists()
    every = {address(r) for name, given in asked for r in sweep.read(name, scale="smoke", **given).runs}
    assert before.loc["all", "to train"] == len(every) and before.loc["all", "minutes"] >= 0
    assert before.loc["exp_revival/smoke", "why"] == "24 × new"
    faults.fill(store, (run for _, run in plan))
    record = next(store.root.glob("*-*/run.json"))
    now = sweep.status("smoke", device="cpu", out=str(tmp_path / "out"), experiments=asked)
    assert now.loc["exp_revival/smoke", "to train"] == 0 and now.loc["exp_revival/smoke", "why"] == ""
    assert now.loc["all", "to train"] == len(every) - 24 and record.exists()


def test_what_a_checkpoint_has_done_is_no_work_to_do(tmp_path, monkeypatch):
    asked, store = [("exp_revival", {})], Store(tmp_path / "runs")
    monkeypatch.setattr(protocols, "pace", lambda run, device: (60.0, 0.0))

    def minutes():
        return sweep.status("smoke", device="cpu", out=str(tmp_path), workers=1, experiments=asked).loc[
            "all", "minutes"
        ]

    before, run = minutes(), sweep.read("exp_revival", scale="smoke").runs[0]
    store.save_partial(run, Progress(30, {}, []), {})
    assert minutes() == before - 30
    for step in ("many", 10**9, -1):
        store.save_partial(run, Progress(step, {}, []), {})
        assert minutes() == before


def test_status_says_what_its_minutes_leave_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "EXPERIMENTS", [("exp_randft", {})])
    assert sweep.main(["status", "--scale", "smoke", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "Minutes are at best" in said and "Not counted: probing, pruning" in said


def test_status_knows_with_what_results_were_made(tmp_path):
    experiment = sweep.read("exp_revival", scale="smoke")
    place = tmp_path / experiment.folder
    place.mkdir(parents=True)
    about = dict(parameters=json.loads(json.dumps(vars(experiment.checked), default=str)))
    about |= dict(sources=dict(runs.source_digests()), files={})

    def said():
        (place / "provenance.json").write_text(json.dumps(about))
        return sweep._made_with(place, experiment)

    assert said() == "as asked"
    about["parameters"]["workers"] = 7
    assert said() == "as asked"
    about["parameters"]["seeds"], about["sources"]["tasks"] = 3, "other"
    assert said() == "made with seeds 3; source changed: tasks"
    del about["sources"]["tasks"]  # one that there was not yet
    assert said() == "made with seeds 3; source changed: tasks"
    for part in ("parameters", "sources"):
        for wrong in ([], 3, None, "text"):
            (place / "provenance.json").write_text(json.dumps(about | {part: wrong}))
            assert sweep._made_with(place, experiment) == "unreadable"
    (place / "provenance.json").write_text("{")
    assert sweep._made_with(place, experiment) == "unreadable"


def test_status_says_which_other_modules_have_changed_since(tmp_path):
    experiment = sweep.read("exp_revival", scale="smoke")
    place = tmp_path / experiment.folder
    about = runs.provenance(vars(experiment.checked), {})
    assert {*sweep.SOURCES, "claims", "runs"} <= set(about["sources"])
    runs.publish(place, pd.DataFrame(dict(value=[1])), {}, about)
    assert sweep._made_with(place, experiment) == "as asked"
    about["sources"] |= dict(claims="other", gone="a module that there is no more")
    runs.publish(place, pd.DataFrame(dict(value=[1])), {}, about)
    assert sweep._made_with(place, experiment) == "source changed: claims, gone"


@pytest.mark.parametrize(
    "of, grid, says",
    [
        ("exp_revival", dict(scale="smoke", seed=[1]), r"parameter name is 'seed'.*did you mean seeds"),
        ("exp_revival", dict(scale="smoke", seeds="3"), "seeds is '3'; allowed: whole numbers"),
        ("exp_revival", dict(scale="smoke", out="here"), "parameter name is 'out'"),
        ("exp_revival", {}, r"grid is \{\}"),
        ("exp_revival", dict(scale=[]), r"scale is \[\]; allowed: at least one value"),
        ("exp_revival", dict(seeds=[1, 1]), r"seeds is \[1, 1\]; allowed: at least one value, each once"),
        ("exp_nothing", dict(scale="smoke"), "experiment is 'exp_nothing'"),
        (7, dict(scale="smoke"), "of is 7"),
        ("pretraining", dict(scale="smoke", c_tr=0.5), "parameter name is 'c_tr'; allowed: scale, seed, prior"),
        ("pretraining", {"scale": "smoke", "recipe.lr": "1e-4"}, "recipe.lr is '1e-4'.*YAML"),
        ("pretraining", {"scale": "smoke", "recipe.steps": 10.5}, "recipe.steps is 10.5; allowed: whole"),
        ("pretraining", {"scale": "smoke", "recipe.lr": True}, "recipe.lr is True"),
        ("pretraining", {"scale": "smoke", "recipe.lr": -1.0}, "lr is -1.0; allowed: numbers above 0"),
        ("pretraining", {"scale": "smoke", "recipe.speed": 1}, "parameter name is 'recipe.speed'"),
        ("reft", {"scale": "smoke", "shape.width": 32}, "parameter name is 'shape.width'"),
        ("reft", {"scale": "smoke", "c_tr": "0.5"}, "c_tr is '0.5'; allowed: numbers from 0 to 1"),
        ("reft", {"scale": "smoke", "prior": "H L"}, "prior is 'H L'; allowed: one prior"),
        (
            "reft",
            dict(scale="smoke", c_tr=[0, 0.0]),
            "grid is .*'c_tr': 0}.*'c_tr': 0.0} are the same run.; allowed: different runs",
        ),
        ("reft", dict(scale="smoke", of="scr"), "parameter name is 'of'"),
        ("exp_revival", dict(scale="smoke", keep=True), "parameter name is 'keep'"),
        ("exp_revival", dict(scale="smoke", notebook="x"), "parameter name is 'notebook'"),
    ],
)
def test_a_grid_is_refused_before_its_first_run(tmp_path, of, grid, says):
    with pytest.raises(BadInput, match=says):
        sweep.sweep(Store(tmp_path / "runs"), of, grid, workers=1)
    assert not list(tmp_path.iterdir())


def test_a_grid_is_every_combination_and_its_runs_are_the_protocols(tmp_path):
    plan = sweep.grid_plan("reft", dict(scale="smoke", c_tr=[0, 1], re_rate=["M", "S"]))
    assert {address(run) for _, run in plan} < {address(r) for _, run in revival_plan(SMOKE) for r in run.lineage}
    assert [(labels["c_tr"], labels["re_rate"]) for labels, _ in plan] == [(0, "M"), (0, "S"), (1, "M"), (1, "S")]
    one, other = (sweep.one_run("pretraining", **{"scale": "smoke", "recipe.lr": lr}) for lr in (1, 1.0))
    assert address(one) == address(other)
    wide = sweep.one_run("pretraining", **{"scale": "smoke", "shape.width": 32})
    assert wide == replace(pretraining(SMOKE, "L"), shape=replace(SMOKE.shape, width=32))


def test_a_grid_over_an_experiment_is_one_tidy_table(tmp_path):
    store = Store(tmp_path / "runs")
    grid = dict(scale="smoke", ft_rate=["M", "S"], priors="L")
    table = sweep.sweep(store, "exp_revival", grid, workers=1)
    for rate in "MS":
        run = sweep.read("exp_revival", scale="smoke", ft_rate=rate, priors="L")
        alone, _ = carry_out(store, run.plan, workers=1)
        ours = table[table["ft_rate"] == rate]
        assert ours[alone.columns].reset_index(drop=True).equals(alone)


def test_a_file_says_of_and_grid(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("of: pretraining\ngrid: {scale: smoke, recipe.lr: [1.0e-4, 0.001]}")
    assert sweep.load_grid(file) == ("pretraining", {"scale": "smoke", "recipe.lr": [1e-4, 1e-3]})
    for text in ("grid: {}", "of: pretraining\ngrid: {}\nmore: 1", "[1", "\x00", "just text"):
        file.write_text(text)
        with pytest.raises(BadInput, match="file is"):
            sweep.load_grid(file)
    with pytest.raises(BadInput, match="file is"):
        sweep.load_grid(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "text, says",
    [
        ("[" * 20_000, "recursion"),
        ("of: pretraining\ngrid: {a: " + "[" * 5000 + "]" * 5000 + "}", "recursion"),
        ("of: pretraining\ngrid:\n  seed: 1\n  seed: 2", "seed stands there twice"),
        ("of: pretraining\nof: reft\ngrid: {seed: 1}", "of stands there twice"),
        ("of: &a [x, x]\ngrid: {b: &b [*a, *a], c: [*b, *b]}", "aliases are not allowed"),
        ("of: pretraining\ngrid: &g {<<: *g}", "aliases are not allowed"),
        (f"of: pretraining\ngrid: {{seed: {'9' * 5000}}}", "more than 1000 characters"),
        (f"of: pretraining\ngrid: {{seed: 0x{'f' * 5000}}}", "more than 1000 characters"),
        ("of: pretraining\ngrid: {seed: 2024-13-45}", "month must be in 1..12"),
        ("of: pretraining\ngrid: {seed: 010}", "010, which YAML reads by base 8 or 60"),
        ("of: pretraining\ngrid: {recipe.steps: 1:30}", "1:30, which YAML reads by base 8 or 60"),
        ("of: pretraining\ngrid: {seed: 1}\n" + "#" * 2**20, "up to 1048576 bytes"),
    ],
)
def test_a_file_that_asks_for_too_much_or_twice_is_one_sentence(tmp_path, capsys, text, says):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert sweep.main(["grid", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("BadInput: file is") and says in error and error.count("\n") == 1 and len(error) < 1000


def test_a_file_without_an_end_is_not_read_to_it():
    began = time.monotonic()
    with pytest.raises(BadInput, match="up to 1048576 bytes"):
        sweep.load_grid("/dev/zero")
    assert time.monotonic() - began < 5


def test_a_grid_of_too_many_points_or_too_large_numbers_is_refused_at_once(tmp_path):
    many = {"scale": "smoke", **{f"recipe.{k}": list(range(1000)) for k in ("lr", "steps", "batch", "muon")}}
    with pytest.raises(BadInput, match="grid is 'one of 1000000000000 points'; allowed: up to 100000 combinations"):
        sweep.grid_plan("pretraining", many)
    assert len(sweep.points(dict(a=list(range(1000)), b=list(range(100))))) == sweep.MOST_POINTS
    file = tmp_path / "mine.yaml"
    for large in (10**400, -(10**400), float("inf"), float("nan")):
        with pytest.raises(BadInput, match=r"recipe\.lr is .*allowed: numbers"):
            sweep.grid_plan("pretraining", {"scale": "smoke", "recipe.lr": large})
    file.write_text(f"of: pretraining\ngrid: {{scale: smoke, recipe.lr: {10**400}}}")
    with pytest.raises(BadInput, match=r"recipe\.lr is 1000"):
        sweep.grid_plan(*sweep.load_grid(file))


def test_stories_are_left_out_at_scale_paper_unless_it_is_said_where_they_are():
    assert sweep.everything("desk") == sweep.everything("paper", "hub") == sweep.EXPERIMENTS
    assert (
        sweep.everything("paper") == tuple(e for e in sweep.EXPERIMENTS if e[0] != "exp_stories") != sweep.EXPERIMENTS
    )


def test_the_papers_language_model_has_a_price_on_a_gpu_before_its_stories_are_there(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    measured = []

    def kinds(wanted, device, lacking):
        for run in {sweep.kind(run): run for run in wanted}.values():
            ids = run.stream.batch(2, 0, 0)
            assert ids.shape == (2, run.stream.length) and ids.max() < run.stream.train.vocabulary
            measured.append((run.shape, run.stream.train.vocabulary, run.stream.length, run.recipe.batch))
        return {sweep.kind(run): ((1.0, 0.0), 2**30) for run in wanted}

    monkeypatch.setattr(sweep, "measured_kinds", kinds)
    monkeypatch.setitem(sweep.PARAMETERS, "device", lambda *_: "cuda")
    fewer = replace(deletion.SIZES["paper"], samples=16)  # stories written, so that few tales are enough
    monkeypatch.setitem(deletion.SIZES, "paper", fewer)
    monkeypatch.chdir(tmp_path)
    costs = sweep.plan("paper", device="cpu", experiments=[("exp_stories", {})])
    assert (LlamaShape(8192, 1536, 12, 12, 768), 8192, 1025, 128) in measured and costs.loc[
        "all", "hours on 1"
    ] > 30_000 / 3600
    assert not list(tmp_path.iterdir()) and costs["note"].str.endswith("; to train on them, say where they are").all()
    assert sweep._unread("paper", "cpu") == sweep._unread("desk", "cuda") == ""


def test_what_is_not_there_at_a_scale_is_left_out(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "pace", lambda *_: (1.0, 0.0))
    names = {name for name, _ in sweep.everything("desk_paper")}
    assert names == {name for name, _ in sweep.EXPERIMENTS} - {"exp_tracr", "exp_tracr_readings", "exp_stories"}
    assert sweep.main(["status", "--scale", "desk_paper", "--out", str(tmp_path)]) == 0
    assert "left out at scale desk_paper: exp_stories, exp_tracr, exp_tracr_readings; not at" in capsys.readouterr().out


def test_another_number_of_steps_keeps_the_share_of_the_first_stage():
    usual = sweep.one_run("pretraining", scale="desk")
    share = SCALES["desk"].first_share
    for steps in (1, 300, 600, usual.recipe.steps):
        run = sweep.one_run("pretraining", **{"scale": "desk", "recipe.steps": steps})
        assert run.stream.until == max(1, round(share * steps))
    assert sweep.one_run("pretraining", **{"scale": "desk", "recipe.steps": usual.recipe.steps}) == usual


def test_all_processes_train_what_the_first_one_finds_missing(tmp_path):
    from tests.test_ranks import torchrun

    script, store = tmp_path / "script.py", Store(tmp_path / "runs")
    script.write_text(f"""
import os
from wrapperlib import sweep
from wrapperlib.runs import Store
missing = [sweep.one_run("pretraining", scale="smoke")] if os.environ["RANK"] == "0" else []
sweep.together(Store({str(store.root)!r}), missing, "cpu", 0, None)
""")
    done = torchrun(2, script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert store.meta(sweep.one_run("pretraining", scale="smoke"))["processes"] == 2
    faults.fill(store, (run for run in sweep.read("exp_revival", scale="smoke").runs if not store.finished(run)))
    given = ["exp_revival", "--scale", "smoke", "--device", "cpu", "--out", tmp_path]
    done = torchrun(2, "-m", "wrapperlib.sweep", "train", *given)  # nothing is missing, and nobody waits for ever
    assert done.returncode == 0 and "24 reused, 0 to train" in done.stdout, done.stderr[-3000:]


def test_a_run_that_fails_in_all_processes_stops_only_those_that_start_from_it(tmp_path):
    from tests.test_ranks import torchrun

    script, store = tmp_path / "script.py", Store(tmp_path / "runs")
    script.write_text(f"""
import os
import torch
from dataclasses import replace
from wrapperlib import runs, sweep
from wrapperlib.runs import Run, Store, train_all

{WILD}
real = runs.train_stack

def broken_in_the_end(trainees, *others):
    logs = real(trainees, *others)
    if trainees[0].seed == (7, 0):  # every loss was finite, the last step's gradient was not
        with torch.no_grad():
            trainees[0].model.head.weight[0] = float("nan")
    return logs

runs.train_stack = broken_in_the_end
store, missing = Store({str(store.root)!r}), wild()
try:
    sweep.together(store, missing, "cpu", 0, None)
except ArithmeticError as e:
    with open({str(tmp_path)!r} + "/said" + os.environ["RANK"], "w") as file:  # lines of two processes may mix
        file.write(str(e))
""")
    done = torchrun(2, script)
    assert done.returncode == 0, done.stderr[-3000:]
    space = {}
    exec("from dataclasses import replace\nfrom wrapperlib import sweep\n" + WILD, space)
    assert [store.finished(run) for run in space["wild"]()] == [False, False, False, True]
    said = [path.read_text() for path in sorted(tmp_path.glob("said*"))]
    assert len(said) == 2 and len({*said}) == 1
    assert "2 runs failed: " in said[0] and "broken: the loss of step" in said[0]
    assert "late: after the last step head.weight is not finite" in said[0]
    assert said[0].endswith("left out, as they start from there: after")


WILD = """
def wild():
    sound = sweep.one_run("pretraining", **{"scale": "smoke", "recipe.steps": 20})
    recipe = replace(sound.recipe, lr=1e30, clip=1e30, muon=0.0)
    broken = replace(sound, recipe=recipe, seed=1, name="broken")
    return [broken, replace(sound, start=broken, name="after"), replace(sound, seed=7, name="late"), sound]
"""


def test_a_grid_of_which_something_failed_leaves_the_table_of_what_is_there(tmp_path, capsys, monkeypatch):
    grid = {"scale": "smoke", "recipe.steps": 5, "recipe.clip": 1e30, "recipe.muon": 0.0, "recipe.lr": [1e-3, 1e30]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(dict(of="pretraining", grid=grid)))
    given = ["grid", str(tmp_path / "mine.yaml"), "--out", str(tmp_path), "--device", "cpu", "--workers", "1"]
    assert sweep.main(given) == 1
    assert "recipe.lr 1e+30, recipe.muon 0.0" in capsys.readouterr().err
    place = tmp_path / "sweeps/mine"
    table = pd.read_csv(place / "results.csv")
    assert set(table["recipe.lr"]) == {1e-3} and set(table["seed"]) == {0} and set(table["prior"]) == {"L"}
    about = json.loads((place / "provenance.json").read_text())
    assert about["failed"].startswith("NotFinite: pretraining, prior L") and about["training"] is None
    whole = (place / "results.csv").read_bytes()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(dict(of="pretraining", grid=grid | {"recipe.lr": [1e-3, 2e-3]})))
    refuses = failing(lambda r: True, BadInput("address is 'nowhere'; allowed: a cluster"))
    monkeypatch.setattr(sweep, "Ray", lambda *_: refuses)
    assert sweep.main([*given, "--engine", "ray"]) == 2  # nothing was trained: the table of before is left as it was
    assert capsys.readouterr().err == "BadInput: address is 'nowhere'; allowed: a cluster\n"
    assert (place / "results.csv").read_bytes() == whole and not (place / "earlier").exists()
    assert sweep.main(given) == 0
    about = json.loads((place / "provenance.json").read_text())
    assert about["training"]["trained"] == about["training"]["reused"] == 1 and "failed" not in about


def test_runs_that_wait_for_each_other_take_longer_than_their_work_divided():
    runs = sweep.read("exp_revival", scale="smoke").runs
    seconds = dict.fromkeys(runs, 2.0)
    assert sweep.at_best(seconds, 1) == 2.0 * len(runs)
    assert sweep.at_best(seconds, 1000) == 2.0 * max(len(run.lineage) for run in runs)
    assert sweep.at_best({}, 2) == 0


def test_an_edited_notebook_is_told_and_a_reason_is_told_whole(tmp_path):
    mine = tmp_path / "mine.ipynb"
    mine.write_text((REPO / "nbs/exp_revival.ipynb").read_text())
    experiment = sweep.read(str(mine), scale="smoke")
    place = tmp_path / experiment.folder
    runs.publish(place, pd.DataFrame(dict(value=[1])), {}, runs.provenance(vars(experiment.checked), {}))
    executed = json.loads(mine.read_text())
    given = dict(cell_type="code", source=["scale = 'smoke'"], metadata=dict(tags=["injected-parameters"]))
    executed["cells"].insert(3, given)
    (place / "mine.ipynb").write_text(json.dumps(executed))
    assert sweep._made_with(place, experiment) == "as asked"
    mine.write_text(mine.read_text().replace("judge_revival", "judge_otherwise"))
    assert sweep._made_with(place, experiment) == "notebook changed"
    table = pd.DataFrame({"to train": [3, 3], "why": ["x" * 300, ""]}, index=["mine", "all"])
    assert sweep._told(table).endswith("why:\n  mine: " + "x" * 300)


def test_makespan_is_that_of_a_schedule():
    runs = sweep.read("exp_revival", scale="smoke").runs
    seconds = {run: 1.0 + 0.1 * i for i, run in enumerate(runs)}
    chain = max(sum(seconds[r] for r in run.lineage) for run in runs)
    alone = sweep.makespan(seconds, 1)
    assert alone == pytest.approx(sum(seconds.values()))
    assert sweep.makespan(seconds, len(runs)) == pytest.approx(chain)
    for n in (2, 4, 16):
        assert max(chain, alone / n) - 1e-9 <= sweep.makespan(seconds, n) <= alone / n + chain


def test_a_plan_knows_how_many_runs_share_a_gpu_and_says_what_it_leaves_out(tmp_path, capsys, monkeypatch):
    asked = [("exp_revival", dict(priors="L"))]
    cost = (1.0, 0.0), 2**30
    monkeypatch.setattr(sweep, "measured_kinds", lambda runs, device, lacking: {sweep.kind(r): cost for r in runs})
    alone, whole, shared = (sweep.plan("smoke", device="cpu", experiments=asked, gpus=g) for g in (0, 1, 0.25))
    assert shared["hours on 1"].equals(alone["hours on 4"].rename("hours on 1"))
    assert shared["hours on 4"].equals(alone["hours on 16"].rename("hours on 4"))
    assert whole.equals(alone)
    assert alone.loc["exp_revival/smoke", "figures"] == "Fig. 9" and alone.loc["all", "figures"] == ""
    with pytest.raises(BadInput, match=r"gpus is 4; allowed: numbers from 0 to 1$"):
        sweep.plan("smoke", device="cpu", experiments=asked, gpus=4)
    monkeypatch.setattr(sweep, "EXPERIMENTS", asked)
    assert sweep.main(["plan", "--scale", "smoke", "--device", "cpu", "--gpus", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "Not counted: probing, pruning" in said and "upper bound" in said
    assert f"{shared.loc['all', 'hours on 1']:.3f}" in said


def test_what_cannot_be_measured_is_a_note_and_stops_no_plan(capsys):
    sound, broken = (sweep.one_run("pretraining", scale="smoke", **{"shape.width": w}) for w in (16, 2**22))
    lacking = {}
    found = sweep.measured_kinds([broken, sound], "cpu", lacking)
    assert [*lacking] == [sweep.kind(broken)] and "shape.width 4194304 cannot be measured here: " in lacking[
        sweep.kind(broken)
    ]
    assert found[sweep.kind(sound)][0][0] > 0 and np.isnan(found[sweep.kind(broken)][0][0])
    assert "2 of 2 kinds of runs measured" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="memory"):
        sweep.measured_kinds([broken], "cpu")


def test_a_plan_has_no_hours_where_a_kind_is_lacking(monkeypatch):
    def measured(runs, device, lacking):
        first = sweep.kind(runs[0])
        lacking[first] = "it cannot be measured here: MemoryError: none left"
        return {k: ((np.nan, np.nan) if k == first else (1.0, 0.0), 2**30) for k in map(sweep.kind, runs)}

    monkeypatch.setattr(sweep, "measured_kinds", measured)
    asked = [("exp_revival", dict(priors="L"))]
    table = sweep.plan("smoke", device="cpu", experiments=asked)
    assert table.filter(like="hours").isna().all().all() and set(table["note"]) == {
        "it cannot be measured here: MemoryError: none left"
    }


def test_bad_input_on_the_command_line_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, says in (
        (["paper", "--scale", "huge"], "scale is 'huge'"),
        (["paper", "--seeds", "three"], "seeds is 'three'; allowed: whole numbers from 1"),
        (["paper", "--device", "tpu"], "device is 'tpu'"),
        (["paper", "--engine", "slurm"], "engine is 'slurm'; allowed: one of local, ray"),
        (["plan", "--seeds", "0"], "seeds is 0"),
        (["plan", "--gpus", "1.5"], "gpus is 1.5; allowed: numbers from 0 to 1"),
        (["grid"], "file is None"),
        (["status", "mine.yaml"], "file is 'mine.yaml'"),
        (["train"], "file is None"),
        (["train", "exp_revival"], "train is 'started alone'; allowed: started by torchrun"),
        (["grid", "none.yaml"], "file is 'none.yaml'"),
        (["grid", "none.yaml", "--scale", "desk"], "--scale is 'desk'; allowed: nothing after grid"),
        (["grid", "none.yaml", "--seeds", "1"], "--seeds is '1'; allowed: nothing after grid"),
        (["grid", "none.yaml", "--data", "hub"], "--data is 'hub'; allowed: nothing after grid"),
        (["grid", "none.yaml", "--fail-fast"], "--fail-fast is True; allowed: nothing after grid"),
        (["train", "exp_revival", "--workers", "2"], "--workers is '2'; allowed: nothing after train"),
        (["train", "exp_revival", "--engine", "ray"], "--engine is 'ray'; allowed: nothing after train"),
        (["plan", "--engine", "ray"], "--engine is 'ray'; allowed: nothing after plan"),
        (["plan", "--workers", "8"], "--workers is '8'; allowed: nothing after plan"),
        (["paper", "--address", "head:6379"], "address is 'head:6379'; allowed: nothing, unless the engine is ray"),
        (["paper", "--gpus", "0.25"], "gpus is 0.25; allowed: 0, unless the engine is ray"),
        (["status", "--gpus", "much"], "gpus is 'much'; allowed: 0, unless"),
        (["grid", "none.yaml", "--address", "auto"], "address is 'auto'; allowed: nothing, unless"),
    ):
        assert sweep.main(arguments) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [NotWritten("the disk is full"), NotFinite("seed 0: the loss"), RuntimeError("lost")])
def test_training_that_fails_on_the_command_line_is_one_sentence(tmp_path, capsys, monkeypatch, error):
    def fails(*_):
        raise error

    (tmp_path / "mine.yaml").write_text(json.dumps(dict(of="pretraining", grid=SMALL)))
    monkeypatch.setattr(sweep, "carry_out", fails)
    assert sweep.main(["grid", str(tmp_path / "mine.yaml"), "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert capsys.readouterr().err == f"{type(error).__name__}: {error}\n"


def test_paper_goes_on_after_a_failure_and_says_where_to_look(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    broken = tmp_path / "exp_broken.ipynb"
    notebook = json.loads((REPO / "nbs/exp_revival.ipynb").read_text())
    notebook["cells"][9]["source"] = ["raise ArithmeticError('no figure today')"]
    broken.write_text(json.dumps(notebook))
    given = dict(priors="L")
    asked = [(str(broken), given), ("exp_revival", given)]
    out = tmp_path / "out"
    table = sweep.paper("smoke", device="cpu", out=str(out), workers=1, experiments=asked)
    failed = table.loc["exp_broken/smoke", "failed"]
    copy = Path(re.search(r"; see (.*)", failed)[1])
    assert "ArithmeticError: no figure today" in failed and "no figure today" in copy.read_text()
    good = table.loc["exp_revival/smoke"]
    assert good["failed"] == "" and good["reused"] == "10 of 10 runs" and "inconclusive" in good["verdicts"]
    made = json.loads((out / "exp_revival/smoke/exp_revival.ipynb").read_text())["metadata"]["papermill"]
    assert made["end_time"] and not made["exception"] and made["parameters"]["seeds"] == 1
    assert not (out / "exp_broken").exists()
    fast = sweep.paper("smoke", device="cpu", out=str(out), workers=1, experiments=asked, fail_fast=True)
    assert list(fast.index) == ["exp_broken/smoke"]
    with pytest.raises(BadInput, match="out is"):
        sweep.paper("smoke", out=str(broken), experiments=asked)


def failing(which, error):
    "An engine that trains all runs but some and those that start from them, and raises in the end."

    def engine(store, missing, device, workers, line):
        rest = [run for run in missing if not any(which(r) for r in run.lineage)]
        train_all(store, rest, workers=1, quiet=True)
        if len(rest) < len(missing):
            raise error
        return 0

    return engine


def test_a_run_that_fails_in_an_engine_leaves_a_table_and_the_other_experiments(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    given = dict(priors="L")
    asked = [("exp_revival", given), ("exp_behavior", dict(task="count"))]
    needed = sweep.read("exp_revival", scale="smoke", **given).runs
    lost = NotFinite("pretraining, prior H, seed 0: the loss at step 3 is not finite")
    table = sweep.paper(
        "smoke", device="cpu", out=str(tmp_path), experiments=asked, engine=failing(lambda r: r not in needed, lost)
    )
    assert list(table.index) == ["training", "exp_revival/smoke", "exp_behavior/smoke"]
    assert table.loc["training", "failed"] == f"NotFinite: {lost}; see {tmp_path / 'runs'}"
    assert table.loc["training", "reused"].startswith("0 of ") and table.loc["training", "minutes"] >= 0
    assert table.loc["exp_revival/smoke", "failed"] == "" and table.loc["exp_revival/smoke", "reused"] == "0 of 10 runs"
    assert re.fullmatch(r"\d+ of its \d+ runs are not there, see the row training", table["failed"].iloc[-1])
    assert not (tmp_path / "exp_behavior").exists() and not (tmp_path / "unfinished").exists()
    monkeypatch.setattr(sweep, "EXPERIMENTS", asked)
    monkeypatch.setattr(sweep, "Ray", lambda *_: failing(lambda r: r not in needed, lost))
    arguments = ["paper", "--scale", "smoke", "--device", "cpu", "--out", str(tmp_path), "--engine", "ray"]
    assert sweep.main([*arguments, "--fail-fast"]) == 1
    said = capsys.readouterr().out
    assert str(lost) in said and "exp_behavior/smoke" not in said


@pytest.mark.parametrize("error", [RuntimeError("lost"), NotWritten("full"), OSError(28, "full"), BadInput("a node")])
def test_any_error_of_an_engine_is_a_row_once_something_was_trained(tmp_path, error):
    [_, *others] = sweep.read("exp_revival", scale="smoke", priors="L").runs
    asked = dict(experiments=[("exp_revival", dict(priors="L"))], engine=failing(lambda r: r in others, error))
    table = sweep.paper("smoke", device="cpu", out=str(tmp_path), **asked)
    assert table.loc["training", "failed"] == f"{sweep._first_line(error)}; see {tmp_path / 'runs'}"
    assert table.loc["exp_revival/smoke", "failed"] == "9 of its 10 runs are not there, see the row training"


def test_an_engine_that_refuses_is_one_sentence_and_a_damaged_run_is_not(tmp_path):
    asked = [("exp_revival", dict(priors="L")), ("exp_randft", {})]
    common = dict(scale="smoke", device="cpu", out=str(tmp_path), fail_fast=True)
    with pytest.raises(BadInput, match="address is"):
        refuses = failing(lambda r: True, BadInput("address is 'nowhere'; allowed: a cluster"))
        sweep.paper(**common, experiments=asked, engine=refuses)
    store, plans = Store(tmp_path / "runs"), [sweep.read(n, scale="smoke", **g).runs for n, g in asked]
    own = next(run for run in plans[1] if run not in plans[0] and not run.start)
    train_all(store, [own], workers=1, quiet=True)
    (store.path(own) / "weights.safetensors").write_bytes(b"damaged")
    table = sweep.paper(**common, experiments=asked, engine=failing(lambda r: False, None))
    assert list(table.index) == ["training"] and "file in the store is" in table.loc["training", "failed"]
    assert all(store.finished(run) for run in plans[0])


def test_whatever_goes_wrong_around_a_notebook_is_that_experiments_failure(tmp_path, monkeypatch):
    import papermill

    def executed(path, copy, given, **_):
        assert copy.exists()
        place = tmp_path / "exp_revival/smoke"
        place.mkdir(parents=True, exist_ok=True)
        (place / "provenance.json").write_text("{")

    monkeypatch.setattr(papermill, "execute_notebook", executed)
    experiment = sweep.read("exp_revival", scale="smoke", out=str(tmp_path))
    row = sweep._execute(experiment, tmp_path)
    assert re.fullmatch(f"JSONDecodeError: .*; see {tmp_path}/exp_revival/smoke", row["failed"])
    (tmp_path / "unfinished").write_text("a file where a folder should be")
    assert sweep._execute(experiment, tmp_path)["failed"].startswith("FileExistsError")


def test_two_papers_at_once_do_not_share_a_copy(tmp_path, monkeypatch):
    import papermill

    copies = []

    def executed(path, copy, given, **_):
        copies.append(copy)
        if len(copies) == 1:  # meanwhile another begins and fails
            assert "second" in sweep._execute(experiment, tmp_path)["failed"]
            copy.write_text("first")
            raise ArithmeticError("first")
        raise ArithmeticError("second")

    monkeypatch.setattr(papermill, "execute_notebook", executed)
    experiment = sweep.read("exp_revival", scale="smoke", out=str(tmp_path))
    assert sweep._execute(experiment, tmp_path)["failed"] == f"ArithmeticError: first; see {copies[0]}"
    assert copies[0] != copies[1] and copies[0].read_text() == "first"
    os.utime(copies[0], (0, 0))

    def well(path, copy, given, **_):
        copy.write_text("third")
        place = tmp_path / experiment.folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "provenance.json").write_text("{}")

    monkeypatch.setattr(papermill, "execute_notebook", well)
    assert not sweep._execute(experiment, tmp_path)["failed"]
    assert not copies[0].exists()  # it has come to its end since


def test_a_thousand_finished_runs_are_recognised_in_seconds(tmp_path):
    store, plan = Store(tmp_path / "runs"), revival_plan(SMOKE, 42)
    wanted = list(dict.fromkeys(r for _, run in plan for r in run.lineage))
    faults.fill(store, wanted)
    assert len(wanted) > 1000
    code = f"""
import time
from wrapperlib import sweep
began = time.process_time()
table = sweep.status("smoke", 42, "cpu", {str(tmp_path)!r}, experiments=[("exp_revival", {{}})])
assert table.loc["all", "to train"] == 0 and table.loc["all", "reused"] == {len(wanted)}
print(time.process_time() - began)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 5


def test_two_sweeps_at_once_share_the_work(tmp_path):
    (tmp_path / "mine.yaml").write_text(json.dumps(dict(of="pretraining", grid=SMALL)))
    both = [command(tmp_path, "grid", "mine.yaml", "--workers", "1", "--device", "cpu") for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    table = pd.read_csv(tmp_path / "outputs/sweeps/mine/results.csv")
    assert len(list((tmp_path / "outputs/runs").glob("*-*/run.json"))) == 4
    assert set(table["prior"]) == {"H", "L"} and set(table["seed"]) == {0, 1}
    assert not list((tmp_path / "outputs/runs").glob(".*"))


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs another file system that can be written to")
def test_the_store_may_lie_on_another_file_system(tmp_path):
    other = Path("/dev/shm") / f"wrapperlib-{os.getpid()}"
    try:
        other.mkdir()
        if other.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is the same file system")
        (tmp_path / "runs").symlink_to(other, target_is_directory=True)
        table = sweep.sweep(Store(tmp_path / "runs"), "pretraining", SMALL, workers=1)
        assert len(list(other.glob("*-*/run.json"))) == 4
        again = sweep.sweep(Store(other), "pretraining", SMALL, workers=1)
        assert again.equals(table)
    finally:
        shutil.rmtree(other)


@pytest.mark.slow
def test_a_sweep_killed_at_twenty_moments_loses_nothing(tmp_path):
    grid = SMALL | {"recipe.steps": 4000}
    often = f"""
from functools import partial
from wrapperlib import runs, sweep
runs.train_runs = partial(runs.train_runs, save_every=0.2)
sweep.sweep(runs.Store("runs"), "pretraining", {grid}, workers=1)
"""

    def begin():
        environment = os.environ | {"PYTHONPATH": str(REPO)}
        return subprocess.Popen([sys.executable, "-c", often], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)

    store, chance, finished = Store(tmp_path / "runs"), random.Random(0), set()
    for _ in range(20):
        process = begin()
        time.sleep(chance.uniform(2, 6))
        process.kill()
        process.wait()
        there = {p.parent.name for p in store.root.glob("*-*/run.json")}
        assert finished <= there
        finished = there
    assert begin().wait() == 0
    plan, whole = sweep.grid_plan("pretraining", grid), Store(tmp_path / "whole")
    assert any(store.meta(run)["resumed_at"] for _, run in plan)
    assert not list(store.root.glob(".*")) and not list((store.root / "partial").iterdir())
    train_all(whole, [run for _, run in plan], workers=1, quiet=True)
    for _, run in plan:
        assert contents(store, run) == contents(whole, run)


@pytest.mark.slow
def test_the_plan_predicts_what_is_measured(tmp_path):
    wanted = [sweep.one_run("pretraining", **{"scale": "desk", "seed": s, "recipe.steps": 120}) for s in (0, 1)]
    off = []
    for k in range(3):  # another program may be busy for a moment
        kinds = sweep.measured_kinds(wanted)
        predicted = sweep.makespan({r: sweep.seconds_of(r, kinds[sweep.kind(r)][0]) for r in wanted}, 1)
        began = time.monotonic()
        train_all(Store(tmp_path / str(k)), wanted, workers=1, quiet=True)
        off.append((time.monotonic() - began) / predicted - 1)
    print("measured against predicted:", off)
    assert sorted(map(abs, off))[1] < 0.2, off


@pytest.mark.slow
def test_the_papers_shape_is_killed_goes_on_and_takes_what_was_predicted(tmp_path):
    "Two hundred steps of pretraining at full shape, nothing measured on the way: a quarter of an hour on a core, half an hour without AVX-512."
    asked = {"scale": "paper", "recipe.steps": 200}
    run = replace(sweep.one_run("pretraining", **asked), measures=())
    predicted = sweep.seconds_of(run, sweep.measured_kinds([run])[sweep.kind(run)][0])
    code = f"""
from dataclasses import replace
from wrapperlib import runs, sweep
run = replace(sweep.one_run("pretraining", **{asked}), measures=())
runs.train_all(runs.Store("runs"), [run], workers=1, quiet=True)
"""

    def begin():
        environment = os.environ | {"PYTHONPATH": str(REPO)}
        return subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)

    store, first = Store(tmp_path / "runs"), begin()
    try:
        while store.reached(run) < 60:
            assert first.poll() is None
            time.sleep(1)
    finally:
        first.kill()
        first.wait()
    assert begin().wait() == 0
    record = store.meta(run)
    print("seconds measured", record["seconds"], "predicted", predicted)
    assert record["resumed_at"] >= 60
    assert abs(record["seconds"] / predicted - 1) < 0.2


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(gpus=-1), "gpus is -1"),
        (dict(gpus=4), "gpus is 4; allowed: numbers from 0 to 1$"),  # a run trains on one
        (dict(gpus="half"), "gpus is 'half'"),
        (dict(address=3), "address is 3"),
        (dict(save_every="soon"), "save_every is 'soon'"),
    ],
)
def test_ray_refuses(given, says):
    with pytest.raises(BadInput, match=says):
        sweep.Ray(**given)


class Immediately:
    "What `Ray` asks of the package; each task is done at once, here."

    def __init__(self, fails, nodes=(dict(CPU=1.0),)):
        self.exceptions = pytest.importorskip("ray").exceptions
        self.fails, self.given, self.ended = fails, nodes, {}

    def is_initialized(self):
        return True

    def get_runtime_context(self):
        return SimpleNamespace(gcs_address="127.0.0.1:6379")

    def nodes(self):
        return [dict(Alive=True, Resources=node) for node in self.given]

    def remote(self, **options):
        return lambda function: SimpleNamespace(remote=lambda *given: self._begin(function, *given))

    def _begin(self, function, root, run, *others):
        job = len(self.ended)
        try:
            self.ended[job] = self.fails.get(run.name) or function(root, run, *others)
        except Exception as e:
            self.ended[job] = e
        return job

    def wait(self, jobs, timeout):
        return jobs[:1], jobs[1:]

    def get(self, job):
        found = self.ended[job]
        if isinstance(found, self.exceptions.RayError):
            raise found
        if isinstance(found, Exception):
            raise self.exceptions.RayTaskError("task", "", found)
        return found

    def cancel(self, job, force):
        raise AssertionError("nothing is cancelled")


class Later(Immediately):
    "Each task waits until it is asked for, as on a cluster that has fewer cores than tasks."

    cancelled = ()

    def _begin(self, function, *given):
        self.ended[job := len(self.ended)] = function, given
        return job

    def get(self, job):
        function, given = self.ended[job]
        return super().get(super()._begin(function, *given))

    def cancel(self, job, force):
        self.cancelled = (*self.cancelled, job)


def on_ray(monkeypatch, store, missing, fails=None, engine=None, made=None, **given):
    made = made or Immediately(fails or {}, **given)
    monkeypatch.setattr(sweep, "_ray", lambda: made)
    return train_all(store, missing, engine=engine or sweep.Ray())


def test_a_run_that_fails_on_ray_stops_only_those_that_start_from_it(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from ray.exceptions import NodeDiedError, RuntimeEnvSetupError

    store, wanted = Store(tmp_path / "runs"), sweep.read("exp_revival", scale="smoke", priors="H L").runs
    bases = {run.name: run for run in wanted if "prior H" in run.name and not run.start}
    [(name, lost)] = bases.items()
    with pytest.raises(NotFinite, match="prior H"):
        on_ray(monkeypatch, store, wanted, {name: NotFinite(f"{name}: the loss is not finite")})
    assert {run for run in wanted if not store.finished(run)} == {run for run in wanted if lost in run.lineage}
    again = [replace(lost, seed=seed, name=f"seed {seed}") for seed in range(5)]
    fails = {
        "seed 0": NotFinite("seed 0: the loss is not finite"),
        "seed 1": NodeDiedError("gone"),
        "seed 2": RuntimeEnvSetupError("no environment"),
        "seed 3": OSError(28, "No space left"),
    }
    with pytest.raises(RuntimeError) as found:
        on_ray(monkeypatch, store, again, fails)
    said = str(found.value)
    assert said.startswith("4 runs failed: ") and store.finished(again[4])
    assert "seed 0: the loss" in said and "No space left" in said
    assert "seed 1: its workers were lost more than 10 times" in said and "seed 2: Ray gave it up" in said


def test_a_node_that_does_not_suit_is_refused_and_nothing_more_is_begun(tmp_path, monkeypatch):
    store, wanted = Store(tmp_path / "runs"), sweep.read("exp_revival", scale="smoke", priors="L").runs
    monkeypatch.setattr(sweep, "_await", lambda path: path.parent == store.root and not path.name.startswith(".seen"))
    with pytest.raises(BadInput, match=r"store is .*allowed: a folder that all nodes share"):
        on_ray(monkeypatch, store, wanted, made=Later({}))
    assert not [run for run in wanted if store.finished(run)]


def test_a_node_that_does_not_suit_takes_nothing_more_while_others_do_well(tmp_path, monkeypatch):
    made, store = Later({}), Store(tmp_path / "runs")
    wanted = [sweep.one_run("pretraining", scale="smoke", seed=seed) for seed in range(5)]
    ours, asked = sweep.address, []

    def other_on_the_second(run):  # once where the task is given away, and once where it is done
        asked.append(run)
        return ours(run) + "!" * (len(asked) == len(wanted) + 2)

    monkeypatch.setattr(sweep, "address", other_on_the_second)
    with pytest.raises(BadInput, match=r"wrapperlib is 'another one on .*allowed: the one the sweep was started with"):
        on_ray(monkeypatch, store, wanted, made=made)
    assert sum(map(store.finished, wanted)) == 1 and len(made.cancelled) == 3


def test_what_another_machine_has_made_is_waited_for_and_then_given_up(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: clock[0])

    def sleep(seconds):
        clock[0] += seconds
        if clock[0] == 3:
            (tmp_path / "run").mkdir()

    monkeypatch.setattr(sweep.time, "sleep", sleep)
    assert sweep._await(tmp_path / "run") and clock == [3]
    assert not sweep._await(tmp_path / "no folder" / "run") and clock == [123]


def test_a_step_of_this_machine_says_nothing_of_gpus_elsewhere(tmp_path, capsys, monkeypatch):
    run = sweep.one_run("pretraining", scale="smoke")

    def elsewhere(store, missing, *_):
        for each in missing:
            runs.train_run(store, each)
        return 0

    for gpus, said in ((0.25, False), (0, True)):
        elsewhere.gpus = gpus
        carry_out(Store(tmp_path / str(gpus)), [({}, run)], engine=elsewhere)
        assert ("of training for one worker, by a step measured" in capsys.readouterr().out) == said


def test_a_run_that_does_not_appear_is_told_so_and_not_called_damaged(tmp_path, monkeypatch):
    store, wanted = Store(tmp_path / "runs"), sweep.read("exp_revival", scale="smoke", priors="L").runs
    monkeypatch.setattr(sweep, "_await", lambda path: path.name.startswith(".seen"))
    with pytest.raises(
        RuntimeError, match=r"runs/\w+-\w+ is finished, but .* does not see it; nothing is lost, start again"
    ):
        on_ray(monkeypatch, store, wanted)


def test_a_class_of_the_script_is_refused_on_ray_for_no_other_node_knows_it(tmp_path, monkeypatch):
    run = sweep.one_run("pretraining", scale="smoke")
    mine = type("Mine", (type(run.stream),), {"__module__": "__main__"})
    monkeypatch.setattr(sweep.runs, "_kinds", lambda _: {mine})
    made = Immediately({})
    monkeypatch.setattr(sweep, "_ray", lambda: made)
    with pytest.raises(
        BadInput, match="part of a run is 'Mine'; allowed: classes of a module that all nodes can import"
    ):
        sweep.Ray()(Store(tmp_path / "runs"), [run], "cpu", 1, None)


@pytest.mark.parametrize(
    "nodes, given, says",
    [
        ([dict(CPU=0)], {}, "cluster is 'of 1 nodes with at most 0 cores and 0 GPUs'; allowed: one with a node"),
        ([], {}, "of 0 nodes"),
        ([dict(CPU=8), dict(CPU=8, GPU=0.5)], dict(gpus=1), "at most 8 cores and 0.5 GPUs'; .* a core and 1 GPUs"),
        ([dict(CPU=8), dict(GPU=1)], dict(gpus=0.5), "a core and 0.5 GPUs"),
        ([dict(CPU=1)], dict(address="127.0.0.1:1"), "address is '127.0.0.1:1'; allowed: 127.0.0.1:6379, to which"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused_before_it_is_waited_for(tmp_path, monkeypatch, nodes, given, says):
    pytest.importorskip("ray")
    run = sweep.one_run("pretraining", scale="smoke")
    with pytest.raises(BadInput, match=says):
        on_ray(monkeypatch, Store(tmp_path / "runs"), [run], engine=sweep.Ray(**given), nodes=nodes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["", "auto", "127.0.0.1:6379", "localhost:6379"])
def test_an_address_may_name_the_cluster_that_is_connected(tmp_path, monkeypatch, address):
    pytest.importorskip("ray")
    run = sweep.one_run("pretraining", scale="smoke")
    assert on_ray(monkeypatch, Store(tmp_path / "runs"), [run], engine=sweep.Ray(address))["trained"] == 1


def test_a_cluster_that_wants_another_token_is_one_sentence(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")

    def refused(**_):
        assert dict(RAY_task_oom_retries="10").items() <= os.environ.items()  # unless told, Ray never stops trying
        raise ray.exceptions.AuthenticationError("Token authentication is enabled, no token was found.")

    monkeypatch.setattr(os, "environ", os.environ.copy())
    made = Immediately({})
    monkeypatch.setattr(made, "is_initialized", lambda: False)
    monkeypatch.setattr(made, "init", refused, raising=False)
    monkeypatch.setattr(sweep, "_ray", lambda: made)
    with pytest.raises(
        BadInput, match=r"address is ''; allowed: .* takes the one that is here .*\(AuthenticationError: Token"
    ):
        sweep.Ray()(Store(tmp_path), [], "cpu", 1, None)


def test_progress_on_ray_looks_only_at_checkpoints_that_are_there_and_seldom(tmp_path, monkeypatch):
    store, clock, looked = Store(tmp_path), [0.0], []
    wanted = [sweep.one_run("pretraining", scale="smoke", seed=s) for s in range(50)]
    cost = sweep._cost(wanted[0])
    reached = Store.reached
    monkeypatch.setattr(Store, "reached", lambda self, run: looked.append(run) or reached(self, run))
    monkeypatch.setattr(sweep.time, "monotonic", lambda: clock[0])
    work, busy = sweep._Work(store), wanted[:40]
    assert work.done(busy) == 0 and not looked
    for run in wanted[:2]:
        store.save_partial(run, Progress(run.recipe.steps // 2, {}, []), {})
    assert work.done(busy) == 0 and not looked
    clock[0] += 2
    assert work.done(busy) == cost == work.done(busy) and looked == wanted[:2]
    work.end(wanted[0], True)
    work.end(wanted[1], False)
    assert work.done(wanted[2:40]) == cost and len(looked) == 2


@pytest.fixture
def cluster(monkeypatch):
    "A head that trains nothing, and two nodes with a core each."
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(REPO))
    made = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False))
    nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    ray.init(made.address, log_to_driver=False)
    yield made, nodes
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_runs_of_a_node_that_is_killed_go_on_elsewhere_bit_by_bit(cluster, tmp_path):
    import threading

    made, nodes = cluster
    long = dict(scale="smoke", prior="L", seed=[0, 1]) | {"recipe.steps": 3000}
    plan = sweep.grid_plan("pretraining", long)
    wanted = [run for _, run in plan]
    store, killed = Store(tmp_path / "runs"), []

    def kill():
        while not all(store.reached(run) for run in wanted):
            time.sleep(0.05)
        killed.extend(run for run in wanted if not store.finished(run))
        made.remove_node(nodes[1], allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    table = sweep.sweep(store, "pretraining", long, engine=sweep.Ray(save_every=0.5))
    killer.join(1)
    assert len(killed) == 2 and sum(bool(store.meta(run)["resumed_at"]) for run in wanted) == 1
    alone = Store(tmp_path / "alone")
    assert sweep.sweep(alone, "pretraining", long, workers=1).equals(table)
    for run in wanted:
        assert contents(store, run) == contents(alone, run)
    assert not list(store.root.glob(".*")) and not list((store.root / "partial").iterdir())


@pytest.mark.slow
def test_ray_on_this_machine_trains_chains_and_says_what_failed(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    grid = dict(scale="smoke", prior="L", re_rate=["M", "S"])
    table = sweep.sweep(Store(tmp_path / "ray"), "reft", grid, workers=2, engine=sweep.Ray())
    assert sweep.sweep(Store(tmp_path / "local"), "reft", grid, workers=1).equals(table)
    wild = {"scale": "smoke", "recipe.lr": 1e30, "recipe.clip": 1e30, "recipe.muon": 0.0}
    with pytest.raises(ArithmeticError, match="pretraining, prior L, seed 0"):
        sweep.sweep(Store(tmp_path / "wild"), "pretraining", wild, workers=1, engine=sweep.Ray())
    with pytest.raises(BadInput, match=r"gpus is 0\.0; allowed: above 0"):
        sweep.Ray()(Store(tmp_path / "gpu"), [], "cuda", 1, None)
    with pytest.raises(BadInput, match="address is"):
        sweep.Ray("127.0.0.1:1")(Store(tmp_path / "none"), [], "cpu", 1, None)
