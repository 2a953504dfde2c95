"""Scores of one answer, in percent from 0 to 100, and what labels alone tell of a test set."""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

from lorica.errors import LoricaError
from lorica.evaluation.sari import f1
from lorica.evaluation.sari import sari as sari_of
from lorica.registry import Registry


@dataclass(frozen=True)
class Answer:
    """What a model wrote, what it should have written, and for simplification (`sari`) the text it started from."""

    prediction: str
    reference: str
    source: str = ""


Metric = Callable[[Answer], float]
METRICS: Registry[Metric] = Registry("metric")

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)")


def checked(name: str) -> Metric:
    """Return a metric by name after a trial, so that a missing library shows before hours of generation.

    Raises:
        LoricaError: the name is unknown, or the metric's library is not installed.
    """
    METRICS[name](Answer("1", "1", "1"))
    return METRICS[name]


def normalise_answer(text: str) -> str:
    """Return a text lower-case, without ASCII punctuation, with single blanks between words."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


@METRICS.register("exact_match")
def exact_match(answer: Answer) -> float:
    """Equal after `normalise_answer`. Source: O-LoRA, src/compute_metrics.py.

    A reference of which that leaves nothing ("+", "?") has to be met as it is written, blanks at both ends aside;
    else every answer of punctuation would be right. Signs and decimal points are punctuation too: "-4" equals "4".
    """
    reference = normalise_answer(answer.reference)
    return _percent(normalise_answer(answer.prediction) == reference) if reference else stripped_string(answer)


@METRICS.register("exact_string")
def exact_string(answer: Answer) -> float:
    """Equal, character for character: " A" and "A." are not "A". Source: TRACE, metrics.py."""
    return _percent(answer.prediction == answer.reference)


@METRICS.register("stripped_string")
def stripped_string(answer: Answer) -> float:
    """Equal, blanks at both ends aside; to be reported beside `exact_string`."""
    return _percent(answer.prediction.strip() == answer.reference.strip())


@METRICS.register("first_line")
def first_line(answer: Answer) -> float:
    """The first line that is not blank equals the reference, a full stop at its end and blanks around it aside.

    Signs, brackets and case count: BIG-Bench Hard asks for "-4", "(A)" and "] )". Source: Suzgun et al. 2022.
    """
    line = answer.prediction.strip().partition("\n")[0]
    return _percent(line.strip().removesuffix(".").rstrip() == answer.reference.strip())


@METRICS.register("first_letter")
def first_letter(answer: Answer) -> float:
    """The first characters are equal; no text has none and is wrong. Source: TRACE, ScienceQA."""
    return _percent(answer.prediction != "" and answer.prediction[:1] == answer.reference[:1])


@METRICS.register("rouge_l")
def rouge_l(answer: Answer) -> float:
    """F measure of the longest common subsequence of tokens.

        F = 2 p r / (p + r),  p = LCS / tokens of the prediction,  r = LCS / tokens of the reference

    Tokens are those of rouge-score: lower-case runs of a-z and 0-9, not stemmed; any other letter separates, so a
    text in another script has no token and scores 0. TRACE uses another library (rouge), which splits at blanks.

    Source: Lin 2004, ROUGE.
    """
    return 100 * float(_rouge().score(answer.reference, answer.prediction)["rougeL"].fmeasure)


@METRICS.register("edit_similarity")
def edit_similarity(answer: Answer) -> float:
    """Similarity of two pieces of code after clean-up of their literals; 0 where either is empty.

        100 (1 - d / (len(prediction) + len(reference))),  d: insertions and deletions from one to the other

    Clean-up: <NUM_LIT> becomes 0, <STR_LIT> and <CHAR_LIT> vanish, and of <STR_LIT:x> x is left. Not rounded to whole
    percents, as fuzzywuzzy's ratio is. Source: TRACE, Py150; CodeXGLUE, line-level completion.
    """
    prediction, reference = _literals(answer.prediction), _literals(answer.reference)
    return float(_extra("rapidfuzz.fuzz").ratio(prediction, reference)) if prediction and reference else 0.0


@METRICS.register("sari")
def sari(answer: Answer) -> float:
    """SARI against one reference; ``source`` is the text to be simplified. See `lorica.evaluation.sari`."""
    return sari_of(answer.source, answer.prediction, answer.reference)


@METRICS.register("token_f1")
def token_f1(answer: Answer) -> float:
    """F1 of the words two texts share, counted as often as they occur; articles and punctuation are no words.

    Two texts without words are equal: 100. Source: Rajpurkar et al. 2016 (SQuAD), evaluation script of 2.0.
    """
    prediction, reference = _words(answer.prediction), _words(answer.reference)
    if not prediction or not reference:
        return _percent(prediction == reference)
    shared = (prediction & reference).total()
    return 100 * f1(shared / prediction.total(), shared / reference.total())


@METRICS.register("final_number")
def final_number(answer: Answer) -> float:
    """The last number written equals the reference's: the one after its last ``####``, else its last number.

    Commas between thousands do not count, nor do zeros at the end of decimals; a minus counts unless it follows a
    letter or digit. Source: Cobbe et al. 2021 (GSM8K).

    Raises:
        LoricaError: the reference holds no number.
    """
    wanted = _last_number(answer.reference.rsplit("####", 1)[-1])
    if wanted is None:
        raise LoricaError(f"final_number needs a reference with a number, and this has none: {answer.reference!r}.")
    return _percent(_last_number(answer.prediction) == wanted)


def recall_per_label(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return, for each label among the references, the percentage of its rows that are predicted so, labels sorted.

    Strings are compared as they are; normalise them first where the score does. A label that falls to 0 while the
    others hold was unlearned as an option, not as knowledge.

    Raises:
        LoricaError: not as many predictions as references.
    """
    if len(predictions) != len(references):
        raise LoricaError(f"{len(predictions)} predictions cannot be compared with {len(references)} references.")
    rows = Counter(references)
    right = Counter(label for guess, label in zip(predictions, references, strict=True) if guess == label)
    return {label: 100 * right[label] / rows[label] for label in sorted(rows)}


def majority_floor(references: Sequence[str]) -> float:
    """Return the percentage of rows that always answering the most frequent label gets right.

    Raises:
        LoricaError: there are no rows.
    """
    if not references:
        raise LoricaError("a majority floor needs at least one reference.")
    return 100 * max(Counter(references).values()) / len(references)


def _percent(right: bool) -> float:
    return 100.0 if right else 0.0


def _words(text: str) -> Counter[str]:
    return Counter(_ARTICLES.sub(" ", normalise_answer(text)).split())


def _literals(code: str) -> str:
    return _LITERAL.sub(r"\1", code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", ""))


def _last_number(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


@cache
def _rouge() -> Any:
    return _extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"])


def _extra(module: str) -> Any:
    """Import a module of the optional dependencies."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        raise LoricaError(f"this metric needs {package}; run: pip install 'lorica[benchmarks]'") from None
