"""Whatever a file holds, it is read or refused in a few lines: no other exception, no hang, no memory without end.

``LORICA_FUZZ`` sets how many files the slow form gives to each reader.
"""

from __future__ import annotations

import os
import resource
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.mutations import as_json
from tests.fuzz.readers import READERS, File
from tests.report.conftest import run_record

FEW, MANY = 100, int(os.environ.get("LORICA_FUZZ", "2000"))
SECONDS = 10
"""Of processor time for one file; most take a hundredth of a second."""

MEBIBYTES = 300
"""By which the process may grow over one file."""


def within_bounds(name: str, folder: Path, file: File) -> None:
    """Give a reader a file, and fail where that takes too much time or memory."""
    started, before = time.process_time(), _resident()
    READERS[name].check(folder, file)
    assert time.process_time() - started < SECONDS
    assert _resident() - before < MEBIBYTES


def _resident() -> int:
    """Return the most memory that the process ever had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def fuzz(name: str, folder: Path, examples: int) -> None:
    """Feed a reader with files, the same in every run."""

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(READERS[name].files())
    def check(file: File) -> None:
        within_bounds(name, folder, file)

    check()


@pytest.mark.reliability("R3", "R20", "R22", "R23", "R26")
@pytest.mark.parametrize("name", READERS)
def test_every_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    fuzz(name, tmp_path, MANY)


def laughs(first: bytes, line: bytes) -> File:
    """Return a stream file each of whose lines stands for four of the one before."""
    names = [b"x%d" % number for number in range(30)]
    lines = [line % (name, name, *[before] * 4) for before, name in pairwise(names)]
    return "stream.yaml", first + b"".join(lines)


def tensor(shape: list[int]) -> File:
    """Return a safetensors file that claims a tensor and holds nothing."""
    header = as_json({"t": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    return "state.safetensors", len(header).to_bytes(8, "little") + header


WIDE = [{"name": "w", "shape": [10**9, 10**9], "k": 10**9}] * 20_000
KEYS = b",".join(b'"%d":1' % number for number in [*range(200_000), 7])
BOMBS: dict[str, tuple[str, File]] = {
    "a nested plan": ("plan", ("plan.json", b"[" * 10**6)),
    "a nested record": ("record", ("run.json", b'{"a":' * 10**6)),
    "a wide plan": ("plan", ("plan.json", as_json({"entries": WIDE}))),
    "a row of many keys": ("rows", ("rows.jsonl", b"{" + KEYS + b"}")),
    "a million NaN": ("rows", ("rows.jsonl", b'{"a":[' + b"NaN," * 10**6 + b"0]}")),
    "a quote left open": ("rows", ("rows.csv", b'text\n"' + b"\n" * 2**17)),
    "an array left open": ("rows", ("rows.json", b'[{"text": "' + b"\\u0041" * 10**6)),
    "a header of 100 MB": ("checkpoint", ("state.safetensors", (10**8).to_bytes(8, "little") + b"{" * 1000)),
    "a tensor of 1e18": ("checkpoint", tensor([10**9, 10**9])),
    "an empty tensor of 1e18": ("checkpoint", tensor([0, 10**18])),
    "laughs": ("stream", laughs(b"x0: &x0 [x]\n", b"%s: &%s [*%s,*%s,*%s,*%s]\n")),
    "a score of 1e100": ("record", ("run.json", as_json(run_record(retention={"world facts": [1e100] * 6})))),
    "merged laughs": ("stream", laughs(b"x0: &x0 {x: 1}\n", b"%s: &%s {<<: [*%s,*%s,*%s,*%s]}\n")),
}


@pytest.mark.reliability("R20")
@pytest.mark.parametrize("name", BOMBS)
def test_what_is_made_to_burst_is_refused_in_time_and_memory(name: str, tmp_path: Path) -> None:
    reader, file = BOMBS[name]
    within_bounds(reader, tmp_path, file)
