"""The preset ``retain``: all that kept on the test beds, as far as a model and the layout of a run can have it."""

from __future__ import annotations

import math
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
    "rehearse_tokens": "auto",
    "rehearse_length": "auto",
    "rehearse_prompts": 0.1,
}
"""What kept most of facts known by heart, and ``remember_tasks``, which real text needs: docs/retention.md."""

OF_REHEARSING = ("rehearse_tokens", "rehearse_length", "rehearse_prompts")
"""Options that have no effect where nothing is rehearsed."""

AMOUNTS = ("unfreeze_rank_ratio", "osft_unfreeze_rank_ratio", "effective_rank", "rank_schedule", "expected_forgetting")


def with_preset(config: Config, model_config: Any) -> Config:
    """Return an update's configuration with what its preset says of the options that were not given themselves.

    ``paper`` leaves all as it is, and stands for ``retain`` where that was not asked for and other options contradict
    it: another method, a plan, another source, ranks of the weight's spectrum. ``retain`` is ``RETAIN``, as far as it
    goes:

    - no penalty where it is not defined: another constraint, a weight of which nothing may be protected;
    - nothing rehearsed by a model that begins no text (encoder-decoders, no BOS and no EOS), and random tokens
      calibrate; with prompts an encoder-decoder rehearses its answers;
    - no prompts trained with Liger's kernels, whose loss makes no logits;
    - of a model that FSDP2 shards the protected directions alone, from random tokens.

    Args:
        config: of an update or of its forecast.
        model_config: of the model to be updated.

    Raises:
        LoricaError: the preset and another option that were both given contradict each other, or ``--fsdp`` has a
            value that there is not.
    """
    if config.preset == "paper":
        return config
    contradiction = _contradiction(config)
    if contradiction is not None:
        if "preset" in config.model_fields_set:
            raise LoricaError(contradiction)
        return config.model_copy(update={"preset": "paper"})
    given = config.model_fields_set
    values = RETAIN | _where_it_differs(config, model_config)
    rehearses = config.rehearse if "rehearse" in given else values["rehearse"]
    left = {*given, *(() if rehearses else OF_REHEARSING)}
    if given.intersection(AMOUNTS):
        left.add("unfreeze_rank_ratio")
    return config.model_copy(update={name: value for name, value in values.items() if name not in left})


def filled_in(asked: UpdateConfig, settled: UpdateConfig) -> str | None:
    """Return a line that names what ``with_preset`` made of a configuration, None if that is nothing."""
    names = (*RETAIN, "calibration")
    changed = {name: getattr(settled, name) for name in names if getattr(settled, name) != getattr(asked, name)}
    if not changed:
        return None
    words = ", ".join(f"{name} {value}" for name, value in changed.items())
    return f"preset {settled.preset}: {words}; --preset paper leaves these out"


def _contradiction(config: UpdateConfig) -> str | None:
    """Return why the preset cannot be had beside what was given, None if it can."""
    says = f"--preset {config.preset}"
    if config.method != "osft":
        return f"{says} is for method osft, not {config.method}; leave it out"
    if config.plan_file is not None:
        return f"{says} and --plan_file both say what is protected; give one of them"
    if "source" in config.model_fields_set and config.source != RETAIN["source"]:
        return f"{says} protects by source {RETAIN['source']}; leave it or --source {config.source} out"
    if config.ranks not in ("uniform", "marginal"):
        return f"{says} does not go with --ranks {config.ranks}, which is for source weight; leave one out"
    return None


def _where_it_differs(config: UpdateConfig, model_config: Any) -> dict[str, Any]:
    """Return what is other than in ``RETAIN`` for this model and these options."""
    shared = check_option("fsdp", config.training.get("fsdp")) is not None
    writes = _begins_a_text(model_config) and not shared
    answers = config.prompts_file is not None and not shared
    values: dict[str, Any] = {}
    if shared or _may_leave_a_weight_free(config) or config.constraint not in (None, "two-sided"):
        values["curvature_penalty"] = 0.0
    if not writes or config.training.get("use_liger_kernel"):  # its fused loss makes no logits
        values["rehearse_prompts"] = 0.0
    if shared:
        values["remember_tasks"] = False
    if not (writes or answers):
        values |= {"rehearse": 0.0} | ({} if config.calibration_file else {"calibration": "random"})
    return values


def _may_leave_a_weight_free(config: UpdateConfig) -> bool:
    """Return whether there may be a weight of which nothing is protected."""
    protected = (*config.rank_pattern.values(), *(config.rank_schedule or ()), config.effective_rank)
    free = (config.unfreeze_rank_ratio, config.osft_unfreeze_rank_ratio)
    return 0 in protected or 1 in free or config.ranks == "marginal"


def _begins_a_text(model_config: Any) -> bool:
    """Return whether a model continues a text from BOS or EOS, as far as its configuration tells."""
    own = model_config.get_text_config()
    bos, eos = getattr(own, "bos_token_id", None), getattr(own, "eos_token_id", None)
    size = getattr(own, "vocab_size", math.inf)
    known = [bos, *(eos if isinstance(eos, list) else [eos])]
    return not model_config.is_encoder_decoder and any(one is not None and 0 <= one < size for one in known)
