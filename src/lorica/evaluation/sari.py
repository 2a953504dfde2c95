"""SARI: how well a simplified text keeps, deletes and adds what a reference keeps, deletes and adds."""

from __future__ import annotations

import re
from collections import Counter

Grams = Counter[tuple[str, ...]]
ORDERS = (1, 2, 3, 4)

_SEPARATE = re.compile(r"[!-&(-+/:-@\[-`{-~]|(?<![0-9])[.,]|[.,](?![0-9])|(?<=[0-9])-")


def sari(source: str, prediction: str, reference: str) -> float:
    """Return the SARI of one text against one reference, percent.

    With S, C, R the multisets of n-grams of source, prediction and reference, for n = 1..4:

        keep    F1 of  p = mean over g in S & C of (S & C & R)[g] / (S & C)[g],  r = |S & C & R| / |S & R|
        delete         p = mean over g in S - C of (S - C - R)[g] / (S - C)[g]
        add     F1 of  p = |C' & R'| / |C'|,  r = |C' & R'| / |R'|,  with C' = set(C) - set(S), R' = set(R) - set(S)

    and SARI is the mean of the three, each a mean over n. 0 / 0 is 1: nothing to do and nothing done is right.
    Tokens are lower-case, split as in mteval 13a (see `tokens`). Mind that S - C - R takes R's n-grams off what was
    deleted, not off S: dropping one of two equal words is faulted even where the reference drops it too.

    Source:
        Xu et al. 2016 (TACL 4, 401-415), in the form of Hugging Face's ``evaluate`` that TRACE scores
        with: 0 / 0 = 1, recall of keep over n-gram counts. TRACE gives the whole prompt as the source there;
        the paper means the text to be simplified alone.
    """
    source_tokens, prediction_tokens, reference_tokens = map(tokens, (source, prediction, reference))
    total = 0.0
    for n in ORDERS:
        s, c, r = (ngrams(words, n) for words in (source_tokens, prediction_tokens, reference_tokens))
        total += _keep(s, c, r) + _delete(s, c, r) + _add(s, c, r)
    return 100 * total / (3 * len(ORDERS))


def tokens(text: str) -> list[str]:
    """Return lower-case tokens as mteval 13a splits them, its decoding of mark-up aside.

    ASCII punctuation stands by itself, but for apostrophes, periods and commas between digits, and hyphens that do
    not follow a digit.
    """
    return _SEPARATE.sub(r" \g<0> ", text.lower()).split()


def ngrams(words: list[str], n: int) -> Grams:
    """Return how often each run of n words occurs."""
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _keep(s: Grams, c: Grams, r: Grams) -> float:
    kept, right = s & c, s & c & r
    return f1(_mean_ratio(right, kept), _ratio(right.total(), (s & r).total()))


def _delete(s: Grams, c: Grams, r: Grams) -> float:
    deleted = s - c
    return _mean_ratio(deleted - r, deleted)


def _add(s: Grams, c: Grams, r: Grams) -> float:
    added, wanted = set(c) - set(s), set(r) - set(s)
    right = len(added & wanted)
    return f1(_ratio(right, len(added)), _ratio(right, len(wanted)))


def _mean_ratio(part: Grams, whole: Grams) -> float:
    return _ratio(sum(part[gram] / count for gram, count in whole.items()), len(whole))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def f1(precision: float, recall: float) -> float:
    """Return the harmonic mean, 0 where both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
