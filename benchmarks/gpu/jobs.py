"""What the suite does, in the order of importance, and the seconds each part may take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

THREE = ("plain bf16", "lorica fast 0.75", "lorica lean 0.75", "LoRA r=16")
EIGHT = (
    "plain bf16",
    "lorica fast 0.75",
    "lorica lean 0.75",
    "LoRA r=16",
    "lorica fast 0.5",
    "lorica fast 0.9",
    "plain fp32 master",
    "plain fp32 master, all",
)
ONE = (
    "plain bf16",
    "lorica fast 0.75",
    "plain fp32 master",
    "LoRA r=16",
    "lorica lean 0.75",
    "lorica fast 0.5",
    "lorica fast 0.9",
    "lorica lean 0.5",
    "lorica lean 0.9",
    "plain fp32 master, all",
)


LARGE = ((1, 2, 4), (4, 1, 2), (16, 0, 1))
COMPILED = ((4, 1, 4), (16, 0, 2))
"""Sizes (see steps.py) for the model whose steps take long, and of one shape of micro-batch: one compilation."""


@dataclass(frozen=True)
class Job:
    """One part of the suite.

    Attributes:
        module: the file that does it.
        seconds: its share of the time; what earlier parts left over is added.
        package: without it the part is skipped.
    """

    name: str
    module: str
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    package: str = "torch"


def _steps(shape: str, *methods: str, **settings: Any) -> dict[str, Any]:
    return {"shape": shape, "methods": methods, **settings}


JOBS: tuple[Job, ...] = (
    Job("machine", "machine", 60),  # torch is imported in it
    Job("steps-1b", "steps", 120, _steps("Llama-3.2-1B", *ONE)),
    Job("lifts", "lifts", 35),
    Job("exactness", "exactness", 45),
    Job(
        "profile",
        "profiles",
        35,
        _steps("Llama-3.2-1B", *THREE[:3]),
    ),
    Job("splits", "splits", 45, {"largest": 2}),
    Job(
        "steps-8b",
        "steps",
        110,
        _steps(
            "Llama-3.1-8B",
            *EIGHT,
            "LoRA r=16",
            "plain fp32 master",
            "plain fp32 master, all",
            checkpointing=True,
            sizes=LARGE,
        ),
    ),
    Job("steps-3b", "steps", 50, _steps("Llama-3.2-3B", *THREE)),
    Job(
        "compiled-1b",
        "steps",
        60,
        _steps("Llama-3.2-1B", *THREE[:2], compiled=True, sizes=COMPILED),
    ),
    Job(
        "flash-1b",
        "steps",
        20,
        _steps("Llama-3.2-1B", *THREE[:2], attention="flash_attention_2"),
        package="flash_attn",
    ),
    Job("peers", "peers", 30),
    Job("splits-largest", "splits", 30, {"smallest": 2}),
)
