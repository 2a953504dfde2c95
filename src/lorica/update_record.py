"""What an update depends on, and what its record says of it besides what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from lorica.config import UpdateConfig
from lorica.hub import commits
from lorica.inputs import Inputs, digest_of
from lorica.lineage import Lineage
from lorica.record import SCHEMA, environment
from lorica.redaction import redacted
from lorica.subspace.plan import Plan
from lorica.training.identity import goes_by_scores, trajectory


def identity_of(
    config: UpdateConfig, arguments: TrainingArguments, inputs: Inputs, lineage: Lineage, *, sharded: bool
) -> dict[str, Any]:
    """Return everything on which the trained weights depend."""
    not_weights = {"output_dir", "eval_file", "retention_file", "max_forgetting", "training", "skip_invalid_rows"}
    not_weights |= {"optimizer_in_backward"}  # the same steps in another order
    not_weights |= {"predict_forgetting", "preset"}  # what a preset stands for is in the other options
    not_weights |= {"allow_changed", "reset_optimizer", "allow_pickle", "require_pinned", "trust_remote_code"}
    not_weights |= {"train_file", "prompts_file"}  # their contents count, wherever they are now
    not_weights |= {"model_name_or_path"} if lineage.weights_sha256 else set()
    own = config.model_dump(mode="json", exclude=not_weights)
    rows = {"sha256 of the training rows": inputs.train.sha256}
    rows |= {"sha256 of the training rows as tokens": inputs.train.digest()}
    if inputs.prompts is not None:
        rows |= {"sha256 of the prompts as tokens": digest_of(inputs.prompts)}
    if inputs.eval is not None and goes_by_scores(arguments):
        rows |= {"sha256 of the rows of --eval_file": inputs.eval.sha256}
    model = {"sha256 of the model": lineage.weights_sha256, "fsdp": sharded, "deepspeed": arguments.deepspeed}
    identity: dict[str, Any] = redacted(own | trajectory(arguments) | rows | model)
    return identity


def settled(
    config: UpdateConfig,
    arguments: TrainingArguments,
    inputs: Inputs,
    plan: Plan | None,
    log: Sequence[dict[str, float]],
) -> dict[str, Any]:
    """Return the part of an update's record that needs no measuring.

    Args:
        log: of ``fit``.
    """
    return {
        "schema": SCHEMA,
        "kind": "train",
        "method": config.method,
        "label": config.method,
        "seed": arguments.seed,
        "model": redacted(config.model_name_or_path),
        "commits": commits(config.model_name_or_path, config.model_revision),
        "learning_rate": arguments.learning_rate,
        "loss_curve": [
            {"step": row["step"], "loss": row["loss"], "learning_rate": row.get("learning_rate")}
            for row in log
            if "loss" in row
        ],
        "notices": [row for row in log if "notice" in row],
        "data": redacted(inputs.summaries()),
        "plan": plan.records() if plan else [],
        "config": redacted(config.model_dump(mode="json")),
        "training_arguments": redacted(arguments.to_sanitized_dict()),
        **environment(),
    }
