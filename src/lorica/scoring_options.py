"""The options of ``lorica eval``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator


class EvalOptions(BaseModel):
    """What ``lorica eval`` scores, and how."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model_name_or_path: str
    """The model: a folder, or a name on the hub."""

    tasks: list[str] = Field(min_length=1)
    """Files of rows, benchmarks of ``lorica list`` or YAML streams, and names of lm-eval tasks, mixed."""

    data_dir: str | None = None
    """Folder of the streams' data files."""

    only: list[str] = []
    """Of the streams, only these tasks and abilities."""

    metric: str = "exact_match"
    """Metric of files of rows; streams bring their own."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest generated answer, over what the tasks say."""

    max_length: int = Field(default=1024, ge=2)
    """Longest row, in tokens."""

    limit: int | None = Field(default=None, ge=1)
    """At most so many rows of each task."""

    batch_size: int = Field(default=16, ge=1)
    """Rows at a time."""

    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question of an lm-eval task; by default what the task says."""

    allow_task_code: bool = False
    """Run the Python code that an lm-eval task's YAML file names. Only for files you have read."""

    confirm_run_unsafe_code: bool = False
    """Run code that the model writes, for lm-eval tasks that score it so (humaneval); HF_ALLOW_CODE_EVAL=1 as well."""

    output_file: str | None = None
    """Also write the scores to this JSON file."""

    dtype: str = "auto"
    """Dtype of the weights: auto (as they are saved), float32, bfloat16 or float16."""

    model_revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you have read."""

    allow_pickle: bool = False
    """Take a folder whose weights are pickles (*.bin) as well. They are read as tensors alone, running no code."""

    require_pinned: bool = False
    """Take nothing from the hub without its whole commit: --model_revision COMMIT, and data as OWNER/NAME@COMMIT."""

    @field_validator("tasks", "only", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]
