"""Orthonormal bases that grow from task to task: of each weight's two sides, or over all weights together.

What is appended is orthonormalised against all that is there, in float64, and stored as float32 on the CPU;
what is there is never changed.

Shape suffixes: M output rows, N input columns, D either dimension, K directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace.linalg import split
from lorica.subspace.sources import Protected, extended

DEPENDENT = 1e-5
"""A vector adds no direction where less than this share of it is new: that much is noise of float32."""


class SideBases:
    """Orthonormal output and input directions of each weight.

    Attributes:
        sides: by layer, U (M x A) and V (N x B), float32.
    """

    def __init__(self) -> None:
        self.sides: dict[str, Protected] = {}

    def add(self, name: str, snapshot_MN: Tensor, k: int) -> None:
        """Append the top k left and right singular vectors of a matrix, or as many as it has.

        Raises:
            LoricaError: the matrix holds NaN or inf.
        """
        try:
            parts = split(snapshot_MN, k)
        except LoricaError as error:
            raise LoricaError(f"{name}: what the task did to it cannot be remembered: {error}") from error
        rank = int((parts.sigma_S > DEPENDENT * parts.sigma_S[0]).sum())
        new = (parts.u_MK[:, :rank].cpu(), parts.v_NK[:, :rank].cpu())
        old = self.sides.get(name) or [torch.zeros(size, 0) for size in snapshot_MN.shape]
        u_MA, v_NB = (extended(side.double(), more).float() for side, more in zip(old, new, strict=True))
        self.sides[name] = Protected(u_MA, v_NB)

    def state_dict(self) -> dict[str, Tensor]:
        both = {f"{name}.u": side.u_MA for name, side in self.sides.items()}
        return both | {f"{name}.v": side.v_NB for name, side in self.sides.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        names = [key.removesuffix(".u") for key in state if key.endswith(".u")]
        self.sides = {name: Protected(state[f"{name}.u"].clone(), state[f"{name}.v"].clone()) for name in names}


class FlatBasis:
    """Orthonormal vectors over all weights of a model, flattened and laid end to end: the P x K form.

    Attributes:
        parts: by parameter name, its piece of the K vectors, (K x its numbers), float32.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(next(iter(self.parts.values()), ()))

    def add(self, vectors: Iterable[Mapping[str, Tensor]]) -> None:
        """Append what each vector has outside all before it, at unit length (Gram-Schmidt, twice, float64).

        Args:
            vectors: by parameter name, tensors of the parameter's size; the same names in each and in ``parts``.

        Raises:
            LoricaError: a vector holds NaN or inf.
        """
        fresh: list[dict[str, Tensor]] = []
        for vector in vectors:
            rest = {name: part.detach().double().flatten().cpu() for name, part in vector.items()}
            length = _norm(rest)
            if not math.isfinite(length):
                raise LoricaError("a gradient to be remembered holds NaN or inf; lower the learning rate")
            for _ in range(2):
                for basis in (self.parts, *fresh):
                    _remove(rest, basis)
            if _norm(rest) > DEPENDENT * length:
                fresh.append({name: (part / _norm(rest)).float()[None] for name, part in rest.items()})
        for name in fresh[0] if fresh else ():
            old = [self.parts[name]] if name in self.parts else []
            self.parts[name] = torch.cat([*old, *(vector[name] for vector in fresh)])

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.parts)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.parts = {name: part.clone() for name, part in state.items()}  # what was read may lie unaligned in memory


def _norm(vector: Mapping[str, Tensor]) -> float:
    return sum(float(part.square().sum()) for part in vector.values()) ** 0.5


def _remove(vector: dict[str, Tensor], basis: Mapping[str, Tensor]) -> None:
    """Take the components along some orthonormal vectors off a float64 one, in place."""
    if basis:  # in the order of the vector: a basis that was saved and loaded has another, and sums round by order
        along_K = torch.stack([basis[name].double() @ part for name, part in vector.items()]).sum(0)
        for name in vector:
            vector[name] -= along_K @ basis[name].double()
