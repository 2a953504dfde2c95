"""Keep one language model up to date: learn new data in directions that leave the known alone.

>>> plan = lorica.plan(model, unfreeze_rank_ratio=0.25)
>>> lorica.protect(model, plan)
>>> ...  # any Trainer, any loop, any optimizer
>>> lorica.release(model)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AuditReport": "lorica.constrain.audit",
    "ConstrainedOptimizer": "lorica.constrain.optimizer",
    "LoricaError": "lorica.errors",
    "Plan": "lorica.subspace.plan",
    "UpdateConfig": "lorica.config",
    "audit": "lorica.constrain.audit",
    "block_constraints": "lorica.constrain.optimizer",
    "plan": "lorica.constrain.planning",
    "protect": "lorica.constrain.protect",
    "release": "lorica.constrain.protect",
    "run": "lorica.experiments.story",
    "train": "lorica.update",
}
"""Where each public name lives. They are imported on first use, so that ``lorica --help`` needs no torch."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorica' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
