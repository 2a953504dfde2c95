"""``lorica apply``: a saved update put onto a model, taken off again, scaled, or composed with others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.artefacts.bits import fingerprint
from lorica.artefacts.compose import ScaledSum, check_overlap, largest_overlap
from lorica.artefacts.export import Say
from lorica.artefacts.file import Prints, Progress, Update, digest, fingerprints
from lorica.artefacts.folder import check_new, copy_model, new_folder
from lorica.artefacts.overlap import TOLERANCE
from lorica.artefacts.route import Route, route
from lorica.constrain.checkpoint import open_weights
from lorica.errors import LoricaError
from lorica.files import listing
from lorica.record import SCHEMA, environment, redacted, write_record

Edit = Callable[[str, Tensor], Tensor]


def apply_updates(
    model: str,
    updates: Sequence[str],
    output_dir: str,
    *,
    remove: bool = False,
    scale: float = 1.0,
    allow_overlap: float = TOLERANCE,
    say: Say = print,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a new model: this one with the updates put on, or with them taken off.

    One update, or several of which each was made on top of another's result (named in any order): every number is
    that of the model the update was exported from, bit for bit, and is checked against its fingerprint. The same
    on the way back.

    With ``scale`` s, or with several updates that were all made from this model, the result is a model that never
    was before:

        W = round(W0 + s sum_i (W_i - W0))

    with W0 this model and W_i what update i makes of it. Updates are composed only if they leave each other alone:
    the overlap of any two in any tensor (``Overlap.value``) is at most ``allow_overlap``.

    Args:
        model: a folder of safetensors; it is only read.
        updates: folders made by ``lorica export-update``.
        output_dir: a new or empty folder. It gets a plain Hugging Face model and ``lorica.json``.
        remove: take the updates off.
        scale: s, any number; 1 with a single update is the exact case.
        allow_overlap: 0 (no direction in common) to 1 (anything goes).
        say: takes each line of what is told.
        progress: called as ``progress(key, done, total)``; each tensor counts twice, read and written.

    Returns:
        What is written to ``lorica.json``: ``operation`` (apply, remove, scale or compose), ``exact``, ``before``
        and ``after`` (SHA-256 of the models), ``updates``, ``scale``, ``overlap`` of a composition, and ``files``.

    Raises:
        LoricaError: an update is damaged or does not fit the model, updates overlap or do not go together, an
            option is out of range, or the output cannot be written. Nothing is left behind then.
    """
    _check_options(model, updates, output_dir, remove=remove, scale=scale, allow_overlap=allow_overlap)
    weights = open_weights(model)
    opened = [Update.load(path) for path in updates]
    # One count for both passes: first the model is read, then it is written.
    found = fingerprints(weights, progress and (lambda key, done, total: progress(key, done, 2 * total)))
    way = route(model, found, opened, "after" if remove else "before")
    exact = scale == 1 and not way.composed
    if not exact and not way.composed and len(way.steps) > 1:
        raise LoricaError("--scale needs updates that were all made from this model; these were made one on another")
    edit: Edit = _in_turn(way.steps, remove) if exact else ScaledSum(way.steps, scale)
    overlap = largest_overlap(weights, way.steps) if way.composed else None
    if overlap is not None:
        check_overlap(overlap, allow_overlap)
    made: Prints = {}
    with new_folder(Path(output_dir), "--output_dir") as folder:
        copy_model(Path(model), folder, _noted(edit, made, len(found), progress))
        record = {
            "schema": SCHEMA,
            "kind": "apply",
            "operation": "remove" if remove else "compose" if way.composed else "apply" if exact else "scale",
            "exact": exact,
            "model": redacted(model),
            "before": digest(found),
            "after": digest(made),
            "updates": [_told(update) for update in way.steps],
            "scale": scale,
            "overlap": overlap,
            **_plan(way, remove),
            **environment(),
        }
        record["files"] = listing(folder)
        write_record(folder / "lorica.json", record)
    for line in _described(record, output_dir):
        say(redacted(line))
    return record


def _check_options(
    model: str, updates: Sequence[str], output_dir: str, *, remove: bool, scale: float, allow_overlap: float
) -> None:
    if not updates:
        raise LoricaError("no update is named")
    if not math.isfinite(scale):
        raise LoricaError(f"--scale {scale} is no finite number")
    if remove and scale != 1:
        raise LoricaError("--remove takes an update off as it was put on; leave --scale out")
    if not 0 <= allow_overlap <= 1:
        raise LoricaError(f"--allow_overlap {allow_overlap} is out of range: 0 (none) to 1 (anything goes)")
    if Path(model).is_file():
        raise LoricaError(f"{model} is a file; name the folder of the model")
    check_new(Path(output_dir), "--output_dir")


def _in_turn(steps: Sequence[Update], remove: bool) -> Edit:
    def edit(key: str, tensor: Tensor) -> Tensor:
        for update in steps:
            tensor = update.remove(key, tensor) if remove else update.apply(key, tensor)
        return tensor

    return edit


def _noted(edit: Edit, made: Prints, total: int, progress: Progress | None) -> Edit:
    """Return the same edit, which also notes the fingerprint of what it makes."""

    def noted(key: str, tensor: Tensor) -> Tensor:
        result = edit(key, tensor)
        made[key] = fingerprint(result)
        if progress:
            progress(key, total + len(made), 2 * total)
        return result

    return noted


def _plan(way: Route, remove: bool) -> dict[str, Any]:
    """Return the plan of a single update, so that the result can be audited like what ``lorica train`` wrote."""
    plan = way.steps[0].header.plan
    return {} if remove or way.composed or len(way.steps) > 1 or plan is None else {"plan": plan}


def _told(update: Update) -> dict[str, Any]:
    header = update.header
    ends = {"before": digest(header.prints("before")), "after": digest(header.prints("after"))}
    return {"path": redacted(str(update)), **ends, "training": header.made.get("training", {})}


def _described(record: dict[str, Any], output_dir: str) -> Iterator[str]:
    if record["overlap"] is not None:
        o = record["overlap"]
        where = f" in {o['tensor']} (inputs {o['inputs']:.2g}, outputs {o['outputs']:.2g})" if o["tensor"] else ""
        yield f"largest overlap of two updates: {o['value']:.2g}{where}"
    names = ", ".join(update["path"] for update in record["updates"])
    how = "bit for bit the recorded model" if record["exact"] else f"a new model, scale {record['scale']:g}"
    yield f"{record['operation']}: {names}"
    yield f"from model {record['before'][:12]} to {record['after'][:12]}, {how}"
    yield f"model: {output_dir}"
