"The sampler and the recogniser against slow, independent ones."

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wrapperlib.checks import BadInput
from wrapperlib.grammar import FIG14, PAPER_GRAMMAR, Grammar, Sampler, recognise, sampler

# Fig. 14 once more, typed from the figure's own line-up, so that a slip in either copy shows
FIGURE = (
    "s → r, q; s → q, p; p → m, n, o; p → n, o, m; q → n, m, o; q → m, n; r → o, m; r → m, o, n; m → l, j; m → j, l, k;"
    "n → k, j, l; n → l, j, k; o → l, k, j; o → k, j; j → h, i; j → i, h; k → h, g, i; k → g, h, i; l → i, h, g; l → h, i, g;"
    "g → d, f, e; g → f, e, d; h → e, d, f; h → d, e, f; i → e, f, d; i → f, d, e; d → c, a; d → a, b, c; e → c, b; e → c, a, b;"
    "f → c, b, a; f → b, a"
)


def rules_of_the_figure():
    rules = [r.split("→") for r in FIGURE.split(";")]
    return [(lhs.strip(), tuple(x.strip() for x in rhs.split(","))) for lhs, rhs in rules]


def slow_string(grammar, rng):
    "One symbol after the other, as the definition has it."
    out, stack = [], [grammar.start]
    while stack:
        symbol = stack.pop()
        if symbol in grammar.terminals:
            out.append(symbol)
            continue
        rules = [r for r in grammar.rules if r.lhs == symbol]
        stack.extend(reversed(rng.choices(rules, [r.p for r in rules])[0].rhs))
    return out


def slow_recognise(grammar, text, symbols):
    "Top-down with backtracking, for short texts."
    if not symbols:
        return not text
    if len(symbols) > len(text):
        return False
    first, rest = symbols[0], symbols[1:]
    if first in grammar.terminals:
        return text[0] == first and slow_recognise(grammar, text[1:], rest)
    return any(slow_recognise(grammar, text, (*r.rhs, *rest)) for r in grammar.rules if r.lhs == first)


def spell(grammar, tokens):
    return [grammar.terminals[t] for t in tokens]


def test_fig14_is_the_figure():
    assert sorted((r.lhs, r.rhs) for r in PAPER_GRAMMAR.rules) == sorted(rules_of_the_figure())
    assert {r.p for r in PAPER_GRAMMAR.rules} == {0.5}
    assert len(FIG14.strip().splitlines()) == 16


def test_lengths_and_letters_are_those_of_the_slow_sampler():
    rng = random.Random(0)
    slow = [slow_string(PAPER_GRAMMAR, rng) for _ in range(3000)]
    tokens, lengths = sampler().strings(3000, np.random.default_rng(0))
    assert stats.ks_2samp([len(s) for s in slow], lengths).pvalue > 0.001
    fast = np.split(tokens, lengths.cumsum()[:-1])
    for triple in [(0, 1, 2), (2, 0, 1), (0, 0, 1), (1, 0, 0)]:

        def occurrences(strings, triple=triple):
            return [sum(tuple(s[i : i + 3]) == triple for i in range(len(s) - 2)) for s in strings]

        slow_count = occurrences([["abc".index(x) for x in s] for s in slow])
        assert stats.ks_2samp(slow_count, occurrences([f.tolist() for f in fast])).pvalue > 0.001


def test_rule_frequencies():
    "Every rule leaves a letter of its own, so that the strings say how often it was used."
    grammar = Grammar.parse(
        "s → x y A (0.7) | y B (0.3)\nx → C (0.2) | y D (0.8)\ny → E (0.9) | F x (0.1)", terminals="A B C D E F"
    )
    for cap in (1, 2**16):  # without and with tables
        tokens, _ = Sampler(grammar, cap).strings(40_000, np.random.default_rng(1))
        n = dict(zip(grammar.terminals, np.bincount(tokens, minlength=6)))
        for one, other, p in (("A", "B", 0.7), ("C", "D", 0.2), ("E", "F", 0.9)):
            assert stats.binomtest(int(n[one]), int(n[one] + n[other]), p).pvalue > 0.001


def test_tables_do_not_change_the_law():
    a, b = (Sampler(PAPER_GRAMMAR, cap).strings(4000, np.random.default_rng(s))[1] for cap, s in ((1, 0), (2**18, 1)))
    assert stats.ks_2samp(a, b).pvalue > 0.001


