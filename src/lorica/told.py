"""What a run says: what it will need and do first, progress, memory before and after, scores before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from lorica import processes
from lorica.config import UpdateConfig
from lorica.errors import LoricaError
from lorica.evaluation.evaluator import Score
from lorica.files import free_bytes
from lorica.forecast.communication import Layout
from lorica.forecast.devices import Share
from lorica.forecast.needs import Disk
from lorica.forecast.rates import memory_of
from lorica.forecast.result import Way
from lorica.forecast.story import device_of, expected, least_disk
from lorica.inputs import Inputs
from lorica.methods.curvature_penalty import AUTO
from lorica.subspace.calibration import MEASURING, WRITING, Progress
from lorica.training.checkpoints import checkpoints_in
from lorica.training.sharding import Sharding
from lorica.units import size


def progress_bar(what: str) -> Progress:
    """Return a progress callback that draws transformers' progress bar, with the time left; writing and measuring,
    which come before ``what``, get bars of their own."""
    bar: Any = None
    shown = ""
    if not processes.first():
        return lambda name, done, total: None

    def advance(name: str, done: int, total: int) -> None:
        nonlocal bar, shown
        label = name if name in (WRITING, MEASURING) else what
        if bar is not None and label != shown:  # that one ended early
            bar.close()
            bar = None
        if bar is None:
            bar, shown = transformers_logging.tqdm(total=total, desc=label, leave=False), label
        bar.update(done - bar.n)
        if done == total:
            bar.close()
            bar = None

    return advance


def foreseen(
    config: UpdateConfig, inputs: Inputs, sharding: Sharding | None = None
) -> tuple[Way | Share | None, list[str]]:
    """Return what a run will need, each process of a sharded one, and the lines that say so.

    Call it before the model is loaded.

    Where nothing can be foretold there is one line that says why. It may be a mistake of the user's, which the method
    refuses once it has the model: tell it after that, or it is told twice.

    Raises:
        LoricaError: the disk has not the room for it.
    """
    try:
        layout = None if sharding is None else Layout(sharding.shards, sharding.replicas, sharding.moves)
        way = expected(config, inputs, layout)
    except LoricaError as error:
        told = f"memory: not forecast: {error}"
    except Exception as error:  # a model's own code may ask for values that it has none of; the run needs no forecast
        told = f"memory: not forecast: {type(error).__name__}: {' '.join(str(error).split())}"
    else:
        check_room(way.disk, config.output_dir)
        own = way if sharding is None else way.shares[-1]
        return own, _memory_foreseen(own, config)
    least = least_disk(config, inputs)
    if least is not None:
        check_room(least, config.output_dir)
    return None, [told]


def _memory_foreseen(way: Way | Share, config: UpdateConfig) -> list[str]:
    kinds = sorted(way.peak.device.items(), key=lambda kind: -kind[1])
    parts = ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in kinds[:4])
    mode = f", {config.memory_mode}" if config.method == "osft" else ""
    each = " in each process" if isinstance(way, Share) else ""
    host = f", {size(way.host_bytes)} on the host" if isinstance(way, Share) and way.host_bytes else ""
    lines = [f"memory: about {size(way.device_bytes)} expected{each}, in {way.peak.name} ({parts}){host}{mode}"]
    there = memory_of(device_of(config))
    if way.device_bytes > there:
        lean = "--memory_mode lean or " if config.method == "osft" and config.memory_mode == "fast" else ""
        lines.append(
            f"notice: this machine has {size(there)} of memory, so the run may not come to its end; {lean}a smaller "
            "--per_device_train_batch_size needs less, and lorica check tells how much"
        )
    return lines


def check_room(disk: Disk, output_dir: str) -> None:
    """Refuse a run that the disk has not the room for. What checkpoints take already is counted as free.

    Raises:
        LoricaError: with what is needed and what is free.
    """
    folder = Path(output_dir)
    taken = sum(file.stat().st_size for one in checkpoints_in(folder) for file in one.rglob("*") if file.is_file())
    needed, free = disk.output, free_bytes(folder) + taken
    if needed > free:
        kept = f"{disk.kept} checkpoint{'s' * (disk.kept != 1)}"
        parts = f"{size(disk.model)} the model, before it {size(disk.checkpoints + disk.bases)} for {kept}"
        there = size(free) if free else "nothing"
        raise LoricaError(
            f"--output_dir {output_dir}: the run needs {size(needed)} of disk ({parts}) and "
            f"{there} is free there; make room, name a folder on another disk, or keep less: --save_total_limit 1, "
            "--save_only_model, --save_strategy no"
        )


def first_steps(config: UpdateConfig, inputs: Inputs, strength: float, tokens: int) -> list[str]:
    """Return lines that say what an update does before the weights are split.

    Args:
        strength: of the curvature penalty, in numbers.
        tokens: that are written to be rehearsed, in numbers.
    """
    lines = []
    if config.rehearse:
        lines.append(f"rehearsal: the model first writes {tokens:,} tokens of text of its own")
    if inputs.prompts is not None:
        lines.append(f"prompts: the model first answers {len(inputs.prompts):,} prompts by itself")
    if config.curvature_penalty == AUTO:
        lines.append(f"curvature_penalty auto: {strength:,.0f} for these rows")
    if config.predict_forgetting:
        lines.append("forgetting: the model first writes text of its own, about 41,000 tokens, and is measured on it")
    return lines


def memory_told(cost: Mapping[str, Any], parameters: int) -> str:
    """Return the line that says how much memory the whole update took at its peak, and for training how much."""
    peaks = {"resident": cost["peak_rss_bytes"], "on the GPU": cost["peak_cuda_bytes"]}
    told = ", ".join(f"{size(nbytes)} {where}" for where, nbytes in peaks.items() if nbytes is not None)
    return (
        f"memory: peak {told or 'unknown'}; {cost['trainable_parameters']:,} numbers trained, {parameters:,} parameters"
    )


def comparison(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line per scored file: its scores before and after."""
    pairs = [("new task", before["eval"], after["eval"])] if before["eval"] else []
    pairs += [(name, before["retention"][name], after["retention"][name]) for name in before["retention"]]
    return [f"{name}: {_scored(a)} -> {_scored(b)}" for name, a, b in pairs]


def _scored(score: Score) -> str:
    match = score["exact_match"]
    return f"loss {score['loss']:.3f}" + (f", exact match {match:.1f} %" if match is not None else "")
