"""The singular spectrum of every split weight, with the cut between what was protected and what was free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from lorica.report.layer_grid import layer_grid, spectrum
from lorica.report.parts import Entry, Figure, Section
from lorica.report.records import Leak
from lorica.report.tables import Table

HEIGHT = 36


def spectra_section(entries: Sequence[Entry[Any]]) -> Section | None:
    """Return the spectra of the weights that each method split, before its last training."""
    figures = [figure for entry in entries if (figure := _figure(entry))]
    if not figures:
        return None
    intro = (
        "Singular values from the largest to the smallest, relative to the largest, before the last training. In "
        "colour: the protected ones, up to the cut at k."
    )
    return Section("The spectra and the cut", intro, figures, wide=True, shown=3)


def _figure(entry: Entry[Any]) -> Figure | None:
    layers = [leak for leak in entry.record.leakage if leak.spectrum and leak.shape]
    if not layers:
        return None
    caption = f"{len(layers)} split weights."
    svg = layer_grid(layers, _paint, height=HEIGHT, title=f"{entry.label}: spectra", description=caption)
    rows = [[leak.name, str(leak.k), str(min(leak.shape)), f"{_at_cut(leak):.3g}"] for leak in layers]
    table = Table(["matrix", "k", "singular values", "value at the cut, relative to the largest"], rows)
    return Figure(svg, caption, table, entry)


def _paint(x: float, y: float, width: float, leak: Leak) -> Markup:
    assert leak.spectrum is not None
    size, top = min(leak.shape), max(leak.spectrum.sigma) or 1.0
    pairs = zip(leak.spectrum.index, leak.spectrum.sigma, strict=True)
    points = [((index + 0.5) / size, sigma / top) for index, sigma in pairs]
    note = f"{leak.name}: k = {leak.k} of {size}"
    return spectrum(x, y, width, HEIGHT, points, min(leak.k / size, 1.0), note)


def _at_cut(leak: Leak) -> float:
    """Return the kept singular value nearest to the cut, over the largest."""
    assert leak.spectrum is not None
    pairs = zip(leak.spectrum.index, leak.spectrum.sigma, strict=True)
    _, value = min((abs(index - leak.k), sigma) for index, sigma in pairs)
    return value / (max(leak.spectrum.sigma) or 1.0)
