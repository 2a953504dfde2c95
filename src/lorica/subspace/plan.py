"""A plan: what is protected in which weight, as data that can be read, edited and given back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from lorica.errors import LoricaError, did_you_mean, one_line
from lorica.files import write_text
from lorica.json_file import read_json
from lorica.subspace.factor import Factors
from lorica.subspace.linalg import Pair

Constraint = Literal["two-sided", "input", "output", "block"]
Source = Literal["weight", "activation", "curvature", "hybrid"]

MEASURED: tuple[Source, ...] = ("activation", "curvature", "hybrid")
"""The sources that look at what passes through a layer and so need calibration."""


def default_constraint(source: Source) -> Constraint:
    """Return the constraint of a plan that names none: on both sides where the source knows directions of both."""
    return "input" if source in ("activation", "hybrid") else "two-sided"


Size = Annotated[int, Field(ge=1, le=2**31)]
"""Of one side of a weight; above that nothing fits any memory, and sums of sizes would not fit a line."""


class PlanEntry(BaseModel):
    """What is protected in one weight.

    Attributes:
        name: the module's name in the model.
        shape: (out, in) as in ``nn.Linear``, also for weights that are stored transposed.
        k: how many directions the source gives each constrained side, 0 (plain training) to ``limit``.
        k_output: how many it gives the output side, where that is another number than k.
        source: where the directions come from: the weight's singular vectors (``weight``, the paper), the
            principal directions of the layer's inputs (``activation``), both (``hybrid``), or the principal
            directions of its inputs and of the loss's gradients by its outputs (``curvature``).
        constraint: what every change D must satisfy: ``two-sided`` U^T D = 0 and D V = 0, ``input`` D V = 0,
            ``output`` U^T D = 0, ``block`` U^T D V = 0.
        learned: how many (output, input) directions that finished tasks learned in are protected besides, not
            counting what the source protects already; a side that the constraint leaves alone has none.
        why: how k came about, in words.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    shape: tuple[Size, Size]
    k: int = Field(ge=0)
    k_output: int | None = Field(default=None, ge=0)
    source: Source = "weight"
    constraint: Constraint = "two-sided"
    learned: tuple[int, int] = (0, 0)
    why: str = ""

    @property
    def limit(self) -> int:
        """The largest k there is: min(M, N), or a side's own dimension where k is for that side alone and measured."""
        m, n = self.shape
        if self.source not in MEASURED or (self.constraint not in ("input", "output") and self.k_output is None):
            return min(m, n)
        return m if self.constraint == "output" else n

    @property
    def given(self) -> tuple[int, int]:
        """How many (output, input) directions the source gives; a side that the constraint leaves alone gets none."""
        k_u = self.k if self.k_output is None else self.k_output
        return 0 if self.constraint == "input" else k_u, 0 if self.constraint == "output" else self.k

    @property
    def protected(self) -> tuple[int, int]:
        """How many (output, input) directions are protected, by the source and as learned together."""
        (k_u, k_v), (more_u, more_v) = self.given, self.learned
        return k_u + more_u, k_v + more_v

    @property
    def free(self) -> int:
        """Degrees of freedom that training keeps."""
        (m, n), (a, b) = self.shape, self.protected
        return m * n - a * b if self.constraint == "block" else (m - a) * (n - b)

    @property
    def share(self) -> float:
        """Share of the directions that the source gives, of all that it could."""
        return self.k / self.limit if self.k_output is None else sum(self.given) / sum(self.shape)

    def with_counts(self, k_output: int, k: int, why: str) -> PlanEntry:
        """Return the entry with these directions of a measured source, as far as the constraint is about their side."""
        both = {"input": (None, k), "output": (None, k_output)}.get(self.constraint, (k_output, k))
        return self.model_copy(update={"k_output": both[0], "k": both[1], "why": why})

    def cells(self) -> tuple[str, ...]:
        """Return the row of the plan's table."""
        m, n = self.shape
        share, (u, v) = f"{self.share:.0%}", self.learned
        why = f"{self.why}; learned before: {u} output, {v} input directions" if u or v else self.why
        k = str(self.k) if self.k_output is None else f"{self.k_output}+{self.k}"
        return self.name, f"{m}x{n}", k, f"{self.free:,}", share, self.source, self.constraint, why

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.source == "activation" and self.constraint != "input":
            raise ValueError(
                f"{self.name}: source 'activation' knows directions of the inputs only; use constraint 'input', "
                f"not {self.constraint!r}"
            )
        if self.source == "hybrid" and self.constraint not in ("input", "two-sided"):
            raise ValueError(f"{self.name}: source 'hybrid' is for constraint 'input' or 'two-sided'")
        if self.k > self.limit:
            raise ValueError(f"{self.name}: k = {self.k} is out of range for shape {self.shape}: 0 to {self.limit}")
        if self.k_output is None:
            return self
        if self.source != "curvature" or self.constraint == "input":
            raise ValueError(
                f"{self.name}: k_output is for source 'curvature', and not for constraint 'input', which leaves the "
                "outputs alone"
            )
        if self.k_output > self.shape[0]:
            raise ValueError(
                f"{self.name}: k_output = {self.k_output} is out of range for shape {self.shape}: 0 to {self.shape[0]}"
            )
        return self

    @model_validator(mode="after")
    def _learned_fits(self) -> Self:
        fits = all(0 <= count <= size for count, size in zip(self.protected, self.shape, strict=True))
        idle = (self.constraint == "input" and self.learned[0]) or (self.constraint == "output" and self.learned[1])
        if min(self.learned) < 0 or not fits or idle:
            raise ValueError(
                f"{self.name}: learned = {list(self.learned)} does not fit shape {self.shape} with k = {self.k} and "
                f"constraint {self.constraint!r}"
            )
        return self


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
