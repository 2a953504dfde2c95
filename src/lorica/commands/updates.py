"""``export-update`` and ``apply``: updates as artefacts."""

from __future__ import annotations

from typing import Annotated

import typer


def export_update(
    before: Annotated[str, typer.Argument(help="The model before the update: a folder or a .safetensors file.")],
    after: Annotated[str, typer.Argument(help="The model after, as lorica train wrote it.")],
    output: Annotated[str, typer.Argument(help="The folder for the update; new or empty.")],
) -> None:
    """Save what one update changed, alone, so that it can be put on and taken off again bit for bit."""
    from lorica.artefacts.export import export_update as run_export
    from lorica.told import progress_bar

    run_export(before, after, output, progress=progress_bar("comparing tensors"))


def apply(
    model: Annotated[str, typer.Argument(help="The model's folder; it is only read.")],
    updates: Annotated[list[str], typer.Argument(help="Folders made by lorica export-update.")],
    output_dir: Annotated[str, typer.Option("--output_dir", help="Where the new model goes; new or empty.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the updates off, bit for bit.")] = False,
    scale: Annotated[float, typer.Option("--scale", help="Multiply the change: 0.5 is half of the update.")] = 1.0,
    allow_overlap: Annotated[
        float, typer.Option("--allow_overlap", help="How far composed updates may share directions: 0 to 1.")
    ] = 1e-3,
) -> None:
    """Put updates on a model, take them off, scale one, or compose several that leave each other alone."""
    from lorica.artefacts.apply import apply_updates
    from lorica.told import progress_bar

    bar = progress_bar("reading and writing tensors")
    apply_updates(model, updates, output_dir, remove=remove, scale=scale, allow_overlap=allow_overlap, progress=bar)
