"""Check every row of a file before a model is loaded, and say which rows are wrong and why. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorica.data.example import Example, fingerprint, has_empty_prompt
from lorica.data.formats import Format, formats
from lorica.data.reader import Source, open_source
from lorica.data.record import Record, Rejected, RowError
from lorica.errors import LoricaError, did_you_mean

SHOWN = 10


@dataclass
class Report:
    """What `validate` found: ``rows_read = len(examples) + len(rejected) + left_out``.

    ``format`` is a format's name; ``sha256`` that of the file's bytes; ``notices`` are sentences for the user;
    ``source`` can be read again to see whether it changed.
    """

    path: str
    format: str
    sha256: str
    source: Source
    examples: list[Example] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    empty_prompts: int = 0
    duplicates: int = 0
    left_out: int = 0

    @property
    def rows_read(self) -> int:
        return len(self.examples) + len(self.rejected) + self.left_out

    @property
    def reasons(self) -> dict[str, int]:
        """Rejected rows per kind of reason, most frequent first."""
        return dict(Counter(row.kind for row in self.rejected).most_common())

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
    columns = _survey(source)
    own = dataset_format if isinstance(dataset_format, Format) else None
    table = {} if own else formats(dataset_text_field, vocab_size, seq2seq)
    chosen = own or (choose_format(source.name, columns, table, dataset_format) if columns else None)  # type: ignore[arg-type]
    report = Report(source.name, chosen.name if chosen else "", digest, source)
    _collect(report, chosen, table)
    _require_rows(report, skip_invalid_rows, may_skip=own is None)
    report.check_unchanged()
    report.notices += _notices(report, chosen, columns)
    return report


def write_rejected(report: Report, path: str | Path) -> None:
    """Write the rejected rows as JSON lines: `file`, `line`, `reason`, and `original` or `original_base64`.

    The original of a row above the reader's length limit is cut at that limit.
    """
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for row in report.rejected:
            file.write(json.dumps(row.as_json(), ensure_ascii=False) + "\n")


def overlap(train: Report, evaluation: Report) -> int:
    """Return how many evaluation rows also stand, with the same content, in the training data."""
    known = {fingerprint(example) for example in train.examples}
    return sum(fingerprint(example) in known for example in evaluation.examples)


def _survey(source: Source) -> Counter[frozenset[str]]:
    return Counter(frozenset(row.value) for row in source.records() if isinstance(row, Record))


def _matching(table: dict[str, Format], columns: frozenset[str]) -> tuple[str, ...]:
    names = tuple(name for name, entry in table.items() if entry.matches(columns))
    # A text column beside another format is that format's source or rendering, not a second data set.
    return tuple(name for name in names if name != "text") or names


def choose_format(
    name: str, columns: Counter[frozenset[str]], table: dict[str, Format], requested: str | None = None
) -> Format:
    """Return the format requested, or the one that the most rows match.

    Args:
        name: of the data, for messages.
        columns: how many rows have each set of columns.

    Raises:
        LoricaError: no format or several match, the data is preference data, or columns are missing everywhere.
    """
    known = [entry.name for entry in table.values() if entry.convert]
    if requested is not None:
        if requested not in known:
            hint = did_you_mean(requested, known)
            raise LoricaError(f"dataset_format {requested!r} is not known.{hint} Known: {', '.join(known)}.")
        _require_columns(name, table[requested], columns)
        return table[requested]
    votes: Counter[tuple[str, ...]] = Counter()
    for names, count in columns.items():
        if match := _matching(table, names):
            votes[match] += count
    if not votes:
        raise LoricaError(_no_match(name, columns, table))
    winner = votes.most_common(1)[0][0]
    if refused := [table[entry].refusal for entry in winner if table[entry].refusal]:
        raise LoricaError(
            f"{name}: {refused[0]} cannot be fine-tuned on directly; keep the preferred answers as "
            "'prompt' and 'completion'."
        )
    if len(winner) > 1:
        raise LoricaError(f"{name}: the columns match {' and '.join(winner)}; set dataset_format to one of them.")
    return table[winner[0]]


def _require_columns(name: str, chosen: Format, columns: Counter[frozenset[str]]) -> None:
    found = sorted(frozenset().union(*columns))
    for column in chosen.required:
        if column not in found:
            raise LoricaError(
                f"{name}: dataset_format {chosen.name!r} needs column {column!r}, which no row has."
                f"{did_you_mean(column, found)} Columns found: {', '.join(found)}."
            )


def _no_match(name: str, columns: Counter[frozenset[str]], table: dict[str, Format]) -> str:
    found = sorted(frozenset().union(*columns))
    usable = [entry for entry in table.values() if entry.convert]
    known = {column for entry in usable for column in entry.required}
    hints = [f" {column!r}:{hint}" for column in found if column not in known and (hint := did_you_mean(column, known))]
    described = "; ".join(f"{entry.name} ({' + '.join(entry.required)})" for entry in usable)
    return (
        f"{name}: no known format matches. Columns found: {', '.join(found) or 'none'}.{''.join(hints)} "
        f"Known formats: {described}. Rename the columns, or name a column of plain text in dataset_text_field."
    )


def _collect(report: Report, chosen: Format | None, table: dict[str, Format]) -> None:
    seen: set[bytes] = set()
    for record in report.source.records():
        if isinstance(record, Rejected) or chosen is None:
            report.rejected += [record] if isinstance(record, Rejected) else []
            continue
        try:
            example = _convert(record, chosen, table)
        except RowError as error:
            report.rejected.append(record.rejected(error))
            continue
        if example is None:
            report.left_out += 1
            continue
        report.examples.append(example)
        report.empty_prompts += has_empty_prompt(example)
        mark = fingerprint(example)
        report.duplicates += mark in seen
        seen.add(mark)


def _convert(record: Record, chosen: Format, table: dict[str, Format]) -> Example | None:
    if not chosen.matches(record.value) and (other := _matching(table, frozenset(record.value))):
        raise RowError("other format", f"the row is {' and '.join(other)}, the data is {chosen.name}")
    if chosen.convert is None:
        raise AssertionError(f"format {chosen.name} was chosen but cannot be read")
    return chosen.convert(record.where, record.value)


def _require_rows(report: Report, skip_invalid_rows: bool, may_skip: bool) -> None:
    if not report.rows_read:
        raise LoricaError(f"{report.path}: no rows; the data is empty.")
    if report.rejected and not skip_invalid_rows:
        raise LoricaError(_listing(report, may_skip))
    if not report.examples:
        counts = "; ".join(f"{kind} ({count})" for kind, count in report.reasons.items())
        raise LoricaError(f"{report.path}: none of the {report.rows_read} rows can be used: {counts}.")


def _listing(report: Report, may_skip: bool) -> str:
    shown = [f"  {row}" for row in report.rejected[:SHOWN]]
    if hidden := len(report.rejected) - len(shown):
        shown.append(f"  and {hidden} more")
    advice = "Correct them"
    if report.examples and may_skip:
        advice += f", or set skip_invalid_rows to train on the other {len(report.examples)}"
    total = f"{len(report.rejected)} of {report.rows_read} rows are invalid"
    return "\n".join([f"{report.path}: {total}:", *shown, f"{advice}."])


def _notices(report: Report, chosen: Format | None, columns: Counter[frozenset[str]]) -> list[str]:
    used = {*chosen.required, *chosen.optional} if chosen else set()
    ignored = sorted(frozenset().union(*columns) - used)
    counts: dict[str, Any] = {
        "rows were rejected: " + "; ".join(f"{k} ({n})" for k, n in report.reasons.items()): len(report.rejected),
        "rows have no answer and were left out": report.left_out,
        "rows have an empty prompt": report.empty_prompts,
        "rows repeat an earlier row": report.duplicates,
    }
    notices = [f"{count} of {report.rows_read} {what}" for what, count in counts.items() if count]
    if ignored:
        notices.append(f"columns not used: {', '.join(ignored[:SHOWN])}{' ...' if ignored[SHOWN:] else ''}")
    return notices
