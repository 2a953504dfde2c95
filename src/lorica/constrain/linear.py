"""Linear layers that train only in the free directions of their weight."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from lorica.constrain.reduced import ReducedLinear, lift, shared_product
from lorica.errors import LoricaError
from lorica.subspace.basis import Basis

_owners: weakref.WeakValueDictionary[int, SubspaceLayer] = weakref.WeakValueDictionary()
"""The layer of each core, by the core's id."""


def _fold_after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            layer = _owners.get(id(parameter))
            if layer is not None and layer.core is parameter:  # ids are used again
                layer.fold()


# A version counter would not do as the only trigger: fused AdamW does not raise it.
register_optimizer_step_post_hook(_fold_after_step)


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


class Aside(NamedTuple):
    """What the fold needs and nothing else does, kept off the device of the weight.

    Attributes:
        weight: W0 as it is stored.
        bases: Q_U and Q_V in float32, where the gradient is reduced by narrower copies; None: it uses the same.
    """

    weight: Tensor
    bases: tuple[Basis, Basis] | None


class SubspaceLayer(nn.Module):
    """What the protected forms of ``nn.Linear`` and GPT-2's ``Conv1D`` share.

    The weight is

        W = W0 + Q_U M Q_V^T

    with W0 the weight that came in, Q_U and Q_V orthonormal bases of the free output and input directions,
    and M, called ``core``, the only tensor that trains. ``weight`` is dense, frozen and under its own name,
    so that the forward pass costs what the plain layer's does. It is folded anew, always from W0, after
    every step of any ``torch.optim.Optimizer`` that holds the core, and before its next use whenever the core
    was written to in another way (``load_state_dict``, ``core.data.copy_``).

    Attributes:
        core: M (P x Q), float32 (float64 for float64 weights), zero at first.
        base: W0 (out, in) in the dtype of the weight: a buffer, or where it was set aside a plain tensor that stays
            where it is.
        out_basis: Q_U.
        in_basis: Q_V.
    """

    base: Tensor
    core: nn.Parameter
    out_basis: Basis
    in_basis: Basis
    _plain: tuple[nn.Linear | Conv1D]
    _exact: tuple[Basis, Basis] | None
    """The bases of the fold, where those of the gradient are narrower; beside W0, so in no list of submodules."""
    _folded: tuple[int, ...]
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
        _owners[id(self.core)] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if type(self.core) is nn.Parameter:  # pickle knows no other; the same object may be in an optimizer
            self.core.__class__ = Core
        self._folded = ()  # a copied or unpickled core starts counts of its own
        _owners[id(self.core)] = self

    def unwrap(self) -> nn.Linear | Conv1D:
        """Return the plain layer that was wrapped, with the folded weight."""
        self.refresh()
        (plain,) = self._plain
        plain.weight, plain.bias = self.weight, self.bias  # type: ignore[assignment]
        plain.train(self.training)
        _owners.pop(id(self.core), None)
        return plain

    @property
    def matrix(self) -> Tensor:
        """The weight as (out, in), whatever its layout."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    @property
    def exact_bases(self) -> tuple[Basis, Basis]:
        """Q_U and Q_V as the fold takes them."""
        return self._exact or (self.out_basis, self.in_basis)

    def delta(self) -> Tensor:
        """Return ``Q_U M Q_V^T`` (out x in), the change since ``protect``, in the dtype of the core.

        Not to be written to: where nothing is protected it is the core itself.
        """
        return self._lifted(self._origin())

    def _origin(self) -> Tensor:
        """Return W0 on the device of the weight.

        What was set aside is copied even where it is on that device: a memory map begins at any address, and products
        of the same numbers at another address can differ in their last bit.
        """
        aside = "base" not in self._buffers
        return self.base.to(self.core.device, copy=True, non_blocking=True) if aside else self.base

    def _lifted(self, origin: Tensor) -> Tensor:
        out, inp = self.out_basis, self.in_basis
        if self._exact is not None:
            out, inp = (side.mapped(lambda kept: kept.to(origin.device, non_blocking=True)) for side in self._exact)
        return lift(self.core.detach(), out.on(origin), inp.on(origin.T))

    @torch.no_grad()
    def fold(self) -> None:
        """Set the weight to ``W0 + Q_U M Q_V^T``, computed in the dtype of the core and rounded once."""
        if self.core.dtype not in (torch.float32, torch.float64):
            raise LoricaError(
                f"a protected model was cast to {self.core.dtype}; cast the model before lorica.protect, not after"
            )
        origin = self._origin()
        with _full_precision(origin.device.type):
            torch.add(self._lifted(origin), origin, out=self.matrix)
        self._folded = Core.state_of(self.core)
        _owners[id(self.core)] = self  # it may have been replaced

    def refresh(self) -> None:
        """Fold if the core may have been written to since the last fold."""
        if Core.state_of(self.core) != self._folded:
            self.fold()

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.refresh()
        if torch.is_grad_enabled() and self.core.requires_grad:
            product = shared_product(self.in_basis, x) if self.in_basis.shared and not compiling else None
            return ReducedLinear.apply(x, self.core, self.matrix, self.bias, self.out_basis, self.in_basis, product)
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
        if saved is not None and not _equal_to_rounding(saved.to(self.weight), self.get_parameter("weight")):
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


def _full_precision(device: str) -> contextlib.AbstractContextManager[None]:
    """Keep mixed precision out: a fold may be asked for by a forward pass under it, and a bfloat16 one would leak."""
    known = torch.amp.is_autocast_available(device)  # not on the meta device
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def _equal_to_rounding(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 8 * torch.finfo(b.dtype).eps * b.abs().max())
