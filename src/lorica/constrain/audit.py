"""The proof: how much of an update lies in the protected directions, from two states of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lorica.constrain.audit_report import AuditReport
from lorica.constrain.audit_weight import TINY, audit_by_rank, audit_weight
from lorica.constrain.checkpoint import Stripped, Weights, open_weights, prefix_apart
from lorica.constrain.plan_options import UNFREEZE_RANK_RATIO
from lorica.constrain.targets import is_target_key, natural_order
from lorica.errors import LoricaError
from lorica.subspace.calibration import Progress
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.ranks import share_to_count


def audit(
    before: nn.Module | str | Path,
    after: nn.Module | str | Path,
    plan: Plan | None = None,
    *,
    unfreeze_rank_ratio: float | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Compare two states of a model and return what the change did to the protected directions.

    Works on any two checkpoints of one architecture, whoever made them, one weight at a time. The
    directions are computed anew from ``before``; nothing is taken from the training run but the plan. Where they
    cannot be, since they were measured while training or are of what finished tasks learned, it is audited
    whether the change leaves as many directions alone as were protected, whichever they are: see ``audit_by_rank``.
    Names may differ by a prefix such as GPT-2's ``transformer.``. Tensors that only one of the two has, or
    that were reshaped, are listed in ``differences``.

    Args:
        before, after: models, folders of safetensors, or single ``.safetensors`` files.
        plan: what was to be protected. Default: the plan recorded in ``after/lorica.json``, else a uniform
            two-sided plan on all linear layers of the blocks.
        unfreeze_rank_ratio: audit that uniform plan (0.25 without a record) and no recorded one.
        progress: called as ``progress(name, done, total)``.

    Raises:
        LoricaError: no safetensors, no weight in common, a weight that the plan names is missing or has
            another shape, both a plan and a ratio are given, or the plan's directions cannot be recomputed
            from the weights and are protected as a ``block``.
    """
    if plan is not None and unfreeze_rank_ratio is not None:
        raise LoricaError("plan and unfreeze_rank_ratio both say what was protected; give one of them")
    old, new = open_weights(before), open_weights(after)
    old.family, new.family = _known(old.family, new.family), _known(new.family, old.family)
    plan, assumed = _plan_for(plan, old, new, unfreeze_rank_ratio)
    unknown = _unknown(plan)
    notes = [assumed, _by_rank_told(unknown, plan) if unknown else ""]
    planned = [f"{entry.name}.weight" for entry in plan.entries]
    prefix = prefix_apart(planned, old, new)
    if prefix:
        old, new = Stripped(old, prefix), Stripped(new, prefix)
        planned = [key.removeprefix(prefix) for key in planned]
        notes.append(f"names are compared without {prefix!r}")
    common = [key for key in old.keys() if key in new]
    if not common:
        raise LoricaError(f"{old} and {new} have no tensor in common: {_example(old)} against {_example(new)}")
    rows = []
    for done, (key, entry) in enumerate(zip(planned, plan.entries, strict=True), start=1):
        both = old.matrix(key), new.matrix(key)
        known = plan.factors(entry.name), plan.learned(entry.name)
        rows.append(audit_by_rank(*both, entry) if entry.name in unknown else audit_weight(*both, entry, *known))
        if progress:
            progress(entry.name, done, len(plan))
    differences = _differences(old, new)
    seen = {*planned, *differences}
    elsewhere = dict(_changes(old, new, [key for key in common if key not in seen]))
    return AuditReport(rows, elsewhere, differences, "; ".join(filter(None, notes)))


def _known(family: str, other: str) -> str:
    """Return the family, or that of the other where it is not known: a single file names none."""
    return other if family == "unknown" else family


def _example(weights: Weights) -> str:
    return next(iter(weights.keys()), "none")


def _unknown(plan: Plan) -> dict[str, str]:
    """Return the weights whose protected directions are not at hand, and what these are.

    Raises:
        LoricaError: nothing can be told of one without them.
    """
    found = {entry.name: "measured while training" for entry in plan.unmeasured}
    learned = (e.name for e in plan.entries if any(e.learned) and plan.learned(e.name) is None)
    found = dict.fromkeys(learned, "of finished tasks") | found
    block = next((e.name for e in plan.entries if e.name in found and e.constraint == "block"), None)
    if block is not None:
        raise LoricaError(
            f"{block}: the plan protects directions {found[block]}, which are not in the weights, and constraint "
            "'block' shows in nothing else; the audit made then is in lorica.json under 'leakage'. To audit the "
            "weights' own top directions, give unfreeze_rank_ratio instead of a plan"
        )
    return found


def _by_rank_told(unknown: Mapping[str, str], plan: Plan) -> str:
    what = " or ".join(sorted(set(unknown.values())))
    return (
        f"directions {what} are not in the weights: of {len(unknown)} of {len(plan)} weights it is audited whether "
        "the change leaves as many alone as were protected, whichever they are (lorica.json has the audit made then)"
    )


def _differences(old: Weights, new: Weights) -> dict[str, str]:
    """Return the tensors that cannot be compared, and why, by key."""
    found = {key: "only in the one before" for key in old.keys() if key not in new}
    for key in new.keys():
        if key not in old:
            found[key] = "only in the one after"
        elif old.shape(key) != new.shape(key):
            found[key] = f"{_by(old.shape(key))} before, {_by(new.shape(key))} after"
    return found


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _changes(old: Weights, new: Weights, keys: Iterable[str]) -> Iterator[tuple[str, float]]:
    for key in keys:
        a, b = old.tensor(key), new.tensor(key)
        if a.dtype == b.dtype and torch.equal(a, b):
            continue
        change = (b.double() - a.double()).norm().item() / max(a.double().norm().item(), TINY)
        if change != 0:  # also true of NaN
            yield key, change


def _plan_for(plan: Plan | None, old: Weights, new: Weights, ratio: float | None) -> tuple[Plan, str]:
    if plan is not None:
        return plan, ""
    recorded = new.recorded_plan() if ratio is None else None
    if recorded is not None:
        return recorded, ""
    ratio = UNFREEZE_RANK_RATIO if ratio is None else ratio
    if not 0 <= ratio <= 1:
        raise LoricaError(f"unfreeze_rank_ratio = {ratio} is out of range: 0 to 1")
    entries = []
    for key in sorted(old.keys(), key=natural_order):
        if is_target_key(old.family, key, old.shape(key)):
            m, n = old.matrix(key).shape
            k = share_to_count(1 - ratio, min(m, n))
            entries.append(PlanEntry(name=key.removesuffix(".weight"), shape=(m, n), k=k))
    if not entries:
        raise LoricaError(f"{old} holds no weight that looks like a linear layer of a block; give a plan")
    assumed = f"no plan is recorded: audited as if the top {1 - ratio:.0%} were protected"
    return Plan(family=old.family, entries=entries), assumed
