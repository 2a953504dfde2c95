"""Broken data, as a user meets it: every way that rows can be wrong is told by file, line and reason, or counted."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorica.config import build_config
from lorica.data import Collator, load
from lorica.data.stream import read_stream
from lorica.errors import LoricaError
from lorica.experiments.config import build_run_config
from lorica.experiments.setup import Setup
from lorica.inputs import Inputs
from lorica.subspace.plan import Plan
from tests.reliability.small_runs import rows_file, stream_of, update
from tests.test_cli import Run, command  # noqa: F401
from tests.training.conftest import byte_tokenizer, llama_folder  # noqa: F401

GOOD = '{"prompt": "q", "completion": "a"}'
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def lines(*rows: object) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


REFUSED: dict[str, tuple[bytes, str, str]] = {
    "malformed": (f'{GOOD}\n{{"prompt": "q" "completion": "a"}}\n'.encode(), ":2:", "malformed JSON: .* at column 16"),
    "truncated": (f'{GOOD}\n{{"prompt": "q", "comp'.encode(), ":2:", "malformed JSON: Unterminated .* column 17"),
    "nul byte": (f"{GOOD}\n".encode() + b'{"prompt": "a\0"}\n', ":2:", "NUL byte: at byte 48"),
    "duplicate key": (f'{GOOD}\n{{"prompt": "a", "prompt": "b"}}'.encode(), ":2:", "duplicate key: 'prompt'"),
    "10 MB line": (f"{GOOD}\n".encode() + b"[" * 10**7, ":2:", "line too long: 10000000 bytes, the limit is 8388608"),
    "deep": (f'{GOOD}\n{{"prompt": {"[" * 500}{"]" * 500}}}'.encode(), ":2:", "nested too deeply: the limit is 64"),
    "NaN": (f'{GOOD}\n{{"prompt": NaN, "completion": "a"}}'.encode(), ":2:", "number not allowed: NaN is no JSON"),
    "Infinity": (f'{GOOD}\n{{"prompt": Infinity}}'.encode(), ":2:", "number not allowed: Infinity is no JSON"),
    "Latin-1": (f'{GOOD}\n{{"prompt": "é"}}'.encode("latin-1"), ":2:", "invalid UTF-8: byte 47 is 0xe9.*1252"),
    "UTF-16": (f"{GOOD}\n{GOOD}\n".encode("utf-16"), ":1:", "NUL byte: at byte 3; the file looks like UTF-16"),
    "list for text": (lines({"prompt": ["q"], "completion": "a"}), ":1:", r"wrong type: prompt\[0\]: expected an obj"),
    "number for text": (lines({"prompt": "q", "completion": 7}), ":1:", "'completion': expected a string, got a num"),
    "missing field": (lines(json.loads(GOOD), {"prompt": "q"}), ":2:", "missing field: 'completion'"),
    "null": (lines({"prompt": "q", "completion": None}), ":1:", "missing field: 'completion' is null"),
    "other format": (f'{GOOD}\n{GOOD}\n{{"text": "t"}}'.encode(), ":3:", "other format: .* text, .* prompt_completion"),
    "empty completion": (lines({"prompt": "q", "completion": " "}), ":1:", "empty field: 'completion'"),
    "empty turn": (lines({"messages": [USER, ASSISTANT | {"content": ""}]}), ":1:", r"empty field: 'messages\[1\]"),
    "unknown role": (lines({"messages": [USER | {"role": "bot"}]}), ":1:", r"unknown role: messages\[0\]: 'bot'"),
    "no assistant": (lines({"messages": [USER, USER]}), ":1:", r"no assistant turn: in the 2 turns messages\[0\] to"),
    "foreign id": (lines({"input_ids": [5, 10**6]}), ":1:", r"id outside the vocabulary: input_ids\[1\] is 1000000"),
    "unequal": (lines({"input_ids": [5, 6], "labels": [5]}), ":1:", "unequal lengths: 2 input_ids, 1 labels"),
    "masked labels": (lines({"input_ids": [5, 6], "labels": [-100, -100]}), ":1:", "nothing to train: every label is"),
    "empty file": (b"", ":", "no rows; the data is empty"),
    "blank file": (b"\xef\xbb\xbf\r\n \n", ":", "no rows; the data is empty"),
    "absent column": (lines({"promt": "q", "completion": "a"}), ":", "found: completion, promt.*Did you mean 'prompt'"),
}  # fmt: skip


@pytest.mark.reliability("R20", "R21", "R22", "R23", "R25")
@pytest.mark.parametrize("name", REFUSED)
def test_broken_rows_are_refused_before_anything_else_happens(
    name: str, command: Run, llama_folder: Path, tmp_path: Path
) -> None:
    content, place, reason = REFUSED[name]
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_bytes(content)
    status, _, errors = command(
        "train", "--model_name_or_path", str(llama_folder), "--train_file", str(path), "--output_dir", str(out)
    )
    assert status == 2
    assert re.search(re.escape(str(path)) + place + r" .*" + reason, errors), errors
    assert "Traceback" not in errors
    assert len(errors) < 2000
    assert not out.exists()


@pytest.mark.reliability("R21")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", r"none\.jsonl: no such file or folder\. Did you mean .*nine\.jsonl"),
        ("rows.txt", r"rows\.txt: file type '\.txt' is not known; use one of \.jsonl, \.json, \.csv, \.parquet"),
        ("rows", r"rows: the file has no type; use one of"),
        ("folder", r"folder: the folder holds no \.jsonl, .* file; found: README\.md"),
    ],
)
def test_what_is_no_data_file_is_told_with_what_was_found(
    name: str, message: str, command: Run, llama_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for file in ("nine.jsonl", "rows.txt", "rows", "folder/README.md"):
        (tmp_path / file).write_text(GOOD)
    words = ("--train_file", str(tmp_path / name), "--output_dir", str(tmp_path / "out"))
    status, _, errors = command("train", "--model_name_or_path", str(llama_folder), *words)
    assert status == 2
    assert re.search(message, errors), errors


@pytest.mark.reliability("R20")
def test_the_first_ten_are_shown_and_all_are_counted(command: Run, llama_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n" * 3 + "{\n" * 25)
    words = ("--train_file", str(path), "--output_dir", str(tmp_path / "out"))
    status, _, errors = command("train", "--model_name_or_path", str(llama_folder), *words)
    assert status == 2
    assert f"{path}: 25 of 28 rows are invalid" in errors
    assert re.findall(r"rows\.jsonl:(\d+): malformed JSON", errors) == [str(line) for line in range(4, 14)]
    assert "and 15 more" in errors
    assert "skip_invalid_rows to train on the other 3" in errors


def inputs(folder: Path, model: Path, content: bytes | str, name: str = "rows.jsonl", **options: Any) -> Inputs:
    """Read what an update is to learn, as ``lorica train`` does before it loads a weight."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = {"model_name_or_path": str(model), "train_file": str(path), "output_dir": str(folder / "out")}
    return Inputs(build_config(given | options), byte_tokenizer(), seq2seq=False, position_limit=256)


