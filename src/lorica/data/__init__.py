"""Data: readers, formats, validation, encoding and collation. Validation imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorica.data.encode import EncodeSummary, encode
from lorica.data.encoder import Encoded
from lorica.data.example import Chat, Example, Pair, Text, Tokens
from lorica.data.reader import open_source
from lorica.data.record import Rejected
from lorica.data.validate import Report, overlap, validate, write_rejected

if TYPE_CHECKING:
    from lorica.data.collate import Collator, FlatCollator
    from lorica.data.dataset import EncodedDataset, load, render
    from lorica.data.task_rows import load_rows

__all__ = [
    "Chat",
    "Collator",
    "EncodeSummary",
    "Encoded",
    "EncodedDataset",
    "Example",
    "FlatCollator",
    "Pair",
    "Rejected",
    "Report",
    "Text",
    "Tokens",
    "encode",
    "load",
    "load_rows",
    "open_source",
    "overlap",
    "render",
    "validate",
    "write_rejected",
]

_NEEDS_TORCH = {
    "Collator": "collate",
    "EncodedDataset": "dataset",
    "FlatCollator": "collate",
    "load": "dataset",
    "load_rows": "task_rows",
    "render": "dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
