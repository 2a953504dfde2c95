"""``--preset retain``: all that kept on the test beds, in one word; as much of it as a model and a layout can have."""

from __future__ import annotations

from typing import Any, TypeVar

from lorica.config import UpdateConfig
from lorica.errors import LoricaError
from lorica.training.sharding import check_option

Config = TypeVar("Config", bound=UpdateConfig)

RETAIN: dict[str, Any] = {
    "source": "curvature",
    "unfreeze_rank_ratio": 0.5,
    "remember_tasks": True,
    "curvature_penalty": "auto",
    "rehearse": 0.5,
    "rehearse_prompts": 0.1,
}
"""What kept most on the knowledge bed of docs/retention.md, and ``remember_tasks``, which the encoder there needs."""

AMOUNTS = ("unfreeze_rank_ratio", "osft_unfreeze_rank_ratio", "effective_rank", "rank_schedule", "expected_forgetting")


def with_preset(config: Config, model_config: Any) -> Config:
    """Return an update's configuration with what its preset says of the options that were not given themselves.

    ``paper`` leaves all as it is. ``retain`` is ``RETAIN``, as far as it goes:

    - no penalty where it is not defined: another constraint, a weight of which nothing is protected;
    - nothing rehearsed by a model that begins no text, and random tokens calibrate (encoder-decoders, no BOS and no
      EOS); with prompts an encoder-decoder rehearses its answers;
    - of a model that FSDP2 shards the protected directions alone, from random tokens.

    Args:
        config: of an update or of its forecast.
        model_config: of the model to be updated.

    Raises:
        LoricaError: the preset and another option contradict each other, or ``--fsdp`` has a value that there is not.
    """
    if config.preset == "paper":
        return config
    _check(config)
    given = config.model_fields_set
    values = RETAIN | _where_it_differs(config, model_config)
    values = {name: value for name, value in values.items() if name not in given}
    if given.intersection(AMOUNTS):
        values.pop("unfreeze_rank_ratio", None)
    return config.model_copy(update=values)


def _check(config: UpdateConfig) -> None:
    says = f"--preset {config.preset}"
    if config.method != "osft":
        raise LoricaError(f"{says} is for method osft, not {config.method}; leave it out")
    if config.plan_file is not None:
        raise LoricaError(f"{says} and --plan_file both say what is protected; give one of them")
    if "source" in config.model_fields_set and config.source != RETAIN["source"]:
        raise LoricaError(f"{says} protects by source {RETAIN['source']}; leave it or --source {config.source} out")
    if config.ranks not in ("uniform", "marginal"):
        raise LoricaError(f"{says} does not go with --ranks {config.ranks}, which is for source weight; leave one out")


def _where_it_differs(config: UpdateConfig, model_config: Any) -> dict[str, Any]:
    """Return what is other than in ``RETAIN`` for this model and these options."""
    shared = check_option("fsdp", config.training.get("fsdp")) is not None
    writes = _begins_a_text(model_config) and not shared
    answers = config.prompts_file is not None and not shared
    values: dict[str, Any] = {}
    unprotected = 0 in (*config.rank_pattern.values(), *(config.rank_schedule or ()))
    if shared or unprotected or config.constraint not in (None, "two-sided"):
        values["curvature_penalty"] = 0.0
    if shared:
        values["remember_tasks"] = False
    if not writes:
        values["rehearse_prompts"] = 0.0
    if not (writes or answers):
        values["rehearse"] = 0.0
        values |= {} if config.calibration_file else {"calibration": "random"}
    return values


def _begins_a_text(model_config: Any) -> bool:
    """Return whether a model continues a text from BOS or EOS, as far as its configuration tells."""
    own = model_config.get_text_config()
    bos, eos = getattr(own, "bos_token_id", None), getattr(own, "eos_token_id", None)
    known = [bos, *(eos if isinstance(eos, list) else [eos])]
    return not model_config.is_encoder_decoder and any(one is not None and 0 <= one < own.vocab_size for one in known)
