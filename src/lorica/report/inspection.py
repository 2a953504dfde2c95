"""What ``lorica inspect`` found, in words, tables and pictures; from its record alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from lorica.report.charts import Series, line_chart, short_name
from lorica.report.inspection_record import EnergyShares, InspectedLayer, InspectionRecord, Intervention
from lorica.report.layer_grid import bullet, layer_grid, not_measured, signed, spectrum
from lorica.report.parts import Card, Entry, Fact, Figure, Part, Section, cost_section, rerun_section
from lorica.report.tables import MISSING, Table, percent

TOLD = 0.1
"""The share of removed directions that the summary tells of, or the measured one nearest to it."""

VISIBLE = 0.05
"""A rise of the loss, in nats, that fills its bar if no layer's is larger: noise is not to look like loss."""

CALLED = {"top": "largest", "bottom": "smallest"}


def inspection_part(record: InspectionRecord) -> Part:
    """Return the whole account of one inspection."""
    entry: Entry[Any] = Entry(record, record.model or "model", record.model or "model", 0)
    sections = [
        _energy_section(record),
        _spectrum_section(record),
        _intervention_section(record),
        _per_layer_section(record),
        _curvature_section(record),
        cost_section([entry]),
        rerun_section([entry]),
    ]
    title = f"{entry.label}: what its directions do"
    return Part(title, " ".join(sentences(record)), [Card(entry, _facts(record))], sections)


def inspection_text(record: InspectionRecord) -> str:
    """Return what is printed: a summary, a line per layer, and the interventions."""
    blocks = ["\n".join(sentences(record)), _layer_table(record).text(widest=56)]
    if record.interventions:
        blocks.append(_intervention_table(record, record.overall()).text())
    return "\n\n".join(blocks)


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
        f"{_share(energy.protected)} % of the energy of the inputs; random ones would hold {_share(energy.random)} %, "
        f"the best possible {_share(energy.best)} %."
    )


