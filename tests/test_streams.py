"Mixtures, wrong answers on purpose, several names for one task; and that the code of streams is part of a run's address."

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.conftest import REPO
from wrapperlib import runs
from wrapperlib.checks import BadInput
from wrapperlib.model import Shape
from wrapperlib.protocols import SCALES, behavior_plan, revival_plan
from wrapperlib.runs import Run, Store, address, source_digests, sources_of
from wrapperlib.streams import Mixture, Named, Relabelled, asked_by_all_names, with_synonyms
from wrapperlib.tasks import PRIORS, PROMPT, TAIL, Domain, Edited, Natural, decode, one_task
from wrapperlib.training import Measure, Recipe

DOMAIN = Domain(length=24, window=16, nth=2)
NAMED = with_synonyms(DOMAIN)
FT, PT = Edited(DOMAIN, "b", 1.0), Natural(DOMAIN, PRIORS["H"])


def texts(ids):
    return {row.tobytes() for row in ids[:, PROMPT:-TAIL]}


def count(domain, row, operand):
    "By Python's own counting, from the decoded row."
    words = decode(domain, row).split()
    return words[PROMPT:-TAIL][-domain.window :].count(operand)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.001])
def test_the_share_is_what_was_asked_for(share):
    n, steps = 1000, 20
    theirs = sum(
        (Mixture(FT, PT, share).batch(n, 3, step) != FT.batch(n, 3, step)).any(1).sum() for step in range(steps)
    )
    spread = (n * steps * share * (1 - share)) ** 0.5
    assert abs(theirs - n * steps * share) < 4 * spread + 1


def test_what_is_not_exchanged_is_what_unmixed_training_sees():
    mixed, alone = Mixture(FT, PT, 0.3).batch(200, (1, 1), 5), FT.batch(200, (1, 1), 5)
    kept = (mixed == alone).all(1)
    assert 0.5 < kept.mean() < 0.9
    assert (Mixture(FT, PT, 0).batch(50, 0, 0) == FT.batch(50, 0, 0)).all()
    assert (Mixture(FT, PT, 1).batch(50, 0, 0) == PT.batch(50, (0, 1, 0), 0)).all()
    assert (Mixture(FT, PT, 0.3).batch(200, (1, 1), 5) == mixed).all()  # a pure function


def test_no_two_parts_show_the_same_strings():
    long = Domain(length=120, window=40, nth=2)  # long enough for equal strings to be no chance
    natural, named = (Natural(domain, PRIORS["H"]) for domain in (long, with_synonyms(long)))
    both = Mixture(natural, natural, 0.5)
    first, second = (Mixture(natural, natural, share).batch(300, 0, 0) for share in (0, 1))
    assert not texts(first) & texts(second)
    for seed, step, split in ((1, 0, "train"), (0, 1, "train"), (0, 0, "test")):
        assert not texts(both.batch(300, 0, 0)) & texts(both.batch(300, seed, step, split))
    ids = asked_by_all_names(named, "a").batch(2000, 0, 0)
    asked = [texts(ids[ids[:, 1] == named.domain.ids[name]]) for name in ("C", "J1", "J2")]
    assert not (asked[0] & asked[1] or asked[0] & asked[2] or asked[1] & asked[2])


def test_labels_are_right_whoever_asks():
    for row in Mixture(FT, one_task(DOMAIN, "C", "c"), 0.5).batch(100, 0, 0):
        words = decode(DOMAIN, row).split()
        assert int(words[-2]) == count(DOMAIN, row, words[2])
    ids = asked_by_all_names(Natural(NAMED, PRIORS["H"]), "a").batch(1000, 0, 0)
    counting = ids[np.isin(ids[:, 1], [NAMED.ids[name] for name in ("C", "J1", "J2")])]
    assert len(counting) > 300
    for row in counting:
        words = decode(NAMED, row).split()
        assert int(words[-2]) == count(NAMED, row, words[2]) and (words[1] == "C" or words[2] == "a")


@pytest.mark.parametrize("c", [0.0, 1.0])
def test_the_wrong_answer_is_that_for_the_other_letter(c):
    asked = Edited(DOMAIN, "a", c)
    wrong, right = Relabelled(asked, "b").batch(200, 4, 2), asked.batch(200, 4, 2)
    assert (np.delete(wrong, -2, 1) == np.delete(right, -2, 1)).all()  # the same prompts and texts
    assert [int(decode(DOMAIN, row).split()[-2]) for row in wrong] == [count(DOMAIN, row, "b") for row in wrong]
    assert ((wrong[:, -2] == right[:, -2] + 1) == bool(c)).all()
    assert texts(wrong) == texts(replace(FT, c=c).batch(200, 4, 2))  # those of ordinary fine-tuning


