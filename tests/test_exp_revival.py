"The experiment as a user runs it: papermill, from another folder, with good and bad parameters."

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from papermill.cli import _resolve_type  # what the command line makes of a value

from tests.conftest import REPO, papermill, refusal
from wrapperlib.claims import REVIVAL_CLAIMS

NOTEBOOK = REPO / "nbs" / "exp_revival.ipynb"
SMOKE = ("-p", "scale", "smoke", "-p", "seeds", "2", "-p", "workers", "2")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("somewhere else")
    done = papermill(folder, "exp_revival", *SMOKE, shown=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_results_are_where_they_belong(smoke):
    place = smoke / "outputs" / "exp_revival" / "smoke"
    names = {p.name for p in place.iterdir()}
    assert names == {
        "results.csv",
        "claims.json",
        "provenance.json",
        "revival.png",
        "revival.svg",
        "steps.png",
        "steps.svg",
    }
    executed = json.loads((smoke / "exp_revival.ipynb").read_text())["cells"]
    assert sum("image/png" in o.get("data", {}) for cell in executed for o in cell.get("outputs", ())) == 2
    table = pd.read_csv(place / "results.csv")
    assert list(table.columns) == [
        "protocol",
        "seed",
        "prior",
        "c_tr",
        "c_te",
        "ft_lr",
        "re_lr",
        "step",
        "metric",
        "value",
    ]
    assert set(table["protocol"]) == {"pretraining", "scr", "fine_tuning", "reft", "scr_ft"} and set(table["seed"]) == {
        0,
        1,
    }
    assert not table.duplicated(["protocol", "seed", "prior", "c_tr", "c_te", "ft_lr", "re_lr", "step", "metric"]).any()
    accuracies = table[table["metric"].str.startswith("acc")]["value"]
    assert accuracies.between(0, 1).all()
    about = json.loads((place / "provenance.json").read_text())
    assert about["parameters"]["seeds"] == 2 and about["training"]["trained"] == 48 and about["peak_memory_bytes"] < 3e9
    assert {"training", "figures and claims"} <= set(about["seconds"])


def test_claims_have_all_their_parts(smoke):
    judged = json.loads((smoke / "outputs/exp_revival/smoke/claims.json").read_text())
    assert [c["id"] for c in judged] == [c.id for c in REVIVAL_CLAIMS]
    for claim in judged:
        assert {
            "id",
            "statement",
            "statistic",
            "threshold",
            "per_seed",
            "value",
            "interval",
            "verdict",
            "paper",
        } <= set(claim)
        assert claim["verdict"] in ("holds", "fails", "inconclusive") and len(claim["per_seed"]) == 2
    # a model trained for 40 steps has no capability that could be revived, and the verdicts must say so
    assert {c["verdict"] for c in judged if c["id"][:2] in ("C4", "C5")} == {"inconclusive"}


def test_a_second_run_trains_nothing_and_finds_the_same(smoke):
    place = smoke / "outputs" / "exp_revival" / "smoke"
    before = {name: (place / name).read_bytes() for name in ("results.csv", "claims.json", "revival.png", "steps.png")}
    done = papermill(smoke, "exp_revival", *SMOKE)
    assert done.returncode == 0
    assert json.loads((place / "provenance.json").read_text())["training"]["trained"] == 0
    assert before == {name: (place / name).read_bytes() for name in before}


BAD = [
    (("-p", "stepz", "10"), "parameter name is 'stepz'; allowed: scale, seeds"),
    (("-p", "sead", "10"), "did you mean seeds?"),
    (("-p", "seeds", "three"), "seeds is 'three'; allowed: whole numbers"),
    (("-p", "seeds", "0"), "seeds is 0; allowed: whole numbers"),
    (("-p", "seeds", "1.5"), "seeds is 1.5; allowed: whole numbers"),
    (("-p", "runs", "3"), "parameter name is 'runs'; allowed: scale, seeds"),
    (("-p", "time", "60"), "parameter name is 'time'; allowed: scale, seeds"),
    (("-p", "priors", "H H"), "priors is 'H H'; allowed: each prior once"),
    (("-p", "scale", "true"), "scale is 'true'; allowed: one of smoke, desk, desk_paper, paper"),
    (("-p", "scale", "True"), "scale is True; allowed: one of smoke, desk, desk_paper, paper"),
    (("-p", "scale", "huge"), "scale is 'huge'; allowed: one of smoke, desk, desk_paper, paper"),
    (("-p", "priors", "H 0.6/0.3/0.3"), "priors is '0.6/0.3/0.3'; allowed: three probabilities that sum to 1"),
    (("-p", "priors", "Q"), "priors is 'Q'; allowed: names of priors"),
    (("-p", "device", "cuda:77"), "device is 'cuda:77'; allowed: auto or one that is there: cpu"),
    (("-p", "out", "a_file"), "out is 'a_file'; allowed: a folder that can be written to"),
    (("-p", "out", "/proc/nowhere"), "out is '/proc/nowhere'; allowed: a folder that can be written to"),
    (("-p", "ft_rate", "XL"), "ft_rate is 'XL'; allowed: one of L, M, S"),
    (("-p", "workers", "-1"), "workers is -1; allowed: whole numbers from 0"),
]


@pytest.mark.parametrize("arguments, says", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_parameters_are_refused_in_one_sentence(tmp_path, arguments, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("mine")
    said = refusal("exp_revival", {arguments[1]: _resolve_type(arguments[2])})
    assert says in said and "\n" not in said
    assert (tmp_path / "a_file").read_text() == "mine" and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("arguments, says", BAD[::7], ids=[" ".join(a) for a, _ in BAD[::7]])
def test_which_ends_papermill_at_once(tmp_path, arguments, says):
    (tmp_path / "a_file").write_text("mine")
    done = papermill(tmp_path, "exp_revival", *arguments)
    assert done.returncode != 0
    assert says in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr.split("BadInput", 1)[1]
    assert (tmp_path / "a_file").read_text() == "mine"
    assert not (tmp_path / "outputs").exists()


def test_a_damaged_store_ends_it_before_training_and_is_left_alone(smoke, tmp_path):
    shutil.copytree(smoke / "outputs", tmp_path / "outputs")
    place = tmp_path / "outputs" / "exp_revival" / "smoke"
    weights = next((tmp_path / "outputs" / "runs").glob("*-*/weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    before = {p: p.read_bytes() for p in (weights, place / "results.csv", place / "claims.json")}
    runs = {*(tmp_path / "outputs" / "runs").glob("*-*")}
    done = papermill(tmp_path, "exp_revival", *SMOKE, "-p", "seeds", "3")
    assert done.returncode != 0
    assert "BadInput: file in the store is" in done.stderr and "remove its folder" in done.stderr
    assert before == {p: p.read_bytes() for p in before}
    assert runs == {*(tmp_path / "outputs" / "runs").glob("*-*")}


def test_help_shows_every_parameter_with_type_and_meaning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--help-notebook", str(NOTEBOOK)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    for shown in (
        "scale: str",
        "seeds: int",
        "device: str",
        "out: str",
        "priors: str",
        "ft_rate: str",
        "workers: int",
        "how many seeds",
    ):
        assert shown in done.stdout + done.stderr
