"""Records as real runs write them: two methods on five tasks, and one update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

TASKS = ["colours", "river lengths", "capital cities", "inventors", "chemical symbols"]
KINDS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def run_record(method: str = "osft", **changes: Any) -> dict[str, Any]:
    """Return a valid run record; ``changes`` replace whole fields."""
    osft = method == "osft"
    record = {
        **_common(method, protected=osft),
        "kind": "run",
        "stream": "demo",
        "tasks": TASKS,
        "scores": _scores(kept=0.96 if osft else 0.62, learned=93.4 if osft else 97.8),
        "retention": {"world facts": [96.4, 95.1, 94.7, 93.9, 93.6, 92.8] if osft
                      else [96.4, 71.3, 52.2, 38.7, 29.9, 24.1]},
        "metrics": {},
    }  # fmt: skip
    return record | changes


def train_record(**changes: Any) -> dict[str, Any]:
    """Return a valid record of ``lorica train``."""
    record = {
        **_common("osft", protected=True),
        "kind": "train",
        "scores": {
            "before": {
                "eval": {"loss": 3.214, "exact_match": 1.5, "rows": 200},
                "retention": {"loss": 0.412, "exact_match": 96.0, "rows": 100},
            },
            "after": {
                "eval": {"loss": 0.187, "exact_match": 94.5, "rows": 200},
                "retention": {"loss": 0.431, "exact_match": 95.0, "rows": 100},
            },
        },
        "loss_curve": [
            {"step": step, "loss": 0.15 + 3 * math.exp(-step / 60), "learning_rate": 1e-3 * (1 - step / 300)}
            for step in range(5, 300, 5)
        ],
        "data": {
            "train": data_summary("facts.jsonl", kept=1800, rejected=3, notices=["no row trains the end"]),
            "eval": data_summary("facts.test.jsonl", kept=200),
            "retention": {"atlas": data_summary("atlas.jsonl", kept=100)},
        },
    }
    return record | changes


def data_summary(path: str, **changes: Any) -> dict[str, Any]:
    """Return the account of one file as the data readers give it."""
    counts = {"rejected": 0, "reasons": {}, "duplicates": 0, "truncated": 0, "notices": []}
    return {"path": path, "format": "prompt_completion", "sha256": f"sha256 of {path}", **counts, **changes}


@pytest.fixture
def make_run() -> Callable[..., dict[str, Any]]:
    return run_record


@pytest.fixture
def make_train() -> Callable[..., dict[str, Any]]:
    return train_record


def _scores(kept: float, learned: float) -> list[list[float]]:
    """A learned task decays by ``kept`` at every later stage; one not learned yet is near 2 %."""
    rows = []
    for i in range(len(TASKS) + 1):
        rows.append(
            [
                round(learned * kept ** (i - j) - 0.7 * j if i >= j else 1.3 + 0.37 * j + 0.11 * i, 2)
                for j in range(1, len(TASKS) + 1)
            ]
        )
    return rows


def _common(method: str, *, protected: bool) -> dict[str, Any]:
    names = [(f"model.layers.{i}.{block}.{kind}", kind) for i in range(4) for block in KINDS for kind in KINDS[block]]
    return {
        "schema": 1,
        "method": method,
        "label": "OSFT (activation, 1/2 protected)" if protected else "Sequential fine-tuning",
        "seed": 0,
        "model": "lorica-demo",
        "model_parameters": 1_234_567,
        "cost": {"seconds": 41.7 if protected else 43.9, "seconds_per_step": 0.0182 if protected else 0.0179,
                 "peak_rss_bytes": 612_345_678, "trainable_parameters": 304_128 if protected else 786_432,
                 "trained_bytes": 1_216_512 if protected else 3_145_728},
        "learning_rate": 1e-3 if protected else 5e-4,
        "plan": [_plan(name, kind, i) for i, (name, kind) in enumerate(names)] if protected else [],
        "leakage": [
            {"name": name, "leak_u": None, "leak_v": (1.3 + i % 7) * 1e-7, "unconstrained_u": None,
             "unconstrained_v": 0.71, "relative_change": 0.02 + 0.001 * i}
            for i, (name, _) in enumerate(names)
        ] if protected else [],
        "versions": {"lorica": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "hardware": {"cpu": "x86-64", "cores": 2, "gpu": None},
        "git_revision": "0123456789abcdef",
        "command": "lorica run demo --methods osft seqft --output_dir lorica-demo",
    }  # fmt: skip


def _plan(name: str, kind: str, i: int) -> dict[str, Any]:
    shape = [128, 384] if kind == "down_proj" else [384, 128] if kind in ("gate_proj", "up_proj") else [128, 128]
    k = 38 + (i * 29) % 60
    return {"name": name, "shape": shape, "k": k, "free": shape[0] * (shape[1] - k), "share": k / 128,
            "source": "activation", "constraint": "input"}  # fmt: skip
