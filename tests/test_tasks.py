"Answers against an independent slow reference, and what edited strings promise."

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wrapperlib.checks import BadInput
from wrapperlib.grammar import Grammar
from wrapperlib.tasks import (
    FAMILIES,
    PRIORS,
    PROMPT,
    TAIL,
    Curriculum,
    Domain,
    Edited,
    Natural,
    answers,
    decode,
    label_law,
    one_task,
    recount,
    reindex,
    rows,
)


def slow_answer(row: str) -> str:
    "The answer from the row as a person reads it, by the rules in the notebook and with nothing of the library."
    words = row.split()
    family, operand, number = words[1], words[2], int(words[3])
    text = "".join(words[words.index("SOT") + 1 : words.index("EOT")])
    found = [i for i in range(len(text)) if text.startswith(operand, i)]
    if family in ("C", "CC"):
        return str(sum(i >= len(text) - number for i in found))
    if family in ("I", "IC"):
        return str(len(text) - found[-number]) if len(found) >= number else "NULL"
    return text[len(text) - number]


GOLDEN = [
    "SOS C a 4 SOT a b a c c a EOT ART 2 EOS",
    "SOS C b 4 SOT a b a c c a EOT ART 0 EOS",
    "SOS C c 4 SOT a b a c c a EOT ART 2 EOS",
    "SOS CC cc 4 SOT a b a c c a EOT ART 1 EOS",
    "SOS CC aa 4 SOT b c a a a a EOT ART 3 EOS",
    "SOS CC aa 4 SOT c a a b b c EOT ART 0 EOS",
    "SOS I a 2 SOT a b a c c a EOT ART 4 EOS",
    "SOS I b 2 SOT a b a c c a EOT ART NULL EOS",
    "SOS I c 2 SOT a b a c c c EOT ART 2 EOS",
    "SOS IC aa 2 SOT b a a a c c EOT ART 5 EOS",
    "SOS IC cc 2 SOT b a a a c c EOT ART NULL EOS",
    "SOS T NULL 4 SOT a b a c c a EOT ART a EOS",
    "SOS T NULL 4 SOT a b c c c a EOT ART c EOS",
]


@pytest.mark.parametrize("row", GOLDEN)
def test_golden_rows(row):
    small = Domain(length=6, window=4, nth=2)
    words = row.split()
    text = np.array([["abc".index(x) for x in words[PROMPT:-TAIL]]])
    operand = 0 if words[2] == "NULL" else "abc".index(words[2][0])
    ids = rows(small, text, np.array([FAMILIES.index(words[1])]), np.array([operand]))
    assert decode(small, ids[0]) == row
    assert slow_answer(row) == words[-2]


@pytest.mark.parametrize("numbers", [dict(), dict(length=24, window=16, nth=2), dict(length=9, window=9, nth=1)])
def test_answers_against_the_slow_reference(numbers):
    domain = Domain(**numbers)
    for row in Natural(domain, PRIORS["H"]).batch(400, seed=1, step=0):
        words = decode(domain, row)
        assert words.split()[-2] == slow_answer(words)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=8, max_size=8),
    st.sampled_from(range(5)),
    st.integers(0, 2),
    st.integers(2, 8),
    st.integers(1, 8),
)
def test_answers_on_any_text(text, family, operand, window, nth):
    domain = Domain(length=8, window=window, nth=nth)
    ids = rows(domain, np.array([text]), np.array([family]), np.array([operand]))
    words = decode(domain, ids[0])
    assert words.split()[-2] == slow_answer(words)
    assert answers(domain, np.array([text]), np.array([family]), np.array([operand])) == ids[0, -2]


def test_families_are_uniform_and_operands_follow_the_prior(domain):
    batch = np.concatenate([Natural(domain, PRIORS["H"]).batch(500, 0, s) for s in range(20)])
    family = np.bincount(batch[:, 1] - domain.ids["C"], minlength=5) / len(batch)
    assert abs(family - 0.2).max() < 0.02
    count = batch[batch[:, 1] == domain.ids["C"]]
    operand = np.bincount(count[:, 2] - domain.ids["a"], minlength=3) / len(count)
    assert abs(operand - PRIORS["H"]).max() < 0.04


@pytest.mark.parametrize(
    "make",
    [
        lambda d: Natural(d, PRIORS["M"]),
        lambda d: Edited(d, "b", 0.5),
        lambda d: Edited(d, "b", 0.5, family="I"),
    ],
)
def test_batches_are_a_function_of_seed_and_step(domain, make):
    batch = make(domain).batch(16, seed=3, step=7)
    assert (make(domain).batch(16, seed=3, step=7) == batch).all()
    for other in (
        dict(seed=4, step=7),
        dict(seed=3, step=8),
        dict(seed=(3, 1), step=7),
        dict(seed=3, step=7, split="test"),
    ):
        assert (make(domain).batch(16, **other) != batch).any()


