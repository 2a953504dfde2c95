"""A table of names: one place to register, one message when a name is unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from lorica.errors import LoricaError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name.

    Args:
        kind: what they are, for messages ("method", "stream").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument under ``name``; a name is taken once."""
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered twice")

        def add(item: T) -> T:
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            known = ", ".join(self._items)
            raise LoricaError(f"unknown {self.kind} {name!r}; known: {known}.{did_you_mean(name, self._items)}")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)
