"""``lorica check --measure``: what a plan protects of a model as it is, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from lorica.config import UpdateConfig
from lorica.constrain.linear import matrix_of
from lorica.constrain.planning import calibration_batches
from lorica.constrain.protect import release
from lorica.errors import LoricaError
from lorica.forecast.measuring import given_rows, longest_row
from lorica.forecast.result import columns
from lorica.forecast.story import device_of
from lorica.inputs import Inputs, asked_of
from lorica.lineage import read_lineage
from lorica.methods import TaskData, build_method
from lorica.methods.carried import LONGEST
from lorica.methods.osft import OSFT, default_calibration
from lorica.methods.own_texts import amount_for, extent_of
from lorica.methods.protection import given_options
from lorica.preset import with_preset
from lorica.subspace.answers import own_answers
from lorica.subspace.calibration import TOKENS
from lorica.subspace.factor import Factors
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.prediction import EnergyShares, Outlook, both_factors, kind_of
from lorica.subspace.sources import Protected, protected_directions
from lorica.subspace.store import SplitStore
from lorica.training.models import load_model, load_model_config, load_tokenizer, pinned, position_limit

ALL = "all"
_NONE = "-"


@dataclass(frozen=True)
class Protection:
    """What one plan protects.

    Attributes:
        source, constraint: of the plan.
        groups: by kind of layer, and of all layers.
    """

    source: str
    constraint: str
    groups: dict[str, Outlook]

    @classmethod
    def of(cls, planned: Iterable[tuple[PlanEntry, Protected]], factors: dict[str, Factors]) -> Self:
        """Return that of entries and what is protected in them."""
        kinds: dict[str, list[Outlook]] = {}
        for entry, directions in planned:
            one = Outlook.of(factors[entry.name], directions, entry.constraint)
            kinds.setdefault(kind_of(entry.name), []).append(one)
        every = [one for parts in kinds.values() for one in parts]
        groups = {kind: Outlook.together(parts) for kind, parts in kinds.items()}
        return cls(entry.source, entry.constraint, groups | {ALL: Outlook.together(every)})

    def to_json(self) -> dict[str, Any]:
        groups = {name: one.to_json() for name, one in self.groups.items()}
        return {"source": self.source, "constraint": self.constraint, "groups": groups}

    def table(self) -> str:
        """Return it as text: a row for each kind of layer."""
        head = ["inputs", "random", "best", "outputs", "random", "best", "expected forgetting"]
        rows = [
            (name, [*_cells(one.inputs), *_cells(one.outputs), _percent(one.expected)])
            for name, one in self.groups.items()
        ]
        title = f"protected by source {self.source}, constraint {self.constraint}: share of the energy"
        return "\n".join([title, *columns(rows, head)])


def measured(config: UpdateConfig) -> list[Protection]:
    """Load the model of an update, begin the update as ``lorica.train`` would, and return what its plan protects.

    And for comparison what as large a share of each weight's own top directions would, under the same constraint. Both
    Kronecker factors of every weight are measured for that, whatever the source.

    Raises:
        LoricaError: the method has no plan, or training would refuse the options.
    """
    settings = pinned(config)
    if settings.method != "osft":
        raise LoricaError(f"--measure looks at the plan of method osft; --method {settings.method} has none")
    model_config = load_model_config(settings)
    settings = with_preset(settings, model_config)
    model = load_model(settings, model_config, device_of(settings))
    lineage = read_lineage(settings.model_name_or_path)
    longest = int(lineage.remembered("osft", LONGEST) or 0)
    method = _method(_as_much_written(settings, model_config, longest), model_config)
    method.load_state_dict(lineage.memory("osft"))
    seed = int(settings.training.get("seed", 42))
    task = TaskData("check", lineage.updates, lineage.updates + 1, [], dict, seed)  # type: ignore[arg-type]
    method.begin_task(model, task)
    assert method.plan is not None
    factors = _factors(model, method)
    found = [Protection.of(method.protected(model), factors)]
    release(model)
    if found[0].source != "weight":
        found.append(Protection.of(_weights_own(model, method.plan), factors))
    return found


def protection_text(found: Sequence[Protection]) -> str:
    """Return what ``measured`` found as text."""
    told = [
        f"expected forgetting: source {one.source} leaves {_percent(one.groups[ALL].expected)} of what a change of the "
        "same size would cost without protection"
        for one in found
    ]
    return "\n\n".join([*(one.table() for one in found), "\n".join(told)])


def _as_much_written(settings: UpdateConfig, model_config: Any, longest: int) -> UpdateConfig:
    """Return the settings with what training would let the model write in numbers; see ``extent_of``."""
    rows = None
    if settings.source_of_rows and settings.rehearse:
        seq2seq, limit = bool(model_config.is_encoder_decoder), position_limit(model_config)
        rows = Inputs(settings, load_tokenizer(settings), seq2seq=seq2seq, position_limit=limit).train
    amount = amount_for(settings, None if rows is None else extent_of(rows, longest))
    told = {"rehearse_tokens": amount.tokens, "rehearse_length": amount.length}
    return settings.model_copy(update=told if settings.rehearse else {})


def _method(settings: UpdateConfig, model_config: Any) -> OSFT:
    rows = given_rows(settings, model_config)
    given: dict[str, Any] = given_options(settings) | {
        "calibration": settings.calibration if rows is None else rows,
        "plan": Plan.load(settings.plan_file) if settings.plan_file else None,
        "prompts": _prompts(settings, model_config),
        "predict_forgetting": False,
    }
    method = build_method("osft", given, settings.method_options)
    assert isinstance(method, OSFT)
    return method


def _prompts(settings: UpdateConfig, model_config: Any) -> list[list[int]] | None:
    seq2seq, longest = bool(model_config.is_encoder_decoder), longest_row(settings, model_config)
    return asked_of(settings, seq2seq=seq2seq, max_length=longest)


def _factors(model: nn.Module, method: OSFT) -> dict[str, Factors]:
    assert method.plan is not None
    asked, entries = method.protection, method.plan.entries
    calibration = default_calibration(model) if asked.calibration is None else asked.calibration
    if asked.prompts and asked.calibration in (None, "self"):
        calibration = own_answers(model, asked.prompts, tokens=asked.calibration_tokens or TOKENS)
    nbytes = sum(model.get_submodule(entry.name).get_parameter("weight").nbytes for entry in entries)
    return both_factors(
        model, entries, list(calibration_batches(model, calibration, "--measure", asked.calibration_tokens)), nbytes
    )


def _weights_own(model: nn.Module, plan: Plan) -> Iterable[tuple[PlanEntry, Protected]]:
    """Yield entries that protect the weights' own directions instead, as large a share of them."""
    store = SplitStore.from_environment()
    for entry in plan.entries:
        k = round(entry.share * min(entry.shape))
        own = PlanEntry(name=entry.name, shape=entry.shape, k=k, constraint=entry.constraint)
        yield own, protected_directions(matrix_of(model.get_submodule(entry.name)).detach(), own, store=store)


def _cells(shares: EnergyShares | None) -> list[str]:
    return [_NONE] * 3 if shares is None else [_percent(share) for share in shares]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
