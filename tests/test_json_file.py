"""JSON of unknown origin: read within limits, or refused in one line that names the file."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lorica import json_file
from lorica.errors import LoricaError, did_you_mean, one_line
from lorica.json_file import MAX_DEPTH, parse_json, read_json


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "'utf-8' codec can't decode"),
        (b"[" * 10**5, f"nested too deeply, the limit is {MAX_DEPTH} levels"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested too deeply"),
        (b'["\\ud800"]', r"lone surrogate \ud800 in a string"),
        (b"[NaN]", "NaN is no JSON number"),
        (b"1" * 5000, "Exceeds the limit"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(raw: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(raw)
    with pytest.raises(LoricaError) as error:
        read_json(path, "plan")
    assert str(error.value).startswith(f"{path}: not a plan: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_what_json_takes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + b"[" * MAX_DEPTH + '"é\\ud83d\\ude00"'.encode() + b"]" * MAX_DEPTH)
    value = read_json(path, "list")
    for _ in range(MAX_DEPTH):
        (value,) = value
    assert value == "é\U0001f600"
    assert parse_json("[-Infinity]", constants=True) == [float("-inf")]


def test_no_file_and_too_large_a_file_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoricaError, match=r"none\.json: cannot read the record: No such file"):
        read_json(tmp_path / "none.json", "record")
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", 1000)
    with pytest.raises(LoricaError, match="/dev/zero: not a record: over 1,000 bytes"):
        read_json("/dev/zero", "record")
    path = tmp_path / "whole.json"
    path.write_text(json.dumps("x" * 998))
    assert read_json(path, "record") == "x" * 998


def test_text_in_messages_is_one_line_without_anything_unprintable() -> None:
    assert one_line("a\nb\tc\x00d\ud800e\u202ef é") == "a b c\\x00d\\ud800e\\u202ef é"
    assert one_line("x" * 301) == "x" * 300 + " ..."
    assert one_line(["a\n"], 3) == "['a ..."


def test_names_that_are_no_names_have_no_neighbours() -> None:
    started = time.process_time()
    assert did_you_mean("x" * 10**6, ["x" * 10**6 + "y", "prompt"]) == ""
    assert did_you_mean("promt", ["y" * 10**6, "prompt"]) == " Did you mean 'prompt'?"
    assert time.process_time() - started < 1
