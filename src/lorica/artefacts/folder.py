"""New folders that appear whole or not at all, and copies of a model's files with other numbers in them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lorica.artefacts.bits import bits
from lorica.errors import LoricaError
from lorica.files import make_folder, sync_folder, sync_tree, writing

_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab"}
_NAMES = ("LICENSE", "NOTICE")
_OF_ONE_RUN = {
    "lorica.json", "run.json", "plan.json", "update.json", "trainer_state.json", "manifest.json", "bases.json",
}  # fmt: skip
_FOLDERS = ("", "additional_chat_templates")


@contextmanager
def new_folder(path: Path, option: str) -> Iterator[Path]:
    """Fill a folder beside ``path`` in here; it takes the place of ``path`` at the end if nothing went wrong.

    Raises:
        LoricaError: ``path`` exists and is not an empty folder, or the folder cannot be written (``CannotWrite``);
            ``option`` is what the user gave it by.
    """
    path = path.absolute()
    check_new(path, option)
    aside = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        with writing(path, f"{option} {path}: cannot write it"):
            shutil.rmtree(aside, ignore_errors=True)
            make_folder(aside)
            yield aside
            sync_tree(aside)
            if path.exists():
                path.rmdir()
            aside.rename(path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_new(path: Path, option: str) -> None:
    """Refuse a path that is a file, or a folder with something in it."""
    if path.is_dir() and any(path.iterdir()):
        raise LoricaError(f"{option} {path} is not empty; name another folder")
    if path.exists() and not path.is_dir():
        raise LoricaError(f"{option} {path} is a file; name a folder")


def copy_model(model: Path, target: Path, new: Callable[[str, Tensor], Tensor]) -> None:
    """Write a model folder that is the same but for its numbers.

    The same shards with the same keys in the same order, one tensor in memory at a time, and the configuration,
    tokenizer, code and license files. Records of runs, pickles and checkpoints stay behind.

    Args:
        model: the folder to copy.
        target: an empty folder.
        new: takes each tensor with its key and returns what to write, of the same dtype and shape.

    Raises:
        LoricaError: two files of the model hold the same key.
    """
    seen: dict[str, Path] = {}
    for file in sorted(model.glob("*.safetensors")):
        for key in _rewrite(file, target / file.name, new):
            if key in seen:
                raise LoricaError(f"{file} and {seen[key].name} both hold {key}; leave the files of one model there")
            seen[key] = file
    for folder in _FOLDERS:
        for file in sorted((model / folder).glob("*")):
            if file.is_file() and _belongs(file):
                (target / folder).mkdir(exist_ok=True)
                shutil.copyfile(file, target / folder / file.name)


def _belongs(file: Path) -> bool:
    if file.name.startswith(".") or file.name in _OF_ONE_RUN:
        return False
    return file.suffix in _SUFFIXES or file.name.startswith(_NAMES)


def _rewrite(source: Path, target: Path, new: Callable[[str, Tensor], Tensor]) -> list[str]:
    with source.open("rb") as file:
        length = file.read(8)
        head = file.read(int.from_bytes(length, "little"))
    places = {key: place["data_offsets"] for key, place in json.loads(head).items() if key != "__metadata__"}
    with safe_open(source, framework="pt") as tensors, target.open("wb") as out:
        out.write(length + head)
        for key, (start, end) in sorted(places.items(), key=lambda item: item[1]):
            data = bits(new(key, tensors.get_tensor(key)))
            assert data.nbytes == end - start, key
            out.write(data.data)
    return list(places)
