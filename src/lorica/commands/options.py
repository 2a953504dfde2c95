"""Options from a configuration's fields, so that the command line, YAML and Python share names, help and checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

CONFIG_HELP = "A YAML file of the same options; those on the command line win."


def is_flag(field: FieldInfo) -> bool:
    """Tell whether an option is on or off and needs no value."""
    return field.annotation in (bool, bool | None)


def takes_many(field: FieldInfo) -> bool:
    """Tell whether an option may be given several values."""
    parts = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return any(get_origin(part) in (list, dict) for part in parts)


def takes_options_of(model: type[BaseModel], *, positional: Sequence[str] = ()) -> Callable[..., Any]:
    """Return a decorator that gives a command one option for each field of a configuration, and ``--config``.

    The command is called as ``command(ctx, config, **given)``. All values are strings here, and pydantic converts
    them: one place decides what a value may be.

    Args:
        positional: fields that are arguments, not options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.Signature(_parameters(model, positional))
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
        return command

    return decorate


def _parameters(model: type[BaseModel], positional: Sequence[str]) -> list[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    found = [inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    for name in positional:
        help_text = model.model_fields[name].description
        found.append(inspect.Parameter(name, keyword, annotation=Annotated[str, typer.Argument(help=help_text)]))
    config = Annotated[str | None, typer.Option("--config", help=CONFIG_HELP, show_default=False)]
    found.append(inspect.Parameter("config", keyword, default=None, annotation=config))
    for name, field in model.model_fields.items():
        if name not in (*positional, "training"):
            found.append(inspect.Parameter(name, keyword, default=None, annotation=_option(name, field)))
    return found


def _option(name: str, field: FieldInfo) -> Any:
    kind: Any = bool | None if is_flag(field) else list[str] | None if takes_many(field) else str | None
    declaration = f"--{name}/--no_{name}" if is_flag(field) else f"--{name}"
    return Annotated[kind, typer.Option(declaration, help=field.description or "", show_default=False)]


def given_values(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in given.items() if value is not None and value != []}


def normalised(arguments: Sequence[str], models: Sequence[type[BaseModel]]) -> list[str]:
    """Return a command line with ``--flag true`` as ``--flag`` and ``--many a b`` as ``--many a --many b``.

    So each option reads as those of TrainingArguments do, and lists as argparse takes them.
    """
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    flags = {name for name, field in fields.items() if is_flag(field)}
    many = {name for name, field in fields.items() if takes_many(field) and not is_flag(field)}
    words: list[str] = []
    option, values = "", 0
    for word in arguments:
        if word.startswith("--"):
            option, values = word[2:].partition("=")[0], int("=" in word)
            words.append(word)
            continue
        if option in flags and not values and word.lower() in ("true", "false"):
            words[-1] = f"--{option}" if word.lower() == "true" else f"--no_{option}"
        elif option in many and values:
            words += [f"--{option}", word]
        else:
            words.append(word)
        values += 1
    return words
