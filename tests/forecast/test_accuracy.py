"""The committed forecasts against what the runs then took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.forecast_accuracy import RESULT, runs_at
from benchmarks.step_time import GRID

ROWS = json.loads(Path(RESULT).read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("point", GRID, ids=lambda point: f"{point.width}x{point.layers}-{point.tokens}")
def test_each_point_of_the_benchmarks_is_forecast_within_15_percent(point: object) -> None:
    names = ("width", "layers", "tokens")
    ratios = {
        (row["method"], row["memory_mode"]): row["ratio"]
        for row in ROWS
        if all(row[name] == getattr(point, name) for name in names)
    }
    assert set(ratios) == set(runs_at(point))
    assert all(abs(ratio - 1) <= 0.15 for ratio in ratios.values()), ratios
