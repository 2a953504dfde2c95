"""What a run will need, told before it starts: memory by kind, disk, and time.

>>> lorica.forecast.forecast({"model_name_or_path": "folder-with-config-json"}).table()
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Forecast": "lorica.forecast.result",
    "Machine": "lorica.forecast.rates",
    "forecast": "lorica.forecast.story",
    "machine_for": "lorica.forecast.rates",
}
"""Where each public name lives; imported on first use, so that reading the options needs no torch."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorica.forecast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
