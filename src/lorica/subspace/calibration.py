"""One pass over calibration inputs: what the layers see, and how much they change it.

Shape suffixes: B sequences, L positions, R rows (the B x L positions that count), N input columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import LoricaError

Batch = Mapping[str, Tensor]
IGNORED_LABEL = -100


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


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Iterable[Batch], *, moments: bool
) -> dict[str, InputStatistics]:
    """Run the calibration batches through the model and return what each layer saw.

    Positions that ``attention_mask`` marks as padding are left out wherever a layer's input has the mask's
    shape. The model is put in evaluation mode for the pass and back afterwards; no gradient is kept.

    Args:
        model: the model; batches go to its device.
        layers: the layers to watch, by name.
        calibration: batches as the model takes them: mappings with ``input_ids`` and whatever else.
        moments: whether to sum x x^T too (N x N float64 per layer).

    Raises:
        LoricaError: no batch was given, or a layer saw no input.
    """
    statistics = {name: InputStatistics() for name in layers}
    mask: dict[str, Tensor | None] = {"encoder": None, "decoder": None}

    def record(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        (x,) = inputs[:1]
        keep = next((m for m in mask.values() if m is not None and m.shape == x.shape[:-1]), None)
        x_RN, y_RM = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
        if keep is not None:
            x_RN, y_RM = x_RN[keep.reshape(-1)], y_RM[keep.reshape(-1)]
        statistics[name].add(x_RN, y_RM, moments=moments)

    handles = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            for batch in calibration:
                inputs = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
                mask["encoder"] = _as_mask(inputs.get("attention_mask"))
                mask["decoder"] = _as_mask(inputs.get("decoder_attention_mask", _labelled(model, inputs)))
                model(**inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    unseen = [name for name, one in statistics.items() if one.rows == 0]
    if unseen:
        raise LoricaError(f"the calibration inputs never reached {unseen[0]} ({len(unseen)} of {len(layers)} layers)")
    return statistics


def _labelled(model: nn.Module, inputs: Batch) -> Tensor | None:
    """Return which decoder positions count where a batch has labels alone: padding has none."""
    labels = inputs.get("labels")
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return labels != IGNORED_LABEL if decodes and labels is not None else None


def _as_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()


def random_tokens(
    vocabulary: int,
    *,
    sequences: int = 64,
    length: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    decoder: bool = False,
) -> list[dict[str, Tensor]]:
    """Return batches of uniformly random token ids: a calibration set that needs no data at all.

    Args:
        vocabulary: how many ids there are.
        sequences, length, batch_size, seed: what is drawn, and how it is cut into batches.
        decoder: give the same ids to the decoder of an encoder-decoder model as well.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (sequences, length), generator=generator)
    names = ("input_ids", "decoder_input_ids") if decoder else ("input_ids",)
    return [dict.fromkeys(names, part) | {"attention_mask": torch.ones_like(part)} for part in ids.split(batch_size)]


@torch.no_grad()
def own_text(
    model: nn.Module, *, sequences: int = 512, length: int = 64, batch_size: int = 64, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Return batches of text that a causal model writes by itself: what it has learned, without any data.

    Each sequence begins with BOS (EOS for a model without one) and is sampled from the model's own distribution,
    temperature 1, nothing cut off. What follows the end of a text is masked. The random state of the process and
    the model's mode are as before.

    Args:
        model: a causal model that can generate.
        sequences, length, batch_size, seed: how many are sampled, how long at most, how many at a time.

    Raises:
        LoricaError: the model is an encoder-decoder, or has neither BOS nor EOS to begin with.
    """
    config: Any = model.config
    if config.is_encoder_decoder:
        raise LoricaError('calibration "self" is for causal models; give batches, or "random" for random tokens')
    end = _first(getattr(model, "generation_config", config).eos_token_id)
    start = config.bos_token_id if config.bos_token_id is not None else end
    if start is None:
        raise LoricaError('calibration "self" needs a model with a bos_token_id or eos_token_id to begin at')
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    batches = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for done in range(0, sequences, batch_size):
            first = torch.full((min(batch_size, sequences - done), 1), start, device=device)
            ids = model.generate(  # type: ignore[operator]
                first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length - 1, pad_token_id=end if end is not None else start, use_cache=True,
            )  # fmt: skip
            batches.append({"input_ids": ids, "attention_mask": _until_end(ids, end)})
    model.train(training)
    return batches


def _until_end(ids: Tensor, end: int | None) -> Tensor:
    """Return 1 up to and including the first ``end`` that a sequence wrote, 0 after it."""
    ended = (ids == end).long() if end is not None else torch.zeros_like(ids)
    ended[:, 0] = 0  # a text may begin with EOS
    return (ended.cumsum(1) - ended == 0).long()


def _first(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token
