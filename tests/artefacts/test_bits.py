"""Bit patterns, their differences and their packed form, against arithmetic on Python's whole numbers."""

from __future__ import annotations

import bz2
import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.artefacts.bits import added, bits, difference, fingerprint, from_bits, pack, taken_off, unfolded, unpack
from lorica.errors import LoricaError

ITEMSIZES = st.sampled_from([1, 2, 4, 8])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of one unsigned type and length, the second often near the first."""
    size, count = draw(ITEMSIZES), draw(st.integers(0, 40))
    number = st.integers(0, 2 ** (8 * size) - 1)
    first = draw(st.lists(number, min_size=count, max_size=count))
    near = st.one_of(st.integers(-3, 3), number)
    steps = draw(st.lists(near, min_size=count, max_size=count))
    second = [(a + b) % 2 ** (8 * size) for a, b in zip(first, steps, strict=True)]
    return np.array(first, f"u{size}"), np.array(second, f"u{size}")


@given(pairs())
def test_a_difference_leads_there_and_back(pair: tuple[np.ndarray, np.ndarray]) -> None:
    source, target = pair
    folded = difference(target, source)
    assert np.array_equal(added(source, folded), target)
    assert np.array_equal(taken_off(target, folded), source)
    modulus = 2 ** (8 * source.itemsize)
    assert unfolded(folded).tolist() == [
        (int(b) - int(a)) % modulus for a, b in zip(source.tolist(), target.tolist(), strict=True)
    ]


def test_differences_near_zero_of_either_sign_are_small_numbers() -> None:
    source = np.full(5, 1000, np.uint32)
    target = np.array([1000, 999, 1001, 998, 1002], np.uint32)
    assert difference(target, source).tolist() == [0, 1, 2, 3, 4]


@given(pairs())
def test_packed_numbers_come_back(pair: tuple[np.ndarray, np.ndarray]) -> None:
    for numbers in pair:
        back = unpack(pack(numbers), numbers.size, numbers.itemsize)
        assert back.dtype == numbers.dtype
        assert np.array_equal(back, numbers)


def test_sparse_numbers_are_packed_to_near_their_entropy() -> None:
    generator = np.random.default_rng(0)
    count, share = 200_000, 0.05
    numbers = (generator.random(count) < share).astype(np.uint32)
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert pack(numbers).numel() * 8 < 1.35 * entropy * count


def test_damaged_packed_numbers_are_refused() -> None:
    packed = pack(np.arange(1000, dtype=np.uint32))
    for damaged in (packed[:-40], packed[:10], packed[:0], torch.cat([packed[:40], packed[41:]])):
        with pytest.raises(LoricaError, match="damaged"):
            unpack(damaged, 1000, 4)
    with pytest.raises(LoricaError, match="damaged"):
        unpack(packed, 1001, 4)


def test_a_packed_plane_that_would_fill_the_memory_is_cut_off() -> None:
    bomb = bz2.compress(bytes(50_000_000))
    head = struct.pack("<Q", len(bomb))
    numbers = unpack(torch.frombuffer(bytearray(head + bomb), dtype=torch.uint8), 100, 1)
    assert numbers.tolist() == [0] * 100


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.5, -0.0, torch.nan, torch.inf]),
        torch.tensor([[1.5, -2.0], [0.1, 3e38]], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.tensor(7),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.ones(3, dtype=torch.complex128),
    ],
    ids=["float32", "bfloat16", "float64", "scalar", "bool", "empty", "transposed", "complex"],
)
def test_a_tensor_survives_as_bits(tensor: torch.Tensor) -> None:
    back = from_bits(bits(tensor).copy(), tensor)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits(back).tobytes() == bits(tensor).tobytes()


def test_the_bits_of_a_float_are_those_of_ieee() -> None:
    values = [1.0, -0.1, 3.5e-40]
    assert bits(torch.tensor(values)).tobytes() == struct.pack("<3f", *values)
    assert bits(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)).tolist() == [0x3F80, 0xC000]


def test_a_fingerprint_knows_values_dtype_and_shape() -> None:
    x = torch.arange(6.0)
    expected = hashlib.sha256(b"torch.float32 (6,) " + struct.pack("<6f", *range(6))).hexdigest()
    assert fingerprint(x) == expected
    others = [x.reshape(2, 3), x.view(torch.int32), x.double(), torch.tensor([-0.0, 1, 2, 3, 4, 5])]
    assert len({fingerprint(y) for y in (x, *others)}) == 5
