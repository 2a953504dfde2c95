"""``lorica verify``: whether the checkpoints and the model in a folder are as they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from lorica.errors import LoricaError
from lorica.lineage import weights_sha256
from lorica.training.checkpoints import checkpoints_in
from lorica.training.manifest import MANIFEST, damage


class Finding(NamedTuple):
    """What was found of one checkpoint or model; ``problem`` None: it is as it was written."""

    what: str
    problem: str | None

    def __str__(self) -> str:
        return f"{self.what}: {self.problem or 'complete and unchanged'}"


def verify(folder: str | Path) -> list[Finding]:
    """Compare a checkpoint, or all checkpoints and the model of an output folder, with what was noted when written.

    Checkpoints are compared with their manifests, a model with the digest of its weights in ``lorica.json``.

    Raises:
        LoricaError: there is no such folder, or nothing in it that could be verified.
    """
    path = Path(folder)
    if not path.is_dir():
        raise LoricaError(f"{folder}: no such folder")
    if (path / MANIFEST).exists() or path.name.startswith("checkpoint-"):
        return [Finding(path.name, damage(path))]
    found = [Finding(one.name, damage(one)) for one in checkpoints_in(path)]
    found += [Finding("model", _model_problem(path))] if (path / "lorica.json").exists() else []
    if not found:
        raise LoricaError(f"{folder}: holds no checkpoint and no lorica.json; nothing here can be verified")
    return found


def _model_problem(folder: Path) -> str | None:
    try:
        record = json.loads((folder / "lorica.json").read_text(encoding="utf-8"))
        noted = record.get("weights_sha256")
    except (OSError, ValueError, AttributeError) as error:
        return f"lorica.json cannot be read: {error}"
    if record.get("rejected"):
        folder = folder / "rejected"
    present = weights_sha256(folder)
    if noted is None:
        return "lorica.json notes no digest of the weights"
    if present is None:
        return f"there are no weights in {folder}"
    return None if present == noted else "the weights are not those that lorica.json was written for"
