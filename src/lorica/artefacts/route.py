"""Which updates fit a model, and in which order, told by fingerprints alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from lorica.artefacts.file import Prints, Update, digest
from lorica.errors import LoricaError

Side = Literal["before", "after"]


class Route(NamedTuple):
    """The updates in the order they are to be taken, and whether all of them start at the model itself."""

    steps: list[Update]
    composed: bool


def route(model: str, found: Prints, updates: Sequence[Update], start: Side) -> Route:
    """Return the way from a model through all updates, in whatever order they were named.

    Args:
        model: its name, for messages.
        found: its fingerprints.
        updates: at least one.
        start: the side of an update that has to be the model: ``before`` to put it on, ``after`` to take it off.

    Raises:
        LoricaError: an update is named twice, fits neither the model nor the result of another, or the updates
            branch in a way that is neither a chain nor a composition.
    """
    goal: Side = "after" if start == "before" else "before"
    _refuse_twins(updates)
    fitting = [update for update in updates if update.header.prints(start) == found]
    if not fitting:
        raise LoricaError(_mismatch(model, found, updates[0], start))
    if len(fitting) == len(updates) > 1 and start == "before":
        return Route(fitting, composed=True)
    steps: list[Update] = []
    left = list(updates)
    while left:
        here = steps[-1].header.prints(goal) if steps else found
        following = [update for update in left if update.header.prints(start) == here]
        if not following:
            raise LoricaError(
                f"{left[0]} was made neither from the model that {steps[0]} was made from nor from what the others "
                "lead to; apply what belongs together, one command for each group"
            )
        steps.append(following[0])
        left.remove(following[0])
    return Route(steps, composed=False)


def _refuse_twins(updates: Sequence[Update]) -> None:
    seen: dict[tuple[str, str], Update] = {}
    for update in updates:
        key = digest(update.header.prints("before")), digest(update.header.prints("after"))
        if key in seen:
            raise LoricaError(f"{seen[key]} and {update} are the same update; name it once")
        seen[key] = update


def _mismatch(model: str, found: Prints, update: Update, start: Side) -> str:
    wanted = update.header.prints(start)
    if update.header.prints("after" if start == "before" else "before") == found:
        return f"{model} holds {update} already" if start == "before" else f"{model} does not hold {update}"
    made = "was made from" if start == "before" else "leads to"
    first = next(key for key in [*wanted, *found] if wanted.get(key) != found.get(key))
    what = "is missing from" if first not in found else "differs in" if first in wanted else "is too many in"
    return (
        f"{model} is not the model that {update} {made}: SHA-256 {digest(found)[:12]}, needed is "
        f"{digest(wanted)[:12]}; the first tensor: {first} {what} {model}"
    )
