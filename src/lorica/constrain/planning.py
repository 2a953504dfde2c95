"""``lorica.plan``: decide what is protected in which weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lorica.constrain.linear import matrix_of
from lorica.constrain.plan_counts import counts, marginal_entries, spectra, wanted, with_pattern
from lorica.constrain.plan_options import as_given, check_choices, check_tokens, check_used, protected_amount
from lorica.constrain.protect import fitting_targets
from lorica.constrain.sharded_plan import add_up, check_numbers, sharded_layers, sums_at_owners
from lorica.constrain.targets import check_whole, family, find_targets
from lorica.constrain.transport import put_back
from lorica.errors import LoricaError
from lorica.subspace.calibration import Batch, Progress, own_text, random_tokens
from lorica.subspace.factor import Factors
from lorica.subspace.measure import measure
from lorica.subspace.observe import InputStatistics, observe
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import MEASURED, Constraint, PlanEntry, Source, default_constraint

RANDOM_LENGTH = 64
"""Length of the sequences of random tokens, where the model has that many positions."""

RANDOM_TOKENS = 4096
"""How many random tokens calibrate, where nobody says."""


def plan(
    model: nn.Module,
    unfreeze_rank_ratio: float | None = None,
    *,
    ranks: str = "uniform",
    source: Source = "weight",
    constraint: Constraint | None = None,
    calibration: Iterable[Batch] | str | None = None,
    calibration_tokens: int | None = None,
    target_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, float | int] | None = None,
    train_also: str | Sequence[str] = (),
    freeze_experts: bool = False,
    effective_rank: float | int | None = None,
    osft_unfreeze_rank_ratio: float | None = None,
    mrr: float | None = None,
    trr: float | None = None,
    expected_forgetting: float | None = None,
    earlier: Mapping[str, Factors] | None = None,
    beyond: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Decide what is protected in which weight; nothing is changed yet.

    With r the protected share of a weight and s the number of its directions, ``k = floor(r s)``, where r is

    - ``uniform``: ``1 - unfreeze_rank_ratio``;
    - ``importance``: ``mrr + I_l (trr - mrr)``, I_l the mean cosine between the layer's inputs and outputs
      over the calibration batches, normalised to mean 1 (the paper's adaptive rule);
    - ``energy``: the least share that holds ``1 - unfreeze_rank_ratio`` of the squared spectrum;
    - ``effective-rank``: exp of the spectrum's entropy, over s.

    ``marginal`` counts each side by itself: the directions are handed out one by one, each where it spares the most
    expected forgetting per degree of freedom (``lorica.subspace.marginal``), until as many degrees of freedom are left
    as ``uniform`` would leave, or until ``expected_forgetting`` is reached.

    Args:
        model: a Hugging Face model, or any ``nn.Module`` with linear layers.
        unfreeze_rank_ratio: share of the directions that stays trainable, 0 (nothing moves) to 1 (plain
            training); 0.25 by default. For ``uniform``, ``energy`` and ``marginal``.
        ranks: one of ``lorica.subspace.ranks.RANKS``.
        source: ``weight`` (top singular directions of W, the paper), ``activation`` (principal directions
            of the layer's inputs over the calibration batches), ``curvature`` (these, and the principal directions of
            the loss's gradients by its outputs: the K-FAC factors, labels sampled from the model) or ``hybrid`` (of
            the k input directions half principal inputs, half right singular vectors; see
            ``lorica.subspace.sources.hybrid_inputs``).
        constraint: ``two-sided`` (default for ``weight`` and ``curvature``), ``input`` (default for ``activation``
            and ``hybrid``), ``output`` or ``block``. ``activation`` knows ``input`` only, ``hybrid`` also
            ``two-sided``.
        calibration: batches as the model takes them; "self", text that the model writes by itself (causal
            models); or "random", random tokens. The last two need no data. For ``importance`` and every source
            but ``weight``. Processes that share a model give equally many batches each, and count all of them.
        calibration_tokens: how many tokens "self" and "random" are, at least 1; 32,768 and 4,096 by default.
        target_modules: see ``find_targets``; default: all linear layers of the blocks.
        rank_pattern: protected share (float, 0 to 1) or count (int) for modules whose name ends in the
            given regular expression, over whatever ``ranks`` says.
        train_also: a regular expression, or several, of parameter names outside the constrained weights that
            train freely, in their own dtype; all others are frozen.
        freeze_experts: for mixtures of experts: freeze the experts' 3-D weights and go on.
        effective_rank: PEFT's name for the protected part: an int counts directions, a float is a share.
        osft_unfreeze_rank_ratio: mini_trainer's name for ``unfreeze_rank_ratio``.
        expected_forgetting: for ``marginal``, instead of an amount: the forgetting expected of an update, to second
            order, over that of an update of the same norm in all directions, 0 to 1.
        earlier: what finished tasks left behind (``FactorMemory.factors``), to count beside the calibration; for the
            sources that measure.
        beyond: how many directions of a side that is measured are told apart besides the protected ones.
        progress: called as ``progress(name, done, total)`` while the model writes its text and is measured.
        mrr, trr: minimum and target retention ratio of ``importance``, 0 to 1; 0.1 and 0.8 by default.

    Returns:
        A plan: print it, save it, edit it, give it to ``protect``.

    Raises:
        LoricaError: an unknown name, a value out of range, a value that the policy does not use, a pattern
            that matches nothing, a weight that cannot be constrained.
    """
    constraint = constraint or default_constraint(source)
    check_choices(ranks=ranks, source=source, constraint=constraint)
    amounts: dict[str, float | int | None] = {
        "unfreeze_rank_ratio": unfreeze_rank_ratio,
        "osft_unfreeze_rank_ratio": osft_unfreeze_rank_ratio,
        "effective_rank": effective_rank,
    }
    check_used(ranks, amounts | {"mrr": mrr, "trr": trr, "expected_forgetting": expected_forgetting})
    protected = protected_amount(amounts)
    put_back(model)
    targets = find_targets(model, target_modules, freeze_experts=freeze_experts)
    sharded = sharded_layers(targets)
    if ranks == "marginal":
        if rank_pattern:
            raise LoricaError("rank_pattern has no effect with ranks 'marginal', which hands directions out by itself")
        check_whole(targets, "ranks 'marginal' (it compares what was measured of all)")
    if source not in MEASURED and ranks != "importance" and calibration is not None:
        raise LoricaError(
            f"{as_given(calibration)} has no effect with source {source!r} and ranks {ranks!r}; leave it out"
        )
    check_tokens(calibration_tokens, calibration, measured=source in MEASURED or ranks == "importance")
    if source not in MEASURED and earlier:
        raise LoricaError(f"earlier (what finished tasks left behind) has no effect with source {source!r}")
    batches: list[Batch] = []
    if ranks == "importance" or source in MEASURED:
        check_numbers(model)
        needed_by = f"source {source!r}" if source in MEASURED else f"ranks {ranks!r}"
        batches = list(calibration_batches(model, calibration, needed_by, calibration_tokens, progress))
    observed: dict[str, InputStatistics] = {}
    if ranks == "importance":
        observed = observe(model, targets, batches, moments=False, whole=bool(sharded), progress=progress)
        add_up(model, observed, sharded)
    shapes = {name: matrix_of(module).shape for name, module in targets.items()}
    entries = [
        PlanEntry(name=name, shape=(m, n), k=0, source=source, constraint=constraint) for name, (m, n) in shapes.items()
    ]
    retention = (0.1 if mrr is None else mrr, 0.8 if trr is None else trr)
    width = max(min(shape) for shape in shapes.values())
    count = counts(ranks, protected, width, spectra(model, targets, sharded, ranks), observed, retention)
    result = Plan(
        family=family(model),
        entries=with_pattern([entry.model_copy(update=count(entry)) for entry in entries], rank_pattern or {}),
        train_also=[train_also] if isinstance(train_also, str) else list(train_also),
    )
    if source not in MEASURED:
        return result
    sides = {entry.name: wanted(entry, marginal=ranks == "marginal", beyond=beyond) for entry in result.entries}
    factors = measure(model, targets, batches, sides, earlier=earlier, progress=progress, **_shared(model, sharded))
    if ranks == "marginal":
        result.entries = marginal_entries(result.entries, factors, expected_forgetting)
    return result.with_measured(factors=factors)


