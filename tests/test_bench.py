"The benchmark notebook, as `make bench` runs it."

import json
import subprocess
import sys

import pandas as pd

from tests.conftest import REPO


def test_the_benchmark_leaves_its_table(tmp_path):
    notebook = str(REPO / "nbs" / "bench_data.ipynb")
    done = subprocess.run(
        [sys.executable, "-m", "papermill", notebook, "out.ipynb", "--no-progress-bar", "-p", "repeats", "5"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    place = tmp_path / "outputs" / "bench_data"
    table = pd.read_csv(place / "results.csv")
    assert list(table.columns) == ["what", "against", "ratio", "low", "high", "target", "repeats"]
    assert (
        len(table) == 6 and (table["repeats"] == 5).all() and table["ratio"].between(table["low"], table["high"]).all()
    )
    assert {p.name for p in place.iterdir()} == {"results.csv", "ratios.png", "ratios.svg", "provenance.json"}
    assert json.loads((place / "provenance.json").read_text())["parameters"]["repeats"] == 5
