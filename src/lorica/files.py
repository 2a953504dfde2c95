"""Files and folders that are there whole or not at all, and what is said when the system takes no more."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from lorica.errors import LoricaError

FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""What the system answers where there is no room: on the disk, for one file, for this user."""

REFUSALS = FULL | {errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
"""What the system answers to a write that is not the program's fault."""

LEFTOVER = re.compile(r"\.(saving|stage|.+\.\d+\.(tmp|partial)|.+\.removed)")
"""Names of what a process that was killed leaves unfinished."""

Listing = dict[str, dict[str, Any]]
"""Bytes and SHA-256 of files, by name within a folder."""


class CannotWrite(LoricaError):
    """The system takes no more: the disk is full, a file too large, a folder read-only.

    Attributes:
        what: could not be written, as a clause that names it.
        reason: the system's.
        room: the bytes that are needed and those that are free, as a clause; empty where room is not the matter.
    """

    def __init__(self, what: str, reason: str, room: str = "", hint: str = "") -> None:
        super().__init__("; ".join(part for part in (f"{what}: {reason}", room, hint) if part))
        self.what, self.reason, self.room = what, reason, room

    def hinting(self, hint: str) -> CannotWrite:
        """Return the same with what is whole still, and how to go on."""
        return CannotWrite(self.what, self.reason, self.room, hint)


def refusal(error: BaseException) -> int | None:
    """Return the system's error number where it refused to write, None for any other error.

    Libraries written in Rust (safetensors, tokenizers) raise errors of their own that end in ``(os error 28)``.
    """
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return number if number in REFUSALS and not isinstance(error, LoricaError) else None


@contextlib.contextmanager
def writing(place: Path | None, what: str = "", needs: Callable[[], int] | None = None) -> Iterator[None]:
    """Write in here; where the system takes no more, say what could not be written and how much room it needs.

    Args:
        place: the file or folder that is written; None: whatever the error names.
        what: the clause of the message; by default that the place cannot be written.
        needs: returns the bytes that are to be written.

    Raises:
        CannotWrite: instead of the error of whatever was writing.
    """
    try:
        yield
    except CannotWrite as error:
        if place is None or not what:
            raise
        raise CannotWrite(what, error.reason, error.room) from error
    except Exception as error:
        number = refusal(error)
        if number is None:
            raise
        file = Path(str(getattr(error, "filename", None) or place or ""))
        known = file in (place, Path()) or LEFTOVER.fullmatch(file.name)
        reason = os.strerror(number) + ("" if known else f" ({file})")
        there = place or file
        room = f"{free_bytes(there):,} bytes are free there" if number in FULL and there != Path() else ""
        if room and needs is not None:
            room = f"it needs about {needs():,} bytes, and {room}"
        raise CannotWrite(what or f"cannot write {place}", reason, room) from error


@contextlib.contextmanager
def written_aside(file: Path, needs: Callable[[], int] | None = None) -> Iterator[Path]:
    """Yield the name of a file beside the target; once written, it is brought to the disk and takes the target's place.

    If writing fails the target is as it was, and what was written is gone. A process that is killed leaves a ``.tmp``.

    Raises:
        CannotWrite: there is no room, or no right to write there.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with writing(file, needs=needs):
        try:
            yield aside
            _sync_file(aside)
            aside.replace(file)
            sync_folder(file.parent)
        finally:
            with contextlib.suppress(OSError):  # what stopped the writing is told, not what follows from it
                aside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; see ``written_aside``."""
    data = text.encode("utf-8")
    with written_aside(file, lambda: len(data)) as aside:
        aside.write_bytes(data)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, if they are missing, and bring their names to the disk."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def move_into(source: Path, target: Path, replaced: Path | None = None) -> None:
    """Move all files below a folder to the same places below another, and bring that to the disk.

    Weights come after what is read with them, and the index of several weight files last; what is replaced goes the
    other way round. So at every moment the target is one whole model, the other, or none that a loader would take.

    Args:
        source: a folder on the same disk, its files on the disk already.
        replaced: where the files go that were in these places; by default they are gone. If a move fails they are
            put back, and the others are where they were.
    """
    names = sorted((path.relative_to(source) for path in source.rglob("*") if path.is_file()), key=_place_in_row)
    before = [name for name in reversed(names) if replaced is not None and (target / name).exists()]
    moves = [(target / name, (replaced or target) / name) for name in before]
    moves += [(source / name, target / name) for name in names]
    done: list[tuple[Path, Path]] = []
    try:
        for place, goal in moves:
            goal.parent.mkdir(parents=True, exist_ok=True)
            place.replace(goal)
            done.append((place, goal))
        for folder in sorted({(target / name).parent for name in names} | {target}):  # a folder before what is in it
            sync_folder(folder)
    except BaseException:
        for place, goal in reversed(done):
            goal.replace(place)
        raise


def _place_in_row(file: Path) -> tuple[bool, bool, Path]:
    return file.name.endswith(".index.json"), file.suffix == ".safetensors", file


def remove_folder(folder: Path) -> None:
    """Remove a folder at once: what is left if the process is killed meanwhile has another name, and goes next time."""
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    sync_folder(folder.parent)
    for left in folder.parent.glob(".*.removed"):
        shutil.rmtree(left, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Bring all files in a folder, and the names in it and below it, to the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync_file(Path(place, name))
        sync_folder(Path(place))


def _sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        _sync(stream.fileno(), file)


def _sync(handle: int, place: Path) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(place)) from error  # the system does not name it


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    if os.name == "nt":  # which opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _sync(handle, folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def listing(folder: Path, files: Iterable[Path] | None = None) -> Listing:
    """Return the bytes and the SHA-256 of files below a folder, by name; by default of all of them."""
    found = sorted(path for path in folder.rglob("*") if path.is_file()) if files is None else files
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in found
    }


def difference(folder: Path, listed: Listing) -> str | None:
    """Return the first difference between the files of a folder and what was listed of them; None: there is none.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: this is no listing.
    """
    expected = {name: (int(one["bytes"]), str(one["sha256"])) for name, one in listed.items()}
    for name, (size, digest) in expected.items():
        if not name.isprintable() or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(f"{name!r} is no file of this folder")
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
        if sha256(file) != digest:
            return f"{name} was changed: its SHA-256 is not the one it was written with"
    return None


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Return the bytes that are free where a path is, or is to be."""
    path = path.absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free
