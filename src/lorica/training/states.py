"""Optimizer, schedule and random states as safetensors and JSON: what the Trainer would pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorica.errors import LoricaError, one_line
from lorica.json_file import load_json

PIECE = 1 << 22
"""Bytes that are read of a file before it is opened anew."""

TRUSTED = "torchao."
"""Modules whose tensor subclasses are built again from what a file names; no other class is looked up."""


def save_tree(tree: Any, folder: Path, name: str) -> None:
    """Write nested dictionaries, lists, numbers and tensors as ``name.safetensors`` and ``name.json``.

    Raises:
        LoricaError: something in it is neither data nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    plain = _flat(tree, name, tensors)
    (folder / f"{name}.json").write_text(json.dumps(plain) + "\n", encoding="utf-8")
    save_file(tensors, folder / f"{name}.safetensors")


def load_tree(folder: Path, name: str) -> Any:
    """Return what ``save_tree`` wrote.

    Raises:
        OSError, ValueError, SafetensorError: the files are missing or damaged.
    """
    tensors = _read(folder / f"{name}.safetensors")
    plain = load_json(folder / f"{name}.json", constants=True)  # a state may hold an infinity
    try:
        return _nested(plain, tensors)
    except (LookupError, TypeError, AttributeError, ImportError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{name}.json is no tree of states: {one_line(repr(error))}") from error


def _read(file: Path) -> dict[str, Tensor]:
    """Return a file's tensors in memory of their own: in a mapped file they lie at odd addresses.

    The file is opened anew now and then, since what was read of a mapped file counts as resident until it is closed.
    """
    source, tensors, read = safe_open(str(file), framework="pt"), {}, 0
    for key in source.keys():  # no mapping
        if read > PIECE:
            source, read = safe_open(str(file), framework="pt"), 0
        tensors[key] = source.get_tensor(key).clone()
        read += tensors[key].nbytes
    return tensors


def _flat(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON; each tensor goes into ``tensors`` and leaves its name. Containers are tagged."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
        name = path if path not in tensors else f"{path} ({len(tensors)})"  # {"a.b": _, "a": {"b": _}}, {1: _, "1": _}
        tensors[name] = _apart(value.detach().cpu().contiguous(), tensors)
        return {"tensor": name}
    if isinstance(value, Tensor) and type(value).__module__.startswith(TRUSTED):
        names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        parts = {part: _flat(getattr(value, part), f"{path}.{part}", tensors) for part in names}
        return {"wrapped": kind, "parts": parts, "context": _flat(context, f"{path}.context", tensors)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": [[key, _flat(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        tag = "list" if isinstance(value, list) else "tuple"
        return {tag: [_flat(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    raise LoricaError(
        f"{path} is a {type(value).__name__}, which only a pickle could hold, so this run cannot be resumed; take "
        "another optimizer or schedule, or give --save_strategy no"
    )


def _apart(tensor: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor that shares memory with no other: safetensors writes none twice."""
    taken = {other.untyped_storage().data_ptr() for other in others.values() if other.numel()}
    return tensor.clone() if tensor.numel() and tensor.untyped_storage().data_ptr() in taken else tensor


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((tag, held),) = [item for item in value.items() if item[0] not in ("parts", "context")]
    if tag == "tensor":
        return tensors[held]
    if tag == "dtype":
        return _dtype(held)
    if tag == "dict":
        return {key: _nested(item, tensors) for key, item in held}
    if tag == "wrapped":
        return _wrapped(held, value, tensors)
    return {"list": list, "tuple": tuple}[tag](_nested(item, tensors) for item in held)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch.{name} is no dtype")
    return found


def _wrapped(kind: str, value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    module, _, name = kind.partition(":")
    if not module.startswith(TRUSTED):
        raise ValueError(f"{kind} is no class of {TRUSTED}*")
    parts = {part: _nested(item, tensors) for part, item in value["parts"].items()}
    unflatten = getattr(import_module(module), name).__tensor_unflatten__
    result: Tensor = unflatten(parts, _nested(value["context"], tensors), None, None)
    return result


def random_state() -> dict[str, Any]:
    """Return the states of all random generators that training draws from."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = legacy
    return {
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
        "numpy": {"kind": kind, "keys": torch.from_numpy(keys.astype(np.int64)), "position": position,
                  "has_gauss": has_gauss, "cached": cached},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }  # fmt: skip


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set what ``random_state`` returned."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
