"""Conversations whose contents cannot open a turn: a control token written out by an author stays plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lorica.data.example import Chat, Span
from lorica.data.tokens import Codec
from lorica.errors import LoricaError

_STAND_INS = range(0xE000, 0xF900)
"""Characters for private use: no text has them all."""


@dataclass(frozen=True)
class Shield:
    """A conversation in whose contents each control token is covered by as many stand-ins.

    The template sees the stand-ins, so what it renders has all characters in their places, and every control token in
    it is the template's own. Token by token the stand-ins are then put back as the plain text that they cover.

    Attributes:
        chat: the conversation with stand-ins; the one that came in where it holds no control token.
        covered: the control token of each stand-in.
    """

    chat: Chat
    covered: Mapping[str, str]
    codec: Codec

    @classmethod
    def of(cls, chat: Chat, codec: Codec) -> Shield:
        """Cover the control tokens of a conversation.

        Raises:
            LoricaError: there are some, and the tokenizer is a slow one.
        """
        contents = [message["content"] for message in chat.messages]
        tokens = sorted({token for content in contents for token in codec.control_tokens(content)})
        if not tokens:
            return cls(chat, {}, codec)
        if not codec.tokenizer.is_fast:
            raise LoricaError(
                f"{chat.where}: holds the control token {tokens[0]!r} as text, which only a fast tokenizer "
                "(tokenizer.json) can keep apart from the template's own; take it out."
            )
        used = set[str]().union(*contents)
        free = (char for char in map(chr, _STAND_INS) if char not in used)
        stand_ins = dict(zip(tokens, free, strict=False))
        messages = [
            {**message, "content": codec.replace_control_tokens(message["content"], stand_ins)}
            for message in chat.messages
        ]
        covered = {stand_in: token for token, stand_in in stand_ins.items()}
        return cls(replace(chat, messages=tuple(messages)), covered, codec)

    def ids(self, rendered: str) -> list[int]:
        """Return the ids of the conversation, or a part of it, as it was rendered."""
        return self.spans(rendered)[0] if self.covered else self.codec.markup(rendered)

    def spans(self, rendered: str) -> tuple[list[int], list[Span]]:
        """Return the ids and the characters (start, end) that each stands for, of a covered token all of them."""
        ids: list[int] = []
        places: list[Span] = []
        for start, piece in self._pieces(rendered):
            if token := self.covered.get(piece[:1]):
                found = self.codec.continuation((token * len(piece))[: len(piece)])
                places += [(start, start + len(piece))] * len(found)
            else:
                found, inside = self.codec.spans(piece, continued=start > 0)
                places += [(start + left, start + right) for left, right in inside]
            ids += found
        return ids, places

    def _pieces(self, rendered: str) -> Iterator[tuple[int, str]]:
        """Yield the stretches of one stand-in and what lies between them, with their places."""
        if not self.covered:
            yield 0, rendered
            return
        pattern = re.compile(rf"([{''.join(self.covered)}])\1*|[^{''.join(self.covered)}]+")
        yield from ((match.start(), match.group()) for match in pattern.finditer(rendered))
