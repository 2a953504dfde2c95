"""Check every row of a file before a model is loaded, and say which rows are wrong and why. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lorica.data.choice import Survey, choose_format, matching
from lorica.data.example import Example, fingerprint, has_empty_prompt
from lorica.data.formats import Format, formats
from lorica.data.reader import Source, open_source
from lorica.data.record import Record, Rejected, RowError
from lorica.errors import LoricaError
from lorica.files import written_aside

SHOWN = 10

Judged = Iterator[Example | Rejected | None]
"""Rows in the order of the file; None: left out."""


@dataclass
class Report:
    """What `validate` found: ``rows_read = len(examples) + rejected + left_out``.

    ``format`` is a format's name; ``sha256`` that of the file's bytes; ``source`` can be read again to see whether it
    changed; ``read`` reads and judges the rows anew; ``reasons`` counts the rejected rows by kind, ``shown`` are the
    first ten as messages; ``notices`` are sentences for the user. Of rejected rows no more is held: a file may have
    nothing else.
    """

    path: str
    format: str
    sha256: str
    source: Source
    read: Callable[[], Judged]
    examples: list[Example] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    empty_prompts: int = 0
    duplicates: int = 0
    left_out: int = 0

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    @property
    def rows_read(self) -> int:
        return len(self.examples) + self.rejected + self.left_out

    def rejected_rows(self) -> Iterator[Rejected]:
        """Read the data again and yield the rows that are not used.

        Raises:
            LoricaError: the data is no longer what was validated.
        """
        yield from (row for row in self.read() if isinstance(row, Rejected))
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raise LoricaError if the data is no longer what was validated."""
        if self.source.sha256() != self.sha256:
            raise LoricaError(f"{self.path}: the data changed after it was checked; run again.")


def validate(
    path: str | Path | Source,
    dataset_format: str | Format | None = None,
    dataset_text_field: str = "text",
    skip_invalid_rows: bool = False,
    *,
    vocab_size: int | None = None,
    seq2seq: bool = False,
    split: str = "train",
    config_name: str | None = None,
) -> Report:
    """Read and check all rows of a file, a folder or a Hub dataset.

    The data is read twice, once for its columns and once for its rows, so that only the examples are held.

    Args:
        path: see `lorica.data.open_source`; or a source that is open already.
        dataset_format: `tokenized`, `messages`, `sharegpt`, `prompt_completion`, `alpaca` or `text`;
            None: the one format that most rows' columns match. Or a format of one's own.
        dataset_text_field: the column of the format `text`.
        skip_invalid_rows: keep the valid rows and report the others instead of raising.
        vocab_size: bound of the ids of `tokenized` rows; None: not checked here.
        seq2seq: labels of `tokenized` rows may differ in length from their input.
        split, config_name: of a Hub dataset.

    Raises:
        LoricaError: the format cannot be told, a row is invalid (the first ten are listed), no row is usable,
            or the data changed while it was read.
    """
    source = open_source(path, split, config_name) if isinstance(path, str | Path) else path
    digest = source.sha256()
    own = dataset_format if isinstance(dataset_format, Format) else None
    table = {} if own else formats(dataset_text_field, vocab_size, seq2seq)
    survey = Survey.of(source, table)
    chosen = own or (choose_format(source.name, survey, table, dataset_format) if survey.rows else None)  # type: ignore[arg-type]
    report = Report(source.name, chosen.name if chosen else "", digest, source, partial(_judged, source, chosen, table))
    _collect(report)
    _require_rows(report, skip_invalid_rows, may_skip=own is None)
    report.check_unchanged()
    report.notices += _notices(report, chosen, survey)
    return report


def write_rejected(reports: Report | Iterable[Report], path: str | Path) -> None:
    """Write the rejected rows as JSON lines: `file`, `line`, `reason`, and `original` or `original_base64`.

    The original of a row above the reader's length limit is cut at that limit. The data is read again, one row at a
    time.

    Raises:
        LoricaError: it is no longer what was validated.
    """
    every = [reports] if isinstance(reports, Report) else reports
    with written_aside(Path(path)) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        for report in every:
            for row in report.rejected_rows():
                file.write(json.dumps(row.as_json(), ensure_ascii=False) + "\n")


def overlap(train: Report, evaluation: Report) -> int:
    """Return how many evaluation rows also stand, with the same content, in the training data."""
    known = {fingerprint(example) for example in train.examples}
    return sum(fingerprint(example) in known for example in evaluation.examples)


def _judged(source: Source, chosen: Format | None, table: dict[str, Format]) -> Judged:
    for record in source.records():
        if isinstance(record, Rejected):
            yield record
        elif chosen is not None:
            try:
                yield _convert(record, chosen, table)
            except RowError as error:
                yield record.rejected(error)


def _convert(record: Record, chosen: Format, table: dict[str, Format]) -> Example | None:
    if not chosen.matches(record.value) and (other := matching(table, frozenset(record.value))):
        raise RowError("other format", f"the row is {' and '.join(other)}, the data is {chosen.name}")
    if chosen.convert is None:
        raise AssertionError(f"format {chosen.name} was chosen but cannot be read")
    return chosen.convert(record.where, record.value)


def _collect(report: Report) -> None:
    seen: set[bytes] = set()
    for row in report.read():
        if row is None:
            report.left_out += 1
        elif isinstance(row, Rejected):
            report.reasons[row.kind] += 1
            if len(report.shown) < SHOWN:
                report.shown.append(str(row))
        else:
            report.examples.append(row)
            report.empty_prompts += has_empty_prompt(row)
            mark = fingerprint(row)
            report.duplicates += mark in seen
            seen.add(mark)


def _require_rows(report: Report, skip_invalid_rows: bool, may_skip: bool) -> None:
    if not report.rows_read:
        raise LoricaError(f"{report.path}: no rows; the data is empty.")
    if report.rejected and not skip_invalid_rows:
        raise LoricaError(_listing(report, may_skip))
    if not report.examples:
        raise LoricaError(f"{report.path}: none of the {report.rows_read} rows can be used: {_told(report.reasons)}.")


def _told(reasons: Counter[str]) -> str:
    return "; ".join(f"{kind} ({count})" for kind, count in reasons.most_common())


def _listing(report: Report, may_skip: bool) -> str:
    shown = [f"  {message}" for message in report.shown]
    if hidden := report.rejected - len(shown):
        shown.append(f"  and {hidden} more")
    advice = "Correct them"
    if report.examples and may_skip:
        advice += f", or set skip_invalid_rows to train on the other {len(report.examples)}"
    total = f"{report.rejected} of {report.rows_read} rows are invalid"
    return "\n".join([f"{report.path}: {total}:", *shown, f"{advice}."])


def _notices(report: Report, chosen: Format | None, survey: Survey) -> list[str]:
    used = {*chosen.required, *chosen.optional} if chosen else set()
    counts: dict[str, Any] = {
        f"rows were rejected: {_told(report.reasons)}": report.rejected,
        "rows have no answer and were left out": report.left_out,
        "rows have an empty prompt": report.empty_prompts,
        "rows repeat an earlier row": report.duplicates,
    }
    notices = [f"{count} of {report.rows_read} {what}" for what, count in counts.items() if count]
    if ignored := survey.columns - used:
        notices.append(f"columns not used: {survey.listed(ignored)}")
    return notices
