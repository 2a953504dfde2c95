"""Bookkeeping of a dry run: the bytes that are alive, by kind, and the work that is done."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

LOSS = "logits and loss"
KINDS = ("weights", "W0", "bases", "curvature", "cores", "gradients", "optimizer states", "activations", LOSS)
"""What memory is for, in the order of the table."""

PASSING = ("activations", LOSS)
"""What each step makes anew."""

SMALL = 32 * 1024 * 1024
"""Pieces from here on glibc's ``malloc`` maps by themselves and gives back at once."""

_aten = torch.ops.aten


@dataclass
class _Block:
    nbytes: int
    kind: str


@dataclass(frozen=True)
class Operation:
    """One operation's work.

    Attributes:
        flops: of matrix products and attention; 0 for all else, whose time is that of the memory.
        nbytes: read and written.
        narrow: whether it computes in float16 or bfloat16.
    """

    flops: int
    nbytes: int
    narrow: bool


class Ledger(TorchDispatchMode):
    """Follows every storage made while it is on, and those it is told of, until nothing holds it any more.

    It works below autograd, so that what the backward pass keeps is counted for as long as it is kept. On meta tensors
    all of this costs no memory and next to no time. A question for a value, which a meta tensor has not, is answered
    with yes (1): all tokens are attended to, the loss is finite; what a mask leaves of a tensor is all of it.

    Attributes:
        kind: what new storages count as.
        now: bytes alive, by kind.
        peak: ``now`` at the moment when its sum was largest, since ``restart``.
        work: how often each operation was done, since ``restart``.
        small: the largest sum of activations in pieces below ``SMALL`` bytes that were alive together,
            since ``restart``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.work: Counter[Operation] = Counter()
        self._blocks: dict[int, tuple[_Block, weakref.ref[torch.UntypedStorage]]] = {}
        self.small = 0
        self._small_now = 0
        self._on = True

    def restart(self) -> None:
        """Look for the peak, and count the work, from now on."""
        self.peak, self.work, self.small = Counter(self.now), Counter(), self._small_now

    def own(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors' storages as this kind from now on."""
        for tensor in tensors:
            block = self._hold(tensor)
            self.now[block.kind] -= block.nbytes
            self._count_small(block, -1)
            block.kind = kind
            self.now[kind] += block.nbytes
        self._rise()

    def elsewhere(self, tensors: Iterable[Tensor]) -> int:
        """Count these tensors' storages as nothing, for they lie in other memory; return their bytes."""
        return sum(self._leave_out(tensor) for tensor in tensors)

    def pause(self) -> None:
        """Leave out what is made and gone again, and the work, until ``resume``: it stands for one fused kernel."""
        self._on = False

    def resume(self, done: Operation) -> None:
        """Go on, with the fused kernel's work done."""
        self._on = True
        self.work[done] += 1
        self._rise()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            return 1
        if func is _aten.index.Tensor and _is_masked(*args):
            func, args = _aten.clone.default, (args[0].flatten(0, args[1][0].ndim - 1),)
        out = func(*args, **(kwargs or {}))
        given, made = list(_tensors((args, kwargs))), list(_tensors(out))
        if self._on and (func._schema.is_mutable or any(self._is_new(tensor) for tensor in made)):
            self.work[_operation(func, args, kwargs or {}, given, made, out)] += 1
        for tensor in made:
            self._hold(tensor)
        self._rise()
        return out

    def _is_new(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata not in self._blocks

    def _hold(self, tensor: Tensor) -> _Block:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._blocks:
            block = _Block(storage.nbytes(), self.kind)
            self._blocks[key] = block, weakref.ref(storage, lambda _: self._drop(key))
            self.now[block.kind] += block.nbytes
            self._count_small(block, 1)
        return self._blocks[key][0]

    def _leave_out(self, tensor: Tensor) -> int:
        block = self._hold(tensor)
        self._count_small(block, -1)
        nbytes, block.nbytes = block.nbytes, 0
        self.now[block.kind] -= nbytes
        return nbytes

    def _drop(self, key: int) -> None:
        block, _ = self._blocks.pop(key)
        self.now[block.kind] -= block.nbytes
        self._count_small(block, -1)

    def _count_small(self, block: _Block, sign: int) -> None:
        if block.kind in PASSING and block.nbytes < SMALL:
            self._small_now += sign * block.nbytes
            self.small = max(self.small, self._small_now)

    def _rise(self) -> None:
        if self._on and self.now.total() > self.peak.total():
            self.peak = Counter(self.now)


def _is_masked(tensor: Tensor, indices: list[Tensor | None]) -> bool:
    """Return whether this is ``tensor[mask]`` on the meta device, which has no value to say how much that is."""
    mask = indices[0]
    return tensor.is_meta and len(indices) == 1 and mask is not None and mask.dtype == torch.bool and mask.ndim > 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _operation(func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor], out: Any) -> Operation:
    packet = func._overloadpacket
    flops = _attention_flops(packet, args)
    if flops is None:
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
    narrow = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in given)
    return Operation(int(flops), sum(map(_touched, given)) + sum(map(_touched, made)), narrow)


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor that pass through memory: what it broadcasts is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


_FORWARD = {
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
}
_BACKWARD = {
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
}


def _attention_flops(packet: Any, args: Any) -> int | None:
    """Operations of a fused attention, two products forward and five backward; torch has no formula for the CPU's,
    and refuses fewer heads of keys than of queries."""
    if packet not in _FORWARD | _BACKWARD:
        return None
    products, (query, key, value) = (2, args[:3]) if packet in _FORWARD else (5, args[1:4])
    batch, heads, rows, width = query.shape
    return int(products * batch * heads * rows * key.shape[-2] * (width + value.shape[-1]))
