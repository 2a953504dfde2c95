"""What the layers see when batches go through a model: the rows that count, their moments and cosines.

Shape suffixes: B sequences, L positions, R rows (the B x L positions that count), M outputs, N inputs, D either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import LoricaError
from lorica.subspace.calibration import MEASURING, Batch, Progress, evaluating, parts

IGNORED_LABEL = -100

MOMENT_BYTES = 4 * 2**30
"""How much the second moments of the layers that are looked at in one pass may take; more layers take more passes."""


PART = 2**24
"""So many activations and logits go through a small model together at most; through one of more parameters, as many."""


@dataclass
class InputStatistics:
    """Running sums over the rows that one layer saw.

    Attributes:
        moment_NN: sum of x x^T in float64, or None if not asked for.
        cosine: sum of cos(x, y), both cut to the shorter of their lengths.
        rows: how many rows were summed.
    """

    moment_NN: Tensor | None = None
    cosine: float = 0.0
    rows: int = 0

    @property
    def similarity(self) -> float:
        """Mean cosine between the layer's inputs and outputs."""
        return self.cosine / max(self.rows, 1)

    def add(self, x_RN: Tensor, y_RM: Tensor, *, moments: bool) -> None:
        """Add the rows of one forward pass."""
        x = x_RN.double()
        width = min(x.shape[1], y_RM.shape[1])
        cosines = torch.cosine_similarity(x[:, :width], y_RM[:, :width].double(), dim=1)
        self.cosine += float(cosines.sum())
        self.rows += x.shape[0]
        if moments:
            product = x.T @ x
            self.moment_NN = product if self.moment_NN is None else self.moment_NN + product


