"""Which modules of a model are constrained, by architecture. Nothing is skipped in silence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lorica.constrain.linear import WRAPPERS, ZERO_3, SubspaceLayer
from lorica.errors import LoricaError, did_you_mean

_LLAMA = r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj"
_T5 = r"(SelfAttention|EncDecAttention)\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo)"
_BERT = r"attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|(?<!attention\.)output\.dense"

FAMILIES: dict[str, str] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": r"self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj)",
    "gpt2": r"attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj)|crossattention\.(c_attn|q_attn|c_proj)",
    "opt": r"self_attn\.([qkv]_proj|out_proj)|fc1|fc2",
    "t5": _T5,
    "mt5": _T5,
    "bert": _BERT,
    "roberta": _BERT,
    "mixtral": r"self_attn\.[qkvo]_proj",
    "qwen3_moe": _LLAMA,
}
"""Regular expressions over the end of a module's name: all linear layers of the blocks, by ``model_type``."""

ALL_LINEAR = "all-linear"

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What a weight may be stored in."""


def family(model: nn.Module) -> str:
    """Return the architecture, ``config.model_type``, or "unknown" for a model without one."""
    return str(getattr(getattr(model, "config", None), "model_type", "unknown"))


def find_targets(
    model: nn.Module, target_modules: str | Sequence[str] | None = None, *, freeze_experts: bool = False
) -> dict[str, nn.Module]:
    """Return the modules to constrain, by name, in the order of the model.

    Args:
        model: any ``nn.Module``; for a known ``config.model_type`` the default comes from ``FAMILIES``, for
            another it is every linear layer but the output head.
        target_modules: "all-linear" (every linear layer but the output head and classifiers), or one
            regular expression, or a list of names or regular expressions, each matched against the end of
            module names as PEFT does (``["q_proj", "v_proj"]``).
        freeze_experts: leave 3-D expert weights frozen and constrain the rest, instead of refusing.

    Raises:
        LoricaError: a pattern matches nothing, or matches a layer that cannot be constrained (tied,
            quantised, of an unknown type), or the model has 3-D expert weights.
    """
    modules = dict(model.named_modules())
    if target_modules is None:
        target_modules = FAMILIES.get(family(model), ALL_LINEAR)
    if target_modules == ALL_LINEAR:
        chosen = {name: module for name, module in modules.items() if _is_inner_linear(model, name, module)}
        if not chosen:
            raise LoricaError(f"{type(model).__name__} has no linear layer to protect")
    else:
        patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        chosen = _match(modules, patterns)
    _refuse_experts(model, freeze_experts)
    check_targets(model, chosen)
    return chosen


def user_pattern(option: str, pattern: str) -> re.Pattern[str]:
    """Compile a regular expression that the user gave under an option.

    Raises:
        LoricaError: it is none; the message names option and pattern.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise LoricaError(f"{option}: {pattern!r} is no regular expression: {error}") from error


def ends_in(name: str, pattern: re.Pattern[str]) -> bool:
    """Return whether a pattern matches a dotted name from its start, or from a dot, to its end."""
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    return any(pattern.fullmatch(name, start) for start in starts)


def _match(modules: dict[str, nn.Module], patterns: Sequence[str]) -> dict[str, nn.Module]:
    chosen: set[str] = set()
    for pattern in patterns:
        compiled = user_pattern("target_modules", pattern)
        found = {name for name in modules if name and ends_in(name, compiled)}
        if not found:
            leaves = {name.rpartition(".")[2] for name, module in modules.items() if type(module) in WRAPPERS}
            hint = did_you_mean(pattern, leaves) or f" The model's linear layers: {', '.join(sorted(leaves))}."
            raise LoricaError(f"target_modules: {pattern!r} matches no module of the model.{hint}")
        chosen |= found
    return {name: module for name, module in modules.items() if name in chosen}


def _is_inner_linear(model: nn.Module, name: str, module: nn.Module) -> bool:
    heads = {"lm_head", "score", "classifier", "qa_outputs", "cls", "pooler", "router", "gate"}
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter) and module is getter():
        return False
    # Subclasses too: what cannot be protected is refused by name, not skipped.
    return isinstance(module, tuple(WRAPPERS)) and not heads & set(name.split("."))


def _refuse_experts(model: nn.Module, freeze_experts: bool) -> None:
    experts = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    if experts and not freeze_experts:
        raise LoricaError(
            f"{experts[0]} and {len(experts) - 1} more are stacks of expert weights (3-D), which Lorica cannot "
            "protect yet; give freeze_experts=True (--freeze_experts) to leave them frozen and train the rest"
        )


def check_targets(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raise a ``LoricaError`` that names the first of these modules that cannot be protected, and why."""
    if any(isinstance(module, SubspaceLayer) for module in model.modules()):
        raise LoricaError("the model is already protected; call lorica.release(model) first")
    # By module, not by name: one module that is used in two places is no tie.
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    dry_run = all(parameter.is_meta for parameter in model.parameters())  # shapes alone, for a forecast
    for name, module in targets.items():
        _check(name, module, owners, dry_run=dry_run)


def _check(name: str, module: nn.Module, owners: Mapping[int, int], *, dry_run: bool) -> None:
    if isinstance(module, FSDPModule):
        raise LoricaError(f"{name} was given to fully_shard by itself; give it the block that the layer is in")
    if type(module) not in WRAPPERS:
        known = ", ".join(kind.__name__ for kind in WRAPPERS)
        raise LoricaError(
            f"{name} is a {type(module).__name__}, which cannot be protected (only {known}); load the model "
            "unquantised, or narrow target_modules"
        )
    if "forward" in vars(module):
        raise LoricaError(f"{name} has a replaced forward (offloading, device_map); load the model on one device")
    weight = module.get_parameter("weight")
    if hasattr(weight, "ds_id"):
        raise LoricaError(f"{name}: {ZERO_3}")
    if weight.is_meta and not dry_run:
        raise LoricaError(f"{name} has no values yet (meta device); load the weights before lorica.protect")
    if weight.dtype not in DTYPES or type(weight.data) not in (Tensor, DTensor):
        kind = weight.dtype if weight.dtype not in DTYPES else type(weight.data).__name__
        raise LoricaError(f"{name} holds {kind}; load the model unquantised")
    if owners[id(weight)] > 1:
        raise LoricaError(f"{name}.weight is tied to another parameter; leave it out of target_modules")


def check_whole(targets: Mapping[str, nn.Module], what: str) -> None:
    """Refuse weights that are sharded over processes.

    Args:
        what: does not know how to work on them.
    """
    for name, module in targets.items():
        if isinstance(module.weight, DTensor):
            raise LoricaError(f"{what} needs whole weights, and {name}.weight is sharded over processes")


_OUTSIDE = re.compile(r"embed|lm_head|(^|\.)(shared|wte|wpe|head|score|classifier|pooler|router)\.|norm|\.gate\.")


def natural_order(name: str) -> list[int | str]:
    """Return a sort key under which layer 2 comes before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def is_target_key(model_type: str, key: str, shape: Sequence[int]) -> bool:
    """Return whether a state-dict key names a weight that would be constrained by default.

    Without the modules at hand: by the table of families, for an unknown one every matrix that is neither
    an embedding nor a head nor a router.
    """
    name, _, leaf = key.rpartition(".")
    if leaf != "weight" or len(shape) != 2:
        return False
    pattern = FAMILIES.get(model_type)
    if pattern is not None:
        return ends_in(name, re.compile(pattern))
    return _OUTSIDE.search(key) is None
