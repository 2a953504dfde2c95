"""The command line: each command parses, calls one function, and turns a user's mistake into one line."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorica.config import UpdateConfig, build_config, parse_options, read_config
from lorica.errors import Interrupted, LoricaError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # boxes would cut the names of options short
    pretty_exceptions_enable=False,
    help="Keep one language model up to date: learn new data without forgetting what it knows.",
)

BAD_INPUT = 2
"""Exit status for a mistake of the user's."""


def main() -> None:
    """Run the command line. A user's mistake is one line on standard error and exit status 2."""
    try:
        app(_with_bare_flags(sys.argv[1:]))
    except LoricaError as error:
        print(f"lorica: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except Interrupted as stop:
        print(f"lorica: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print("\nlorica: stopped", file=sys.stderr)
        sys.exit(130)


def _is_flag(name: str) -> bool:
    field = UpdateConfig.model_fields.get(name)
    return field is not None and field.annotation in (bool, bool | None)


def _with_bare_flags(arguments: list[str]) -> list[str]:
    """Let ``--flag true`` and ``--flag false`` do, as for every option of TrainingArguments."""
    words: list[str] = []
    for word in arguments:
        before = words[-1] if words else ""
        if word.lower() in ("true", "false") and before.startswith("--") and _is_flag(before[2:]):
            words[-1] = before if word.lower() == "true" else f"--no_{before[2:]}"
        else:
            words.append(word)
    return words


def _train_signature() -> inspect.Signature:
    """One option for each field of ``UpdateConfig``, with its docstring as the help text.

    All values are strings here, and pydantic converts them: one place decides what a value may be.
    """
    config_help = "A YAML file of the same options; those on the command line win."
    options: dict[str, tuple[Any, str, str]] = {"config": (str | None, "--config", config_help)}
    for name, field in UpdateConfig.model_fields.items():
        if name == "training":
            continue
        many = isinstance(field.default, list | dict) or name == "target_modules"
        kind: Any = bool | None if _is_flag(name) else list[str] | None if many else str | None
        options[name] = (kind, f"--{name}/--no_{name}" if _is_flag(name) else f"--{name}", field.description or "")
    parameters = [inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    for name, (kind, declaration, text) in options.items():
        annotation: Any = Annotated[kind, typer.Option(declaration, help=text, show_default=False)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return inspect.Signature(parameters)


def _train(ctx: typer.Context, config: str | None, **given: Any) -> None:
    """Update a model with new data, in directions that leave what it knows alone.

    Every field of transformers' TrainingArguments is an option too, under its own name: --learning_rate 1e-4,
    --num_train_epochs 2, --per_device_train_batch_size 16, --bf16, --save_steps 200, --resume_from_checkpoint true ...
    """
    values = read_config(config) if config else {}
    options = {name: value for name, value in given.items() if value is not None and value != []}
    options |= parse_options(ctx.args)
    settings = build_config(values | options)
    from lorica.training.arguments import check_arguments
    from lorica.update import train

    check_arguments({key: value for key, value in values.items() if key in settings.training}, where=f"{config}: ")
    train(settings)


_train.__signature__ = _train_signature()  # type: ignore[attr-defined]
_train.__annotations__ = {p.name: p.annotation for p in _train_signature().parameters.values()}
app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(_train)


@app.command()
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


@app.command()
def audit(
    before: Annotated[str, typer.Argument(help="The model before: a folder or a .safetensors file.")],
    after: Annotated[str, typer.Argument(help="The model after.")],
    plan: Annotated[
        str | None, typer.Option("--plan", help="A saved plan. Default: the one recorded in AFTER.")
    ] = None,
    unfreeze_rank_ratio: Annotated[
        float | None,
        typer.Option("--unfreeze_rank_ratio", help="Audit as if this share had been free (0.25 without a record)."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure how much of the change between two checkpoints lies in protected directions.

    Exit status 1 if the constraint does not hold.
    """
    from lorica.constrain.audit import audit as run_audit
    from lorica.record import environment, write_json
    from lorica.subspace.plan import Plan
    from lorica.update import progress_bar

    loaded = Plan.load(plan) if plan else None
    report = run_audit(
        before, after, loaded, unfreeze_rank_ratio=unfreeze_rank_ratio, progress=progress_bar("auditing weights")
    )
    print(report)
    if json_file is not None:
        if not json_file.parent.is_dir():
            raise LoricaError(f"--json {json_file}: there is no folder {json_file.parent}")
        write_json(
            json_file,
            {
                "leakage": report.to_records(),
                "elsewhere": report.elsewhere,
                "differences": report.differences,
                **environment(),
            },
        )
    if not report.holds:
        raise typer.Exit(1)


@app.command()
def report(
    outputs: Annotated[list[str], typer.Argument(help="Output folders or record files.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where report.html and report.md go.")] = Path(),
) -> None:
    """Rebuild the report of one or more runs from their records."""
    from lorica.report import write_report

    print(write_report(outputs, output_dir))


@app.command("list")
def list_() -> None:
    """List the methods, the model families and the rank policies."""
    from lorica.constrain.targets import FAMILIES
    from lorica.methods import METHODS
    from lorica.subspace.ranks import RANKS

    print("methods:")
    for name in METHODS:
        print(f"  {name:8} {METHODS[name].summary}")
    print("constraints: two-sided, input, output, block   sources: weight, activation")
    print(f"rank policies: {', '.join(RANKS)}")
    print("model families (any other takes all linear layers but the output head):")
    print(f"  {', '.join(FAMILIES)}")


if __name__ == "__main__":
    main()
