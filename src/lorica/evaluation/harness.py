"""General ability through lm-evaluation-harness, in process, on a model that goes on training afterwards."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lorica.data.parts import told_of_memory
from lorica.errors import LoricaError, did_you_mean
from lorica.evaluation.task_code import code_in_task, is_group

Scores = dict[str, dict[str, float | None]]

_FILES = (".yaml", ".yml")
CODE_EVAL = "HF_ALLOW_CODE_EVAL"
FEWER = "lower --batch_size, which lorica train and run call --per_device_eval_batch_size"


def lm_eval_scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    allow_task_code: bool = False,
) -> Scores:
    """Return the metrics of harness tasks, by task and metric; see ``lm_eval_record``."""
    options: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
    scores: Scores = lm_eval_record(model, tokenizer, tasks, allow_task_code=allow_task_code, **options)["scores"]
    return scores


def lm_eval_record(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    allow_task_code: bool = False,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Score a model on tasks of lm-evaluation-harness, and tell what was run.

    The harness leaves a model in evaluation mode and seeds three random generators: every module's mode, the
    generators and the tokenizer are afterwards as they were, so this may be called in the middle of training.

    Args:
        model: causal or encoder-decoder, on its device.
        tasks: names of tasks, groups or tags of the harness, or paths of task files (``.yaml``).
        num_fewshot: examples in front of each question; None: as many as the task says. A task that says 0 stays so.
        limit: rows of each task, or their share if below 1; None: all of them.
        batch_size: requests at a time.
        allow_task_code: run the code of task files that hold any; see ``code_in_task``. Tasks of the harness itself
            are trusted with its installation, and a few of them fetch the code of a metric.
        confirm_run_unsafe_code: run tasks that score what the model writes by running it (humaneval, mbpp); the
            environment variable HF_ALLOW_CODE_EVAL must be 1 as well.

    Returns:
        ``scores``: per task, and per group that has figures of its own, the metrics under the harness's names: "acc"
        as a share from 0 to 1, its standard error "acc_stderr" (None where there is none), and with the name of the
        answer's filter where there is one, "exact_match,strict-match". ``lm_eval_version``; ``task_versions``,
        ``num_fewshot`` and ``rows`` per task; ``limit``. Scores of different versions do not compare. Of several
        processes, which all take the passes of a sharded model, the harness tells the first of a machine alone: all of
        this is empty in the others.

    Raises:
        LoricaError: lm-eval is not installed, a task is unknown, cannot be loaded (its data may need the network),
            holds code without ``allow_task_code``, or runs what the model writes without both switches.
    """
    if not tasks:
        raise LoricaError("no lm-eval task is named; name at least one, such as boolq")
    lm_eval = _installed()
    files = [name for name in tasks if Path(name).suffix in _FILES]
    for file in files:
        _check_file(file, allowed=allow_task_code)
    with _as_before(model):
        # The index of the harness's own tasks takes seconds: only for those who name one.
        manager = lm_eval.tasks.TaskManager(include_defaults=len(files) < len(tasks))
        check_names([name for name in tasks if name not in files], manager.all_tasks)
        named = (manager.task_index.get(name) for name in tasks)  # these run code when they are loaded, too
        unsafe = [one.name for one in named if one and (one.cfg or {}).get("unsafe_code")]
        _check_unsafe(unsafe, confirm_run_unsafe_code)
        loaded = _loaded(manager, tasks)
        each = manager.load(loaded)["tasks"].items()
        _check_unsafe([name for name, task in each if getattr(task, "UNSAFE_CODE", False)], confirm_run_unsafe_code)
        with told_of_memory(lambda: f"in lm-eval, with {batch_size} requests at a time; {FEWER}"):
            found = lm_eval.simple_evaluate(
                model=_wrapped(lm_eval, model, tokenizer, batch_size),
                tasks=loaded,
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                confirm_run_unsafe_code=confirm_run_unsafe_code,
            )
    found = found or {"results": {}, "versions": {}, "n-shot": {}, "n-samples": {}}
    return {
        "scores": {task: _figures(values) for task, values in found["results"].items()},
        "lm_eval_version": version("lm_eval"),
        "task_versions": found["versions"],
        "num_fewshot": found["n-shot"],
        "rows": {task: counts["effective"] for task, counts in found["n-samples"].items()},
        "limit": limit,
    }


def check_names(names: Sequence[str], known: Iterable[str], others: Iterable[str] = ()) -> None:
    """Refuse a name that is no task, group or tag of the harness.

    Args:
        known: all that it has.
        others: what else might have been meant: files, benchmarks.
    """
    every = {*known}
    for name in names:
        if name not in every:
            near = did_you_mean(name, [*others, *every])
            raise LoricaError(
                f"lm-eval has no task {name!r}."
                + (near or " `lm-eval ls tasks` lists them; a file of your own ends in .yaml.")
            )


def _check_unsafe(names: Sequence[str], confirmed: bool) -> None:
    """Refuse tasks that run what the model writes, unless both switches are on."""
    switches = {"--confirm_run_unsafe_code": confirmed, "HF_ALLOW_CODE_EVAL=1": os.environ.get(CODE_EVAL) == "1"}
    missing = [switch for switch, on in switches.items() if not on]
    if names and missing:
        raise LoricaError(
            f"lm-eval task {names[0]} runs the code that the model writes, on this machine; if that may be, give "
            f"{' and '.join(missing)}"
        )


def _installed() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise LoricaError(
            f"lm-eval tasks need lm-evaluation-harness ({error}): pip install 'lorica[lm-eval]'"
        ) from None
    return lm_eval


def _check_file(file: str, *, allowed: bool) -> None:
    path = Path(file).expanduser()
    if not path.is_file():
        raise LoricaError(f"lm-eval task {file}: no such file")
    found = code_in_task(path)
    if found and not allowed:
        raise LoricaError(
            f"lm-eval task {found[0]}, which is code that would run here; if you trust it, set allow_task_code"
        )
    if is_group(path):
        raise LoricaError(f"lm-eval task {file} is a group, which lm-eval takes by name only; name its tasks' files")


def _loaded(manager: Any, tasks: Sequence[str]) -> list[Any]:
    """Return the tasks and groups that were named, as objects: what cannot be loaded shows before anything is run."""
    objects: dict[str, Any] = {}
    members: set[str] = set()
    for name in tasks:
        try:
            found = manager.load([str(Path(name).expanduser())] if Path(name).suffix in _FILES else [name])
        except Exception as error:  # readers of data sets and code of the task's own raise errors of any kind
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LoricaError(f"lm-eval task {name}: cannot load it: {reason}") from error
        if Path(name).suffix in _FILES and (twice := sorted(set(found["tasks"]) & set(objects))):
            raise LoricaError(f"lm-eval task {name}: another task is called {twice[0]!r} too; rename one of them")
        members.update(member for children in found["group_map"].values() for member in children)
        objects |= found["tasks"] | found["groups"]
    return [found for name, found in objects.items() if name not in members]


def _wrapped(lm_eval: Any, model: Any, tokenizer: Any, batch_size: int) -> Any:
    return lm_eval.models.huggingface.HFLM(
        pretrained=model,
        backend="seq2seq" if model.config.is_encoder_decoder else "causal",
        tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token and side
        batch_size=batch_size,
    )


def _figures(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Return a task's results named "metric,filter", where the filter "none" is left out; N/A is None."""
    return {
        name.removesuffix(",none"): float(value) if isinstance(value, int | float) else None
        for name, value in values.items()
        if "," in name
    }


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Put the modes of all modules and the state of the random generators back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            np.random.set_state(legacy)
