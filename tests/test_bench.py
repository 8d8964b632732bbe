"The benchmarks: their room against oracles, and the notebooks as `make bench` runs them, at sizes that mean nothing."

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import REPO, papermill
from wrapperlib import bench, protocols
from wrapperlib.checks import BadInput
from wrapperlib.training import FINE_TUNING, Recipe, loss_of, train

SMOKE = protocols.pretraining(protocols.SCALES["smoke"], "H")


def test_rounds_begin_with_another_meter_each_and_the_first_is_not_counted():
    asked = []

    def meter(name, seconds):
        return lambda: asked.append(name) or next(seconds)

    meters = dict(a=meter("a", iter([100.0, 1, 2, 3, 4, 5])), b=meter("b", iter([100.0, 2, 4, 6, 8, 10])))
    seconds = bench.in_turn(meters, repeats=5)
    assert "".join(asked) == "ab" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert list(seconds["b"] / seconds["a"]) == [2.0] * 5


def test_a_meter_counts_what_the_work_says_it_did(monkeypatch):
    clock = iter(range(0, 1000, 3))  # every look at it is three seconds later
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.timed(lambda: 6.0, at_least=9)() == 9 / 18
    assert bench.timed(lambda: None, at_least=1)() == 3


def test_a_row_is_median_and_range_and_its_target_is_met_by_the_median():
    at_least = bench.row("ours", "theirs", [1.0, 3.0, 1.3, 1.1, 1.2], ">= 1.2")
    assert list(at_least.values()) == ["ours", "theirs", 1.2, 1.0, 3.0, ">= 1.2", 5]
    at_most = bench.row("ours", "theirs", [1.0, 3.0, 1.3, 1.1, 1.2], "<= 1.1")
    table = pd.DataFrame([at_least, at_most, bench.row("ours", "theirs", [1.0] * 5)])
    assert list(bench.met(table)) == ["yes", "no", ""]
    with pytest.raises(BadInput, match="numbers from 0"):
        bench.row("ours", "theirs", [1.0, -1.0])
    assert bench.row("ours", "theirs", [0.0, 0.0, 4.0])["ratio"] == 0  # nothing is known from below


@pytest.mark.parametrize("recipe", [Recipe(batch=4, answer=2.0), replace(FINE_TUNING, batch=4)], ids=["all", "answer"])
def test_the_flops_of_a_step_are_those_that_torch_counts(domain, shape, recipe):
    stream = replace(SMOKE.stream, domain=domain)
    run = replace(SMOKE, stream=stream, recipe=recipe, shape=replace(shape, blocks=3))
    model, ids = run.fresh_model(), torch.from_numpy(stream.batch(recipe.batch, 0, 0))

    def of_onednn(x, weight, *_, out_shape, **__):
        return 2 * math.prod(x) * weight[0]

    onednn = {torch.ops.mkldnn._linear_pointwise: of_onednn} if bench.has_onednn() else {}
    with FlopCounterMode(display=False, custom_mapping=onednn) as counter:
        loss_of(model, ids, recipe).backward()
    counted = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    needed = bench.matmul_flops(run)
    assert sum(n for op, n in counted.items() if op != "bmm") == needed["linear"]
    # short samples compute whole squares of attention, of which the half that looks ahead is not needed
    t = ids.shape[1] - (1 if recipe.sequence else 2)
    squares = 3 if recipe.sequence else 2
    rest = 0 if recipe.sequence else 2 * t
    per_pair = 3 * 2 * run.shape.width * recipe.batch
    assert counted["bmm"] == per_pair * (squares * 2 * t * t + rest)
    assert needed["attention"] == per_pair * (squares * t * (t + 1) + rest)


def test_a_step_is_the_loops_step():
    run = replace(SMOKE, recipe=replace(SMOKE.recipe, steps=3))
    model = run.fresh_model()
    train(model, run.stream, run.recipe, (run.seed, run.data))
    step = bench.Step(run, fresh=True)
    for _ in range(3):
        step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), step.stack.parameters.values()))


@pytest.mark.parametrize("length", [26, 80], ids=["short samples", "fused attention"])
def test_memory_is_what_one_computes(length):
    domain = replace(SMOKE.stream.domain, length=length)
    places = bench.memory(replace(SMOKE, stream=replace(SMOKE.stream, domain=domain)))
    assert (places["measured"] / places["computed"]).between(0.97, 1.05).all()


def test_a_crew_takes_steps_and_leaves():
    with bench.Crew(SMOKE, 2, stretch=0.05) as crew:
        assert 0 < crew() < 1
        members = [member for member, _ in crew.members]
    assert all(member.exitcode == 0 for member in members)


