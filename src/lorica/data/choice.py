"""Which format a file's rows have, told from their columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from lorica.data.formats import Format
from lorica.data.reader import Source
from lorica.data.record import Record
from lorica.errors import LoricaError, did_you_mean, one_line

MAX_COLUMNS = 1000
"""Names of columns that are kept for messages; there may be as many as rows."""

SHOWN = 10


@dataclass
class Survey:
    """The columns of all rows: how many rows match which formats, and the names found."""

    votes: Counter[tuple[str, ...]] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, source: Source, table: dict[str, Format]) -> Survey:
        """Read all rows of a source for their columns."""
        survey = cls()
        known = {column for entry in table.values() for column in (*entry.required, *entry.optional)}
        for row in source.records():
            if isinstance(row, Record):
                names = frozenset(row.value)
                survey.votes[matching(table, names)] += 1
                survey._note(names, known)
        return survey

    def _note(self, names: frozenset[str], known: set[str]) -> None:
        if names <= self.columns:
            return
        self.columns |= names & known
        room = max(MAX_COLUMNS - len(self.columns), 0)
        self.columns.update(sorted(names - self.columns)[:room])

    @property
    def rows(self) -> int:
        return self.votes.total()

    @staticmethod
    def listed(columns: Collection[str]) -> str:
        """Return some names as text, in their order."""
        names = [one_line(name, 60) for name in sorted(columns)]
        return ", ".join(names[:SHOWN]) + (" ..." if names[SHOWN:] else "")


def matching(table: dict[str, Format], columns: frozenset[str]) -> tuple[str, ...]:
    """Return the names of the formats that a row with these columns has."""
    names = tuple(name for name, entry in table.items() if entry.matches(columns))
    # A text column beside another format is that format's source or rendering, not a second data set.
    return tuple(name for name in names if name != "text") or names


def choose_format(name: str, survey: Survey, table: dict[str, Format], requested: str | None = None) -> Format:
    """Return the format requested, or the one that the most rows match.

    Args:
        name: of the data, for messages.
        survey: the columns of its rows.

    Raises:
        LoricaError: no format or several match, the data is preference data, or columns are missing everywhere.
    """
    known = [entry.name for entry in table.values() if entry.convert]
    if requested is not None:
        if requested not in known:
            hint = did_you_mean(requested, known)
            raise LoricaError(f"dataset_format {requested!r} is not known.{hint} Known: {', '.join(known)}.")
        _require_columns(name, table[requested], survey)
        return table[requested]
    matched = Counter({names: count for names, count in survey.votes.items() if names})
    if not matched:
        raise LoricaError(_no_match(name, survey, table))
    winner = matched.most_common(1)[0][0]
    if refused := [table[entry].refusal for entry in winner if table[entry].refusal]:
        raise LoricaError(
            f"{name}: {refused[0]} cannot be fine-tuned on directly; keep the preferred answers as "
            "'prompt' and 'completion'."
        )
    if len(winner) > 1:
        raise LoricaError(f"{name}: the columns match {' and '.join(winner)}; set dataset_format to one of them.")
    return table[winner[0]]


def _require_columns(name: str, chosen: Format, survey: Survey) -> None:
    for column in chosen.required:
        if column not in survey.columns:
            raise LoricaError(
                f"{name}: dataset_format {chosen.name!r} needs column {column!r}, which no row has."
                f"{did_you_mean(column, sorted(survey.columns))} Columns found: {survey.listed(survey.columns)}."
            )


def _no_match(name: str, survey: Survey, table: dict[str, Format]) -> str:
    usable = [entry for entry in table.values() if entry.convert]
    known = {column for entry in usable for column in entry.required}
    others = sorted(survey.columns - known)[:SHOWN]
    hints = [f" {one_line(repr(column), 60)}:{hint}" for column in others if (hint := did_you_mean(column, known))]
    described = "; ".join(f"{entry.name} ({' + '.join(entry.required)})" for entry in usable)
    return (
        f"{name}: no known format matches. Columns found: {survey.listed(survey.columns) or 'none'}.{''.join(hints)} "
        f"Known formats: {described}. Rename the columns, or name a column of plain text in dataset_text_field."
    )
