"""``kill -9`` at random moments of the demo, given again each time: the end is the undisturbed one's, bit for bit.

Five tasks by two methods, one of which carries a memory from task to task. ``LORICA_KILLS`` says how many kills; the
steps and rows are then the demo's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorica.constrain.audit_report import TOLERANCE
from lorica.demo import MODEL
from tests.reliability.interruptions import quick_updates
from tests.reliability.kills import KILLS, Command, check_kills

METHODS = ("osft", "ewc")
SHORT: dict[str, Any] = {"max_steps": 4, "max_test_rows": 8, "save_steps": 1}
OF_THE_MOMENT = ("date", "command", "cost", "config", "git_revision", "record_sha256")
"""Parts of a record that tell of when, where and how long; what they hold besides is compared by itself."""

AUDIT = ("leakage", "worst_leakage")
"""Rounding errors against directions that a resumed task reads and an undisturbed one computes anew: both tiny."""


def demo(out: Path) -> Command:
    """Return the demo as ``lorica run`` takes it: with checkpoints within each task, and the models kept."""
    words = ("run", "demo", "--methods", *METHODS, "--save_models")
    return Command(out, *words, model_name_or_path=MODEL, **({"save_steps": 10} if KILLS else SHORT))


def left_by(out: Path) -> dict[str, Any]:
    """Return the weights that every method came to, and its record and answers."""
    weights: dict[str, Any] = {}
    left: dict[str, Any] = {"weights": weights}
    for name in METHODS:
        record = json.loads((out / name / "run.json").read_text())
        assert len(record["scores"]) == 6, "before the first task and after each of five"
        assert all(leak is None or leak < TOLERANCE for leak in record["worst_leakage"])
        left |= {f"{name}: {key}": value for key, value in record.items() if key not in OF_THE_MOMENT + AUDIT}
        left[f"{name}: steps"] = record["cost"]["steps"], record["cost"]["trainable_parameters"]
        left[f"{name}: answers"] = (out / name / "predictions.jsonl").read_text()
        found = load_file(out / name / "model" / "model.safetensors")
        weights |= {f"{name}: {key}": tensor for key, tensor in found.items()}
    return left


@pytest.mark.slow
@pytest.mark.reliability("R1", "R10")
def test_the_demo_killed_at_any_moment_comes_to_the_same_end(tmp_path: Path) -> None:
    with quick_updates():
        check_kills(demo, left_by, tmp_path, wanted=KILLS or 6, spell=0.15 if KILLS else 0.2)
