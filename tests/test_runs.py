"The store: kills, two processes, damaged and foreign files."

import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from filelock import FileLock

from wrapperlib import runs
from wrapperlib.checks import BadInput, NotWritten
from wrapperlib.model import Shape
from wrapperlib.runs import (
    Run,
    Store,
    address,
    check_results,
    describe,
    publish,
    side_by_side,
    train_all,
    train_run,
    train_runs,
    write_whole,
)
from wrapperlib.tasks import Domain, one_task
from wrapperlib.training import Measure, NotFinite, Progress, Recipe, train


def a_run(domain, steps=30, seed=0, **changes):
    stream = one_task(domain, "C", "a")
    recipe = Recipe(steps=steps, lr=3e-3, batch=16, sequence=0.0, answer=1.0)
    return replace(
        Run(stream, recipe, Shape(2, 2, 16), seed, measures=(Measure("acc", stream, n=32),), name="a run"), **changes
    )


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
    more = replace(run, measures=(replace(run.measures[0], n=64),))
    assert store.why(more) == "differs in measures.0.n (64, was 32)"
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
    assert plain == digest("def f(x):\n    return x + 1\n")
    assert plain != digest('def f(x):\n    "Says something."\n    return x + 2\n')
    assert digest('def f(x):\n    "Says something."\n') == digest("def f(x):\n    pass\n")


EDITED = """
import pathlib, sys
from tests.test_runs import a_run
from wrapperlib import runs
from wrapperlib.checks import BadInput
from wrapperlib.tasks import Domain

def edit():
    file = pathlib.Path(runs.__file__).with_name("tasks.py")
    file.write_text(file.read_text() + "\\nX = 1\\n")

def refusal(work):
    try:
        work()
    except BadInput as e:
        print(e)

if __name__ == "__main__":
    some = [a_run(Domain(length=24, window=16, nth=2), steps=3, seed=s) for s in (0, 1)]
    if sys.argv[1] == "before":  # the address is asked for
        edit()
        refusal(lambda: runs.address(some[0]))
    else:
        runs.address(some[0])
        edit()
        refusal(lambda: runs.train_all(runs.Store("runs"), some, workers=2, quiet=True))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_code_that_was_edited_after_it_was_imported_is_refused(repo, tmp_path, when):
    for part in ("wrapperlib", "tests"):
        shutil.copytree(repo / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "script.py").write_text(EDITED)
    command, path = [sys.executable, "script.py", when], {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, check=True)
    assert re.fullmatch("source is .*edited since.*restart to use it\n", done.stdout), done.stderr
    assert not list(tmp_path.glob("runs/*-*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_calls_side_by_side_come_with_their_places_and_their_errors(workers):
    assert dict(side_by_side(divmod, [(7, 2), (9, 4), (5, 5)], workers)) == {0: (3, 1), 1: (2, 1), 2: (1, 0)}
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(divmod, [(7, 2), (9, 0)], workers))


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
said = []
report = lambda step: step and not said and (said.append(1), print("steps", flush=True))
train_run(Store(sys.argv[1]), a_run(Domain(length=24, window=16, nth=2), steps=int(sys.argv[2])), report=report, save_every=0)
"""


def start(repo, store, steps, before=""):
    return subprocess.Popen(
        [sys.executable, "-c", before + SCRIPT, str(store.root), str(steps)],
        cwd=repo,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(repo)},
    )


def test_a_killed_run_goes_on_to_the_same_bits(repo, tmp_path):
    from wrapperlib.tasks import Domain

    steps, unbroken, store = 600, Store(tmp_path / "unbroken"), Store(tmp_path / "killed")
    run = a_run(Domain(length=24, window=16, nth=2), steps=steps)
    train_run(unbroken, run)
    resumed = []
    for wanted in (10, 60, 110):  # kill three times, each later than the one before
        process = start(repo, store, steps)
        deadline = time.monotonic() + 120
        while store.reached(run) < wanted:
            assert time.monotonic() < deadline and process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not store.finished(run)
        resumed.append(store.checkpoint(run)[0].step)
    assert resumed == sorted(resumed) and resumed[0] >= 10
    train_run(store, run)
    assert store.meta(run)["resumed_at"] == resumed[-1]
    assert contents(store, run) == contents(unbroken, run)
    assert not [p for p in store.root.iterdir() if p.name.startswith(".")]


