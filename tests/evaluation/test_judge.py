"""Pairwise judgement: which outcome two verdicts make, and the percentages and intervals of many."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.errors import LoricaError
from lorica.evaluation import judge as judging
from lorica.evaluation.function_judge import local_judge
from lorica.evaluation.judge import CHOICES, OUTCOMES, Judgement, Verdict, compare, describe, summary


def fixed(before_first: Verdict, after_first: Verdict) -> judging.Judge:
    """A judge of the answers "old" and "new" that says the one or the other by their order."""
    return lambda prompt, first, second: before_first if first == "old" else after_first


def outcome(one: Verdict, other: Verdict) -> tuple[str, str]:
    [judgement] = compare(["p"], ["old"], ["new"], fixed(one, other))
    assert (judgement.before_first, judgement.after_first) == (one, other)
    return judgement.outcome, judgement.reason


@pytest.mark.parametrize(
    ("before_first", "after_first", "expected"),
    [
        ("second", "first", ("win", "")),
        ("first", "second", ("lose", "")),
        ("first", "first", ("tie", judging.FIRST_PLACE)),
        ("second", "second", ("tie", judging.SECOND_PLACE)),
        ("tie", "tie", ("tie", judging.BOTH_TIE)),
        ("tie", "first", ("tie", judging.ONE_TIE)),
        ("tie", "second", ("tie", judging.ONE_TIE)),
        ("first", "tie", ("tie", judging.ONE_TIE)),
        ("second", "tie", ("tie", judging.ONE_TIE)),
    ],
)
def test_only_agreement_decides(
    before_first: judging.Choice, after_first: judging.Choice, expected: tuple[str, str]
) -> None:
    assert outcome(Verdict(before_first), Verdict(after_first)) == expected


@pytest.mark.parametrize("choice", CHOICES)
def test_an_unusable_verdict_is_a_tie_whatever_the_other_says(choice: judging.Choice) -> None:
    broken = Verdict("tie", raw="?", usable=False)
    assert outcome(broken, Verdict(choice)) == ("tie", judging.UNUSABLE)
    assert outcome(Verdict(choice), broken) == ("tie", judging.UNUSABLE)


def test_a_judge_sees_both_orders_and_is_not_asked_about_identical_answers() -> None:
    asked: list[tuple[str, str, str]] = []

    def longest(prompt: str, first: str, second: str) -> Verdict:
        asked.append((prompt, first, second))
        return Verdict("first" if len(first) > len(second) else "second")

    kept: list[Judgement] = []
    told: list[tuple[str, int, int]] = []
    found = compare(
        ["p", "q"], ["aa", "same "], ["bbb", "same"], longest, lambda *words: told.append(words), keep=kept.append
    )
    assert asked == [("p", "aa", "bbb"), ("p", "bbb", "aa")]
    assert [(one.outcome, one.reason) for one in found] == [("win", ""), ("tie", judging.IDENTICAL)]
    assert found[1].before_first is None
    assert found[1].after_first is None
    assert kept == found
    assert told == [("judgements", 1, 2), ("judgements", 2, 2)]


def test_what_was_judged_before_a_failure_was_kept() -> None:
    def fails_on_q(prompt: str, first: str, second: str) -> Verdict:
        if prompt == "q":
            raise LoricaError("no more")
        return Verdict("tie")

    kept: list[Judgement] = []
    with pytest.raises(LoricaError, match="no more"):
        compare(["p", "q"], ["a", "a"], ["b", "b"], fails_on_q, keep=kept.append)
    assert [one.prompt for one in kept] == ["p"]


def test_answers_that_do_not_pair_up_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"len\(before\)=1"):
        compare(["p", "q"], ["a"], ["b", "c"], fixed(Verdict("tie"), Verdict("tie")))


def judged(outcomes: list[str], reason: str = judging.BOTH_TIE) -> list[Judgement]:
    made = [(name, reason if name == "tie" else "") for name in outcomes]
    return [Judgement("p", "a", "b", None, None, name, why) for name, why in made]  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=60))
def test_percentages_are_counts_and_lie_within_their_intervals(outcomes: list[str]) -> None:
    found = summary(judged(outcomes), resamples=200)
    counts = Counter(outcomes)
    for name in OUTCOMES:
        assert found[name]["percent"] == pytest.approx(100 * counts[name] / len(outcomes))
        assert 0 <= found[name]["low"] <= found[name]["percent"] + 1e-9 <= found[name]["high"] + 2e-9 <= 100 + 3e-9
    assert found["prompts"] == len(outcomes)
    assert sum(found["ties"].values()) == counts["tie"]


def binomial_quantile(n: int, p: float, level: float) -> int:
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= level:
            return k
    return n


def test_the_interval_is_that_of_resampled_prompts() -> None:
    """The number of wins among n prompts drawn with replacement is binomial, whose quantiles are exact."""
    n, wins = 175, 42
    found = summary(judged(["win"] * wins + ["lose"] * (n - wins)), resamples=20_000)["win"]
    for end, level in (("low", 0.025), ("high", 0.975)):
        exact = 100 * binomial_quantile(n, wins / n, level) / n
        assert found[end] == pytest.approx(exact, abs=100 / n + 1e-9)  # a prompt more or less


def test_ties_are_counted_by_reason_and_numpys_own_generator_is_left_alone() -> None:
    np.random.seed(3)
    state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    rows = judged(["tie", "win"], judging.IDENTICAL) + judged(["tie", "tie"], judging.FIRST_PLACE)
    found = summary(rows)
    assert found["ties"] == {judging.FIRST_PLACE: 2, judging.IDENTICAL: 1}
    assert found == summary(rows)
    assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no judgement"):
        summary([])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(
        "calls = []\n"
        "def longer(prompt, first, second): return 'first' if len(first) > len(second) else 'second'\n"
        "def length(prompt, answer):\n    calls.append(answer)\n    return len(answer)\n"
        "def seen(prompt, answer): return len(calls)\n"
        "def many(a, b, c, d): return 'tie'\n"
        "def optional(prompt, answer, *, scale=2.0): return scale * len(answer)\n"
        "def vague(prompt, first, second): return 'A'\n"
        "def nothing(prompt, answer): return None\n"
        "def not_a_number(prompt, answer): return float('nan')\n"
        "def fails(prompt, answer): raise KeyError('lost')\n"
        "value = 3\n"
    )
    return path


def test_a_function_of_three_parameters_gives_the_verdict(file: Path) -> None:
    judge = local_judge(f"{file}:longer")
    assert judge("p", "aa", "b").choice == "first"
    assert judge("p", "a", "bb").choice == "second"
    assert describe(judge) == {"name": f"{file}:longer", "compares": "answers"}


def test_a_function_of_two_parameters_scores_each_answer_once(file: Path) -> None:
    judge = local_judge(f"{file}:length", tolerance=1)
    found = compare(["p", "p"], ["a", "aaaa"], ["bb", "b"], judge)
    assert [(one.outcome, one.reason) for one in found] == [("tie", judging.BOTH_TIE), ("lose", "")]
    assert found[1].before_first == Verdict("first", raw="4.0 1.0")
    assert found[1].after_first == Verdict("second", raw="1.0 4.0")
    assert local_judge(f"{file}:optional")("p", "aa", "a").raw == "4.0 2.0"
    calls = judge._function.__wrapped__.__globals__["calls"]  # type: ignore[attr-defined]
    assert calls == ["a", "bb", "aaaa", "b"]


def test_a_function_of_an_installed_module_is_found() -> None:
    assert local_judge("operator:countOf").scores  # any function of two parameters


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_colon", {}, "name a function as"),
        ("no.such.module:f", {}, "cannot import no.such.module: ModuleNotFoundError"),
        ("{file}:absent", {}, "has no function 'absent'"),
        ("{file}:value", {}, "has no function 'value'"),
        ("{file}:many", {}, r"takes \(a, b, c, d\)"),
        ("{file}:longer", {"tolerance": 0.5}, "leave it out"),
        ("{file}:length", {"tolerance": -1.0}, "give 0 or more"),
        ("{file}x.py:f", {}, "cannot import .*FileNotFoundError"),
    ],
)
def test_what_is_no_judge_is_refused(file: Path, name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        local_judge(name.format(file=file), **options)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("vague", "the verdict is 'A'; return 'first', 'second' or 'tie'"),
        ("nothing", "score of an answer is None; return a number"),
        ("not_a_number", "score of an answer is nan"),
        ("fails", "KeyError: 'lost'"),
    ],
)
def test_what_a_judge_may_not_return_is_named(file: Path, function: str, message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        local_judge(f"{file}:{function}")("p", "a", "b")


def test_a_judge_without_a_description_is_named_by_its_function() -> None:
    assert describe(fixed) == {"name": f"{__name__}:fixed"}  # type: ignore[arg-type]
