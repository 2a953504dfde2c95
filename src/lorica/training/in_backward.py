"""The optimizer's step in the backward pass: each parameter is stepped, and its gradient freed, as soon as it is there.

One gradient lives at a time instead of all of them. What needs all gradients together, clipping before all, cannot be
had with it, and is refused.

Source:
    LOMO, arXiv 2306.09782 (fused gradient computation and update); torch's "How to save memory by fusing the
    optimizer step into the backward pass".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from lorica.constrain.optimizer import ConstrainedOptimizer, DelegatingOptimizer
from lorica.errors import LoricaError
from lorica.methods.base import Method

OPTION = "optimizer_in_backward"
REFUSED = {
    "lomo": "steps in the backward pass by itself",
    "adalomo": "steps in the backward pass by itself",
    "grokadamw": "clips all gradients together",
}
"""Optimizers of the Trainer's that cannot be wrapped, and why; those whose name ends in ``layerwise`` as ``lomo``."""


class StepInBackward(DelegatingOptimizer):
    """Any optimizer whose parameters are stepped one by one, each when the backward pass has its gradient.

    The weights after ``loss.backward(); step()`` are those of the inner optimizer without clipping, bit for bit, as
    long as it steps each parameter by itself; one that keeps a count for all of them is refused at the first step.
    Hooks on the inner optimizer's step run for each parameter, and see a group of this parameter alone.

    ``step`` closes a step: call it after each backward pass. A parameter whose gradient comes twice before that
    (gradient accumulation, a second backward pass, a layer shared between re-entrant checkpoints) is an error.

    Args:
        inner: the optimizer that steps. Do not go on using it by itself.
        check: called with each parameter once its gradient is there, before the step; raises where it is no number.

    Raises:
        LoricaError: it is a ``ConstrainedOptimizer``, which needs all gradients together.
    """

    def __init__(self, inner: Optimizer, check: Callable[[nn.Parameter], None] | None = None) -> None:
        if isinstance(inner, ConstrainedOptimizer):
            raise LoricaError(f"{OPTION}: a ConstrainedOptimizer projects and clips all gradients together")
        super().__init__(inner)
        self.check = check
        self._stepped: set[nn.Parameter] = set()
        self._groups: dict[nn.Parameter, int] = {}
        self._hooks: list[Any] = []
        for index in range(len(inner.param_groups)):
            self._watch(index)

    def _watch(self, index: int) -> None:
        for parameter in self.inner.param_groups[index]["params"]:
            self._groups[parameter] = index
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._step_one))

    def _step_one(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter in self._stepped:
            raise LoricaError(
                f"{OPTION}: a gradient of shape {tuple(parameter.shape)} came twice in one step (gradient "
                "accumulation, a second backward pass, or re-entrant checkpointing of a shared layer); leave it out"
            )
        self._stepped.add(parameter)
        if self.check is not None:
            self.check(parameter)
        # Looked up each time: load_state_dict makes new groups, and schedulers write to those.
        groups = self.inner.param_groups
        whole = groups[self._groups[parameter]]
        alone = {**whole, "params": [parameter]}
        self.inner.param_groups = [alone]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = groups
        _check_untouched(self.inner, whole, alone)
        parameter.grad = None

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Close the step; every parameter has been stepped already.

        Raises:
            LoricaError: a closure is given; it would run another backward pass.
        """
        if closure is not None:
            raise LoricaError(
                f"{OPTION}: the step has no closure; optimizers that need one cannot step in the backward"
            )
        self._stepped.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: gradients are gone once they are used."""

    def remove(self) -> None:
        """Take the hooks off the parameters; a later backward pass then steps nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)
        self._watch(len(self.inner.param_groups) - 1)


def _check_untouched(inner: Optimizer, whole: dict[str, Any], alone: dict[str, Any]) -> None:
    """Refuse an optimizer that keeps counts of its steps in a group, which would count every parameter."""
    for name, value in alone.items():
        if name != "params" and value is not whole.get(name):
            raise LoricaError(
                f"{OPTION}: {type(inner).__name__} keeps {name!r} for all parameters together; choose another --optim"
            )


def check_in_backward(arguments: TrainingArguments) -> None:
    """Refuse training arguments with which no parameter can be stepped before all gradients are there."""
    if arguments.max_grad_norm and arguments.max_grad_norm > 0:
        raise LoricaError(
            f"--{OPTION}: clipping to --max_grad_norm {arguments.max_grad_norm:g} needs the norm of all "
            "gradients, which are never there together; give --max_grad_norm 0"
        )
    if arguments.gradient_accumulation_steps > 1:
        raise LoricaError(
            f"--{OPTION} steps at every backward pass; give --gradient_accumulation_steps 1 and, for as many rows a "
            "step, a larger --per_device_train_batch_size"
        )
    optim = OptimizerNames(arguments.optim).value
    if why := REFUSED.get("lomo" if optim.endswith("layerwise") else optim):
        raise LoricaError(f"--{OPTION}: --optim {optim} {why}; give one of them")
    if arguments.fp16:
        raise LoricaError(f"--{OPTION}: --fp16 scales the loss and must see all gradients before a step; give --bf16")


def check_method(method: Method) -> None:
    """Refuse a method that looks at, projects or clips all gradients together; its ``begin_task`` has been called."""
    if method.clips:
        raise LoricaError(
            f"--{OPTION}: this method projects or watches the gradients of all weights together before each step; "
            "leave the option out, or choose a method and a constraint that protect (lorica list)"
        )


def check_embeddings(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse bitsandbytes for embeddings that train: it keeps their states wide by their place among all parameters."""
    trained = any(isinstance(layer, nn.Embedding) and layer.weight.requires_grad for layer in model.modules())
    if trained and type(optimizer).__module__.startswith("bitsandbytes"):
        raise LoricaError(
            f"--{OPTION}: embeddings cannot train with it and bitsandbytes; leave them out of train_also, or choose "
            "another --optim"
        )
