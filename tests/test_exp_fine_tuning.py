"Behaviour, pruning and probing as a user runs them: papermill, from another folder, with good and bad parameters."

import json

import pandas as pd
import pytest

from tests.conftest import papermill, refusal
from wrapperlib.claims import behavior_claims, probing_claims, pruning_claims

NAMES = ("exp_behavior", "exp_pruning", "exp_probing")
OWN = dict(
    exp_behavior=(),
    exp_pruning=("-p", "most_rows", "20"),
    exp_probing=("-p", "samples", "128", "-p", "literal_steps", "10"),
)
FEW = ("-p", "scale", "smoke", "-p", "priors", "L H", "-p", "c_trs", "0 1", "-p", "rates", "M")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("somewhere else")
    for name in NAMES:
        done = papermill(folder, name, *FEW, *OWN[name], "-p", "workers", "1")
        assert done.returncode == 0, done.stderr[-3000:]
    done = papermill(folder, "exp_behavior", *FEW, "-p", "task", "index", "-p", "workers", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "outputs"


FILES = dict(
    exp_behavior=["fig5", "fig6"],
    exp_pruning=[f"{what}_{prior}" for what in ("few", "sweep", "where") for prior in "LH"],
    exp_probing=["o_pt", "o_ft"],
)
CLAIMS = dict(exp_behavior=behavior_claims(), exp_pruning=pruning_claims(), exp_probing=probing_claims())


@pytest.mark.parametrize("name", NAMES)
def test_results_are_where_they_belong(smoke, name):
    place = smoke / name / "smoke"
    figures = {f"{figure}.{kind}" for figure in FILES[name] for kind in ("png", "svg")}
    tables = {"tables.csv"} if name == "exp_behavior" else set()
    assert {p.name for p in place.iterdir()} == {"results.csv", "claims.json", "provenance.json"} | figures | tables
    judged = json.loads((place / "claims.json").read_text())
    assert [c["id"] for c in judged] == [c.id for c in CLAIMS[name]]
    assert {c["verdict"] for c in judged} <= {"holds", "fails", "inconclusive"}
    shares = pd.read_csv(place / "results.csv").query("metric not in ('rows', 'loss', 'selectivity')")["value"]
    assert shares.between(0, 1).all()


def test_nothing_is_trained_twice(smoke):
    training = {name: json.loads((smoke / name / "smoke/provenance.json").read_text())["training"] for name in NAMES}
    assert [training[name]["trained"] for name in NAMES] == [6, 0, 0]
    index = json.loads((smoke / "exp_behavior/smoke_index/provenance.json").read_text())["training"]
    assert (index["trained"], index["reused"]) == (4, 2)  # the pretrainings are the counter's


def test_the_papers_tables_stand_beside_ours(smoke):
    table = pd.read_csv(smoke / "exp_behavior/smoke/tables.csv")
    assert len(table) == 2 * 2 * 10 and not table["paper"].isna().any()
    assert (table["difference"] - (table["ours"] - table["paper"])).abs().max() < 1e-9
    index = pd.read_csv(smoke / "exp_behavior/smoke_index/tables.csv")
    assert (index["paper"] != table["paper"]).any()


def test_what_was_pruned_and_read(smoke):
    rows = pd.read_csv(smoke / "exp_pruning/smoke/results.csv")
    assert set(rows["way"]) == {"top", "random", "mean"} and set(rows["k"]) == {*range(16), 20}
    sits = rows[rows["metric"] == "rows"].groupby(["prior", "c_tr", "k"])["value"].sum().reset_index()
    assert (sits["value"] == sits["k"]).all()
    nothing = rows[(rows["k"] == 0)].groupby(["prior", "c_tr", "metric"])["value"].nunique()
    assert (nothing == 1).all()
    read = pd.read_csv(smoke / "exp_probing/smoke/results.csv")
    assert set(read["protocol"]) == {"fine_tuning", "pretraining", "untrained"}
    assert set(read["metric"]) == {"accuracy", "shuffled", "selectivity", "majority", "says", "literal"}
    assert set(read["site"]) == {"embed", "blocks.0.residual", "blocks.1.residual"} and set(read["operand"]) == {
        "a",
        "b",
    }


BAD = [
    ("exp_behavior", dict(task="sort"), "task is 'sort'; allowed: one of count, index"),
    ("exp_behavior", dict(rates="XL"), "rates is 'XL'; allowed: some of L, M, S"),
    ("exp_behavior", dict(c_trs="0 2"), "c_trs is '0 2'; allowed: different numbers from 0 to 1"),
    ("exp_behavior", dict(c_trs="half"), "c_trs is 'half'; allowed: different numbers from 0 to 1"),
    ("exp_behavior", dict(c_trs=True), "c_trs is True; allowed: different numbers from 0 to 1"),
    ("exp_behavior", dict(pretraining="50K"), "pretraining is '50K'; allowed: one of full, quarter"),
    ("exp_behavior", dict(priors="Q"), "priors is 'Q'; allowed: names of priors"),
    ("exp_behavior", dict(scale="huge"), "scale is 'huge'; allowed: one of smoke"),
    ("exp_behavior", dict(seeds=0), "seeds is 0; allowed: whole numbers"),
    ("exp_behavior", dict(most_rows=3), "parameter name is 'most_rows'; allowed: scale, seeds"),
    ("exp_pruning", dict(scale="smoke", most_rows=289), "most_rows is 289; allowed: whole numbers from 1 to 288"),
    ("exp_pruning", dict(most_rows=0), "most_rows is 0; allowed: whole numbers from 1"),
    ("exp_pruning", dict(scale="huge", most_rows=5), "scale is 'huge'; allowed: one of smoke"),
    ("exp_probing", dict(samples=1), "samples is 1; allowed: whole numbers from 64"),
    ("exp_probing", dict(literal_steps=-1), "literal_steps is -1; allowed: whole numbers from 0"),
    ("exp_probing", dict(device="tpu"), "device is 'tpu'; allowed: auto or one that is there"),
]


@pytest.mark.parametrize("name, given, says", BAD, ids=[f"{n} {g}" for n, g, _ in BAD])
def test_bad_parameters_are_refused_before_any_work(tmp_path, monkeypatch, name, given, says):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(name, given)
    assert not list(tmp_path.iterdir())


def test_a_bad_parameter_ends_papermill_with_one_sentence(tmp_path):
    done = papermill(tmp_path, "exp_pruning", "-p", "scale", "smoke", "-p", "most_rows", "5000")
    assert done.returncode != 0 and "most_rows is 5000; allowed: whole numbers from 1 to 288" in done.stderr
    assert "Traceback" not in done.stderr.split("BadInput", 1)[1] and not (tmp_path / "outputs").exists()
