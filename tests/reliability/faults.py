"""A disk that fails on purpose: what it would hold had the power gone at any moment, and writes that are refused.

``Disk`` stands between a piece of code and one folder. It sees every durable operation there: opening for writing,
each write, fsync of files and folders, rename, unlink, mkdir, rmdir, and what safetensors and tokenizers write by
themselves. Before each of them, and in the middle of each write, it takes three images of the folder:

- ``killed``: the process dies and the system lives. All that was done is there.
- ``names first``: the power goes, on a file system that keeps names and forgets contents. Names are as they were; a
  file holds what it held when it was last synchronised, and is empty if it never was.
- ``harsh``: the power goes, and what removes has reached the disk at once, but what builds only where it was
  synchronised: a file holds what it last synchronised, a new name (of a file, a folder, the goal of a rename) is there
  only if its folder was synchronised since, and what a rename replaced or moved away is otherwise back in its place.

An image is what a machine finds when it starts again, so nobody has to die for it: one run of the code gives the
images of all its moments. The same ``Disk`` makes the n-th operation fail instead, as a full or broken disk does.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

Tree = dict[str, bytes | None]
"""Contents by path within the folder; None: a folder."""

WORLDS = ("killed", "names first", "harsh")

_open, _fsync, _unlink, _rmdir, _mkdir = io.open, os.fsync, os.unlink, os.rmdir, os.mkdir
_rename, _replace = os.rename, os.replace
_serialize_file = safetensors.torch.serialize_file
_save_tokenizer = PreTrainedTokenizerFast._save_pretrained


@dataclass
class Image:
    """What the folder holds after a fault.

    Attributes:
        moment: number and name of the operation that was about to be done.
        world: one of ``WORLDS``.
    """

    moment: str
    world: str
    tree: Tree

    def restore(self, folder: Path) -> Path:
        """Make the folder hold this image and nothing else."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in sorted(self.tree.items()):
            place = folder / name
            if content is None:
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
        return folder

    def __str__(self) -> str:
        return f"{self.world} before {self.moment}"


