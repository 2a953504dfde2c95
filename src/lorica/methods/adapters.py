"""PEFT's LoRA layers for one task: put into a plain model, trained, merged into its weights again.

Shape suffixes: M output rows, N input columns, R rank of the adapter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.constrain.linear import matrix_of
from lorica.constrain.planning import plan
from lorica.constrain.protect import freeze_all_but, release
from lorica.errors import LoricaError
from lorica.methods.base import Progress, Targets
from lorica.methods.task import TaskData
from lorica.subspace.linalg import split

Factors = tuple[Tensor, Tensor]
"""A (R x N) and B (M x R) of one weight."""

Start = Callable[[str, Tensor], Factors]
"""Given a module's name and its weight (M x N), the factors that its adapter starts from."""

_NAME = "default"


@dataclass(frozen=True)
class AdapterOptions(Targets):
    """What adapters with a scale of 1 are told.

    Attributes:
        r: rank of each adapter, 1 or more.
        dropout: probability with which an input of the adapter, not of the weight, is dropped, 0 to below 1.
    """

    r: int = 8
    dropout: float = 0.0

    @property
    def alpha(self) -> float:
        """The product of the factors counts ``alpha / r`` times."""
        return self.r

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r = {self.r} is out of range: a rank of 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} is out of range: a probability from 0 to below 1")


@dataclass(frozen=True)
class LoraOptions(AdapterOptions):
    """What adapters that start from zero are told; the defaults are those of O-LoRA's published code.

    Attributes:
        alpha: the adapter counts ``alpha / r`` times, above 0.
    """

    dropout: float = 0.1
    alpha: float = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha = {self.alpha} is out of range: above 0")


class Adapters:
    """A LoRA on each targeted weight of a model, from the start of a task to its end.

        y = W x + (alpha / r) B A dropout(x)

    W is frozen; A and B train in float32 (float64 for float64 weights), whatever the weight is stored in. A
    starts from ``task.seed`` and the task's index alone, uniform in +-1/sqrt(N), B from zero; or both from
    ``start``, and their product is taken from the weight, so that the model computes what it did before.

    Args:
        model: plain; changed in place until ``merge``.
        task: the task that begins.
        options: its targets are those of ``lorica.plan``, so that methods train the same weights; every other
            parameter is frozen unless ``train_also`` names it.
        start: called for each weight before anything is changed.
        progress: called as ``progress(name, done, total)`` after each call of ``start``.

    Attributes:
        layers: PEFT's LoRA layers by the name of the module that each one wraps.

    Raises:
        LoricaError: PEFT is not installed, a pattern matches nothing, or a module cannot have an adapter. The
            model is then as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        task: TaskData,
        options: AdapterOptions,
        start: Start | None = None,
        progress: Progress | None = None,
    ) -> None:
        trained = plan(
            model,
            1.0,
            target_modules=options.target_modules,
            train_also=options.train_also,
            freeze_experts=options.freeze_experts,
        )
        targets = {name: model.get_submodule(name) for name in trained.names()}
        _refuse_shared(model, targets)
        factors = _started(targets, start, progress) if start else {}
        config = _config(options, targets)
        freeze_all_but(model, trained, [])
        also = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model, self._tuner = model, _injected(model, config, task, targets)
        self.layers = _lora_layers(model)
        for parameter in also:  # PEFT freezes everything but its own
            parameter.requires_grad_(True)
        for layer in self.layers.values():
            _widen(layer)
        for name, (a_RN, b_MR) in factors.items():
            _begin_at(self.layers[name], a_RN, b_MR)

    def factors(self) -> dict[str, Factors]:
        """Return the parameters A and B of each adapter, by module name."""
        return {name: _parameters(layer) for name, layer in self.layers.items()}

    def merge(self) -> None:
        """Add each adapter to its weight, rounded once to the weight's dtype, and leave the model plain."""
        with torch.no_grad():
            self._tuner.merge_and_unload()
        release(self._model)


def singular_factors(end: Literal["top", "bottom"], r: int) -> Start:
    """Return the start at the r largest ("top") or smallest ("bottom") singular triplets of each weight.

        A = sqrt(S_r) V_r^T        B = U_r sqrt(S_r)        so that B A = U_r S_r V_r^T

    The split is float64 and the frozen rest is taken from the float32 factors; PEFT's own ``"pissa"`` rounds the
    factors to the weight's dtype after it took the rest, which doubles the error of a bfloat16 start. A triplet
    with singular value 0 has zero factors, which never move.
    """

    def start(name: str, weight_MN: Tensor) -> Factors:
        limit = min(weight_MN.shape)
        if r > limit:
            raise LoricaError(f"r = {r} is more than the {limit} directions of {name}; lower r")
        taken = slice(0, r) if end == "top" else slice(limit - r, limit)
        triplets = split(weight_MN, r if end == "top" else limit)
        root_R = triplets.sigma_S[taken].sqrt()
        return (triplets.v_NK[:, taken] * root_R).T, triplets.u_MK[:, taken] * root_R

    return start


def _started(targets: Mapping[str, nn.Module], start: Start, progress: Progress | None) -> dict[str, Factors]:
    factors = {}
    for done, (name, module) in enumerate(targets.items(), start=1):
        factors[name] = start(name, matrix_of(module).detach())
        if progress:
            progress(name, done, len(targets))
    return factors


def _refuse_shared(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in targets.items():
        if places[id(module)] > 1:
            raise LoricaError(f"{name} is used in more than one place, and PEFT would adapt one; narrow target_modules")


def _config(options: AdapterOptions, targets: Mapping[str, nn.Module]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # a quotient is all that is made of it
        lora_dropout=options.dropout,
        target_modules="|".join(re.escape(name) for name in targets),
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in targets.values()),
    )


def _injected(model: nn.Module, config: Any, task: TaskData, targets: Mapping[str, nn.Module]) -> Any:
    """Put the adapters in and return PEFT's handle of them.

    PEFT takes some names of a mixture of experts (``mlp.gate_proj``) for those of its experts in an older layout.
    """
    from peft import LoraModel

    modules = dict(model.named_modules())
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU
            torch.manual_seed(task.seed * 100_003 + task.index)
            tuner = LoraModel(model, config, _NAME)
        if _lora_layers(model).keys() != targets.keys():
            raise ValueError("it would adapt other modules than these")
    except ValueError as error:
        for name, module in modules.items():
            if name and model.get_submodule(name) is not module:
                model.set_submodule(name, module)
        vars(model).pop("peft_config", None)
        release(model)
        raise LoricaError(f"PEFT cannot adapt {', '.join(targets)}: {error}; narrow target_modules") from error
    return tuner


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _parameters(layer: Any) -> Factors:
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight


def _widen(layer: Any) -> None:
    wide = torch.float64 if layer.base_layer.weight.dtype == torch.float64 else torch.float32
    layer.lora_A[_NAME].to(wide)
    layer.lora_B[_NAME].to(wide)
    layer.train(layer.base_layer.training)


@torch.no_grad()
def _begin_at(layer: Any, a_RN: Tensor, b_MR: Tensor) -> None:
    for parameter, value in zip(_parameters(layer), (a_RN, b_MR), strict=True):
        parameter.copy_(value)
    weight = layer.base_layer.weight
    weight.copy_(weight - layer.get_delta_weight(_NAME))  # in the adapter's dtype, rounded once
