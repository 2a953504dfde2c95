"""The methods that are compared, each on the same one-layer model that is then copied to its full depth.

All train the linear layers of the blocks; ``all`` in a name means every parameter. The optimizer is fused AdamW
without weight decay in every row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

import lorica
from benchmarks.gpu.models import freeze_outside_blocks

RATE = 1e-5


def _nothing(model: Any) -> Any:
    return model


def _frozen(model: Any) -> Any:
    freeze_outside_blocks(model)
    return model


def _protected(share: float, memory: str) -> Callable[[Any], Any]:
    def prepare(model: Any) -> Any:
        return lorica.protect(model, lorica.plan(model, effective_rank=share), memory=memory)

    return prepare


def _with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, target_modules=r".*_proj"))


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        dtype: of the weights.
        autocast: whether forward and backward run under bfloat16 autocast: for float32 (master) weights.
        prepare: what is done to the one-layer model.
        finish: what is done to the model at its full depth; returns the model to train.
        share: what part of the directions is protected, None where that means nothing.
        package: what has to be installed.
    """

    name: str
    prepare: Callable[[Any], Any] = _frozen
    finish: Callable[[Any], Any] = _nothing
    dtype: torch.dtype = torch.bfloat16
    share: float | None = None
    package: str = "torch"

    @property
    def autocast(self) -> bool:
        return self.dtype == torch.float32

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


PLAIN = Method("plain bf16")
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        PLAIN,
        Method("plain fp32 master", dtype=torch.float32),
        Method("plain fp32 master, all", prepare=_nothing, dtype=torch.float32),
        Method("LoRA r=16", prepare=_nothing, finish=_with_lora, package="peft"),
        *(
            Method(f"lorica {memory} {share:g}", prepare=_protected(share, memory), share=share)
            for memory in ("fast", "lean")
            for share in (0.5, 0.75, 0.9)
        ),
    )
}


def adamw(model: nn.Module) -> AdamW:
    """Return the one optimizer of this suite."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0, fused=True)