def test_two_processes_on_one_store(repo, tmp_path):
    from wrapperlib.tasks import Domain

    store, steps = Store(tmp_path / "shared"), 60
    both = [start(repo, store, steps) for _ in range(2)]
    said = [p.communicate(timeout=180)[0].decode() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert sorted("steps" in text for text in said) == [False, True]  # one trained, the other waited and found it done
    run = a_run(Domain(length=24, window=16, nth=2), steps=steps)
    store.verify(run)
    alone = Store(tmp_path / "alone")
    train_run(alone, run)
    assert contents(store, run) == contents(alone, run)


MANY = """
import sys
from tests.test_runs import a_run
from wrapperlib.runs import Store, train_all
from wrapperlib.tasks import Domain
if __name__ == "__main__":
    domain = Domain(length=24, window=16, nth=2)
    train_all(Store(sys.argv[1]), [a_run(domain, steps=int(sys.argv[2]), seed=s) for s in (0, 1)], workers=2)
"""


def alive(pid):
    try:
        return "Z" not in (pathlib.Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_leave_when_their_parent_is_killed_and_the_rest_is_done_later(repo, tmp_path):
    script = tmp_path / "many.py"
    script.write_text(MANY)
    store, steps = Store(tmp_path / "runs"), 1000
    parent = subprocess.Popen(
        [sys.executable, str(script), str(store.root), str(steps)],
        cwd=repo,
        env=os.environ | {"PYTHONPATH": str(repo)},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(store.root.glob("locks/*"))) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    tasks = pathlib.Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(tasks) >= 2
    parent.kill()
    parent.wait()
    while any(map(alive, tasks)):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.1)
    wanted = [a_run(Domain(length=24, window=16, nth=2), steps=steps, seed=s) for s in (0, 1)]
    assert not any(map(store.finished, wanted)) and not list(store.root.glob("*-*"))
    assert train_all(store, wanted, workers=2, quiet=True)["trained"] == 2
    assert all(map(store.verify, wanted))


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_worker_that_is_killed_stops_nothing(store, tmp_path, domain, monkeypatch, capsys):
    "As by a system that is out of memory; the runs of all workers go on from their checkpoints."
    wanted = [a_run(domain, steps=400, seed=s, start=a_run(domain, steps=10, seed=s)) for s in (0, 1)]
    undisturbed, killed = Store(tmp_path / "undisturbed"), []
    train_all(undisturbed, wanted, workers=1, quiet=True)

    def kill_one(line, done, note=""):
        if not killed and store.finished(wanted[0].start):
            children = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            workers = [c for c in children if "spawn_main" in pathlib.Path(f"/proc/{c}/cmdline").read_text()]
            os.kill(int(workers[0]), signal.SIGKILL)
            killed.append(workers[0])

    monkeypatch.setattr(runs.Line, "show", kill_one)
    assert train_all(store, wanted, workers=2)["trained"] == 4
    assert killed and "a worker process was killed" in capsys.readouterr().out
    for run in wanted:
        assert contents(store, run) == contents(undisturbed, run)


def test_a_worker_that_is_killed_while_speed_is_measured_stops_nothing(store, domain, monkeypatch):
    measured = []

    def killed(pool, run, limit):
        measured.append(pool.submit(os.getpid).result() and limit)  # a worker came up
        raise BrokenProcessPool("out of memory")

    monkeypatch.setattr(runs, "_most_at_once", killed)
    monkeypatch.setattr(runs, "_WORTH_MEASURING", 1)
    monkeypatch.setattr(runs, "cores", lambda: 2)
    assert train_all(store, [a_run(domain, steps=5, seed=s) for s in (0, 1)])["trained"] == 2
    assert measured == [2]


class Deadly(type(one_task(Domain(length=24, window=16, nth=2), "C", "a"))):
    "Strings that kill the process that asks for them."

    def batch(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)


def deadly(domain, **changes):
    run = a_run(domain, name="the deadly one", **changes)
    stream = Deadly(**{f.name: getattr(run.stream, f.name) for f in fields(run.stream)})
    return replace(run, stream=stream, measures=())


def test_a_run_that_kills_its_worker_each_time_is_given_up(store, domain):
    fatal, others = deadly(domain), [a_run(domain, steps=5, seed=s) for s in range(3)]
    after = a_run(domain, start=fatal, name="the one after it")
    said = "^the deadly one: its worker process was killed 3 times .*; left out, .*: the one after it$"
    with pytest.raises(RuntimeError, match=said):
        train_all(store, [after, *others], workers=2, quiet=True)
    assert all(map(store.finished, others)) and not store.finished(fatal)


def test_a_script_without_its_main_says_so(repo, tmp_path):
    script = tmp_path / "many.py"
    script.write_text(MANY.replace('if __name__ == "__main__":', "if True:"))
    command = [sys.executable, str(script), str(tmp_path / "runs"), "10"]
    done = subprocess.run(command, cwd=repo, env=os.environ | {"PYTHONPATH": str(repo)}, capture_output=True, text=True)
    assert done.returncode and "RuntimeError: no worker process came up: this is a script that lacks" in done.stderr


def diverging(domain, name, **changes):
    run = a_run(domain, steps=5, name=name, **changes)
    return replace(run, recipe=replace(run.recipe, lr=1e30, clip=1e30))


@pytest.mark.parametrize("workers", [1, 2])
def test_runs_that_fail_stop_only_those_that_start_from_them(store, domain, workers):
    one, two = (diverging(domain, f"broken {s}", seed=s) for s in (1, 2))
    good = [a_run(domain, steps=5, seed=s, start=a_run(domain, steps=5, seed=s)) for s in (3, 4)]
    after = a_run(domain, steps=5, start=one, name="after")
    last = a_run(domain, steps=5, start=after, name="last")
    with pytest.raises(NotFinite) as found:
        train_all(store, [one, two, last, *good], workers=workers, quiet=True)
    said = (
        r"2 runs failed: broken \d: the loss of .*; broken \d: the loss of .*; left out, as they start from there: (.*)"
    )
    assert set(re.fullmatch(said, str(found.value))[1].split(", ")) == {"after", "last"}
    assert all(map(store.finished, good)) and not any(map(store.finished, (one, two, after, last)))


@dataclass(frozen=True)
class Broken:
    "A stream of one's own that has a mistake."

    domain: Domain

    def batch(self, n, seed, step):
        raise KeyError("my mistake")


@pytest.mark.parametrize("workers", [1, 2])
def test_any_error_of_a_run_names_it_keeps_its_traceback_and_stops_no_other(store, domain, workers):
    run, good = a_run(domain, steps=5, name="mine"), a_run(domain, steps=5, seed=1)
    mine = replace(run, stream=Broken(domain))
    with pytest.raises(RuntimeError, match=r"^mine: KeyError: 'my mistake'") as found:
        train_all(store, [mine, good], workers=workers, quiet=True)
    said = "".join(traceback.format_exception(found.value))
    assert "in batch" in said and store.finished(good) and not store.finished(mine)


@pytest.mark.parametrize("late, says", [(2, None), (1000, "do not see the same in the store")])
def test_processes_that_train_together_wait_until_they_see_the_same(monkeypatch, late, says):
    looks = []

    def gather(seen, mine):
        seen[:] = [mine, [0] if len(looks) > late else [0, 1]]

    def look():
        looks.append(None)
        return [0]

    monkeypatch.setattr(runs, "ranks", lambda: (0, 2))
    monkeypatch.setattr(runs.dist, "all_gather_object", gather)
    if says:
        with pytest.raises(RuntimeError, match=says):
            runs._agreed(look, seconds=0)
    else:
        assert runs._agreed(look, seconds=0) == [0] and len(looks) == 3


def test_checkpoints_that_take_long_are_made_seldom(store, domain, monkeypatch):
    clock, made = [0.0], []
    monkeypatch.setattr(runs.time, "perf_counter", lambda: clock[0])

    def slow(self, run, progress, facts):
        made.append(progress.step)
        clock[0] += 2.0

    monkeypatch.setattr(Store, "save_partial", slow)

    def report(step):
        clock[0] += 5.0

    train_runs(store, [a_run(domain, steps=30)], report=report, save_every=0)
    assert len(made) > 2 and all(b - a == 8 for a, b in itertools.pairwise(made))  # of 40 seconds 2 are for checkpoints


def test_whoever_waits_long_for_a_lock_says_so_once(tmp_path, monkeypatch, caplog):
    path, ours = tmp_path / "locks" / "run.lock", []
    monkeypatch.setattr(runs, "_LONG_WAIT", 0)

    def waiting():
        ours.append(len(caplog.messages))
        if len(ours) == 3:
            other.release()

    other = FileLock(path)
    path.parent.mkdir()
    other.acquire()
    with runs.locked(path, waiting) as held:
        assert held
    assert ours == [0, 1, 1] and caplog.messages == [f"waits for {path}, which another process holds"]


def test_what_another_machine_may_still_be_writing_is_left_alone(store, domain, monkeypatch):
    run, names = a_run(domain, steps=5), {}
    for machine in ("here", "there", "there, long ago"):
        monkeypatch.setattr(runs.platform, "node", lambda name=machine: name)
        partial = store.partial(run).with_name(f".{store.partial(run).name}.{runs._passing()}")
        folder = store.root / f".{address(run)}.{runs._passing()}"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        folder.mkdir()
        names[machine] = partial, folder
    for path in names["there, long ago"]:
        os.utime(path, (0, 0))
    monkeypatch.setattr(runs.platform, "node", lambda: "here")
    train_run(store, run)
    left = {machine: [path.exists() for path in both] for machine, both in names.items()}
    assert left == {"here": [False, False], "there": [True, True], "there, long ago": [False, False]}


class Odd(Exception):
    "An error that cannot be made again from its message."

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


@dataclass(frozen=True)
class Odder(Broken):
    "Another mistake."

    def batch(self, n, seed, step):
        raise Odd(1, 2)


def test_an_error_that_cannot_travel_is_that_of_its_run(store, domain):
    run, good = a_run(domain, steps=5, name="mine"), a_run(domain, steps=5, seed=1)
    with pytest.raises(RuntimeError, match=r"^mine: Odd: 1 and 2"):
        train_all(store, [replace(run, stream=Odder(domain)), good], workers=2, quiet=True)
    assert store.finished(good)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_mistake_in_a_program_of_several_runs_is_that_of_one(store, domain, monkeypatch):
    wanted = [a_run(domain, steps=3, seed=s, name=f"run {s}") for s in range(3)]
    train, groups = runs.train_runs, []

    def fails(store, group, *others):
        groups.append(len(group))
        if wanted[1] in group:
            raise MemoryError("none left")
        train(store, group, *others)

    monkeypatch.setattr(runs, "train_runs", fails)
    with pytest.raises(RuntimeError, match=r"^run 1: MemoryError: none left$"):
        runs._train_here(store, wanted, "cpu", 8, None)
    assert groups == [3, 1, 1, 1] and [store.finished(run) for run in wanted] == [True, False, True]


def test_what_was_half_written_long_ago_goes(store, domain):
    run, other = a_run(domain, steps=5), a_run(domain, steps=5, seed=1)
    train_run(store, run)
    old, new = (store.partial(other).with_name(f".{store.partial(other).name}.there{k}") for k in (0, 1))
    folder, token = store.root / f".{address(other)}.there", store.root / ".seen-by-others"
    old.parent.mkdir(exist_ok=True)
    folder.mkdir()
    for path in (old, new, token):
        path.touch()
    for path in (old, folder):
        os.utime(path, (0, 0))
    train_all(store, [run], workers=1, quiet=True)
    assert [path.exists() for path in (old, folder, new, token)] == [False, False, True, True]


def test_the_checkpoint_of_a_finished_run_does_not_stay(store, domain):
    run = a_run(domain, steps=5)
    train_run(store, run)
    store.save_partial(run, Progress(3, {}, []), {})
    assert train_all(store, [run], workers=1, quiet=True)["reused"] == 1
    assert not store.partial(run).exists()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_program_goes_on_without_the_run_that_failed(store, domain):
    first, *others = (a_run(domain, steps=5, seed=s, measures=(), name=f"run {s}") for s in range(4))
    train_run(store, first)
    train, failed = runs.train_stack, []

    def one_fails(trainees, *rest):
        if not failed:
            failed.append(1)
            raise NotFinite("it is not finite", 1)
        return train(trainees, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train_stack", one_fails)
        patch.setattr(
            runs, "_next_group", lambda store, queue, most: [first, *queue.waiting]
        )  # one of them is there by now
        with pytest.raises(NotFinite, match=r"^run 2: it is not finite$"):
            runs._train_here(store, others, "cpu", 8, None)
    assert [store.finished(run) for run in others] == [True, False, True]


def test_a_run_that_fails_says_which(store, domain):
    def broken(name, **changes):
        return diverging(domain, name, **changes)

    with pytest.raises(NotFinite, match="the broken one: the loss of step"):
        train_all(store, [broken("the broken one")], workers=1, quiet=True)
    runs_ = [broken("the broken one"), a_run(domain, steps=5, seed=1)]
    with pytest.raises(NotFinite, match="the broken one: the loss of step"):
        train_all(store, runs_, workers=2, quiet=True)
    assert not store.finished(runs_[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_runs_trained_as_one_program_are_kept_one_by_one(tmp_path, domain):
    "As on a GPU: what could begin and differs only in strings and weights is one program, and the results are those of each alone."
    wanted = [a_run(domain, steps=8, seed=s, start=a_run(domain, steps=6, seed=s)) for s in (0, 1, 2)]
    alone, together = Store(tmp_path / "alone"), Store(tmp_path / "together")
    train_all(alone, wanted, workers=1, quiet=True)
    missing = [r for run in wanted for r in run.lineage]
    groups = []
    while missing:
        groups.append(runs._next_group(together, runs._Queue(missing), 8))
        train_runs(together, groups[-1])
        missing = [r for r in missing if r not in groups[-1]]
    assert [len(group) for group in groups] == [3, 3]
    for run in wanted:
        assert together.meta(run)["together"] == 3 and together.log(run)["step"].equals(alone.log(run)["step"])
        pairs = zip(alone.model(run).parameters(), together.model(run).parameters())
        assert all(torch.allclose(p, q, atol=1e-4) for p, q in pairs)
    assert len(runs._next_group(together, runs._Queue(wanted), 2)) == 2


def many_chains(domain, n):
    "Some n runs: bases of different length, four that start from each, and one that starts from each of these."
    found = []
    for seed in range(n // 9):
        base = a_run(domain, steps=20 + seed % 7, seed=seed)
        for k in range(4):
            tuned = a_run(domain, steps=5 + (seed + k) % 3, seed=seed, data=k, start=base)
            found.append(replace(tuned, recipe=replace(tuned.recipe, steps=4), start=tuned))
    return list(dict.fromkeys(r for run in found for r in run.lineage))


def test_the_order_is_that_of_the_longest_chain_of_work_behind_a_run(domain):
    wanted = many_chains(domain, 100)

    def chain(run):
        return runs._cost(run) + max((chain(r) for r in wanted if r.start == run), default=0)

    queue, trained = runs._Queue(wanted), []
    assert list(queue.waiting) == sorted(wanted, key=lambda r: -chain(r))
    while queue.waiting:
        [run] = queue.ready([], 1)
        trained.append(run)
        del queue.waiting[run]
    assert trained == sorted(wanted, key=lambda r: -chain(r))
    some = runs._Queue(wanted[: len(wanted) // 2 + 1])  # of the last base not all that start from it
    failed = wanted[1]
    some.fail(failed, NotFinite("it is not finite"))
    assert some.left_out == [r for r in wanted if r.start == failed] and failed not in some.waiting


@pytest.mark.parametrize("way", ["here", "side by side"])
def test_twice_as_many_runs_take_twice_the_work_around_their_training(store, domain, monkeypatch, way):
    "Counted in how often a run is looked for among others and its cost is asked for."
    looked, cost = [0], runs._cost

    def count(value):
        looked[0] += 1
        return value

    hash_of = Run.__hash__
    monkeypatch.setattr(Run, "__hash__", lambda run: count(hash_of(run)))
    monkeypatch.setattr(runs, "_cost", lambda run: count(cost(run)))
    monkeypatch.setattr(runs, "train_runs", lambda store, group, device, report: trained.extend(group))
    monkeypatch.setattr(runs, "program", lambda store, run: None)
    monkeypatch.setattr(runs, "_pool", in_this_process)
    used = []
    for n in (1000, 2000):
        wanted, trained = many_chains(domain, n), []
        line = runs.Line(sum(map(cost, wanted)), len(wanted))
        looked[0] = 0
        if way == "here":
            runs._train_here(store, wanted, "cpu", 1, line)
            assert len(trained) == len(wanted)
        else:
            runs._train_side_by_side(store, wanted, "cpu", 2, line)
        used.append(looked[0])
    assert used[1] < 3 * used[0]


@contextmanager
def in_this_process(workers, steps):
    "A pool whose work is done at once, by nobody."

    def submit(*_):
        job = Future()
        job.set_result((os.getpid(), 1))
        return job

    yield SimpleNamespace(submit=submit)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_run_that_fails_in_a_program_says_which(store, domain, monkeypatch):
    wanted = [a_run(domain, steps=5, seed=s, name=f"run {s}") for s in (0, 1)]
    fresh = runs._trainee

    def broken(store, run, resume):
        trainee = fresh(store, run, resume)
        if run.seed == 1:
            with torch.no_grad():
                trainee.model.head.weight[0] = float("nan")
        return trainee

    monkeypatch.setattr(runs, "_trainee", broken)
    with pytest.raises(NotFinite, match="run 1: the loss of step 1 of 5"):
        train_runs(store, wanted)


def test_workers_are_measured_together(domain, monkeypatch):
    "The second comes up late, as a process that has yet to import torch; the first waits for it."
    began = []
    monkeypatch.setattr(runs, "_worker", dict(flags=[1, 0, 0, 0]))
    monkeypatch.setattr(runs, "seconds_per_step", lambda *args, **_: began.append(time.monotonic()) or 0.5)
    with ThreadPoolExecutor(2) as pool:
        assert pool.submit(runs._pace, a_run(domain), 2).result() == 2
        first = pool.submit(runs._pace, a_run(domain), 2, 0, 2)
        time.sleep(0.3)
        assert not first.done() and len(began) == 1
        assert pool.submit(runs._pace, a_run(domain), 2, 1, 2).result() + first.result() == 4
    assert abs(began[1] - began[2]) < 0.3


def test_what_was_there_before_says_nothing_of_the_pace(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
    line = runs.Line(100, 1)
    line.given = {"a run": 50}
    assert line._clock(50).endswith("? left")
    assert line._clock(60).endswith("? left")  # the pace counts from here
    assert line._clock(70).endswith("00:30 left")


def test_a_few_steps_to_measure_cannot_end_in_infinite_numbers(domain):
    wild = replace(a_run(domain).recipe, lr=1e6, steps=400, clip=1e9)
    with pytest.raises(NotFinite):
        runs.seconds_per_step(a_run(domain).fresh_model(), a_run(domain).stream, wild, steps=60)
    assert runs.seconds_per_step(a_run(domain).fresh_model(), a_run(domain).stream, runs.gently(wild), steps=60) > 0


def test_how_many_workers_is_measured(store, domain, monkeypatch, capsys):
    monkeypatch.setattr(runs, "_WORTH_MEASURING", 1)
    monkeypatch.setattr(runs, "cores", lambda: 2)
    train_all(store, [a_run(domain, steps=5, seed=s) for s in (0, 1)])
    assert re.search(r"[12] of 2 workers side by side: [0-9.]+ times as much as one", capsys.readouterr().out)


def test_who_waits_for_another_can_be_stopped(store, domain):
    run = a_run(domain, steps=5)

    def stop(step):
        raise runs.Stopped

    (store.root / "locks").mkdir(parents=True)
    with FileLock(store.root / "locks" / f"{address(run)}.lock"), pytest.raises(runs.Stopped):
        train_run(store, run, report=stop)
    assert not store.finished(run)


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


@pytest.mark.parametrize("how", ["truncated", "empty", "pickle", "flipped", "another run's"])
def test_a_damaged_checkpoint_is_refused(store, domain, how):
    run, kept = a_run(domain, steps=10), []
    model = run.fresh_model()
    train(model, run.stream, run.recipe, save=kept.append, save_every=0)
    facts = dict(seconds=1.5, devices=["cpu"])
    store.save_partial(run, kept[4], facts)
    progress, before = store.checkpoint(run)
    assert (progress.step, before) == (5, facts) and store.why(run) == "goes on from its checkpoint"
    if how == "another run's":
        other = a_run(domain, steps=11)
        store.save_partial(other, kept[5], facts)
        store.partial(run).write_bytes(store.partial(other).read_bytes())
    else:
        damage(store.partial(run), how)
    with pytest.raises(BadInput, match="this run's checkpoint, undamaged"):
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


def about(**parameters):
    return dict(parameters=parameters, made="2024-01-01T00:00:00Z")


def test_the_same_results_are_written_again_and_different_ones_are_kept(tmp_path):
    table = pd.DataFrame(dict(value=[1.0]))
    publish(tmp_path, table, {}, about(seeds=3), [])
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "executed.ipynb").write_text('{"metadata": {"papermill": {"end_time": "2024"}}}')
    (tmp_path / "running.ipynb").write_text('{"metadata": {"papermill": {"end_time": null}}}')
    publish(tmp_path, table, {}, about(seeds=3), [])
    assert not (tmp_path / "earlier").exists()
    old = (tmp_path / "results.csv").read_text()
    publish(tmp_path, table * 2, {}, about(seeds=3), None)  # other numbers, and one file less
    [kept] = (tmp_path / "earlier").iterdir()
    assert {p.name for p in kept.iterdir()} == {"results.csv", "claims.json", "provenance.json", "executed.ipynb"}
    assert (kept / "results.csv").read_text() == old and (tmp_path / "results.csv").read_text() != old
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "executed.ipynb").exists()


@pytest.mark.parametrize("name", ["results.csv", "provenance.json"])
def test_a_file_of_somebody_elses_is_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    publish(tmp_path, pd.DataFrame(dict(value=[1.0])), {}, about(), [])
    [kept] = (tmp_path / "earlier").iterdir()
    assert (kept / name).read_text() == "mine" and "mine" not in (tmp_path / name).read_text()


@contextmanager
def third_replacement_fails(folder, fail):
    "While files in the folder itself are replaced, the third one fails: at that time the folder holds something of both."
    replace, calls = os.replace, []

    def replaced(source, target):
        in_folder = pathlib.Path(target).parent == folder
        calls.extend([target] * in_folder)
        return fail() if in_folder and len(calls) == 3 else replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.os, "replace", replaced)
        yield


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


OLD, NEW = (pd.DataFrame(dict(value=[x])) for x in (1.0, 2.0))
TABLES = dict(table1=OLD, table2=OLD)


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_on_the_way_brings_all_results_back(tmp_path):
    publish(tmp_path, OLD, {}, about(), tables=TABLES)
    before = files(tmp_path)
    with (
        pytest.raises(NotWritten, match=r"No space left.*what was there before is as it was"),
        third_replacement_fails(tmp_path, no_space),
    ):
        publish(tmp_path, NEW, {}, about(), [], tables=dict.fromkeys((*TABLES, "table3"), NEW))
    assert files(tmp_path) == before and not (tmp_path / "earlier").exists()
    check_results(tmp_path)


PUBLISH = """
import os, pathlib, signal, sys
from tests.test_runs import NEW, TABLES, about, publish, third_replacement_fails
folder = pathlib.Path(sys.argv[1])
with third_replacement_fails(folder, lambda: os.kill(os.getpid(), signal.SIGKILL)):
    publish(folder, NEW, {}, about(), tables=dict.fromkeys(TABLES, NEW))
"""


def test_a_kill_on_the_way_leaves_the_earlier_results_whole(repo, tmp_path):
    publish(tmp_path, OLD, {}, about(), tables=TABLES)
    before = files(tmp_path)
    killed = subprocess.run(
        [sys.executable, "-c", PUBLISH, str(tmp_path)], cwd=repo, env=os.environ | {"PYTHONPATH": str(repo)}
    )
    assert killed.returncode == -signal.SIGKILL
    [kept] = (tmp_path / "earlier").iterdir()
    assert files(kept) == before
    check_results(kept)
    with pytest.raises(BadInput, match="the file as it was written"):
        check_results(tmp_path)
    publish(tmp_path, NEW, {}, about(), tables=dict.fromkeys(TABLES, NEW))
    check_results(tmp_path)
    check_results(kept)
    assert not list(tmp_path.rglob(".*"))


def test_further_tables_are_listed_and_kept_as_the_first(tmp_path):
    paths = publish(tmp_path, OLD, {}, about(), tables=TABLES)
    assert [p.name for p in paths] == ["results.csv", "table1.csv", "table2.csv", "provenance.json"]
    publish(tmp_path, OLD, {}, about(), tables=dict(table1=NEW))  # another number, and one table less
    assert [p.name for p in check_results(tmp_path)] == ["results.csv", "table1.csv"]
    assert not (tmp_path / "table2.csv").exists()
    [kept] = (tmp_path / "earlier").iterdir()
    assert [p.name for p in check_results(kept)] == ["results.csv", "table1.csv", "table2.csv"]
    for name in ("../up", "results"):
        with pytest.raises(BadInput, match="table's name is"):
            publish(tmp_path, OLD, {}, about(), tables={name: NEW})


def test_reasons_of_many_runs_take_one_look_at_the_store(store, domain, monkeypatch):
    there = [a_run(domain, steps=5, seed=s) for s in range(3)]
    for run in there:
        store.put(run, run.fresh_model(), [], dict(seconds=0, devices=["cpu"]))
    missing = [a_run(domain, steps=6, seed=s) for s in range(4)]
    looks, there = [], runs._There
    monkeypatch.setattr(runs, "_There", lambda root: looks.append(root) or there(root))
    assert [*store.reasons(missing).values()] == [store.why(run) for run in missing]
    assert len(looks) == 1 + len(missing)
    looks.clear()
    train_all(store, missing, workers=1)
    assert len(looks) == 1


@pytest.fixture
def no_locks(monkeypatch):
    "A file system that knows no locks."

    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(runs.FileLock, "acquire", acquire)


def test_two_who_train_one_run_without_locks_harm_nobody(store, tmp_path, domain, monkeypatch, no_locks):
    "One of them is all done while the other is about to rename its checkpoint."
    run, replace_, quicker = a_run(domain, steps=30), os.replace, []

    def replaced(source, target):
        if pathlib.Path(target) == store.partial(run) and not quicker:
            quicker.append(1)
            train_run(store, run)
            quicker.append(contents(store, run))
        return replace_(source, target)

    monkeypatch.setattr(runs.os, "replace", replaced)
    train_run(store, run, save_every=0)
    monkeypatch.undo()
    alone = Store(tmp_path / "alone")
    train_run(alone, run)
    assert contents(store, run) == quicker[1] == contents(alone, run)
    assert not list(store.root.glob("partial/*")) and not list(store.root.glob(".*"))


def test_a_checkpoint_that_cannot_be_written_is_not_missed_once_the_run_is_there(store, domain, monkeypatch, no_locks):
    run, other = a_run(domain, steps=10), a_run(domain, steps=11)

    def full(self, run, *_):
        raise NotWritten("the disk is full")

    def full_and_done_by_another(self, run, *_):
        if not store.finished(run):
            monkeypatch.setattr(Store, "save_partial", lambda *_: None)
            train_run(store, run)
        full(self, run)

    monkeypatch.setattr(Store, "save_partial", full_and_done_by_another)
    train_run(store, run, save_every=0)
    assert store.verify(run)
    monkeypatch.setattr(Store, "save_partial", full)
    with pytest.raises(NotWritten, match="the disk is full"):
        train_run(store, other, save_every=0)


NO_LOCKS = """
import errno, filelock

def acquire(*_, **__):
    raise OSError(errno.ENOLCK, "no locks")

filelock.FileLock.acquire = acquire
"""


def test_two_processes_without_locks(repo, tmp_path):
    store = Store(tmp_path / "shared")
    both = [start(repo, store, 150, NO_LOCKS) for _ in range(2)]
    said = [p.communicate(timeout=180)[0].decode() for p in both]
    assert [p.returncode for p in both] == [0, 0] and any("steps" in text for text in said)
    assert store.verify(a_run(Domain(length=24, window=16, nth=2), steps=150))
    assert not list(store.root.glob("partial/.*")) and not list(store.root.glob(".*"))


def leave_half_written(store, run):
    "As a process that is killed does."
    for path in (
        store.partial(run).with_name(f".{store.partial(run).name}.{runs._passing()}"),
        store.root / f".{address(run)}.{runs._passing()}" / "x",
    ):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")


def test_what_a_killed_process_had_half_written_goes_before_training(store, domain):
    run = a_run(domain, steps=3)
    leave_half_written(store, run)
    train_run(store, run)
    assert not list(store.root.glob("partial/*")) and not list(store.root.glob(".*"))


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="looks for open files in /proc")
def test_a_checkpoint_goes_when_the_run_is_on_the_disk(store, domain, monkeypatch):
    run, done, kept = a_run(domain, steps=10), [], []
    train(run.fresh_model(), run.stream, run.recipe, save=kept.append, save_every=0)
    store.save_partial(run, kept[4], dict(seconds=1, devices=["cpu"]))
    for name in ("rename", "unlink"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, call=call, **k: done.append((name, str(a[-1]))) or call(*a, **k)
        )
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda h: done.append(("fsync", os.readlink(f"/proc/self/fd/{h}"))) or fsync(h))
    store.put(run, run.fresh_model(), [], dict(seconds=0, devices=["cpu"]))
    steps = [(what, path) for what, path in done if not re.search(r"(csv|json|safetensors)", path)]
    assert [what for what, _ in steps] == ["fsync", "rename", "fsync", "unlink"]
    folders = [str(store.path(run)), str(store.root), str(store.partial(run))]
    assert address(run) in steps[0][1] and [path for _, path in steps[1:]] == folders


def test_a_checkpoint_stays_where_the_disk_fails(store, domain, monkeypatch):
    run, kept, fsync = a_run(domain, steps=10), [], os.fsync
    train(run.fresh_model(), run.stream, run.recipe, save=kept.append, save_every=0)
    store.save_partial(run, kept[4], dict(seconds=1, devices=["cpu"]))

    def failing(code):
        def synced(handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(code, os.strerror(code))
            fsync(handle)

        return synced

    for code, stays in ((errno.EIO, True), (errno.EINVAL, False)):  # EINVAL: there is no such thing on this file system
        monkeypatch.setattr(runs.os, "fsync", failing(code))
        store.put(run, run.fresh_model(), [], dict(seconds=0, devices=["cpu"]))
        assert store.verify(run) and store.partial(run).exists() == stays


def test_a_worker_keeps_the_memory_of_a_step():
    "What a step frees is there for the next one, so that the system is not asked for it again, page by page."
    code = """
import resource, torch
from wrapperlib.runs import _keep_memory

def faults(steps=20):
    def step():
        return (torch.zeros(2**21) + 1).mul(2).sum()  # some 8 MiB each

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps

torch.set_num_threads(1)
before = faults()
_keep_memory()
print(before, faults())
"""
    before, after = map(
        float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    if before < 100:
        pytest.skip("this system keeps the memory by itself")
    assert after < before / 10
