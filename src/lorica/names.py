"""Names that come from files and become names of folders, and folders that lead elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from lorica.errors import LoricaError

LONGEST = 100
"""Bytes of a name: file systems take 255, and what Lorica puts around a name needs some."""


def check_folder_name(name: str, what: str) -> None:
    """Refuse a name that is not, as it stands, that of one folder inside another.

    Raises:
        LoricaError: it is empty, begins with a dot or ends with one, is too long, or holds a separator of folders, a
            colon or a character that cannot be printed.
    """
    dotted = name.startswith(".") or name.endswith((".", " "))
    marks = '/\\:*?"<>|'
    if not name or dotted or not name.isprintable() or len(name.encode()) > LONGEST or set(name) & set(marks):
        raise LoricaError(f"{what} {name[:LONGEST]!r} cannot be the name of a folder; name it otherwise")


def check_no_links(folder: Path) -> None:
    """Refuse a folder to write to that holds a symbolic link, at any depth: files would end up where it points.

    Raises:
        LoricaError: names the link.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink():
                raise LoricaError(
                    f"{path} is a symbolic link (to {path.readlink()}): nothing is written through one; remove it"
                )
