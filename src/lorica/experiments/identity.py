"""What the scores of a cell depend on: a folder goes on only with the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorica import processes
from lorica.experiments.abilities import FromFile
from lorica.experiments.arguments import KEEPING
from lorica.experiments.setup import Setup
from lorica.inputs import digest_of
from lorica.redaction import redacted
from lorica.training.sharding import OPTIONS as SHARDING


@dataclass(frozen=True)
class Cell:
    """What tells one cell from the others.

    Attributes:
        method: name of the settings.
        order: of the stream; None where it has none.
        seed: of the order of the rows and of whatever is drawn.
        learning_rate: before a task's own factor.
        validates: train on a part of the training rows and score the rest, as the choice of the rate does.
    """

    method: str
    order: str | None
    seed: int
    learning_rate: float
    validates: bool = False


FIELDS = (
    "model_name_or_path", "model_revision", "max_train_rows", "max_test_rows", "max_new_tokens", "max_length", "dtype",
    "attn_implementation", "validation_fraction", "padding_free",
)  # fmt: skip
"""Fields of the run's configuration on which every score depends as they are."""


def identity(setup: Setup, cell: Cell) -> dict[str, Any]:
    """Return everything on which a cell's scores depend, as plain data."""
    tasks, settings = setup.stream.in_order(cell.order), setup.settings[cell.method].model_dump()
    prompts = settings["options"].get("prompts_file")
    from_files = [one.name for one in setup.held_out if isinstance(one, FromFile)]
    train = {task.name: setup.rows.train(task.name) for task in tasks}
    scored = {name: setup.rows.test(name) for name in (*train, *from_files)}
    whole: dict[str, Any] = redacted(
        asdict(cell)
        | {name: getattr(setup.config, name) for name in FIELDS}
        | {"number of processes": processes.size()}
        | {"fsdp": None if setup.sharding is None else setup.sharding._asdict()}
        | {"sha256 of the model": setup.weights_sha256, "classes": setup.labels}
        | {"rows drawn by seed": setup.config.seeds[0], "tasks": [task.model_dump() for task in tasks]}
        | {"stream": setup.stream.name, "version": setup.stream.version, "training": _that_count(setup.training)}
        | {"settings": settings | {"training": _that_count(settings["training"])}}
        | {"prompts as tokens": None if prompts is None else digest_of(setup.prompts(prompts))}
        | {"held out": [one.settings() for one in setup.held_out]}
        | {f"rows of {name}": rows.sha256 for name, rows in train.items()}
        | {f"scored rows of {name}": rows.sha256 for name, rows in scored.items()}
        | {f"tokens of rows of {name}": rows.digest() for name, rows in train.items()}
        | {f"tokens of scored rows of {name}": rows.digest(scored=True) for name, rows in scored.items()}
    )
    return whole


def _that_count(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training arguments on which scores depend; how the model is sharded stands by itself."""
    return {name: value for name, value in training.items() if name not in (*KEEPING, *SHARDING)}
