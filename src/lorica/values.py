"""How what a user writes becomes a configuration: a YAML file, a command line, and the message for what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lorica.errors import LoricaError, did_you_mean
from lorica.yaml_file import read_yaml

Model = TypeVar("Model", bound=BaseModel)


def split_training(values: dict[str, Any], kind: type[BaseModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values that are fields of a configuration, and all others with those under ``training``.

    Raises:
        LoricaError: ``training`` holds something else than names and values.
    """
    nested = values.get("training") or {}
    if not isinstance(nested, dict):
        raise LoricaError("'training' holds names and values of TrainingArguments; give each under its own name")
    own = {key: value for key, value in values.items() if key in kind.model_fields and key != "training"}
    return own, nested | {key: value for key, value in values.items() if key not in kind.model_fields}


def with_training(kind: type[Model], values: dict[str, Any]) -> Model:
    """Return the configuration that flat values stand for; what is no field of Lorica goes into ``training``.

    Whether ``training`` holds only fields that exist is checked where transformers is imported.

    Args:
        kind: a configuration with a field ``training``.
        values: by field name, Lorica's and TrainingArguments' mixed.

    Raises:
        LoricaError: a required field is missing or a value is unusable.
    """
    own, training = split_training(values, kind)
    _refuse_nul(own)
    try:
        return kind.model_validate(own | {"training": training})
    except ValidationError as error:
        message = explain(error)
        raise LoricaError(message + _misspelt(message, training)) from error


def _misspelt(message: str, others: Iterable[str]) -> str:
    """Return the hint that an option which a message asks for was given, under a name that is nearly its own."""
    asked = re.findall(r"--(\w+)", message)
    hints = {name: did_you_mean(name, asked) for name in others}
    return next((f"; {name!r} is no option.{hint}" for name, hint in hints.items() if hint), "")


def validated(kind: type[Model], values: dict[str, Any]) -> Model:
    """Return the configuration that values by name stand for; every name must be a field.

    Raises:
        LoricaError: a required field is missing, a name is unknown or a value is unusable.
    """
    for name in values:
        if name not in kind.model_fields:
            raise LoricaError(f"unknown option --{name}.{did_you_mean(name, kind.model_fields)}")
    _refuse_nul(values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise LoricaError(explain(error)) from error


def _refuse_nul(values: dict[str, Any]) -> None:
    """Refuse a character that no path can hold, and on which the system would fail in the middle of things."""
    for name, value in values.items():
        if any("\0" in one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)):
            raise LoricaError(f"--{name} holds a NUL character")


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the flat values of a YAML file.

    Raises:
        LoricaError: see ``read_yaml``; or it is not a mapping of names to values.
    """
    values = read_yaml(path, "configuration")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise LoricaError(f"{path}: expected 'name: value' lines, got {type(values).__name__}")
    return values


def parse_options(arguments: list[str]) -> dict[str, str | bool]:
    """Return ``--name value``, ``--name=value`` and bare ``--name`` (true) as a mapping.

    Raises:
        LoricaError: something that is no option, or an option given twice.
    """
    values: dict[str, str | bool] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise LoricaError(f"{word!r} is not an option; write --name value, and repeat --name for several values")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in values:
            raise LoricaError(f"--{name} is given twice")
        if not equals and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        values[name] = value if equals else True
    return values


def explain(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"--{name} is required"
    reason = first["msg"].removeprefix("Value error, ")
    return f"--{name}: {reason}, got {first['input']!r}" if name else reason
