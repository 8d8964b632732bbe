import json
import os
import pathlib
import subprocess
import sys

import pytest

# Before torch, and for every process that a test starts: there are at least as many as cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Figures are in their files; that a kernel draws them for the executed copy, too, costs as much again.
os.environ["MPLBACKEND"] = "agg"

import torch

from wrapperlib.checks import BadInput
from wrapperlib.model import Shape
from wrapperlib.tasks import Domain

REPO = pathlib.Path(__file__).parent.parent


PATIENCE = ("--start-timeout", "600")  # a kernel starts slowly on a machine that is busy


def papermill(folder, name, *arguments, shown=False):
    "Execute a notebook in another folder, with its figures in the executed copy if they are to be `shown` there."
    notebook = str(REPO / "nbs" / f"{name}.ipynb")
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    if shown:
        del environment["MPLBACKEND"]
    return subprocess.run(
        [sys.executable, "-m", "papermill", notebook, f"{name}.ipynb", "--no-progress-bar", *PATIENCE, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
    )


def cells(name):
    "The cells of an experiment's notebook."
    return json.loads((REPO / "nbs" / f"{name}.ipynb").read_text())["cells"]


def refusal(name, given):
    "What an experiment says when its check sees these parameters."
    imports, parameters, check, *_ = ("".join(c["source"]) for c in cells(name) if c["cell_type"] == "code")
    notebook = {}
    exec(imports + "\n" + parameters, notebook)
    notebook.update(given)
    notebook.pop("__builtins__", None)
    with pytest.raises(BadInput) as found:
        exec(check, notebook)
    return str(found.value)


@pytest.fixture
def repo():
    return REPO


@pytest.fixture
def domain():
    return Domain(length=24, window=16, nth=2)


@pytest.fixture
def shape():
    return Shape(blocks=2, heads=2, width=16)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What takes minutes begins first, so that no process is left with it at the end; of these files each test goes where there is room.
LONG = ("house", "site", "faults", "compiled", "runs", "sweep", "exp_appendix", "exp_fine_tuning", "exp_stories")
LONG += ("exp_revival", "ranks", "make", "howto", "bench", "claims", "protocols", "training", "deletion", "recipes")
APART = ("test_library_notebooks_run", "test_a_howto_runs", "test_the_benchmark_leaves_its_table")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Apart(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if any(name in nodeid for name in APART) else super()._split_scope(nodeid)

    return Apart(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda i: next((k for k, name in enumerate(LONG) if i.path.stem == f"test_{name}"), len(LONG)))
    if not config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
