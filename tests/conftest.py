"""Settings that every test shares: no hub, no network, no cache of splits, the same random examples in every run.

Tests marked ``reliability("R4", ...)`` show rows of docs/reliability.md to hold; ``make scorecard`` runs them alone and
prints the table.
"""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LORICA_CACHE"] = "off"
settings.register_profile("lorica", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("lorica")


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect() -> Iterator[None]:
    """Let the Trainer's collection of garbage look at what a module's tests made, not at all of torch each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        rows = {row for mark in item.iter_markers("reliability") for row in mark.args}
        item.user_properties += [("reliability", row) for row in sorted(rows)]  # these travel from worker processes


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print a row of the scorecard per line: how many of its tests passed."""
    if "reliability" not in config.option.markexpr:
        return
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, row in getattr(report, "user_properties", []):
                counts[row if name == "reliability" else ""][outcome] += 1
    counts.pop("", None)
    terminalreporter.section("reliability")
    for row in sorted(counts, key=lambda row: (row[0], int(row[1:]))):
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts[row].items())
        terminalreporter.write_line(f"{row:4} {told}")
