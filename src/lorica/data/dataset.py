"""The front door: a path in, a checked and tokenised dataset out."""

from __future__ import annotations

import copy
import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from lorica.data.encode import EncodeSummary, TruncationPolicy, count_trained, encode
from lorica.data.encoder import Encoded
from lorica.data.example import IGNORED_LABEL
from lorica.data.tokens import Codec
from lorica.data.validate import Report, validate, write_rejected

Kind = Literal["causal", "seq2seq", "classifier"]


class EncodedDataset(Dataset[dict[str, list[int]]]):
    """Tokenised rows; ``dataset[i]`` is ``{"input_ids": [...], "labels": [...]}``.

    Attributes:
        examples: the rows with `prompt_ids`, `answer`, `choices` and `source`, in the same order.
        kind: of the model that the rows are for.
        format: the dataset format.
        summary: counts, hash and notices, plain data for the run record.
        sha256: of the file's bytes.
        rendered: the first row as text, trained tokens in « ».
    """

    def __init__(
        self, examples: list[Encoded], report: Report, counts: EncodeSummary, rendered: str, kind: Kind = "causal"
    ) -> None:
        self.examples = examples
        self.kind = kind
        self.format = report.format
        self.sha256 = report.sha256
        self.rendered = rendered
        self.summary: dict[str, Any] = {
            "path": report.path,
            "format": report.format,
            "sha256": report.sha256,
            "rows_read": report.rows_read,
            "rejected": report.rejected,
            "reasons": dict(report.reasons.most_common()),
            "empty_prompts": report.empty_prompts,
            "duplicates": report.duplicates,
            "left_out": report.left_out,
            **counts.as_dict(),
            "notices": report.notices + counts.notices,
        }

    def digest(self, *, scored: bool = False) -> str:
        """Return the SHA-256 of the rows as tokens: of what is trained, which templates and tokenizers decide too.

        Args:
            scored: also of the prompts that answers are written to.
        """
        found = hashlib.sha256()
        for row in self.examples:
            for ids in (row.input_ids, row.labels, *([row.prompt_ids or []] if scored else [])):
                found.update(array("q", (len(ids), *ids)))
        return found.hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index].features

    def where(self, index: int) -> str:
        """Return the file and line of a row."""
        return self.examples[index].where

    def subset(self, indices: Sequence[int]) -> EncodedDataset:
        """Return some of the rows, in the order given; the summary counts what is trained in them."""
        part = copy.copy(self)
        part.examples = [self.examples[index] for index in indices]
        tokens = [len(row.input_ids) + (len(row.labels) if self.kind == "seq2seq" else 0) for row in part.examples]
        trained = [count_trained(row.labels, self.kind != "causal") for row in part.examples]
        note = f"{len(part)} of {len(self)} rows taken"
        part.summary = self.summary | {
            "kept": len(part),
            "tokens": sum(tokens),
            "trained_tokens": sum(trained),
            "notices": [*self.summary["notices"], note],
        }
        return part

    def describe(self) -> str:
        """Return the lines printed before training: what was read, what is trained, and one row."""
        s = self.summary
        lines = [
            f"{s['path']}: {s['kept']} of {s['rows_read']} rows, format {s['format']}, sha256 {s['sha256'][:12]}",
            f"loss on: {s['loss']}; {s['trained_tokens']} of {s['tokens']} tokens are trained",
            *(f"notice: {notice}" for notice in s["notices"]),
            f"first row, trained tokens in « »: {self.rendered}",
        ]
        return "\n".join(lines)


def load(
    path: str | Path,
    tokenizer: Any,
    *,
    dataset_format: str | None = None,
    dataset_text_field: str = "text",
    skip_invalid_rows: bool = False,
    rejected_file: str | Path | None = None,
    split: str = "train",
    config_name: str | None = None,
    max_length: int = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    truncation_policy: TruncationPolicy = "truncate",
    seq2seq: bool = False,
    validated: Report | None = None,
) -> EncodedDataset:
    """Validate and encode a file, a folder or a Hub dataset.

    Args:
        rejected_file: where the rows left out by ``skip_invalid_rows`` are written, if there are any.
        validated: the report of an earlier `validate` of ``path`` with the same options; its rows are used, after
            a check that the data is still the same.
        Others: see `validate` and `encode`.

    Raises:
        LoricaError: see `validate` and `encode`.
    """
    if validated is not None:
        validated.check_unchanged()
    report = validated or validate(
        path,
        dataset_format,
        dataset_text_field,
        skip_invalid_rows,
        vocab_size=len(tokenizer),
        seq2seq=seq2seq,
        split=split,
        config_name=config_name,
    )
    if rejected_file is not None and report.rejected:
        write_rejected(report, rejected_file)
    rows, counts = encode(
        report.examples,
        tokenizer,
        max_length,
        completion_only_loss,
        assistant_only_loss,
        truncation_policy,
        seq2seq,
    )
    kind: Kind = "seq2seq" if seq2seq else "causal"
    return EncodedDataset(rows, report, counts, render(rows[0], tokenizer, kind), kind)


def shared_rows(train: EncodedDataset, scored: EncodedDataset) -> int:
    """Return how many of the scored rows are, as a model sees them, also trained on."""
    known = {_content(row) for row in train.examples}
    return sum(_content(row) in known for row in scored.examples)


def _content(row: Encoded) -> bytes:
    return hashlib.sha256(repr((row.input_ids, row.labels)).encode()).digest()[:16]


def render(example: Encoded, tokenizer: Any, kind: Kind = "causal") -> str:
    """Return one row as text with the trained tokens in « »; of an encoder-decoder the source, then the target."""
    codec = Codec(tokenizer)
    if kind == "classifier":
        return f"{codec.decode(example.input_ids)} -> «{example.answer}»"
    if kind == "seq2seq":
        trained = [label for label in example.labels if label != IGNORED_LABEL]
        return f"{codec.decode(example.input_ids)} -> «{codec.decode(trained)}»"
    # The first token is predicted from nothing and so never trained, whatever its label.
    marks = [i > 0 and label != IGNORED_LABEL for i, label in enumerate(example.labels)]
    text, shown, start = "", "", 0
    for end in range(1, len(marks) + 1):
        if end == len(marks) or marks[end] != marks[start]:
            # Decoding from the row's start keeps the spaces that a tokenizer drops at the start of a string.
            so_far = codec.decode(example.input_ids[:end])
            piece = so_far[len(text) :]
            shown += f"«{piece}»" if marks[start] else piece
            text, start = so_far, end
    return shown
