"""The part of a weight change that a few directions explain, on a grid of whole numbers.

Shape suffixes: M rows, N columns, R directions, S = min(M, N).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_EXACT = 2.0**52
"""Whole numbers and their sums below this are exact in float64, in whatever order they are added."""

_LARGEST = 2.0**31

EXPONENTS = range(-511, 512)
"""Exponents of the grid for which its step, squared, is an exact float64."""

WORTHWHILE = 4.0
"""Bits per number of the plain difference up to which no factors are looked for: the eigenvectors cost time."""

_GAUSS = 2 * math.pi * math.e


@dataclass(frozen=True)
class Factors:
    """A matrix ``L = A B^T 4^e`` of few directions, A and B whole numbers.

    Every sum of products in A B^T is a whole number below 2^52, so that float64 gives L exactly: the same bits on
    every machine, with any number of threads. A floating point product would not do.

    Attributes:
        a_MR, b_NR: int32.
        exponent: e; the grid of A and of B has the step 2^e.
    """

    a_MR: Tensor
    b_NR: Tensor
    exponent: int

    def matrix(self) -> Tensor:
        """Return L (M x N), float64."""
        return self.a_MR.double() @ self.b_NR.double().T * math.ldexp(1.0, 2 * self.exponent)


def factors(before_MN: Tensor, after_MN: Tensor) -> Factors | None:
    """Return the factors with which the change takes the fewest bits, or None if it takes fewer without.

    A change D whose entries have standard deviation t, in units of the last place u of the weights, takes about

        h(t) = 1/2 log2(2 pi e (t^2 + 1/12))

    bits per entry. R singular directions bring t down to what they leave over, and cost (M + N) R numbers of their
    own, each on a grid of step d that adds noise to the prediction. The noise that is best for a given R follows
    from setting the derivative of the sum to zero: ``noise = (t^2 + 1/12) f / (1 - f)``, f = R (M + N) / (M N).

    A change of an OSFT update has as many directions as were free; one that was written in bfloat16 has rounding
    noise of its own size in all directions, and is small without factors.
    """
    if before_MN.dim() != 2 or not before_MN.is_floating_point() or not before_MN.numel():
        return None
    if before_MN.shape[0] < before_MN.shape[1]:
        found = factors(before_MN.T, after_MN.T)
        return None if found is None else Factors(found.b_NR, found.a_MR, found.exponent)
    unit = _last_place(after_MN)
    d_MN = (after_MN.double() - before_MN.double()) / unit
    variance = d_MN.square().mean().item()
    if not math.isfinite(variance) or _bits(variance) <= WORTHWHILE:
        return None
    eigenvalues, vectors = torch.linalg.eigh(d_MN.T @ d_MN)
    sigma_N, v_NN = eigenvalues.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    r, step = _cheapest(sigma_N.numpy(), d_MN.shape)
    if r == 0:
        return None
    v_NR, root_R = v_NN[:, :r], sigma_N[:r].sqrt()
    size = math.sqrt(unit)
    return _on_grid(d_MN @ v_NR / root_R * size, v_NR * root_R * size, step * size)


def _last_place(weight: Tensor) -> float:
    """Return the step between neighbouring numbers at the weight's size, the geometric mean over its entries."""
    exponents = torch.frexp(weight.double()).exponent[weight != 0]
    middle = exponents.double().mean().item() if exponents.numel() else 0.0
    return torch.finfo(weight.dtype).eps * 2 ** (middle - 1)


def _bits(variance: float) -> float:
    return 0.5 * math.log2(_GAUSS * (variance + 1 / 12))


def _cheapest(sigma_S: NDArray[np.float64], shape: torch.Size) -> tuple[int, float]:
    """Return the number of directions with the fewest bits in all, and the grid's step; sigma in last places."""
    m, n = shape
    left = np.append(np.cumsum(sigma_S[::-1] ** 2)[::-1], 0.0) / (m * n)
    best, best_cost, best_step = 0, m * n * _bits(left[0]), 1.0
    for r in range(1, m * n // (m + n) + 1):
        used, share = sigma_S[:r], r * (m + n) / (m * n)
        if share >= 1 or used[-1] == 0:
            break
        noise = (left[r] + 1 / 12) * share / (1 - share)
        step = math.sqrt(12 * noise / (used.sum() * (1 / m + 1 / n)))
        own = sum(d * 0.5 * np.log2(_GAUSS * (used / d / step**2 + 1 / 12)).sum() for d in (m, n))
        cost = own + m * n * _bits(left[r] + noise)
        if cost < best_cost:
            best, best_cost, best_step = r, cost, step
    return best, best_step


def _on_grid(a_MR: Tensor, b_NR: Tensor, step: float) -> Factors:
    exponent = max(math.floor(math.log2(step)), EXPONENTS.start)
    while True:
        a, b = ((side * math.ldexp(1.0, -exponent)).round() for side in (a_MR, b_NR))
        # By Cauchy and Schwarz no sum of any of the products in A B^T is larger than this.
        largest = a.norm(dim=1).max() * b.norm(dim=1).max()
        if largest < _EXACT and max(a.abs().max(), b.abs().max()) < _LARGEST:
            return Factors(a.int(), b.int(), exponent)
        exponent += 1
