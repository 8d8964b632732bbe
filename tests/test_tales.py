"Tales: what is told is what is found, also where a text is garbled; no bag of words gives a twist away."

import random
from collections import Counter

import pytest

from wrapperlib.checks import BadInput
from wrapperlib.stories import FEATURES, parse
from wrapperlib.tales import (
    CHANCE,
    THEMES,
    _exchanged,
    _found,
    _poles,
    _words,
    bag_of_words,
    detect,
    has_twist,
    source_tales,
    tell,
)


@pytest.fixture(scope="module")
def told():
    return [tell(random.Random(f"test {i}")) for i in range(4000)]


def test_what_is_told_is_found(told):
    for record in told:
        assert set(detect(record.story)) == set(record.features), record.story
    for f in FEATURES:
        assert abs(sum(f in r.features for r in told) / len(told) - CHANCE[f]) < 0.03


def test_tales_vary_and_have_the_format_of_the_real_ones(told):
    assert len({r.story for r in told}) == len(told)
    assert len({word for r in told for word in r.story.split()}) > 250
    for record in told[:300]:
        assert parse(record.text.replace("Story: ", "Story:\n").splitlines()) == record
        assert all(word in record.story for word in record.words) and record.sentence in record.story
    assert any(not r.features for r in told) and any(not r.words for r in told) and any(not r.summary for r in told)


def test_no_line_of_the_instruction_tells_how_it_turns_out(told):
    for record in told:
        line = f"{record.sentence} {record.summary}"
        assert not any(_poles(line, "outcome", theme) for theme in THEMES)
        assert not any(_found(line, kind) for kind in ("good", "bad", "event", "moral"))


def test_the_same_words_make_a_story_with_and_without_a_twist(told):
    "So that nothing which reads a bag of words can do better than chance."
    for record in told[:500]:
        turned = _exchanged(record.story)
        assert Counter(_words(turned)) == Counter(_words(record.story))
        assert has_twist(turned) != has_twist(record.story)
        assert set(detect(turned)) ^ set(record.features) == {"Twist"}


def test_a_bag_of_words_sees_all_but_the_twist(told):
    assert bag_of_words(told[:3000], told[3000:], "Twist") < 0.6
    assert bag_of_words(told[:3000], told[3000:], "Conflict") > 0.95
    with pytest.raises(BadInput, match="feature is 'twist'"):
        bag_of_words(told, told, "twist")


SAID = "There lived a kind fox. People told of a cruel owl. "


@pytest.mark.parametrize(
    "text, twist",
    [
        (SAID + "The kind fox tricked Ann Hill.", True),
        (SAID + "The kind fox helped Ann Hill.", False),
        (SAID + "The cruel owl helped Ann Hill.", True),
        (SAID + "The cruel owl tricked Ann Hill.", False),
        (SAID + "The kind owl tricked Ann Hill.", False),  # it was set up as cruel, and that counts
        (SAID + "The cruel fox tricked Ann Hill.", False),  # it was kind, and is called otherwise: a slip
        (SAID + "The cruel fox helped Ann Hill.", False),
        ("The kind fox tricked Ann Hill. " + SAID, False),  # nothing had been said yet
        (SAID + "The kind bear tricked Ann Hill.", False),  # nothing was said of the bear
        (SAID + "There lived a mean fox. The kind fox tricked Ann Hill.", False),  # both were said
        (SAID + "The kind fox tricked the owl.", False),  # garbled
        (SAID + "Thekind fox tricked Ann Hill. The kind foxes tricked Ann Hill.", False),
        ("There lived a kind bridge. The kind bridge broke in two.", False),
        ("", False),
    ],
)
def test_a_twist_is_a_reversal_of_what_was_said(text, twist):
    assert has_twist(text) == twist


@pytest.mark.parametrize(
    "text, features",
    [
        ("Ann Hill saw a star and wondered. Then the star showed the way.", ("Foreshadowing",)),
        ("Then the star showed the way. Ann Hill saw a star and wondered.", ()),
        ("Ann Hill saw a star and wondered. Then the thorn showed the way.", ()),
        ('"I am afraid." said Ann Hill. "I will try." said Mia Stone.', ("Dialogue",)),
        ('"I am afraid." said Ann Hill. "I will try." said Ann Hill.', ()),
        ("Ann Hill wished for a hat. Ann Hill never got the hat.", ("BadEnding",)),
        ("Ann Hill wished for a hat. Ann Hill never got the bell.", ()),
        ("Ann Hill learned that friends are gold.", ("MoralValue",)),
        ("Mia Stone shouted at Ann Hill.", ("Conflict",)),
    ],
)
def test_the_other_features(text, features):
    assert detect(text) == features


def test_a_source_is_a_function_of_its_seed():
    source, name = source_tales(20, 1)
    counts = Counter()
    first = list(source(counts))
    assert counts == {"records": 20} and first == list(source(Counter())) and name == "tales, 20 of seed 1"
    assert first != list(source_tales(20, 2)[0](Counter()))
    with pytest.raises(BadInput, match="n is 0"):
        source_tales(0, 1)
