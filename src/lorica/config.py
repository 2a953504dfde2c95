"""The configuration of one update: every field with its meaning, its default and its check."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorica.values import with_training


def _count_or_share(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
    except ValueError:
        raise ValueError("expected a share such as 0.5, or a count of directions such as 64") from None


def _strength(value: Any) -> Any:
    """Return a number of 0 or more, or auto."""
    if value == "auto":
        return value
    try:
        strength = float(value)
    except (TypeError, ValueError):
        strength = float("nan")
    if not 0 <= strength < float("inf"):
        raise ValueError("expected a strength of 0 or more, or auto")
    return strength


def _tokens(least: int) -> BeforeValidator:
    """Return what takes a whole number of at least so many, or auto."""

    def checked(value: Any) -> Any:
        if value == "auto":
            return value
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"expected a number of tokens, {least} or more, or auto")
        return value

    return BeforeValidator(checked)


Amount = Annotated[StrictInt | StrictFloat, BeforeValidator(_count_or_share)]
"""A count of directions (an int) or a share of them (a float): 1 is one direction, 1.0 is all."""

Share = Annotated[float, Field(ge=0, le=1)]
"""A share of directions: 0 is none, 1 is all."""

Strength = Annotated[float | Literal["auto"], BeforeValidator(_strength)]
"""Of a penalty: 0 is none, and auto depends on the task."""

Tokens = Annotated[int | Literal["auto"], _tokens(least=1)]
"""So many tokens; auto depends on the task."""

Length = Annotated[int | Literal["auto"], _tokens(least=2)]
"""Tokens of a text; auto depends on the task."""


class UpdateConfig(BaseModel):
    """One protected update of one model, as ``lorica train`` and ``lorica.train`` take it.

    Any field of transformers' ``TrainingArguments`` may stand beside these under its own name; those go
    into ``training``.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model_name_or_path: str
    """The model to update: a folder, or a name on the hub."""

    train_file: str | None = None
    """What to learn: .jsonl, .json, .csv, .parquet, or a folder of them."""

    dataset_name: str | None = None
    """What to learn, as the name of a data set on the hub, instead of train_file; NAME@COMMIT for one state of it."""

    output_dir: str
    """Where the updated model and its record go. Must be new or empty, unless resume_from_checkpoint is given."""

    eval_file: str | None = None
    """Rows of the new task that are not trained on: scored before and after."""

    retention_file: list[str] = []
    """Rows of what the model can do already: scored before and after, to see what was lost. Repeatable."""

    max_forgetting: float | None = Field(default=None, ge=0, le=100)
    """Reject the update if a retention file loses more than so many points of exact match: the model is kept aside
    in OUT/rejected, and the exit status is 3."""

    method: str = "osft"
    """osft: train only in the free directions of each weight. seqft: plain fine-tuning of the same weights. Others:
    lorica list."""

    method_options: dict[str, Any] = {}
    """NAME=VALUE: options of the method that are not below, such as r=16 for lora. Repeatable."""

    preset: Literal["retain", "paper"] = "retain"
    """retain: all that kept in our comparisons, of what is not given itself: source curvature, unfreeze_rank_ratio 0.5,
    remember_tasks, curvature_penalty auto, rehearse 0.5, rehearse_tokens auto, rehearse_length auto and
    rehearse_prompts 0.1, as far as the model writes text. paper: every option as it stands here; the default beside
    plan_file, another method, another source, or ranks that are for it."""

    unfreeze_rank_ratio: float | None = Field(default=None, ge=0, le=1)
    """Share of each weight's directions that may change: 0 nothing, 1 everything. If nothing is given 0.5 with preset
    retain, otherwise 0.25."""

    effective_rank: Amount | None = None
    """PEFT's name for the protected part: an int counts directions, a float is a share."""

    osft_unfreeze_rank_ratio: float | None = Field(default=None, ge=0, le=1)
    """mini_trainer's name for unfreeze_rank_ratio."""

    ranks: Literal["uniform", "importance", "energy", "effective-rank", "marginal"] = "uniform"
    """How the protected share is handed out: uniform, importance, energy, effective-rank or marginal (where it spares
    most forgetting; for source curvature)."""

    source: Literal["weight", "activation", "curvature", "hybrid"] = "weight"
    """What is protected: weight (top singular directions, the paper), activation (principal inputs), curvature
    (principal inputs and principal gradients of the outputs) or hybrid (weight and activation)."""

    constraint: Literal["two-sided", "input", "output", "block"] | None = None
    """two-sided (default for weight and curvature), input (default for activation and hybrid), output or block."""

    mrr: float | None = None
    """Minimum retention ratio of the importance ranks; 0.1 if nothing is given."""

    trr: float | None = None
    """Target retention ratio of the importance ranks; 0.8 if nothing is given."""

    expected_forgetting: float | None = Field(default=None, ge=0, le=1)
    """For ranks marginal, instead of unfreeze_rank_ratio: how much an update may be expected to make the model forget,
    over one of the same size that nothing holds back, 0 to 1."""

    calibration: Literal["self", "random"] | None = None
    """What calibrates importance and every source but weight: text the model writes by itself (self; the default for
    causal models and with prompts_file) or random tokens (random; for encoder-decoders and encoders). Neither needs
    data."""

    calibration_tokens: int | None = Field(default=None, ge=1)
    """How many of the tokens that the model writes before the update it is measured on: 32,768 if nothing is given.
    With rehearse these are the first of rehearse_tokens, with prompts_file answers alone. Of random tokens 4,096."""

    calibration_file: str | None = None
    """Rows that calibrate importance and every source but weight, instead of calibration."""

    rank_schedule: list[Share] | None = None
    """Protected share of each update in order, 0 to 1, instead of unfreeze_rank_ratio; the last holds for all further
    ones. Repeatable."""

    protect_learned: float | None = Field(default=None, ge=0, le=1)
    """Protect besides what earlier updates learned: so many of its top directions, as a share of each weight's."""

    remember_tasks: bool = False
    """Protect what earlier updates trained on too, by its second moments; for every source but weight."""

    remember_rows: int = Field(default=64, ge=1)
    """How many training rows stand for an update, for remember_tasks."""

    remember_size: float = Field(default=0.5, gt=0)
    """Largest size of what is remembered of updates, over that of the weights, for remember_tasks."""

    prompts_file: str | None = None
    """Prompts, with or without answers, which are not looked at: before the update the model answers them by itself.
    What it wrote calibrates in place of its text from BOS, and is what rehearse holds: of causal models beside text
    from BOS, half of the tokens each, of encoder-decoders alone."""

    rehearse: float = Field(default=0.0, ge=0)
    """Hold what the model predicts on text that it wrote before the update: so many rows of it for each training row,
    such as 0.25. For causal models, with prompts_file for encoder-decoders; no old data is needed."""

    rehearse_weight: float = Field(default=1.0, gt=0)
    """Weight of what rehearse holds, beside the loss."""

    rehearse_tokens: Tokens = 32_768
    """So many tokens are written to be rehearsed; auto: four times as many as the training rows have, 8,192 to
    65,536."""

    rehearse_length: Length = 64
    """Tokens of such a text, and of an answer, at most: a number of 2 or more, or auto, as many as the longest row has,
    of this update or one before it, 64 to 512."""

    rehearse_prompts: float = Field(default=0.0, ge=0)
    """Train the prompts' tokens too, each with this weight beside one of an answer, so that the next update rehearses
    what this one teaches."""

    curvature_penalty: Strength = 0.0
    """Hold the free directions too, each by how much a change along it is expected to make the model forget: the
    strength of a penalty, such as 300, 0 for none, or auto: the more the fewer tokens the training rows train. For
    source curvature."""

    predict_forgetting: bool = False
    """Tell how far the update was expected to move what the model predicts on text of its own, and how far it did. For
    causal models; the text is written and its curvature measured before the update."""

    plan_file: str | None = None
    """A saved, perhaps edited plan, instead of the options above but protect_learned, rehearse and
    predict_forgetting. Where it protects measured directions, these are measured anew: calibration, curvature_penalty
    and remember_tasks then go with it."""

    target_modules: list[str] | None = None
    """Names or regular expressions of the weights to train. Default: all linear layers of the blocks."""

    rank_pattern: dict[str, Amount] = {}
    """PATTERN=AMOUNT: protected share (0.5) or count (64) for modules whose name ends in the pattern. Repeatable."""

    train_also: list[str] = []
    """Regular expressions of other parameters that train freely. Default: embeddings, head, norms, biases freeze."""

    freeze_experts: bool = False
    """Leave the 3-D expert weights of a mixture of experts frozen and train the rest."""

    dataset_format: str | None = None
    """Format of the rows, where detection finds two: messages, prompt_completion, text, alpaca, sharegpt, tokenized."""

    dataset_text_field: str = "text"
    """Column that holds the text in the text format."""

    max_length: int = Field(default=1024, ge=2)
    """Longest sequence, in tokens."""

    truncation_policy: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to rows longer than max_length; they are counted either way."""

    completion_only_loss: bool | None = None
    """Train on the completion only. Default: yes for prompt+completion rows, no for text and messages."""

    assistant_only_loss: bool = False
    """Train on the assistant's turns only."""

    skip_invalid_rows: bool = False
    """Train on the valid rows and write the others to rejected.jsonl, instead of stopping."""

    chat_template_path: str | None = None
    """A Jinja chat template, for a tokenizer that has none."""

    dtype: str = "auto"
    """Dtype of the weights: auto (as they are saved), float32, bfloat16 or float16."""

    memory_mode: Literal["fast", "lean"] = "fast"
    """fast: all on one device. lean: W0 on the host or memory-mapped, long-side bases read off the weights; the same
    constraint in less memory, slower steps."""

    optimizer_in_backward: bool = False
    """Step each weight as soon as the backward pass has its gradient, and free it: one gradient at a time in memory
    instead of all. Needs --max_grad_norm 0 and no gradient accumulation; the weights come out the same."""

    padding_free: bool = False
    """Lay the rows of a micro-batch end to end instead of padding them; none sees another. For causal models that can
    keep rows apart, best with flash attention. The same loss to rounding, without the work on padding."""

    model_revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    attn_implementation: str | None = None
    """sdpa, flash_attention_2, eager, ..."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you have read."""

    allow_pickle: bool = False
    """Take a folder whose weights are pickles (*.bin) as well. They are read as tensors alone, running no code."""

    require_pinned: bool = False
    """Take nothing from the hub without its whole commit: --model_revision COMMIT, and data as OWNER/NAME@COMMIT."""

    allow_changed: list[str] = []
    """Training arguments that a resumed run may have other values of than it began with: learning_rate, weight_decay,
    max_grad_norm, num_train_epochs, max_steps, and batch size, accumulation and world_size (how many processes there
    are) with the same product. Repeatable."""

    reset_optimizer: bool = False
    """With resume_from_checkpoint: go on from a checkpoint whose optimizer state is damaged or missing, with a new one.
    Weights, step, learning rate and place in the data are the checkpoint's."""

    training: dict[str, Any] = {}
    """Fields of transformers' TrainingArguments."""

    @field_validator("*", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator(
        "train_file", "eval_file", "output_dir", "calibration_file", "prompts_file", "plan_file", "chat_template_path"
    )
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser())

    @field_validator("retention_file", "train_also", "target_modules", "allow_changed", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [str(value)] if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if (self.train_file is None) == (self.dataset_name is None):
            raise ValueError("give what to learn: --train_file FILE, or --dataset_name NAME (one of them)")
        if self.calibration is not None and self.calibration_file is not None:
            raise ValueError("--calibration and --calibration_file say the same thing; give one of them")
        if self.max_forgetting is not None and not self.retention_file:
            raise ValueError("--max_forgetting needs --retention_file: rows of what must not be forgotten")
        return self

    @property
    def source_of_rows(self) -> str:
        """What is learned: the file or the data set's name."""
        return self.train_file or self.dataset_name or ""

    @field_validator("rank_pattern", "method_options", mode="before")
    @classmethod
    def _pairs(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, list):
            return value
        pairs = [str(item).rpartition("=") for item in value]
        if not all(name for name, _, _ in pairs):
            form = "PATTERN=AMOUNT, as in mlp.down_proj=0.9" if info.field_name == "rank_pattern" else "NAME=VALUE"
            raise ValueError(f"expected {form}")
        return {name: amount for name, _, amount in pairs}


def build_config(values: dict[str, Any]) -> UpdateConfig:
    """Return the configuration of an update that flat values stand for; see ``values.with_training``."""
    return with_training(UpdateConfig, values)
