"""Options of methods from untyped values: names checked, types converted, none ignored."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lorica.errors import LoricaError, did_you_mean

T = TypeVar("T")


def checked_options(kind: type[T], given: Mapping[str, Any]) -> T:
    """Return the options dataclass that the values stand for.

    Strings, as a command line has them, are converted; values that are objects already pass as they are.

    Raises:
        LoricaError: an unknown name, with the nearest, or a value of the wrong type. A ``ValueError`` of the
            dataclass's own ``__post_init__`` (a value out of range) becomes one too.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise LoricaError(f"unknown option {name!r}; it takes {', '.join(known)}.{did_you_mean(name, known)}")
    hints = typing.get_type_hints(kind)
    try:
        return kind(**{name: _converted(name, value, hints[name]) for name, value in given.items()})
    except ValueError as error:
        raise LoricaError(str(error)) from error


def _converted(name: str, value: Any, hint: Any) -> Any:
    if not isinstance(value, str | int | float | list | dict):
        return value
    try:
        return TypeAdapter(hint, config={"arbitrary_types_allowed": True}).validate_python(value)
    except ValidationError as error:
        raise LoricaError(f"option {name!r}: {error.errors()[0]['msg']}, got {value!r}") from error