def test_a_name_changes_the_task_token_alone():
    asked = Edited(NAMED, "a", 0.0)
    ids, named = asked.batch(100, 0, 0), Named(asked, "J2").batch(100, 0, 0)
    assert (np.delete(ids, 1, 1) == np.delete(named, 1, 1)).all() and set(named[:, 1]) == {NAMED.ids["J2"]}
    assert (Named(asked, "C").batch(100, 0, 0) == ids).all()
    plain = replace(asked, domain=DOMAIN).batch(100, 0, 0)
    assert (plain == ids).all()  # further names move no other token


def test_task_tokens_are_drawn_uniformly():
    for families in (("C", "CC", "I"), ("C", "CC", "I", "IC", "T")):
        ids = asked_by_all_names(Natural(NAMED, PRIORS["H"], families), "a").batch(20_000, 0, 0)
        tokens = [NAMED.ids[name] for name in (*families, "J1", "J2")]
        share = np.array([(ids[:, 1] == token).mean() for token in tokens])
        assert abs(share - 1 / len(tokens)).max() < 0.012


@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda: Mixture(FT, PT, 1.5), "share is 1.5; allowed: a probability, 0 to 1"),
        (lambda: Mixture(FT, PT, True), "share is True; allowed: a probability"),
        (lambda: Mixture(FT, Natural(NAMED, PRIORS["H"]), 0.5), "domain is Synonyms"),
        (lambda: Relabelled(FT, "z"), "operand is 'z'; allowed: letters of the grammar"),
        (lambda: Named(FT, "J1"), "name is 'J1'; allowed: task tokens of counting: C"),
        (lambda: Named(Natural(NAMED, PRIORS["H"]), "J1"), "allowed: one that asks C alone"),
        (lambda: with_synonyms(DOMAIN, ("J1", "J1")), "letters whose tokens differ"),
    ],
)
def test_bad_input_is_refused(bad, says):
    with pytest.raises(BadInput, match=says.replace("(", r"\(")):
        bad()


def a_run(stream, **changes):
    return replace(Run(stream, Recipe(steps=5), Shape(2, 2, 16)), **changes)


def short(data, length):
    return hashlib.sha256(json.dumps(data, sort_keys=length == 16).encode()).hexdigest()[:length]


def test_addresses_of_runs_without_new_streams_are_what_they_were():
    for scale in ("smoke", "desk"):
        for _, run in (*revival_plan(SCALES[scale]), *behavior_plan(SCALES[scale], family="I")):
            assert sources_of(run) == source_digests()
            assert address(run) == f"{short(runs.describe(run), 16)}-{short(source_digests(), 8)}"


def test_the_code_of_a_new_stream_is_part_of_its_runs_addresses(monkeypatch, tmp_path):
    plain, mixed = a_run(FT), a_run(Mixture(FT, PT, 0.5))
    later, seen = a_run(FT, start=mixed), a_run(FT, measures=(Measure("x", Mixture(FT, PT, 0.5)),))
    before = [address(run) for run in (plain, mixed, later, seen)]
    assert list(sources_of(mixed)) == [*source_digests(), "streams"] and sources_of(later) == sources_of(mixed)
    store = Store(tmp_path)
    store.put(mixed, mixed.fresh_model(), [], dict(seconds=0.0, devices=["cpu"]))
    assert store.finished(mixed) and store.meta(mixed)["sources"] == sources_of(mixed)
    digest = runs._module_digest
    monkeypatch.setattr(
        runs, "_module_digest", lambda name, kind: "changed" if "streams" in name else digest(name, kind)
    )
    after = [address(run) for run in (plain, mixed, later, seen)]
    assert [a == b for a, b in zip(before, after)] == [True, False, False, False]
    assert not store.finished(mixed) and store.why(mixed) == "source changed: streams"


MINE = """
from dataclasses import dataclass
from wrapperlib.tasks import Natural

@dataclass(frozen=True)
class Mine(Natural):
    pass

class Heir(Mine):
    pass
"""


def test_a_users_own_stream_counts_by_its_file_and_one_without_a_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "my_streams.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    import my_streams

    stream = my_streams.Heir(DOMAIN, PRIORS["H"])
    assert list(sources_of(a_run(stream))) == [*source_digests(), "my_streams"]

    @dataclass(frozen=True)
    class Nowhere(Natural):
        pass

    Nowhere.__module__ = "typed_in"
    monkeypatch.setitem(sys.modules, "typed_in", type(sys)("typed_in"))
    with pytest.raises(BadInput, match="part of a run is 'a Nowhere of typed_in'; allowed: classes from files"):
        address(a_run(Nowhere(DOMAIN, PRIORS["H"])))


def test_two_scripts_know_their_own_classes_by_one_name(tmp_path):
    "A worker process sees the class of a script as one of `__mp_main__`."

    script = tmp_path / "script.py"
    script.write_text(
        MINE
        + """
import multiprocessing
from tests.test_streams import DOMAIN, PRIORS, a_run
from wrapperlib.runs import address

if __name__ == "__main__":
    run = a_run(Mine(DOMAIN, PRIORS["H"]))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(address(run) == pool.apply(address, (run,)))
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )
    assert done.stdout.strip() == "True", done.stderr[-2000:]
