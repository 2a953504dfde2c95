"""Model folders before and after small updates."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW

import lorica
from lorica.subspace.plan import Plan
from tests.builders import batch, tiny, train, trainable


def stored(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, read by safetensors alone."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def same_files(one: Path, two: Path) -> bool:
    """Return whether two model folders hold the same safetensors files, byte for byte."""
    names = [sorted(file.name for file in folder.glob("*.safetensors*")) for folder in (one, two)]
    return names[0] == names[1] and all((one / name).read_bytes() == (two / name).read_bytes() for name in names[0])


def saved(model: nn.Module, folder: Path, shards: str = "1GB") -> Path:
    """Save a model."""
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def updated(model: nn.Module, plan: Plan, steps: int = 2, lr: float = 3e-3, seed: int = 0) -> nn.Module:
    """Train a model in place as ``lorica train`` does."""
    lorica.protect(model, plan)
    train(model, AdamW(trainable(model), lr=lr), steps, partial(inputs, model, seed))
    return lorica.release(model)


def inputs(model: nn.Module, seed: int, step: int) -> dict[str, Tensor]:
    """Return a batch that another seed does not share."""
    return batch(model, 1000 * seed + step)


def before_and_after(
    tmp_path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, shards: str = "1GB", **options: object
) -> tuple[Path, Path]:
    """Return the folders of a small model before and after an update; the options are those of ``lorica.plan``."""
    model = tiny(name, dtype)
    before = saved(model, tmp_path / "before", shards)
    updated(model, lorica.plan(model, 0.5, **options))  # type: ignore[arg-type]
    return before, saved(model, tmp_path / "after", shards)
