"""What ``lorica inspect`` found, as a page and as text; from its record alone."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from lorica.report.charts import Series, line_chart
from lorica.report.inspection_record import InspectedLayer, InspectionRecord, Intervention
from lorica.report.inspection_words import (
    CALLED,
    calibration_told,
    energy_cells,
    facts,
    identity,
    intervention_table,
    layer_table,
    meaning,
    named,
    sentences,
    share,
    spectrum_cells,
    with_sign,
)
from lorica.report.layer_grid import bullet, layer_grid, not_measured, signed, spectrum
from lorica.report.parts import Card, Entry, Figure, Part, Section, cost_section, rerun_section
from lorica.report.tables import Table

VISIBLE = 0.05
"""A rise of the loss, in nats, that fills its bar if no layer's is larger: noise is not to look like loss."""


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
    return Part(title, " ".join(sentences(record)), [Card(entry, facts(record))], sections)


def inspection_text(record: InspectionRecord) -> str:
    """Return what is printed: a summary, a line per layer, and the interventions."""
    blocks = ["\n".join(sentences(record)), layer_table(record).text(widest=56)]
    if record.interventions:
        blocks.append(intervention_table(record, record.overall()).text())
    return "\n\n".join(blocks)


def _energy_section(record: InspectionRecord) -> Section:
    def paint(x: float, y: float, width: float, layer: InspectedLayer) -> Markup:
        energy = layer.energy
        if energy is None:
            return not_measured(x, y, layer)
        note = f"{named(layer)}: {share(energy.protected)} % in {layer.k} directions; random {share(energy.random)}"
        return bullet(x, y, width, energy.protected, energy.random, energy.best, f"{note}, best {share(energy.best)}")

    intro = (
        "The share of E|x|^2, the energy of a layer's inputs, that lies in the input directions which the plan "
        "protects. A change that is confined to the other directions acts on the rest of it: the less is left, the "
        f"less a change can disturb. Inputs: {calibration_told(record)}."
    )
    caption = "Bar: protected directions, percent. Hollow dot: as many random ones. Tick: the best there are."
    rows = [[named(layer), *energy_cells(layer.energy)] for layer in record.layers]
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
        note = f"{named(layer)}: effective rank {layer.effective_rank:.0f} of {layer.size}, k = {layer.k}"
        return spectrum(x, y, width, 36, points, cut, note)

    caption = (
        "Singular values from the largest to the smallest, relative to the largest. In colour: the protected ones, up "
        "to the cut at k."
    )
    header = ["matrix", "shape", "k", "effective rank", "squared spectrum in the top k, %", "input-output cosine"]
    rows = [[*identity(layer), *spectrum_cells(layer)] for layer in record.layers]
    svg = layer_grid(record.layers, paint, height=36, title="Spectra", description=caption)
    return Section("The spectra", figures=[Figure(svg, caption, Table(header, rows))], wide=True)


def _intervention_section(record: InspectionRecord) -> Section | None:
    found = record.overall()
    if not found:
        return None
    table = intervention_table(record, found)
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
        return signed(x, y, width, rise, most, shown, f"{named(layer)}: loss {start:.3f} {rise:+.3g}")

    caption = f"Without the {CALLED[which]} {100 * fraction:g} % of one weight's directions; bars to the right: lost."
    svg = layer_grid(record.layers, paint, height=18, title=caption, description=caption)
    return Figure(svg, caption, intervention_table(record, list(found.values())))


def _curvature_section(record: InspectionRecord) -> Section | None:
    if record.curvature is None:
        return None

    def paint(x: float, y: float, width: float, layer: InspectedLayer) -> Markup:
        value = record.correlation(layer.name)
        if value is None:
            return not_measured(x, y, layer)
        return signed(x, y, width, value, 1.0, f"{value:+.2f}", f"{named(layer)}: {value:+.3f}, {meaning(value)}")

    intro = (
        "The curvature of the loss along each singular direction, E[(u_i^T G v_i)^2] with G the gradient of one row "
        f"(empirical Fisher, {record.curvature.rows} rows), ranked against the singular values. Near +1 the small "
        "directions are the flat ones, free to change; near 0 they are not; below 0 they are the steep ones. It "
        "compares directions with each other and says nothing of u_i v_j^T for different i and j."
    )
    caption = "Rank correlation (Spearman) of singular value and curvature, from -1 on the left to +1 on the right."
    rows = [[named(layer), with_sign(record.correlation(layer.name))] for layer in record.layers]
    svg = layer_grid(record.layers, paint, height=18, title="Size against curvature", description=caption)
    figure = Figure(svg, caption, Table(["matrix", "rank correlation"], rows))
    return Section("Are the small directions flat", intro, [figure], wide=True)
