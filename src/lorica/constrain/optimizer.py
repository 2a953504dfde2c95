"""The projected engine: any optimizer, kept on a feasible set of dense weights.

``block`` constrains a product of both sides, ``U^T D V = 0``, and so leaves no smaller matrix to train.
Projecting gradients is not enough: an element-wise optimizer such as AdamW steps out of the set that its
gradient lies in. So the weights themselves are put back after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.constrain.kept import KeptBases
from lorica.constrain.linear import WRAPPERS, matrix_of
from lorica.constrain.protect import fitting_targets, freeze_all_but
from lorica.constrain.targets import check_whole
from lorica.errors import LoricaError
from lorica.subspace.plan import Plan
from lorica.subspace.sources import protected_directions
from lorica.subspace.store import SplitStore


class WeightConstraint(Protocol):
    """A set of weights: what a gradient may keep, and the way back onto the set."""

    def project(self, gradient: Tensor) -> Tensor:
        """Return the part of a gradient (stored layout of the weight) that leads along the set."""
        ...

    def retract(self, weight: Tensor) -> Tensor:
        """Return the nearest weight (stored layout) in the set."""
        ...


class JointConstraint(Protocol):
    """A set of weights of several layers together, where no layer's part can be told without the others."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The weights, in the order of the lists below."""
        ...

    def project(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the part of the gradients, one per parameter, that leads along the set."""
        ...

    def retract(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the nearest weights, one per parameter, in the set."""
        ...


class Block:
    """``U^T (W - W0) V = 0``: what W0 does between protected inputs and protected outputs stays.

        project(G) = G - U (U^T G V) V^T        retract(W) = W - U (U^T W V - U^T W0 V) V^T

    Both are orthogonal projections in the Frobenius norm. What is stored of W0 is only the K x K block.

    Source:
        arXiv 2504.07097, the projected gradient as the paper writes it.
    """

    def __init__(
        self,
        weight_MN: Tensor,
        u_MK: Tensor,
        v_NK: Tensor,
        *,
        block_KK: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        if block_KK is None:
            block_KK = u_MK.T @ weight_MN.double() @ v_NK
        # In rows, so that products of them are to the last bit those of the same tensors read from a file.
        self.u, self.v, self.block_KK = (part.to(weight_MN).contiguous() for part in (u_MK, v_NK, block_KK))
        self.transposed = transposed

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors that it is made of, by name."""
        return {"u_MK": self.u, "v_NK": self.v, "block_KK": self.block_KK}

    def project(self, gradient: Tensor) -> Tensor:
        return gradient - self._lift(self._block(gradient))

    def retract(self, weight: Tensor) -> Tensor:
        return weight - self._lift(self._block(weight) - self.block_KK)

    def _block(self, stored: Tensor) -> Tensor:
        return self.u.T @ (stored.T if self.transposed else stored) @ self.v

    def _lift(self, block_KK: Tensor) -> Tensor:
        lifted = self.u @ block_KK @ self.v.T
        return lifted.T if self.transposed else lifted


def block_constraints(
    model: nn.Module, plan: Plan, kept: KeptBases | None = None
) -> dict[nn.Parameter, WeightConstraint]:
    """Return the ``block`` constraint of each planned weight, and freeze everything the plan does not train.

    Give the result to :class:`ConstrainedOptimizer`; entries that protect nothing train plainly and have none.

    Args:
        kept: the constraints' parts, of an interrupted run that this one goes on with; nothing is split then.

    Raises:
        LoricaError: the plan does not fit the model, holds another constraint, or a weight is narrower than
            float32 (its rounding alone would leave the set).
    """
    targets = fitting_targets(model, plan)
    check_whole(targets, "ConstrainedOptimizer")
    constraints: dict[nn.Parameter, WeightConstraint] = {}
    store = SplitStore.from_environment()
    for entry in plan.entries:
        module = targets[entry.name]
        weight_MN = matrix_of(module).detach()
        if entry.constraint != "block":
            raise LoricaError(f"{entry.name}: constraint {entry.constraint!r} is held by lorica.protect")
        if weight_MN.dtype not in (torch.float32, torch.float64):
            raise LoricaError(f"{entry.name} is {weight_MN.dtype}; constraint 'block' needs float32 weights")
        if any(entry.protected):
            if kept is None:
                known = (plan.factors(entry.name), plan.learned(entry.name))
                sides = protected_directions(weight_MN, entry, *known, store)
                parts = {"u_MK": sides.u_MA, "v_NK": sides.v_NB}
            else:
                parts = {name: kept.tensor(f"{entry.name}.{name}") for name in ("u_MK", "v_NK", "block_KK")}
            transposed = WRAPPERS[type(module)].transposed
            constraints[module.get_parameter("weight")] = Block(weight_MN, **parts, transposed=transposed)
    freeze_all_but(model, plan, [targets[name].get_parameter("weight") for name in plan.names()])
    return constraints


class DelegatingOptimizer(Optimizer):
    """An optimizer around another: parameter groups, state and ``state_dict`` are the inner one's.

    It is a ``torch.optim.Optimizer`` to schedulers, Trainer and Accelerate, whose ``__init__`` is not called: it would
    make groups of its own.
    """

    _step_supports_amp_scaling = False
    """A fused inner one does; but the scaler would tell this one, and not it, that a gradient overflowed."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)


def fingerprints(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return two numbers for each tensor of which one differs as soon as one of its entries does.

    They are the sum of the entries' bits and, bit for bit too, the norm in float64: what leaves one of them as it was
    by chance does not leave the other. They take reading the tensors, not a copy of them.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [tensor.detach().view(whole[tensor.element_size()]).sum() for tensor in tensors]
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).view(torch.int64) for tensor in tensors]
    return list(zip(_numbers(bits), _numbers(norms), strict=True))


def _numbers(scalars: Sequence[Tensor]) -> list[int]:
    found: list[int] = torch.stack(list(scalars)).tolist() if scalars else []
    return found


class ConstrainedOptimizer(DelegatingOptimizer):
    """Any optimizer whose weights stay on their constraints: project, clip, step, put back.

    Nothing constrained = the inner optimizer, bitwise. A weight that the step leaves as it was is left so: putting it
    back would still change its last bits.

    Args:
        inner: the optimizer that steps. It is hooked, so do not go on using it unconstrained.
        constraints: by parameter; parameters without one are stepped plainly.
        joint: a constraint on several parameters together, if there is one; none of them is in ``constraints``.
        max_grad_norm: clip all gradients of the inner optimizer to this norm after projecting. Clipping
            earlier, as a Trainer would, counts gradient that is then thrown away.
    """

    def __init__(
        self,
        inner: Optimizer,
        constraints: Mapping[nn.Parameter, WeightConstraint],
        *,
        joint: JointConstraint | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        constrained = [*constraints, *(joint.parameters if joint else ())]
        strangers = sum(id(parameter) not in held for parameter in constrained)
        if strangers:
            raise LoricaError(f"{strangers} of the {len(constrained)} constrained weights are not in the optimizer")
        super().__init__(inner)
        self.constraints = dict(constraints)
        self.joint = joint
        self.max_grad_norm = max_grad_norm
        self._before: list[tuple[int, int]] = []
        inner.register_step_pre_hook(lambda *_: self._before_step())
        inner.register_step_post_hook(lambda *_: self._after_step())

    @property
    def constrained(self) -> list[nn.Parameter]:
        """The weights that a constraint holds."""
        return [*self.constraints, *(self.joint.parameters if self.joint else ())]

    def _before_step(self) -> None:
        self._before = fingerprints(self.constrained)
        self.project_gradients()

    def _after_step(self) -> None:
        now = zip(self.constrained, fingerprints(self.constrained), self._before, strict=True)
        self.retract_weights({parameter for parameter, after, before in now if after != before})

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Replace each gradient by its feasible part, then clip. Runs by itself before each step."""
        for parameter, constraint in self.constraints.items():
            if parameter.grad is not None:
                parameter.grad.copy_(constraint.project(parameter.grad))
        if self.joint is not None:
            self._project_jointly(self.joint)
        if self.max_grad_norm:
            everything = [parameter for group in self.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(everything, self.max_grad_norm)

    @staticmethod
    def _project_jointly(joint: JointConstraint) -> None:
        if all(parameter.grad is None for parameter in joint.parameters):
            return
        for parameter in joint.parameters:
            if parameter.grad is None:  # its share of the projection is not zero
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in joint.parameters if parameter.grad is not None]
        for gradient, kept in zip(gradients, joint.project(gradients), strict=True):
            gradient.copy_(kept)

    @torch.no_grad()
    def retract_weights(self, moved: Container[nn.Parameter]) -> None:
        """Put each weight that has moved back on its constraint. Runs by itself after each step."""
        for parameter, constraint in self.constraints.items():
            if parameter in moved:
                parameter.copy_(constraint.retract(parameter))
        if self.joint is not None and any(parameter in moved for parameter in self.joint.parameters):
            for parameter, weight in zip(self.joint.parameters, self.joint.retract(self.joint.parameters), strict=True):
                parameter.copy_(weight)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return self.inner.step(None if closure is None else lambda: self._projected(closure))

    def _projected(self, closure: Callable[[], float]) -> float:
        # The closure computes new gradients after the step's hooks have run.
        loss = closure()
        self.project_gradients()
        return loss