@pytest.mark.parametrize("numbers", [dict(), dict(length=24, window=16, nth=2), dict(length=26, window=22, nth=2)])
class TestEdited:
    def counts(self, numbers, c, n=4000):
        domain = Domain(**numbers)
        text = Edited(domain, "b", c).text(n, np.random.default_rng(0))[:, -domain.window :]
        return domain, (text == 0).sum(1), (text == 1).sum(1)

    def test_the_correlation_holds_or_never_does(self, numbers):
        for c, share in ((1.0, 1.0), (0.0, 0.0)):
            _, a, b = self.counts(numbers, c)
            assert (b == a + 1).mean() == share
        _, a, b = self.counts(numbers, 0.5)
        assert 0.46 < (b == a + 1).mean() < 0.54

    def test_labels_are_alike_for_both(self, numbers):
        histograms = [self.counts(numbers, c, 20_000)[1:] for c in (0.0, 1.0)]
        for without, with_it in zip(*histograms):
            size = max(without.max(), with_it.max()) + 1
            gap = abs(np.bincount(without, minlength=size) - np.bincount(with_it, minlength=size)) / 20_000
            assert gap.max() < 0.02

    def test_labels_are_inside_what_pretraining_shows(self, numbers):
        domain, a, b = self.counts(numbers, 0.5)
        natural = Natural(domain, PRIORS["H"], ("C",)).batch(20_000, 0, 0)[:, PROMPT:-TAIL][:, -domain.window :]
        for letter, edited in ((0, a), (1, b)):
            share = np.bincount((natural == domain.ids["a"] + letter).sum(1), minlength=domain.window + 1) / 20_000
            assert share[np.unique(edited)].min() > 0.003

    def test_text_before_the_window_is_natural(self, numbers):
        domain = Domain(**numbers)
        before = Edited(domain, "a", 1.0).text(300, np.random.default_rng(5))[:, : -domain.window]
        assert not any("000" in "".join(map(str, row)) for row in before)


SCALES = [dict(), dict(length=26, window=22, nth=2), dict(length=20, window=19, nth=2)]


def slow_index(text, letter, nth):
    "Where the nth letter from the end stands, counted one by one."
    for index, x in enumerate(reversed(list(text)), 1):
        nth -= x == letter
        if nth == 0:
            return index


@pytest.mark.parametrize("numbers", SCALES)
class TestEditedIndex:
    def indices(self, numbers, c, n=2000):
        domain = Domain(**numbers)
        text = Edited(domain, "b", c, family="I").text(n, np.random.default_rng(0))
        return domain, *(np.array([slow_index(row, x, domain.nth) for row in text]) for x in (0, 1))

    def test_the_correlation_holds_or_never_does(self, numbers):
        for c, share in ((1.0, 1.0), (0.0, 0.0)):
            _, a, b = self.indices(numbers, c)
            assert (b == a + 1).mean() == share
        _, a, b = self.indices(numbers, 0.5)
        assert 0.46 < (b == a + 1).mean() < 0.54

    def test_answers_are_those_of_the_slow_reference(self, numbers):
        domain = Domain(**numbers)
        for operand in "ab":
            for row in Edited(domain, operand, 0.5, family="I").batch(200, seed=1, step=0):
                words = decode(domain, row).split()
                assert words[1:4] == ["I", operand, str(domain.nth)] and words[-2] == slow_answer(" ".join(words))

    def test_labels_are_alike_for_both_and_had_by_natural_strings(self, numbers):
        domain = Domain(**numbers)
        for letter in "ab":
            histograms = [
                np.bincount(stream.batch(20_000, 0, 0)[:, -2] - domain.ids["0"], minlength=domain.length) / 20_000
                for stream in (Edited(domain, letter, c, family="I") for c in (0.0, 1.0))
            ]
            assert abs(histograms[0] - histograms[1]).max() < 0.02
            natural = one_task(domain, "I", letter).batch(20_000, 0, 0)[:, -2] - domain.ids["0"]
            for label in np.flatnonzero(histograms[1]):
                assert (natural == label).mean() > 0.003


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.lists(st.integers(0, 2), min_size=14, max_size=14), min_size=1, max_size=4),
    st.data(),
)
def test_reindex_puts_the_nth_letter_where_asked_and_changes_nothing_before(nth, text, data):
    places = st.lists(st.integers(2 * nth - 1, 14), min_size=2, max_size=2, unique=True)
    a, b = np.array([data.draw(places) for _ in text]).T
    new = reindex(np.array(text), {0: a, 1: b}, nth, 2, np.random.default_rng(0))
    for old, row, i, j in zip(text, new, a, b):
        assert (slow_index(row, 0, nth), slow_index(row, 1, nth)) == (i, j)
        assert list(row[: 14 - max(i, j)]) == old[: 14 - max(i, j)]


def test_reindex_leaves_alone_what_already_fits():
    text = np.array([["abc".index(x) for x in "cabcbaccba"]])
    assert (reindex(text, {0: np.array([5]), 1: np.array([6])}, 2, 2, np.random.default_rng(0)) == text).all()


