"""A cache of splits on disk, by the hash of the weight: another k, or a resumed run, splits nothing again."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorica.errors import LoricaError
from lorica.files import CannotWrite, write_text, written_aside
from lorica.subspace.linalg import HalfSplit, Split, check_count, half_split, is_split_of, whole_split

FOLDER, LIMIT = "LORICA_CACHE", "LORICA_CACHE_GB"
"""Environment variables: the folder, or ``off``; and the most that it may hold, in GB (1e9 bytes)."""

DEFAULT_FOLDER = "~/.cache/lorica/splits"
DEFAULT_GB = 20.0

WORTHWHILE = 256
"""Short side below which a weight is split faster than a file is read and checked."""

ABANDONED = 3600
"""Seconds after which an unfinished file belongs to a process that was killed."""

_PIECE = 1 << 24


class SplitStore:
    """Splits weights, and keeps on disk what is not cheap in it: all singular values, all short-side vectors, float64.

    A file is named by the hash of the weight it belongs to, written aside and renamed, and measured against the weight
    when it is read: a damaged one counts as absent. What is read is bit for bit what was computed, so that
    a resumed run goes on as it would have. The folder also holds, for each weight name and shape, the hash of what was
    last split under it: after a task, only the block that changed is split anew (``refreshed``), and the result is
    stored before it is used. Files unused for longest make room for new ones, and nothing is written where the disk
    has not twice the room. Any number of processes may share the folder. Where it cannot be written, every split is a
    full one.

    One object serves one pass over a model: what it has used itself it does not remove, so that of a model that is
    larger than the limit a part is kept, and not always the part that comes too late.

    Args:
        folder: where the files are; None keeps nothing.
        limit: the most they may hold together, bytes.
    """

    def __init__(self, folder: Path | None, limit: int = int(DEFAULT_GB * 1e9)) -> None:
        self.folder, self.limit = folder, limit
        self._used: set[Path] = set()
        self._found: dict[Path, int] | None = None
        """Sizes of the files, those unused for longest first. Looked up once: a folder may hold thousands."""
        self._warned = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> SplitStore:
        """Return the store that ``LORICA_CACHE`` and ``LORICA_CACHE_GB`` ask for.

        Raises:
            LoricaError: the size is no positive number.
        """
        place, size = environment.get(FOLDER) or DEFAULT_FOLDER, environment.get(LIMIT) or str(DEFAULT_GB)
        try:
            gigabytes = float(size)
        except ValueError:
            gigabytes = math.nan
        if not 0 < gigabytes < math.inf:
            raise LoricaError(
                f"{LIMIT} is {size!r}: give the size of the cache of splits in GB, a number above 0; "
                f"{FOLDER}=off keeps none"
            )
        if place.lower() == "off":
            return cls(None)
        try:
            return cls(Path(place).expanduser(), int(gigabytes * 1e9))
        except RuntimeError:  # no home folder
            return cls(None)

    def split(self, weight_MN: Tensor, k: int, name: str = "") -> Split:
        """Return what ``lorica.subspace.linalg.split`` does, from the cache where it is there.

        Args:
            weight_MN: a matrix of any float dtype, on any device.
            k: how many directions, 0 <= k <= min(M, N).
            name: of the weight in its model: where the weight as it was before the last task is found by.

        Raises:
            LoricaError: the weight holds NaN or inf, or k is out of range.
        """
        check_count(weight_MN, k)
        return whole_split(weight_MN, self._half(weight_MN, name), k)

    def singular_values(self, weight_MN: Tensor, name: str = "") -> Tensor:
        """Return all singular values of a weight, descending, in float64."""
        return self.split(weight_MN, 0, name).sigma_S

    def _half(self, weight_MN: Tensor, name: str) -> HalfSplit:
        if self.folder is None or min(weight_MN.shape) < WORTHWHILE:
            return half_split(weight_MN)
        key = digest(weight_MN)
        self._used.add(self._file(key))
        half = self._read(key, weight_MN)
        if half is None or not is_split_of(half, weight_MN):
            half = self._compute(weight_MN, key, name)
        with contextlib.suppress(OSError):
            os.utime(self._file(key))  # used just now
        if name and self._last(name, weight_MN) != key and self._file(key).exists():
            self._remember(name, weight_MN, key)
        return half

    def _compute(self, weight_MN: Tensor, key: str, name: str) -> HalfSplit:
        before = self._last(name, weight_MN) if name else None
        old = self._read(before, weight_MN) if before and before != key else None
        half = half_split(weight_MN, None if old is None else old.short_SS)
        # A re-split that is not kept could not be had again, bit for bit, once what it grew out of is gone.
        return half if self._write(key, half) or old is None else half_split(weight_MN)

    # --- files ------------------------------------------------------------------------------------------------

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str, weight_MN: Tensor) -> HalfSplit | None:
        """Return what is kept under a key, None where there is nothing that could be of a weight of this shape."""
        file, size = self._file(key), min(weight_MN.shape)
        try:
            tensors = load_file(file)
            sigma, short = tensors["sigma_S"], tensors["short_SS"]
        except (OSError, SafetensorError, KeyError, RuntimeError):  # torch's own where another process just removed it
            return None
        if sigma.shape != (size,) or short.shape != (size, size) or not sigma.dtype == short.dtype == torch.float64:
            return None
        if not (bool(sigma.isfinite().all()) and bool((sigma.diff() <= 0).all()) and sigma[-1] >= 0):
            return None
        # Cloned: in a mapped file tensors lie at odd addresses, and products of them differ in their last bits.
        return HalfSplit(sigma.clone().to(weight_MN.device), short.clone().to(weight_MN.device))

    def _write(self, key: str, half: HalfSplit) -> bool:
        """Keep a half split and tell whether there was room for it."""
        tensors = {"sigma_S": half.sigma_S.cpu(), "short_SS": half.short_SS.cpu()}
        assert self.folder is not None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            size = sum(tensor.nbytes for tensor in tensors.values())
            found = self._make_room(size)
            if found is None:
                return False
            with written_aside(self._file(key)) as aside:
                save_file(tensors, aside)
            found[self._file(key)] = size
        except (OSError, SafetensorError, CannotWrite) as error:
            self._warn(error)
            return False
        return True

    def _make_room(self, size: int) -> dict[Path, int] | None:
        """Remove what was unused for longest until ``size`` more bytes are within the limit.

        Returns:
            The files that are left; None where there is no room, and nothing was removed.
        """
        assert self.folder is not None
        if size > self.limit or shutil.disk_usage(self.folder).free < 2 * size:
            return None
        if self._found is None:
            self._found = {file: held for _, held, file in sorted(self._files())}
        over = sum(self._found.values()) + size - self.limit
        removable = [file for file in self._found if file not in self._used]
        if over > sum(self._found[file] for file in removable):
            return None
        for file in removable:
            if over <= 0:
                break
            file.unlink(missing_ok=True)
            over -= self._found.pop(file)
        return self._found

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield when each file was used last, its size and name; remove what killed processes left unfinished."""
        assert self.folder is not None
        for file in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room as well
                status = file.stat()
                if file.suffix == ".safetensors":
                    yield status.st_mtime, status.st_size, file
                elif file.suffix == ".tmp" and status.st_mtime < time.time() - ABANDONED:
                    file.unlink()

    # --- what was split last under a name ---------------------------------------------------------------------

    def _note(self, name: str, weight_MN: Tensor) -> Path:
        assert self.folder is not None
        identity = f"{name} {tuple(weight_MN.shape)} {weight_MN.dtype}"
        return self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.last"

    def _last(self, name: str, weight_MN: Tensor) -> str | None:
        try:
            return self._note(name, weight_MN).read_text(encoding="ascii")
        except (OSError, ValueError):
            return None

    def _remember(self, name: str, weight_MN: Tensor, key: str) -> None:
        try:
            write_text(self._note(name, weight_MN), key)
        except (OSError, CannotWrite) as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            warnings.warn(f"{self.folder}: splits are not kept: {error}; {FOLDER} names another folder", stacklevel=2)
        self._warned = True


def digest(weight_MN: Tensor) -> str:
    """Return the SHA-256 of a weight: dtype, shape and bytes, row by row, whatever its strides and device."""
    hashed = hashlib.sha256(f"{weight_MN.dtype} {tuple(weight_MN.shape)}".encode())
    rows = max(1, _PIECE // max(1, weight_MN[:1].nbytes))
    for piece in weight_MN.detach().split(rows):
        hashed.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()
