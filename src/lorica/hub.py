"""Names on the Hugging Face hub: the commit that one stands for, and whether it was given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from lorica.errors import LoricaError

Kind = Literal["model", "dataset"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Tell whether a revision is a whole commit, which names one state for ever; branches and tags move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def is_local(name: str) -> bool:
    """Tell whether a name is that of a file or folder of this machine, there or not, and not of the hub's."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).expanduser().exists()


def commit_of(name: str, revision: str | None = None, kind: Kind = "model") -> str | None:
    """Return the commit that a name on the hub stands for now: the hub's word, else that of the local cache.

    Args:
        name: on the hub, or a path.
        revision: branch, tag or commit; the main branch by default.

    Returns:
        40 hexadecimal digits; None for a path, and where neither hub nor cache can tell.
    """
    if is_local(name):
        return None
    if is_commit(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().resolve_revision(name, repo_type=kind, revision=revision).resolved)
    except Exception:  # unknown, gated or unreachable: whoever loads it says so, or finds it in the cache
        return None


def check_pinned(name: str, revision: str | None, option: str, kind: Kind = "model") -> None:
    """Refuse a name on the hub without a whole commit.

    Args:
        option: how the commit is given, for the message.

    Raises:
        LoricaError: names the commit that the name stands for now, where it can be told.
    """
    if is_local(name) or is_commit(revision):
        return
    now = commit_of(name, revision, kind)
    told = f"; {revision or 'main'} is {now} now" if now else ""
    raise LoricaError(f"--require_pinned: {name} is a name on the hub: give the whole commit as {option}{told}")


def check_pinned_data(*names: str | None) -> None:
    """Refuse data sets on the hub that are not named with their whole commit, as ``OWNER/NAME@COMMIT``."""
    for name in filter(None, names):
        where, _, revision = name.partition("@")
        if not is_local(name):
            check_pinned(where, revision or None, f"{where}@COMMIT", "dataset")


def commits(name: str, revision: str | None) -> dict[str, str | None]:
    """Return what a record holds of where a model comes from: the commit of its weights and of its tokenizer.

    Both are read from the same one; null for a folder, of which records hold a digest.
    """
    commit = commit_of(name, revision)
    return {"model": commit, "tokenizer": commit}
