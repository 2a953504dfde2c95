"""Scores of single answers: values worked by hand, and what must hold of any two texts."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.errors import LoricaError
from lorica.evaluation import metrics, sari
from lorica.evaluation.metrics import METRICS, Answer, checked, majority_floor, recall_per_label

TEXTS = st.text(alphabet="abcde AN.,-1#", max_size=14)
WORDS = st.lists(st.sampled_from(["red", "green", "blue", "grey"]), max_size=6)


def score(name: str, prediction: str, reference: str, source: str = "") -> float:
    return METRICS[name](Answer(prediction, reference, source))


EQUAL = [
    ("exact_match", "Very  Negative.", "very negative", 100),
    ("exact_match", "very-negative", "very negative", 0),
    ("exact_match", "Science or\nTechnology", "Science or Technology", 100),
    ("exact_match", "+", "-", 0),
    ("exact_match", "", "-", 0),
    ("exact_match", " -\n", "-", 100),
    ("exact_string", "A", "A", 100),
    ("exact_string", " A", "A", 0),
    ("exact_string", "A.", "A", 0),
    ("exact_string", "a", "A", 0),
    ("stripped_string", " A\n", "A", 100),
    ("stripped_string", "A.", "A", 0),
    ("stripped_string", "A B", "AB", 0),
    ("first_line", " (A).\n\nAnd so on.", "(A)", 100),
    ("first_line", "(A)", "A", 0),
    ("first_line", " true.", "True", 0),
    ("first_line", " 4.", "-4", 0),
    ("first_line", " ] ) }.", "] ) }", 100),
    ("first_line", " ] ) .", "] ) }", 0),
    ("first_line", "3.5", "3.5", 100),
    ("first_line", "", "No", 0),
    ("first_letter", "B\nBecause it is so.", "B\nOther reasons.", 100),
    ("first_letter", "A", "B", 0),
    ("first_letter", " B", "B", 0),
    ("first_letter", "b", "B", 0),
    ("first_letter", "", "B", 0),
    ("first_letter", "", "", 0),
    ("final_number", "3 + 4 = 7, so 7 apples", "They have 3 + 4 = <<3+4=7>>7.\n#### 7", 100),
    ("final_number", "7 of the 8", "#### 7", 0),
    ("final_number", "It costs $1,234.50.", "1234.5", 100),
    ("final_number", "12,345,678", "#### 12,345,678", 100),
    ("final_number", "7.0", "7", 100),
    ("final_number", "70", "7", 0),
    ("final_number", "10-5", "5", 100),
    ("final_number", "is -5", "5", 0),
    ("final_number", "is -5", "#### -5", 100),
    ("final_number", "1, 2, 3", "3", 100),
    ("final_number", "about .5", "5", 0),
    ("final_number", "is $.50", "0.5", 100),
    ("final_number", "is -.5", "-0.5", 100),
    ("final_number", "so ...5", "5", 100),
    ("final_number", "no number", "3", 0),
    ("final_number", "", "3", 0),
    ("token_f1", "The cat", "cat", 100),
    ("token_f1", "a big cat", "cat, small", 50),
    ("token_f1", "cat cat", "cat", 200 / 3),
    ("token_f1", "the", "An.", 100),
    ("token_f1", "", "cat", 0),
    ("token_f1", "cat", "", 0),
    ("rouge_l", "the cat sat", "the cat on the mat", 50),
    ("rouge_l", "The CAT, sat!", "the cat sat", 100),
    ("rouge_l", "mat cat", "cat mat", 50),
    ("rouge_l", "", "cat", 0),
    ("edit_similarity", "abcd", "abed", 75),
    ("edit_similarity", "x = <NUM_LIT>", "x = <NUM_LIT:0>", 100),
    ("edit_similarity", "f ( <STR_LIT:a\nb> )", "f ( a\nb )", 100),
    ("edit_similarity", "<STR_LIT><CHAR_LIT>x", "x", 100),
    ("edit_similarity", "<STR_LIT>", "<STR_LIT>", 0),
    ("edit_similarity", "", "x", 0),
]


@pytest.mark.parametrize(("name", "prediction", "reference", "expected"), EQUAL)
def test_worked_examples(name: str, prediction: str, reference: str, expected: float) -> None:
    library = {"rouge_l": "rouge_score", "edit_similarity": "rapidfuzz"}.get(name)
    if library:
        pytest.importorskip(library)
    assert score(name, prediction, reference) == pytest.approx(expected)


def test_every_metric_is_worked_here() -> None:
    assert {name for name, *_ in EQUAL} | {"sari"} == set(METRICS)


@given(prediction=TEXTS, reference=TEXTS)
def test_a_match_loosens_from_strict_to_stripped_to_normalised(prediction: str, reference: str) -> None:
    strict, stripped, loose = (
        score(n, prediction, reference) for n in ("exact_string", "stripped_string", "exact_match")
    )
    assert strict <= stripped <= loose


@given(a=WORDS, b=WORDS)
def test_token_f1_is_100_for_the_same_words_alone_whatever_their_order(a: list[str], b: list[str]) -> None:
    value = score("token_f1", " ".join(a), "the " + ", ".join(b) + ".")
    assert 0 <= value <= 100
    assert (value == 100) == (Counter(a) == Counter(b))
    assert (value == 0) == (not set(a) & set(b) and bool(a or b))


@given(a=TEXTS, b=TEXTS)
def test_edit_similarity_counts_what_two_texts_have_in_common_in_order(a: str, b: str) -> None:
    pytest.importorskip("rapidfuzz")
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    expected = 200 * table[-1][-1] / (len(a) + len(b)) if a and b else 0
    assert score("edit_similarity", a, b) == pytest.approx(expected)
    assert score("edit_similarity", a, b) == score("edit_similarity", b, a)


@given(value=st.integers(-(10**9), 10**9), decimals=st.integers(0, 3))
def test_the_way_a_number_is_written_does_not_count(value: int, decimals: int) -> None:
    written = f"so it is {value:,}" + ("." + "0" * decimals if decimals else "")
    assert score("final_number", written, f"reasons 1 2\n#### {value}") == 100
    assert score("final_number", written, str(value + 1)) == 0


def test_a_reference_without_a_number_is_a_mistake_in_the_data() -> None:
    with pytest.raises(LoricaError, match="this has none: 'none'"):
        score("final_number", "3", "none")


def test_sari_by_hand() -> None:
    """n = 1: keep {a, b} 1, delete {c, d} 1, add {e} of {e, f} 2/3; n = 2, 3 alike; n = 4: keep 1, delete 1, add 0."""
    assert score("sari", "a b e", "a b e f", "a b c d") == pytest.approx(100 * (1 + 1 + 0.5) / 3)


def test_sari_by_hand_with_repeated_words_and_mistakes() -> None:
    """keep: 1/2 (p = (1 + 0)/2, r = 1/2), 0, 1, 1; delete: 0 (the second a was to stay), 0, 1, 1; add: nothing, 1."""
    assert score("sari", "a b", "a a", "a a b") == pytest.approx(100 * (2.5 / 4 + 2 / 4 + 1) / 3)


@given(source=WORDS, reference=WORDS, prediction=WORDS)
def test_sari_lies_in_0_to_100(source: list[str], reference: list[str], prediction: list[str]) -> None:
    assert 0 <= score("sari", " ".join(prediction), " ".join(reference), " ".join(source)) <= 100 + 1e-9


@given(source=st.permutations("abcdef"), reference=WORDS)
def test_the_reference_itself_has_a_sari_of_100(source: list[str], reference: list[str]) -> None:
    wanted = " ".join([*source[:3], *reference])
    assert score("sari", wanted, wanted, " ".join(source)) == pytest.approx(100)


def test_the_published_sari_faults_dropping_one_of_two_equal_words() -> None:
    """n = 1: one red goes, which R holds: delete 0; everything else is 0 / 0 or right."""
    assert score("sari", "red", "red", "red red") == pytest.approx(100 * (1 + 3 / 4 + 1) / 3)


def test_sari_tokens_by_hand() -> None:
    text = 'Er zahlt 1,300.50 Fr., "nicht" mehr (2020-21), sagt\'s A-Z.'
    expected = 'er zahlt 1,300.50 fr . , " nicht " mehr ( 2020 - 21 ) , sagt\'s a-z .'
    assert sari.tokens(text) == expected.split()


@given(text=st.text(alphabet="aZ09 .,-'\"!()[]_/\\~äß漢", max_size=20))
def test_sari_tokens_are_those_of_mteval_13a(text: str) -> None:
    tokenizer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a")
    assert sari.tokens(text) == tokenizer.Tokenizer13a()(text.lower()).split()


def test_rouge_l_is_that_of_the_longest_common_subsequence() -> None:
    pytest.importorskip("rouge_score")
    draw = random.Random(0)
    for _ in range(50):
        a, b = ([draw.choice("xyz") for _ in range(draw.randint(1, 7))] for _ in "ab")
        common = next(n for n in range(7, -1, -1) if any(_is_part(part, b) for part in _parts(a, n)))
        expected = 200 * common / (len(a) + len(b))
        assert score("rouge_l", " ".join(a), " ".join(b)) == pytest.approx(expected)


def _parts(words: list[str], size: int) -> list[list[str]]:
    chosen = ([w for i, w in enumerate(words) if mask >> i & 1] for mask in range(1 << len(words)))
    return [part for part in chosen if len(part) == size]


def _is_part(part: list[str], words: list[str]) -> bool:
    rest = iter(words)
    return all(word in rest for word in part)


@pytest.mark.parametrize("name", ["rouge_l", "edit_similarity"])
def test_a_missing_library_is_named_before_anything_is_generated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics._rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setitem(sys.modules, "rapidfuzz.fuzz", None)
    with pytest.raises(LoricaError, match=re.escape("pip install 'lorica[benchmarks]'")):
        checked(name)


def test_a_metric_that_needs_no_library_is_checked_without_one() -> None:
    for name in set(METRICS) - {"rouge_l", "edit_similarity"}:
        assert checked(name)(Answer("7", "7", "7")) == pytest.approx(100)
    with pytest.raises(LoricaError, match="Did you mean 'exact_match'"):
        checked("exact_macth")


def test_recall_per_label_shows_a_label_that_is_never_written() -> None:
    references = ["A", "A", "B", "D", "D", "A"]
    predictions = ["A", "B", "B", "A", "C", "A"]
    assert recall_per_label(predictions, references) == {"A": pytest.approx(200 / 3), "B": 100, "D": 0}
    with pytest.raises(LoricaError, match="5 predictions cannot be compared with 6 references"):
        recall_per_label(predictions[1:], references)


@given(references=st.lists(st.sampled_from("ABC"), min_size=1))
def test_the_majority_floor_is_the_best_constant_answer(references: list[str]) -> None:
    constant = [sum(score("exact_string", label, r) for r in references) / len(references) for label in "ABC"]
    assert majority_floor(references) == pytest.approx(max(constant))


def test_a_majority_floor_needs_rows() -> None:
    with pytest.raises(LoricaError, match="at least one reference"):
        majority_floor([])


def test_metrics_and_statistics_need_no_torch() -> None:
    code = "import sys, lorica.evaluation.metrics, lorica.bootstrap; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
