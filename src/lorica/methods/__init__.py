"""The methods, one class a file. Importing this package registers them all."""

from __future__ import annotations

from importlib import import_module

from lorica.methods.base import METHODS, Method, Targets, build_method
from lorica.methods.protection import Protection
from lorica.methods.task import TaskData

__all__ = ["METHODS", "Method", "Protection", "Targets", "TaskData", "build_method"]

for _module in (
    "osft",
    "seqft",
    "lora",
    "inclora",
    "olora",
    "milora",
    "pissa",
    "ewc",
    "lwf",
    "replay",
    "gpm",
    "sgp",
    "ogd",
    "osft_gradient",
    "osft_factored",
    "per_task",
    "joint",
):
    import_module(f"lorica.methods.{_module}")
