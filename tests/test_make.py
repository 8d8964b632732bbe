"What `make` adds to papermill."

import json
import os
import re
import shutil
import subprocess

import pytest

from tests.conftest import REPO

ready = REPO / ".venv" / ".ready"
needs_make = pytest.mark.skipif(
    not shutil.which("make") or not ready.exists() or ready.stat().st_mtime < (REPO / "pyproject.toml").stat().st_mtime,
    reason="needs make and an up-to-date .venv, as `make test` leaves it",
)


def make(*arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=REPO, capture_output=True, text=True, env=environment)


@needs_make
@pytest.mark.parametrize(
    "given, says",
    [
        ("SCALE=huge", "scale is 'huge'; allowed: one of smoke, desk, desk_paper, paper"),
        ("SEEDS=", "seeds is ''; allowed: whole numbers from 1"),
        ("SEEDS=three", "seeds is 'three'; allowed: whole numbers from 1"),
        ("DEVICE=tpu", "device is 'tpu'; allowed: auto or one that is there"),
    ],
)
def test_bad_input_leaves_no_trace(tmp_path, given, says):
    done = make("revival", given, f"OUT={tmp_path / 'results'}")
    assert done.returncode != 0 and says in done.stderr
    assert not (tmp_path / "results").exists()


@needs_make
def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = make("revival", "SCALE=smoke", f"OUT={tmp_path / 'file'}")
    assert done.returncode != 0 and "allowed: a folder that can be written to" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@needs_make
def test_the_executed_copy_lies_with_the_results_and_a_failed_run_leaves_it(tmp_path):
    place = tmp_path / "results" / "exp_revival" / "smoke"
    assert make("revival", "SCALE=smoke", f"OUT={tmp_path / 'results'}").returncode == 0
    executed = (place / "exp_revival.ipynb").read_text()
    papermill = json.loads(executed)["metadata"]["papermill"]
    assert papermill["end_time"] and not papermill["exception"]
    weights = next((tmp_path / "results" / "runs").glob("*-*/weights.safetensors"))
    weights.write_bytes(b"damaged")
    assert make("revival", "SCALE=smoke", f"OUT={tmp_path / 'results'}").returncode != 0
    assert (place / "exp_revival.ipynb").read_text() == executed
    assert not [p for p in place.iterdir() if p.name.startswith(".")]


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_slow_tests_have_a_target_that_installs_what_they_need():
    done = make("-n", "--always-make", "test-slow")
    assert done.returncode == 0, done.stderr
    assert ".[cluster]" in done.stdout and done.stdout.rstrip().endswith("pytest -m slow -n 0")
    assert "pytest tests/test_sweep.py\n" in done.stdout  # whose quick ones are skipped where there is no Ray
    assert "make test-slow" in (REPO / "Makefile").read_text().splitlines()[0]


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_job_on_a_cluster_installs_nothing_that_the_how_to_has_not_installed():
    made = re.search(r"Once, .*?`make ([^`]*)`", (REPO / "nbs/howto_cluster.ipynb").read_text())[1].split()
    paper = "paper", "SCALE=paper", "ENGINE=ray", "ADDRESS=head:6379"
    assert "pip install" in make("-n", "--always-make", *paper).stdout
    kept = [argument for stamp in (".venv/.ready", *made) for argument in ("-o", stamp)]
    assert "pip install" not in make("-n", "--always-make", *kept, *paper).stdout


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_fail_fast_is_asked_for_by_anything_but_nothing_and_0():
    asked = ["--fail-fast" in make("-n", "paper", *given).stdout for given in ((), ("FAIL_FAST=0",), ("FAIL_FAST=1",))]
    assert asked == [False, False, True]


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_a_plan_is_told_the_share_of_a_gpu():
    assert "--gpus '0.25'" in make("-n", "plan", "GPUS=0.25").stdout
