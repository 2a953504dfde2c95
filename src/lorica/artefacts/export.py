"""``lorica export-update``: what one update changed, saved alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica.artefacts.bits import fingerprint
from lorica.artefacts.change import Change
from lorica.artefacts.file import Header, Progress, TensorState, digest, write_changes, write_header
from lorica.artefacts.folder import check_new, new_folder
from lorica.constrain.checkpoint import Weights, open_weights
from lorica.errors import LoricaError, did_you_mean
from lorica.json_file import load_json
from lorica.record import environment, redacted

Say = Callable[[str], None]

_TOLD = ("method", "seed", "model", "learning_rate", "data", "date", "versions")
"""What an update keeps of the record of the run that made it."""


def export_update(
    before: str, after: str, output: str, *, say: Say = print, progress: Progress | None = None
) -> dict[str, Any]:
    """Save what turned one model into another, so that ``lorica apply`` can add it and take it off again.

    Every tensor that differs is kept without loss (``Change``); all others are known by their fingerprints, so
    that the update fits this one model and no other. It needs no plan: what is stored follows from the two
    models. If ``after`` was written by ``lorica train``, its plan, method and data hashes are kept as well.
    The tokenizer and the configuration are not part of an update.

    Args:
        before, after: folders of safetensors, or single files, with the same tensors.
        output: a new or empty folder.
        say: takes each line of what is told.
        progress: called as ``progress(key, done, total)``.

    Returns:
        ``output``, ``before`` and ``after`` (SHA-256 of the models), ``changed`` and ``tensors`` (counts),
        ``bytes`` of the update, ``model_bytes``, and by part of the update ``parts``.

    Raises:
        LoricaError: a model cannot be read, the two differ in more than numbers or not at all, or the output
            folder is not empty or cannot be written. Nothing is left behind then.
    """
    check_new(Path(output), "output")
    old, new = open_weights(before), open_weights(after)
    _check_same_tensors(old, new)
    states: dict[str, TensorState] = {}
    with new_folder(Path(output), "output") as folder:
        files = write_changes(folder, _changes(old, new, states, progress))
        if not files:
            raise LoricaError(f"{before} and {after} hold the same numbers: there is no update to save")
        header = Header(family=new.family, tensors=states, files=files, plan=_plan(new), made=_made(Path(after)))
        write_header(folder, header)
        size = sum(file.stat().st_size for file in folder.iterdir())
    result = {
        "output": output,
        "before": digest(header.prints("before")),
        "after": digest(header.prints("after")),
        "changed": len(header.changed()),
        "tensors": len(states),
        "bytes": size,
        "model_bytes": sum(file.stat().st_size for file in _files(Path(before))),
    }
    for line in _described(result, before, header):
        say(redacted(line))
    return result


def _changes(
    old: Weights, new: Weights, states: dict[str, TensorState], progress: Progress | None
) -> Iterator[tuple[str, Change]]:
    """Yield the change of each tensor that differs, and note the state of every one along the way."""
    keys = list(old.keys())
    for done, key in enumerate(keys, start=1):
        a, b = old.tensor(key), new.tensor(key)
        states[key] = _state(key, a, b)
        if states[key].changed:
            yield key, Change.between(a, b)
        if progress:
            progress(key, done, len(keys))


def _state(key: str, a: Tensor, b: Tensor) -> TensorState:
    if a.dtype != b.dtype:
        raise LoricaError(
            f"{key} is {a.dtype} before and {b.dtype} after: an update keeps the dtype. Save the model before in the "
            "dtype of the one after, and export from that"
        )
    return TensorState(dtype=str(a.dtype), shape=list(a.shape), before=fingerprint(a), after=fingerprint(b))


def _check_same_tensors(old: Weights, new: Weights) -> None:
    for one, other in ((old, new), (new, old)):
        apart = [key for key in one.keys() if key not in other]
        if apart:
            hint = did_you_mean(apart[0], other.keys())
            raise LoricaError(
                f"{one} has {apart[0]} and {other} has not ({len(apart)} such).{hint} If one of them was not written "
                "by this version of transformers, load it, save it with save_pretrained, and export from that"
            )
    for key in old.keys():
        if old.shape(key) != new.shape(key):
            raise LoricaError(f"{key} has shape {old.shape(key)} in {old} and {new.shape(key)} in {new}")


def _plan(new: Weights) -> list[dict[str, Any]] | None:
    plan = new.recorded_plan()
    return None if plan is None else plan.records()


def _made(after: Path) -> dict[str, Any]:
    try:
        record = load_json(after / "lorica.json", constants=True)
    except (OSError, ValueError):
        record = {}
    told = {name: record[name] for name in _TOLD if name in record} if isinstance(record, dict) else {}
    return {"training": told, "export": environment()}


def _files(model: Path) -> list[Path]:
    return [model] if model.is_file() else sorted(model.glob("*.safetensors"))


def _described(result: dict[str, Any], before: str, header: Header) -> Iterator[str]:
    share = result["bytes"] / result["model_bytes"]
    yield (
        f"update: {result['changed']} of {result['tensors']} tensors, {result['bytes']:,} bytes, {share:.1%} of the "
        f"model's {result['model_bytes']:,}"
    )
    if header.plan is None:
        yield "no plan is recorded with the model after: what was protected is not known"
    yield f"from model {result['before'][:12]} to {result['after'][:12]}; it fits {before} and copies of it"
    yield f"saved: {result['output']}"
