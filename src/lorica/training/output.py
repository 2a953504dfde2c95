"""The output folder of a run: whether it may be written to, and the plain model that is saved there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging as transformers_logging

from lorica.errors import LoricaError
from lorica.files import LEFTOVER, Listing, listing, make_folder, move_into, sync_tree, writing
from lorica.names import check_no_links

LEFTOVERS = {"plan.json", "update.json", "rejected.jsonl", "bases"}
"""What an update that stopped before its first checkpoint leaves in its output folder."""

MAX_SHARD = "5GB"
"""A larger model is saved in several files: from a GPU each is copied to the host as a whole before it is written."""


def check_output_dir(output_dir: str, *, resuming: bool) -> None:
    """Refuse an output folder that holds something, unless this is a resumption, or links. Nothing is made yet."""
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise LoricaError(f"--output_dir {output_dir} is a file; name a folder")
    if (above := next((one for one in path.parents if one.exists()), path.parent)).is_file():
        raise LoricaError(f"--output_dir {output_dir}: {above} is a file; name a folder")
    check_no_links(path)
    held = {file.name for file in path.iterdir()} if path.is_dir() else set()
    if not resuming and any(name not in LEFTOVERS and not LEFTOVER.fullmatch(name) for name in held):
        raise LoricaError(f"--output_dir {output_dir} is not empty; {_what_it_holds(path)}name another folder")


def _what_it_holds(folder: Path) -> str:
    """Return what to do with the folder of an update that was stopped before it ended."""
    if (folder / "lorica.json").exists():
        return ""
    if any(folder.glob("checkpoint-*")):
        return "add --resume_from_checkpoint true to go on, or "
    return "it is of an update that did not end: remove it, or " if (folder / "update.json").exists() else ""


def make_output_dir(output_dir: str) -> Path:
    """Make the output folder if it is missing."""
    path = Path(output_dir)
    try:
        with writing(path, f"--output_dir {output_dir}: cannot make it"):
            make_folder(path)
    except OSError as error:
        raise LoricaError(f"--output_dir {output_dir}: cannot make it: {error.strerror}") from error
    return path


def save_model(model: Any, tokenizer: Any, output_dir: Path, weights: Mapping[str, Tensor] | None = None) -> Listing:
    """Write a plain model folder with its tokenizer, whole or not at all, and return what it consists of.

    Everything is written into a folder aside first, brought to the disk, and moved from there, file by file, the
    weights last. If anything fails, the files of the same names that were there before are there again, and no new
    one. A process that is killed between two moves leaves a folder that no loader takes for a model, or a whole one.

    Args:
        weights: of ``sharded_state.whole_weights``, where the model is sharded.

    Raises:
        CannotWrite: there is no room for it, or no right to write there.
    """
    aside = output_dir / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(output_dir, f"--output_dir {output_dir}: cannot write the model", lambda: stored_bytes(model)):
            write_model(model, aside / "new", weights)
            tokenizer.save_pretrained(aside / "new")
            sync_tree(aside / "new")
            files = listing(aside / "new")
            move_into(aside / "new", output_dir, aside / "old")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return files


def write_model(model: Any, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
    """Write a plain model's weights and configuration; ``weights`` as for ``save_model``."""
    with without_bars(), nullcontext() if weights is None else _plain_configuration(model):
        model.save_pretrained(folder, max_shard_size=MAX_SHARD, state_dict=weights)


def stored_bytes(model: Any) -> int:
    """Return the bytes of a model's tensors as they are saved."""
    return sum({id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}.values())


@contextmanager
def _plain_configuration(model: Any) -> Iterator[None]:
    """Take from a configuration that its model is sharded: ``save_pretrained`` would wait for the other processes."""
    sharded, model.config.distributed_config = model.config.distributed_config, None
    try:
        yield
    finally:
        model.config.distributed_config = sharded


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' progress bars off in here."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
