"""Read-only access to the weights of a model or of a folder of safetensors, one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection, KeysView
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorica.constrain.linear import WRAPPERS, SubspaceLayer
from lorica.errors import LoricaError, one_line
from lorica.json_file import load_record, read_json
from lorica.subspace.plan import Plan

TRANSPOSED_FAMILIES = {"gpt2"}
"""Architectures whose linear weights are stored (in, out)."""


class Weights:
    """The tensors of one state of a model, by state-dict key.

    Attributes:
        family: ``config.model_type``, or "unknown".
    """

    family: str = "unknown"

    def keys(self) -> KeysView[str]:
        """Return the keys, in the order they are stored."""
        raise NotImplementedError

    def tensor(self, key: str) -> Tensor:
        """Return one tensor as it is stored, on the CPU."""
        raise NotImplementedError

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the stored shape of one tensor without reading it."""
        raise NotImplementedError

    def matrix(self, key: str) -> Tensor:
        """Return a linear layer's weight as (out, in)."""
        raise NotImplementedError

    def recorded_plan(self) -> Plan | None:
        """Return the plan saved with these weights, if one was."""
        return None

    def __contains__(self, key: str) -> bool:
        return key in self.keys()


class ModelWeights(Weights):
    """The weights of a model in memory, protected or not."""

    def __init__(self, model: nn.Module) -> None:
        self.family = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
        modules = dict(model.named_modules())
        protected = {name for name, module in modules.items() if isinstance(module, SubspaceLayer)}
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tied = names - {name for name, _ in model.named_parameters()}  # stored once, as in a saved folder
        self._state = {
            key: value for key, value in model.state_dict().items() if key not in tied and not _is_core(key, protected)
        }
        self._transposed = {
            f"{name}.weight"
            for name, module in modules.items()
            if getattr(module, "transposed", False) or getattr(WRAPPERS.get(type(module)), "transposed", False)
        }

    def keys(self) -> KeysView[str]:
        return self._state.keys()

    def tensor(self, key: str) -> Tensor:
        return _found(self, key, self._state).detach().cpu()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._state[key].shape)

    def matrix(self, key: str) -> Tensor:
        return self.tensor(key).T if key in self._transposed else self.tensor(key)

    def __str__(self) -> str:
        return f"the {self.family} model"


class FolderWeights(Weights):
    """The weights in a folder of safetensors, or in one file; tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / "adapter_config.json").exists():
            raise LoricaError(f"{path}: an adapter, not a model; merge it into its base model and save that")
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise LoricaError(_nothing_in(path))
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise LoricaError(f"{file}: not a readable safetensors file: {one_line(error)}") from error
            self._files.update(dict.fromkeys(handle.keys(), handle))
        config = _json(path / "config.json") if path.is_dir() else {}
        self.family = str(config.get("model_type", "unknown"))

    def keys(self) -> KeysView[str]:
        return self._files.keys()

    def tensor(self, key: str) -> Tensor:
        return _found(self, key, self._files).get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._files[key].get_slice(key).get_shape())

    def matrix(self, key: str) -> Tensor:
        return self.tensor(key).T if self.family in TRANSPOSED_FAMILIES else self.tensor(key)

    def recorded_plan(self) -> Plan | None:
        record = self.path / "lorica.json"
        if not self.path.is_dir() or not record.exists():
            return None
        try:
            rows = load_record(record).get("plan")
        except (OSError, ValueError, AttributeError) as error:
            raise LoricaError(f"{record}: cannot read the plan: {one_line(error)}; restore it, or remove it") from error
        try:
            return Plan.from_records(rows, self.family) if rows else None
        except (ValidationError, AttributeError, TypeError) as error:
            raise LoricaError(f"{record}: field 'plan' is not a plan: {one_line(error)}") from error

    def __str__(self) -> str:
        return str(self.path)


class Stripped(Weights):
    """Weights under their keys without a prefix."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.family, self._weights = weights.family, weights
        self._keys = {key.removeprefix(prefix): key for key in weights.keys()}

    def keys(self) -> KeysView[str]:
        return self._keys.keys()

    def tensor(self, key: str) -> Tensor:
        return self._weights.tensor(_found(self, key, self._keys))

    def shape(self, key: str) -> tuple[int, ...]:
        return self._weights.shape(self._keys[key])

    def matrix(self, key: str) -> Tensor:
        return self._weights.matrix(_found(self, key, self._keys))

    def __str__(self) -> str:
        return str(self._weights)


def prefix_apart(names: Collection[str], *stores: Weights) -> str:
    """Return the prefix without which some of the names are in every store; empty if they are so already.

    A bare GPT-2 calls ``h.0`` what the model with a head calls ``transformer.h.0``: the key of one is that of
    the other without its first part.
    """
    sets = [set(names), *(set(store.keys()) for store in stores)]

    def shared(prefix: str) -> int:
        return len(set.intersection(*({key.removeprefix(prefix) for key in keys} for keys in sets)))

    first_parts = sorted({key.partition(".")[0] + "." for keys in sets for key in keys})
    return "" if shared("") else max(["", *first_parts], key=shared)


def open_weights(source: nn.Module | str | Path) -> Weights:
    """Open a model, a folder or a ``.safetensors`` file for reading.

    Raises:
        LoricaError: no such path, or nothing in it that can be read without unpickling.
    """
    if isinstance(source, nn.Module):
        return ModelWeights(source)
    path = Path(source)
    if not path.exists():
        raise LoricaError(f"{path}: no such file or folder")
    return FolderWeights(path)


def _found(weights: Weights, key: str, store: dict[str, Any]) -> Any:
    if key not in store:
        raise LoricaError(f"{weights} has no tensor {key}")
    return store[key]


def _is_core(key: str, protected: set[str]) -> bool:
    module, _, leaf = key.rpartition(".")
    return leaf == "core" and module in protected


def _nothing_in(path: Path) -> str:
    pickles = sorted(file.name for file in path.glob("*.bin"))
    if pickles:
        return f"{path}: only pickled weights ({pickles[0]}); save the model as safetensors first"
    return f"{path}: no .safetensors file"


def _json(path: Path) -> dict[str, Any]:
    data = read_json(path, "JSON file") if path.exists() else {}
    return data if isinstance(data, dict) else {}
