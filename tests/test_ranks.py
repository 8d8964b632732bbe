"One run trained by several processes is the run that one process trains."

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.conftest import REPO
from wrapperlib import deletion, sweep
from wrapperlib.checks import BadInput
from wrapperlib.protocols import SCALES, pretraining
from wrapperlib.runs import Store, train_all, train_run
from wrapperlib.training import log_spaced

SCRIPT = """
import sys
import torch.distributed as dist
from tests.test_ranks import run, tales_run
from wrapperlib.runs import Store, train_run
from wrapperlib.training import ranks

def report(step):
    if step == int(sys.argv[2]):
        raise SystemExit("stopped as asked")

dist.init_process_group("gloo")
assert ranks()[1] == int(sys.argv[3])
asked = tales_run(sys.argv[5]) if sys.argv[5:] else run(int(sys.argv[4]))
train_run(Store(sys.argv[1]), asked, report=report, save_every=0)
dist.destroy_process_group()
"""


def run(batch: int = 7):
    "A run whose batch no number of processes from 2 divides."
    made = pretraining(SCALES["smoke"], "L", seed=0)
    return replace(made, recipe=replace(made.recipe, steps=40, batch=batch), measures=made.measures[:1])


def tales_run(place):
    "Pretraining of the language model of stories, one step for each of a few batches."
    size = deletion.SIZES["smoke"]
    made = deletion.pretraining(size, deletion.corpus(size, "tales", place))
    return replace(made, recipe=replace(made.recipe, steps=20), measures=())


def torchrun(processes: int, *what):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *what]
    settings = os.environ | dict(PYTHONPATH=str(REPO))
    return subprocess.run([*map(str, command)], cwd=REPO, env=settings, capture_output=True, text=True, timeout=300)


def together(folder, processes: int, stop_at: int = 0, batch: int = 7, *place):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return torchrun(processes, script, folder / "runs", stop_at, processes, batch, *place)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("alone") / "runs")
    train_run(store, run())
    return store


def values(store, of=None):
    log = store.log(of or run())
    return log[log["metric"] == "loss"].set_index("step")["value"]


def test_two_processes_give_the_loss_curve_of_one(tmp_path, alone):
    done = together(tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = values(Store(tmp_path / "runs")), values(alone)
    assert list(ours.index) == log_spaced(40)[1:] == list(theirs.index)
    assert (ours - theirs).abs().max() < 1e-5
    assert Store(tmp_path / "runs").meta(run())["processes"] == 2


def test_and_so_they_do_of_the_language_model_that_torchrun_is_for(tmp_path):
    pytest.importorskip("tokenizers")
    asked, alone = tales_run(tmp_path), Store(tmp_path / "alone")
    train_run(alone, asked)
    done = together(tmp_path, 2, 0, 0, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = values(Store(tmp_path / "runs"), asked), values(alone, asked)
    assert list(ours.index) == log_spaced(20)[1:] == list(theirs.index)
    assert (ours - theirs).abs().max() < 1e-5


def test_it_goes_on_with_another_number_of_processes(tmp_path, alone):
    first = together(tmp_path, 2, stop_at=21)
    assert first.returncode != 0 and "stopped as asked" in first.stderr
    store = Store(tmp_path / "runs")
    assert 0 < store.checkpoint(run())[0].step <= 21
    done = together(tmp_path, 3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert store.meta(run())["resumed_at"] == 20
    assert (values(store) - values(alone)).abs().max() < 1e-5


def test_more_processes_than_samples_are_refused(tmp_path):
    done = together(tmp_path, 2, batch=1)
    assert done.returncode != 0
    assert "processes is 2; allowed: up to 1, the samples of a batch" in done.stderr


def test_an_experiments_runs_are_trained_together_and_its_notebook_finds_them(tmp_path):
    own = tmp_path / "exp_small.ipynb"
    own.write_text(
        (REPO / "nbs/exp_revival.ipynb").read_text().replace('priors: str = \\"H M L\\"', 'priors: str = \\"L\\"')
    )
    given = [own, "--scale", "smoke", "--device", "cpu", "--out", tmp_path / "out"]
    done = torchrun(2, "-m", "wrapperlib.sweep", "train", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    experiment = sweep.read(str(own), scale="smoke", device="cpu")
    store = Store(tmp_path / "out" / "runs")
    assert len(experiment.runs) == 10 and {store.meta(run)["processes"] for run in experiment.runs} == {2}
    assert train_all(store, experiment.runs, quiet=True)["trained"] == 0
    assert done.stdout.count(f"{len(experiment.runs)} runs: 0 reused") == 1  # one process speaks


def test_together_is_refused_without_torchrun(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(BadInput, match="engine is 'together'; allowed: local, or start it by torchrun"):
        train_all(Store(tmp_path), [run()], quiet=True, engine=sweep.together)
