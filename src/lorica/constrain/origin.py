"""Where W0 lies, the weight that came in: beside the weight, or out of the way until the fold asks for it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lorica.constrain.checkpoint import FolderWeights, Weights
from lorica.constrain.linear import Aside
from lorica.errors import LoricaError, did_you_mean
from lorica.subspace.basis import Basis

MemoryMode = Literal["fast", "lean"]

MEMORY_MODES: dict[str, str] = {
    "fast": "all on the device of the weight",
    "lean": "W0 on the host (a memory map where the weight itself is there), long-side bases read off the weight",
}


def check_memory_mode(name: str) -> None:
    """Refuse an unknown memory mode.

    Raises:
        LoricaError: with the modes that there are.
    """
    if name not in MEMORY_MODES:
        known = ", ".join(MEMORY_MODES)
        raise LoricaError(f"memory {name!r} is unknown; known: {known}.{did_you_mean(name, MEMORY_MODES)}")


def files_of(model: nn.Module) -> Weights | None:
    """Return the safetensors that a model was loaded from, if they lie in a folder of this machine."""
    folder = getattr(model, "name_or_path", "")
    if not folder or not Path(folder).is_dir():
        return None
    try:
        return FolderWeights(Path(folder))
    except LoricaError:  # an adapter, pickles, nothing: the weights came from elsewhere
        return None


def lean(
    weight: Tensor, bases: tuple[Basis, Basis], files: Weights | None, key: str, asides: dict[Basis, Basis]
) -> Aside:
    """Set a weight aside, and with a weight of 16 bits its float32 bases. Other arguments as for ``set_aside``.

    Args:
        asides: of the bases so far; one that several layers share is set aside once, before it is narrowed for them.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return Aside(set_aside(weight, files, key), None)
    return Aside(set_aside(weight, files, key), _once_each(bases, asides, lambda kept: set_aside(kept, None, "")))


def on_host(weight_MN: Tensor, bases: tuple[Basis, Basis], asides: dict[Basis, Basis]) -> Aside:
    """Return a weight and its bases on the host, where FSDP2 offloads the weight to; ``asides`` as for ``lean``."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor if tensor.device.type == "cpu" else set_aside(tensor, None, "")

    return Aside(moved(weight_MN), _once_each(bases, asides, moved))


def _once_each(
    bases: tuple[Basis, Basis], asides: dict[Basis, Basis], move: Callable[[Tensor], Tensor]
) -> tuple[Basis, Basis]:
    for basis in bases:
        if basis not in asides:
            asides[basis] = basis.mapped(move)
    out, inp = (asides[basis] for basis in bases)
    return out, inp


def set_aside(weight: Tensor, files: Weights | None, key: str) -> Tensor:
    """Return a copy of a weight that takes no memory of the weight's device.

    For a weight on an accelerator that is host memory, page-locked where that is possible. For one on the CPU it is a
    memory map, whose pages the system may drop and read again: of the file that the weight was loaded from, where
    that still holds the same numbers, else of a nameless file in the folder for temporary files (``TMPDIR``).

    Args:
        weight: as it is stored.
        files: where it may have been loaded from.
        key: its name there.
    """
    if weight.is_meta:
        return torch.empty_like(weight)
    if weight.device.type != "cpu":
        host = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
        return host.copy_(weight)
    held = files is not None and key in files and files.shape(key) == weight.shape
    stored = files.tensor(key) if held and files is not None else None
    same = stored is not None and stored.dtype == weight.dtype and torch.equal(stored, weight)
    return stored if same and stored is not None else _mapped_copy(weight)


def _mapped_copy(weight: Tensor) -> Tensor:
    with tempfile.NamedTemporaryFile(prefix="lorica-", suffix=".weight", delete=False) as file:
        name = Path(file.name)
        try:
            _reserve(file.fileno(), weight.nbytes)
            mapped = torch.from_file(str(name), shared=True, size=weight.numel(), dtype=weight.dtype)
        except (OSError, RuntimeError) as error:
            raise LoricaError(
                f"memory 'lean' keeps a copy of the weights in {name.parent}, which has no room for it ({error}); "
                "set TMPDIR to a folder with room, or use memory 'fast'"
            ) from error
        finally:
            with contextlib.suppress(OSError):  # where a mapped file cannot be removed, the system's cleaning finds it
                name.unlink()
    return mapped.view(weight.shape).copy_(weight)


def _reserve(file: int, size: int) -> None:
    """Take the room now: a map that finds the disk full ends the process without a word."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)
