"""A tokenizer seen as what the encoder needs: exact boundaries, its own first and last tokens, control tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import jinja2

from lorica.data.example import Span
from lorica.errors import LoricaError

_ANCHORS = ("\n", ".", "a")


class Codec:
    """Turn strings into ids without anything being added, dropped or moved.

    ``prefix`` and ``suffix`` are the special ids that the tokenizer puts around a sequence by its own settings
    (Llama: BOS in front; T5: EOS behind; BERT: [CLS] and [SEP]; Qwen: none).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prefix, self.suffix = _frame(tokenizer)
        self._marks_start = "".join(tokenizer.tokenize("a"))[:1] in {"\u2581", "\u0120"}
        special, marks = _special_tokens(tokenizer), _turn_marks(tokenizer)
        self._control = _pattern(special | marks)
        self._unsplit = _pattern(marks - special)

    @property
    def eos(self) -> int:
        """The token that ends a text.

        Raises:
            LoricaError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise LoricaError("the tokenizer has no eos_token, so no answer could end; set tokenizer.eos_token.")
        return int(self.tokenizer.eos_token_id)

    def plain(self, text: str) -> list[int]:
        """Return the ids of text by a user: control tokens written out in it are ordinary characters."""
        first, *rest = self._cut(text)
        return self._ids(first, split_special_tokens=True) + [one for piece in rest for one in self._continued(piece)]

    def markup(self, text: str) -> list[int]:
        """Return the ids of text in which control tokens are meant as such."""
        return self._ids(text, split_special_tokens=False)

    def continuation(self, text: str) -> list[int]:
        """Return the ids of user text that continues a sequence.

        Some tokenizers mark the start of every string with a space; encoded behind an anchor that is then
        taken off, the text gets none.
        """
        return [one for piece in self._cut(text) for one in self._continued(piece)]

    def spans(self, text: str, continued: bool = False) -> tuple[list[int], list[Span]]:
        """Return the ids of markup and the characters (start, end) that each stands for.

        Args:
            continued: the text continues a sequence; see ``continuation``.

        Raises:
            LoricaError: the tokenizer is a slow one, which cannot tell.
        """
        if not self.tokenizer.is_fast:
            raise LoricaError(
                "a loss on parts of a conversation needs a fast tokenizer (tokenizer.json); this one is slow."
            )
        for anchor in _ANCHORS if continued and self._marks_start else ():
            head, (ids, places) = self.markup(anchor), self._spans(anchor + text)
            if ids[: len(head)] == head:
                size = len(anchor)
                return ids[len(head) :], [(start - size, end - size) for start, end in places[len(head) :]]
        return self._spans(text)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def has_control_token(self, text: str) -> bool:
        """Tell whether a special token of the tokenizer is written out in the text."""
        return self._control.search(text) is not None

    def control_tokens(self, text: str) -> list[str]:
        """Return the special tokens that are written out in the text."""
        return self._control.findall(text)

    def replace_control_tokens(self, text: str, stand_ins: Mapping[str, str]) -> str:
        """Return the text with each character of a control token replaced by the token's stand-in."""
        return self._control.sub(lambda match: stand_ins[match.group()] * len(match.group()), text)

    def _cut(self, text: str) -> list[str]:
        """Cut text behind the first character of each turn mark that is no special token, so that it stays plain."""
        cuts = [0, *(match.start() + 1 for match in self._unsplit.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(cuts)]

    def _continued(self, text: str) -> list[int]:
        for anchor in _ANCHORS if self._marks_start else ():
            head, both = (self._ids(one, split_special_tokens=True) for one in (anchor, anchor + text))
            if both[: len(head)] == head:
                return both[len(head) :]
        return self._ids(text, split_special_tokens=True)

    def _spans(self, text: str) -> tuple[list[int], list[Span]]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]

    def _ids(self, text: str, split_special_tokens: bool) -> list[int]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
        )
        return list(encoded["input_ids"])


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for at in range(len(full) - len(bare) + 1):
        if bare and full[at : at + len(bare)] == bare:
            return full[:at], full[at + len(bare) :]
    return [], []


def _special_tokens(tokenizer: Any) -> set[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {*added, *tokenizer.all_special_tokens} - {""}


def _turn_marks(tokenizer: Any) -> set[str]:
    """Return the added tokens that the chat template writes around turns; some tokenizers call them ordinary."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if not added or not getattr(tokenizer, "chat_template", None):
        return set()
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError):
        return set()
    return {token for token in added if len(token) > 1 and not token.isspace() and token in rendered}


def _pattern(tokens: set[str]) -> re.Pattern[str]:
    """Return what finds any of some tokens, the longest first; without any it finds nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)")
