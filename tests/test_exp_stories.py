"The experiment on stories as a user runs it: papermill, from another folder, with good and bad parameters."

import json

import pandas as pd
import pytest

from tests.conftest import papermill, refusal
from wrapperlib.story_claims import STORY_CLAIMS

pytest.importorskip("tokenizers")
FEW = ("-p", "scale", "smoke", "-p", "deletions", "F+RR", "-p", "rates", "M", "-p", "workers", "1")
FIGURES = ("fig11", "request", "foreshadowing", "dialogue", "badending", "moralvalue", "conflict")
FIGURES += tuple(
    f"{p}_{m}" for p in ("deletion", "reft") for m in ("loss_twist", "loss_twist_story", "says_asked", "says_other")
)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("somewhere else")
    done = papermill(folder, "exp_stories", *FEW)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_results_are_where_they_belong(smoke):
    place = smoke / "outputs/exp_stories/smoke"
    figures = {f"{figure}.{kind}" for figure in FIGURES for kind in ("png", "svg")}
    assert {p.name for p in place.iterdir()} == {
        "results.csv",
        "claims.json",
        "provenance.json",
        "table1.csv",
    } | figures
    judged = json.loads((place / "claims.json").read_text())
    assert [c["id"] for c in judged] == [c.id for c in STORY_CLAIMS]
    assert {c["verdict"] for c in judged} <= {"holds", "fails", "inconclusive"}
    about = json.loads((place / "provenance.json").read_text())
    assert about["training"]["trained"] == 2 + (2 * 2 + 1) + 4 * 3 + 1 and len(about["judge"]) == 4
    assert about["records"]["tuning all"]["kept"] == 600
    table = pd.read_csv(place / "table1.csv")
    assert table["ours"].between(table["low"], table["high"]).all() and table["paper"].notna().any()


def test_nothing_is_done_twice_and_a_learned_judge_can_stand_in(smoke):
    done = papermill(smoke, "exp_stories", *FEW, "-p", "judge", "learned")
    assert done.returncode == 0, done.stderr[-3000:]
    about = json.loads((smoke / "outputs/exp_stories/smoke/provenance.json").read_text())
    assert about["training"]["trained"] == 0
    assert list(
        (smoke / "outputs/exp_stories/smoke/earlier").iterdir()
    )  # another judge, other results: the first are kept


BAD = [
    (dict(scale="desk_paper"), "scale is 'desk_paper'; allowed: one of smoke, desk, paper"),
    (dict(scale="paper"), "data is 'tales'; allowed: at size paper: hub"),
    (dict(data="nowhere"), "data is 'nowhere'; allowed: tales, hub, or a folder with TinyStories-Instruct-train.txt"),
    (dict(deletions="F RR"), "deletions is 'F RR'; allowed: some of F, F+MM, F+RR"),
    (dict(rates="L"), "rates is 'L'; allowed: some of M, S"),
    (dict(judge="gpt"), "judge is 'gpt'; allowed: one of exact, learned"),
    (dict(data="hub", judge="exact"), "judge is 'exact'; allowed: learned, unless the data are tales"),
    (dict(seeds=0), "seeds is 0; allowed: whole numbers"),
    (dict(task="index"), "parameter name is 'task'; allowed: scale, seeds"),
]


@pytest.mark.parametrize("given, says", BAD, ids=[str(g) for g, _ in BAD])
def test_bad_parameters_are_refused_before_any_work(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    assert says in refusal("exp_stories", given)
    assert not list(tmp_path.iterdir())
