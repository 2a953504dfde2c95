"""``inspect``: a look at one model before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    model: Annotated[str, typer.Argument(help="The model: a folder, or a name on the hub.")],
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Gets inspect.json, inspect.html and inspect.md.")
    ] = Path("lorica-inspect"),
    task_file: Annotated[
        Path | None, typer.Option("--task_file", help="Rows of what the model can do: for interventions, curvature.")
    ] = None,
    unfreeze_rank_ratio: Annotated[
        float | None, typer.Option("--unfreeze_rank_ratio", help="Share of the directions the plan leaves free; 0.25.")
    ] = None,
    ranks: Annotated[str, typer.Option("--ranks", help="uniform, importance, energy or effective-rank.")] = "uniform",
    source: Annotated[str, typer.Option("--source", help="weight, activation, curvature or hybrid.")] = "weight",
    target_modules: Annotated[
        list[str] | None, typer.Option("--target_modules", help="Names or regular expressions. Repeatable.")
    ] = None,
    freeze_experts: Annotated[bool, typer.Option("--freeze_experts", help="Leave 3-D expert weights aside.")] = False,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="self or random: what the layers are shown.")
    ] = None,
    calibration_file: Annotated[Path | None, typer.Option("--calibration_file", help="Rows for it instead.")] = None,
    fractions: Annotated[
        list[float] | None,
        typer.Option("--fractions", help="Shares of the directions to remove; 0.01, 0.1, 0.5. Repeatable."),
    ] = None,
    which: Annotated[
        list[str] | None, typer.Option("--which", help="The end of the spectrum: top, bottom; both. Repeatable.")
    ] = None,
    per_layer: Annotated[bool, typer.Option("--per_layer", help="Remove them in one layer at a time as well.")] = False,
    curvature_rows: Annotated[
        int | None, typer.Option("--curvature_rows", help="Rows for the curvature; 32, 0 for none.")
    ] = None,
    max_length: Annotated[int, typer.Option("--max_length", help="Longest row, in tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Rows scored at a time.")] = 16,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    model_revision: Annotated[
        str | None, typer.Option("--model_revision", help="Branch, tag or commit on the hub.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Run Python code that comes with the model.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow_pickle", help="Take a folder whose weights are pickles (*.bin) as well.")
    ] = False,
    require_pinned: Annotated[
        bool, typer.Option("--require_pinned", help="Take nothing from the hub without its whole commit.")
    ] = False,
) -> None:
    """Look at a model before training it: are its small directions free, and what would be protected?"""
    given = {name: value for name, value in locals().items() if name != "model" and value not in (None, [])}
    from lorica.analysis.inspect import inspect_model
    from lorica.analysis.options import InspectOptions
    from lorica.told import progress_bar

    inspect_model(InspectOptions(model_name_or_path=model, **given), bars=progress_bar)
