"""The options of ``lorica.plan``: what fits together, and what they say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lorica.errors import LoricaError, did_you_mean
from lorica.subspace import ranks as policies
from lorica.subspace.calibration import Batch
from lorica.subspace.plan_entry import MEASURED, Source

SOURCES: tuple[Source, ...] = ("weight", *MEASURED)

UNFREEZE_RANK_RATIO = 0.25
"""Default share of each weight's directions that stays trainable."""


def check_used(ranks: str, values: Mapping[str, float | int | None]) -> None:
    amounts = values.keys() - {"mrr", "trr", "expected_forgetting"}
    used = {"uniform": amounts, "energy": amounts, "marginal": amounts | {"expected_forgetting"}}
    used |= {"importance": {"mrr", "trr"}, "effective-rank": set()}
    for name, value in values.items():
        if value is not None and name not in used[ranks]:
            fitting = [policy for policy, names in used.items() if name in names]
            raise LoricaError(f"{name} has no effect with ranks {ranks!r}; it is for {' and '.join(fitting)}")
        if name == "expected_forgetting" and value is not None and any(values[one] is not None for one in amounts):
            raise LoricaError("expected_forgetting and an amount of directions both say how much; give one of them")
        if name in ("mrr", "trr", "expected_forgetting") and value is not None and not 0 <= value <= 1:
            raise LoricaError(f"{name} = {value} is out of range: a share from 0 to 1")


def protected_amount(amounts: Mapping[str, float | int | None]) -> float | int:
    """Turn the one amount that is given, if any, into the protected share (float) or count (int)."""
    given = {name: value for name, value in amounts.items() if value is not None}
    if len(given) > 1:
        raise LoricaError(f"{' and '.join(given)} say the same thing; give one of them")
    name, value = next(iter(given.items()), ("unfreeze_rank_ratio", UNFREEZE_RANK_RATIO))
    if name == "effective_rank":
        return checked_amount(name, value)
    if not 0 <= value <= 1:
        raise LoricaError(f"{name} = {value} is out of range: 0 (nothing moves) to 1 (plain training)")
    return 1.0 - value


def checked_amount(name: str, value: float | int) -> float | int:
    if isinstance(value, bool) or value < 0 or (isinstance(value, float) and not value <= 1):
        raise LoricaError(f"{name} = {value} is out of range: a share from 0.0 to 1.0, or a count of directions")
    return value


def check_choices(*, ranks: str, source: str, constraint: str) -> None:
    choices = {
        "ranks": (ranks, policies.RANKS),
        "source": (source, SOURCES),
        "constraint": (constraint, ("two-sided", "input", "output", "block")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise LoricaError(f"{name} {value!r} is unknown; known: {', '.join(known)}.{did_you_mean(value, known)}")
    if source == "activation" and constraint != "input":
        raise LoricaError(
            f"source 'activation' knows directions of the inputs only; constraint {constraint!r} needs 'weight'"
        )
    if source == "hybrid" and constraint not in ("input", "two-sided"):
        raise LoricaError(f"source 'hybrid' is for constraint 'input' or 'two-sided'; {constraint!r} needs 'weight'")
    if ranks == "marginal" and source != "curvature":
        raise LoricaError(f"ranks 'marginal' weighs measured energies; it needs source 'curvature', not {source!r}")
    if ranks == "marginal" and constraint == "block":
        raise LoricaError("ranks 'marginal' counts each side by itself; constraint 'block' protects only both together")
    if source in MEASURED and ranks in ("energy", "effective-rank"):
        raise LoricaError(f"ranks {ranks!r} reads the weight's spectrum; with source {source!r} use 'uniform'")


def check_tokens(tokens: int | None, calibration: Iterable[Batch] | str | None, *, measured: bool) -> None:
    """Refuse a number of calibration tokens that is none, or that nothing takes."""
    if tokens is None:
        return
    if tokens < 1:
        raise LoricaError(f"calibration_tokens = {tokens} is out of range: at least 1")
    if not measured:
        raise LoricaError("calibration_tokens has no effect: nothing of what is protected is measured; leave it out")
    if not (calibration is None or isinstance(calibration, str)):
        raise LoricaError("calibration_tokens has no effect beside calibration inputs of your own (calibration_file)")


def as_given(calibration: Iterable[Batch] | str) -> str:
    """Return the option as the user wrote it: batches are calibration= in Python, a file on the command line."""
    return f"calibration {calibration!r}" if isinstance(calibration, str) else "calibration (or calibration_file)"
