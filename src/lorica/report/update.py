"""The part of a report that shows one training run: before and after, loss, protection, cost."""

from __future__ import annotations

from collections.abc import Sequence

from lorica.report.charts import Series, line_chart
from lorica.report.foreseen import Foreseen, foreseen_section
from lorica.report.parts import (
    Card,
    Entry,
    Fact,
    Figure,
    Part,
    Section,
    cost_section,
    flattened,
    leak_of,
    leakage_section,
    plan_section,
    rerun_section,
)
from lorica.report.records import LossPoint, Measured, TrainRecord
from lorica.report.spectra import spectra_section
from lorica.report.tables import Table
from lorica.units import MISSING, duration, listed, scientific

Change = tuple[str, float | None, float | None]


def update_part(record: TrainRecord) -> Part:
    """Return the whole account of one update."""
    entry = Entry(record, record.title, record.method, 0)
    changes = _changes(record)
    sections = [
        _before_after_section(changes),
        _loss_section(entry),
        _data_section(record),
        plan_section([entry]),
        spectra_section([entry]),
        leakage_section([entry]),
        foreseen_section([Foreseen(entry, "", found)] if (found := record.predicted_forgetting) else []),
        cost_section([entry]),
        rerun_section([entry]),
    ]
    lost = [f"{name} lost {points:.1f} points" for name, points in record.rejected.items()]
    notices = [f"Rejected: {listed(lost)}; the model was set aside."] if lost else []
    title = f"{record.model or 'model'}: one update with {record.method}"
    return Part(title, _sentence(entry, changes), [_card(entry, changes)], sections, notices=notices)


def _changes(record: TrainRecord) -> list[Change]:
    before, after = _figures(record.scores.before), _figures(record.scores.after)
    return [(name, before.get(name), after.get(name)) for name in {**before, **after}]


def _figures(measured: Measured) -> dict[str, float | None]:
    figures = {f"new data: {name}": value for name, value in measured.eval.items()}
    for name, value in measured.retention.items():
        inner = value if isinstance(value, dict) else {"": value}
        figures |= {f"held out: {name} {key}".rstrip(): number for key, number in inner.items()}
    return figures


def _sentence(entry: Entry[TrainRecord], changes: Sequence[Change]) -> str:
    told = [
        f"{name.replace(': ', ', ').replace('_', ' ')} went from {_value(name, before)} to {_value(name, after)}"
        for name, before, after in changes
        if before is not None and after is not None and not name.endswith("rows")
    ]
    return f"{entry.label}: {'; '.join(told) or 'nothing was measured before and after'}."


def _card(entry: Entry[TrainRecord], changes: Sequence[Change]) -> Card:
    facts = [
        Fact(name.replace("_", " "), _value(name, after), f"before: {_value(name, before)}")
        for name, before, after in changes
        if after is not None and not name.endswith("rows")
    ]
    if entry.record.leakage:
        worst = max(map(leak_of, entry.record.leakage))
        facts.append(Fact("largest leakage", scientific(worst), "share of any weight's change"))
    if entry.record.cost.seconds is not None:
        facts.append(Fact("time", duration(entry.record.cost.seconds), "training"))
    return Card(entry, facts)


def _before_after_section(changes: Sequence[Change]) -> Section | None:
    if not changes:
        return None
    rows = [
        [name.replace("_", " "), _value(name, before), _value(name, after), _difference(name, before, after)]
        for name, before, after in changes
    ]
    intro = "The same rows, scored with the model that came in and with the one that went out."
    return Section("Before and after", intro, table=Table(["measured", "before", "after", "change"], rows))


def _loss_section(entry: Entry[TrainRecord]) -> Section | None:
    curve = entry.record.loss_curve
    if not curve:
        return None
    rows = [[str(point.step), _loss(point, 4), scientific(point.learning_rate)] for point in _thinned(curve)]
    table = Table(["step", "loss", "learning rate"], rows, 0)
    caption = f"Training loss over {curve[-1].step} steps, from {_loss(curve[0])} to {_loss(curve[-1])}."
    series = Series("", entry.index, [(point.step, point.loss) for point in curve])
    if not series.measured():
        return Section("Training", "The loss was no number at any step.", table=table)
    svg = line_chart([series], title="Training loss", description=caption, x_title="optimizer step",
                     y_title="loss, nats per token", least=0.01)  # fmt: skip
    return Section("Training", figures=[Figure(svg, caption, table)])


def _data_section(record: TrainRecord) -> Section | None:
    data = record.data
    rows = flattened({name: value for name, value in data.train.items() if value not in (0, "", [])})
    others = {"new data, scored": data.eval or {}, "prompts answered before": data.prompts} | {
        f"held out {name}": file for name, file in data.retention.items()
    }
    for name, file in others.items():
        told = {"path": file.get("path"), "rows": file.get("kept"), "sha256": file.get("sha256")}
        rows += flattened(told, f"{name}: ")
    return Section("The data", table=Table(["what", "value"], [*map(list, rows)], left=2)) if rows else None


def _loss(point: LossPoint, digits: int = 3) -> str:
    return MISSING if point.loss is None else f"{point.loss:.{digits}f}"


def _thinned(curve: Sequence[LossPoint], most: int = 20) -> list[LossPoint]:
    stride = -(-len(curve) // most)
    return [*curve[:-1:stride], curve[-1]]


def _value(name: str, value: float | None) -> str:
    if value is None:
        return MISSING
    if name.endswith("rows"):
        return f"{value:.0f}"
    return f"{value:.3f}" if name.endswith("loss") else f"{value:.1f}"


def _difference(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None or name.endswith("rows"):
        return MISSING
    sign = "+" if after >= before else "-"
    return sign + _value(name, abs(after - before))
