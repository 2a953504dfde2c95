"""``check``: what a run will need, before anything is rented."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from lorica.commands.options import given_values, takes_options_of
from lorica.errors import LoricaError
from lorica.forecast.options import ForecastConfig, build_forecast_config
from lorica.values import parse_options, read_config

DOES_NOT_FIT = 1
"""Exit status where the run would not fit the device."""

_JSON = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.", show_default=False)]


@takes_options_of(ForecastConfig)
def check(ctx: typer.Context, config: str | None, json_file: Path | None = None, **given: Any) -> None:
    """Tell what `lorica train` with the same options will need: memory by kind, disk, time; beside plain fine-tuning.

    Only the model's config.json is read, no weight, unless --measure is given; data and --output_dir may be left out.
    For another device give --device, --device_memory and, for times, --peak_flops and --bandwidth. Exit status 1 if
    the run does not fit.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise LoricaError(f"--json {json_file}: there is no folder {json_file.parent}")
    values = read_config(config) if config else {}
    settings = build_forecast_config(values | given_values(given) | parse_options(ctx.args))
    from lorica.forecast.rates import machine_for
    from lorica.forecast.story import forecast
    from lorica.record import environment, write_json

    on_cpu = str(settings.training.get("use_cpu", False)).lower() == "true"
    device = settings.device or ("cpu" if on_cpu else None)
    machine = machine_for(device, settings.device_memory, settings.peak_flops, settings.bandwidth)
    result = forecast(settings, machine=machine)
    print(result)
    found = result.to_json() | environment()
    if settings.measure:
        from lorica.forecast.protection import measured, protection_text

        protections = measured(settings)
        print(f"\n{protection_text(protections)}")
        found["protection"] = [one.to_json() for one in protections]
    if json_file is not None:
        write_json(json_file, found)
    if not result.fits(machine.memory):
        raise typer.Exit(DOES_NOT_FIT)


def _add_option(command: Any, name: str, annotation: Any) -> None:
    """Give a command one option beside those of its configuration."""
    signature = inspect.signature(command)
    own = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])
    command.__annotations__[name] = annotation


_add_option(check, "json_file", _JSON)
