"""What comes with a model or lies in a checkpoint and is refused: pickles, kernels of the hub, another's files."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from transformers.utils import import_utils
from transformers.utils.hub import cached_file

from lorica.errors import LoricaError

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
"""Endings of files that are read by unpickling; Lorica writes none of them."""

_HUB_KERNEL = re.compile(r"kernels-community/[\w.-]+@[0-9a-f]{40}(:[\w.-]+)?")
_FLASH = re.compile(r"flash_attention_(\d)")


def refuse_pickled_weights(name: str, revision: str | None) -> None:
    """Refuse a model whose weights, or those of an adapter with it, only unpickling can read.

    Args:
        name: a folder, or a name on the hub.
        revision: commit on the hub.

    Raises:
        LoricaError: names the file.
    """
    if (file := _pickle_of(name, revision)) is not None:
        raise LoricaError(
            f"model {name}: {file} is a pickle, and reading one can run code that is in it; take a version that is "
            "saved as safetensors, or give --allow_pickle for a folder whose origin you trust"
        )


def _pickle_of(name: str, revision: str | None) -> str | None:
    def there(file: str) -> bool:
        optional = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        return cached_file(name, file, revision=revision, **optional) is not None

    if there("adapter_config.json") and not there("adapter_model.safetensors"):
        return "adapter_model.bin"
    folder = Path(name)
    if not folder.is_dir():
        return None  # transformers is told to take safetensors alone, and looks for nothing else
    own = _named_weights(folder / "config.json")
    if own is not None and Path(own).suffix in PICKLES:
        return own
    if own is not None or (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return None
    return next((file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES), None)


def _named_weights(config: Path) -> str | None:
    """Return the file that a configuration names as that of the weights, if it does."""
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):  # whoever reads the configuration says what is wrong with it
        return None
    return found if isinstance(found, str) else None


def refuse_hub_kernels(attention: Any, whose: str) -> None:
    """Refuse an implementation of attention that transformers would fetch from the hub and run.

    Taken are those that are part of transformers or installed, and kernels of ``kernels-community`` with their whole
    commit: ``kernels-community/flash-attn2@COMMIT``.

    Args:
        attention: a name, or names by part of the model; None: transformers' choice, which is one of its own.
        whose: the option or the configuration that names it, for the message.

    Raises:
        LoricaError: it is another.
    """
    names = attention.values() if isinstance(attention, dict) else [attention]
    for name in names:
        own = str(name or "").removeprefix("paged|")
        if "/" in own and _HUB_KERNEL.fullmatch(own) is None:
            raise LoricaError(
                f"{whose} {name}: a kernel of the hub is code that would run here; only kernels-community/NAME@COMMIT, "
                "with a whole commit, is taken"
            )
        flash = _FLASH.fullmatch(own)
        if flash and import_utils.is_kernels_available() and not _installed(flash[1]):
            raise LoricaError(
                f"{whose} {name}: it is not installed, and transformers would fetch a kernel from the hub instead; "
                "install flash-attn, or name the kernel with its commit: kernels-community/flash-attn2@COMMIT"
            )


def _installed(flash: str) -> bool:
    found = getattr(import_utils, f"is_flash_attn_{flash}_available", None)
    return found is not None and bool(found())


def refuse_kernels_of(model_config: Any, name: str) -> None:
    """Refuse a model whose configuration asks for a kernel of the hub; see ``refuse_hub_kernels``."""
    refuse_hub_kernels(
        getattr(model_config, "_attn_implementation", None), f"model {name}: its configuration's attention"
    )
    for part in getattr(model_config, "sub_configs", ()):
        refuse_kernels_of(getattr(model_config, part, None), name)


def distrusted(folder: Path) -> str | None:
    """Return why a checkpoint, or what is in it, cannot be this run's own; None: nothing speaks against it.

    Its files belong to whoever resumes, to whom the output folder belongs, or to root; none is a link or a pickle.
    """
    own = {_user(), folder.parent.stat().st_uid, 0}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        name = path.relative_to(folder.parent)
        if stat.S_ISLNK(status.st_mode):
            return f"{name} is a symbolic link"
        if status.st_uid not in own:
            return f"{name} belongs to another user (uid {status.st_uid})"
        if path.suffix in PICKLES:
            return f"{name} is a pickle, which no run of Lorica writes"
    return None


def writable_by_others(folder: Path) -> str | None:
    """Return what to say of a checkpoint that others than its owner may write to; None where nobody may."""
    for path in (folder, *sorted(folder.rglob("*"))):
        mode = path.stat().st_mode
        if os.name != "nt" and mode & (stat.S_IWGRP | stat.S_IWOTH):
            who = "everybody" if mode & stat.S_IWOTH else "its group"
            return f"{path} can be written by {who}, so that it need not be what this run wrote; chmod -R go-w {folder}"
    return None


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0
