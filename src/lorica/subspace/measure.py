"""The Kronecker factors of every layer, from one pass over calibration inputs: A of what goes in, B of gradients.

Shape suffixes: R rows (positions that count), V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.errors import LoricaError
from lorica.subspace.calibration import Batch, Progress, is_causal
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.moment import Moment, random_basis, sketch_size
from lorica.subspace.observe import Positions, check_all_seen, in_parts, told_of, watching, within_memory


class Wanted(NamedTuple):
    """How many directions are wanted of the sides of a weight, (out, in); None: that side is not measured."""

    shape: tuple[int, int]
    inputs: int | None = None
    outputs: int | None = None

    def nbytes(self) -> int:
        """Bytes of the sums that are held meanwhile."""
        sides = zip(self.shape, (self.outputs, self.inputs), strict=True)
        return sum(8 * dim * (sketch_size(dim, rank) or dim) for dim, rank in sides if rank is not None)


Sums = dict[str, dict[str, Moment]]
"""By layer and side."""


def measure(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Sequence[Batch],
    wanted: Mapping[str, Wanted],
    *,
    earlier: Mapping[str, Factors] | None = None,
    seed: int = 0,
    together: Callable[[Sums], Sums] | None = None,
    whole: bool = False,
    progress: Progress | None = None,
) -> dict[str, Factors]:
    """Return the factors of each layer over the positions that count (see ``Positions``).

        A = sum x x^T / positions        B = sum g g^T / predictions        sums over the positions

    The gradients g are those of ``-log p(y)``, summed over the predictions of the batch, where y is sampled from the
    model's own prediction: then ``B kron A`` belongs to the Fisher matrix, whose quadratic form is how far one of the
    model's predictions moves, in nats. With the true labels it would vanish where the data is learned. A text of many
    positions may have one prediction (a classifier's) or most of them; the sums over its positions are of both.
    No gradient of a parameter is computed or touched, and the model's mode and flags are as before.

    As many layers are measured in one pass over the batches as ``MOMENT_BYTES`` allow, and of a batch as many rows at a
    time as ``in_parts`` says. Layers with the same input get one and the same factor for it.

    Args:
        model: batches go to its device.
        layers: ``nn.Linear`` or ``Conv1D``, by name.
        calibration: batches as the model takes them. Where they hold labels, labelled positions alone are predicted.
        wanted: how many directions of which sides, by name.
        earlier: sums of factors of trace 1 of finished tasks; each task counts as the calibration does, in the mean.
        seed: of the sampled labels.
        together: adds up what several processes summed, each of its own batches, and returns what is this one's to
            make factors of.
        whole: batches go through the model whole, see ``in_parts``.
        progress: is told, as ``MEASURING``, of every part of a batch.

    Raises:
        LoricaError: no batch was given, a layer saw no input or no gradient, the model predicts nothing or computes
            NaN or inf, or ``earlier`` is of layers of other widths.
    """
    found: dict[str, Factors] = {}
    distinct: list[Factor] = []
    needed = {name: wanted[name].nbytes() for name in layers}
    groups = list(within_memory({name: size for name, size in needed.items() if size}))
    for number, names in enumerate(groups):
        batches = told_of(list(in_parts(model, layers, calibration, whole=whole)), progress, number, len(groups))
        sums = _pass(model, {name: layers[name] for name in names}, batches, wanted, seed)
        found |= _factors(together(sums) if together else sums, earlier or {}, distinct)
    return found


def _pass(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterator[Batch],
    wanted: Mapping[str, Wanted],
    seed: int,
) -> Sums:
    sums: Sums = {name: {} for name in layers}
    passing: list[Positions] = []
    predictions = 0
    test = cache(random_basis)  # held once for all sketches of one size

    def add(name: str, side: str, rows: Tensor) -> None:
        if side not in sums[name]:
            sums[name][side] = Moment.empty(rows.shape[-1], getattr(wanted[name], side), rows.device, test)
        sums[name][side].add(passing[0].rows(rows))

    def record(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if wanted[name].inputs is not None:
            add(name, "inputs", inputs[0])
        if wanted[name].outputs is None:
            return output
        traced = output if output.requires_grad else output.detach().requires_grad_()
        traced.register_hook(partial(add, name, "outputs"))
        return traced.clone() if traced.is_leaf else traced  # what follows may write into it

    backward = any(wanted[name].outputs is not None for name in layers)
    handles = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    with watching(model, handles), _frozen(model), torch.set_grad_enabled(backward):
        for number, batch in enumerate(batches):
            passing[:] = [Positions(model, batch)]
            output = model(**passing[0].inputs)
            _check_finite(sums)
            if backward:
                losses = _sampled_losses(model, output, passing[0], seed + number)
                predictions += len(losses)
                if losses.requires_grad:  # else no layer reaches it, which is told below
                    losses.sum().backward()
    _check_finite(sums)
    for side in ("inputs", "outputs"):
        rows = {name: _rows(sums[name], side) for name in layers if getattr(wanted[name], side) is not None}
        check_all_seen(rows, side)
    for sides in sums.values():
        if "outputs" in sides:
            sides["outputs"].count = predictions
    return sums


def _rows(sides: Mapping[str, Moment], side: str) -> int:
    return sides[side].count if side in sides else 0


def _check_finite(sums: Sums) -> None:
    for name, sides in sums.items():
        for side, moment in sides.items():
            if not math.isfinite(moment.trace):
                what = "calibration inputs reach" if side == "inputs" else "gradients of the calibration reach"
                raise LoricaError(
                    f"{name}: the {what} it as NaN or inf: a weight before it is too large, or the inputs are no "
                    "numbers"
                )


def _sampled_losses(model: nn.Module, output: Any, positions: Positions, seed: int) -> Tensor:
    """Return ``-log p(y)`` of each of the predictions that count, y drawn from p."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise LoricaError(f"{type(model).__name__} predicts nothing (no logits), so that its loss has no curvature")
    logits_RV = logits[positions.predicted(logits, causal=is_causal(model))]
    logits_RV = logits_RV.to(torch.promote_types(logits.dtype, torch.float32))
    p_RV = logits_RV.detach().softmax(-1)
    if not bool(p_RV.isfinite().all()):
        raise LoricaError("what the model predicts on the calibration inputs is NaN or inf")
    generator = None if p_RV.is_meta else torch.Generator(logits.device).manual_seed(seed)
    drawn = torch.multinomial(p_RV, 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(logits_RV, drawn, reduction="none")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _factors(sums: Sums, earlier: Mapping[str, Factors], distinct: list[Factor]) -> dict[str, Factors]:
    """Return the factors of one pass; ``distinct`` are all so far, and takes up what is new."""
    made: list[tuple[Moment, Factor | None, Factor]] = []

    def factor(name: str, side: str, moment: Moment) -> Factor:
        before = getattr(earlier.get(name), side, None)
        if before is not None:
            before.check_side(name, len(moment.sum))
        known = next((result for other, its, result in made if moment.same_as(other) and _same(before, its)), None)
        if known is None:
            result = moment.factor(before)
            known = next((one for one in distinct if one.same_as(result)), result)
            if known is result:
                distinct.append(result)
        made.append((moment, before, known))
        return known

    return {
        name: Factors(**{side: factor(name, side, moment) for side, moment in sides.items()})
        for name, sides in sums.items()
    }


def _same(a: Factor | None, b: Factor | None) -> bool:
    return a is b or (a is not None and b is not None and a.same_as(b))
