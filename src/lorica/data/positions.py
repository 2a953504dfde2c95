"""How long a sequence a model can read."""

from __future__ import annotations

from typing import Any

_NAMES = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")


def position_limit(model_config: Any) -> int | None:
    """Return how many positions a model has, or None where it has no end of them (T5, BLOOM, Mamba).

    That is the size of the table where positions are learned (GPT-2, OPT, BERT): a longer sequence fails. Where
    they are computed (Llama's rotations) it is the length the model was trained for. Of an encoder-decoder it is
    the shorter side.

    Args:
        model_config: a transformers configuration; GPT-2's ``n_positions`` answers to the common name there.
    """
    # T5's files hold an `n_positions` that its relative positions do not use, so that name is not read as such.
    sides = (model_config, model_config.get_text_config(decoder=True), model_config.get_text_config(encoder=True))
    found = [getattr(side, name, None) for side in sides for name in _NAMES]
    return min((limit for limit in found if isinstance(limit, int) and limit > 0), default=None)
