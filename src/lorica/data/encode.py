"""Examples to token ids and labels: what the model reads, and which tokens it is trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lorica.data.encoder import Encoded, Encoder
from lorica.data.example import IGNORED_LABEL, Example, Text, user_texts
from lorica.errors import LoricaError, did_you_mean

TruncationPolicy = Literal["truncate", "drop", "error"]


@dataclass
class EncodeSummary:
    """Counts of one `encode` call: ``rows = kept + dropped + prompt_fills_context + nothing_to_train``.

    ``truncated`` rows and ``shortened`` ones (the elastic part of the prompt alone was cut) are among the kept.
    ``tokens`` counts ``input_ids`` (encoder-decoder: labels too), ``trained_tokens`` those with a loss. ``loss`` names
    what is trained.
    """

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    shortened: int = 0
    dropped: int = 0
    prompt_fills_context: int = 0
    nothing_to_train: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    control_token_rows: int = 0
    loss: str = ""
    notices: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def encode(
    examples: Iterable[Example],
    tokenizer: Any,
    max_length: int = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    truncation_policy: TruncationPolicy = "truncate",
    seq2seq: bool = False,
    max_prompt_length: int | None = None,
) -> tuple[list[Encoded], EncodeSummary]:
    """Tokenise examples and mark what is trained.

    A prompt and its completion are encoded apart and joined, with nothing between them; EOS follows every text,
    completion and conversation that was not cut at its end, and is trained wherever its answer is.

    Control tokens that stand in prompts, completions and the contents of messages are read as plain characters, so that
    no author can open a turn; in `text`, which may hold conversations that are rendered already, they act as such.

    Args:
        examples: of one format.
        max_length: in tokens, of a whole row; encoder-decoder: of the source and of the target.
        completion_only_loss: None: True for prompts with completions (`prompt_completion`, `alpaca`), else the
            whole sequence.
        assistant_only_loss: of conversations, train the assistant's turns only.
        truncation_policy: of longer rows. "truncate": prompts with completions lose the start of the prompt
            (BOS and the prompt's last token stay) and, where that is not enough, the end of the completion; text,
            and conversations without such a prompt or trained as a whole, lose their end. "drop": they are left
            out. "error": they raise. A prompt with an elastic part is never too long: that part is cut at its end.
        seq2seq: for encoder-decoder models; what precedes the last answer is the source, the answer the target.
        max_prompt_length: in tokens, of what precedes a completion; None: what ``max_length`` leaves.

    Raises:
        LoricaError: an option does not fit the format, the tokenizer lacks a chat template or an EOS token, a
            token id lies outside its vocabulary, or no row is left to train on.
    """
    _check_options(max_length, truncation_policy)
    encoder = Encoder(tokenizer, max_length, completion_only_loss, assistant_only_loss, seq2seq, max_prompt_length)
    summary, kept, too_long, flagged = EncodeSummary(), [], [], None
    for example in examples:
        summary.rows += 1
        if any(map(encoder.codec.has_control_token, user_texts(example))):
            summary.control_token_rows += 1
            flagged = flagged or example
        draft = encoder.draft(example)
        if long := encoder.is_long(draft):
            too_long.append(f"  {draft.where}: {len(draft.ids)} tokens")
        if long and truncation_policy != "truncate":
            summary.dropped += 1
            continue
        row = encoder.finish(draft)
        if not (trained := count_trained(row.labels, seq2seq)):
            summary.prompt_fills_context += long
            summary.nothing_to_train += not long
            continue
        summary.truncated += long
        summary.shortened += draft.shortened
        summary.tokens += len(row.input_ids) + (len(row.labels) if seq2seq else 0)
        summary.trained_tokens += trained
        kept.append(row)
    summary.kept, summary.loss = len(kept), encoder.loss
    _check_outcome(summary, too_long, max_length, truncation_policy)
    summary.notices = _notices(summary, kept, encoder, flagged)
    return kept, summary


def count_trained(labels: list[int], seq2seq: bool = False) -> int:
    """Return how many labels carry a loss; a decoder predicts nothing at the first position."""
    return sum(label != IGNORED_LABEL for label in (labels if seq2seq else labels[1:]))


def _check_options(max_length: int, policy: str) -> None:
    if max_length < 1:
        raise LoricaError(f"max_length is {max_length}; give the number of tokens of a row, at least 1.")
    if policy not in (known := get_args(TruncationPolicy)):
        hint = did_you_mean(policy, known)
        raise LoricaError(f"truncation_policy {policy!r} is not known.{hint} Known: {', '.join(known)}.")


def _check_outcome(summary: EncodeSummary, too_long: list[str], max_length: int, policy: str) -> None:
    if too_long and policy == "error":
        shown = too_long[:10] + ([f"  and {len(too_long) - 10} more"] if too_long[10:] else [])
        raise LoricaError(
            "\n".join([f"{len(too_long)} of {summary.rows} rows are longer than max_length={max_length}:", *shown])
            + "\nRaise max_length, or set truncation_policy to 'truncate' or 'drop'."
        )
    if not summary.kept:
        rest = f", {summary.nothing_to_train} have nothing to train" if summary.nothing_to_train else ""
        raise LoricaError(
            f"no row is left to train on: of {summary.rows} rows {summary.dropped} are longer than "
            f"max_length={max_length} and were dropped, {summary.prompt_fills_context} have a prompt that fills it"
            f"{rest}; raise max_length, or correct the rows."
        )


def _notices(summary: EncodeSummary, kept: list[Encoded], encoder: Encoder, flagged: Example | None) -> list[str]:
    counts = {
        "were truncated": summary.truncated,
        "had the text in their prompt shortened": summary.shortened,
        "were dropped as too long": summary.dropped,
        "have a prompt that fills max_length and are not trained": summary.prompt_fills_context,
        "have nothing to train": summary.nothing_to_train,
    }
    notices = [f"{count} of {summary.rows} rows {what}" for what, count in counts.items() if count]
    if flagged is not None:
        meaning = "they act as such" if isinstance(flagged, Text) else "they are read as plain characters"
        notices.append(
            f"{summary.control_token_rows} of {summary.rows} rows contain the tokenizer's control tokens as text, "
            f"{flagged.where} first: {meaning}"
        )
    if not any(encoder.codec.eos in row.labels for row in kept):
        notices.append("no row trains the end-of-sequence token: the model will not learn where to stop")
    if getattr(encoder.tokenizer, "pad_token_id", None) == encoder.codec.eos:
        notices.append(
            "padding is the end-of-sequence token: told apart by its place, so the end of rows stays trained"
        )
    return notices
