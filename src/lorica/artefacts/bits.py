"""Tensors as whole numbers: their bit patterns, exact differences of these, and a compact form on disk.

All arithmetic here is modulo 2^bits on unsigned integers, so every step is undone exactly, on any machine, for any
dtype: NaN, infinities, signed zeros and whole numbers included.
"""

from __future__ import annotations

import bz2
import hashlib
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorica.errors import LoricaError

Unsigned = NDArray[Any]

_LENGTH = np.dtype("<u8")
_SPARSE = 0.75
"""Share of zero bytes from which bz2 beats a plain Huffman code (measured on planes of 4 M bytes)."""


def bits(tensor: Tensor) -> Unsigned:
    """Return the bit pattern of each number as an unsigned integer, flat; not a copy where that is possible."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.view(f"u{min(tensor.element_size(), 8)}")


def from_bits(pattern: Unsigned, like: Tensor) -> Tensor:
    """Return the tensor of the dtype and shape of another that has these bit patterns."""
    raw = torch.from_numpy(np.ascontiguousarray(pattern).view(np.uint8))
    return raw.view(like.dtype).reshape(like.shape)


def fingerprint(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(bits(tensor).data)
    return digest.hexdigest()


def difference(target: Unsigned, source: Unsigned) -> Unsigned:
    """Return ``target - source`` modulo 2^bits, folded so that numbers near 0 of either sign become small."""
    wrapped = target - source
    return (wrapped << 1) ^ (0 - (wrapped >> (8 * wrapped.itemsize - 1)))


def added(source: Unsigned, folded: Unsigned) -> Unsigned:
    """Return the target whose ``difference`` from the source is this."""
    return source + unfolded(folded)


def taken_off(target: Unsigned, folded: Unsigned) -> Unsigned:
    """Return the source from which the target's ``difference`` is this."""
    return target - unfolded(folded)


def unfolded(folded: Unsigned) -> Unsigned:
    """Return the difference, modulo 2^bits, that was folded."""
    return (folded >> 1) ^ (0 - (folded & 1))


def pack(numbers: Unsigned) -> Tensor:
    """Return unsigned integers compressed, as bytes.

    The lowest bytes of all numbers, then the second lowest, and so on, each plane on its own: those of small numbers
    are zero but for the first. Sparse planes go through bz2, the others through a Huffman code, which costs next to
    no time on planes of noise.
    """
    planes = [_compressed(plane) for plane in numbers.view(np.uint8).reshape(-1, numbers.itemsize).T]
    head = np.array([len(plane) for plane in planes], _LENGTH).tobytes()
    return torch.frombuffer(bytearray(head + b"".join(planes)), dtype=torch.uint8)


def unpack(packed: Tensor, count: int, itemsize: int) -> Unsigned:
    """Return the ``count`` integers of ``itemsize`` bytes that were packed.

    Raises:
        LoricaError: these bytes are not that many packed integers. No more memory is taken than they would need.
    """
    raw = packed.numpy().tobytes()
    numbers = np.empty((count, itemsize), np.uint8)
    start = itemsize * _LENGTH.itemsize
    try:
        for place, length in enumerate(np.frombuffer(raw[:start], _LENGTH, itemsize)):
            numbers[:, place] = np.frombuffer(_expanded(raw[start : start + int(length)], count), np.uint8)
            start += int(length)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise LoricaError(f"damaged: packed numbers cannot be read ({error})") from error
    return numbers.reshape(-1).view(f"u{itemsize}")


def _compressed(plane: Unsigned) -> bytes:
    if np.count_nonzero(plane) <= (1 - _SPARSE) * plane.size:
        return bz2.compress(plane.tobytes())
    code = zlib.compressobj(level=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return code.compress(plane.tobytes()) + code.flush()


def _expanded(data: bytes, count: int) -> bytes:
    if not count:
        return b""
    if data.startswith(b"BZh"):
        return bz2.BZ2Decompressor().decompress(data, count)
    return zlib.decompressobj().decompress(data, count)
