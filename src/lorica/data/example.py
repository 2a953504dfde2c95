"""What a row becomes, whatever its format: text, a prompt with its completion, a conversation, or token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

Message = dict[str, str]
Span = tuple[int, int]
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Text:
    """Plain text, trained from end to end."""

    where: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion that follows it, character for character.

    ``elastic``: characters (start, end) of the prompt that may be cut at their end where it is too long.
    ``choices``: all completions there are, for scoring; none: any. ``source``: the part of the prompt that the
    completion is to be compared with, for scoring.
    """

    where: str
    prompt: str
    completion: str
    elastic: Span | None = None
    choices: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Chat:
    """A conversation. The first ``prompt_turns`` messages are prompt; None: the row has no such boundary.

    ``plain_layout``: may be laid out without a chat template (`alpaca` rows, for base models).
    """

    where: str
    messages: tuple[Message, ...]
    prompt_turns: int | None = None
    plain_layout: bool = False


@dataclass(frozen=True)
class Tokens:
    """Token ids as they are, with a label per id (-100: not trained)."""

    where: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


Example = Text | Pair | Chat | Tokens


def fingerprint(example: Example) -> bytes:
    """Return a digest of an example's content, wherever it stands; equal for duplicates."""
    content = [value for name, value in vars(example).items() if name != "where"]
    return hashlib.sha256(repr(content).encode()).digest()[:16]


def user_texts(example: Example) -> tuple[str, ...]:
    """Return the strings of an example that its author wrote; none for token ids."""
    match example:
        case Text(text=text):
            return (text,)
        case Pair(prompt=prompt, completion=completion):
            return prompt, completion
        case Chat(messages=messages):
            return tuple(message["content"] for message in messages)
    return ()


def has_empty_prompt(example: Example) -> bool:
    """Tell whether nothing but blanks precedes what the model is to write."""
    match example:
        case Pair(prompt=prompt):
            return not prompt.strip()
        case Chat(messages=messages):
            return not any(m["content"].strip() for m in messages if m["role"] != "assistant")
    return False