class Positions:
    """A batch on its way through a model, and which of its positions count.

    Padding does not: what ``attention_mask`` leaves out, and of a decoder's what has no label. A layer of an
    encoder-decoder belongs to the side whose mask has the shape of its input; where both have the same, the encoder's
    gets one column of padding more, which changes nothing else.

    Attributes:
        inputs: the batch's tensors, on the model's device.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        device = next(model.parameters()).device
        self.inputs = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        self._decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        if self._decodes:
            self._fill_masks()
        both = (self.inputs.get("attention_mask"), self._decoder_mask())
        self._masks = [mask.bool() for mask in both if mask is not None]

    def rows(self, x: Tensor) -> Tensor:
        """Return the rows that count of what goes into a layer or comes out of it: (B, L, D) or (B L, D) to (R, D)."""
        keep = next((mask for mask in self._masks if x.shape[:-1] in (mask.shape, (mask.numel(),))), None)
        flat = x.reshape(-1, x.shape[-1])
        return flat if keep is None else flat[keep.reshape(-1)]

    def predicted(self, logits: Tensor, *, causal: bool) -> Tensor:
        """Return, for logits (B, L, V) or (B, V), which predictions count: those that have a label, if any are given.

        A causal model predicts the next position, so nothing follows its last one, and padding predicts nothing.
        """
        shape = logits.shape[:-1]
        labels = self.inputs.get("labels")
        mask = self.inputs.get("attention_mask") if labels is None else labels != IGNORED_LABEL
        if self._decodes:
            mask = self._decoder_mask()
        if mask is None or mask.shape != shape:
            mask = torch.ones(shape, dtype=torch.bool, device=logits.device)
        if not causal or len(shape) == 1:
            return mask.bool()
        attended = self.inputs.get("attention_mask", torch.ones_like(mask)).bool()
        return torch.cat([mask[:, 1:].bool() & attended[:, :-1], torch.zeros_like(attended[:, :1])], dim=1)

    def _fill_masks(self) -> None:
        ids, decoded = self.inputs.get("input_ids"), self._decoder_mask()
        if ids is None or decoded is None:
            return
        mask = self.inputs.setdefault("attention_mask", torch.ones_like(ids))
        if mask.shape == decoded.shape:
            self.inputs["input_ids"] = nn.functional.pad(ids, (0, 1))
            self.inputs["attention_mask"] = nn.functional.pad(mask, (0, 1))

    def _decoder_mask(self) -> Tensor | None:
        """Return which positions of the decoder count, if it has its own."""
        if not self._decodes:
            return None
        if "labels" in self.inputs:
            return self.inputs["labels"] != IGNORED_LABEL
        ids = self.inputs.get("decoder_input_ids")
        return self.inputs.get("decoder_attention_mask", None if ids is None else torch.ones_like(ids))


@contextmanager
def watching(model: nn.Module, handles: list[Any]) -> Iterator[None]:
    """Put a model in evaluation mode; afterwards each module back in its own, and take these hooks off it."""
    try:
        with evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Iterable[Batch],
    *,
    moments: bool,
    whole: bool = False,
    progress: Progress | None = None,
) -> dict[str, InputStatistics]:
    """Run the calibration batches through the model and return what each layer saw.

    Only the positions that count, see ``Positions``; a large batch goes in parts, see ``in_parts``. The model is put in
    evaluation mode for the pass and back afterwards; no gradient is kept.

    Args:
        model: the model; batches go to its device.
        layers: the layers to watch, by name.
        calibration: batches as the model takes them: mappings with ``input_ids`` and whatever else.
        moments: whether to sum x x^T too (N x N float64 per layer).
        whole: see ``in_parts``.
        progress: is told, as ``MEASURING``, of every part of a batch.

    Raises:
        LoricaError: no batch was given, or a layer saw no input.
    """
    statistics = {name: InputStatistics() for name in layers}
    passing: list[Positions] = []

    def record(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        batch = passing[-1]
        statistics[name].add(batch.rows(inputs[0]), batch.rows(output), moments=moments)

    handles = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    with watching(model, handles), torch.no_grad():
        for batch in told_of(list(in_parts(model, layers, calibration, whole=whole)), progress):
            passing[:] = [Positions(model, batch)]
            model(**passing[0].inputs)
    check_all_seen({name: one.rows for name, one in statistics.items()})
    return statistics


def in_parts(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch], *, whole: bool = False
) -> Iterator[Batch]:
    """Yield batches in parts of as many rows as go through the model together: see ``rows_together``.

    A batch of another form than (rows, positions), without ``input_ids``, stays whole.

    Args:
        whole: all stay whole: of processes that share the model one would else go through it more often than the
            others and wait for them.
    """
    for batch in batches:
        if whole or "input_ids" not in batch:
            yield batch
            continue
        length = max(value.shape[1] for value in batch.values() if value.ndim > 1)
        yield from parts(batch, rows_together(model, layers, length))


def told_of(parts: Sequence[Batch], progress: Progress | None, number: int = 0, passes: int = 1) -> Iterator[Batch]:
    """Yield the parts of a pass and tell of each once it is done.

    Args:
        number, passes: which of how many passes over the same parts it is, from 0.
    """
    for done, part in enumerate(parts, start=number * len(parts) + 1):
        yield part
        if progress:
            progress(MEASURING, done, passes * len(parts))


def rows_together(model: nn.Module, layers: Mapping[str, nn.Module], length: int) -> int:
    """Return how many rows of some length take about the memory of the model's weights, or ``PART`` numbers; 1 or more.

    Counted are the layers' inputs, outputs and gradients, and six numbers for each logit: itself, its probability and
    what the loss and its gradient are computed from.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    logits = 6 * len(getattr(head, "weight", ()))
    activations = 2 * sum(sum(layer.get_parameter("weight").shape) for layer in layers.values())
    most = max(PART, sum(parameter.numel() for parameter in model.parameters()))
    return max(1, most // (length * (activations + logits)))


def check_all_seen(rows: Mapping[str, int], side: str = "inputs") -> None:
    """Raise unless every layer saw something."""
    unseen = [name for name, count in rows.items() if count == 0]
    what = "calibration inputs" if side == "inputs" else "gradients of the model's predictions"
    if unseen:
        raise LoricaError(f"the {what} never reached {unseen[0]} ({len(unseen)} of {len(rows)} layers)")


def within_memory(needed: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the names of layers in groups that take ``MOMENT_BYTES`` together, or a single one.

    Args:
        needed: bytes of each layer's moments, by name.
    """
    group: list[str] = []
    used = 0
    for name, size in needed.items():
        if group and used + size > MOMENT_BYTES:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group
