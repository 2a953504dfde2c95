"""A Python function of the user's as a judge: one that compares two answers, or one that scores an answer."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lorica.errors import LoricaError
from lorica.evaluation.judge import CHOICES, Choice, Verdict


class LocalJudge:
    """A judge that is a Python function of the user's; see ``local_judge``."""

    def __init__(self, name: str, function: Callable[..., Any], tolerance: float = 0.0) -> None:
        self.name, self.tolerance = name, tolerance
        self.scores = _parameters(name, function) == 2
        # Both orders ask for the same two scores, and a scorer may be a model.
        self._function = lru_cache(maxsize=2)(function) if self.scores else function

    def __call__(self, prompt: str, first: str, second: str) -> Verdict:
        if not self.scores:
            return Verdict(self._choice(self._called(prompt, first, second)))
        one, other = self._score(prompt, first), self._score(prompt, second)
        raw = f"{one!r} {other!r}"
        if abs(one - other) <= self.tolerance:
            return Verdict("tie", raw=raw)
        return Verdict("first" if one > other else "second", raw=raw)

    @property
    def description(self) -> dict[str, Any]:
        scored = {"compares": "scores", "tolerance": self.tolerance}
        return {"name": self.name, **(scored if self.scores else {"compares": "answers"})}

    def _called(self, *texts: str) -> Any:
        try:
            return self._function(*texts)
        except Exception as error:  # code of the user's own, which may raise anything
            raise LoricaError(f"judge {self.name}: {type(error).__name__}: {error}") from error

    def _score(self, prompt: str, answer: str) -> float:
        value = self._called(prompt, answer)
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if math.isnan(score):
            raise LoricaError(f"judge {self.name}: the score of an answer is {value!r}; return a number")
        return score

    def _choice(self, value: Any) -> Choice:
        if value not in CHOICES:
            raise LoricaError(f"judge {self.name}: the verdict is {value!r}; return 'first', 'second' or 'tie'")
        choice: Choice = value
        return choice


def local_judge(name: str, *, tolerance: float = 0.0) -> LocalJudge:
    """Return the judge that a Python function of the user's is. Its module is imported, so its code runs.

    Args:
        name: ``package.module:function`` or ``path/to/file.py:function``. A function of three parameters
            ``(prompt, first, second)`` returns "first", "second" or "tie"; one of two, ``(prompt, answer)``, returns
            a score, where higher is better.
        tolerance: scores at most this far apart are a tie.

    Raises:
        LoricaError: there is no such module or function, it has another number of parameters, or ``tolerance``
            is given to a function that returns no scores.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise LoricaError(f"judge {name!r}: name a function as package.module:function or path/to/file.py:function")
    module = _module(place, name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise LoricaError(f"judge {name}: {place} has no function {attribute!r}")
    judge = LocalJudge(name, function, tolerance)
    if not tolerance >= 0:
        raise LoricaError(f"judge {name}: the tolerance is {tolerance}; give 0 or more")
    if tolerance and not judge.scores:
        raise LoricaError(f"judge {name}: a tolerance is for scores, and this function returns verdicts; leave it out")
    return judge


def _module(place: str, name: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, Path(place).expanduser())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # the module's own code runs, and may raise anything
        raise LoricaError(f"judge {name}: cannot import {place}: {type(error).__name__}: {error}") from error
    return module


def _parameters(name: str, function: Callable[..., Any]) -> int:
    """Return how many parameters a function needs: two for a score, three for a verdict."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(function).parameters.values()
    needed = [p.name for p in given if p.kind in places and p.default is p.empty]
    if len(needed) not in (2, 3):
        raise LoricaError(
            f"judge {name} takes ({', '.join(needed)}); write it as (prompt, first, second) for a verdict or as "
            "(prompt, answer) for a score"
        )
    return len(needed)
