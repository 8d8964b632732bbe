"The store: kills, two processes, damaged and foreign files."

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from wrapperlib import runs
from wrapperlib.checks import BadInput
from wrapperlib.model import Shape
from wrapperlib.runs import Run, Store, address, describe, publish, train_all, train_run, write_whole
from wrapperlib.tasks import one_task
from wrapperlib.training import Measure, Recipe


def a_run(domain, steps=30, seed=0, **changes):
    stream = one_task(domain, "C", "a")
    recipe = Recipe(steps=steps, lr=3e-3, batch=16, sequence=0.0, answer=1.0)
    return replace(Run(stream, recipe, Shape(2, 2, 16), seed, (Measure("acc", stream, n=32),), name="a run"), **changes)


def contents(store, run):
    return {name: (store.path(run) / name).read_bytes() for name in runs.FILES}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


def test_what_is_there_is_not_trained_again(store, domain):
    first = a_run(domain)
    second = a_run(domain, start=first, steps=10)
    assert train_all(store, [second], workers=1, quiet=True)["trained"] == 2
    before = {run: contents(store, run) for run in (first, second)}
    assert train_all(store, [first, second], workers=1, quiet=True)["trained"] == 0
    assert before == {run: contents(store, run) for run in (first, second)}
    assert list(store.log(second).columns) == ["step", "metric", "c_te", "value"]
    assert not list(store.root.glob("partial/*"))


def test_a_name_decides_nothing_and_everything_else_does(domain):
    run = a_run(domain)
    assert address(run) == address(replace(run, name="other"))
    changes = [
        dict(seed=1),
        dict(shape=Shape(2, 2, 32)),
        dict(recipe=replace(run.recipe, lr=1e-3)),
        dict(start=run),
        dict(measures=()),
        dict(stream=one_task(domain, "C", "b")),
        dict(stream=one_task(replace(domain, nth=3), "C", "a")),
    ]
    assert len({address(run), *(address(replace(run, **c)) for c in changes)}) == len(changes) + 1
    json.dumps(describe(run))


def test_why(store, domain, monkeypatch):
    run = a_run(domain, steps=5)
    assert store.why(run) == "new"
    train_run(store, run)
    assert store.why(a_run(domain, steps=6)) == "differs in recipe.steps (6, was 5)"
    changed = runs.source_digests() | {"tasks": "other"}
    monkeypatch.setattr(runs, "source_digests", lambda: changed)
    assert not store.finished(run)
    assert store.why(run) == "source changed: tasks"


def test_comments_and_docstrings_do_not_make_runs_stale(tmp_path, monkeypatch):
    def digest(text):
        (tmp_path / "some_module.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        runs.importlib.invalidate_caches()
        return runs._bare_source("some_module")

    plain = digest('def f(x):\n    "Says something."\n    return x + 1\n')
    assert plain == digest('# a comment\ndef f(x):  # x\n    "Says something else."\n\n    return x + 1\n')
    assert plain != digest('def f(x):\n    "Says something."\n    return x + 2\n')


def test_side_by_side_gives_the_same_bits_as_one_after_the_other(tmp_path, domain):
    wanted = [a_run(domain, steps=10, seed=s, start=a_run(domain, steps=10, seed=s)) for s in (0, 1)]
    stores = [Store(tmp_path / str(workers)) for workers in (1, 2)]
    for workers, store in zip((1, 2), stores):
        done = train_all(store, wanted, workers=workers, quiet=True)
    assert done["worker_memory"] > 1e7
    for run in wanted:
        assert contents(stores[0], run) == contents(stores[1], run)


SCRIPT = """
import sys
from tests.test_runs import a_run
from wrapperlib.runs import Store, train_run
from wrapperlib.tasks import Domain
print("ready", flush=True)
train_run(Store(sys.argv[1]), a_run(Domain(length=24, window=16, nth=2), steps=int(sys.argv[2])), save_every=0)
"""


def start(repo, store, steps):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(store.root), str(steps)],
        cwd=repo,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(repo)},
    )


