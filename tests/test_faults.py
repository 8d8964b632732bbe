"The promises, broken on purpose: a seeded sample of what `make faults` does."

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from tests.breaking import careless, fragile, hopeless, slain
from tests.conftest import REPO
from wrapperlib import compiled, faults, pruning, runs, sweep
from wrapperlib.analysis import Probing, look_at
from wrapperlib.checks import BadInput, NotWritten
from wrapperlib.claims import page
from wrapperlib.compiled import load_weights
from wrapperlib.grammar import Grammar, Sampler, recognise
from wrapperlib.protocols import SCALES
from wrapperlib.runs import Store, check_results, publish, train_run
from wrapperlib.tasks import PRIORS, Domain, Natural, decode
from wrapperlib.training import Recipe, log_spaced, rate, train

NOTEBOOKS = [*sorted(REPO.glob("nbs/exp_*.ipynb")), *sorted(REPO.glob("nbs/bench_*.ipynb"))]
RUN, SMOKE, QUESTION = faults.a_run(3), SCALES["smoke"], Probing(samples=64, literal=0)
DAMAGES = [*faults.damages(Path("/nowhere"))]
NUMBERS = pd.DataFrame(dict(value=[1.0, 2.0]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("trained") / "runs")
    train_run(store, RUN)
    look_at(store, QUESTION, SMOKE, RUN)
    return store


@pytest.fixture
def store(trained, tmp_path):
    shutil.copytree(trained.root, tmp_path / "runs")
    return Store(tmp_path / "runs")


def checkpoint(store, step=2):
    "A run that stands at this step."
    run, kept = faults.a_run(4), []
    train(run.fresh_model(), run.stream, run.recipe, save=kept.append, save_every=0)
    store.save_partial(run, kept[step - 1], dict(seconds=0, devices=["cpu"]))
    return run


# Files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return faults.kept_files(tmp_path_factory.mktemp("kept"))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_named_and_neither_executed_nor_changed(files, tmp_path, how):
    assert len(files) == 9
    damage = faults.damages(tmp_path / "was executed")[how]
    for what, (path, use) in files.items():
        assert faults.refused(path, damage(path.read_bytes()), use, tmp_path / "was executed"), what
    for what, (_, use) in files.items():
        if what != "checkpoint":
            use()


def test_a_plausible_number_edited_by_hand_is_named(files, tmp_path):
    for what, (path, use) in files.items():
        if what != "a compiled program":  # that has no checksum
            assert faults.refused(path, faults.edited(path.read_bytes()), use, tmp_path / "was executed"), what


@pytest.mark.parametrize("how", ["a pickle", "announcing terabytes", "not finite", "of another shape", "another's"])
def test_weights_whose_record_was_forged_to_fit_are_refused_all_the_same(store, tmp_path, how):
    trace, data = tmp_path / "was executed", (store.path(RUN) / "weights.safetensors").read_bytes()
    forged = {
        "not finite": faults.with_nan,
        "of another shape": lambda data: save({k: x[:-1].clone() for k, x in load(data).items()}),
        "another's": lambda data: compiled.SHIPPED["max"].read_bytes(),
    }
    path = faults.forge(store, RUN, (faults.damages(trace) | forged)[how](data))
    with pytest.raises(BadInput, match="file in the store is ") as said:
        store.model(RUN)
    assert str(path) in str(said.value) and not trace.exists()
    assert faults.apart(faults.memory_of, partial(store.model, RUN)) < 2**26


def test_a_file_without_an_end_takes_no_memory(store):
    path = store.path(RUN) / "weights.safetensors"
    os.truncate(path, 2**28)  # of holes
    assert faults.apart(faults.memory_of, partial(store.model, RUN)) < 2**26
    os.truncate(path, 2**40)
    run = checkpoint(store)
    os.truncate(store.partial(run), 2**28)
    assert faults.apart(faults.memory_of, partial(store.checkpoint, run)) < 2**26
    os.truncate(store.path(RUN) / "run.json", 2**40)
    with pytest.raises(BadInput, match=r"run\.json"):
        store.meta(RUN)


@pytest.mark.parametrize(
    "changes",
    [
        dict(shapes={"blocks.0.up.weight": [2**15, 2**17]}),  # 16 GiB of zeros
        dict(shapes={"blocks.0.up.weight": [2**30, 2**30]}),
        dict(shapes={"blocks.0.up.weight": [-1, 4]}),
        dict(shapes={"blocks.0.up.weight": "large"}),
        dict(shapes={f"blocks.{10**9}.up.weight": [0]}),
        dict(shapes=[1, 2]),
        dict(length=2**40),
        dict(tokens=7),
        dict(residual=["one"]),
    ],
    ids=str,
)
def test_a_program_that_announces_more_than_it_holds_is_refused_before_memory_is_taken(tmp_path, changes):
    path = tmp_path / "program.safetensors"
    path.write_bytes(faults.program_announcing())
    assert load_weights(path).about == load_weights("max").about
    path.write_bytes(faults.program_announcing(**changes))
    with pytest.raises(BadInput, match="weight file is"):
        load_weights(path)
    assert faults.apart(faults.memory_of, partial(load_weights, path)) < 2**26


def test_a_link_out_of_the_store_is_refused_and_what_it_leads_to_is_left_alone(store, tmp_path):
    own, other = tmp_path / "mine.txt", faults.a_run(4)
    own.write_text("mine")
    weights = store.path(RUN) / "weights.safetensors"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(weights, elsewhere)
    weights.symlink_to(elsewhere)  # the very same bytes
    for link in (store.partial(other), store.path(other), store.root / "locks" / f"{runs.address(other)}.lock"):
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(own)
        with pytest.raises(BadInput, match="the store's own files; this one leads to"):
            train_run(store, other)
        link.unlink()
    with pytest.raises(BadInput, match="the store's own files; this one leads to"):
        store.model(RUN)
    assert own.read_text() == "mine" and not store.finished(other)


def test_a_record_of_another_version_is_refused_or_left_alone(tmp_path):
    assert faults.other_versions(tmp_path) == [True, True]


def test_results_edited_by_hand_are_named(tmp_path):
    place = tmp_path / "exp_mine" / "desk"
    publish(place, NUMBERS, {}, dict(parameters={}), [])
    assert {p.name for p in check_results(place)} == {"results.csv", "claims.json"}
    before = {p: p.read_bytes() for p in place.iterdir()}

    def refused(name):
        with pytest.raises(BadInput, match="file of results is ") as said:
            check_results(place)
        assert name in str(said.value)
        for path, data in before.items():
            path.unlink(missing_ok=True)
            path.write_bytes(data)

    (place / "results.csv").write_text(before[place / "results.csv"].decode().replace("2.0", "2.5"))
    with pytest.raises(BadInput, match=r"results\.csv"):  # the page of verdicts does not pass it on
        page(tmp_path)
    refused("results.csv")
    (place / "claims.json").unlink()
    refused("claims.json")
    about = json.loads(before[place / "provenance.json"])
    (place / "provenance.json").write_text(json.dumps(about | dict(parameters=dict(seeds=30))))
    refused("provenance.json")
    for name in ("../../secret", "/etc/passwd"):
        named = {k: v for k, v in about.items() if k != "checksum"} | dict(files={name: "0"})
        (place / "provenance.json").write_text(json.dumps(named))
        refused(f"allowed: files in the folder of {place / 'provenance.json'}, which lists it")
    (tmp_path / "copy.csv").write_bytes(before[place / "results.csv"])
    (place / "results.csv").unlink()
    (place / "results.csv").symlink_to(tmp_path / "copy.csv")
    refused("results.csv")
    with pytest.raises(BadInput, match="figure's name"):
        publish(place, NUMBERS, {"../figure": None}, {})
    check_results(place)


# Kills and errors in the middle of a write


@pytest.mark.parametrize("end, code", [(partial(os._exit, 3), 3), (slain, -9)], ids=["by itself", "by another's kill"])
def test_a_restart_that_fails_is_no_kill_survived_though_the_next_would_succeed(tmp_path, end, code):
    found = faults.kill_often(partial(fragile, end=end), tmp_path, moments=1)
    assert found["kills"] == 1 and found["survived"] == 0
    assert f"exit code {code}: something went wrong" in found["failures"][-1]


def test_a_work_that_fails_before_any_kill_is_reported_and_not_tried_for_ever(tmp_path):
    found = faults.kill_often(hopeless, tmp_path, moments=1)
    assert found["survived"] == 0 and len(found["failures"]) == found["lives"] <= 2
    assert all("ValueError: never" in said for said in found["failures"])


def test_who_breaks_things_notices_that_they_break(tmp_path, trained):
    found = faults.kill_often(careless, tmp_path / "kills", moments=2)
    assert found["kills"] == 2 and found["survived"] == 0
    assert all("differs from the unbroken one: mine/results.csv" in said for said in found["failures"])
    file = tmp_path / "mine.csv"

    def write_in_place():
        try:
            with open(file, "w") as opened:
                opened.write("new and long")
        except OSError as e:
            raise NotWritten(e.strerror) from None

    file.write_text("old")
    outcomes = faults.fail_everywhere(write_in_place, lambda: file.read_text() in ("old", "new and long"))
    assert outcomes["write"] == [False]
    path = trained.path(RUN) / "run.json"
    assert not faults.refused(path, path.read_bytes(), partial(trained.verify, RUN), tmp_path / "trace")
    assert not faults.is_a_sentence("something is wrong", "scale")
    assert faults.memory_of(partial(trained.verify, RUN)) == math.inf


@pytest.mark.parametrize(
    "work, kills",
    [
        (partial(faults.pretrain, steps=60), 2),
        (partial(faults.tune, steps=60), 2),
        (partial(faults.grid, steps=30, seeds=2), 2),
        (partial(faults.tokenise, tales=1000), 2),
        (partial(faults.grid, steps=30, seeds=2, workers=2), 1),
    ],
    ids=["pretraining", "fine-tuning", "sweep", "tokenisation", "sweep of two workers"],
)
def test_what_is_killed_at_random_moments_comes_to_the_same(tmp_path, work, kills):
    found = faults.kill_often(work, tmp_path, moments=kills, seed=1)
    assert found["kills"] == found["survived"] == kills and not found["failures"], found["failures"]


def test_an_experiment_is_killed_and_needs_no_network(tmp_path):
    away = tmp_path / "away"
    found = faults.kill_often(partial(faults.experiment, without=away), tmp_path / "kills", moments=1, seed=5)
    assert found["kills"] == found["survived"] == 1 and not found["failures"], found["failures"]
    assert len(set((away / "started").read_text().split())) >= 2  # kernels of those lives, and what they started
    assert not (away / "tried").exists()
    check_results(next((tmp_path / "kills" / "0").glob("out/exp_randft/smoke")))


def test_the_network_is_away(tmp_path):
    code = """
import socket
for reach in (lambda: socket.create_connection(("192.0.2.1", 80), 1), lambda: socket.getaddrinfo("example.org", 80)):
    try:
        reach()
        print("reached")
    except OSError as e:
        print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=faults.offline(tmp_path / "away"), capture_output=True, text=True
    )
    assert done.stdout.count("there is no network in this test") == 2, done.stderr
    assert len((tmp_path / "away" / "tried").read_text().split()) == 2


@pytest.mark.parametrize("error", [faults.NO_SPACE, faults.READ_ONLY, faults.NO_PERMISSION], ids=str)
@pytest.mark.parametrize("once", [False, True], ids=["and all that follow", "alone"])
@pytest.mark.parametrize("what", ["a finished run", "a checkpoint", "results"])
def test_a_write_that_fails_anywhere_leaves_what_was_there(tmp_path, what, once, error):
    work, intact = faults.ways_of_writing(tmp_path, here=once)[what]
    outcomes = faults.fail_everywhere(work, intact, error, once)
    assert all(map(all, outcomes.values())), outcomes
    assert sum(map(len, outcomes.values())) >= 4
    if what == "results":  # three files are written, and then put in their places
        assert len(outcomes["replace"]) >= 6 and len(outcomes["rename"]) >= 1
    work()
    assert intact()
    check_results(tmp_path / "results")


@pytest.mark.parametrize("what", faults.ways_of_dying())
def test_a_process_that_ends_anywhere_in_a_write_leaves_what_was_there_and_can_go_on(tmp_path, what):
    outcomes = faults.ways_of_dying()[what](tmp_path)
    assert all(map(all, outcomes.values())), outcomes
    assert all(len(outcomes[step]) >= 3 for step in ("open", "write", "fsync", "replace")), outcomes


def test_who_ends_in_the_middle_of_a_careless_write_is_noticed(tmp_path):
    outcomes = faults.die_everywhere(in_place, tmp_path, before=in_place)
    assert outcomes["write"] == [False]


def in_place(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "results.csv", "w") as file:
        file.write("a long line")


def test_a_result_that_cannot_be_written_leaves_the_one_before_where_it_was(tmp_path):
    publish(tmp_path, NUMBERS, {}, {})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for step in ("open", "write", "fsync"):
        with pytest.raises(NotWritten), faults.failing(step, faults.NO_SPACE):
            publish(tmp_path, NUMBERS * 2, {}, {})
        assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


# Disks


@pytest.fixture(params=["as root", "as another"])
def disk(tmp_path, request, monkeypatch):
    "One of a megabyte, or, where it cannot be mounted, one on which calls fail."
    if request.param == "as another":
        monkeypatch.setattr(os, "geteuid", lambda: 1)
    with faults.Disk(tmp_path / "disk") as disk:
        if request.param == "as root" and not disk.mounted:
            pytest.skip("nothing may be mounted here")
        yield disk


def test_a_full_disk_is_a_sentence_and_what_was_trained_goes_on(disk):
    assert faults.train_on_a_full_disk(disk) == [True] * 4


def test_what_is_on_a_read_only_disk_can_be_used_and_nothing_else(disk):
    assert faults.use_what_is_read_only(disk) == [True] * 3


def test_no_permission_is_a_sentence(tmp_path):
    denied = pytest.raises(NotWritten, match=r"locks.* cannot be written \(Permission denied\)")
    with denied, faults.failing("mkdir", faults.NO_PERMISSION):
        train_run(Store(tmp_path / "runs"), RUN)
    with faults.failing("mkdir", faults.NO_PERMISSION):
        said = faults.refusal(REPO / "nbs/exp_revival.ipynb", dict(out=str(tmp_path / "new")))
    assert "a folder that can be written to (Permission denied)" in said
    assert not list(tmp_path.iterdir())


def test_any_name_of_a_folder_will_do(tmp_path, trained):
    place = tmp_path / "λ, a 'folder'; \"$HOME\" && 文件夹\t#1"
    faults.done(faults.pretrain, place / "x", 3)
    assert faults.contents(place / "x" / "runs") == faults.contents(trained.root)
    publish(place / "results", NUMBERS, {}, {})
    check_results(place / "results")


def test_a_store_that_vanishes_meanwhile_is_made_again(tmp_path, trained):
    store = Store(tmp_path / "runs")
    train_run(store, RUN, report=lambda step: step == 2 and shutil.rmtree(store.root), save_every=0)
    assert faults.contents(store.root) == faults.contents(trained.root)


def test_a_clock_that_jumps_changes_nothing(tmp_path):
    assert faults.work_while_the_clock_jumps(tmp_path) == [True, True]


# Two writers


def test_two_writers_and_a_reader(tmp_path):
    for work, steps in ((faults.train_same, 2), (faults.put_same, 3)):
        assert faults.raced(work, tmp_path / work.__name__, 4, steps) == [True] * 4


def put_one_that_is_my_own(folder, times):
    "A work whose second run depends on who writes it."
    for seed in range(times):
        run = replace(faults.a_run(3), seed=seed, measures=())
        model = run.fresh_model()
        if seed == 1 and folder.name == "together":
            with torch.no_grad():
                model.head.weight[0, 0] += 1e-6
        Store(folder / "runs").put(run, model, [], dict(seconds=0, devices=["cpu"]))


def test_each_run_of_two_writers_is_compared_with_that_of_one_alone(tmp_path):
    outcomes = faults.raced(put_one_that_is_my_own, tmp_path / "own", 3, 3)
    assert sorted(outcomes) == [False, True, True]
    found = faults.tried(1, "two writers", partial(faults.raced, faults.pretrain, tmp_path / "two", "no number", 3))
    assert (found["tried"], found["held"]) == (1, 0) and "BadInput: steps is 'no number'" in found["note"]


def test_two_who_publish_lose_nothing(tmp_path):
    assert faults.both_published(tmp_path, 6) == [True] * 12
    assert not faults.leftovers(tmp_path) and len(list((tmp_path / "results" / "earlier").iterdir())) == 11


# Wrong input


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_wrong_parameters_of_notebooks_are_refused_in_a_sentence(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = faults.wrong_parameters(notebook)
    assert len(wrong) > 20
    for name, value in wrong:
        try:
            said = faults.refusal(notebook, {name: value})
        except ModuleNotFoundError as e:
            pytest.skip(f"{e.name} is not installed")
        assert faults.is_a_sentence(said, name), (name, str(value)[:50], said[:300])
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_of_functions_are_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = faults.wrong_calls()
    assert len(calls) >= 60
    for name, call in calls:
        with pytest.raises(BadInput) as said:
            call()
        assert faults.is_a_sentence(str(said.value), name), (name, str(said.value)[:300])
    assert not list(tmp_path.iterdir())


QUICK = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def grammars(draw):
    "Rules in which a symbol becomes letters and symbols further on, so that every string ends."
    symbols = "stuv"[: draw(st.integers(1, 4))]
    lines = []
    for i, symbol in enumerate(symbols):
        part = st.lists(st.sampled_from("abc" + symbols[i + 1 :]), min_size=1, max_size=3)
        alternatives = draw(st.lists(part.map(" ".join), min_size=1, max_size=3, unique=True))
        lines.append(f"{symbol} → {' | '.join(alternatives)}")
    return Grammar.parse("\n".join(lines))


@QUICK
@given(grammars(), st.integers(0, 99), st.sampled_from([1, 2**18]))
def test_what_is_drawn_is_in_the_grammar(grammar, seed, cap):
    tokens, lengths = Sampler(grammar, cap).strings(3, np.random.default_rng(seed))
    for string in np.split(tokens, lengths.cumsum()[:-1]):
        assert recognise(grammar, [grammar.terminals[t] for t in string])


@QUICK
@given(st.randoms(use_true_random=False))
def test_any_file_of_stories_is_read_or_counted(chance):
    assert faults.garbled(chance)


@QUICK
@given(st.text("stab→|( )0.5\n", max_size=40) | st.text(max_size=40))
def test_any_text_is_a_grammar_or_refused(text):
    try:
        Sampler(Grammar.parse(text))
    except BadInput as e:
        assert "\n" not in str(e)


@QUICK
@given(st.integers(12, 60), st.data(), st.integers(0, 99))
def test_every_row_is_spelled_with_the_vocabulary(length, data, seed):
    domain = Domain(length=length, window=data.draw(st.integers(6, length)), nth=data.draw(st.integers(1, 3)))
    ids = Natural(domain, PRIORS["M"]).batch(5, seed, 0)
    assert ids.shape == (5, domain.row_length) and len(set(domain.vocabulary)) == len(domain.vocabulary)
    words = [[domain.vocabulary[i] for i in row] for row in ids]
    assert [[domain.vocabulary.index(w) for w in row] for row in words] == ids.tolist()
    assert all(decode(domain, row) for row in ids)
    with pytest.raises(BadInput):
        decode(domain, [len(domain.vocabulary)])


@QUICK
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_a_model_is_as_before_after_any_mask(seed, share):
    model, chance = faults._small(), torch.Generator().manual_seed(seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    units = {n: torch.rand(len(p), generator=chance) < share for n, p in pruning.matrices(model).items()}
    with pruning.pruned(model, units):
        for name, mask in units.items():
            weight = model.get_parameter(name)
            assert not weight[mask].any() and torch.equal(weight[~mask], before[name][~mask])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@QUICK
@given(st.integers(1, 3000), st.floats(0, 0.99), st.floats(0, 1), st.floats(1e-8, 10), st.integers(1, 5))
def test_every_schedule_rises_to_its_rate_and_falls_to_its_floor(steps, warmup, floor, lr, per_octave):
    recipe = Recipe(steps=steps, warmup=warmup, floor=floor, lr=lr)
    rates = [rate(recipe, step) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(0 <= r <= lr * (1 + 1e-9) for r in rates) and (rates[0] > 0 or floor == 0)
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    measured = log_spaced(steps, per_octave)
    assert measured[0] == 0 and measured[-1] == steps and measured == sorted(set(measured))


# Numbers


def test_numbers_that_nothing_can_be_done_with_are_named(tmp_path):
    found = faults.numbers(tmp_path)
    assert len(found) == 5 and all(found.values()), found
    assert not [*tmp_path.rglob("weights.safetensors"), *faults.leftovers(tmp_path)]


# Load


@pytest.mark.parametrize("missing", [False, True], ids=["all there", "half missing"])
def test_looking_through_five_thousand_runs_costs_what_it_costs_for_a_quarter_of_them(tmp_path, missing):
    """By run, at most twice as much; and a status, with its reasons, up to six times what it takes to list what is there.

    Seconds of a CPU, and against each other. Two seconds are allowed by `faults`, where listing took 0.3: six times that is no more.
    """
    took, many = {}, {}
    for seeds in (52, 209):
        out = tmp_path / str(seeds)
        many[seeds] = faults.a_store_of(out, seeds, missing)
        assert len(list((out / "runs").glob("*-*"))) == many[seeds]
        took[seeds] = {what: cpu for what, (_, cpu) in faults.apart(faults.seconds_to_look, out, seeds).items()}
    assert many[209] >= 5000
    for what in ("listing", "status"):
        assert took[209][what] / many[209] < 2 * took[52][what] / many[52], took
    assert took[209]["status"] < 6 * took[209]["listing"] and took[209]["lookup"] < took[209]["status"], took
    table = sweep.status("smoke", 209, "cpu", str(out), experiments=[("exp_revival", {})])
    assert table.loc["all", "to train"] == (many[209] // 2 if missing else 0)
    assert table.loc["all", "reused"] == many[209] - table.loc["all", "to train"]


def test_memory_is_flat_over_many_runs(tmp_path):
    peaks = faults.apart(faults.memory_over, tmp_path, 40)
    assert peaks[-1] - peaks[9] < 2**24
