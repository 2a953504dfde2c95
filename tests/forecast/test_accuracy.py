"""The committed forecasts against what the runs then took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.forecast_accuracy import RESULT, Configuration, runs_at

ROWS = json.loads(Path(RESULT).read_text(encoding="utf-8"))["rows"] if RESULT.is_file() else []
POINTS = sorted({(row["width"], row["layers"], row["tokens"], row["length"]) for row in ROWS})


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_what_was_measured_was_forecast_within_15_percent(point: tuple[int, int, int, int]) -> None:
    at = [row for row in ROWS if (row["width"], row["layers"], row["tokens"], row["length"]) == point]
    ratios = {(row["method"], row["memory_mode"]): row["ratio"] for row in at}
    assert set(ratios) >= set(runs_at(Configuration(*point, shares=(0.75,))))
    assert all(abs(ratio - 1) <= 0.15 for ratio in ratios.values()), ratios
