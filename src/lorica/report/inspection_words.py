"""What ``lorica inspect`` found, in words and cells: the summary, the facts and the tables."""

from __future__ import annotations

from collections.abc import Sequence

from lorica.report.charts import short_name
from lorica.report.inspection_record import InspectedLayer, InspectionRecord, Intervention
from lorica.report.parts import Fact
from lorica.report.records import EnergyShares
from lorica.report.tables import Table, percent
from lorica.units import MISSING

TOLD = 0.1
"""The share of removed directions that the summary tells of, or the measured one nearest to it."""

CALLED = {"top": "largest", "bottom": "smallest"}


def sentences(record: InspectionRecord) -> list[str]:
    """Return the summary: where the energy is, what removal costs, whether small directions are flat."""
    found = [_energy_sentence(record), _removal_sentence(record), _curvature_sentence(record)]
    return [sentence for sentence in found if sentence]


def meaning(correlation: float) -> str:
    """Return in words what a rank correlation of singular value and curvature says."""
    if correlation >= 0.7:
        return "the smaller a direction, the flatter the loss along it"
    if correlation >= 0.3:
        return "small directions tend to be flatter, but many are not"
    if correlation > -0.3:
        return "how large a direction is says little about how flat the loss is along it: small is not free"
    return "the loss is steeper along small directions than along large ones"


def _energy_sentence(record: InspectionRecord) -> str:
    energy = record.energy
    if energy is None:
        return "The layers saw nothing but zeros."
    many = "layer" if len(record.layers) == 1 else f"{len(record.layers)} layers"
    return (
        f"The protected directions ({100 * record.protected_share:.0f} % of each weight's, mean over {many}) hold "
        f"{share(energy.protected)} % of the energy of the inputs; random ones would hold {share(energy.random)} %, "
        f"the best possible {share(energy.best)} %."
    )


def _removal_sentence(record: InspectionRecord) -> str:
    if not record.overall():
        return ""
    before = record.before
    start = f"Intact, the model has {_scores(before.get('loss'), before.get('exact_match'))}"
    told = [_nearest([one for one in record.overall() if one.which == which]) for which in ("bottom", "top")]
    clauses = [
        f"without the {CALLED[one.which]} {fraction_text(one)} % of the directions of all layers, "
        f"{_scores(one.loss, one.exact_match)}"
        for one in told
        if one
    ]
    return "; ".join([start, *clauses]) + "."


def _nearest(found: Sequence[Intervention]) -> Intervention | None:
    return min(found, key=lambda one: abs(one.fraction - TOLD), default=None)


def _curvature_sentence(record: InspectionRecord) -> str:
    middle = record.curvature.median if record.curvature else None
    if middle is None:
        return ""
    return f"Rank correlation of singular value and curvature: {middle:+.2f} (median): {meaning(middle)}."


def _scores(loss: float | None, match: float | None) -> str:
    known = [] if match is None else [f"exact match {match:.1f} %"]
    return ", ".join([*known, f"loss {number(loss)}"])


def facts(record: InspectionRecord) -> list[Fact]:
    """Return the figures of the card."""
    found = []
    if energy := record.energy:
        note = f"% of the inputs' energy is protected; random {share(energy.random)}, best {share(energy.best)}"
        found.append(Fact("energy", share(energy.protected), note))
    one = _nearest([one for one in record.overall() if one.which == "bottom"])
    if one and one.exact_match is not None:
        note = f"% without the smallest {fraction_text(one)} %; {percent(record.before.get('exact_match'))} intact"
        found.append(Fact("exact match", percent(one.exact_match), note))
    elif one:
        note = f"nats without the smallest {fraction_text(one)} %; {number(record.before.get('loss'))} intact"
        found.append(Fact("loss", number(one.loss), note))
    if record.curvature and record.curvature.median is not None:
        found.append(
            Fact("size and curvature", f"{record.curvature.median:+.2f}", "rank correlation, median of layers")
        )
    return found


def layer_table(record: InspectionRecord) -> Table:
    """Return the table of all that was measured of each layer."""
    header = ["layer", "shape", "k", "erank", "sigma^2 %", "cosine", "energy %", "random", "best"]
    rows = [[*identity(layer), *spectrum_cells(layer), *energy_cells(layer.energy)] for layer in record.layers]
    if record.curvature is not None:
        header.append("curvature")
        signs = [with_sign(record.correlation(layer.name)) for layer in record.layers]
        rows = [[*row, sign] for row, sign in zip(rows, signs, strict=True)]
    return Table(header, rows, left=2)


def intervention_table(record: InspectionRecord, found: Sequence[Intervention]) -> Table:
    """Return the scores without some directions, below those of the intact model."""
    header = ["removed from", "end", "share %", "directions", "squared spectrum %", "loss", "exact match %"]
    intact = ["nothing", MISSING, "0", "0", "0", number(record.before.get("loss"))]
    rows = [[*intact, percent(record.before.get("exact_match"))]]
    for one in found:
        where = short_name(one.layer) if one.layer else "all layers"
        taken = [CALLED[one.which], fraction_text(one), f"{one.directions:,}", share(one.squared_share)]
        rows.append([where, *taken, number(one.loss), percent(one.exact_match)])
    return Table(header, rows, left=2)


def identity(layer: InspectedLayer) -> list[str]:
    """Return the cells that say which weight a row is of."""
    return [named(layer), "x".join(map(str, layer.shape)), str(layer.k)]


def spectrum_cells(layer: InspectedLayer) -> list[str]:
    """Return the cells of a layer's spectrum."""
    return [f"{layer.effective_rank:.1f}", share(layer.squared_share), with_sign(layer.similarity)]


def energy_cells(energy: EnergyShares | None) -> list[str]:
    """Return the cells of the energy that the protected, random and best directions hold, percent."""
    return [MISSING] * 3 if energy is None else [share(energy.protected), share(energy.random), share(energy.best)]


def calibration_told(record: InspectionRecord) -> str:
    """Return in words where the inputs came from."""
    known = {"self": "text that the model writes by itself", "random": "random tokens"}
    return known.get(record.calibration, f"rows of {record.calibration}")


def named(layer: InspectedLayer) -> str:
    """Return a layer's name as it is shown."""
    return short_name(layer.name)


def share(value: float | None) -> str:
    """Return a share as percent."""
    return percent(None if value is None else 100 * value)


def fraction_text(one: Intervention) -> str:
    """Return the removed share as percent."""
    return f"{100 * one.fraction:g}"


def number(value: float | None) -> str:
    """Return a loss to three digits."""
    return MISSING if value is None else f"{value:.3f}"


def with_sign(value: float | None) -> str:
    """Return a correlation with its sign."""
    return MISSING if value is None else f"{value:+.2f}"
