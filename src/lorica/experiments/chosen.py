"""Which methods and orders a run asks for."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lorica.data.stream import MethodSettings, TaskStream
from lorica.errors import LoricaError, did_you_mean
from lorica.experiments.config import RunConfig
from lorica.methods import METHODS
from lorica.values import read_config


def check_orders(stream: TaskStream, orders: list[str | None]) -> None:
    """Refuse orders that the chosen tasks make the same: one sequence of tasks would count as two."""
    seen: dict[tuple[str, ...], str | None] = {}
    for order in orders:
        names = tuple(task.name for task in stream.in_order(order))
        if names in seen:
            without = f" without {', '.join(stream.left_out)}" if stream.left_out else ""
            raise LoricaError(
                f"stream {stream.name!r}: orders {seen[names]!r} and {order!r} are the same{without}; "
                "name one of them with --orders"
            )
        seen[names] = order


def chosen_settings(config: RunConfig, stream: TaskStream) -> dict[str, MethodSettings]:
    """Return the settings of the methods asked for: the file's, else the stream's own, else a method's defaults.

    Raises:
        LoricaError: a name that is none of these, or no method at all.
    """
    known = dict(stream.methods) | (_from_file(config.methods_file) if config.methods_file else {})
    names = config.methods or list(known)
    if not names:
        raise LoricaError(f"stream {stream.name!r} has settings for no method; name some: --methods osft seqft ...")
    for name in names:
        if name not in known and name not in METHODS:
            every = [*known, *(method for method in METHODS if method not in known)]
            raise LoricaError(f"unknown method {name!r}; known: {', '.join(every)}.{did_you_mean(name, every)}")
    chosen = {name: known.get(name) or MethodSettings(method=name) for name in names}
    for name, settings in chosen.items():
        if settings.method not in METHODS:
            hint = did_you_mean(settings.method, METHODS)
            raise LoricaError(f"stream {stream.name!r}, method {name!r}: unknown method {settings.method!r}.{hint}")
    return chosen


def _from_file(path: str) -> dict[str, MethodSettings]:
    values = read_config(Path(path).expanduser())
    try:
        return TypeAdapter(dict[str, MethodSettings]).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise LoricaError(f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
