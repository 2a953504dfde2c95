"""Linear layers that train only in the free directions of their weight."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lorica.constrain.core import Core, forget, register
from lorica.constrain.reduced import ReducedLinear, lift, shared_product
from lorica.constrain.sharded import fold as fold_sharded
from lorica.constrain.sharded import settle
from lorica.constrain.sharded_layer import ShardedLayer
from lorica.errors import LoricaError
from lorica.subspace.basis import Basis

ZERO_3 = "DeepSpeed's ZeRO-3 takes the weights apart, and a folded one would be lost; use ZeRO-1 or 2, or FSDP2"


class Aside(NamedTuple):
    """What the fold needs and nothing else does, kept off the device of the weight.

    Attributes:
        weight: W0 as it is stored.
        bases: Q_U and Q_V in float32, where the gradient is reduced by narrower copies; None: it uses the same.
    """

    weight: Tensor
    bases: tuple[Basis, Basis] | None


class SubspaceLayer(ShardedLayer):
    """What the protected forms of ``nn.Linear`` and GPT-2's ``Conv1D`` share.

    The weight is

        W = W0 + Q_U M Q_V^T

    with W0 the weight that came in, Q_U and Q_V orthonormal bases of the free output and input directions,
    and M, called ``core``, the only tensor that trains. ``weight`` is dense, frozen and under its own name,
    so that the forward pass costs what the plain layer's does. It is folded anew, always from W0, after
    every step of any ``torch.optim.Optimizer`` that holds the core, and before its next use whenever the core
    was written to in another way (``load_state_dict``, ``core.data.copy_``); a sharded layer not before ``release``.

    Attributes:
        core: M (P x Q), float32 (float64 for float64 weights), zero at first.
        base: W0 (out, in) in the dtype of the weight: a buffer, or where it was set aside a plain tensor that stays
            where it is; empty where another process owns it.
        out_basis: Q_U.
        in_basis: Q_V.
    """

    transposed = False
    """Whether the weight is stored (in, out)."""

    @classmethod
    def wrap(cls, plain: nn.Linear | Conv1D, out_basis: Basis, in_basis: Basis, aside: Aside | None = None) -> Self:
        """Return the protected form of a layer; it shares the layer's parameters and keeps it for release.

        Args:
            plain: the layer.
            out_basis, in_basis: Q_U and Q_V.
            aside: a copy of the weight, and perhaps of the bases, that lies elsewhere; by default W0 is copied beside
                the weight. With bases there, the gradient is reduced by copies in the dtype of the weight.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        own = {"_parameters": dict(plain._parameters), "_buffers": {}, "_modules": {}}
        layer.__dict__.update(plain.__dict__ | own)  # hooks are shared
        layer._plain = (plain,)  # in a tuple: not a submodule
        layer._install(out_basis, in_basis, aside)
        return layer.train(plain.training)

    def _install(self, out_basis: Basis, in_basis: Basis, aside: Aside | None) -> None:
        device, dtype = self.matrix.device, self.matrix.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.core = Core(torch.zeros(out_basis.free, in_basis.free, dtype=wide, device=device))
        self._exact = None if aside is None else aside.bases
        if aside is None:
            self.register_buffer("base", self.matrix.detach().clone(), persistent=False)
        else:
            self.base = aside.weight.T if self.transposed else aside.weight
        kept = dtype if self._exact else wide
        self.out_basis, self.in_basis = out_basis.to(device, kept), in_basis.to(device, kept)
        self._folded = Core.state_of(self.core)
        register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if type(self.core) is nn.Parameter:  # pickle knows no other; the same object may be in an optimizer
            self.core.__class__ = Core
        self._folded = ()  # a copied or unpickled core starts counts of its own
        register(self)

    def unwrap(self) -> nn.Linear | Conv1D:
        """Return the plain layer that was wrapped, with the folded weight."""
        self.refresh()
        (plain,) = self._plain
        plain.weight, plain.bias = self.weight, self.bias  # type: ignore[assignment]
        plain.train(self.training)
        forget(self)
        if self.shards is not None:
            plain._parameters.pop("core", None)
        return plain

    @property
    def matrix(self) -> Tensor:
        """The weight as (out, in), whatever its layout."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def delta(self) -> Tensor:
        """Return ``Q_U M Q_V^T`` (out x in), the change since ``protect``, in the dtype of the core.

        Not to be written to: where nothing is protected it is the core itself.

        Raises:
            LoricaError: FSDP2 has sharded the layer.
        """
        self.check_whole()
        return self._lifted(self.core.detach(), self._origin())

    def _origin(self, device: torch.device | None = None) -> Tensor:
        """Return W0 on a device, by default that of the core.

        What was set aside is copied even where it is on that device: a memory map begins at any address, and products
        of the same numbers at another address can differ in their last bit.
        """
        if self.base.is_meta and not self.core.is_meta:
            raise LoricaError(
                "the weights had no values when they were protected: switch fsdp_cpu_ram_efficient_loading off in "
                "Accelerate's configuration, or load the model sharded (docs/distributed.md)"
            )
        aside = "base" not in self._buffers
        return self.base.to(device or self.core.device, copy=True, non_blocking=True) if aside else self.base

    def _lifted(self, core_PQ: Tensor, origin: Tensor) -> Tensor:
        out, inp = self.out_basis, self.in_basis
        if self._exact is not None:
            out, inp = (side.mapped(lambda kept: kept.to(origin.device, non_blocking=True)) for side in self._exact)
        return lift(core_PQ, out.on(origin), inp.on(origin.T))

    @torch.no_grad()
    def fold(self) -> None:
        """Set the weight to ``W0 + Q_U M Q_V^T``, computed in the dtype of the core and rounded once.

        Of a sharded layer all processes have to.
        """
        self._check_use()
        if isinstance(self.core, DTensor):
            settle([self])
            fold_sharded([self])
            return
        self._fold_into(self.matrix, self.core.detach())
        self._folded = Core.state_of(self.core)
        register(self)  # the core may have been replaced

    def _check_use(self) -> None:
        if self.core.dtype not in (torch.float32, torch.float64):
            raise LoricaError(
                f"a protected model was cast to {self.core.dtype}; cast the model before lorica.protect, not after "
                "(with DeepSpeed use torch_autocast, not its bf16 or fp16)"
            )
        if hasattr(self.weight, "ds_id"):
            raise LoricaError(ZERO_3)

    def folded(self, core_PQ: Tensor) -> Tensor:
        """Return the weight, as it is stored, that a core stands for."""
        weight = torch.empty_like(self.base.T if self.transposed else self.base, device=core_PQ.device)
        self._fold_into(weight.T if self.transposed else weight, core_PQ)
        return weight

    def _fold_into(self, weight_MN: Tensor, core_PQ: Tensor) -> None:
        origin = self._origin(core_PQ.device)
        with full_precision(origin.device.type):
            torch.add(self._lifted(core_PQ, origin), origin, out=weight_MN)

    def refresh(self) -> None:
        """Fold if the core may have been written to since the last fold.

        A sharded layer is folded after each step and when it is loaded, by all processes together.
        """
        if self.shards is None and not self.taken_over and Core.state_of(self.core) != self._folded:
            self.fold()

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.refresh()
        if torch.is_grad_enabled() and self.core.requires_grad:
            product = shared_product(self.in_basis, x) if self.in_basis.shared and not compiling else None
            bases = (self.out_basis, self.in_basis)
            return ReducedLinear.apply(x, self.core, self.matrix, self.bias, *bases, product, self._across())
        return F.linear(x, self.matrix, self.bias)  # type: ignore[arg-type]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.refresh()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        saved = state_dict.get(f"{prefix}weight")
        errors = lists[-1]
        if saved is not None and f"{prefix}core" not in state_dict:
            errors.append(f"{prefix}weight is a plain weight: call lorica.release before loading it")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        self.fold()
        weight = _local(self.get_parameter("weight"))
        if saved is not None and not _equal_to_rounding(_local(saved).to(weight), weight):
            errors.append(f"{prefix}core was saved by an update that began at another model")

    def extra_repr(self) -> str:
        m, n = self.matrix.shape
        return f"in_features={n}, out_features={m}, core={tuple(self.core.shape)}, bias={self.bias is not None}"


class SubspaceLinear(SubspaceLayer, nn.Linear):
    """``nn.Linear`` that trains only in the free directions of its weight; see :class:`SubspaceLayer`."""


class SubspaceConv1D(SubspaceLayer, Conv1D):
    """GPT-2's ``Conv1D``, whose weight is stored (in, out); see :class:`SubspaceLayer`."""

    transposed = True


WRAPPERS: dict[type[nn.Module], type[SubspaceLayer]] = {nn.Linear: SubspaceLinear, Conv1D: SubspaceConv1D}
"""The exact layer types that can be protected. A subclass may compute something else, so it is refused."""


def matrix_of(module: nn.Module) -> Tensor:
    """Return a layer's weight as (out, in), whatever its layout."""
    weight = module.get_parameter("weight")
    return weight.T if WRAPPERS[type(module)].transposed else weight


def full_precision(device: str) -> contextlib.AbstractContextManager[None]:
    """Keep mixed precision out: a fold may be asked for by a forward pass under it, and a bfloat16 one would leak."""
    known = torch.amp.is_autocast_available(device)  # not on the meta device
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _equal_to_rounding(a: Tensor, b: Tensor) -> bool:
    return not b.numel() or bool((a - b).abs().max() <= 8 * torch.finfo(b.dtype).eps * b.abs().max())
