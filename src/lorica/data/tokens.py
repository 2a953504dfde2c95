"""A tokenizer seen as what the encoder needs: exact boundaries, its own first and last tokens, control tokens."""

from __future__ import annotations

import re
from typing import Any

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
        self._control = _control_pattern(tokenizer)

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
        return self._ids(text, split_special_tokens=True)

    def markup(self, text: str) -> list[int]:
        """Return the ids of text in which control tokens are meant as such."""
        return self._ids(text, split_special_tokens=False)

    def continuation(self, text: str) -> list[int]:
        """Return the ids of user text that continues a sequence.

        Some tokenizers mark the start of every string with a space; encoded behind an anchor that is then
        taken off, the text gets none.
        """
        if self._marks_start:
            for anchor in _ANCHORS:
                head, both = self.plain(anchor), self.plain(anchor + text)
                if both[: len(head)] == head:
                    return both[len(head) :]
        return self.plain(text)

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of markup and the characters (start, end) that each stands for.

        Raises:
            LoricaError: the tokenizer is a slow one, which cannot tell.
        """
        if not self.tokenizer.is_fast:
            raise LoricaError(
                "a loss on parts of a conversation needs a fast tokenizer (tokenizer.json); this one is slow."
            )
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def has_control_token(self, text: str) -> bool:
        """Tell whether a special token of the tokenizer is written out in the text."""
        return self._control is not None and self._control.search(text) is not None

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


def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    strings = {*added, *tokenizer.all_special_tokens} - {""}
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True)))) if strings else None
