"""``lorica.plan``: decide what is protected in which weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorica.constrain.linear import matrix_of
from lorica.constrain.targets import check_whole, ends_in, family, find_targets, user_pattern
from lorica.errors import LoricaError, did_you_mean
from lorica.subspace import ranks as policies
from lorica.subspace.calibration import Batch, InputStatistics, observe, own_text, random_tokens
from lorica.subspace.plan import MEASURED, Constraint, Plan, PlanEntry, Source
from lorica.subspace.store import SplitStore

RANDOM_LENGTH = 64
"""Length of the sequences of random tokens, where the model has that many positions."""

UNFREEZE_RANK_RATIO = 0.25
"""Default share of each weight's directions that stays trainable."""


def plan(
    model: nn.Module,
    unfreeze_rank_ratio: float | None = None,
    *,
    ranks: str = "uniform",
    source: Source = "weight",
    constraint: Constraint | None = None,
    calibration: Iterable[Batch] | str | None = None,
    target_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, float | int] | None = None,
    train_also: str | Sequence[str] = (),
    freeze_experts: bool = False,
    effective_rank: float | int | None = None,
    osft_unfreeze_rank_ratio: float | None = None,
    mrr: float | None = None,
    trr: float | None = None,
) -> Plan:
    """Decide what is protected in which weight; nothing is changed yet.

    With r the protected share of a weight and s the number of its directions, ``k = floor(r s)``, where r is

    - ``uniform``: ``1 - unfreeze_rank_ratio``;
    - ``importance``: ``mrr + I_l (trr - mrr)``, I_l the mean cosine between the layer's inputs and outputs
      over the calibration batches, normalised to mean 1 (the paper's adaptive rule);
    - ``energy``: the least share that holds ``1 - unfreeze_rank_ratio`` of the squared spectrum;
    - ``effective-rank``: exp of the spectrum's entropy, over s.

    Args:
        model: a Hugging Face model, or any ``nn.Module`` with linear layers.
        unfreeze_rank_ratio: share of the directions that stays trainable, 0 (nothing moves) to 1 (plain
            training); 0.25 by default. For ``uniform`` and ``energy``.
        ranks: one of ``lorica.subspace.ranks.RANKS``.
        source: ``weight`` (top singular directions of W, the paper), ``activation`` (principal directions
            of the layer's inputs over the calibration batches) or ``hybrid`` (of the k input directions half
            principal inputs, half right singular vectors; see ``lorica.subspace.sources.hybrid_inputs``).
        constraint: ``two-sided`` (default for ``weight``), ``input`` (default for ``activation`` and
            ``hybrid``), ``output`` or ``block``. ``activation`` knows ``input`` only, ``hybrid`` also ``two-sided``.
        calibration: batches as the model takes them; "self", text that the model writes by itself (causal
            models); or "random", random tokens. The last two need no data. For ``importance``, ``activation`` and
            ``hybrid``.
        target_modules: see ``find_targets``; default: all linear layers of the blocks.
        rank_pattern: protected share (float, 0 to 1) or count (int) for modules whose name ends in the
            given regular expression, over whatever ``ranks`` says.
        train_also: a regular expression, or several, of parameter names outside the constrained weights that
            train freely, in their own dtype; all others are frozen.
        freeze_experts: for mixtures of experts: freeze the experts' 3-D weights and go on.
        effective_rank: PEFT's name for the protected part: an int counts directions, a float is a share.
        osft_unfreeze_rank_ratio: mini_trainer's name for ``unfreeze_rank_ratio``.
        mrr, trr: minimum and target retention ratio of ``importance``, 0 to 1; 0.1 and 0.8 by default.

    Returns:
        A plan: print it, save it, edit it, give it to ``protect``.

    Raises:
        LoricaError: an unknown name, a value out of range, a value that the policy does not use, a pattern
            that matches nothing, a weight that cannot be constrained.
    """
    constraint = constraint or ("input" if source in MEASURED else "two-sided")
    _check_choices(ranks=ranks, source=source, constraint=constraint)
    amounts: dict[str, float | int | None] = {
        "unfreeze_rank_ratio": unfreeze_rank_ratio,
        "osft_unfreeze_rank_ratio": osft_unfreeze_rank_ratio,
        "effective_rank": effective_rank,
    }
    _check_used(ranks, amounts | {"mrr": mrr, "trr": trr})
    protected = _protected_amount(amounts)
    targets = find_targets(model, target_modules, freeze_experts=freeze_experts)
    if source in MEASURED:
        check_whole(targets, f"source {source!r}")
    elif ranks != "uniform":
        check_whole(targets, f"ranks {ranks!r} (make the plan on one device and give protect its file)")
    observed: dict[str, InputStatistics] = {}
    if source not in MEASURED and ranks != "importance" and calibration is not None:
        raise LoricaError(
            f"{_given(calibration)} has no effect with source {source!r} and ranks {ranks!r}; leave it out"
        )
    if ranks == "importance" or source in MEASURED:
        _check_numbers(model)
        needed_by = f"source {source!r}" if source in MEASURED else f"ranks {ranks!r}"
        batches = _batches(model, calibration, needed_by)
        observed = observe(model, targets, batches, moments=source in MEASURED)
    weights = {name: matrix_of(module) for name, module in targets.items()}
    entries = [
        PlanEntry(name=name, shape=(w.shape[0], w.shape[1]), k=0, source=source, constraint=constraint)
        for name, w in weights.items()
    ]
    retention = (0.1 if mrr is None else mrr, 0.8 if trr is None else trr)
    counts = _counts(ranks, protected, weights, observed, retention)
    entries = [entry.model_copy(update=counts(entry)) for entry in entries]
    result = Plan(
        family=family(model),
        entries=_with_pattern(entries, rank_pattern or {}),
        train_also=[train_also] if isinstance(train_also, str) else list(train_also),
    )
    moments = {name: one.moment_NN for name, one in observed.items() if one.moment_NN is not None}
    return result.with_measured(moments=moments)


