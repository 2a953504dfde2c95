"""Prompt templates: data is data, errors are the row's, and only the elastic part of a prompt is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.data.encode import encode
from lorica.data.example import Pair
from lorica.data.record import RowError
from lorica.data.scored import Task
from lorica.data.stream import TaskStream
from lorica.data.template import PairTemplate, fill, template_fields, template_problem
from lorica.data.validate import fingerprint
from lorica.errors import LoricaError

TOPIC = PairTemplate(
    "Option: {options} \n{sentence}\nAnswer:", "{label}", ["Tea", "Coffee"], shorten="sentence", drop_labels=["-"]
)


def pair(template: PairTemplate = TOPIC, **row: Any) -> Pair | None:
    return template.pair("f:1", row)


@given(st.text(), st.sampled_from(["Tea", "Coffee"]))
def test_what_is_put_in_is_never_read_as_a_template(sentence: str, label: str) -> None:
    made = pair(sentence=sentence, label=label)
    assert made is not None
    assert made.prompt == "Option: Tea, Coffee \n" + sentence + "\nAnswer:"
    assert made.completion == label
    assert made.choices == ("Tea", "Coffee")
    start, end = made.elastic or (0, 0)
    assert made.prompt[start:end] == sentence


def test_fields_that_look_like_fields_stay_as_they_are() -> None:
    text, spans = fill("{a}{b} {{x}}", {"a": "{b}", "b": "{options}{{"})
    assert text == "{b}{options}{{ {x}"
    assert spans == {"a": (0, 3), "b": (3, 14)}


def test_numbers_are_written_out_and_nothing_else_is() -> None:
    assert fill("{n} {x}", {"n": 3, "x": 0.5})[0] == "3 0.5"
    for value, found in ((True, "a boolean"), ([1], "a list"), ({}, "an object")):
        with pytest.raises(RowError, match=f"field 'n': expected text or a number, got {found}"):
            fill("{n}", {"n": value})


@pytest.mark.parametrize("text", ["{a", "a}", "{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}"])
def test_a_template_that_cannot_be_filled_is_named(text: str) -> None:
    assert template_problem(text)


def test_the_fields_of_a_template() -> None:
    assert template_fields("{a} {{no}} {b}{a}") == ["a", "b", "a"]
    assert template_problem("{a} {{no}}") == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "Tea"}, r"missing field: 'sentence' is needed by the template; the row has 'label'"),
        ({"label": None, "sentence": "s"}, "missing field: 'label' is null"),
        (
            {"label": "Te", "sentence": "s"},
            r"unknown label: 'Te' is none of the choices: Tea, Coffee\. Did you mean 'Tea'",
        ),
        ({"label": "tea", "sentence": "s"}, "unknown label: 'tea'"),
        ({"label": " ", "sentence": "s"}, "empty field: the answer"),
    ],
)
def test_a_row_that_does_not_fit_says_why(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        pair(**row)


def test_a_row_without_a_gold_label_is_left_out() -> None:
    assert pair(sentence="s", label="-") is None


def test_choices_are_spelled_as_the_answer_is() -> None:
    made = pair(PairTemplate("Q: {q}", " {a}.", ["yes", "no"]), q="?", a="no")
    assert made is not None
    assert made.completion == " no."
    assert made.choices == (" yes.", " no.")


def test_the_source_stands_between_instruction_and_cue() -> None:
    template = PairTemplate("{prompt}", "{answer}", source_between=("Simplify:\n", "\nSimple:"))
    made = pair(template, prompt="Simplify:\nlong\nSimple:\nSimple:", answer="short")
    assert made is not None
    assert made.source == "long\nSimple:"
    with pytest.raises(RowError, match="no source"):
        pair(template, prompt="Simplify:\nlong", answer="short")


def test_pairs_with_other_choices_are_no_duplicates() -> None:
    assert fingerprint(Pair("a", "p", "c")) == fingerprint(Pair("b", "p", "c"))
    assert fingerprint(Pair("a", "p", "c")) != fingerprint(Pair("a", "p", "c", choices=("c", "d")))


HEAD, CUE = "the cat sat: ", "\nAnswer:"


def elastic(sentence: str, completion: str = "Tea") -> Pair:
    return Pair("f:1", HEAD + sentence + CUE, completion, (len(HEAD), len(HEAD) + len(sentence)), ("Tea", "Green tea"))


def tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@settings(max_examples=60, deadline=None)
@given(sentence=st.text(min_size=1, max_size=80), limit=st.integers(16, 60))
@pytest.mark.parametrize("seq2seq", [False, True])
def test_only_the_end_of_the_text_is_cut(tokenizer: Any, seq2seq: bool, sentence: str, limit: int) -> None:
    (row,), counts = encode([elastic(sentence)], tokenizer, 200, seq2seq=seq2seq, max_prompt_length=limit)
    prompt = tokenizer.decode(row.prompt_ids[1:])
    kept = prompt.removeprefix(HEAD).removesuffix(CUE)
    assert prompt == HEAD + kept + CUE
    assert sentence.startswith(kept)
    assert len(row.prompt_ids) <= limit
    assert counts.shortened == (kept != sentence)
    assert counts.truncated == 0
    if kept != sentence:
        # As much as fits stays: one character more would not.
        more = HEAD + sentence[: len(kept) + 1] + CUE
        assert 1 + tokens(tokenizer, more) > limit
        assert counts.notices[0] == "1 of 1 rows had the text in their prompt shortened"


def test_the_longest_choice_has_room_whatever_the_answer(tokenizer: Any) -> None:
    sentence = "hello there " * 40
    rows, _ = encode([elastic(sentence, "Tea"), elastic(sentence, "Green tea")], tokenizer, 64)
    assert rows[0].prompt_ids == rows[1].prompt_ids
    assert len(rows[0].prompt_ids or []) + tokens(tokenizer, "Green tea") + 1 == len(rows[1].input_ids) <= 64
    assert rows[0].choices == ("Tea", "Green tea")


def test_a_header_that_is_too_long_by_itself_is_cut_from_the_left(tokenizer: Any) -> None:
    limit = tokens(tokenizer, CUE) + 3
    (row,), counts = encode([elastic("hello there")], tokenizer, 200, max_prompt_length=limit)
    assert len(row.prompt_ids or []) == limit
    assert tokenizer.decode(row.prompt_ids).endswith(CUE)
    assert (counts.truncated, counts.shortened) == (1, 1)


@pytest.mark.parametrize("seq2seq", [False, True])
def test_without_an_elastic_part_the_start_of_a_long_prompt_goes(tokenizer: Any, seq2seq: bool) -> None:
    whole = Pair("f:1", "a b c d e f g h", " tea")
    (full,), _ = encode([whole], tokenizer, 200, seq2seq=seq2seq)
    (row,), counts = encode([whole], tokenizer, 200, seq2seq=seq2seq, max_prompt_length=6)
    assert full.prompt_ids is not None
    assert row.prompt_ids == [full.prompt_ids[0], *full.prompt_ids[-5:]]
    assert counts.truncated == 1
    if seq2seq:
        assert row.input_ids == row.prompt_ids
        assert row.labels == full.labels
    else:
        assert row.input_ids == row.prompt_ids + full.input_ids[len(full.prompt_ids) :]


TASK = {"name": "t", "train_file": "a", "test_file": "b"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "{a"}, "t: prompt: "),
        ({"prompt": "{options} {a}"}, r"the prompt has \{options\}, but there are no choices"),
        ({"prompt": "{a}", "shorten": "b"}, "shorten: the prompt needs the field 'b' once"),
        ({"prompt": "{a}", "choices": ["x"], "answer": "{b}{c}"}, "with choices the answer is one field"),
        ({"drop_labels": ["-"]}, "drop_labels needs a prompt"),
        ({"prompt": "{a}", "reader": "mmlu"}, "reader 'mmlu' makes its own prompts"),
        ({"scoring": "choose"}, "scoring 'choose' needs choices"),
        ({"reader": "mmlu", "hub": {"path": "x"}}, "rows of the hub are read by their columns"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(**TASK | fields)


def test_a_stream_may_have_abilities_alone_and_be_narrowed_to_some() -> None:
    held = [{"name": name, "test_file": name} for name in ("one", "two")]
    stream = TaskStream(name="s", version=1, description="d", tasks=[], held_out=held)
    assert [ability.name for ability in stream.only(["two"]).held_out] == ["two"]
    assert len(stream.only([]).held_out) == 2
    with pytest.raises(LoricaError, match="no task 'three'"):
        stream.only(["three"])
    with pytest.raises(ValueError, match="a stream needs a task, or at least a held_out ability"):
        TaskStream(name="s", version=1, description="d", tasks=[])
