"""What measuring a model before a task takes: the text that it writes, and the passes over it, on shapes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorica.config import UpdateConfig
from lorica.constrain.plan_counts import wanted
from lorica.constrain.planning import RANDOM_LENGTH, RANDOM_TOKENS
from lorica.forecast.device_kernels import KernelsOf
from lorica.forecast.dry_run import Batch, mark_logits
from lorica.forecast.ledger import Ledger
from lorica.forecast.rates import Machine
from lorica.inputs import calibrating, read_rows
from lorica.methods.curvature_penalty import RANK
from lorica.methods.own_texts import Amount, Extent, amount_for
from lorica.methods.predicted import Prediction
from lorica.subspace import calibration
from lorica.subspace.calibration import LENGTH, RANDOM_TOGETHER, TOKENS, written_together
from lorica.subspace.measure import Sums, Wanted, measure
from lorica.subspace.moment import WIDEST
from lorica.subspace.observe import observe, rows_together, within_memory
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import MEASURED
from lorica.training.models import load_tokenizer, position_limit

MOMENTS, DIRECTIONS, REHEARSED = "second moments", "measured directions", "texts to rehearse"
"""What memory is for beside ``ledger.KINDS``: sums while the model is measured, what is made of them, what it wrote."""


@dataclass(frozen=True)
class Shown:
    """What a model is shown before a task.

    Attributes:
        batch: a batch of it, at its largest; None: nothing is measured.
        batches: how many there are of that size.
        written: what the model writes by itself first; of no tokens: nothing.
    """

    batch: Batch | None
    batches: float
    written: Amount


@dataclass(frozen=True)
class Measuring:
    """What it takes to measure a model.

    Attributes:
        peak: bytes at the peak of the passes, by kind.
        small: bytes of activations in small pieces, together at most; see ``Ledger``.
        workspace: bytes that the largest sum takes besides while its directions are made.
        directions: bytes of what was measured, there until the bases are made of it.
        rehearsed: bytes of what the model wrote to rehearse and of what it predicted there, on the host until the end.
        seconds: of writing, passes and directions; None where a rate is not known.
    """

    peak: Counter[str]
    small: int
    workspace: int
    directions: int
    rehearsed: int
    seconds: float | None


def shown(settings: UpdateConfig, plan: Plan, model_config: Any, prompt: int, rows: Extent | None = None) -> Shown:
    """Return what a model is shown before an update.

    Args:
        plan: of the update.
        prompt: tokens of the longest prompt that the model is to answer; 0: there is none.
        rows: that it is trained on; None: not known.

    Raises:
        LoricaError: something is wrong with ``calibration_file``.
    """
    measures = settings.ranks == "importance" or any(entry.source in MEASURED for entry in plan.entries)
    written = amount_for(settings, rows) if settings.rehearse else Amount(0, LENGTH)
    if not measures:
        return Shown(None, 0, written)
    given = given_rows(settings, model_config)
    if given is not None:
        length = max(part["input_ids"].shape[1] for part in given)
        apart = max(part["labels"].shape[1] for part in given) if model_config.is_encoder_decoder else None
        return Shown(Batch(len(given[0]["input_ids"]), length, apart), len(given), written)
    own = settings.calibration == "self" or (
        settings.calibration is None and bool(prompt or not model_config.is_encoder_decoder)
    )
    batch = _written(model_config, prompt, written.length) if own else _random(model_config)
    tokens = settings.calibration_tokens or (TOKENS if own else RANDOM_TOKENS)
    if own and settings.rehearse:
        half = bool(prompt) and not model_config.is_encoder_decoder
        total = written.tokens
        tokens = min(total // 2 if half else total, settings.calibration_tokens or total)
    elif own:
        written = Amount(tokens, LENGTH)
    each = batch.rows * (written.length if own else batch.length)
    return Shown(batch, max(1.0, tokens / each), written)


def _written(model_config: Any, prompt: int, length: int) -> Batch:
    together, limit = written_together(length), position_limit(model_config) or prompt + length
    if model_config.is_encoder_decoder:
        return Batch(together, prompt, min(length, limit))
    return Batch(together, min(prompt + length, limit))


def _random(model_config: Any) -> Batch:
    length = min(RANDOM_LENGTH, position_limit(model_config) or RANDOM_LENGTH)
    return Batch(RANDOM_TOGETHER, length, length if model_config.is_encoder_decoder else None)


def given_rows(settings: UpdateConfig, model_config: Any) -> list[calibration.Batch] | None:
    """Return the batches of ``calibration_file``, None without one; no other file is read."""
    if settings.calibration_file is None:
        return None
    tokenizer, seq2seq = load_tokenizer(settings), bool(model_config.is_encoder_decoder)
    longest = longest_row(settings, model_config)
    _, rows = read_rows(settings, settings.calibration_file, tokenizer, seq2seq=seq2seq, max_length=longest)
    return calibrating(rows, tokenizer, seq2seq=seq2seq)


def longest_row(settings: UpdateConfig, model_config: Any) -> int:
    """Return how many tokens a row may have."""
    return min(settings.max_length, position_limit(model_config) or settings.max_length)


def dry_measure(
    model: Any, settings: UpdateConfig, plan: Plan, seen: Shown, machine: Machine, *, whole: bool = False
) -> Measuring:
    """Measure a blank model, as far as shapes go: the passes themselves, of parts of a batch over some of the layers.

    Args:
        model: on the meta device, not protected.
        plan: of the update.
        seen: of ``shown``.
        machine: whose kernels are meant.
        whole: batches go through whole, for processes share the model; see ``in_parts``.
    """
    writing = _writing_seconds(model, seen, machine)
    rehearsed = seen.written.tokens * _held_bytes(model) if settings.rehearse else 0
    if seen.batch is None:
        return Measuring(Counter(), 0, 0, 0, rehearsed, writing)
    targets = {entry.name: model.get_submodule(entry.name) for entry in plan.entries}
    beyond = RANK if settings.curvature_penalty else 0
    marginal = settings.ranks == "marginal"
    sides = {e.name: wanted(e, marginal=marginal, beyond=beyond) for e in plan.entries if e.source in MEASURED}
    length = max(seen.batch.length, seen.batch.labels or 0)
    rows = seen.batch.rows if whole else min(seen.batch.rows, rows_together(model, targets, length))
    count = seen.batches * seen.batch.rows / rows
    # A second part meets the sums of the first one, and stands for all that follow.
    parts = [Batch(rows, seen.batch.length, seen.batch.labels)] * (2 if count > 1 else 1)
    groups = list(within_memory({name: side.nbytes() for name, side in sides.items() if side.nbytes()}))
    ledger, largest = _passed(
        model, targets, sides, groups, parts, machine.device, looks=settings.ranks == "importance", whole=whole
    )
    passes = max(1, len(groups)) * count / len(parts)
    seconds = machine.seconds(ledger.work)
    made = _directions_seconds(sides, machine)
    known = None not in (seconds, made, writing)
    return Measuring(
        peak=ledger.peak,
        small=ledger.small,
        workspace=5 * largest,
        directions=sum(4 * dim * rank for side in sides.values() for dim, rank in _measured(side)),
        rehearsed=rehearsed,
        seconds=passes * seconds + made + writing if known else None,  # type: ignore[operator]
    )


def _measured(side: Wanted) -> list[tuple[int, int]]:
    """Return of each side that is measured its dimension and how many directions are wanted."""
    pairs = zip(side.shape, (side.outputs, side.inputs), strict=True)
    return [(dim, rank) for dim, rank in pairs if rank is not None]


def _passed(
    model: Any,
    targets: dict[str, nn.Module],
    sides: dict[str, Wanted],
    groups: list[list[str]],
    parts: Sequence[Batch],
    device: str,
    *,
    looks: bool,
    whole: bool,
) -> tuple[Ledger, int]:
    """Return what one pass over some parts looked like, and the bytes of the largest sum.

    Args:
        whole: the parts are not cut further.
        looks: inputs and outputs are compared, as ``importance`` does, in a pass of their own.
    """
    ledger, sums = Ledger(), [0]

    def summed(found: Sums) -> Sums:
        sums.extend(moment.sum.nbytes for by_side in found.values() for moment in by_side.values())
        return {}

    ledger.own("weights", [*model.parameters(), *model.buffers()])
    mark_logits(ledger, model)
    batches = [part.tensors() for part in parts]
    with KernelsOf(device), ledger:
        for batch in batches if looks else ():
            observe(model, targets, [batch], moments=False, whole=whole)
        if groups:
            measure(model, {name: targets[name] for name in groups[0]}, batches, sides, together=summed, whole=whole)
    ledger.peak["activations"] -= sum(sums)
    ledger.peak[MOMENTS] = sum(sums)
    return ledger, max(sums)


def _held_bytes(model: Any) -> int:
    """Return the bytes that are kept of a token that is rehearsed: itself and its label, and what was predicted."""
    told = Prediction.of(torch.zeros(1, model.get_input_embeddings().num_embeddings))
    return 2 * 8 + sum(tensor.nbytes for tensor in told)


def _writing_seconds(model: Any, seen: Shown, machine: Machine) -> float | None:
    """Return how long it takes to write: as many steps as a text has tokens, for each batch of texts."""
    tokens, length = seen.written
    if not tokens:
        return 0.0
    together = written_together(length)
    ledger, inputs = Ledger(), Batch(together, 1, 1 if model.config.is_encoder_decoder else None)
    with torch.no_grad(), KernelsOf(machine.device), ledger:
        model(**inputs.tensors())
    step = machine.seconds(ledger.work)
    batches = math.ceil(tokens / (together * length))
    return None if step is None else step * length * batches


def _directions_seconds(sides: dict[str, Wanted], machine: Machine) -> float | None:
    if machine.eigh is None:
        return None
    dims = [dim for side in sides.values() for dim, _ in _measured(side) if dim <= WIDEST]
    return machine.eigh * sum(dim**3 for dim in dims)