def test_figures_show_every_row_and_say_in_words_what_is_not_met():
    rows = [bench.row("ours", f"peer {k}", [0.5, 1.0 + k], target) for k, target in enumerate([">= 1.2", "<= 9", ""])]
    [axes] = bench.ratios(pd.DataFrame(rows), "all").axes
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"ours\nagainst peer {k}" for k in range(3)]
    said = [t.get_text() for t in axes.texts]
    assert sum("not met" in text for text in said) == 1 and sum(text in "[]" for text in said) == 2
    points = pd.DataFrame(dict(panel="width", series="a step", size=[1.0, 2, 4] * 2, seconds=[1.0, 4, 16] * 2))
    [panel] = bench.growth(points, "growth").axes
    assert [t.get_text() for t in panel.get_legend().get_texts()] == ["a step: width^2.00"]
    assert np.allclose(bench.exponents([1, 2, 4], pd.DataFrame([[1.0, 4, 16]] * 3)), 2)


def test_the_figure_of_growth_says_the_exponent_of_the_table():
    rounds = pd.DataFrame({1: [1.0, 1.0, 1.0], 2: [2.0, 9.0, 4.0], 4: [9.0, 4.0, 64.0]})
    points = [dict(panel="width", series="a step", size=n, seconds=s) for n in rounds for s in rounds[n]]
    fig = bench.growth(pd.DataFrame(points + [p | dict(series="processes") for p in points]), "growth", ("processes",))
    [panel] = fig.axes
    exponent = np.median(bench.exponents(list(rounds), rounds))
    said = [t.get_text() for t in panel.get_legend().get_texts()]
    assert said == [f"a step: width^{exponent:.2f}", "processes"]
    assert len(panel.lines) == 1  # a kink is no power


@pytest.mark.parametrize("most, few", [(500.0, False), (2000.0, True)], ids=["less", "more than three decades"])
def test_numbers_of_an_axis_have_room(most, few):
    rows = [bench.row("ours", "theirs", [ratio], "") for ratio in (1.0, most)]
    [axes] = bench.ratios(pd.DataFrame(rows), "all").axes
    axes.figure.canvas.draw()
    low, high = axes.get_xlim()
    shown = [t.get_text() for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert ("2" not in shown) == few and {"1", "10", "100"} <= set(shown)


def test_the_page_says_on_what_it_was_measured():
    found = dict(
        processor="A processor", instructions="AVX2", cores=2, threads_per_run=1, matmul_peak=dict(peak=1.5e11)
    )
    said = bench.machine(found)
    assert all(word in said for word in ("A processor", "AVX2", "2 cores", "threads of a run: 1", "peak: 150"))


def test_what_is_measured_keeps_memory_as_a_worker_does(monkeypatch):
    done = []

    class Pipe:
        def send(self, _):
            done.append("sent")

        def recv(self):
            raise EOFError

    monkeypatch.setattr(bench, "_keep_memory", lambda: done.append("keeps memory"))
    bench._serve(Pipe(), SMOKE)
    assert done == ["keeps memory", "sent"]


TIMED = dict(repeats=5, milliseconds=5)
TINY = {
    "bench_analysis": (TIMED | dict(scale="smoke", steps=50, samples=256), ["ratios"], ["sklearn"], 6),
    "bench_capability": (
        dict(seeds=1, steps=4, paper_steps=4, lever_seeds=1, lever_steps=4, lever_percent=0),
        ["capability", "levers", "ratios"],
        [],
        8,
    ),
    "bench_data": (TIMED | dict(scales="smoke"), ["ratios"], ["nltk", "pcfg"], 8),
    "bench_growth": (TIMED | dict(scale="smoke"), ["growth", "memory"], [], None),
    "bench_step": (TIMED | dict(scales="smoke"), ["ratios"], ["transformers", "accelerate", "transformer_lens"], None),
    "bench_stories": (TIMED | dict(tokens=8, texts=2, records=600), ["ratios"], ["tokenizers", "transformers"], 4),
    "bench_sweep": (TIMED | dict(scale="smoke", few=5, finished=24), ["ratios"], ["ray"], 11),
    "bench_tracr": (TIMED | dict(tasks="counter"), ["ratios"], ["tracr", "jax"], 3),
}
assert set(TINY) == {path.stem for path in REPO.glob("nbs/bench_*.ipynb")}
MORE = {"bench_capability": {"trials.csv"}}  # besides table, figures and provenance
SLOW = {"bench_capability", "bench_sweep"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TINY])
def test_the_benchmark_leaves_its_table(name, tmp_path):
    parameters, figures, peers, length = TINY[name]
    for peer in peers:
        pytest.importorskip(peer)
    done = papermill(tmp_path, name, *(x for k, v in parameters.items() for x in ("-p", k, str(v))))
    assert done.returncode == 0, done.stderr[-2000:]
    place = tmp_path / "outputs" / name
    table = pd.read_csv(place / "results.csv")
    assert list(table.columns) == bench.COLUMNS and table["ratio"].between(table["low"], table["high"]).all()
    assert length in (None, len(table)) and set(table["repeats"]) <= {5, 1}
    drawn = {f"{figure}.{kind}" for figure in figures for kind in ("png", "svg")}
    assert {p.name for p in place.iterdir()} == {"results.csv", "provenance.json", *drawn, *MORE.get(name, ())}
    about = json.loads((place / "provenance.json").read_text())
    assert set(about["parameters"]) >= set(parameters)
    assert all(peak > 1e8 for peak in about["matmul_peak"].values()) and about["processor"]
