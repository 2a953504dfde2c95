"""Formats and rows: what is told apart, what is refused, and that no row is lost on the way."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorica.data import Chat, Pair, Text, Tokens, overlap, validate, write_rejected
from lorica.data.formats import formats
from lorica.data.record import RowError
from lorica.errors import LoricaError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS = {
    "tokenized": {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1], "len": 2},
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_recognised_by_its_columns(write, name):
    report = validate(write([ROWS[name]]))
    assert report.format == name
    assert report.rows_read == len(report.examples) == 1
    assert report.notices == []


@pytest.mark.parametrize("name", [name for name in ROWS if name != "text"])
def test_text_beside_another_format_is_left_out_with_a_notice(write, name):
    report = validate(write([{**ROWS[name], "text": "x"}]))
    assert report.format == name
    assert report.notices == ["columns not used: text"]


def test_two_formats_need_dataset_format(write):
    path = write([{**ROWS["alpaca"], **ROWS["messages"]}])
    with pytest.raises(LoricaError, match="match messages and alpaca; set dataset_format"):
        validate(path)
    assert validate(path, dataset_format="alpaca").format == "alpaca"


def test_preference_data_is_refused_by_name_unless_a_format_is_asked_for(write):
    path = write([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(LoricaError, match="preference data"):
        validate(path)
    assert validate(path, "text", "chosen").examples == [Text(f"{path}:1", "a")]


@pytest.mark.reliability("R26")
def test_no_match_lists_columns_nearest_name_and_formats(write):
    with pytest.raises(LoricaError) as error:
        validate(write([{"promt": "q", "completion": "a"}]))
    for part in ("Columns found: completion, promt", "Did you mean 'prompt'?", "alpaca (instruction + output)"):
        assert part in str(error.value)


@pytest.mark.reliability("R26")
def test_required_column_absent_everywhere_is_one_error(write):
    with pytest.raises(LoricaError, match=r"needs column 'output', which no row has\. Did you mean 'outputs'\?"):
        validate(write([{"instruction": "q", "outputs": "a"}] * 20), dataset_format="alpaca")
    with pytest.raises(LoricaError, match=r"'alpacca' is not known\. Did you mean 'alpaca'\?"):
        validate(write([ROWS["alpaca"]]), dataset_format="alpacca")


@pytest.mark.reliability("R20")
def test_minority_format_is_refused_with_both_names(write):
    report = validate(write([ROWS["messages"], ROWS["text"], ROWS["messages"]]), skip_invalid_rows=True)
    assert [(row.line, row.reason) for row in report.rejected_rows()] == [
        (2, "other format: the row is text, the data is messages")
    ]


def test_rows_become_examples(write):
    def example(row):
        return validate(write([row])).examples[0]

    assert isinstance(example(ROWS["prompt_completion"]), Pair)
    chat = example({"prompt": [USER], "completion": [ASSISTANT]})
    assert (chat.messages, chat.prompt_turns) == ((USER, ASSISTANT), 1)
    assert example(ROWS["sharegpt"]).messages == (USER, ASSISTANT)
    full = {**ROWS["alpaca"], "input": "i", "system": "s", "history": [["q0", "a0"]]}
    assert [turn["content"] for turn in example(full).messages] == ["s", "q0", "a0", "q\ni", "a"]
    assert example(full).prompt_turns == 4
    padded = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}
    tokens = example(padded)
    assert isinstance(tokens, Tokens)
    assert (tokens.input_ids, tokens.labels) == ((5, 6), (5, 6))


@pytest.mark.reliability("R23")
@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("prompt_completion", {"prompt": "q"}, "missing field: 'completion'"),
        ("prompt_completion", {"prompt": "q", "completion": None}, "missing field: 'completion' is null"),
        ("prompt_completion", {"prompt": "q", "completion": " \n"}, "empty field: 'completion'"),
        ("prompt_completion", {"prompt": 3, "completion": "a"}, "field 'prompt': expected a string, got a number"),
        (
            "prompt_completion",
            {"prompt": "q", "completion": [ASSISTANT]},
            "'completion': expected a string, got a list",
        ),
        ("prompt_completion", {"prompt": [USER], "completion": "a"}, "'completion': expected a list, got a string"),
        ("prompt_completion", {"prompt": [USER], "completion": [USER]}, "completion[0] is 'user'"),
        ("text", {"text": ["a"]}, "field 'text': expected a string, got a list"),
        ("text", {"text": ""}, "empty field: 'text'"),
        ("messages", {"messages": []}, "empty field: 'messages'"),
        ("messages", {"messages": "hi"}, "field 'messages': expected a list, got a string"),
        ("messages", {"messages": ["hi"]}, "messages[0]: expected an object, got a string"),
        ("messages", {"messages": [USER]}, "no assistant turn"),
        ("messages", {"messages": [USER, {"role": "bot", "content": "a"}]}, "unknown role: messages[1]: 'bot'"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]}, "empty field: 'messages[1].content'"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "'messages[1].content' is null"),
        ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "tool call: messages[1]"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "q"}]}, "unknown role: conversations[0]: 'robot'"),
        ("alpaca", {"instruction": "q", "output": ""}, "empty field: 'output'"),
        ("alpaca", {"instruction": "q", "output": "a", "input": 3}, "field 'input': expected a string, got a number"),
        ("alpaca", {"instruction": "q", "output": "a", "history": ["x"]}, "field 'history': expected a list"),
        ("tokenized", {"input_ids": []}, "empty field: 'input_ids'"),
        ("tokenized", {"input_ids": [1, "2"]}, "input_ids[1]: expected an integer, got a string"),
        ("tokenized", {"input_ids": [1, True]}, "input_ids[1]: expected an integer, got a boolean"),
        ("tokenized", {"input_ids": [1, 10]}, "id outside the vocabulary: input_ids[1] is 10, expected 0 to 9"),
        ("tokenized", {"input_ids": [1, -1]}, "id outside the vocabulary: input_ids[1] is -1"),
        ("tokenized", {"input_ids": [1, 2], "labels": [1]}, "unequal lengths: 2 input_ids, 1 labels"),
        ("tokenized", {"input_ids": [1, 2], "attention_mask": [1]}, "unequal lengths: 2 input_ids, 1 attention_mask"),
        ("tokenized", {"input_ids": [1, 2], "attention_mask": [1, 2]}, "wrong value: attention_mask[1] is 2"),
        ("tokenized", {"input_ids": [1, 2], "labels": [-100, -100]}, "nothing to train: every label is -100"),
    ],
)
def test_faulty_row_is_refused_with_its_reason(name, row, reason):
    with pytest.raises(RowError) as error:
        formats(vocab_size=10)[name].convert("f:1", row)
    assert reason in str(error.value)


def test_seq2seq_labels_have_their_own_length(write):
    path = write([{"input_ids": [1, 2], "labels": [3]}])
    with pytest.raises(LoricaError, match="unequal lengths"):
        validate(path)
    assert validate(path, seq2seq=True).examples[0].labels == (3,)


@pytest.mark.reliability("R20")
def test_default_lists_ten_lines_and_the_total(write):
    path = write([ROWS["text"]] * 2 + [{"text": ""}] * 13)
    with pytest.raises(LoricaError) as error:
        validate(path)
    lines = str(error.value).split("\n")
    assert lines[0] == f"{path}: 13 of 15 rows are invalid:"
    assert lines[1:11] == [f"  {path}:{line}: empty field: 'text'" for line in range(3, 13)]
    assert lines[11:] == ["  and 3 more", "Correct them, or set skip_invalid_rows to train on the other 2."]


@pytest.mark.reliability("R20")
def test_rejected_rows_are_written_with_their_bytes(write, tmp_path):
    path = write(b'{"text": "a"}\n{"text": ""}\n{"text": "\xe9"}\n{')
    report = validate(path, skip_invalid_rows=True)
    assert (report.rows_read, report.rejected) == (4, 3)
    assert report.reasons == {"empty field": 1, "invalid UTF-8": 1, "malformed JSON": 1}
    write_rejected(report, tmp_path / "rejected.jsonl")
    entries = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert entries[0] == {
        "file": str(path), "line": 2, "reason": "empty field: 'text'", "original": '{"text": ""}'
    }  # fmt: skip
    assert entries[1]["original_base64"] == "eyJ0ZXh0IjogIukifQ=="
    assert [entry["line"] for entry in entries] == [2, 3, 4]


@pytest.mark.reliability("R21")
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_file_is_named(write, content):
    path = write(content)
    with pytest.raises(LoricaError, match="no rows; the data is empty"):
        validate(path)


@pytest.mark.reliability("R21")
def test_no_usable_row_counts_the_reasons(write):
    path = write(b'{\n{"text": ""}\n{"text": null}\n{"text": ""}\n')
    with pytest.raises(LoricaError, match=r"none of the 4 rows .*empty field \(2\); malformed JSON \(1\)"):
        validate(path, skip_invalid_rows=True)
    with pytest.raises(LoricaError, match="none of the 1 rows"):
        validate(write("{"), skip_invalid_rows=True)


def test_empty_prompts_and_duplicates_are_counted(write):
    rows = [{"prompt": "", "completion": "a"}, {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}]
    report = validate(write(rows))
    assert (report.empty_prompts, report.duplicates) == (1, 1)
    assert report.notices == ["1 of 3 rows have an empty prompt", "1 of 3 rows repeat an earlier row"]
    assert overlap(report, validate(write(rows[1:], "eval.jsonl"))) == 2


@pytest.mark.reliability("R20")
def test_change_after_the_check_is_noticed(write):
    path = write([ROWS["text"]])
    report = validate(path)
    report.check_unchanged()
    write([ROWS["text"]] * 2)
    with pytest.raises(LoricaError, match="changed after it was checked"):
        report.check_unchanged()


fields = st.none() | st.text(max_size=3) | st.integers() | st.lists(st.text(max_size=2), max_size=2)


@pytest.mark.reliability("R20", "R23")
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({}, optional={"prompt": fields, "completion": fields, "text": fields}),
                     min_size=1, max_size=6))  # fmt: skip
def test_no_row_is_lost_and_kept_rows_have_something_to_train(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        report = validate(path, skip_invalid_rows=True)
    except LoricaError:
        return
    assert report.rows_read == len(rows)
    lines = [int(e.where.rsplit(":", 1)[1]) for e in report.examples] + [row.line for row in report.rejected_rows()]
    assert sorted(lines) == list(range(1, len(rows) + 1))
    for example in report.examples:
        assert isinstance(example, Pair | Text | Chat)
        assert (example.completion if isinstance(example, Pair) else example.text).strip()
