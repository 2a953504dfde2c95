"""Prompts as templates: the fields of a row put into a text, and the example that makes."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from lorica.data.example import Pair, Span
from lorica.data.formats import Format
from lorica.data.record import RowError
from lorica.data.strict_json import type_name
from lorica.errors import did_you_mean

OPTIONS = "options"
"""The field that stands for the choices, joined by ", "."""


@lru_cache(maxsize=256)
def _parts(text: str) -> tuple[tuple[str, str | None], ...]:
    """Return a template as pairs of plain text and the field behind it; None: no field."""
    parts = []
    for literal, name, spec, conversion in string.Formatter().parse(text):
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise ValueError(f"{{{name}}} is no field; write a name alone between braces, and {{{{ for a brace")
        parts.append((literal, name))
    return tuple(parts)


def template_problem(text: str) -> str:
    """Return what is wrong with a template, or an empty string."""
    try:
        _parts(text)
    except ValueError as error:
        return str(error)
    return ""


def template_fields(text: str) -> list[str]:
    """Return the fields that a template names, as often as it does."""
    return [name for _, name in _parts(text) if name is not None]


def fill(text: str, row: Mapping[str, Any]) -> tuple[str, dict[str, Span]]:
    """Return a template with the fields of a row put in, and the characters (start, end) that each takes.

    What is put in is never read as a template: braces in the data stay as they are.

    Raises:
        RowError: the row lacks a field of the template, or holds neither text nor a number there.
    """
    filled, spans = "", {}
    for literal, name in _parts(text):
        filled += literal
        if name is not None:
            value = _value(row, name)
            spans[name] = (len(filled), len(filled) + len(value))
            filled += value
    return filled, spans


def _value(row: Mapping[str, Any], name: str) -> str:
    if row.get(name) is None:
        state = "is null" if name in row else f"is needed by the template; the row has {', '.join(map(repr, row))}"
        raise RowError("missing field", f"{name!r} {state}")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("wrong type", f"field {name!r}: expected text or a number, got {type_name(value)}")
    return str(value)


@dataclass(frozen=True)
class PairTemplate:
    """How the rows of one task become prompts with answers.

    Attributes:
        prompt, answer: templates; ``{options}`` in the prompt are the choices, joined by ", ".
        choices: the answers there are, as a row's label spells them; none: any answer.
        shorten: field of the prompt that may be cut at its end.
        drop_labels: labels of rows that are left out.
        source_between: what stands before and after the source in a prompt.
    """

    prompt: str
    answer: str
    choices: Sequence[str] = ()
    shorten: str | None = None
    drop_labels: Sequence[str] = ()
    source_between: tuple[str, str] | None = None

    def as_format(self) -> Format:
        """Return the dataset format that `lorica.data.validate` reads rows with."""
        fields = dict.fromkeys((*template_fields(self.prompt), *template_fields(self.answer)))
        return Format("template", tuple(name for name in fields if name != OPTIONS), convert=self.pair)

    def pair(self, where: str, row: Mapping[str, Any]) -> Pair | None:
        """Return the prompt and the answer of a row; None: the row is to be left out.

        Raises:
            RowError: a field is missing, the answer is blank or none of the choices, or the prompt has no source.
        """
        answer, _ = fill(self.answer, row)
        if answer.strip() in self.drop_labels:
            return None
        if not answer.strip():
            raise RowError("empty field", f"the answer {self.answer!r} of the row is blank")
        choices = self._spelled
        if choices and answer not in choices:
            known = ", ".join(self.choices)
            hint = did_you_mean(answer.strip(), self.choices)
            raise RowError("unknown label", f"{answer.strip()!r} is none of the choices: {known}.{hint}")
        prompt, spans = fill(self.prompt, {**row, OPTIONS: ", ".join(self.choices)} if self.choices else row)
        elastic = spans[self.shorten] if self.shorten is not None else None
        return Pair(where, prompt, answer, elastic, choices, self._source(prompt))

    @cached_property
    def _spelled(self) -> tuple[str, ...]:
        """Return the choices as the answer's template spells them (" {label}": with a blank in front)."""
        if not self.choices:
            return ()
        (name,) = template_fields(self.answer)
        return tuple(fill(self.answer, {name: choice})[0] for choice in self.choices)

    def _source(self, prompt: str) -> str:
        if self.source_between is None:
            return ""
        before, after = self.source_between
        if len(prompt) < len(before) + len(after) or not (prompt.startswith(before) and prompt.endswith(after)):
            raise RowError("no source", f"the prompt does not start with {before!r} and end with {after!r}")
        return prompt[len(before) : len(prompt) - len(after)]
