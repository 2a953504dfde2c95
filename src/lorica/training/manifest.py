"""What makes a folder complete: a list of its files with sizes and hashes, written last."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from lorica.errors import one_line
from lorica.files import Listing, difference, listing, sync_folder, sync_tree, write_text
from lorica.json_file import load_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path, without: Iterable[str] = ()) -> None:
    """Bring all files of a folder to the disk, then list them, with sizes and SHA-256, in ``manifest.json``.

    The list is written aside, brought to the disk and renamed: it is there whole or not at all, and so the folder
    counts as complete or not at all, whenever the process or the machine dies.

    Args:
        without: names in the folder that are not part of it any more.

    Raises:
        CannotWrite: there is no room for it.
    """
    left_out = {MANIFEST, *without}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _top(path, folder) not in left_out]
    files = [path for path in files if not path.name.startswith(f".{MANIFEST}")]
    sync_tree(folder)
    _write(folder, listing(folder, files))
    sync_folder(folder.parent)


def add_to_manifest(folder: Path, name: str) -> None:
    """List one more file of a folder that is complete, a file that is on the disk; the others are not read again.

    Raises:
        CannotWrite: there is no room for it; the file is then no part of the folder.
    """
    _write(folder, listed_in(folder) | listing(folder, [folder / name]))


def listed_in(folder: Path) -> Listing:
    """Return what the manifest of a folder lists.

    Raises:
        OSError, ValueError, KeyError: it cannot be read.
    """
    found: Listing = load_json(folder / MANIFEST)["files"]
    return found


def _write(folder: Path, files: Listing) -> None:
    write_text(folder / MANIFEST, json.dumps({"schema": 1, "files": files}, indent=1) + "\n")


def _top(file: Path, folder: Path) -> str:
    return file.relative_to(folder).parts[0]


def damage(folder: Path, but: str | None = None) -> str | None:
    """Return what is wrong with a folder that has, or should have, a manifest; None: it is as it was written.

    Args:
        but: how the names of files begin that do not matter.
    """
    try:
        listed = listed_in(folder)
        counted = {name: one for name, one in listed.items() if but is None or not name.startswith(but)}
        return difference(folder, counted)
    except FileNotFoundError:
        return f"it is incomplete: there is no {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"{MANIFEST} cannot be read: {one_line(error)}"
