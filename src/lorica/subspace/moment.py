"""A running second moment: of a narrow side the matrix itself, of a wide one a sketch of its principal directions.

Shape suffixes: D the dimension of one side, R rows, S columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.subspace.factor import Factor

WIDEST = 4096
"""Sides up to this dimension are summed as D x D matrices; wider ones as a sketch."""

OVERSAMPLING = 1.5
"""Columns of a sketch over the directions that are wanted of it, and 32 more."""


@dataclass
class Moment:
    """Running sum of ``x x^T`` over rows, in float64: itself, or for a wide side ``(sum x x^T) O`` for a random O.

    Attributes:
        rank: how many principal directions are wanted.
        test_DS: O, orthonormal columns, of a sketch.
        sum: D x D, or D x S of a sketch.
        trace: sum of ``|x|^2``.
        count: what the mean is over: the rows; of gradients, in the end, the predictions that they are of.
        kept_as: dtype of the directions that are made of it: float64 for rows of float64, else float32.
    """

    rank: int
    sum: Tensor
    test_DS: Tensor | None = None
    kept_as: torch.dtype = torch.float32
    trace: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, dim: int, rank: int, device: torch.device, test: RandomBasis) -> Moment:
        """Return a sum over no rows; ``test`` makes O."""
        size = sketch_size(dim, rank)
        sums = torch.zeros(dim, size or dim, dtype=torch.float64, device=device)
        return cls(rank, sums, test(dim, size, device) if size else None)

    def add(self, x_RD: Tensor) -> None:
        """Add rows."""
        if x_RD.dtype == torch.float64:
            self.kept_as = torch.float64
        x = x_RD.detach().double()
        self.sum.addmm_(x.T, x if self.test_DS is None else x @ self.test_DS)
        self.trace += float(x.square().sum())
        self.count += len(x)

    def factor(self, earlier: Factor | None = None) -> Factor:
        """Return the factor of the mean, on the CPU.

        Args:
            earlier: sum of factors of trace 1; each counts as much as what was summed here, in a mean over all of them,
                whose trace is that of what was summed here: however many there are, a change is expected to cost as
                much.
        """
        tasks = 0.0 if earlier is None else earlier.trace
        mean, trace = self.sum / self.count / (1 + tasks), self.trace / self.count / (1 + tasks)
        more = earlier.scaled(trace) if earlier is not None else None
        if self.test_DS is None:
            return Factor.of(mean if more is None else mean + more.matrix().to(mean), self.rank).aside(self.kept_as)
        factor = from_sketch(mean, self.test_DS, trace, self.rank)
        both = factor if more is None else factor.plus(more, self.rank).filled(self.rank)
        return both.aside(self.kept_as)

    def same_as(self, other: Moment) -> bool:
        """Return whether both summed the same rows, bit for bit: of layers that get the same input."""
        return self.rank == other.rank and self.trace == other.trace and torch.equal(self.sum, other.sum)


def from_sketch(image_DS: Tensor, test_DS: Tensor, trace: float, rank: int) -> Factor:
    """Return the factor of A given ``Y = A O``: the Nystroem approximation ``Y (O^T Y)^-1 Y^T``, cut to ``rank``.

    Never more than A itself, and the closer the faster A's spectrum falls; exact where A has no more rank than O has
    columns. A small multiple of O is added to Y before the Cholesky factorisation and taken off the energies again.

    Source:
        Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from
        streaming data", 2017, algorithm 3.
    """
    shift = len(image_DS) ** 0.5 * torch.finfo(torch.float64).eps * float(image_DS.norm())
    shifted = image_DS + shift * test_DS
    core_SS = test_DS.T @ shifted
    lower_SS, failed = torch.linalg.cholesky_ex((core_SS + core_SS.T) / 2)
    if bool(failed):  # every row is zero
        return Factor.cut(test_DS, torch.zeros_like(test_DS[0]), trace, rank)
    root_DS = torch.linalg.solve_triangular(lower_SS, shifted.T, upper=False).T
    energies, turn_SS = torch.linalg.eigh(root_DS.T @ root_DS)
    vectors_DS = torch.linalg.qr(root_DS @ turn_SS.flip(1))[0]  # the largest first: each keeps its leading span
    return Factor.cut(vectors_DS, energies.flip(0) - shift, trace, rank)


def sketch_size(dim: int, rank: int) -> int:
    """Return how many columns the sketch of a side has, 0 where the whole matrix is summed."""
    size = int(OVERSAMPLING * rank) + 32
    return size if dim > WIDEST and size < dim // 2 else 0


RandomBasis = Callable[[int, int, torch.device], Tensor]


def random_basis(dim: int, size: int, device: torch.device) -> Tensor:
    """Return a random O (D x S) with orthonormal columns, always the same; a shape alone on the meta device."""
    if device.type == "meta":
        return torch.empty(dim, size, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(dim)
    drawn = torch.randn(dim, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn.to(device))[0]