def test_a_killed_run_goes_on_to_the_same_bits(repo, tmp_path):
    from wrapperlib.tasks import Domain

    steps, unbroken, store = 150, Store(tmp_path / "unbroken"), Store(tmp_path / "killed")
    run = a_run(Domain(length=24, window=16, nth=2), steps=steps)
    train_run(unbroken, run)
    resumed = []
    for wanted in (10, 60, 110):  # kill three times, each later than the one before
        process = start(repo, store, steps)
        deadline = time.monotonic() + 120
        while not (store.partial(run).exists() and store.checkpoint(run).step >= wanted):
            assert time.monotonic() < deadline and process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not store.finished(run)
        resumed.append(store.checkpoint(run).step)
    assert resumed == sorted(resumed) and resumed[0] >= 10
    train_run(store, run)
    assert store.meta(run)["resumed_at"] == resumed[-1]
    assert contents(store, run) == contents(unbroken, run)
    assert not [p for p in store.root.iterdir() if p.name.startswith(".")]


def test_two_processes_on_one_store(repo, tmp_path):
    from wrapperlib.tasks import Domain

    store, steps = Store(tmp_path / "shared"), 60
    both = [start(repo, store, steps) for _ in range(2)]
    assert [p.wait(timeout=180) for p in both] == [0, 0]
    run = a_run(Domain(length=24, window=16, nth=2), steps=steps)
    store.verify(run)
    alone = Store(tmp_path / "alone")
    train_run(alone, run)
    assert contents(store, run) == contents(alone, run)


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "flipped": data[:50] + bytes([data[50] ^ 1]) + data[51:],
            "pickle": b"\x80\x04cos\nsystem\n.",
        }[how]
    )


@pytest.mark.parametrize("name", ["weights.safetensors", "log.csv", "run.json"])
@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "pickle"])
def test_damaged_files_are_refused_before_training_and_left_alone(store, domain, name, how):
    if (name, how) == ("run.json", "flipped"):
        how = "truncated"
    run = a_run(domain, steps=3)
    train_run(store, run)
    damage(store.path(run) / name, how)
    before = (store.path(run) / name).read_bytes()
    with pytest.raises(BadInput, match=r"file in the store is .*remove its folder"):
        train_all(store, [a_run(domain, steps=4, start=run)], workers=1, quiet=True)
    assert (store.path(run) / name).read_bytes() == before
    assert len(list(store.root.glob("*-*"))) == 1


def test_a_missing_file_and_a_record_of_another_run_are_refused(store, domain):
    run, other = a_run(domain, steps=3), a_run(domain, steps=4)
    for r in (run, other):
        train_run(store, r)
    (store.path(run) / "log.csv").unlink()
    with pytest.raises(BadInput, match=r"log\.csv"):
        store.verify(run)
    (store.path(other) / "run.json").write_bytes((store.path(run) / "run.json").read_bytes())
    with pytest.raises(BadInput, match="the record of the run that its folder is named after"):
        store.verify(other)


@pytest.mark.parametrize("how", ["truncated", "empty", "pickle"])
def test_a_damaged_checkpoint_is_refused(store, domain, how):
    run, kept = a_run(domain, steps=10), []
    model = run.fresh_model()
    runs.train(model, run.stream, run.recipe, save=kept.append, save_every=0)
    store.save_partial(run, kept[4])
    assert store.why(run) == "goes on from its checkpoint"
    damage(store.partial(run), how)
    with pytest.raises(BadInput, match="checkpoint; this one cannot be read"):
        train_all(store, [run], workers=1, quiet=True)
    assert store.partial(run).exists()


def test_weights_come_back_as_they_were(store, domain):
    run = a_run(domain, steps=4)
    train_run(store, run)
    one, two = store.model(run), store.model(run)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), run.fresh_model().parameters()))


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    write_whole(path, "old")

    def fail(*_):
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        monkeypatch.setattr(runs.os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            write_whole(path, "new")
        monkeypatch.undo()
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_results_of_other_parameters_are_kept(tmp_path):
    table = pd.DataFrame(dict(value=[1.0]))
    publish(tmp_path, table, {}, dict(parameters=dict(seeds=3), made="2024-01-01T00:00:00Z"), [])
    old = (tmp_path / "results.csv").read_text()
    publish(tmp_path, table, {}, dict(parameters=dict(seeds=3), made="2024-01-02T00:00:00Z"), [])
    assert not (tmp_path / "earlier").exists()
    publish(tmp_path, table * 2, {}, dict(parameters=dict(seeds=1), made="2024-01-03T00:00:00Z"), [])
    [kept] = (tmp_path / "earlier").iterdir()
    assert (kept / "results.csv").read_text() == old and (tmp_path / "results.csv").read_text() != old
