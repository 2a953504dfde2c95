"""What the weights were split into when a task began, as files beside its checkpoints: one, or one of each process.

A resumed run takes its bases from there. Split again, on another machine or by another library, they could have other
last bits, in a degenerate spectrum even other directions, and a core that belongs to other bases is another weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorica import processes
from lorica.errors import LoricaError
from lorica.files import make_folder, sha256, written_aside
from lorica.subspace.plan import Plan

BASES = "bases/bases.safetensors"
"""In a folder of its own: at the top of an output folder loaders would take it for weights."""

_PLAN, _SAME = "plan", "same"
"""Fields of the file's metadata: the plan, and the names of tensors that are stored under another name."""

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_bases(file: Path, plan: Plan, tensors: Mapping[str, Tensor]) -> str:
    """Write a plan and tensors as safetensors, whole or not at all, and return the SHA-256 of the file.

    One tensor after the other goes to the disk, so that no more than one of them is in memory twice. The same tensor
    under several names is written once.

    Raises:
        CannotWrite: there is no room for it.
    """
    first: dict[int, str] = {}
    same = {name: first[id(t)] for name, t in tensors.items() if first.setdefault(id(t), name) != name}
    stored = {name: tensor for name, tensor in tensors.items() if name not in same}
    size = sum(tensor.nbytes for tensor in stored.values())
    digest = hashlib.sha256()
    make_folder(file.parent)
    with written_aside(file, lambda: size) as aside, aside.open("wb") as stream:
        for piece in _pieces(plan, same, stored):
            digest.update(piece)
            stream.write(piece)
    return digest.hexdigest()


def _pieces(plan: Plan, same: Mapping[str, str], stored: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """Yield the bytes of a safetensors file: the header's length, the header, each tensor."""
    header: dict[str, Any] = {"__metadata__": {_PLAN: plan.model_dump_json(), _SAME: json.dumps(same)}}
    end = 0
    for name, tensor in stored.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in stored.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def write_held(folder: Path, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the bases that all processes hold, each tensor by the first one that holds it; see ``write_bases``.

    Args:
        folder: of the run.
        tensors: those of this process.

    Returns:
        The SHA-256 of each file that was written, here or by another process, by its name in the folder.
    """
    earlier = processes.gathered(sorted(tensors))[: processes.rank()]
    own = {name: tensor for name, tensor in tensors.items() if not any(name in held for held in earlier)}
    file = BASES if processes.first() else str(Path(BASES).with_stem(processes.name()))
    written = {}
    with processes.agreed():
        if own or processes.first():  # the plan counts without bases, too
            written[file] = write_bases(folder / file, plan, own)
    return {name: digest for one in processes.gathered(written) for name, digest in one.items()}


def bases_problem(file: Path, digest: str) -> str | None:
    """Return why a file is not the one that a checkpoint belongs to; None: it is."""
    if not file.is_file():
        return f"{file.name}, the bases that its weights were trained in, is missing from {file.parent}"
    if sha256(file) != digest:
        return f"{file.name} is not the one that its weights were trained in: the SHA-256 differs"
    return None


class KeptBases:
    """The plan and the tensors that ``write_bases`` wrote; each is read when it is asked for.

    Args:
        file: whose SHA-256 has been compared with the one that was noted; see ``bases_problem``.
        others: of further processes, the same.

    Raises:
        LoricaError: one cannot be read.
    """

    def __init__(self, file: Path, *others: Path) -> None:
        self.file = file
        self._files: dict[str, Path] = {}
        self._same: dict[str, str] = {}
        for one in (file, *others):
            try:
                with safe_open(str(one), framework="pt") as source:
                    told = source.metadata()
                    self._files |= dict.fromkeys(source.keys(), one)
                self.plan = Plan.model_validate_json(told[_PLAN])
                self._same |= json.loads(told[_SAME])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError, ValidationError) as error:
                raise LoricaError(f"{one}: cannot read the bases: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._files or name in self._same

    def place(self, name: str) -> str:
        """Return the name under which a tensor is stored: the same for all that are one."""
        return self._same.get(name, name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in memory of its own: in a mapped file it lies at any address, and products can differ.

        Raises:
            LoricaError: there is none of that name.
        """
        if name not in self:
            raise LoricaError(f"{self.file} does not belong to this model: it holds no {name}")
        place = self.place(name)
        with safe_open(str(self._files[place]), framework="pt") as source:
            found: Tensor = source.get_tensor(place).clone()
        return found
