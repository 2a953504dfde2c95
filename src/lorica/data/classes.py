"""Examples for a sequence classifier: a text in, one of the known classes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lorica.data.cutting import cut_left, shorten
from lorica.data.encode import EncodeSummary
from lorica.data.encoder import Encoded
from lorica.data.example import Example, Pair
from lorica.data.tokens import Codec
from lorica.errors import LoricaError


def encode_classes(
    examples: Iterable[Example], tokenizer: Any, labels: Sequence[str], max_length: int
) -> tuple[list[Encoded], EncodeSummary]:
    """Return examples as the tokenizer's own encoding of the prompt, with the class as the only label.

    Args:
        examples: prompts with completions that are classes, blanks at both ends aside.
        labels: all classes, in the order of the model's outputs.
        max_length: in tokens, with what the tokenizer puts around a text. Longer prompts lose the end of their
            elastic part, else their start.

    Raises:
        LoricaError: an example has no answer, or one that is no class.
    """
    codec, numbers = Codec(tokenizer), {label: number for number, label in enumerate(labels)}
    summary, rows = EncodeSummary(loss="class"), []
    room = max_length - len(codec.prefix) - len(codec.suffix)
    for example in examples:
        pair = _with_class(example, numbers)
        fitted = shorten(pair, lambda text: len(codec.plain(text)) <= room)
        whole = [*codec.prefix, *codec.plain(fitted.prompt), *codec.suffix]
        ids = cut_left(whole, len(codec.prefix), len(codec.suffix), max_length)
        label = pair.completion.strip()
        choices = tuple(choice.strip() for choice in pair.choices)
        rows.append(Encoded(pair.where, ids, [numbers[label]], ids, label, choices, pair.source))
        summary.truncated += len(ids) < len(whole)
        summary.shortened += fitted != pair
        summary.tokens += len(ids)
    summary.rows = summary.kept = summary.trained_tokens = len(rows)
    counts = {"were truncated": summary.truncated, "had the text in their prompt shortened": summary.shortened}
    summary.notices = [f"{count} of {len(rows)} rows {what}" for what, count in counts.items() if count]
    return rows, summary


def _with_class(example: Example, numbers: dict[str, int]) -> Pair:
    if not isinstance(example, Pair):
        raise LoricaError(f"{example.where}: a classifier needs a prompt and its class; give the task a prompt.")
    if example.completion.strip() not in numbers:
        known = ", ".join(numbers)
        raise LoricaError(f"{example.where}: {example.completion.strip()!r} is no class of the model: {known}.")
    return example