@dataclass
class Disk:
    """The folder under watch.

    Attributes:
        root: the folder; it must exist.
        fails: which operation fails, counted from 1; None: none does, and images are taken instead.
        number: of the error: ENOSPC, EIO ...
        stays_full: whether every further write fails too, as on a full disk; else only this one.
        done: the operations so far, by name.
    """

    root: Path
    fails: int | None = None
    number: int = errno.ENOSPC
    stays_full: bool = True
    takes_images: bool = True
    done: list[str] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self._held: dict[int, bytes] = {}
        """What files are sure to hold, by inode."""
        self._names: dict[int, dict[str, int]] = {}
        """What folders are sure to name, by inode."""
        self._seen: set[tuple[str, frozenset[tuple[str, bytes | None]]]] = set()
        self._contents: dict[int, tuple[int, int, bytes]] = {}
        self._replaced: list[Any] = []
        for place, _, files in os.walk(self.root):
            self._sync_names(Path(place))
            for name in files:
                self._sync_content(Path(place, name))

    # --- what is sure to be on the disk -------------------------------------------------------------------------

    def _sync_content(self, file: Path) -> None:
        self._held[_inode(file)] = self._content(str(file))

    def _sync_names(self, folder: Path) -> None:
        """Take down what a folder names; what was moved here from another folder is there no more."""
        own = self._names[_inode(folder)] = {entry.name: entry.inode() for entry in os.scandir(folder)}
        for other, names in self._names.items():
            if other != _inode(folder):
                for name in [name for name, inode in names.items() if inode in own.values()]:
                    del names[name]

    def _forget(self, place: Path) -> None:
        """A new file or folder; its inode may have been another's."""
        for known in (self._held, self._names, self._contents):
            known.pop(_inode(place), None)  # type: ignore[attr-defined]

    def _live(self) -> Tree:
        top = len(str(self.root)) + 1
        found: Tree = {}
        for place, folders, files in os.walk(self.root):
            found |= {os.path.join(place, name)[top:]: None for name in folders}  # noqa: PTH118
            found |= {os.path.join(place, name)[top:]: self._content(os.path.join(place, name)) for name in files}  # noqa: PTH118
        return found

    def _content(self, file: str) -> bytes:
        """Return what a file holds; read once for each change."""
        status = os.stat(file)  # noqa: PTH116
        known = self._contents.get(status.st_ino)
        if known is None or known[:2] != (status.st_size, status.st_mtime_ns):
            known = self._contents[status.st_ino] = (status.st_size, status.st_mtime_ns, _read(Path(file)))
        return known[2]

    def _names_first(self) -> Tree:
        return {
            name: content if content is None else self._held.get(_inode(self.root / name), b"")
            for name, content in self._live().items()
        }

    def _harsh(self) -> Tree:
        kinds = {_inode(path): path.is_dir() for path in (self.root, *self.root.rglob("*"))}
        tree: Tree = {}

        def enter(folder: int, prefix: str) -> None:
            for name, inode in self._names.get(folder, {}).items():
                is_folder = kinds.get(inode, inode in self._names)
                tree[prefix + name] = None if is_folder else self._held.get(inode, b"")
                if is_folder:
                    enter(inode, f"{prefix}{name}/")

        enter(_inode(self.root), "")
        return tree

    def _take_images(self, moment: str) -> None:
        for world, tree in zip(WORLDS, (self._live(), self._names_first(), self._harsh()), strict=True):
            key = world, frozenset(tree.items())
            if key not in self._seen:
                self._seen.add(key)
                self.images.append(Image(moment, world, tree))

    # --- operations ---------------------------------------------------------------------------------------------

    def holds(self, place: Any) -> bool:
        """Tell whether a path is in the folder under watch."""
        if isinstance(place, int):
            return False
        return _path(place).is_relative_to(self.root)

    def before(self, operation: str, place: Any) -> None:
        """Count an operation; take the images, or fail."""
        name = f"{operation} {_path(place).relative_to(self.root)}"
        self.done.append(name)
        here = len(self.done)
        if self.fails is None:
            if self.takes_images:
                self._take_images(f"{here}: {name}")
        elif here == self.fails or (self.stays_full and here > self.fails and operation in NEEDS_ROOM):
            named = () if operation in ("write", "fsync") else (str(place),)  # as the system does
            raise OSError(self.number, os.strerror(self.number), *named)

    def changed(self, place: Path) -> None:
        """Read a file anew: within a tick of the clock its time and size may be the same."""
        self._contents.pop(_inode(place), None)

    def middle(self, operation: str, place: Path) -> None:
        """In the middle of a write."""
        self.changed(place)
        if self.fails is None and self.takes_images:
            self._take_images(f"{len(self.done)}: {operation} {place.relative_to(self.root)}, half done")

    def end(self) -> None:
        """Take the images of the end."""
        if self.fails is None and self.takes_images:
            self._take_images("the end")

    def open(self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
             newline: Any = None, *more: Any, **named: Any) -> Any:  # fmt: skip
        if not set(mode) & set("wax+") or not self.holds(file):
            return _open(file, mode, buffering, encoding, errors, newline, *more, **named)
        path = _path(file)
        is_new = "w" in mode or not path.exists()
        self.before("open", path)
        raw = _WatchedFile(self, path, mode.replace("b", "").replace("t", ""))
        if is_new:
            self._forget(path)
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)  # type: ignore[arg-type]
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def fsync(self, handle: int) -> None:
        place = Path(f"/proc/self/fd/{handle}").readlink()
        if not self.holds(place):
            return _fsync(handle)
        self.before("fsync", place)
        (self._sync_names if place.is_dir() else self._sync_content)(place)
        return None

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove(_unlink, "unlink", path, dir_fd)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove(_rmdir, "rmdir", path, dir_fd)

    def _remove(self, remove: Callable[..., None], operation: str, path: Any, dir_fd: int | None) -> None:
        place = _path(path) if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink() / path
        if not self.holds(place):
            return remove(path, dir_fd=dir_fd)
        self.before(operation, place)
        gone = _inode(place)
        remove(path, dir_fd=dir_fd)
        for names in self._names.values():  # also from where a rename had moved it away
            for name in [name for name, inode in names.items() if inode == gone]:
                del names[name]
        return None

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if not self.holds(path) or _path(path).exists():
            return _mkdir(path, mode, dir_fd=dir_fd)
        self.before("mkdir", path)
        _mkdir(path, mode, dir_fd=dir_fd)
        self._forget(Path(path))
        return None

    def rename(self, source: Any, goal: Any, **more: Any) -> None:
        self._move(_rename, source, goal, more)

    def replace(self, source: Any, goal: Any, **more: Any) -> None:
        self._move(_replace, source, goal, more)

    def _move(self, move: Callable[..., None], source: Any, goal: Any, more: dict[str, Any]) -> None:
        if self.holds(goal):
            self.before("rename", goal)
            if _path(goal).is_file():  # held open, so that no new file gets the inode of what is replaced
                self._replaced.append(_open(goal, "rb"))
        move(source, goal, **more)

    def serialize_file(self, tensors: Any, filename: Any, metadata: Any = None) -> None:
        """Write a file as safetensors does, with its kind of error."""
        if not self.holds(filename):
            return _serialize_file(tensors, filename, metadata)
        return self._foreign("save_file", Path(filename), SafetensorError,
                             lambda: _serialize_file(tensors, filename, metadata))  # fmt: skip

    def _foreign(self, operation: str, path: Path, kind: type[Exception], write: Callable[[], Any]) -> Any:
        """Let a library written in Rust write a file."""
        path = _path(path)
        try:
            self.before(operation, path)
        except OSError as error:
            _overwrite(path, b"")
            raise kind(f"I/O error: {error.strerror} (os error {error.errno})") from error
        result = write()
        self._forget(path)
        content = _read(path)
        _overwrite(path, content[: len(content) // 2])
        self.middle(operation, path)
        _overwrite(path, content)
        self.changed(path)
        return result


NEEDS_ROOM = {"open", "write", "mkdir", "save_file", "save_tokenizer", "fsync"}
"""Operations that a full disk refuses; fsync, where the system takes room only then."""


class _WatchedFile(io.FileIO):
    def __init__(self, disk: Disk, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._disk, self._path = disk, path

    def write(self, data: Any) -> int:
        self._disk.before("write", self._path)
        whole = bytes(data)
        super().write(whole[: len(whole) // 2])
        self._disk.middle("write", self._path)
        super().write(whole[len(whole) // 2 :])
        self._disk.changed(self._path)
        return len(whole)


@contextmanager
def watched(disk: Disk) -> Iterator[Disk]:
    """Send what the code in here does to the folder through the disk."""

    def save_tokenizer(self: Any, save_directory: str, *more: Any, **named: Any) -> Any:
        file = Path(save_directory) / "tokenizer.json"
        if not disk.holds(file):
            return _save_tokenizer(self, save_directory, *more, **named)
        return disk._foreign(
            "save_tokenizer", file, Exception, lambda: _save_tokenizer(self, save_directory, *more, **named)
        )

    with (
        mock.patch.multiple(
            os, fsync=disk.fsync, unlink=disk.unlink, remove=disk.unlink, rmdir=disk.rmdir, mkdir=disk.mkdir,
            rename=disk.rename, replace=disk.replace,
        ),
        mock.patch.object(io, "open", disk.open),
        mock.patch.object(builtins, "open", disk.open),
        mock.patch.object(safetensors.torch, "serialize_file", disk.serialize_file),
        mock.patch.object(PreTrainedTokenizerFast, "_save_pretrained", save_tokenizer),
        mock.patch.object(shutil, "_USE_CP_SENDFILE", False),  # copies then go through write as well
    ):  # fmt: skip
        yield disk


def images(root: Path, code: Callable[[], object]) -> list[Image]:
    """Run a piece of code once and return what the folder would hold after a fault at each of its moments."""
    disk = Disk(root)
    with watched(disk):
        code()
    disk.end()
    return disk.images


def operations(root: Path, code: Callable[[], object]) -> list[str]:
    """Run a piece of code and return the names of its durable operations."""
    disk = Disk(root, takes_images=False)
    with watched(disk):
        code()
    return disk.done


@contextmanager
def failing(root: Path, at: int, number: int = errno.ENOSPC, *, stays_full: bool = True) -> Iterator[Disk]:
    """Make the operation with this number fail, and on a disk that stays full all further ones that need room."""
    with watched(Disk(root, fails=at, number=number, stays_full=stays_full)) as disk:
        yield disk


def _path(place: Any) -> Path:
    return Path.cwd() / os.fspath(place)


def _inode(path: Path) -> int:
    return path.stat().st_ino


def _read(path: Path) -> bytes:
    with _open(path, "rb") as file:
        return file.read()  # type: ignore[no-any-return]


def _overwrite(path: Path, content: bytes) -> None:
    with _open(path, "wb") as file:
        file.write(content)