def rejected(found: Inputs, folder: Path) -> list[dict[str, Any]]:
    """Return what an update writes down of the rows it leaves out."""
    found.write_rejected(folder)
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


@pytest.mark.reliability("R20", "R22")
@pytest.mark.parametrize(
    ("content", "name", "places"),
    [
        (b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n{{\r\n \r\n{GOOD}".encode(), "rows.jsonl", [3]),
        (f"\n[{GOOD},\r\n\n 7,\n{GOOD}]", "rows.json", [4]),
        (f"{GOOD}\n7\n{GOOD}", "rows.json", [2]),
        ('prompt,completion\r\n\r\n"q\r\nq",a\r\nq\r\nq,b', "rows.csv", [5]),
    ],
)
def test_marks_line_ends_blanks_and_arrays_are_read_and_lines_stay_those_of_the_file(
    content: bytes | str, name: str, places: list[int], llama_folder: Path, tmp_path: Path
) -> None:
    found = inputs(tmp_path, llama_folder, content, name, skip_invalid_rows=True)
    assert len(found.train) == 2
    assert [row["line"] for row in rejected(found, tmp_path)] == places


@pytest.mark.reliability("R20")
def test_rejected_rows_keep_their_bytes_and_nothing_is_lost(llama_folder: Path, tmp_path: Path) -> None:
    raw = [b'{"prompt": "\xe9"}', b'{"prompt": "' + b"x" * (10 * 2**20), b"{", b'{"prompt": "a\0"}']
    dev = tmp_path / "dev.jsonl"
    dev.write_text(f"{GOOD}\n{{}}\n")
    found = inputs(
        tmp_path, llama_folder, b"\n".join([*raw, GOOD.encode()]), skip_invalid_rows=True, eval_file=str(dev)
    )
    entries = rejected(found, tmp_path)
    assert [(Path(entry["file"]).name, entry["line"]) for entry in entries] == [
        ("rows.jsonl", 1), ("rows.jsonl", 2), ("rows.jsonl", 3), ("rows.jsonl", 4), ("dev.jsonl", 2),
    ]  # fmt: skip
    assert base64.b64decode(entries[0]["original_base64"]) == raw[0]
    assert entries[1]["original"].encode() == raw[1][: 8 * 2**20]
    assert [entry["original"].encode() for entry in entries[2:4]] == raw[2:]
    summary = found.train.summary
    assert summary["rows_read"] == 5 == summary["kept"] + summary["rejected"]
    assert summary["reasons"] == {"invalid UTF-8": 1, "line too long": 1, "malformed JSON": 1, "NUL byte": 1}


@pytest.mark.reliability("R21")
def test_no_usable_row_is_told_with_the_reasons(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=r"none of the 3 rows can be used: malformed JSON \(2\); wrong type \(1\)"):
        inputs(tmp_path, llama_folder, "{\n7\n}\n", skip_invalid_rows=True)


@pytest.mark.reliability("R23")
def test_empty_prompts_are_taken_and_told(llama_folder: Path, tmp_path: Path) -> None:
    found = inputs(tmp_path, llama_folder, lines({"prompt": "", "completion": "a"}))
    assert "notice: 1 of 1 rows have an empty prompt" in found.describe()[0]


@pytest.mark.reliability("R20")
def test_duplicates_and_rows_that_are_trained_and_scored_are_told(llama_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": str(number % 6), "completion": "a"} for number in range(8)]
    for name, part in (("dev", rows[2:4]), ("old", rows[4:6])):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*part))
    files = {"eval_file": str(tmp_path / "dev.jsonl"), "retention_file": [str(tmp_path / "old.jsonl")]}
    told = "\n".join(inputs(tmp_path, llama_folder, lines(*rows), **files).describe())
    assert "2 of 8 rows repeat an earlier row" in told
    for name in ("dev", "old"):
        assert f"2 of the rows of {tmp_path / name}.jsonl are also trained on" in told


@pytest.mark.reliability("R20")
def test_a_stream_tells_what_is_trained_and_scored(llama_folder: Path, tmp_path: Path) -> None:
    stream = stream_of(tmp_path / "data", ("first",))
    config = {"stream": "small", "model_name_or_path": llama_folder, "output_dir": tmp_path / "out"}
    told = Setup(build_run_config(config), stream).describe()
    assert "notice: task first, rows to test: 8 of the rows are also trained on" in told


@pytest.mark.reliability("R20")
def test_a_file_that_changes_between_check_and_use_is_an_error(llama_folder: Path, tmp_path: Path) -> None:
    found = inputs(tmp_path, llama_folder, f"{GOOD}\n{{\n", skip_invalid_rows=True)
    path = Path(found.train.summary["path"])
    path.write_text(f"{GOOD}\n[\n")
    with pytest.raises(LoricaError, match=r"rows\.jsonl: the data changed after it was checked"):
        found.write_rejected(tmp_path)
    with pytest.raises(LoricaError, match="changed after it was checked"):
        load(path, byte_tokenizer(), validated=found.reports[0])
    assert not (tmp_path / "rejected.jsonl").exists()


LONG = lines({"prompt": "p" * 30, "completion": "c" * 10}, {"prompt": "p", "completion": "c"})


@pytest.mark.reliability("R24")
@pytest.mark.parametrize(
    ("policy", "kept", "told"),
    [("truncate", 2, "1 of 2 rows were truncated"), ("drop", 1, "1 of 2 rows were dropped as too long")],
)
def test_rows_that_are_too_long_follow_the_policy_and_are_counted(
    policy: str, kept: int, told: str, llama_folder: Path, tmp_path: Path
) -> None:
    found = inputs(tmp_path, llama_folder, LONG, max_length=20, truncation_policy=policy)
    assert len(found.train) == kept
    assert told in found.describe()[0]
    assert max(len(row.input_ids) for row in found.train.examples) <= 20


@pytest.mark.reliability("R24")
def test_a_policy_of_error_and_all_dropped_say_so(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=r"1 of 2 rows are longer than max_length=20:\n  .*rows\.jsonl:1: 41 tokens"):
        inputs(tmp_path, llama_folder, LONG, max_length=20, truncation_policy="error")
    with pytest.raises(LoricaError, match="of 2 rows 2 are longer than max_length=2 and were dropped"):
        inputs(tmp_path, llama_folder, LONG, max_length=2, truncation_policy="drop")


@pytest.mark.reliability("R24", "R25")
def test_rows_without_a_label_are_counted_apart_and_never_trained(llama_folder: Path, tmp_path: Path) -> None:
    rows = lines({"input_ids": [5], "labels": [5]}, {"input_ids": [5, 6], "labels": [-100, 6]})
    found = inputs(tmp_path, llama_folder, rows)
    assert len(found.train) == 1
    assert "1 of 2 rows have nothing to train" in found.describe()[0]
    with pytest.raises(LoricaError, match=r"no row is left to train on: .* 1 have nothing to train"):
        inputs(tmp_path, llama_folder, lines({"input_ids": [5]}))


@pytest.mark.reliability("R25")
def test_an_end_that_is_never_trained_is_told_with_a_row_as_it_is_trained(llama_folder: Path, tmp_path: Path) -> None:
    text = inputs(tmp_path, llama_folder, lines({"input_ids": [70, 71, 72], "labels": [-100, 71, 72]})).describe()[0]
    assert "no row trains the end-of-sequence token" in text
    assert re.search(r"first row, trained tokens in « »: .«..»", text)
    good = inputs(tmp_path, llama_folder, lines(json.loads(GOOD))).describe()[0]
    assert "«a</s>»" in good
    assert "end-of-sequence" not in good


@pytest.mark.reliability("R25")
def test_padding_that_is_the_end_is_told_and_leaves_the_end_trained(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(json.loads(GOOD), {"prompt": "q", "completion": "abc"}))
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    data = load(path, tokenizer)
    assert "padding is the end-of-sequence token" in data.describe()
    batch = Collator(tokenizer)([data[0], data[1]])
    for row in range(2):
        attended = batch["attention_mask"][row].bool()
        assert batch["labels"][row][attended][-1] == tokenizer.eos_token_id
        assert (batch["labels"][row][~attended] == -100).all()


@pytest.mark.reliability("R20")
def test_rejected_rows_of_an_update_stand_in_one_file(llama_folder: Path, tmp_path: Path) -> None:
    files = [rows_file(tmp_path / folder, "rows") for folder in ("new", "old")]
    for file in files:
        with Path(file).open("a") as handle:
            handle.write("{}\n")
    options = {"retention_file": [files[1]], "skip_invalid_rows": True, "save_strategy": "no"}
    record, told = update(llama_folder, tmp_path / "out", files[0], **options)
    entries = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"], entry["original"]) for entry in entries] == [
        (file, 25, "{}") for file in files
    ]
    assert any("1 of 25 rows were rejected: other format (1)" in line or "missing field" in line for line in told)
    assert record["data"]["train"]["rejected"] == 1


@pytest.mark.reliability("R26")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: s\nversion: 1\ndescription: d\ntaskz: []\n", r"unknown field taskz\. Did you mean 'tasks'\?"),
        (
            "name: s\nversion: 1\ndescription: d\ntasks: [{name: a, train_file: b, tset_file: c}]\n",
            r"unknown field tasks\.0\.tset_file\. Did you mean 'test_file'\?",
        ),
    ],
)
def test_a_misspelt_field_of_a_stream_is_told_with_the_right_one(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "stream.yaml"
    path.write_text(text)
    with pytest.raises(LoricaError, match=re.escape(str(path)) + ": " + message):
        read_stream(path)


@pytest.mark.reliability("R26")
def test_a_misspelt_field_of_a_plan_is_told_with_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"entries": [{"name": "a", "shape": [2, 2], "k": 1, "constrain": "input"}]}))
    with pytest.raises(LoricaError, match=r"entries\.0\.constrain: .*\. Did you mean 'constraint'\?"):
        Plan.load(path)
