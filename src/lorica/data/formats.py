"""The dataset formats: which columns make one, what a valid row is, and the example it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lorica.data.example import IGNORED_LABEL, Chat, Example, Message, Pair, Text, Tokens
from lorica.data.record import RowError
from lorica.data.strict_json import type_name

Row = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Format:
    """A dataset format: its name, its columns, and how a row becomes an example.

    ``convert(where, row)`` raises ``RowError`` where the row breaks the format, and returns None for a row to be
    left out. A format without it is known only to be refused, for the reason in ``refusal``.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    convert: Callable[[str, Row], Example | None] | None = None
    refusal: str = ""

    def matches(self, columns: Iterable[str]) -> bool:
        return set(self.required) <= set(columns)


def formats(text_field: str = "text", vocab_size: int | None = None, seq2seq: bool = False) -> dict[str, Format]:
    """Return the known formats by name.

    Args:
        text_field: the column of the format `text`.
        vocab_size: ids of `tokenized` rows must lie below it; None leaves that to the encoder.
        seq2seq: labels of `tokenized` rows are a sequence of their own, of any length.
    """
    tokens = partial(_tokenized, vocab_size=vocab_size, seq2seq=seq2seq)
    text = partial(_text, field=text_field)
    table = [
        Format("tokenized", ("input_ids",), ("labels", "attention_mask", "len"), tokens),
        Format("messages", ("messages",), (), _messages),
        Format("sharegpt", ("conversations",), ("system",), _sharegpt),
        Format("prompt_completion", ("prompt", "completion"), (), _prompt_completion),
        Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
        Format("text", (text_field,), (), text),
        Format("preference", ("chosen", "rejected"), refusal="preference data (columns 'chosen', 'rejected')"),
    ]
    return {entry.name: entry for entry in table}


def _text(where: str, row: Row, field: str) -> Example:
    return Text(where, _string(row, field))


def _prompt_completion(where: str, row: Row) -> Example:
    prompt = _present(row, "prompt")
    if isinstance(prompt, list):
        before, after = _turns(row, "prompt"), _turns(row, "completion")
        _require_answer(after, "completion", len(after) - 1)
        return Chat(where, (*before, *after), prompt_turns=len(before))
    return Pair(where, _string(row, "prompt", empty=True), _string(row, "completion"))


def _alpaca(where: str, row: Row) -> Example:
    instruction, answer = _string(row, "instruction", empty=True), _string(row, "output")
    optional = {name: _string(row, name, empty=True) for name in ("system", "input") if row.get(name) is not None}
    turns = [_message("system", optional["system"])] if optional.get("system") else []
    for question, reply in _history(row):
        turns += [_message("user", question), _message("assistant", reply)]
    user = "\n".join(part for part in (instruction, optional.get("input", "")) if part)
    turns += [_message("user", user), _message("assistant", answer)]
    return Chat(where, tuple(turns), prompt_turns=len(turns) - 1, plain_layout=True)


def _history(row: Row) -> list[list[str]]:
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowError("wrong type", "field 'history': expected a list of [question, answer] strings")
    return history


def _messages(where: str, row: Row) -> Example:
    turns = _turns(row, "messages")
    _require_answer(turns, "messages")
    return Chat(where, tuple(turns))


def _sharegpt(where: str, row: Row) -> Example:
    turns = _turns(row, "conversations", "from", "value", SHAREGPT_ROLES)
    _require_answer(turns, "conversations")
    if row.get("system") is not None and (system := _string(row, "system", empty=True)):
        turns.insert(0, _message("system", system))
    return Chat(where, tuple(turns))


def _turns(
    row: Row, field: str, role_key: str = "role", text_key: str = "content", roles: dict[str, str] | None = None
) -> list[Message]:
    turns = _list(row, field)
    if not turns:
        raise RowError("empty field", repr(field))
    known = roles or {role: role for role in ROLES}
    return [_turn(turn, f"{field}[{i}]", role_key, text_key, known) for i, turn in enumerate(turns)]


def _turn(turn: Any, name: str, role_key: str, text_key: str, roles: dict[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise RowError("wrong type", f"{name}: expected an object, got {type_name(turn)}")
    if turn.get("tool_calls"):
        raise RowError("tool call", f"{name}: 'tool_calls' are not supported; write the call into {text_key!r}")
    role = _string(turn, role_key, prefix=f"{name}.")
    if role not in roles:
        raise RowError("unknown role", f"{name}: {role!r}; known roles are {', '.join(roles)}")
    is_answer = roles[role] == "assistant"
    return _message(roles[role], _string(turn, text_key, empty=not is_answer, prefix=f"{name}."))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _require_answer(turns: Sequence[Message], field: str, at: int | None = None) -> None:
    """Demand an assistant turn: anywhere, or at the position given."""
    if at is not None and turns[at]["role"] != "assistant":
        raise RowError(
            "no assistant turn", f"{field}[{at}] is {turns[at]['role']!r}, the last turn must be 'assistant'"
        )
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError("no assistant turn", f"in the {len(turns)} turns {field}[0] to {field}[{len(turns) - 1}]")


def _tokenized(where: str, row: Row, vocab_size: int | None, seq2seq: bool) -> Example:
    ids = _ids(row, "input_ids", vocab_size)
    labels = _ids(row, "labels", vocab_size, IGNORED_LABEL) if row.get("labels") is not None else list(ids)
    mask = _ids(row, "attention_mask", 2) if row.get("attention_mask") is not None else [1] * len(ids)
    if len(mask) != len(ids):
        raise RowError("unequal lengths", f"{len(ids)} input_ids, {len(mask)} attention_mask")
    if len(labels) != len(ids) and not seq2seq:
        raise RowError("unequal lengths", f"{len(ids)} input_ids, {len(labels)} labels")
    if not seq2seq:
        labels = [label for label, kept in zip(labels, mask, strict=True) if kept]
    if all(label == IGNORED_LABEL for label in labels):
        raise RowError("nothing to train", f"every label is {IGNORED_LABEL}")
    return Tokens(where, tuple(i for i, kept in zip(ids, mask, strict=True) if kept), tuple(labels))


def _ids(row: Row, field: str, size: int | None, also: int | None = None) -> list[int]:
    ids = _list(row, field)
    if not ids:
        raise RowError("empty field", repr(field))
    for at, value in enumerate(ids):
        if type(value) is not int:
            raise RowError("wrong type", f"{field}[{at}]: expected an integer, got {type_name(value)}")
        if value != also and not 0 <= value < (size if size is not None else value + 1):
            kind = "id outside the vocabulary" if field != "attention_mask" else "wrong value"
            limit = "" if size is None else f", expected 0 to {size - 1}"
            raise RowError(kind, f"{field}[{at}] is {value}{limit}")
    return ids


def _present(row: Row, name: str, prefix: str = "") -> Any:
    if row.get(name) is None:
        raise RowError("missing field", f"'{prefix}{name}'" + (" is null" if name in row else ""))
    return row[name]


def _string(row: Row, name: str, empty: bool = False, prefix: str = "") -> str:
    value = _present(row, name, prefix)
    if not isinstance(value, str):
        raise RowError("wrong type", f"field '{prefix}{name}': expected a string, got {type_name(value)}")
    if not empty and not value.strip():
        raise RowError("empty field", f"'{prefix}{name}'")
    return value


def _list(row: Row, name: str) -> list[Any]:
    value = _present(row, name)
    if not isinstance(value, list):
        raise RowError("wrong type", f"field {name!r}: expected a list, got {type_name(value)}")
    return value
