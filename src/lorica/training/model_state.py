"""How checkpoints hold a model and the state of its optimizer, where each process has all of both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lorica import processes
from lorica.constrain.checkpoint import open_weights
from lorica.training.output import without_bars
from lorica.training.states import load_tree, save_tree

OPTIMIZER = "optimizer"
"""Name of the files of the optimizer's state."""

MAPPED_SHARE = 1 / 16
"""So much of a checkpoint is read before its file is opened anew."""


class ModelState:
    """Writes a model and its optimizer into checkpoints, and reads them. All processes are to call each method.

    Args:
        model: protected, as it is before its training.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def save(self, folder: Path) -> None:
        """Write the model into a checkpoint's folder."""
        if processes.first():
            with without_bars():
                self.model.save_pretrained(folder)

    def load(self, folder: Path) -> bool:
        """Fill the model from a checkpoint's folder; return whether it could be done, see ``load_weights``.

        Raises:
            LoricaError: a file cannot be read, or is of another model.
        """
        return load_weights(self.model, folder)

    def save_optimizer(self, optimizer: Optimizer, folder: Path) -> None:
        """Write an optimizer's state into the folder of a checkpoint's states."""
        processes.by_first(lambda: save_tree(optimizer.state_dict(), folder, OPTIMIZER))

    def load_optimizer(self, optimizer: Optimizer, folder: Path) -> None:
        """Take over an optimizer's state.

        Raises:
            OSError, SafetensorError, KeyError, ValueError, TypeError: it is missing, damaged, or another optimizer's.
        """
        optimizer.load_state_dict(load_tree(folder, OPTIMIZER))


def load_weights(model: nn.Module, folder: Path) -> bool:
    """Fill a model with a checkpoint's weights, module by module, so that the whole file never lies beside the model.

    A protected layer's weight and core come together, whichever of a checkpoint's files they are in.

    Returns:
        Whether it was done: not where the folder holds adapters alone, or names tensors otherwise than the model does.

    Raises:
        LoricaError: a file cannot be read.
        RuntimeError: a tensor does not fit; see ``torch.nn.Module.load_state_dict``.
    """
    if not any(folder.glob("model*.safetensors")):
        return False
    keys, state = set(open_weights(folder).keys()), model.state_dict(keep_vars=True)
    filled = {id(state[key]) for key in keys & state.keys()}  # tied ones are stored once
    if keys - state.keys() or any(id(tensor) not in filled for tensor in state.values()):
        return False
    most = MAPPED_SHARE * sum(tensor.nbytes for tensor in state.values())
    read = math.inf
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = [leaf for leaf in (*module._parameters, *module._buffers) if prefix + leaf in keys]
        if read > most:  # what was read of a mapped file counts as resident until it is closed
            source, read = open_weights(folder), 0
        tensors = {leaf: source.tensor(prefix + leaf) for leaf in own}
        if tensors:
            module.load_state_dict(tensors, strict=False)
        read += sum(tensor.nbytes for tensor in tensors.values())
    return True
