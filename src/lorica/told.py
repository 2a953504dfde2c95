"""What a run says while it runs: progress, memory before and after, scores before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers.utils import logging as transformers_logging

from lorica.config import UpdateConfig
from lorica.errors import LoricaError
from lorica.evaluation.evaluator import Score
from lorica.forecast.result import Way, size
from lorica.forecast.story import expected
from lorica.inputs import Inputs


def progress_bar(what: str) -> Callable[[str, int, int], None]:
    """Return a progress callback that draws transformers' progress bar, with the time left."""
    bar: Any = None

    def advance(name: str, done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = transformers_logging.tqdm(total=total, desc=what, leave=False)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return advance


def foreseen(config: UpdateConfig, inputs: Inputs) -> tuple[Way | None, str]:
    """Return what a run will need, and the line that says so; call it before the model is loaded."""
    try:
        way = expected(config, inputs)
    except LoricaError as error:
        return None, f"memory: not forecast: {error}"
    except Exception as error:  # a model's own code may ask for values that it has none of; the run needs no forecast
        return None, f"memory: not forecast: {type(error).__name__}: {' '.join(str(error).split())}"
    kinds = sorted(way.peak.device.items(), key=lambda kind: -kind[1])
    parts = ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in kinds[:4])
    mode = f", {config.memory_mode}" if config.method == "osft" else ""
    return way, f"memory: about {size(way.device_bytes)} expected, in {way.peak.name} ({parts}){mode}"


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
