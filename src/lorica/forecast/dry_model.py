"""The model of a run on the meta device: its shapes, without a weight being read."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lorica.config import UpdateConfig
from lorica.constrain.plan_counts import uniform, with_pattern
from lorica.constrain.plan_options import UNFREEZE_RANK_RATIO, check_choices, check_used, protected_amount
from lorica.constrain.planning import plan
from lorica.errors import LoricaError
from lorica.methods import METHODS, TaskData, build_method
from lorica.methods.base import Method
from lorica.methods.curvature_penalty import CurvaturePenalty
from lorica.methods.options import checked_options
from lorica.methods.osft import OSFT
from lorica.methods.own_texts import Extent, amount_for
from lorica.methods.protection import Protection, scheduled_share
from lorica.methods.rehearsal import Rehearsal
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import MEASURED, default_constraint
from lorica.training.trust import refuse_hub_kernels

FORECAST = ("osft", "seqft", "lora")
"""The methods whose first task is told by shapes alone."""

_FLASH = "sdpa"
"""What stands for flash attention, which keeps the same tensors and need not be installed where one only asks."""

_TRR = 0.8
"""Mean protected share of ``importance``, whose shares are scaled to it, unless ``trr`` says another."""


def blank_model(config: UpdateConfig, model_config: Any) -> Any:
    """Return the model of an update on the meta device, in training mode.

    Raises:
        LoricaError: transformers cannot build it, the dtype is none, or attention would be fetched from the hub.
    """
    kind = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
    attention = config.attn_implementation
    refuse_hub_kernels(attention, "--attn_implementation")
    own = {} if attention is None else {"attn_implementation": _FLASH if attention.startswith("flash") else attention}
    try:
        with torch.device("meta"):
            model = kind.from_config(
                model_config,
                dtype=weight_dtype(config, model_config),
                trust_remote_code=config.trust_remote_code,
                **own,
            )
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise LoricaError(f"model {config.model_name_or_path}: cannot build it: {reason}") from error
    return model.train()


def weight_dtype(config: UpdateConfig, model_config: Any) -> torch.dtype:
    """Return the dtype that the weights will have: asked for, else as the configuration says they are saved."""
    if config.dtype == "auto":
        return getattr(model_config, "dtype", None) or torch.float32
    dtype = getattr(torch, config.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise LoricaError(f"--dtype {config.dtype} is no dtype; give auto, float32, bfloat16 or float16")
    return dtype


def begin(model: Any, config: UpdateConfig, task: TaskData, prompt: int = 0, extent: Extent | None = None) -> Method:
    """Prepare a blank model as the method of an update would, and return the method.

    Args:
        prompt: tokens of the longest prompt that the model is to answer; 0: there is none.
        extent: of the rows; None: not known.

    Raises:
        LoricaError: the method needs more than shapes, or what it is told does not fit the model.
    """
    if config.method not in FORECAST:
        raise LoricaError(
            f"--method {config.method}: what it needs depends on values, not on shapes alone; "
            f"methods that can be forecast: {', '.join(FORECAST)}"
        )
    names = {f.name for f in fields(METHODS[config.method].options_type)}
    given = {name: getattr(config, name) for name in ("target_modules", "train_also", "freeze_experts")}
    if config.method == "osft":
        finished = Plan.load(config.plan_file) if config.plan_file else None
        _check_options(config, finished)
        made = finished or assumed_plan(model, config, task.index)
        given = {"plan": made, "memory_mode": config.memory_mode}
    given = {name: value for name, value in given.items() if name in names}
    method = build_method(config.method, given, config.method_options)
    method.begin_task(model, task)
    if isinstance(method, OSFT) and config.rehearse:
        method.rehearsal = Rehearsal.blank(model, config.rehearse, amount_for(config, extent).length, prompt)
    if isinstance(method, OSFT) and config.curvature_penalty:
        method.curvature = CurvaturePenalty.blank(model, 1.0)
    return method


def _check_options(config: UpdateConfig, made: Plan | None) -> None:
    """Refuse what training would refuse: options that do not fit together, or not with a finished plan.

    Raises:
        LoricaError: with the option.
    """
    told = {f.name: getattr(config, f.name) for f in fields(Protection) if hasattr(config, f.name)}
    told["calibration"] = [] if config.calibration_file else config.calibration
    told["prompts"] = [] if config.prompts_file else None
    told["plan"] = made
    checked_options(Protection, told)
    if made is not None:
        return
    constraint = config.constraint or default_constraint(config.source)
    check_choices(ranks=config.ranks, source=config.source, constraint=constraint)
    amounts = ("unfreeze_rank_ratio", "osft_unfreeze_rank_ratio", "effective_rank", "mrr", "trr", "expected_forgetting")
    check_used(config.ranks, {name: getattr(config, name) for name in amounts})


def assumed_plan(model: Any, config: UpdateConfig, index: int = 0) -> Plan:
    """Return the plan that the options ask for, with shares in place of what only values can tell.

    ``uniform`` plans are exact. ``importance`` gets its mean share everywhere, ``energy`` the uniform share, and
    ``effective-rank`` a half; see ``assumptions``.
    """
    constraint = config.constraint or default_constraint(config.source)
    if constraint == "block":
        raise LoricaError("--constraint block is held by the optimizer, from values; it cannot be forecast from shapes")
    made = plan(
        model,
        constraint=constraint,
        target_modules=config.target_modules,
        rank_pattern=config.rank_pattern,
        train_also=config.train_also,
        freeze_experts=config.freeze_experts,
        **_amount(config, index),
    )
    if config.source not in MEASURED:
        return made
    measured = [entry.model_copy(update={"source": config.source}) for entry in made.entries]
    count = uniform(protected_amount(_amount(config, index)), max(min(entry.shape) for entry in measured))
    entries = with_pattern([entry.model_copy(update=count(entry)) for entry in measured], config.rank_pattern or {})
    return made.model_copy(update={"entries": entries})


def _amount(config: UpdateConfig, index: int) -> dict[str, Any]:
    """Return the protected amount, as an argument of ``lorica.plan``."""
    if config.rank_schedule is not None:
        return {"effective_rank": scheduled_share(config.rank_schedule, index)}
    if config.ranks == "importance":
        return {"effective_rank": _TRR if config.trr is None else config.trr}
    if config.ranks == "effective-rank":
        return {"effective_rank": 0.5}
    names = ("unfreeze_rank_ratio", "effective_rank", "osft_unfreeze_rank_ratio")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None} or {
        "unfreeze_rank_ratio": UNFREEZE_RANK_RATIO
    }


def assumptions(config: UpdateConfig) -> list[str]:
    """Return, in words, what ``begin`` had to assume."""
    of_zero = "deepspeed: all of the optimizer's states are counted in each process, as under DDP"
    lines = [of_zero] if config.training.get("deepspeed") else []
    if config.method != "osft":
        return lines
    lines += [] if config.plan_file else _assumed_of_plan(config)
    if config.rehearse:
        longest = ", each with the longest prompt" if config.prompts_file else ""
        lines.append(f"rehearse: texts of full length{longest}")
    if config.predict_forgetting:
        lines.append(
            "predict_forgetting: what it takes is not counted: before the training about 41,000 tokens of the model's "
            "own text to be written and a forward and backward pass over them, after it one over 8,000; on the host at "
            "most the size of the weights"
        )
    return lines


def _assumed_of_plan(config: UpdateConfig) -> list[str]:
    said = {
        "importance": "ranks importance: every weight is given the mean share, trr",
        "energy": "ranks energy: as many directions as the share says; most spectra need fewer, and more memory then",
        "marginal": "ranks marginal: every weight is given the uniform share",
        "effective-rank": "ranks effective-rank: half of the directions",
    }
    lines = [said[config.ranks]] if config.ranks in said else []
    if config.protect_learned or config.remember_tasks:
        lines.append("the directions that earlier updates add are not counted")
    return lines