def measured_anew(
    model: nn.Module,
    finished: Plan,
    calibration: Iterable[Batch] | str | None,
    *,
    calibration_tokens: int | None = None,
    earlier: Mapping[str, Factors] | None = None,
    beyond: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Return a plan that was read from a file with the measured directions that it asks for.

    A file says how many directions of which source are protected, not which they are: those are the model's that is
    at hand, on these inputs.

    Args:
        model: unprotected.
        finished: what is protected, left as it is; what it holds measured already stays.
        calibration, calibration_tokens, earlier, beyond, progress: as for ``plan``.

    Raises:
        LoricaError: see ``plan``; or the plan does not fit the model.
    """
    check_tokens(calibration_tokens, calibration, measured=True)
    put_back(model)
    targets, entries = fitting_targets(model, finished), finished.unmeasured
    check_numbers(model)
    needed_by = f"a plan with source {entries[0].source!r}"
    batches = list(calibration_batches(model, calibration, needed_by, calibration_tokens, progress))
    sides = {entry.name: wanted(entry, marginal=False, beyond=beyond) for entry in entries}
    layers = {entry.name: targets[entry.name] for entry in entries}
    sharded = sharded_layers(targets)
    found = measure(model, layers, batches, sides, earlier=earlier, progress=progress, **_shared(model, sharded))
    held = {name: known for name in finished.names() if (known := finished.factors(name)) is not None}
    return finished.with_measured(factors=held | found)


def _shared(model: nn.Module, sharded: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return how processes measure a model that they share: each all batches of its own whole, then their sums."""
    return {"together": sums_at_owners(model, sharded), "whole": True} if sharded else {}


def calibration_batches(
    model: nn.Module,
    calibration: Iterable[Batch] | str | None,
    needed_by: str,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> Iterable[Batch]:
    """Return the batches that ``calibration`` of ``plan`` stands for.

    Args:
        needed_by: what the errors name.
        tokens, progress: ``calibration_tokens`` and ``progress`` of ``plan``.

    Raises:
        LoricaError: it is none, or the model cannot make them.
    """
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
    if calibration == "self" and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise LoricaError(
            "calibration 'self': processes that share a model may write texts of several lengths and then wait for "
            "each other; give 'random' or batches (calibration_file)"
        )
    if calibration == "self":
        own = partial(own_text, model, progress=progress)
        return own() if tokens is None else own(tokens=tokens)
    decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    length = min(RANDOM_LENGTH, getattr(model.config, "max_position_embeddings", None) or RANDOM_LENGTH)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    sequences = -(-(tokens or RANDOM_TOKENS) // length)
    return random_tokens(vocabulary, sequences=sequences, length=length, decoder=decoder)
