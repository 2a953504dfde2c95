"""Prompts to which there is no reference answer, read by the rules for training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorica.data.encoder import Encoder
from lorica.data.example import Chat, Pair, has_empty_prompt
from lorica.data.formats import Row, formats
from lorica.data.jsonl import read_lines
from lorica.data.reader import open_source
from lorica.data.record import Rejected, RowError
from lorica.errors import LoricaError, did_you_mean

FIELDS = ("messages", "instruction", "prompt", "conversations")
_ANSWER = {"role": "assistant", "content": "-"}
_TURNS = {
    "messages": ("messages", "role", _ANSWER),
    "conversations": ("sharegpt", "from", {"from": "gpt", "value": "-"}),
}
"""By fields of turns: the format, what of a turn says who speaks, and a turn that answers."""


@dataclass(frozen=True)
class Prompt:
    """What both models are asked: as the judge reads it, and as an example whose answer is a placeholder."""

    text: str
    example: Pair | Chat


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts: a ``.txt`` file with one a line, or rows of any file type of training data.

    A row has ``messages`` or ``conversations`` (an answer at their end is left out), ``instruction`` (and perhaps
    ``input``, ``system``, ``history``), or ``prompt``, a string or messages; whatever answers it has besides is not
    looked at. Messages and instructions go through a model's chat template; a model without one gets them under plain
    headings, as in training. Strings are read by the model as they stand.

    Raises:
        LoricaError: the file is missing, has no prompt, or has a line that is none.
    """
    prompts = _lines(Path(path)) if Path(path).suffix.lower() == ".txt" else _rows(path)
    if not prompts:
        raise LoricaError(f"{path}: no prompt in it")
    return prompts


def prompt_ids(
    prompts: Sequence[Prompt], tokenizer: Any, *, seq2seq: bool, longest: int | None, too_long: str
) -> list[list[int]]:
    """Return the token ids that a model reads of each prompt, up to where it is to answer.

    Args:
        longest: tokens that a prompt may have; None: any number.
        too_long: what the error of a longer one says after its length.

    Raises:
        LoricaError: a prompt is too long, or cannot be put to this model.
    """
    encoder = Encoder(tokenizer, longest or 0, completion_only=None, assistant_only=False, seq2seq=seq2seq)
    found = []
    for prompt in prompts:
        ids = encoder.draft(prompt.example).prompt_ids or []
        if longest is not None and len(ids) > longest:
            raise LoricaError(f"{prompt.example.where}: a prompt of {len(ids)} tokens, {too_long}")
        found.append(ids)
    return found


def _lines(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise LoricaError(f"{path}: no such file")
    prompts = []
    for line in read_lines(path):
        where = f"{path}:{line.number}"
        try:
            text = line.text()
        except RowError as error:
            raise LoricaError(f"{where}: {error}") from None
        if text.strip():
            prompts.append(Prompt(text, Pair(where, text, _ANSWER["content"])))
    return prompts


def _rows(path: str | Path) -> list[Prompt]:
    prompts = []
    for row in open_source(path).records():
        if isinstance(row, Rejected):
            raise LoricaError(str(row))
        try:
            prompts.append(_prompt(row.where, row.value))
        except RowError as error:
            raise LoricaError(f"{row.where}: {error}") from None
    return prompts


def _prompt(where: str, row: Row) -> Prompt:
    """Read a row as the row of training data that it would be with an answer."""
    field = next((name for name in FIELDS if name in row), None)
    if field is None:
        hint = next((hint for hint in (did_you_mean(name, FIELDS) for name in row) if hint), "")
        raise RowError("missing field", f"a prompt is in one of {', '.join(FIELDS)}; found {', '.join(row)}.{hint}")
    value = row[field]
    if field in _TURNS:
        kind, role, answer = _TURNS[field]
        full = row | {field: _answered(value, role, answer)}
    elif field == "instruction":
        kind, full = "alpaca", row | {"output": _ANSWER["content"]}
    else:
        completion: Any = [_ANSWER] if isinstance(value, list) else _ANSWER["content"]
        kind, full = "prompt_completion", {"prompt": value, "completion": completion}
    convert = formats()[kind].convert
    assert convert is not None
    example = convert(where, full)
    assert isinstance(example, Pair | Chat)
    if has_empty_prompt(example):
        raise RowError("empty field", repr(field))
    if isinstance(example, Pair):
        return Prompt(example.prompt, example)
    plain = all(message["role"] != "tool" for message in example.messages)  # which has no plain heading
    return Prompt(_transcript(example), replace(example, prompt_turns=None, plain_layout=plain))


def _answered(turns: Any, role: str, answer: dict[str, str]) -> Any:
    """Return turns with a placeholder in place of the answer at their end, or behind them."""
    if not isinstance(turns, list):
        return turns
    ends = bool(turns) and isinstance(turns[-1], dict) and turns[-1].get(role) == answer[role]
    return [*(turns[:-1] if ends else turns), answer]


def _transcript(chat: Chat) -> str:
    """Return a conversation as the judge reads it, without its answer: a lone request stands as it is."""
    *asked, _ = chat.messages
    if len(asked) == 1:
        return asked[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in asked)
