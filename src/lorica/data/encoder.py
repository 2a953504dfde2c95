"""One example at a time to token ids and labels, then cut to length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

from lorica.data import chat as chats
from lorica.data.cutting import cut_left, shorten
from lorica.data.example import IGNORED_LABEL, Chat, Example, Pair, Span, Text, Tokens
from lorica.data.shield import Shield
from lorica.data.tokens import Codec
from lorica.errors import LoricaError


@dataclass(frozen=True)
class Encoded:
    """One row ready for the collator.

    ``labels`` holds, per position of ``input_ids``, the token to be predicted there (the model shifts), or -100.
    For an encoder-decoder ``input_ids`` is the source and ``labels`` the target, for a classifier ``labels`` holds
    the class alone. ``prompt_ids`` and ``answer`` serve evaluation: the ids to generate from and the text expected;
    None where a row has no answer (`text`, `tokenized`, a conversation that does not end with the assistant).
    ``choices`` are the answers to choose from, ``source`` what a metric compares an answer with; see `Pair`.
    """

    where: str
    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int] | None = None
    answer: str | None = None
    choices: tuple[str, ...] = ()
    source: str = ""

    @property
    def features(self) -> dict[str, list[int]]:
        return {"input_ids": self.input_ids, "labels": self.labels}


@dataclass
class Draft:
    """A row before its length is looked at. ``boundary``: where the completion starts, None: cut at the end.

    ``head`` and ``tail`` special ids stay at the start and the end of the source when it is cut. ``shortened``: the
    elastic part of the prompt was cut.
    """

    where: str
    ids: list[int]
    labels: list[int]
    boundary: int | None = None
    head: int = 0
    tail: int = 0
    prompt_ids: list[int] | None = None
    answer: str | None = None
    choices: tuple[str, ...] = ()
    source: str = ""
    shortened: bool = False


class Encoder:
    """The options of `encode` bound to a tokenizer; ``loss`` names what the last example's loss is on."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        completion_only: bool | None,
        assistant_only: bool,
        seq2seq: bool,
        max_prompt_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.codec = Codec(tokenizer)
        self.max_prompt_length = max_prompt_length or max_length
        self.max_length = max_length
        self.completion_only = completion_only
        self.assistant_only = assistant_only
        self.seq2seq = seq2seq
        self.loss = ""
        self._lengths: dict[str, int] = {}

    def draft(self, example: Example) -> Draft:
        if isinstance(example, Chat) and example.plain_layout and not chats.has_template(self.tokenizer):
            example = chats.plain_layout(example)
        self.loss = self._loss(example)
        if not isinstance(example, Pair):
            return self._draft(example)
        draft = self._draft(example)
        if example.elastic is not None and (excess := self._prompt_length(draft) - self._room(example)) > 0:
            limit = len(self.codec.plain(example.prompt)) - excess
            fitted = shorten(example, lambda text: len(self.codec.plain(text)) <= limit)
            draft = self._draft(fitted)
            draft.shortened = fitted != example
        draft.choices, draft.source = example.choices, example.source
        return draft

    def _draft(self, example: Example) -> Draft:
        match example:
            case Tokens():
                return self._tokens(example)
            case _ if self.seq2seq:
                return self._source_target(example)
            case Text():
                return self._text(example)
            case Pair():
                return self._pair(example)
            case Chat():
                return self._chat(example)
        assert_never(example)

    def is_long(self, draft: Draft) -> bool:
        longest = max(len(draft.ids), len(draft.labels)) if self.seq2seq else len(draft.ids)
        return longest > self.max_length or self._prompt_length(draft) > self.max_prompt_length

    def _prompt_length(self, draft: Draft) -> int:
        return len(draft.ids) if self.seq2seq else draft.boundary or 0

    def _room(self, pair: Pair) -> int:
        """Return the tokens that a prompt may have, so that the longest of its completions fits behind it."""
        if self.seq2seq:
            return self._source_limit
        longest = max(self._completion_length(text) for text in (pair.completion, *pair.choices))
        return min(self.max_prompt_length, self.max_length - longest)

    def finish(self, draft: Draft) -> Encoded:
        """Cut a draft to ``max_length``."""
        ids, labels, limit = draft.ids, draft.labels, self.max_length
        if self.seq2seq:
            ids, labels = cut_left(ids, draft.head, draft.tail, self._source_limit), labels[:limit]
        else:
            if draft.boundary is not None and (excess := self._excess(draft)) > 0:
                # At least one token of the prompt stays: a completion of nothing is not what is to be learned.
                cut = min(excess, max(draft.boundary - draft.head - 1, 0))
                ids = ids[: draft.head] + ids[draft.head + cut :]
                labels = labels[: draft.head] + labels[draft.head + cut :]
            ids, labels = ids[:limit], labels[:limit]
        # Generation needs room for one token at least, whatever the answer's own length.
        room = self._source_limit if self.seq2seq else min(max(limit - 1, 1), self.max_prompt_length)
        prompt = draft.prompt_ids
        prompt = None if prompt is None else cut_left(prompt, draft.head, draft.tail, room)
        return Encoded(draft.where, ids, labels, prompt, draft.answer, draft.choices, draft.source)

    @property
    def _source_limit(self) -> int:
        return min(self.max_length, self.max_prompt_length)

    def _excess(self, draft: Draft) -> int:
        """Return how many tokens of the prompt are too many."""
        return max(len(draft.ids) - self.max_length, self._prompt_length(draft) - self.max_prompt_length)

    def _loss(self, example: Example) -> str:
        """Name what is trained, refusing options that would have no effect."""
        if self.seq2seq:
            return self._refuse(example, self.completion_only is False or self.assistant_only, "target")
        match example:
            case Tokens():
                return self._refuse(example, bool(self.completion_only or self.assistant_only), "labels as given")
            case Text():
                return self._refuse(example, bool(self.completion_only or self.assistant_only), "whole sequence")
            case Pair():
                loss = "whole sequence" if self.completion_only is False else "completion only"
                return self._refuse(example, self.assistant_only, loss)
            case Chat(prompt_turns=None):
                loss = "assistant turns" if self.assistant_only else "whole sequence"
                return self._refuse(example, bool(self.completion_only), loss)
        if self.assistant_only:
            return "assistant turns" if self.completion_only is False else "assistant turns of the completion"
        return "whole sequence" if self.completion_only is False else "completion only"

    def _refuse(self, example: Example, misfit: bool, loss: str) -> str:
        if misfit:
            raise LoricaError(
                f"{example.where}: completion_only_loss={self.completion_only}, assistant_only_loss="
                f"{self.assistant_only} do not fit this data, whose loss is on: {loss}; leave them out, or use "
                "completion_only_loss with prompts and completions and assistant_only_loss with conversations."
            )
        return loss

    def _completion_length(self, text: str) -> int:
        """Return the tokens of a completion with its EOS; remembered, for most rows share a few."""
        if text not in self._lengths:
            self._lengths[text] = len(self.codec.continuation(text)) + 1
        return self._lengths[text]

    def _tokens(self, example: Tokens) -> Draft:
        size = len(self.tokenizer)
        if (largest := max(*example.input_ids, *example.labels)) >= size:
            raise LoricaError(
                f"{example.where}: token id {largest} lies outside the tokenizer's vocabulary of {size}; "
                "tokenise the data with this model's tokenizer."
            )
        return Draft(example.where, list(example.input_ids), list(example.labels))

    def _text(self, example: Text) -> Draft:
        ids, prefix, eos = self.codec.markup(example.text), self.codec.prefix, [self.codec.eos]
        ids = (prefix if ids[: len(prefix)] != prefix else []) + ids + (eos if ids[-1:] != eos else [])
        return Draft(example.where, ids, list(ids))

    def _pair(self, example: Pair) -> Draft:
        head, prompt = self.codec.prefix, self.codec.plain(example.prompt)
        completion = self.codec.continuation(example.completion) if prompt else self.codec.plain(example.completion)
        target = [*completion, self.codec.eos]
        start = [*head, *prompt]
        unlabelled = [IGNORED_LABEL] * len(start) if self.loss == "completion only" else start
        ids, labels = [*start, *target], [*unlabelled, *target]
        return Draft(example.where, ids, labels, len(start), len(head), 0, start, example.completion)

    def _chat(self, example: Chat) -> Draft:
        chats.require_template(self.tokenizer, example.where)
        shield = Shield.of(example, self.codec)
        ids, trained, boundary = self._chat_mask(shield)
        ends_with_answer = example.messages[-1]["role"] == "assistant"
        self._close(ids, trained, ends_with_answer or self.loss == "whole sequence")
        labels = [token if mark else IGNORED_LABEL for token, mark in zip(ids, trained, strict=True)]
        head = int(ids[:1] == [self.tokenizer.bos_token_id])
        draft = Draft(example.where, ids, labels, boundary, head)
        if ends_with_answer:
            draft.prompt_ids, draft.answer = self._asked(shield), example.messages[-1]["content"]
        return draft

    def _asked(self, shield: Shield) -> list[int]:
        """Return the ids of a conversation up to its last answer."""
        messages, where = shield.chat.messages[:-1], shield.chat.where
        return shield.ids(chats.render_chat(self.tokenizer, messages, where, ask=True))

    def _chat_mask(self, shield: Shield) -> tuple[list[int], list[bool], int | None]:
        """Return a conversation's ids, which of them are trained, and where its completion starts."""
        example = shield.chat
        whole = chats.render_chat(self.tokenizer, example.messages, example.where)
        if self.loss == "whole sequence":
            ids = shield.ids(whole)
            return ids, [True] * len(ids), None
        ids, places = shield.spans(whole)
        boundary, turns = None, example.prompt_turns
        if turns is not None:
            start = chats.prefix_length(self.tokenizer, example, whole, turns, ask=True)
            boundary = next((i for i, place in enumerate(places) if place[1] > start), len(ids))
        if self.loss == "completion only":
            trained = [i >= (boundary or 0) for i in range(len(ids))]
        else:
            first = (boundary or 0) if self.loss.endswith("completion") else 0
            trained = [mark and i >= first for i, mark in enumerate(self._answer_mask(shield, whole, ids, places))]
        return ids, trained, boundary

    def _answer_mask(self, shield: Shield, whole: str, ids: list[int], places: list[Span]) -> list[bool]:
        spans = None
        if chats.marks_answers(self.tokenizer):
            marked_ids, marks = chats.template_mask(self.tokenizer, shield.chat)
            if marked_ids == ids:
                return marks
            spans = self._marked_spans(shield, whole, marked_ids, marks)
        if spans is None:
            spans = chats.answer_spans(self.tokenizer, shield.chat, whole)
        return [any(start < end and left < stop for left, end in spans) for start, stop in places]

    def _marked_spans(self, shield: Shield, whole: str, marked_ids: list[int], marks: list[bool]) -> list[Span] | None:
        """Return the characters that a template marked, of a conversation with stand-ins; None: it cannot be told."""
        if not shield.covered:
            return None
        bare_ids, places = self.codec.spans(whole)
        return chats.marked_spans(places, marks) if marked_ids == bare_ids else None

    def _close(self, ids: list[int], trained: list[bool], train: bool) -> None:
        """Have the sequence end with EOS; the template's own counts, also with blanks behind it."""
        eos = self.codec.eos
        last = len(ids) - 1 - ids[::-1].index(eos) if eos in ids else None
        if last is None or self.codec.decode(ids[last + 1 :]).strip():
            ids.append(eos)
            trained.append(train)
        else:
            trained[last] = trained[last] or train

    def _source_target(self, example: Text | Pair | Chat) -> Draft:
        codec = self.codec
        match example:
            case Pair():
                prompt, answer = codec.plain(example.prompt), example.completion
            case Chat() if example.messages[-1]["role"] == "assistant":
                chats.require_template(self.tokenizer, example.where)
                prompt, answer = self._asked(Shield.of(example, codec)), example.messages[-1]["content"]
            case _:
                raise LoricaError(
                    f"{example.where}: an encoder-decoder model needs a source and a target, and this row has no "
                    "answer at its end; use prompts with completions."
                )
        source = [*codec.prefix, *prompt, *codec.suffix]
        target = [*codec.plain(answer), codec.eos]
        head, tail = len(codec.prefix), len(codec.suffix)
        return Draft(example.where, source, target, None, head, tail, source, answer)
