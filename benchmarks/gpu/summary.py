"""The rows as tables to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], Any]]


def number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    """Return what prints one number of a row, or a dash where the row has none."""
    return lambda row: "-" if row.get(key) is None else format(row[key] * scale, form)


def text(key: str) -> Callable[[Row], str]:
    """Return what prints one value of a row."""
    return lambda row: str(row.get(key, "-"))


def table(title: str, columns: Iterable[Column], rows: Iterable[Row]) -> str:
    """Return a table with its title, or nothing where there are no rows; failures stand in their own line."""
    columns, rows = list(columns), list(rows)
    if not rows:
        return ""
    good = [row for row in rows if row["status"] == "ok"]
    cells = [[name for name, _ in columns], *([show(row) for _, show in columns] for row in good)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    bad = [f"{row['status']}: {_labels(row)}: {row['message']}" for row in rows if row["status"] != "ok"]
    return "\n".join([title, "-" * len(title), *lines, *bad]) + "\n"


def _labels(row: Row) -> str:
    return ", ".join(str(value) for key, value in row.items() if key not in ("job", "status", "message", "took"))


def shape(row: Row) -> str:
    """Return a matrix's size."""
    return f"{row['rows']} x {row['columns']}"


STEP: tuple[Column, ...] = (
    ("method", text("method")),
    ("tokens", text("tokens")),
    ("s / step", number("seconds", ".3f")),
    ("tokens / s", number("tokens_per_second", ",.0f")),
    ("x plain", number("ratio", ".3f")),
    ("update s", number("update_seconds", ".3f")),
    ("peak GB", number("peak_allocated", ".1f", 1e-9)),
    ("reserved GB", number("peak_reserved", ".1f", 1e-9)),
    ("state GB", number("state_bytes", ".1f", 1e-9)),
    ("host GB", number("host_bytes", ".1f", 1e-9)),
)
TABLES: dict[str, tuple[Column, ...]] = {
    "product": (("product", text("arithmetic")), ("TFLOP/s", number("tflops", ".1f"))),
    "copy": (("copy", text("what")), ("GB/s", number("gigabytes_per_second", ".0f"))),
    "host to device": (("copy", text("what")), ("GB/s", number("gigabytes_per_second", ".0f"))),
    "build": (
        ("method", text("method")),
        ("preparation of one layer, s", number("prepare_seconds_per_layer", ".2f")),
        ("layers", text("layers")),
        ("of all, s", lambda row: format(row["prepare_seconds_per_layer"] * row["layers"], ".1f")),
        ("split cached", text("cached")),
    ),
    "step": STEP,
    "leakage": (("method", text("method")), ("leakage of lift(M)", number("master_leakage", ".1e"))),
    "lift": (
        ("weight", shape),
        ("form", text("form")),
        ("arithmetic", text("arithmetic")),
        ("ms", number("ms", ".3f")),
        ("with fold, ms", number("fold_ms", ".3f")),
        ("TFLOP/s", number("tflops", ".1f")),
        ("leakage", number("leakage", ".1e")),
        ("error", number("error", ".1e")),
    ),
    "gradient": (
        ("weight", shape),
        ("form", text("form")),
        ("ms", number("ms", ".3f")),
        ("error", number("error", ".1e")),
    ),
    "fold": (
        ("weight", shape),
        ("layer", text("form")),
        ("fp32 ms", number("ms", ".3f")),
        ("tf32 ms", number("tf32_ms", ".3f")),
        ("bases", text("bases")),
        ("protect s", number("protect_seconds", ".2f")),
    ),
    "stages": (
        ("method", text("method")),
        ("s / step", number("seconds", ".3f")),
        ("slowest", text("slowest")),
        ("stages", lambda row: ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in row["stages"].items())),
    ),
    "operations": (("method", text("method")), ("slowest operation", text("slowest"))),
    "split": (
        ("weight", shape),
        ("form", text("form")),
        ("seconds", number("seconds", ".3f")),
        ("subspace error", number("subspace_error", ".1e")),
    ),
    "exactness": (
        ("mode", text("mode")),
        ("memory", text("memory")),
        ("dtype", text("dtype")),
        ("leakage of lift(M)", number("master_leakage", ".1e")),
        ("of the stored weight", number("stored_leakage", ".1e")),
    ),
}
"""Columns by what a row measures."""


def summary(jobs: list[Row], rows: list[Row]) -> str:
    """Return all tables, then how each part ended."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["job"], row.get("what", _kind(row))), []).append(row)
    parts = [
        table(f"{job}: {what}", TABLES.get(what, ()), group) for (job, what), group in groups.items() if what in TABLES
    ]
    other = [row for (_, what), group in groups.items() if what not in TABLES for row in group if row["status"] != "ok"]
    parts += [f"{row['status']}: {_labels(row)}: {row['message']}" for row in other]
    ended = [f"{job['name']:16} {job['status']:8} {job['seconds']:6.1f} s  {job['message']}" for job in jobs]
    return "\n".join([*parts, "parts\n-----", *ended]) + "\n"


def _kind(row: Row) -> str:
    return {"exactness": "exactness"}.get(row["job"], "split" if row["job"].startswith("splits") else "other")
