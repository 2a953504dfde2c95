"""The record of ``lorica inspect``."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any, Literal

from pydantic import Field

from lorica.report.records import Count, EnergyShares, Number, PlanEntry, Spectrum, Values, _Part, _Record


class InspectedLayer(PlanEntry):
    """One weight: what would be protected in it, and what was measured."""

    spectrum: Spectrum
    effective_rank: Number
    squared_share: Number | None = None
    similarity: Number | None = None
    energy: EnergyShares | None = None

    @property
    def size(self) -> int:
        """How many singular directions there are."""
        return min(self.shape)


class Intervention(_Part):
    """The scores without some directions; ``layer`` None: of all layers at once."""

    layer: str | None = None
    which: Literal["top", "bottom"]
    fraction: Number
    directions: Count
    squared_share: Number | None = None
    loss: Number | None = None
    exact_match: Number | None = None


class Curvature(_Part):
    """Over how many rows it was averaged, and its rank correlation with the singular values, by layer."""

    rows: Count
    spearman: Values = Field(default={})

    @property
    def median(self) -> float | None:
        """Median over the layers that have one."""
        known = [value for value in self.spearman.values() if value is not None]
        return median(known) if known else None


class InspectionRecord(_Record):
    """One look at one model (``inspect.json``)."""

    method: str = "inspect"
    family: str = "unknown"
    calibration: str = ""
    layers: list[InspectedLayer] = Field(min_length=1)
    task: dict[str, Any] = Field(default={})
    before: Values = Field(default={})
    interventions: list[Intervention] = Field(default=[])
    curvature: Curvature | None = None

    @property
    def protected_share(self) -> float:
        """Mean protected share of the directions of a weight."""
        return fmean(layer.share for layer in self.layers)

    @property
    def energy(self) -> EnergyShares | None:
        """Mean over the layers that saw anything; None where none did."""
        known = [layer.energy for layer in self.layers if layer.energy is not None]
        if not known:
            return None
        means = {name: fmean(getattr(one, name) for one in known) for name in EnergyShares.model_fields}
        return EnergyShares(**means)

    def correlation(self, name: str) -> float | None:
        """Return the rank correlation of a layer, None where it was not measured."""
        return self.curvature.spearman.get(name) if self.curvature else None

    def overall(self) -> list[Intervention]:
        """Return the interventions in all layers at once."""
        return [one for one in self.interventions if one.layer is None]
