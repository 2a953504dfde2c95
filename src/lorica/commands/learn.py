"""``train``, ``run`` and ``demo``: the commands that change a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorica.commands.options import given_values, takes_options_of
from lorica.config import UpdateConfig, build_config
from lorica.experiments.config import RunConfig, build_run_config
from lorica.values import parse_options, read_config

REJECTED = 3
"""Exit status of an update that forgot more than ``--max_forgetting`` allows."""


@takes_options_of(UpdateConfig)
def train(ctx: typer.Context, config: str | None, **given: Any) -> None:
    """Update a model with new data, in directions that leave what it knows alone.

    Every field of transformers' TrainingArguments is an option too, under its own name: --learning_rate 1e-4,
    --num_train_epochs 2, --per_device_train_batch_size 16, --bf16, --save_steps 200, --resume_from_checkpoint true ...
    """
    values = read_config(config) if config else {}
    settings = build_config(values | given_values(given) | parse_options(ctx.args))
    from lorica.training.arguments import check_arguments
    from lorica.update import train as run_update

    check_arguments({key: value for key, value in values.items() if key in settings.training}, where=f"{config}: ")
    if run_update(settings).get("rejected"):
        raise typer.Exit(REJECTED)


@takes_options_of(RunConfig, positional=["stream"])
def run(ctx: typer.Context, config: str | None, **given: Any) -> None:
    """Run methods over a stream of tasks, on equal terms, and compare what each learned and lost.

    STREAM is a benchmark of `lorica list` or a YAML file of your own tasks. A run that was stopped goes on where it
    was when the same command is given again. Every field of transformers' TrainingArguments is an option too.
    torchrun and accelerate launch start it on several GPUs; with --fsdp full_shard or hybrid_shard the model lies in
    parts on them (methods seqft and osft).
    """
    values = read_config(config) if config else {}
    settings = build_run_config(values | given_values(given) | parse_options(ctx.args))
    from lorica import processes
    from lorica.experiments.story import run as run_stream
    from lorica.experiments.summary import conclusion

    records = run_stream(settings)
    if processes.leads():
        print(conclusion(records, Path(settings.output_dir)))


def demo(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where the records and the report go.")] = Path(
        "lorica-demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the order of the training rows.")] = 0,
) -> None:
    """Teach a small model new tasks with and without protection, offline, and show what each forgot."""
    import torch

    from lorica.demo import run_demo

    torch.set_num_threads(1)  # as in the sweep; for a model this small more threads are slower

    run_demo(output_dir, seed=seed)