def _check_used(ranks: str, values: Mapping[str, float | int | None]) -> None:
    used = {"uniform": values.keys() - {"mrr", "trr"}, "energy": values.keys() - {"mrr", "trr"}}
    used |= {"importance": {"mrr", "trr"}, "effective-rank": set()}
    for name, value in values.items():
        if value is not None and name not in used[ranks]:
            fitting = [policy for policy, names in used.items() if name in names]
            raise LoricaError(f"{name} has no effect with ranks {ranks!r}; it is for {' and '.join(fitting)}")
        if name in ("mrr", "trr") and value is not None and not 0 <= value <= 1:
            raise LoricaError(f"{name} = {value} is out of range: a share from 0 to 1")


def _protected_amount(amounts: Mapping[str, float | int | None]) -> float | int:
    """Turn the one amount that is given, if any, into the protected share (float) or count (int)."""
    given = {name: value for name, value in amounts.items() if value is not None}
    if len(given) > 1:
        raise LoricaError(f"{' and '.join(given)} say the same thing; give one of them")
    name, value = next(iter(given.items()), ("unfreeze_rank_ratio", UNFREEZE_RANK_RATIO))
    if name == "effective_rank":
        return _amount(name, value)
    if not 0 <= value <= 1:
        raise LoricaError(f"{name} = {value} is out of range: 0 (nothing moves) to 1 (plain training)")
    return 1.0 - value


def _amount(name: str, value: float | int) -> float | int:
    if isinstance(value, bool) or value < 0 or (isinstance(value, float) and not value <= 1):
        raise LoricaError(f"{name} = {value} is out of range: a share from 0.0 to 1.0, or a count of directions")
    return value


