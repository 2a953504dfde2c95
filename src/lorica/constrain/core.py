"""The parameter that trains, and what makes sure that its weight is folded after every step of any optimizer."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lorica.constrain import sharded

if TYPE_CHECKING:
    from lorica.constrain.linear import SubspaceLayer


class Core(nn.Parameter):
    """The parameter that trains; it counts how often its ``data`` was asked for.

    What is written through ``data`` (hand-written loops, zeroth-order methods, ``vector_to_parameters``) does
    not raise the version counter, so handing ``data`` out has to count as a write.
    """

    handed_out = 0

    @property
    def data(self) -> Tensor:
        self.handed_out += 1
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        self.handed_out += 1
        nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]

    @staticmethod
    def state_of(core: nn.Parameter) -> tuple[int, int, int]:
        """Return what differs whenever the core may have been written to, or replaced, since."""
        return id(core), core._version, getattr(core, "handed_out", 0)


_layers: weakref.WeakValueDictionary[int, SubspaceLayer] = weakref.WeakValueDictionary()
"""The layer of each core, by the core's id."""

_every_layer: weakref.WeakValueDictionary[int, SubspaceLayer] = weakref.WeakValueDictionary()
"""By the layer's id, in the order in which they were made: the same in every process."""


def register(layer: SubspaceLayer) -> None:
    """Note which layer a core belongs to; also after the core was replaced."""
    _layers[id(layer.core)] = layer
    if layer.shards is not None:
        _layers[id(layer.shards.core)] = layer
    _every_layer[id(layer)] = layer


def forget(layer: SubspaceLayer) -> None:
    """Undo ``register``."""
    _layers.pop(id(layer.core), None)
    _every_layer.pop(id(layer), None)


def layers_of(optimizer: Optimizer) -> list[SubspaceLayer]:
    """Return the layers whose cores an optimizer holds, in its order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(isinstance(parameter, DTensor) and _layer_of(parameter) is None for parameter in parameters):
        for layer in list(_every_layer.values()):  # FSDP2 has put parameters of its own in the place of the cores
            register(layer)
    return [layer for layer in map(_layer_of, parameters) if layer is not None]


def _layer_of(parameter: Tensor) -> SubspaceLayer | None:
    layer = _layers.get(id(parameter))
    if layer is None:
        return None
    # Ids are used again; and while FSDP2 has gathered a core, the layer itself holds another parameter.
    own = layer.core is parameter or (layer.shards is not None and layer.shards.core is parameter)
    return layer if own else None


def _fold_after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    layers = layers_of(optimizer)
    sharded.settle(layers)
    for layer in layers:
        if layer.shards is None:
            layer.fold()
    sharded.fold([layer for layer in layers if layer.shards is not None])


# A version counter would not do as the only trigger: fused AdamW does not raise it.
register_optimizer_step_post_hook(_fold_after_step)
