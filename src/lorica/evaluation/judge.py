"""Pairwise judgement: is a model's answer after training better than the one before it? (numpy only)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lorica.bootstrap import interval

Choice = Literal["first", "second", "tie"]
Outcome = Literal["win", "tie", "lose"]
Progress = Callable[[str, int, int], None]
CHOICES: tuple[Choice, ...] = get_args(Choice)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

IDENTICAL = "identical answers, not judged"
BOTH_TIE = "a tie in both orders"
ONE_TIE = "a tie in one order, a preference in the other"
FIRST_PLACE = "the judge preferred whichever came first"
SECOND_PLACE = "the judge preferred whichever came second"
UNUSABLE = "the judge gave no usable answer"


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two answers shown in one order.

    Attributes:
        choice: the better answer by its place, or a tie.
        reason: the judge's own, if it gave one.
        raw: all that the judge wrote, word for word, kept for publication; None where it writes nothing.
        usable: False where no choice could be read from what it wrote; ``choice`` is then a tie.
    """

    choice: Choice
    reason: str = ""
    raw: str | None = None
    usable: bool = True


Judge = Callable[[str, str, str], Verdict]
"""Called with a prompt, the first answer and the second. May carry a ``description`` for the record."""


@dataclass(frozen=True)
class Judgement:
    """One prompt judged. ``outcome`` is that of the model after training.

    ``before_first`` and ``after_first`` are the verdicts in the two orders, None where the judge was not asked;
    ``reason`` explains a tie, and is empty for a win and a loss.
    """

    prompt: str
    before: str
    after: str
    before_first: Verdict | None
    after_first: Verdict | None
    outcome: Outcome
    reason: str = ""


def compare(
    prompts: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    judge: Judge,
    progress: Progress | None = None,
    *,
    keep: Callable[[Judgement], None] | None = None,
) -> list[Judgement]:
    """Judge each pair of answers in both presentation orders.

    Only a judge that prefers the same answer in both orders decides; everything else is a tie, with its reason.
    Answers that are equal but for blanks at their ends are a tie without asking.

    Args:
        prompts, before, after: one prompt, and the answers of the model before and after training, per position.
        progress: told of every prompt.
        keep: given each judgement as it is made, so that those already paid for survive a failure of the judge.

    Raises:
        ValueError: the three have different lengths.
    """
    if not len(prompts) == len(before) == len(after):
        raise ValueError(f"one answer of each model per prompt: {len(prompts)=} {len(before)=} {len(after)=}")
    judgements = []
    for prompt, old, new in zip(prompts, before, after, strict=True):
        judgements.append(_judged(prompt, old, new, judge))
        if keep is not None:
            keep(judgements[-1])
        if progress is not None:
            progress("judgements", len(judgements), len(prompts))
    return judgements


def _judged(prompt: str, before: str, after: str, judge: Judge) -> Judgement:
    if before.strip() == after.strip():
        return Judgement(prompt, before, after, None, None, "tie", IDENTICAL)
    before_first, after_first = judge(prompt, before, after), judge(prompt, after, before)
    outcome, reason = _decided(before_first, after_first)
    return Judgement(prompt, before, after, before_first, after_first, outcome, reason)


def _decided(before_first: Verdict, after_first: Verdict) -> tuple[Outcome, str]:
    if not (before_first.usable and after_first.usable):
        return "tie", UNUSABLE
    match before_first.choice, after_first.choice:
        case "second", "first":
            return "win", ""
        case "first", "second":
            return "lose", ""
        case "first", "first":
            return "tie", FIRST_PLACE
        case "second", "second":
            return "tie", SECOND_PLACE
        case "tie", "tie":
            return "tie", BOTH_TIE
    return "tie", ONE_TIE


def summary(
    judgements: Sequence[Judgement], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Return the percentages of wins, ties and losses, with bootstrap intervals over prompts, and why there were ties.

    Args:
        judgements: at least one.
        level: probability between the ends of each interval by itself.
        resamples: bootstrap draws; see ``lorica.bootstrap.interval``.
        seed: of the draws; numpy's global generator is left alone.

    Returns:
        ``win``, ``tie``, ``lose``: each ``{"percent", "low", "high"}``. ``ties``: how many have each reason.
        ``prompts``, ``level``, ``resamples``, ``seed``: as counted and as given.

    Raises:
        ValueError: there is no judgement.
    """
    if not judgements:
        raise ValueError("no judgement to sum up")
    figures: dict[str, Any] = {}
    for name in OUTCOMES:
        rows = {"prompts": [100.0 * (judgement.outcome == name) for judgement in judgements]}
        found = interval(rows, resamples, level, seed)
        figures[name] = {"percent": found.mean, "low": found.low, "high": found.high}
    reasons = Counter(judgement.reason for judgement in judgements if judgement.outcome == "tie")
    settings = {"prompts": len(judgements), "level": level, "resamples": resamples, "seed": seed}
    return {**figures, "ties": dict(reasons.most_common()), **settings}


def describe(judge: Judge) -> dict[str, Any]:
    """Return what is published of a judge: its own ``description``, else the name of the function."""
    kind: Any = judge if hasattr(judge, "__qualname__") else type(judge)
    found: dict[str, Any] = getattr(judge, "description", {"name": f"{kind.__module__}:{kind.__qualname__}"})
    return found
