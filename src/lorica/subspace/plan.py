"""A plan: what is protected in which weight, as data that can be read, edited and given back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

from lorica.errors import LoricaError, did_you_mean, one_line
from lorica.files import write_text
from lorica.json_file import read_json
from lorica.subspace.factor import Factors
from lorica.subspace.linalg import Pair
from lorica.subspace.plan_entry import MEASURED, PlanEntry


class Plan(BaseModel):
    """The protection of a whole model.

    Attributes:
        family: the model's architecture (``config.model_type``), for the reader.
        entries: one per constrained weight.
        train_also: patterns of parameters outside these weights that train freely. All others (embeddings,
            output head, norms, biases) are frozen: each is an unprotected path to forgetting.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    family: str = "unknown"
    entries: list[PlanEntry]
    train_also: list[str] = []

    _factors: dict[str, Factors] = PrivateAttr(default_factory=dict)
    """What was measured, by name, for the sources in ``MEASURED``. It is not part of the saved data."""

    _learned: dict[str, Pair] = PrivateAttr(default_factory=dict)
    """Directions that finished tasks learned in, by name. Measured too."""

    @model_validator(mode="after")
    def _names_each_once(self) -> Self:
        if not self.entries:
            raise ValueError("entries is empty: a plan names at least one weight")
        twice = next((name for name, count in Counter(self.names()).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is planned twice")
        return self

    def __len__(self) -> int:
        return len(self.entries)

    def names(self) -> Iterator[str]:
        """Yield the names of the constrained modules, in the order of the model."""
        return (entry.name for entry in self.entries)

    @property
    def free(self) -> int:
        """Degrees of freedom that training keeps, over all weights."""
        return sum(entry.free for entry in self.entries)

    @property
    def unmeasured(self) -> list[PlanEntry]:
        """The entries that protect measured directions of which the plan holds none, as one from a file."""
        measured = (entry for entry in self.entries if any(entry.given) and entry.source in MEASURED)
        return [entry for entry in measured if entry.name not in self._factors]

    def factors(self, name: str) -> Factors | None:
        """Return what was measured of a layer, if the plan was made with it."""
        return self._factors.get(name)

    def learned(self, name: str) -> Pair | None:
        """Return the directions that finished tasks learned in, if the plan protects any in this weight."""
        return self._learned.get(name)

    def with_measured(
        self, *, factors: Mapping[str, Factors] | None = None, learned: Mapping[str, Pair] | None = None
    ) -> Plan:
        """Return a copy that holds what was measured, by the names of its weights; it replaces what it held before.

        The entries' ``learned`` are counted as if the source protected none of these directions.

        Args:
            factors: second moments of the layers' inputs and output gradients.
            learned: directions that finished tasks learned in, orthonormal columns.
        """
        result = self.model_copy()
        result._factors = self._factors if factors is None else dict(factors)
        if learned is not None:
            result._learned = dict(learned)
            result.entries = [_with_learned(entry, learned.get(entry.name)) for entry in self.entries]
        return result

    def records(self) -> list[dict[str, Any]]:
        """Return the entries with what follows from them, as plain dictionaries for the run record."""
        return [entry.model_dump(mode="json") | {"free": entry.free, "share": entry.share} for entry in self.entries]

    @classmethod
    def from_records(cls, records: list[dict[str, Any]], family: str = "unknown") -> Plan:
        """Return the plan that ``records`` came from."""
        known = PlanEntry.model_fields
        rows = [{key: value for key, value in record.items() if key in known} for record in records]
        return cls(family=family, entries=[PlanEntry.model_validate(row) for row in rows])

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, one line per weight so that it is easy to edit."""
        head = self.model_dump(mode="json", exclude={"entries"})
        lines = ",\n".join("    " + json.dumps(entry.model_dump(mode="json")) for entry in self.entries)
        text = json.dumps(head, indent=2)[:-2] + f',\n  "entries": [\n{lines}\n  ]\n}}\n'
        write_text(Path(path), text)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that was saved, and perhaps edited.

        Raises:
            LoricaError: no such file, no JSON, an unknown or missing field, no entries, or a k out of range.
        """
        data = read_json(path, "plan", constants=True)  # what is wrong with one is told with its place
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise LoricaError(f"{path}: not a plan: {_first_problem(error)}") from error

    def table(self) -> str:
        """Return the plan as text: one row per weight, a line of totals, and what else trains."""
        head = ("layer", "shape", "k", "free", "share", "source", "constraint", "why")
        rows: list[tuple[str, ...]] = [head, *(entry.cells() for entry in self.entries)]
        lines = _aligned(rows, right={2, 3, 4})
        total = sum(e.shape[0] * e.shape[1] for e in self.entries)
        lines.append(
            f"{len(self)} weights, {total:,} numbers, {self.free:,} free ({self.free / max(total, 1):.1%}); "
            + (f"trained freely as well: {', '.join(self.train_also)}" if self.train_also else "all else is frozen")
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _with_learned(entry: PlanEntry, learned: Pair | None) -> PlanEntry:
    counts = (0, 0) if learned is None else (learned[0].shape[1], learned[1].shape[1])
    room = [size - count for size, count in zip(entry.shape, entry.given, strict=True)]
    u, v = (min(count, left) for count, left in zip(counts, room, strict=True))
    return entry.model_copy(
        update={"learned": (0 if entry.constraint == "input" else u, 0 if entry.constraint == "output" else v)}
    )


def _aligned(rows: list[tuple[str, ...]], right: set[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _first_problem(error: ValidationError) -> str:
    found = error.errors()  # of a misspelt field both names are among them: the one that is there says more
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    where = one_line(".".join(str(part) for part in first["loc"]))
    reason = one_line(first["msg"])
    if first["type"] == "extra_forbidden":
        known = sorted({*Plan.model_fields, *PlanEntry.model_fields})
        reason += f".{did_you_mean(str(first['loc'][-1]), known)}"
    return f"{where}: {reason}" if where else reason