@pytest.mark.parametrize(
    "text",
    [
        "s → w s (0.9) | w (0.1)\nw → a b | a c c | b c | c",  # right recursion, in which strings grow long
        "s → a s b s (0.4) | c (0.6)",
        "s → a t | b\nt → s c (0.7) | c",  # a cycle of two symbols
    ],
)
def test_recursive_grammars_keep_their_law(text):
    grammar = Grammar.parse(text.replace("t → s c (0.7) | c", "t → s c (0.7) | c (0.3)"))
    rng = random.Random(0)
    slow = [slow_string(grammar, rng) for _ in range(2000)]
    for cap in (1, 200, 2**18):
        tokens, lengths = Sampler(grammar, cap).strings(2000, np.random.default_rng(1))
        fast = [spell(grammar, s) for s in np.split(tokens, lengths.cumsum()[:-1])]
        assert stats.ks_2samp(list(map(len, slow)), lengths).pvalue > 0.001
        for letter in "abc":
            counts = [[s.count(letter) for s in strings] for strings in (slow, fast)]
            assert stats.ks_2samp(*counts).pvalue > 0.001
        assert all(recognise(grammar, s) for s in fast[:20] if len(s) < 40)


def test_samples_are_recognised_and_broken_ones_are_not():
    tokens, lengths = sampler().strings(5, np.random.default_rng(3))
    for piece in np.split(tokens, lengths.cumsum()[:-1]):
        text = spell(PAPER_GRAMMAR, piece)
        assert recognise(PAPER_GRAMMAR, text)
        assert not recognise(PAPER_GRAMMAR, text[:-1])
        text[100] = "a" if text[100] != "a" else "b"
        assert not recognise(PAPER_GRAMMAR, text)


@settings(max_examples=150, deadline=None)
@given(st.text("abc", min_size=1, max_size=9))
def test_recogniser_against_backtracking(text):
    grammar = Grammar.parse(
        "s → t s (0.3) | t (0.7)\nt → a b | c u\nu → a | b u (0.2) | c c (0.3)".replace("u → a |", "u → a (0.5) |")
    )
    assert recognise(grammar, text) == slow_recognise(grammar, list(text), ("s",))


def test_windows():
    windows = sampler().windows(500, 250, np.random.default_rng(0))
    assert windows.shape == (500, 250) and windows.min() == 0 and windows.max() == 2
    assert not any(
        "000" in "".join(map(str, w)) for w in windows
    )  # no aaa, not even where strings are joined (they begin and end so)
    again = sampler().windows(500, 250, np.random.default_rng(0))
    assert (windows == again).all()
    single = Grammar.parse("s → a b")
    joined = Sampler(single).windows(50, 7, np.random.default_rng(0))
    assert {"".join(map(str, w)) for w in joined} == {"0101010", "1010101"}


def test_text_and_start_are_checked():
    with pytest.raises(BadInput, match="text is 'd'"):
        recognise(PAPER_GRAMMAR, "abd")
    with pytest.raises(BadInput, match="start symbol"):
        Grammar.parse("s → a", start="x")


@pytest.mark.parametrize(
    "text, says",
    [
        ("s → a x", r"rule is s → a x .*'x' has no rule"),
        ("s → a |", r"rule is s → .*not empty"),
        ("s → a (0.5) | b (0.4)", r"probabilities of s summing to 1, not 0.9"),
        ("s → a (1.5) | b (-0.5)", r"probability above 0"),
        ("s → a (nan) | b (0.5)", r"probability above 0"),
        ("s → a (half) | b (0.5)", r"a number in brackets"),
        ("s → t\nt → s", r"cycle that never reaches"),
        ("s → a | t\nt → t b", r"rule is t → t b .*cycle that never reaches"),
        ("s → s s (0.6) | a (0.4)", r"rule is s → s s .*outgrows"),
        ("x → s s s s\ns → s s (0.6) | a (0.4)", r"rule is s → s s .*outgrows"),
        ("s → a (0.4) | s s (0.6)", r"rule is s → s s .*outgrows"),
        ("a → b", r"left-hand sides that are not terminals"),
        ("s a b", r"'lhs → symbols"),
        ("s t → a", r"'lhs → symbols"),
        ("", r"at least one rule"),
    ],
)
def test_malformed_grammars_are_refused_by_name(text, says):
    with pytest.raises(BadInput, match=says):
        Grammar.parse(text)
