"""The Kronecker factors of every layer, from one pass over calibration inputs: A of what goes in, B of gradients.

Shape suffixes: D the dimension of one side, R rows (positions that count), S columns of a sketch, V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.errors import LoricaError
from lorica.subspace.calibration import Batch, Progress, is_causal
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.observe import Positions, check_all_seen, in_parts, told_of, watching, within_memory

WIDEST = 4096
"""Sides up to this dimension are summed as D x D matrices; wider ones as a sketch."""

OVERSAMPLING = 1.5
"""Columns of a sketch over the directions that are wanted of it, and 32 more."""


class Wanted(NamedTuple):
    """How many directions are wanted of the sides of a weight, (out, in); None: that side is not measured."""

    shape: tuple[int, int]
    inputs: int | None = None
    outputs: int | None = None

    def nbytes(self) -> int:
        """Bytes of the sums that are held meanwhile."""
        sides = zip(self.shape, (self.outputs, self.inputs), strict=True)
        return sum(8 * dim * (sketch_size(dim, rank) or dim) for dim, rank in sides if rank is not None)


@dataclass
class Moment:
    """Running sum of ``x x^T`` over rows, in float64: itself, or for a wide side ``(sum x x^T) O`` for a random O.

    Attributes:
        rank: how many principal directions are wanted.
        test_DS: O, orthonormal columns, of a sketch.
        sum: D x D, or D x S of a sketch.
        trace: sum of ``|x|^2``.
        count: what the mean is over: the rows; of gradients, in the end, the predictions that they are of.
        kept_as: dtype of the directions that are made of it: float64 for rows of float64, else float32.
    """

    rank: int
    sum: Tensor
    test_DS: Tensor | None = None
    kept_as: torch.dtype = torch.float32
    trace: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, dim: int, rank: int, device: torch.device, test: RandomBasis) -> Moment:
        """Return a sum over no rows; ``test`` makes O."""
        size = sketch_size(dim, rank)
        sums = torch.zeros(dim, size or dim, dtype=torch.float64, device=device)
        return cls(rank, sums, test(dim, size, device) if size else None)

    def add(self, x_RD: Tensor) -> None:
        """Add rows."""
        if x_RD.dtype == torch.float64:
            self.kept_as = torch.float64
        x = x_RD.detach().double()
        self.sum.addmm_(x.T, x if self.test_DS is None else x @ self.test_DS)
        self.trace += float(x.square().sum())
        self.count += len(x)

    def factor(self, earlier: Factor | None = None) -> Factor:
        """Return the factor of the mean, on the CPU.

        Args:
            earlier: sum of factors of trace 1; each counts as much as what was summed here, in a mean over all of them,
                whose trace is that of what was summed here: however many there are, a change is expected to cost as
                much.
        """
        tasks = 0.0 if earlier is None else earlier.trace
        mean, trace = self.sum / self.count / (1 + tasks), self.trace / self.count / (1 + tasks)
        more = earlier.scaled(trace) if earlier is not None else None
        if self.test_DS is None:
            return Factor.of(mean if more is None else mean + more.matrix().to(mean), self.rank).aside(self.kept_as)
        factor = from_sketch(mean, self.test_DS, trace, self.rank)
        both = factor if more is None else factor.plus(more, self.rank).filled(self.rank)
        return both.aside(self.kept_as)

    def same_as(self, other: Moment) -> bool:
        """Return whether both summed the same rows, bit for bit: of layers that get the same input."""
        return self.rank == other.rank and self.trace == other.trace and torch.equal(self.sum, other.sum)


def from_sketch(image_DS: Tensor, test_DS: Tensor, trace: float, rank: int) -> Factor:
    """Return the factor of A given ``Y = A O``: the Nystroem approximation ``Y (O^T Y)^-1 Y^T``, cut to ``rank``.

    Never more than A itself, and the closer the faster A's spectrum falls; exact where A has no more rank than O has
    columns. A small multiple of O is added to Y before the Cholesky factorisation and taken off the energies again.

    Source:
        Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from
        streaming data", 2017, algorithm 3.
    """
    shift = len(image_DS) ** 0.5 * torch.finfo(torch.float64).eps * float(image_DS.norm())
    shifted = image_DS + shift * test_DS
    core_SS = test_DS.T @ shifted
    lower_SS, failed = torch.linalg.cholesky_ex((core_SS + core_SS.T) / 2)
    if bool(failed):  # every row is zero
        return Factor.cut(test_DS, torch.zeros_like(test_DS[0]), trace, rank)
    root_DS = torch.linalg.solve_triangular(lower_SS, shifted.T, upper=False).T
    energies, turn_SS = torch.linalg.eigh(root_DS.T @ root_DS)
    vectors_DS = torch.linalg.qr(root_DS @ turn_SS.flip(1))[0]  # the largest first: each keeps its leading span
    return Factor.cut(vectors_DS, energies.flip(0) - shift, trace, rank)


def sketch_size(dim: int, rank: int) -> int:
    """Return how many columns the sketch of a side has, 0 where the whole matrix is summed."""
    size = int(OVERSAMPLING * rank) + 32
    return size if dim > WIDEST and size < dim // 2 else 0


RandomBasis = Callable[[int, int, torch.device], Tensor]


def random_basis(dim: int, size: int, device: torch.device) -> Tensor:
    """Return a random O (D x S) with orthonormal columns, always the same; a shape alone on the meta device."""
    if device.type == "meta":
        return torch.empty(dim, size, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(dim)
    drawn = torch.randn(dim, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn.to(device))[0]


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
