"""One true training step on meta tensors: what is alive at its peak, and the work it does."""

from __future__ import annotations

import inspect
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.forecast.device_kernels import KernelsOf
from lorica.forecast.ledger import LOSS, Ledger, Operation
from lorica.methods.base import Method
from lorica.methods.osft import OSFT
from lorica.training.in_backward import StepInBackward


@dataclass(frozen=True)
class Batch:
    """The size of one micro-batch.

    Attributes:
        rows: of the batch.
        length: tokens of each row, padding included.
        labels: tokens of each target, of an encoder-decoder; None for causal models.
        masked: whether attention takes a mask of all pairs of tokens: what keeps rows that lie end to end apart.
    """

    rows: int
    length: int
    labels: int | None = None
    masked: bool = False

    def tensors(self) -> dict[str, Tensor]:
        ids = torch.empty(self.rows, self.length, dtype=torch.int64, device="meta")
        labels = ids if self.labels is None else ids.new_empty(self.rows, self.labels)
        pairs = (self.rows, 1, self.length, self.length)
        mask = ids.new_empty(pairs, dtype=torch.bool) if self.masked else ids.clone()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels.clone()}


@dataclass(frozen=True)
class Step:
    """What one optimizer step takes.

    Attributes:
        peak: bytes at the peak, by kind; of the weights' device.
        host: bytes that lie on the host instead, such as W0 of the memory mode ``lean``.
        small: bytes of activations in small pieces, together at most; see ``Ledger``.
        steady: bytes between two steps, by kind.
        micro: the work of one forward and backward pass.
        update: the work of clipping, the optimizer, and folding.
        trainable: numbers that train.
    """

    peak: Counter[str]
    host: Counter[str]
    small: int
    steady: Counter[str]
    micro: Counter[Operation]
    update: Counter[Operation]
    trainable: int


def dry_step(
    model: Any, method: Method, batch: Batch, arguments: TrainingArguments, device: str, *, in_backward: bool = False
) -> Step:
    """Take two steps with a blank model, the second of them with the optimizer's states in place, and look at it.

    Args:
        model: on the meta device, prepared by ``method.begin_task``.
        device: "cpu" or "cuda": whose kernels are meant.
        in_backward: as ``optimizer_in_backward`` of the configuration.

    Raises:
        LoricaError: the optimizer cannot be built from shapes.
    """
    narrow = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    if arguments.activation_checkpointing:
        # A mode for functions is off inside ``backward``, where the checkpoints are computed again.
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), KernelsOf(device, narrow))}
        given = arguments.activation_checkpointing_kwargs
        own = given if isinstance(given, dict) else {}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=own | again)
    ledger = Ledger()
    host = _own_model(ledger, model)
    if isinstance(method, OSFT) and method.curvature is not None:
        ledger.own("curvature", method.curvature.to_keep().values())
    _mark_gradients(ledger, model)
    mark_logits(ledger, model)
    optimizer = _optimizer(ledger, model, method, arguments, device)
    if in_backward:
        optimizer = StepInBackward(optimizer)
    run = _Run(model, method, optimizer, batch, arguments, ledger)
    with KernelsOf(device, narrow), ledger:
        run.step()
        ledger.own("optimizer states", _states(optimizer))
        ledger.restart()
        micro, update = run.step()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Step(ledger.peak, host, ledger.small, Counter(ledger.now), micro, update, trainable)


def dry_score(model: Any, batch: Batch, device: str) -> Counter[str]:
    """Return the bytes at the peak, by kind, of scoring a batch: a forward pass that keeps keys and values."""
    ledger = Ledger()
    _own_model(ledger, model)
    mark_logits(ledger, model)
    training = model.training
    with torch.no_grad(), KernelsOf(device), ledger:
        model.eval()(**batch.tensors())
    model.train(training)
    return ledger.peak


@dataclass
class _Run:
    model: Any
    method: Method
    optimizer: Optimizer
    batch: Batch
    arguments: TrainingArguments
    ledger: Ledger

    def step(self) -> tuple[Counter[Operation], Counter[Operation]]:
        """Take a step as the Trainer does; return the work of one micro-batch and of all that follows."""
        before = Counter(self.ledger.work)
        for _ in range(min(self.arguments.gradient_accumulation_steps, 2)):  # a third adds no memory
            before = Counter(self.ledger.work)
            self._backward()
        micro = self.ledger.work - before
        before = Counter(self.ledger.work)
        if self.arguments.max_grad_norm and not self.method.clips:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
        return micro, self.ledger.work - before

    def _backward(self) -> None:
        inputs = self.batch.tensors()
        outputs = self.model(**inputs, use_cache=False)
        # Accelerate makes the outputs of mixed precision float32.
        logits = outputs.logits.float() if self.arguments.bf16 or self.arguments.fp16 else outputs.logits
        extra = self.method.penalty(self.model, inputs, logits)
        loss = outputs.loss if extra is None else outputs.loss + extra
        del outputs, logits
        loss.backward()


def _own_model(ledger: Ledger, model: nn.Module) -> Counter[str]:
    """Tell the ledger what each tensor of a model is for; return the bytes that lie on the host instead."""
    ledger.own("weights", [*model.parameters(), *model.buffers()])
    host: Counter[str] = Counter()
    for layer in protected_layers(model).values():
        bases = [*layer.out_basis.buffers(), *layer.in_basis.buffers()]
        if "base" in layer._buffers:
            ledger.own("W0", [layer.base])
        else:
            host["W0"] += ledger.elsewhere([layer.base])
            host["bases"] += ledger.elsewhere(b for basis in layer._exact or () for b in basis.buffers())
        ledger.own("bases", bases)
        ledger.own("cores", [layer.core])
    return host


def _mark_gradients(ledger: Ledger, model: nn.Module) -> None:
    def mark(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.own("gradients", [parameter.grad])

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(mark)


def mark_logits(ledger: Ledger, model: Any) -> None:
    """What is made from the output head on, until the backward pass comes back to it, counts as the loss's."""

    def into_loss(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        ledger.kind = LOSS
        if args[0].requires_grad:
            args[0].register_hook(back)

    def back(gradient: Tensor) -> None:
        ledger.kind = "activations"

    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(into_loss)


def _optimizer(ledger: Ledger, model: Any, method: Method, arguments: TrainingArguments, device: str) -> Optimizer:
    """Return the optimizer that the Trainer would build, in a form that runs on meta tensors."""
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        fused = bool(options.pop("fused", False))
        if device == "cuda" and not fused and "foreach" in inspect.signature(kind).parameters:
            options["foreach"] = True
        optimizer = kind([p for p in model.parameters() if p.requires_grad], **options)
    except (ValueError, ImportError, RuntimeError, NotImplementedError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise LoricaError(f"--optim {arguments.optim} cannot be forecast: {reason}") from error
    if fused:
        optimizer.register_step_pre_hook(lambda *_: ledger.pause())
        optimizer.register_step_post_hook(lambda *_: ledger.resume(_fused_step(optimizer)))
    return method.wrap_optimizer(optimizer, arguments.max_grad_norm)


def _fused_step(optimizer: Optimizer) -> Operation:
    """Return the work of a kernel that reads gradients, and reads and writes parameters and states, once."""
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    states = [s for p in stepped for s in optimizer.state[p].values() if isinstance(s, Tensor)]
    nbytes = sum(p.grad.nbytes for p in stepped if p.grad is not None)
    return Operation(0, nbytes + 2 * sum(t.nbytes for t in (*stepped, *states)), narrow=False)


def _states(optimizer: Optimizer) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
