"""Valid files made invalid: at random, but the same for the same seed."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 10**9, 10**18, 10**40, 0.5, -0.5, 1e-300, 1e308, "", " ", "a", "0", "\x00",
    "\u202e", "\U0001f600", "a\nb", "x" * 5000, "../..", "/etc/passwd", "</script>", "{{ 1 }}", "{a}", [], [[]], [None],
    [0, 1], {}, {"": None}, {"a": {}}, [[[[]]]], ["a", "a"],
]  # fmt: skip
"""Values that stand where others belong."""

LIKE: dict[type, list[Any]] = {
    int: [0, 1, 2, 7, 10**6, 2**31],
    float: [0.0, 1e-300, 0.5, 1.0, 50.0, 100.0, 1e100, -0.5],
    str: ["", "a", "b", "x" * 500, "0", "1e-3", "</script>", "a\nb|c", "0 100 nan 1e400"],
}
"""Values of the right type that stand where others belong."""

NUMBERS = [b"0", b"-1", b"1e999", b"NaN", b"1000000000", b"1e9", b"0x10", b"00", b"1_0", b"9" * 400, b"-0.0", b"1e-400"]
WORDS = [
    b"null", b"true", b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"\\", b"\\ud800", b"\\u0000", b"\n", b"\r",
    b"\t", b"\0", b"&a ", b"*a", b"!!python/object:os.system ", b"<<: ", b"- ", b"# ", b"--- ", b"!!timestamp ",
    b"!!binary ", b"2001-99-99", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"[" * 100, b"{a: " * 60, b'{"a":' * 100,
]  # fmt: skip

_NUMBER = re.compile(rb"-?\d+(\.\d+)?")


def mutated(files: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Return files with some spots changed: bits, cut, repeated, swapped and foreign spans, other numbers and words."""
    seeds = st.integers(0, 2**32)
    return st.builds(_mutate, st.sampled_from(list(files)), st.sampled_from(list(files)), st.integers(1, 6), seeds)


def odd_values(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """Return JSON values with something else at some of their places: another type, nothing, or one thing more."""
    return st.builds(_misplace, st.sampled_from(list(values)), st.integers(1, 3), st.integers(0, 2**32))


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _mutate(data: bytes, other: bytes, times: int, seed: int) -> bytes:
    source = random.Random(seed)
    for _ in range(times):
        data = source.choice(_MUTATIONS)(data, other, source)
    return data


def _span(data: bytes, source: random.Random) -> tuple[int, int]:
    start = source.randint(0, len(data))
    return start, min(len(data), start + int(source.expovariate(1 / 12)))


def _bit(data: bytes, other: bytes, source: random.Random) -> bytes:
    if not data:
        return data
    at = source.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << source.randrange(8)]) + data[at + 1 :]


def _cut(data: bytes, other: bytes, source: random.Random) -> bytes:
    return data[: source.randint(0, len(data))]


def _drop(data: bytes, other: bytes, source: random.Random) -> bytes:
    start, end = _span(data, source)
    return data[:start] + data[end:]


def _repeat(data: bytes, other: bytes, source: random.Random) -> bytes:
    start, end = _span(data, source)
    return data[:end] + data[start:end] * source.randint(1, 50) + data[end:]


def _swap(data: bytes, other: bytes, source: random.Random) -> bytes:
    (a, b), (c, d) = sorted((_span(data, source), _span(data, source)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _foreign(data: bytes, other: bytes, source: random.Random) -> bytes:
    at, (start, end) = source.randint(0, len(data)), _span(other, source)
    return data[:at] + other[start:end] + data[at:]


def _word(data: bytes, other: bytes, source: random.Random) -> bytes:
    start, end = _span(data, source)
    return data[:start] + source.choice(WORDS) + data[source.choice((start, end)) :]


def _number(data: bytes, other: bytes, source: random.Random) -> bytes:
    found = list(_NUMBER.finditer(data))
    if not found:
        return data
    match = source.choice(found)
    return data[: match.start()] + source.choice(NUMBERS) + data[match.end() :]


def _noise(data: bytes, other: bytes, source: random.Random) -> bytes:
    start, end = _span(data, source)
    return data[:start] + source.randbytes(end - start) + data[end:]


_MUTATIONS: list[Callable[[bytes, bytes, random.Random], bytes]] = [
    _bit, _cut, _drop, _repeat, _swap, _foreign, _word, _number, _number, _noise,
]  # fmt: skip


def _misplace(value: Any, times: int, seed: int) -> Any:
    source = random.Random(seed)
    value = copy.deepcopy(value)
    for _ in range(times):
        holders = list(_holders(value))
        if not holders:
            return source.choice(ODD)
        holder = source.choice(holders)
        key = source.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if source.random() < 0.6:
            _exchange(holder, key, source)
            continue
        match source.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[source.choice(["extra", "", "a.b", str(key) + "s"])] = source.choice(ODD)
            case 1:
                holder.insert(key, copy.deepcopy(source.choice(holder)))
            case 2:
                holder[key] = copy.deepcopy(source.choice(list(_holders(value))))  # a part of itself
            case _:
                holder[key] = copy.deepcopy(source.choice(ODD))
    return value


def _exchange(holder: Any, key: Any, source: random.Random) -> None:
    """Put another value of the same type there: of a list or a dictionary, one with less or more of the same."""
    value = holder[key]
    if isinstance(value, list) and value:
        at = source.randrange(len(value))
        holder[key] = source.choice([[], value[:at], value[at:], value + value[at:], value[::-1]])
    elif isinstance(value, dict) and value:
        value.pop(source.choice(list(value)))
    elif isinstance(value, bool):
        holder[key] = not value
    else:
        holder[key] = source.choice(LIKE.get(type(value), [value]))


def _holders(value: Any) -> Iterator[Any]:
    """Yield every dictionary and list that holds something."""
    if isinstance(value, dict | list) and value:
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _holders(child)
