"""A change leads from one tensor to the other and back, bit for bit, and costs little where it has few directions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.artefacts.bits import bits, difference
from lorica.artefacts.change import Change
from lorica.artefacts.lowrank import factors
from lorica.errors import LoricaError
from tests.builders import SHAPES, matrix

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def low_rank(m: int, n: int, r: int, size: float, seed: int = 5) -> Tensor:
    """Return a random float64 matrix of rank r with entries of about the given size."""
    d = matrix(m, r, seed, torch.float64) @ matrix(r, n, seed + 1, torch.float64)
    return d * size / d.square().mean().sqrt()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a).tobytes() == bits(b).tobytes()


def assert_exact(before: Tensor, after: Tensor) -> Change:
    """Check the way there and back, from the packed form; return the change."""
    change = Change.between(before, after)
    packed = change.to_tensors()
    assert same_bits(Change.from_tensors(packed, before).after(before), after)
    assert same_bits(Change.from_tensors(packed, after).before(after), before)
    return change


def packed_bytes(change: Change) -> int:
    return sum(tensor.nbytes for tensor in change.to_tensors().values())


@given(
    shape=st.sampled_from([*SHAPES.values(), (30, 50), (50, 30)]),
    dtype=st.sampled_from(FLOATS),
    rank=st.integers(1, 6),
    size=st.sampled_from([1e-6, 1e-3, 0.05, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_change_of_floats_is_exact_both_ways(
    shape: tuple[int, int], dtype: torch.dtype, rank: int, size: float, seed: int
) -> None:
    before = matrix(*shape, seed, dtype)
    after = (before.double() + low_rank(*shape, rank, size, seed)).to(dtype)
    assert_exact(before, after)


SPECIAL = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-40, -1e-45, 1.0, -2.0, 3e38]


@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_special_values_are_exact_both_ways(data: st.DataObject, dtype: torch.dtype) -> None:
    number = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
    before, after = (
        torch.tensor(data.draw(st.lists(number, min_size=20, max_size=20)), dtype=torch.float32).to(dtype).view(4, 5)
        for _ in range(2)
    )
    assert_exact(before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.tensor(3), torch.tensor(-7)),
        (torch.tensor([True, False]), torch.tensor([False, False])),
        (torch.arange(6, dtype=torch.int8).reshape(2, 3), torch.full((2, 3), -128, dtype=torch.int8)),
        (torch.zeros(2, 3, 4), torch.ones(2, 3, 4)),
        (torch.tensor(1.5), torch.tensor(2.5)),
    ],
    ids=["scalar", "bool", "int8", "three dimensions", "float scalar"],
)
def test_tensors_of_any_kind_are_exact_both_ways(before: Tensor, after: Tensor) -> None:
    assert assert_exact(before, after).factors is None


@pytest.mark.parametrize("transposed", [False, True])
def test_numbers_at_the_edge_of_a_binade_are_exact_both_ways(transposed: bool) -> None:
    # Up one binade the prediction is rounded twice as coarsely as the number it came from: only ``undo`` knows.
    before = torch.nextafter(torch.ones(64, 40), torch.zeros(()))
    after = (before.double() + low_rank(64, 40, 2, 1e-3).abs()).float()
    if transposed:
        before, after = before.T, after.T
    change = assert_exact(before, after)
    assert change.undo is not None
    assert np.count_nonzero(change.undo) > 100


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (128, 128)])
def test_a_change_of_few_directions_costs_few_bytes(shape: tuple[int, int]) -> None:
    m, n = shape
    before = matrix(m, n)
    after = (before.double() + low_rank(m, n, 8, 0.02)).float()
    change = assert_exact(before, after)
    plain = packed_bytes(Change(difference(bits(after), bits(before))))
    assert change.factors is not None
    assert 8 <= change.factors.a_MR.shape[1] < 16
    assert packed_bytes(change) < 0.5 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_of_a_few_last_places_needs_no_factors(dtype: torch.dtype) -> None:
    before = matrix(96, 128, dtype=dtype)
    after = (before.double() + low_rank(96, 128, 8, 2e-3 if dtype == torch.bfloat16 else 2e-4)).to(dtype)
    change = assert_exact(before, after)
    assert change.factors is None
    assert packed_bytes(change) < before.nbytes / 3


def test_a_change_of_all_directions_is_kept_as_the_difference() -> None:
    before, noise = matrix(64, 64), matrix(64, 64, seed=3)
    assert assert_exact(before, before + 0.01 * noise).factors is None


def test_factors_of_an_update_explain_it_to_the_last_places() -> None:
    before = matrix(80, 120)
    delta = low_rank(80, 120, 5, 0.01)
    found = factors(before, (before.double() + delta).float())
    assert found is not None
    last_place = 2.0**-24  # of numbers from 0.25 to 0.5
    assert (found.matrix() - delta).square().mean().sqrt() < last_place


def test_the_product_of_the_factors_is_exact_arithmetic() -> None:
    before = matrix(40, 60)
    found = factors(before, (before.double() + low_rank(40, 60, 4, 0.1)).float())
    assert found is not None
    a, b = (side.numpy().astype(object) for side in (found.a_MR, found.b_NR))
    exact = a @ b.T  # Python's whole numbers
    scaled = [[math.ldexp(x, 2 * found.exponent) for x in row] for row in exact]
    assert torch.equal(found.matrix(), torch.tensor(scaled, dtype=torch.float64))
    largest = (abs(a) @ abs(b.T)).max()  # bounds every partial sum, in any order
    assert largest < 2**53


@pytest.mark.parametrize("size", [1e3, 1e12, 1e30])
def test_a_change_far_larger_than_the_weight_stays_within_exact_arithmetic(size: float) -> None:
    before = matrix(64, 64)
    after = (before.double() + low_rank(64, 64, 3, size)).float()
    change = assert_exact(before, after)
    if change.factors is not None:
        a, b = (side.numpy().astype(object) for side in (change.factors.a_MR, change.factors.b_NR))
        assert (abs(a) @ abs(b.T)).max() < 2**53


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 2e-30), (torch.float32, 2e30), (torch.float64, 2e-200)])
def test_weights_of_any_magnitude_are_exact_both_ways(dtype: torch.dtype, scale: float) -> None:
    before = matrix(64, 64, dtype=dtype) * scale
    after = (before.double() + scale * low_rank(64, 64, 3, 0.01)).to(dtype)
    assert assert_exact(before, after).factors is not None


def test_parts_that_do_not_fit_are_refused() -> None:
    before = matrix(64, 48)
    parts = Change.between(before, (before.double() + low_rank(64, 48, 3, 0.1)).float()).to_tensors()
    assert "grid" in parts
    for rank, step in ((0, -10), (-1, -10), (49, -10), (10**9, -10), (3, 5000), (3, -5000)):
        with pytest.raises(LoricaError, match=r"damaged: .* for a tensor of shape"):
            Change.from_tensors(parts | {"grid": torch.tensor([rank, step])}, before)
    with pytest.raises(LoricaError, match="damaged"):
        Change.from_tensors(parts | {"residual": parts["residual"][:-20]}, before)
