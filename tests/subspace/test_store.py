"""Splits are kept on disk by the hash of the weight; whatever happens to the files, what comes out is the split."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace import linalg, store
from lorica.subspace.linalg import Split, split
from lorica.subspace.store import SplitStore, digest
from tests.builders import matrix
from tests.subspace.test_resplit import grown, reference

SIZE = 8 * 256 * 257
"""Bytes of numbers in the file of a weight whose short side is 256."""

MB = 10**6


def weight(seed: int = 0, m: int = 288, n: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    return matrix(m, n, seed, dtype)


def same(a: Split, b: Split) -> bool:
    """Return whether two splits are the same, bit for bit."""
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("u_MK", "sigma_S", "v_NK"))


def files(folder: Path, suffix: str = ".safetensors") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == suffix)


def no_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be computed from here on: what comes out was read."""
    monkeypatch.setattr(store, "half_split", lambda *_: pytest.fail("split again"))


@pytest.mark.parametrize("shape", [(288, 256), (256, 288), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    w = weight(0, *shape, dtype=dtype)
    first = SplitStore(tmp_path).split(w, 100, "layer")
    assert same(first, split(w, 100))
    assert files(tmp_path) == [f"{digest(w)}.safetensors"]
    assert not files(tmp_path, ".tmp")
    expected = split(w, 200)
    no_split(monkeypatch)
    assert same(SplitStore(tmp_path).split(w, 100), first)
    assert same(SplitStore(tmp_path).split(w.clone(), 200, "other"), expected)
    assert torch.equal(SplitStore(tmp_path).singular_values(w), expected.sigma_S)


def test_a_transposed_weight_is_read_back_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight().T
    first = SplitStore(tmp_path).split(w, 100)
    no_split(monkeypatch)
    assert same(SplitStore(tmp_path).split(w, 100), first)


def test_small_weights_leave_nothing_behind(tmp_path: Path) -> None:
    w = weight(0, 700, 255)
    assert same(SplitStore(tmp_path).split(w, 9, "layer"), split(w, 9))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("k", [-1, 257])
def test_a_wrong_count_is_refused_here_too(tmp_path: Path, k: int) -> None:
    with pytest.raises(LoricaError, match=f"k = {k} is out of range for a 288 x 256 weight: 0 to 256"):
        SplitStore(tmp_path).split(weight(), k)


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    w = weight()
    w[3, 4] = torch.nan
    with pytest.raises(LoricaError, match="288 x 256 weight holds NaN or inf"):
        SplitStore(tmp_path).split(w, 2, "layer")
    assert not list(tmp_path.iterdir())


def test_the_hash_is_that_of_dtype_shape_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(0, 7, 5)
    expected = hashlib.sha256(b"torch.float32 (7, 5)" + w.numpy().tobytes()).hexdigest()
    assert digest(w) == digest(w.T.contiguous().T) == digest(torch.nn.Parameter(w)) == expected
    monkeypatch.setattr(store, "_PIECE", 44)  # two rows of 20 bytes
    assert digest(w) == expected
    others = [w.reshape(5, 7), w.view(torch.int32), w.double(), -w, w.bfloat16(), w[:0]]
    assert len({expected, *map(digest, others)}) == len(others) + 1


def spoil(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "header":
        content[:8] = b"\xff" * 8
    elif how == "flipped":
        content[len(content) // 2 + 6 & ~7 | 6] ^= 0x7F
    file.write_bytes(content)


def replace_tensors(file: Path, how: str) -> None:
    kept = load_file(file)
    sigma, short = kept["sigma_S"].clone(), kept["short_SS"].clone()
    spoiled: dict[str, dict[str, Tensor]] = {
        "missing": {"sigma_S": sigma},
        "shape": {"sigma_S": sigma[:-1].clone(), "short_SS": short},
        "dtype": {"sigma_S": sigma.float(), "short_SS": short.float()},
        "nan": {"sigma_S": sigma, "short_SS": short.fill_(torch.nan)},
        "order": {"sigma_S": sigma.flip(0), "short_SS": short.flip(1).contiguous()},
    }
    save_file(spoiled[how], file)


TENSORS = ("missing", "shape", "dtype", "nan", "order")


@pytest.mark.parametrize("how", ["truncated", "empty", "header", "flipped", *TENSORS, "another weight's"])
def test_a_damaged_file_counts_as_absent_and_is_replaced(tmp_path: Path, how: str) -> None:
    w = weight()
    first = SplitStore(tmp_path).split(w, 100)
    file = tmp_path / f"{digest(w)}.safetensors"
    intact = file.read_bytes()
    if how in TENSORS:
        replace_tensors(file, how)
    elif how == "another weight's":
        SplitStore(tmp_path).split(weight(1), 100)
        (tmp_path / f"{digest(weight(1))}.safetensors").replace(file)
    else:
        spoil(file, how)
    assert file.read_bytes() != intact
    assert same(SplitStore(tmp_path).split(w, 100), first)
    assert file.read_bytes() == intact


# --- the folder ---------------------------------------------------------------------------------------------------


def age(folder: Path, w: Tensor, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / f"{digest(w)}.safetensors", (then, then))


def test_the_files_unused_for_longest_make_room(tmp_path: Path) -> None:
    limit = int(2.5 * SIZE)
    a, b, c = (weight(seed) for seed in range(3))
    for w, seconds in ((a, 200), (b, 100)):
        SplitStore(tmp_path, limit).split(w, 10)
        age(tmp_path, w, seconds)
    SplitStore(tmp_path, limit).split(a, 20)  # used just now
    SplitStore(tmp_path, limit).split(c, 10)
    assert files(tmp_path) == sorted(f"{digest(w)}.safetensors" for w in (a, c))


def test_of_a_model_larger_than_the_limit_a_part_is_kept(tmp_path: Path) -> None:
    model = [weight(seed) for seed in range(4)]
    SplitStore(tmp_path).split(weight(9), 10)
    for _ in range(2):
        one_pass = SplitStore(tmp_path, int(2.5 * SIZE))
        for w in model:
            one_pass.split(w, 10)
        assert files(tmp_path) == sorted(f"{digest(w)}.safetensors" for w in model[:2])


def test_what_a_weight_grew_out_of_goes_before_what_is_still_to_come(tmp_path: Path) -> None:
    limit = int(2.5 * SIZE)
    before = [weight(seed) for seed in range(2)]
    for index, w in enumerate(before):
        SplitStore(tmp_path, limit).split(w, 192, str(index))
        age(tmp_path, w, 100 - index)
    after = grown(before[0], 192, 0.01)
    SplitStore(tmp_path, limit).split(after, 192, "0")
    assert files(tmp_path) == sorted(f"{digest(w)}.safetensors" for w in (after, before[1]))


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    w = weight()
    assert same(SplitStore(tmp_path, limit=SIZE - 1).split(w, 10, "layer"), split(w, 10))
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_on_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage(SIZE * 9, SIZE * 7, 2 * SIZE - 1))
    SplitStore(tmp_path).split(weight(), 10)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage(SIZE * 9, SIZE * 7, 2 * SIZE))
    SplitStore(tmp_path).split(weight(), 10)
    assert len(files(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked = SplitStore(tmp_path / "file" / "splits")
    with pytest.warns(UserWarning, match=r"file/splits: splits are not kept: .*; LORICA_CACHE names another folder"):
        first = blocked.split(weight(), 10, "layer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocked.split(weight(1), 10, "layer")
    assert same(first, split(weight(), 10))


def test_a_disk_that_fills_up_while_writing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert same(SplitStore(tmp_path).split(weight(), 10), split(weight(), 10))
    assert not list(tmp_path.iterdir())


# --- processes ----------------------------------------------------------------------------------------------------

HEAD = """
import os, sys
from pathlib import Path
import torch
from lorica.subspace.store import SplitStore, digest
folder = Path(sys.argv[1])

def weight(seed):
    return torch.randn(288, 256, generator=torch.Generator().manual_seed(seed))
"""

KILLED = (
    HEAD
    + """
Path.replace = lambda *_: os._exit(9)
SplitStore(folder).split(weight(0), 100, "layer")
"""
)

MANY = (
    HEAD
    + """
for seed in [0, 1, 2, 0, 1, 2]:
    parts = SplitStore(folder, limit=int(2.5 * 8 * 256 * 257)).split(weight(seed), 100, "layer")
    print(digest(parts.u_MK), digest(parts.v_NK))
"""
)


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_process_killed_before_the_rename_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    killed = start(KILLED, tmp_path)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == 9, errors
    assert not files(tmp_path)
    (left,) = files(tmp_path, ".tmp")
    w = torch.randn(288, 256, generator=torch.Generator().manual_seed(0))
    assert same(SplitStore(tmp_path).split(w, 100), split(w, 100))
    assert files(tmp_path, ".tmp") == [left]  # perhaps somebody is still writing it
    then = time.time() - 2 * store.ABANDONED
    os.utime(tmp_path / left, (then, then))
    SplitStore(tmp_path).split(weight(1), 100)
    assert not files(tmp_path, ".tmp")


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    both = [start(MANY, tmp_path) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    generators = (torch.Generator().manual_seed(seed) for seed in (0, 1, 2, 0, 1, 2))
    expected = [split(torch.randn(288, 256, generator=generator), 100) for generator in generators]
    lines = [f"{digest(parts.u_MK)} {digest(parts.v_NK)}" for parts in expected]
    assert [out.splitlines() for out, _ in results] == [lines, lines]
    assert not files(tmp_path, ".tmp")


def test_a_file_that_another_process_removes_while_it_is_opened_counts_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.randn(288, 256, generator=torch.Generator().manual_seed(0))
    SplitStore(tmp_path).split(w, 100)
    opened, removed = torch.UntypedStorage.from_file, []

    def removed_first(name: str, *rest: object, **named: object) -> torch.UntypedStorage:
        Path(name).unlink()
        removed.append(name)
        return opened(name, *rest, **named)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", removed_first)
    assert same(SplitStore(tmp_path).split(w, 100), split(w, 100))
    assert removed


# --- from task to task --------------------------------------------------------------------------------------------


@pytest.fixture
def resplits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that tells of every attempt at a re-split whether it was good enough."""
    seen: list[bool] = []
    attempt = linalg.refreshed

    def told(gram_SS: Tensor, old_SS: Tensor) -> Any:
        result = attempt(gram_SS, old_SS)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(linalg, "refreshed", told)
    return seen


def test_after_a_task_only_what_changed_is_split(tmp_path: Path, resplits: list[bool]) -> None:
    before, k = weight(), 192
    after = grown(before, k, 0.01)
    SplitStore(tmp_path).split(before, k, "layer")
    assert resplits == []
    second = SplitStore(tmp_path).split(after, k, "layer")
    assert resplits == [True]
    u, sigma, v = reference(after)
    torch.testing.assert_close(second.sigma_S, sigma, rtol=1e-10, atol=0)
    torch.testing.assert_close(second.u_MK @ second.u_MK.T, u[:, :k] @ u[:, :k].T, rtol=0, atol=1e-9)
    torch.testing.assert_close(second.v_NK @ second.v_NK.T, v[:, :k] @ v[:, :k].T, rtol=0, atol=1e-9)
    resumed = SplitStore(tmp_path).split(after, k, "layer")
    assert same(resumed, second)
    assert resplits == [True]


@pytest.mark.parametrize("last", ["another model's", "bfloat16", "transposed", "gone", "no hash"])
def test_a_wrong_hint_changes_nothing(tmp_path: Path, last: str, resplits: list[bool]) -> None:
    w = weight(5, 256, 256)
    before = {"bfloat16": w.bfloat16(), "transposed": w.T}.get(last, weight(6, 256, 256))
    SplitStore(tmp_path).split(before, 192, "layer")
    if last == "gone":
        (tmp_path / f"{digest(before)}.safetensors").unlink()
    if last == "no hash":
        (tmp_path / files(tmp_path, ".last")[0]).write_text("../../etc/passwd\n")
    assert same(SplitStore(tmp_path).split(w, 192, "layer"), split(w, 192))
    assert resplits == ([False] if last in ("another model's", "transposed") else [])


def test_a_resplit_that_cannot_be_kept_is_not_used(tmp_path: Path, resplits: list[bool]) -> None:
    before = weight()
    after = grown(before, 192, 0.01)
    SplitStore(tmp_path).split(before, 192, "layer")
    tight = SplitStore(tmp_path, limit=SIZE - 1)
    assert same(tight.split(after, 192, "layer"), split(after, 192))
    assert resplits == [True]


# --- the environment ----------------------------------------------------------------------------------------------


def test_the_environment_says_where_and_how_much(tmp_path: Path) -> None:
    asked = SplitStore.from_environment({"LORICA_CACHE": str(tmp_path), "LORICA_CACHE_GB": "0.5"})
    assert (asked.folder, asked.limit) == (tmp_path, 500 * MB)
    default = SplitStore.from_environment({})
    assert (default.folder, default.limit) == (Path.home() / ".cache/lorica/splits", 20_000 * MB)
    assert SplitStore.from_environment({"LORICA_CACHE": "", "LORICA_CACHE_GB": ""}).folder == default.folder


@pytest.mark.parametrize("off", ["off", "OFF"])
def test_the_cache_can_be_off(off: str, resplits: list[bool]) -> None:
    without = SplitStore.from_environment({"LORICA_CACHE": off})
    before = weight()
    after = grown(before, 192, 0.01)
    for w in (before, after):
        assert same(without.split(w, 192, "layer"), split(w, 192))
    assert without.folder is None
    assert resplits == []


@pytest.mark.parametrize("size", ["0", "-3", "nan", "inf", "20 GB", "much"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(LoricaError, match=rf"LORICA_CACHE_GB is '{size}': give .* a number above 0; LORICA_CACHE=off"):
        SplitStore.from_environment({"LORICA_CACHE_GB": size})