@pytest.mark.parametrize(
    "a, b, says", [(2, 5, "index is 2.*3 to 6"), (4, 7, "index is 7.*3 to 6"), (4, 4, "indices is .*two places")]
)
def test_reindex_refuses_what_has_no_room(a, b, says):
    with pytest.raises(BadInput, match=says):
        reindex(np.zeros((1, 6), int), {0: np.array([a]), 1: np.array([b])}, 2, 2, np.random.default_rng(0))


def test_recount_moves_only_what_it_must():
    rng = np.random.default_rng(0)
    window = rng.integers(0, 3, (200, 12))
    wanted = {0: rng.integers(0, 6, 200), 1: rng.integers(0, 7, 200)}
    new = recount(window, wanted, 2, rng)
    for letter, counts in wanted.items():
        assert ((new == letter).sum(1) == counts).all()
    surplus = {letter: np.maximum((window == letter).sum(1) - counts, 0) for letter, counts in wanted.items()}
    for letter, gone in surplus.items():  # no letter leaves its place but a surplus one
        assert (((window == letter) & (new != letter)).sum(1) == gone).all()
    with pytest.raises(BadInput, match="counts is 8"):
        recount(np.zeros((1, 6), int), {0: np.array([4]), 1: np.array([4])}, 2, rng)


@pytest.mark.parametrize("family, ruled_out", [("C", 1), ("I", 2)])
@pytest.mark.parametrize("numbers", [dict(), dict(length=26, window=22, nth=2)])
def test_law_without_correlation_keeps_both_margins_and_no_other_shortcut(numbers, family, ruled_out):
    law, joint = label_law(Domain(**numbers), family=family)
    labels = (law > 0).sum()
    assert np.allclose(joint.sum(1), law) and np.allclose(joint.sum(0), law)
    assert joint.diagonal().sum() == 0 and labels >= 3
    if family == "I":  # label(oft) = label(opt) would be two letters in one place
        assert joint.diagonal(-1).sum() == 0
    best_guess_knowing_the_other = (joint / np.maximum(law, 1e-9)[:, None]).max()
    assert best_guess_knowing_the_other == pytest.approx(1 / (labels - ruled_out))


def test_one_and_one_point_zero_are_the_same_data(domain):
    assert Edited(domain, "b", 1) == Edited(domain, "b", 1.0) and repr(Edited(domain, "b", 1).c) == "1.0"
    assert repr(Natural(domain, (1, 0, 0)).prior) == repr(Natural(domain, (1.0, 0.0, 0.0)).prior)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda d: Natural(d, (0.5, 0.5)), "prior"),
        (lambda d: Natural(d, (0.6, 0.3, 0.3)), "prior .*sum to 1"),
        (lambda d: Natural(d, (1.2, -0.2, 0.0)), "prior"),
        (lambda d: Natural(d, PRIORS["H"], ()), "families"),
        (lambda d: Natural(d, PRIORS["H"], ("X",)), "families"),
        (lambda d: one_task(d, "C", "z"), "operand is 'z'"),
        (lambda d: Edited(d, "b", -0.1), "c is -0.1"),
        (lambda d: Edited(d, "b", 1.0, "b", "b"), "oft"),
        (lambda d: Edited(Domain(length=30, window=3), "b", 1.0), "window is 3"),
        (lambda d: Edited(d, "b", 1.0, family="CC"), "family is 'CC'"),
        (lambda d: Edited(Domain(length=24, window=20, nth=12), "b", 1.0, family="I"), "nth is 12.*at least 4 values"),
        (lambda d: Domain(length=10, window=11), "window is 11"),
        (lambda d: Domain(nth=0), "nth is 0"),
        (lambda d: Domain(length=20.0, window=10), "length is 20.0"),
        (
            lambda d: Domain(Grammar.parse("s → A B C", "A B C"), 20, 10, 2),
            "terminals is 'A B C'.*would mean two things",
        ),
        (lambda d: Domain(Grammar.parse("s → a aa b", "a aa b"), 20, 10, 2), "terminals is 'a aa b'"),
        (lambda d: decode(d, [0, 999]), "ids"),
    ],
)
def test_bad_input_is_named(domain, make, says):
    with pytest.raises(BadInput, match=says):
        make(domain)


def test_a_curriculum_is_one_stream_and_then_the_other(domain):
    counting, all_ = Natural(domain, PRIORS["H"], ("C",)), Natural(domain, PRIORS["H"])
    lessons = Curriculum(counting, 3, all_)
    for step in range(6):
        expected = (counting if step < 3 else all_).batch(8, 5, step)
        assert (lessons.batch(8, 5, step) == expected).all()
    assert lessons.domain == domain
    with pytest.raises(BadInput, match="until is 0"):
        Curriculum(counting, 0, all_)
    with pytest.raises(BadInput, match="domain is"):
        Curriculum(counting, 3, Natural(replace(domain, nth=3), PRIORS["H"]))
