"""What is protected in one weight, and how: the row of a plan."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
