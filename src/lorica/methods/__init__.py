"""The methods, one class a file. Importing this package registers them all."""

from __future__ import annotations

from lorica.methods.base import METHODS, Method, Protection
from lorica.methods.osft import OSFT
from lorica.methods.seqft import SeqFT

__all__ = ["METHODS", "OSFT", "Method", "Protection", "SeqFT"]
