"""From update to update: whose child a model is, what its method remembers, and what happens if it forgot too much."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.data.dataset import EncodedDataset
from lorica.errors import LoricaError
from lorica.files import Listing, listing, make_folder, move_into, sync_folder
from lorica.json_file import load_record
from lorica.memory import load_memory, load_one, save_memory
from lorica.methods import METHODS
from lorica.record import redacted

RECORD = "lorica.json"
MEMORY = Path("memory") / "lorica-memory.safetensors"
"""In a folder of its own: loaders of plain models read every safetensors file at the top."""

CANDIDATE, REJECTED = "candidate", "rejected"
"""Where the model of an update waits while its forgetting is measured, and where it goes if that is too much."""


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from, as far as its folder tells.

    Attributes:
        model: the folder or name that was given.
        weights_sha256: of its weight files; None for a name on the hub.
        updates: how many updates of Lorica made it.
        method: of the last of them.
    """

    model: str
    weights_sha256: str | None = None
    updates: int = 0
    method: str | None = None

    def memory(self, method: str) -> dict[str, Tensor]:
        """Return what a method carried on from the update before; empty if that was another method or none.

        Raises:
            LoricaError: the file cannot be read.
        """
        file = self._memory_of(method)
        return load_memory(file) if file else {}

    def remembered(self, method: str, name: str) -> Tensor | None:
        """Return one tensor of it, None if there is none of that name.

        Raises:
            LoricaError: the file cannot be read.
        """
        file = self._memory_of(method)
        return load_one(file, name) if file else None

    def _memory_of(self, method: str) -> Path | None:
        file = Path(self.model) / MEMORY
        return file if self.method == method and file.is_file() else None

    def notice(self, method: str) -> str | None:
        """Return what to say where the model carries the memory of another method, which this one cannot use."""
        if self.method in (None, method) or not (Path(self.model) / MEMORY).is_file():
            return None
        return f"{self.model} carries what method {self.method!r} remembers; {method!r} begins without it"

    def to_json(self) -> dict[str, Any]:
        """Return what the record of an update holds of its parent."""
        return {"model": redacted(self.model), "weights_sha256": self.weights_sha256, "updates": self.updates}


def read_lineage(model: str) -> Lineage:
    """Return where a model comes from.

    Raises:
        LoricaError: the folder's record cannot be read.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return Lineage(model)
    weights, file = weights_sha256(folder), folder / RECORD
    if not file.is_file():
        return Lineage(str(folder), weights)
    try:
        record = load_record(file)
        updates = int((record.get("parent") or {}).get("updates") or 0) + 1
    except (OSError, ValueError, AttributeError) as error:
        raise LoricaError(
            f"{file}: cannot read the record of the update before: {error}; restore it, or remove it to begin without "
            "what it tells"
        ) from error
    return Lineage(str(folder), weights, updates, record.get("method"))


def weights_sha256(folder: Path) -> str | None:
    """Return one digest of the weight files of a model folder; None if it has none."""
    return combined(listing(folder, sorted(folder.glob("*.safetensors"))))


def combined(files: Listing) -> str | None:
    """Return one digest of the weight files among those of a model folder; None if there are none."""
    weights = [files[name]["sha256"] for name in sorted(files) if "/" not in name and name.endswith(".safetensors")]
    total = hashlib.sha256(b"".join(map(bytes.fromhex, weights)))
    return total.hexdigest() if weights else None


def keep_memory(output_dir: Path, state: Mapping[str, Tensor]) -> Listing:
    """Write what a method carries to the next update beside the model, if anything, and return what was written."""
    if not state:
        return {}
    file = output_dir / MEMORY
    make_folder(file.parent)
    save_memory(state, file)
    return listing(output_dir, [file])


def check_single_update(method: str) -> None:
    """Refuse a method that is defined on a whole stream only."""
    kind = METHODS[method]
    if kind.restarts or kind.bound:
        raise LoricaError(f"method {method!r} is a bound on a whole stream; it runs with lorica run")


def check_forgetting(limit: float | None, retention: Mapping[str, EncodedDataset]) -> None:
    """Refuse a limit on forgetting for files that have no answers to lose."""
    for name, rows in retention.items() if limit is not None else ():
        if not any(row.answer is not None for row in rows.examples):
            raise LoricaError(
                f"--max_forgetting counts points of exact match, and no row of {rows.summary['path']} ({name}) has an "
                "answer; give prompts with completions"
            )


def forgotten(scores: Mapping[str, Any], limit: float | None) -> dict[str, float]:
    """Return the retention files that lost more than ``limit`` points of exact match, with the points."""
    before, after = scores["before"]["retention"], scores["after"]["retention"]
    lost = {name: before[name]["exact_match"] - after[name]["exact_match"] for name in before if limit is not None}
    return {name: points for name, points in lost.items() if points > (limit or 0.0)}


def candidate(output_dir: Path) -> Path:
    """Return the folder, made, where the model of an update waits until its forgetting is measured."""
    folder = output_dir / CANDIDATE
    make_folder(folder)
    return folder


def settle(output_dir: Path, limit: float | None, lost: Mapping[str, float]) -> Path:
    """Put the model of an update where its verdict sends it, and return where.

    An update that had ended may be gone on with, and judged anew: what the verdict before put elsewhere goes.

    Args:
        limit: None: the model is in its place already, no verdict was asked for.
        lost: what it lost too much of; empty: it is accepted.
    """
    if lost:
        return reject(output_dir)
    if limit is not None:
        promote(output_dir)
    for aside in (CANDIDATE, REJECTED):
        shutil.rmtree(output_dir / aside, ignore_errors=True)
    return output_dir


def promote(output_dir: Path) -> Path:
    """Move an accepted candidate to where the model belongs, and return that."""
    move_into(output_dir / CANDIDATE, output_dir)
    shutil.rmtree(output_dir / CANDIDATE)
    return output_dir


def reject(output_dir: Path) -> Path:
    """Keep a candidate that forgot too much aside, where nobody loads it by mistake, and return where."""
    waiting = output_dir / CANDIDATE
    names = [file.relative_to(waiting) for file in waiting.rglob("*") if file.is_file()]
    weights_first = sorted(names, key=lambda name: name.suffix != ".safetensors")  # no loader takes the rest alone
    for name in weights_first:
        (output_dir / name).unlink(missing_ok=True)  # of the same update, ended before with another verdict
    shutil.rmtree(output_dir / REJECTED, ignore_errors=True)  # of the same update, stopped before it was recorded
    rejected = waiting.rename(output_dir / REJECTED)
    sync_folder(output_dir)
    return rejected
