"""``audit``, ``verify``, ``report`` and ``list``: the commands that only look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from lorica.errors import LoricaError


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
    from lorica.told import progress_bar

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise LoricaError(f"--json {json_file}: there is no folder {json_file.parent}")
    loaded = Plan.load(plan) if plan else None
    report = run_audit(
        before, after, loaded, unfreeze_rank_ratio=unfreeze_rank_ratio, progress=progress_bar("auditing weights")
    )
    print(report)
    if json_file is not None:
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


def verify(
    folder: Annotated[str, typer.Argument(help="An output folder of train, run, apply or export-update.")],
) -> None:
    """Check that checkpoints, models, results and saved updates are whole and unchanged since they were written.

    Exit status 0 if all are, 1 if one is not, 2 if there is nothing to verify.
    """
    from lorica.verification import verify as run_verify

    found = run_verify(folder)
    for one in found:
        print(one)
    if any(one.problem for one in found):
        raise typer.Exit(1)


def report(
    outputs: Annotated[list[str], typer.Argument(help="Output folders or record files.")],
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output_dir",
            help="Where report.html and report.md go. Default: the output folder if it is one, else here.",
        ),
    ] = None,
) -> None:
    """Rebuild the report of one or more runs from their records."""
    from lorica.report import write_report

    alone = Path(outputs[0]) if len(outputs) == 1 else Path()
    print(f"report: {write_report(outputs, output_dir or (alone if alone.is_dir() else Path()))}")


def list_() -> None:
    """List the methods, the benchmarks, the model families and the rank policies."""
    from lorica.benchmarks import catalogue
    from lorica.constrain.targets import FAMILIES
    from lorica.data.stream import read_stream
    from lorica.methods import METHODS
    from lorica.subspace.plan_entry import Constraint, Source
    from lorica.subspace.ranks import RANKS

    print("methods:")
    for name in METHODS:
        print(f"  {name:14} {METHODS[name].summary}")
    print("benchmarks:")
    for name, path in catalogue().items():
        print(f"  {name:14} {' '.join(read_stream(path).description.split())}")
    print(f"constraints: {', '.join(get_args(Constraint))}   sources: {', '.join(get_args(Source))}")
    print(f"rank policies: {', '.join(RANKS)}")
    print("model families (any other takes all linear layers but the output head):")
    print(f"  {', '.join(FAMILIES)}")
