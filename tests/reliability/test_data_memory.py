"""A pass over a large file of faults takes no more memory than a pass over a small one."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from lorica.data import validate, write_rejected

MEGABYTE = 10**6
GOOD = json.dumps({"prompt": "q", "completion": "a"}) + "\n"
LONG = "x" * 30_000


def peak(work: Callable[[], object]) -> int:
    """Return the most bytes that were allocated at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check_and_keep_aside(path: Path) -> None:
    report = validate(path, skip_invalid_rows=True)
    assert report.rejected > 900
    write_rejected(report, path.with_name("rejected.jsonl"))


FAULTS: dict[str, Callable[[int], str]] = {
    "rows.jsonl": lambda count: GOOD + (json.dumps({"prompt": LONG}) + "\n" + "{" + LONG + "\n") * (count // 2),
    "rows.json": lambda count: "[" + GOOD + f',"{LONG}"\n' * count + "]",
    "rows.csv": lambda count: "prompt,completion\nq,a\n" + f"{LONG}\n" * count,
}


@pytest.mark.reliability("R20")
@pytest.mark.parametrize("name", FAULTS)
def test_rejected_rows_are_not_held(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(FAULTS[name](1000))
    assert path.stat().st_size >= 30 * MEGABYTE
    assert peak(lambda: check_and_keep_aside(path)) < 8 * MEGABYTE
    assert (tmp_path / "rejected.jsonl").stat().st_size >= 30 * MEGABYTE


@pytest.mark.reliability("R20")
def test_many_small_faults_are_counted_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "".join(f'{{"column{number}": 0}}\n' for number in range(5000)))
    assert peak(lambda: check_and_keep_aside(path)) < MEGABYTE


PIECES = {
    "no line ends": ("rows.jsonl", b"\xff\x00{[" * 2**18),
    "lines": ("rows.jsonl", (b"\xff\x00{[" * 256 + b"\n") * 2**10),
    "an array": ("rows.json", (b'["a", {"text": "' + b"x" * 1000 + b'"}],\n') * 2**10),
    "an open quote": ("rows.csv", b'text,a\n"' + (b"a" * 1000 + b"\n") * 2**10),
}


@pytest.mark.slow
@pytest.mark.reliability("R20")
@pytest.mark.parametrize("name", PIECES)
def test_a_large_file_of_garbage_fills_no_memory(name: str, tmp_path: Path) -> None:
    file, piece = PIECES[name]
    code = (
        "import resource, sys\n"
        "from lorica.data import validate, write_rejected\n"
        "from lorica.errors import LoricaError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    write_rejected(validate(sys.argv[1], skip_invalid_rows=True), sys.argv[1] + '.rejected')\n"
        "except LoricaError as error:\n    assert len(str(error)) < 4000\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    path = tmp_path / file
    with path.open("wb") as handle:
        if file == "rows.json":
            handle.write(b"[")
        while handle.tell() < 120 * MEGABYTE:
            handle.write(piece)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    path.unlink()
    assert int(done.stdout) < 100
