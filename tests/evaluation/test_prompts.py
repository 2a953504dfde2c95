"""Prompt files: each kind of row becomes what the model is asked and what the judge reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorica.data.example import Chat, Pair
from lorica.errors import LoricaError
from lorica.evaluation.prompts import read_prompts


def read(tmp_path: Path, *rows: Any) -> list[Any]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_prompts(path)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWhat is it?\r\n\n  Name {it}. \n".encode())
    found = read_prompts(path)
    assert [prompt.text for prompt in found] == ["What is it?", "  Name {it}. "]
    assert all(isinstance(prompt.example, Pair) and prompt.example.prompt == prompt.text for prompt in found)
    assert found[1].example.where == f"{path}:3"


def test_each_kind_of_row_is_read(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {"prompt": "Say", "completion": "left out"},
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"messages": [turn("system", "Be brief."), turn("user", "Hello")]},
        {"messages": [turn("user", "Hello"), turn("assistant", "left out")]},
        {"prompt": [turn("user", "Hi"), turn("assistant", "Hi."), turn("user", "Again")]},
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "left out"}]},
    )
    assert [prompt.text for prompt in found] == [
        "Say", "Add\n1 2", "system: Be brief.\n\nuser: Hello", "Hello", "user: Hi\n\nassistant: Hi.\n\nuser: Again",
        "system: Be brief.\n\nuser: Hello", "Hello",
    ]  # fmt: skip
    assert isinstance(found[0].example, Pair)
    assert all(isinstance(prompt.example, Chat) and prompt.example.plain_layout for prompt in found[1:])
    assert not any("left out" in repr(prompt) for prompt in found)


def test_a_json_array_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('[{"prompt": "a"},\n {"prompt": "b"}]')
    assert [prompt.text for prompt in read_prompts(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "x"}, r"prompts.jsonl:1: missing field: .* found promt. Did you mean 'prompt'"),
        ({"text": "x"}, "a prompt is in one of messages, instruction, prompt, conversations; found text"),
        ({"prompt": " "}, "empty field: 'prompt'"),
        ({"prompt": 3}, "field 'prompt': expected a string, got a number"),
        ({"prompt": None}, "missing field: 'prompt' is null"),
        ({"messages": []}, "empty field: 'messages'"),
        ({"messages": "hello"}, "expected a list"),
        ({"messages": [turn("assistant", "hello")]}, "empty field: 'messages'"),
        ({"messages": [turn("bot", "hello")]}, "unknown role"),
        ({"instruction": ""}, "empty field: 'instruction'"),
        (["prompt"], "a row is a JSON object"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        read(tmp_path, row)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "no prompt in it"),
        ("p.jsonl", b"", "no prompt in it"),
        ("p.txt", b"a\n\xff", r"p.txt:2: invalid UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{', r"p.jsonl:2: malformed JSON"),
        ("p.doc", b"x", "file type '.doc' is not known"),
    ],
)
def test_a_file_without_prompts_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoricaError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl"])
def test_a_missing_file_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoricaError, match="no such file"):
        read_prompts(tmp_path / name)