def _check_choices(*, ranks: str, source: str, constraint: str) -> None:
    choices = {
        "ranks": (ranks, policies.RANKS),
        "source": (source, ("weight", *MEASURED)),
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
    if source in MEASURED and ranks in ("energy", "effective-rank"):
        raise LoricaError(f"ranks {ranks!r} reads the weight's spectrum; with source {source!r} use 'uniform'")


def _check_numbers(model: nn.Module) -> None:
    """Refuse a model that computes no numbers, and say which weight it is."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and not bool(torch.stack(parameter.detach().aminmax()).isfinite().all()):
            raise LoricaError(f"{name} holds NaN or inf; nothing can be calibrated on such a model")


def _given(calibration: Iterable[Batch] | str) -> str:
    """Return the option as the user wrote it: batches are calibration= in Python, a file on the command line."""
    return f"calibration {calibration!r}" if isinstance(calibration, str) else "calibration (or calibration_file)"


def _batches(model: nn.Module, calibration: Iterable[Batch] | str | None, needed_by: str) -> Iterable[Batch]:
    if calibration is None:
        raise LoricaError(
            f"{needed_by} needs calibration inputs; give calibration: 'self', 'random' or batches (calibration_file)"
        )
    if not isinstance(calibration, str):
        return calibration
    if calibration not in ("self", "random"):
        raise LoricaError(f"calibration {calibration!r} is unknown; known: 'self', 'random', or give batches")
    if not (hasattr(model, "config") and hasattr(model, "get_input_embeddings")):
        raise LoricaError(
            f"calibration {calibration!r} is for Hugging Face models; give {type(model).__name__} batches"
        )
    if calibration == "self":
        return own_text(model)
    decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    length = min(RANDOM_LENGTH, getattr(model.config, "max_position_embeddings", None) or RANDOM_LENGTH)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return random_tokens(vocabulary, length=length, decoder=decoder)


def _counts(
    ranks: str,
    protected: float | int,
    weights: Mapping[str, Tensor],
    observed: Mapping[str, InputStatistics],
    retention: tuple[float, float],
) -> Callable[[PlanEntry], dict[str, Any]]:
    """Return what a policy says of one entry: its k, and why."""
    store = SplitStore.from_environment()
    if ranks == "importance":
        shares = policies.importance_shares({n: one.similarity for n, one in observed.items()}, *retention)
        return lambda e: {
            "k": policies.share_to_count(shares[e.name], e.limit),
            "why": f"importance: cosine {observed[e.name].similarity:.3f}, share {shares[e.name]:.3f}",
        }
    if ranks == "energy":
        if isinstance(protected, int):
            raise LoricaError("ranks 'energy' needs a share, not a count: give unfreeze_rank_ratio")
        return lambda e: {
            "k": policies.energy_rank(_spectrum(e.name, weights, store), protected),
            "why": f"energy: {protected:g} of the squared spectrum",
        }
    if ranks == "effective-rank":
        return lambda e: _effective(policies.effective_rank(_spectrum(e.name, weights, store)), e)
    return lambda e: {"k": _count("effective_rank", protected, e), "why": f"uniform: {protected:g} protected"}


def _effective(rank: float, entry: PlanEntry) -> dict[str, Any]:
    return {"k": min(entry.limit, int(rank + 1e-9)), "why": f"effective rank {rank:.1f}"}


def _spectrum(name: str, weights: Mapping[str, Tensor], store: SplitStore) -> Tensor:
    try:
        return store.singular_values(weights[name], name)
    except LoricaError as error:
        raise LoricaError(f"{name}: {error}") from error


def _count(option: str, amount: float | int, entry: PlanEntry) -> int:
    if isinstance(amount, float):
        return policies.share_to_count(amount, entry.limit)
    if amount > entry.limit:
        raise LoricaError(
            f"{option} = {amount} is out of range for {entry.name} ({entry.shape[0]} x {entry.shape[1]}): "
            f"0 to {entry.limit}"
        )
    return amount


def _with_pattern(entries: list[PlanEntry], rank_pattern: Mapping[str, float | int]) -> list[PlanEntry]:
    for pattern, amount in rank_pattern.items():
        _amount(f"rank_pattern[{pattern!r}]", amount)
        compiled = user_pattern("rank_pattern", pattern)
        hits = [i for i, entry in enumerate(entries) if ends_in(entry.name, compiled)]
        if not hits:
            raise LoricaError(f"rank_pattern: {pattern!r} matches none of the {len(entries)} constrained weights")
        for i in hits:
            k = _count(f"rank_pattern[{pattern!r}]", amount, entries[i])
            entries[i] = entries[i].model_copy(update={"k": k, "why": f"rank_pattern {pattern!r}: {amount:g}"})
    return entries
