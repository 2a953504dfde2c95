"""What a method carries from task to task, as one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorica.errors import LoricaError
from lorica.files import written_aside


def save_memory(state: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors by name, wherever they are and however they are laid out; whole or not at all.

    Raises:
        CannotWrite: there is no room for them.
    """
    with written_aside(file, lambda: size_of(state)) as aside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, aside)


def load_memory(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, each in memory of its own.

    Read in place they lie at any address, and a matrix product of them can differ in its last bit from that of the
    tensors that were saved.

    Raises:
        LoricaError: the file cannot be read.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def load_one(file: Path, name: str) -> Tensor | None:
    """Return one tensor of a file, None if there is none of that name; the others are not read.

    Raises:
        LoricaError: the file cannot be read.
    """
    try:
        with safe_open(file, "pt") as stored:
            return stored.get_tensor(name) if name in stored.keys() else None
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> LoricaError:
    return LoricaError(f"{file}: cannot read what the method remembers: {error}")


def size_of(state: Mapping[str, Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())