def _removal_sentence(record: InspectionRecord) -> str:
    if not record.overall():
        return ""
    before = record.before
    start = f"Intact, the model has {_scores(before.get('loss'), before.get('exact_match'))}"
    told = [_nearest([one for one in record.overall() if one.which == which]) for which in ("bottom", "top")]
    clauses = [
        f"without the {CALLED[one.which]} {_fraction(one)} % of the directions of all layers, "
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
    return ", ".join([*known, f"loss {_number(loss)}"])


def _facts(record: InspectionRecord) -> list[Fact]:
    facts = []
    if energy := record.energy:
        note = f"% of the inputs' energy is protected; random {_share(energy.random)}, best {_share(energy.best)}"
        facts.append(Fact("energy", _share(energy.protected), note))
    one = _nearest([one for one in record.overall() if one.which == "bottom"])
    if one and one.exact_match is not None:
        note = f"% without the smallest {_fraction(one)} %; {percent(record.before.get('exact_match'))} intact"
        facts.append(Fact("exact match", percent(one.exact_match), note))
    elif one:
        note = f"nats without the smallest {_fraction(one)} %; {_number(record.before.get('loss'))} intact"
        facts.append(Fact("loss", _number(one.loss), note))
    if record.curvature and record.curvature.median is not None:
        facts.append(
            Fact("size and curvature", f"{record.curvature.median:+.2f}", "rank correlation, median of layers")
        )
    return facts


def _energy_section(record: InspectionRecord) -> Section:
    def paint(x: float, y: float, width: float, layer: InspectedLayer) -> Markup:
        energy = layer.energy
        if energy is None:
            return not_measured(x, y, layer)
        note = f"{_named(layer)}: {_share(energy.protected)} % in {layer.k} directions; random {_share(energy.random)}"
        return bullet(x, y, width, energy.protected, energy.random, energy.best, f"{note}, best {_share(energy.best)}")

    intro = (
        "The share of E|x|^2, the energy of a layer's inputs, that lies in the input directions which the plan "
        "protects. A change that is confined to the other directions acts on the rest of it: the less is left, the "
        f"less a change can disturb. Inputs: {_calibration(record)}."
    )
    caption = "Bar: protected directions, percent. Hollow dot: as many random ones. Tick: the best there are."
    rows = [[_named(layer), *_energy_cells(layer.energy)] for layer in record.layers]
    table = Table(["energy, percent", "protected", "random", "best"], rows)
    svg = layer_grid(record.layers, paint, height=18, title="Energy in protected directions", description=caption)
    return Section("How much of what the layers see is protected", intro, [Figure(svg, caption, table)], wide=True)


def _spectrum_section(record: InspectionRecord) -> Section:
    def paint(x: float, y: float, width: float, layer: InspectedLayer) -> Markup:
        top = max(layer.spectrum.sigma) or 1.0
        points = [
            ((index + 0.5) / layer.size, sigma / top)
            for index, sigma in zip(layer.spectrum.index, layer.spectrum.sigma, strict=True)
        ]
        cut = layer.k / layer.size if layer.source == "weight" else None
        note = f"{_named(layer)}: effective rank {layer.effective_rank:.0f} of {layer.size}, k = {layer.k}"
        return spectrum(x, y, width, 36, points, cut, note)

    caption = (
        "Singular values from the largest to the smallest, relative to the largest. In colour: the protected ones, up "
        "to the cut at k."
    )
    header = ["matrix", "shape", "k", "effective rank", "squared spectrum in the top k, %", "input-output cosine"]
    rows = [[*_identity(layer), *_spectrum_cells(layer)] for layer in record.layers]
    svg = layer_grid(record.layers, paint, height=36, title="Spectra", description=caption)
    return Section("The spectra", figures=[Figure(svg, caption, Table(header, rows))], wide=True)


def _intervention_section(record: InspectionRecord) -> Section | None:
    found = record.overall()
    if not found:
        return None
    table = _intervention_table(record, found)
    figures = [
        figure
        for field, what, least in (("exact_match", "exact match, %", 10.0), ("loss", "loss, nats per token", 0.1))
        if (figure := _intervention_figure(record, field, what, least, table))
    ]
    intro = (
        f"The largest or the smallest singular values of all {len(record.layers)} weights are set to zero, and "
        f"{record.before.get('rows') or 0:.0f} rows of {record.task.get('path', 'the task')} are scored again. "
        "Directions that do nothing could go without a trace."
    )
    return Section("What removing directions costs", intro, figures)


def _intervention_figure(record: InspectionRecord, field: str, what: str, least: float, table: Table) -> Figure | None:
    start = record.before.get(field)
    series = [
        Series(
            CALLED[which],
            index,
            [(0.0, start), *((100 * one.fraction, getattr(one, field)) for one in _sorted(record, which))],
        )
        for index, which in enumerate(("bottom", "top"))
        if _sorted(record, which)
    ]
    if start is None or not series:
        return None
    caption = f"{what[0].upper()}{what[1:]}, without the largest or without the smallest directions of all weights."
    svg = line_chart(
        series, title=what, description=caption, x_title="singular directions removed, %", y_title=what, least=least,
        reference=(start, "intact"),
    )  # fmt: skip
    return Figure(svg, caption, table)


def _sorted(record: InspectionRecord, which: str) -> list[Intervention]:
    return sorted((one for one in record.overall() if one.which == which), key=lambda one: one.fraction)


def _per_layer_section(record: InspectionRecord) -> Section | None:
    start = record.before.get("loss")
    tried = dict.fromkeys((one.which, one.fraction) for one in record.interventions if one.layer is not None)
    if not tried or start is None:
        return None
    figures = [_per_layer_figure(record, which, fraction, start) for which, fraction in tried]
    intro = "The same, in one weight at a time: how much the loss rises, nats per token."
    return Section("Which weights need their directions", intro, figures, wide=True)


def _per_layer_figure(record: InspectionRecord, which: str, fraction: float, start: float) -> Figure:
    found = {
        one.layer: one for one in record.interventions if one.layer and (one.which, one.fraction) == (which, fraction)
    }
    rises = {name: one.loss - start for name, one in found.items() if one.loss is not None}
    most = max(VISIBLE, *map(abs, rises.values()))

    def paint(x: float, y: float, width: float, layer: InspectedLayer) -> Markup:
        if layer.name not in rises:
            return not_measured(x, y, layer)
        rise = rises[layer.name]
        shown = "0" if abs(rise) < 0.0005 else f"{rise:+.3f}"
        return signed(x, y, width, rise, most, shown, f"{_named(layer)}: loss {start:.3f} {rise:+.3g}")

    caption = f"Without the {CALLED[which]} {100 * fraction:g} % of one weight's directions; bars to the right: lost."
    svg = layer_grid(record.layers, paint, height=18, title=caption, description=caption)
    return Figure(svg, caption, _intervention_table(record, list(found.values())))


def _curvature_section(record: InspectionRecord) -> Section | None:
    if record.curvature is None:
        return None

    def paint(x: float, y: float, width: float, layer: InspectedLayer) -> Markup:
        value = record.correlation(layer.name)
        if value is None:
            return not_measured(x, y, layer)
        return signed(x, y, width, value, 1.0, f"{value:+.2f}", f"{_named(layer)}: {value:+.3f}, {meaning(value)}")

    intro = (
        "The curvature of the loss along each singular direction, E[(u_i^T G v_i)^2] with G the gradient of one row "
        f"(empirical Fisher, {record.curvature.rows} rows), ranked against the singular values. Near +1 the small "
        "directions are the flat ones, free to change; near 0 they are not; below 0 they are the steep ones. It "
        "compares directions with each other and says nothing of u_i v_j^T for different i and j."
    )
    caption = "Rank correlation (Spearman) of singular value and curvature, from -1 on the left to +1 on the right."
    rows = [[_named(layer), _signed(record.correlation(layer.name))] for layer in record.layers]
    svg = layer_grid(record.layers, paint, height=18, title="Size against curvature", description=caption)
    figure = Figure(svg, caption, Table(["matrix", "rank correlation"], rows))
    return Section("Are the small directions flat", intro, [figure], wide=True)


def _layer_table(record: InspectionRecord) -> Table:
    header = ["layer", "shape", "k", "erank", "sigma^2 %", "cosine", "energy %", "random", "best"]
    rows = [[*_identity(layer), *_spectrum_cells(layer), *_energy_cells(layer.energy)] for layer in record.layers]
    if record.curvature is not None:
        header.append("curvature")
        rows = [[*row, _signed(record.correlation(layer.name))] for row, layer in zip(rows, record.layers, strict=True)]
    return Table(header, rows, left=2)


def _intervention_table(record: InspectionRecord, found: Sequence[Intervention]) -> Table:
    header = ["removed from", "end", "share %", "directions", "squared spectrum %", "loss", "exact match %"]
    intact = ["nothing", MISSING, "0", "0", "0", _number(record.before.get("loss"))]
    rows = [[*intact, percent(record.before.get("exact_match"))]]
    for one in found:
        where = short_name(one.layer) if one.layer else "all layers"
        taken = [CALLED[one.which], _fraction(one), f"{one.directions:,}", _share(one.squared_share)]
        rows.append([where, *taken, _number(one.loss), percent(one.exact_match)])
    return Table(header, rows, left=2)


def _identity(layer: InspectedLayer) -> list[str]:
    return [_named(layer), "x".join(map(str, layer.shape)), str(layer.k)]


def _spectrum_cells(layer: InspectedLayer) -> list[str]:
    return [f"{layer.effective_rank:.1f}", _share(layer.squared_share), _signed(layer.similarity)]


def _energy_cells(energy: EnergyShares | None) -> list[str]:
    return [MISSING] * 3 if energy is None else [_share(energy.protected), _share(energy.random), _share(energy.best)]


def _calibration(record: InspectionRecord) -> str:
    known = {"self": "text that the model writes by itself", "random": "random tokens"}
    return known.get(record.calibration, f"rows of {record.calibration}")


def _named(layer: InspectedLayer) -> str:
    return short_name(layer.name)


def _share(value: float | None) -> str:
    return percent(None if value is None else 100 * value)


def _fraction(one: Intervention) -> str:
    return f"{100 * one.fraction:g}"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.2f}"
