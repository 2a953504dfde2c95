"""What makes a folder complete: a list of its files with sizes and hashes, written last."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from lorica.files import sync_folder, written_aside

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Bring all files of a folder to the disk, then list them, with sizes and SHA-256, in ``manifest.json``.

    The list is written aside, brought to the disk and renamed: it is there whole or not at all, and so the folder
    counts as complete or not at all, whenever the process or the machine dies.
    """
    files = {}
    for file in _files(folder):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    with written_aside(folder / MANIFEST) as aside:
        aside.write_text(json.dumps({"schema": 1, "files": files}, indent=1) + "\n", encoding="utf-8")
    for place in (folder, folder.parent):
        sync_folder(place)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a folder that has, or should have, a manifest; None: it is as it was written."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(one["bytes"]), str(one["sha256"])) for name, one in listed.items()}
    except FileNotFoundError:
        return f"it is incomplete: there is no {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                return f"{name} was changed: its SHA-256 is not the one it was written with"
    return None


def _files(folder: Path) -> list[Path]:
    listed = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(f".{MANIFEST}"))
    return sorted(path for path in listed if path != folder / MANIFEST)
