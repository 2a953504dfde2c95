"""What a run scores after every task and never trains: the stream's own abilities, and others by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorica.benchmarks import catalogue, find_stream
from lorica.data.reader import READERS, open_source
from lorica.data.scored import Ability, Scored
from lorica.data.stream import TaskStream
from lorica.errors import LoricaError, did_you_mean, names_beside

SHARES = ("exact_match", "acc", "acc_norm")
"""Metrics of lm-eval that are a share of the rows, 0 to 1, in the order they are preferred."""


@dataclass(frozen=True)
class FromFile:
    """Rows of a file that a stream names.

    Attributes:
        stream: knows where the file is.
        scored: how its rows become prompts and what counts as an answer.
    """

    stream: TaskStream
    scored: Scored

    @property
    def name(self) -> str:
        """As it heads a column."""
        return self.scored.name

    def settings(self) -> dict[str, Any]:
        """Return everything but the rows on which a score depends, as plain data."""
        return self.scored.model_dump(mode="json", exclude={"description", "test_file", "hub", "floor"})


@dataclass(frozen=True)
class FromHarness:
    """A task of lm-evaluation-harness; its score is the first of ``SHARES`` that it reports.

    Attributes:
        name: as the harness knows it.
        limit: at most so many rows; None: all.
    """

    name: str
    limit: int | None = None

    def settings(self) -> dict[str, Any]:
        """Return everything on which a score depends, as plain data."""
        return asdict(self)

    def score(self, model: Any, tokenizer: Any, batch_size: int) -> float:
        """Return the score of a model, percent; NaN in a process that the harness does not tell."""
        from lorica.evaluation.harness import lm_eval_scores

        scores = lm_eval_scores(model, tokenizer, [self.name], limit=self.limit, batch_size=batch_size)
        if not scores:
            return math.nan
        metrics = scores[self.name]
        value = next((metrics[name] for name in SHARES if metrics.get(name) is not None), None)
        if value is None:
            raise LoricaError(
                f"--held_out {self.name}: this lm-eval task reports {', '.join(metrics)}; only tasks with "
                f"{', '.join(SHARES)} can be held out. lorica eval scores it"
            )
        return 100.0 * value


HeldOut = FromFile | FromHarness


def named_ability(name: str, data_dir: str | None, limit: int | None) -> list[HeldOut]:
    """Return what a name stands for: rows of a file or folder, a stream's or benchmark's abilities, an lm-eval task.

    Raises:
        LoricaError: a stream without abilities, or without the one named behind the slash.
    """
    if is_rows(name):
        return [rows_of(name, "--held_out")]
    path = Path(name).expanduser()
    stream_name, _, one = name.partition("/")
    if stream_name not in catalogue() and path.suffix not in (".yaml", ".yml"):
        return [FromHarness(name, limit)]
    stream = find_stream(stream_name if stream_name in catalogue() else path).within(data_dir)
    wanted = one if stream_name in catalogue() else ""
    chosen = [ability for ability in stream.held_out if wanted in ("", ability.name)]
    if not chosen:
        known = [ability.name for ability in stream.held_out]
        if not known:
            raise LoricaError(f"--held_out {name}: stream {stream.name!r} has no held-out abilities")
        hint = did_you_mean(wanted, known)
        raise LoricaError(
            f"--held_out {name}: {stream.name} has no ability {wanted!r}; it has {', '.join(known)}.{hint}"
        )
    return [FromFile(stream, ability) for ability in chosen]


def is_rows(name: str) -> bool:
    """Tell whether a name means a file or a folder of rows, there or not, rather than a benchmark or a task."""
    path = Path(name).expanduser()
    if name in catalogue() or path.suffix in (".yaml", ".yml"):
        return False
    return path.suffix.lower() in READERS or path.exists()


def rows_of(name: str, option: str, metric: str = "exact_match") -> FromFile:
    """Return the rows of a file or folder; their name is the file's without its ending.

    Args:
        option: that named it.

    Raises:
        LoricaError: there is no such file, or none of its kind can be read.
    """
    path = Path(name).expanduser()
    try:
        open_source(path)
    except LoricaError as error:
        raise LoricaError(f"{option} {error}") from error
    ability = Ability(name=path.stem, test_file=str(path), metric=metric)
    return FromFile(TaskStream(name=name, version=1, description="", tasks=[], held_out=[ability]), ability)


def check_harness(tasks: Sequence[str], option: str, *, require_pinned: bool = False) -> None:
    """Refuse lm-eval tasks that do not exist, or all of them where lm-eval is not installed; loads no data.

    Nor is any taken with ``require_pinned``: lm-eval fetches their data without a commit.

    Names that are files are left to the harness.

    Args:
        option: that named them.
    """
    names = [task for task in tasks if Path(task).suffix not in (".yaml", ".yml")]
    if not tasks:
        return
    if require_pinned:
        raise LoricaError(f"--require_pinned: lm-eval fetches the data of {tasks[0]} without a commit; leave it out")
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        hint = did_you_mean(tasks[0], [*catalogue(), *names_beside(tasks[0])])
        raise LoricaError(
            f"{option} {tasks[0]}: no file and no benchmark, and tasks of lm-evaluation-harness need it ({error}): "
            f"pip install 'lorica[lm-eval]'.{hint}"
        ) from None
    from lorica.evaluation.harness import check_names

    others = [*catalogue(), *(near for name in names for near in names_beside(name))]
    try:
        check_names(names, _harness_tasks() if names else (), others)
    except LoricaError as error:
        raise LoricaError(f"{option}: no such file or benchmark, and {error}") from error


@cache
def _harness_tasks() -> Sequence[str]:
    """Return the names of lm-eval's own tasks; to read their index takes seconds."""
    from lm_eval.tasks import TaskManager

    names: Sequence[str] = TaskManager().all_tasks
    return names
