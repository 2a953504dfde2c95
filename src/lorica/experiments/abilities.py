"""What a run scores after every task and never trains: the stream's own abilities, and others by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.benchmarks import catalogue, find_stream
from lorica.data.reader import READERS
from lorica.data.stream import Ability, Scored, TaskStream
from lorica.errors import LoricaError


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


@dataclass(frozen=True)
class FromHarness:
    """A task of lm-evaluation-harness; its score is the first metric that the task reports.

    Attributes:
        name: as the harness knows it.
        limit: at most so many rows; None: all.
    """

    name: str
    limit: int | None = None

    def score(self, model: Any, tokenizer: Any, batch_size: int) -> float:
        """Return the score of a model, percent."""
        from lorica.evaluation.harness import lm_eval_scores

        metrics = lm_eval_scores(model, tokenizer, [self.name], limit=self.limit, batch_size=batch_size)[self.name]
        value = next((value for value in metrics.values() if value is not None), None)
        if value is None:
            raise LoricaError(f"lm-eval task {self.name!r} reports no score")
        return 100.0 * value if value <= 1.0 else value


HeldOut = FromFile | FromHarness


def named_ability(name: str, data_dir: str | None, limit: int | None) -> list[HeldOut]:
    """Return what a name stands for: a file of rows, a benchmark's or a YAML stream's abilities, an lm-eval task.

    Raises:
        LoricaError: a stream without abilities, or one of them named behind a slash that it does not have.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() in READERS:
        ability = Ability(name=path.stem, test_file=str(path))
        return [FromFile(TaskStream(name=name, version=1, description="", tasks=[], held_out=[ability]), ability)]
    stream_name, _, one = name.partition("/")
    if stream_name not in catalogue() and path.suffix not in (".yaml", ".yml"):
        return [FromHarness(name, limit)]
    stream = find_stream(stream_name if stream_name in catalogue() else path).within(data_dir)
    chosen = stream.only([one] if one and stream_name in catalogue() else [])
    if not chosen.held_out:
        raise LoricaError(f"--held_out {name}: stream {stream.name!r} has no held-out abilities")
    return [FromFile(chosen, ability) for ability in chosen.held_out]
