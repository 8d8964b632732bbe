"Taking every model of a plan apart: once, side by side or one by one, and kept under what was asked."

import os
import signal
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from wrapperlib import analysis
from wrapperlib.analysis import Probing, Pruning, look_at_all, probing_results, pruning_results, some_rows
from wrapperlib.checks import BadInput
from wrapperlib.protocols import SCALES, behavior_plan, carry_out
from wrapperlib.pruning import matrices
from wrapperlib.runs import Store

SCALE = SCALES["smoke"]
ROWS, READINGS = Pruning(ks=(0, 5, 15, 30)), Probing(samples=256, literal=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    plan = behavior_plan(SCALE, priors=("L", "H"), c_trs=(1.0,), rates=("η_M",))
    carry_out(store, plan, workers=1)
    return store, plan


def empty(store):
    for path in (store.root / "analyses").glob("*"):
        path.unlink()


def test_side_by_side_and_one_by_one_give_the_same(trained, capsys):
    store, plan = trained
    alone = pruning_results(store, plan, SCALE, ROWS, workers=1)
    assert "2 models: 0 known, 2 to take apart" in capsys.readouterr().out
    empty(store)
    assert pruning_results(store, plan, SCALE, ROWS, workers=2).equals(alone)
    assert "2 of 2 models" in capsys.readouterr().out
    assert pruning_results(store, plan, SCALE, ROWS, workers=2).equals(alone)
    assert not capsys.readouterr().out  # known: nothing is done and nothing is said


@dataclass(frozen=True)
class Deadly:
    "A question that ends the process that asks it."

    def of(self, model, scale, seed):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_a_sentence(trained):
    store, plan = trained
    with pytest.raises(
        RuntimeError, match=r"worker process was killed .*what was done before is kept, run again to go on"
    ):
        look_at_all(store, Deadly(), SCALE, [({}, run, False) for _, run in plan], workers=2)


def test_what_pruning_finds_is_complete(trained):
    store, plan = trained
    table = pruning_results(store, plan, SCALE, ROWS, workers=1)
    of_model = table.query("prior == 'L'")
    swept = of_model.query("metric in ('acc_opt', 'acc_oft')")
    assert len(swept) == 2 * 3 * len(ROWS.ks) and set(swept["way"]) == {"top", "random", "mean"}
    unpruned = swept.query("k == 0").groupby("metric")["value"]
    assert (unpruned.nunique() == 1).all()  # no way changes anything with no rows
    log = store.log(plan[0][1])
    end = log[(log["step"] == log["step"].max()) & (log["metric"] == "acc_opt") & (log["c_te"] == 0)]["value"].item()
    assert unpruned.first()["acc_opt"] == end  # measured as in training
    sits = of_model.query("metric == 'rows'")
    assert set(sits["k"]) == {15} and sits["value"].sum() == 15
    assert len(sits) == len(matrices(plan[0][1].fresh_model()))
    assert of_model.query("metric == 'later_half'")["value"].between(0, 1).all()


def test_what_probing_finds_has_its_baselines(trained):
    store, plan = trained
    table = probing_results(store, plan, SCALE, READINGS, workers=1)
    assert set(table["protocol"]) == {"fine_tuning", "pretraining", "untrained"}
    fresh = table.query("protocol == 'untrained'")
    assert fresh["prior"].isna().all()
    per_model = table.query("prior == 'L' or protocol == 'untrained'").groupby(["protocol", "operand", "metric"]).size()
    assert (per_model == SCALE.shape.blocks + 1).all()
    chance = table.query("metric == 'shuffled'")["value"]
    assert chance.mean() < table.query("metric == 'accuracy' and protocol == 'fine_tuning'")["value"].mean()


def test_another_question_other_code_and_another_model_are_asked_anew(trained, monkeypatch):
    store, plan = trained
    scale, run = SCALE, plan[0][1]
    here = analysis._kept(store, ROWS, scale, run, False)
    assert here == analysis._kept(store, Pruning(ks=(0, 5, 15, 30)), scale, run, False)
    others = {
        here,
        analysis._kept(store, Pruning(ks=(0, 5)), scale, run, False),
        analysis._kept(store, ROWS, scale, run, True),
        analysis._kept(store, ROWS, scale, plan[1][1], False),
    }
    monkeypatch.setattr(analysis, "source_digests", lambda modules: dict(pruning="changed"))
    assert len(others | {analysis._kept(store, ROWS, scale, run, False)}) == 5


def test_how_many_stories_a_probe_reads_is_part_of_the_question(trained):
    store, [(_, run), *_] = trained
    sizes = [SimpleNamespace(samples=16), *(SimpleNamespace(samples=16, probed=n) for n in (64, 128))]
    assert len({analysis._kept(store, ROWS, size, run, False) for size in sizes}) == 3


def test_many_rows_alone_have_a_sweep_but_no_picture_of_where_the_few_sit(trained):
    store, plan = trained
    table = look_at_all(store, Pruning(ks=(0, 30)), SCALE, [({}, plan[0][1], False)], workers=1)
    assert set(table["k"]) == {0, 30} and "rows" not in set(table["metric"])


def test_a_damaged_table_is_refused_by_name_and_left(trained):
    store, plan = trained
    asked = Pruning(ks=(0, 7))
    path = analysis._kept(store, asked, SCALE, plan[0][1], False)
    path.parent.mkdir(exist_ok=True)
    for damage in (b"", b"metric\nx\n", b"\xff\xfe\x00"):
        path.write_bytes(damage)
        with pytest.raises(BadInput, match=f"file in the store is .*{path.name}.*remove it to ask again"):
            look_at_all(store, asked, SCALE, [({}, plan[0][1], False)], workers=1)
        assert path.read_bytes() == damage
    path.unlink()


def test_rows_of_a_sweep():
    assert some_rows(100)[:16] == tuple(range(16)) and some_rows(100)[-1] == 100 and len(some_rows(100)) < 30
    assert some_rows(4) == (0, 1, 2, 3, 4)
