"""Conversations through a chat template: the rendered text, and which of its characters are trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from lorica.data.example import Chat, Message, Pair, Span
from lorica.errors import LoricaError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_template(tokenizer: Any) -> bool:
    return bool(tokenizer.chat_template)


def require_template(tokenizer: Any, where: str) -> None:
    if not has_template(tokenizer):
        raise LoricaError(
            f"{where}: a conversation needs a chat template and the tokenizer has none; "
            "set chat_template_path, or use prompt and completion strings."
        )


def render_chat(tokenizer: Any, messages: Sequence[Message], where: str, ask: bool = False) -> str:
    """Return the text of a conversation; ``ask`` adds the header after which the assistant would write."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template comes with the model: in its sandbox it may still raise anything
        raise LoricaError(f"{where}: the chat template refuses this conversation: {error}") from None
    return str(text)


def answer_spans(tokenizer: Any, chat: Chat, whole: str, first: int = 0) -> list[Span]:
    """Return the characters of each assistant turn, its end marker included, from message ``first`` on.

    Each turn starts where the conversation before it, rendered with the header of an answer, ends.

    Raises:
        LoricaError: the template renders the start of this conversation differently when more follows.
    """
    spans = []
    for i, message in enumerate(chat.messages):
        if message["role"] == "assistant" and i >= first:
            start = prefix_length(tokenizer, chat, whole, i, ask=True)
            spans.append((start, prefix_length(tokenizer, chat, whole, i + 1)))
    return spans


def prefix_length(tokenizer: Any, chat: Chat, whole: str, turns: int, ask: bool = False) -> int:
    """Return how many characters of ``whole`` the first ``turns`` messages make up."""
    part = render_chat(tokenizer, chat.messages[:turns], chat.where, ask)
    if not whole.startswith(part):
        raise LoricaError(
            f"{chat.where}: the chat template renders the first {turns} messages differently when more follow, so "
            "answers cannot be told from prompts; mark them with {% generation %} in a template given by "
            "chat_template_path, or set assistant_only_loss and completion_only_loss to false."
        )
    return len(part)


def marks_answers(tokenizer: Any) -> bool:
    """Tell whether the template itself marks what the assistant wrote with ``{% generation %}``."""
    return bool(_GENERATION.search(tokenizer.get_chat_template()))


def template_mask(tokenizer: Any, chat: Chat) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation and which of them the template marks as the assistant's."""
    encoded = tokenizer.apply_chat_template(
        list(chat.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]


def marked_spans(places: Sequence[Span], marks: Sequence[bool]) -> list[Span]:
    """Return the characters (start, end) of each run of marked tokens."""
    runs = (list(run) for mark, run in groupby(zip(places, marks, strict=True), key=itemgetter(1)) if mark)
    return [(run[0][0][0], run[-1][0][1]) for run in runs]


def plain_layout(chat: Chat) -> Pair:
    """Return a conversation as a prompt with headings, for models without a chat template.

    A system message stands alone; a question stands under ``### Instruction:``, an answer under
    ``### Response:``; blank lines between them.
    """
    headings = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    *before, answer = chat.messages
    parts = [headings[message["role"]] + message["content"] for message in before]
    return Pair(chat.where, "\n\n".join([*parts, headings["assistant"]]), answer["content"])
