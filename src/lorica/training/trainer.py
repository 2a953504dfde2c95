"""transformers' Trainer with a method's optimizer and penalty. Nothing else of the loop is ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PrinterCallback, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lorica.data.dataset import EncodedDataset
from lorica.data.example import IGNORED_LABEL
from lorica.errors import Interrupted, LoricaError
from lorica.methods.base import Method
from lorica.methods.task import Collate, Rows
from lorica.training.checkpoints import load_weights
from lorica.training.in_backward import StepInBackward, check_embeddings, check_method
from lorica.training.interrupt import SignalCatcher
from lorica.training.keeper import CheckpointKeeper


class Diverged(LoricaError):
    """The loss is no number any more.

    Attributes:
        what: the loss and the step, without advice.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")
        self.what = what


class MethodMixin:
    """Lets a method wrap the optimizer that the Trainer builds, and add to the loss. Put it before a Trainer class.

    Args:
        method: the method; its ``begin_task`` has been called.
        optimizer_in_backward: step each parameter as soon as the backward pass has its gradient.
    """

    def __init__(self: Any, *args: Any, method: Method, optimizer_in_backward: bool = False, **kwargs: Any) -> None:
        if optimizer_in_backward:
            check_method(method)
        self.method, self.in_backward = method, optimizer_in_backward
        self.stepper: StepInBackward | None = None
        super().__init__(*args, **kwargs)
        self.max_grad_norm = self.args.max_grad_norm
        if method.clips:
            self.args.max_grad_norm = 0.0

    def create_optimizer(self: Any, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            super().create_optimizer(model)  # type: ignore[misc]
            wrapped: Any = self.method.wrap_optimizer(self.optimizer, self.max_grad_norm)
            if self.in_backward:
                check_embeddings(self.model, wrapped)
                wrapped = self.stepper = StepInBackward(wrapped)
            self.optimizer = wrapped
        return self.optimizer

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self.stepper is not None:
                self.stepper.remove()

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.in_backward:
            logs.pop("grad_norm", None)  # of gradients that are gone by then
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_weights(self.model if model is None else model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        # Without a count the model returns the mean over this micro-batch. With one, some sum and divide by it and
        # some (T5) ignore it, and the Trainer would add such means up as if they were sums.
        loss, outputs = super().compute_loss(model, inputs, True, None)  # type: ignore[misc]
        extra = (
            self.method.penalty(self.model, {**inputs, "labels": labels}, outputs.logits) if model.training else None
        )
        loss = (loss if extra is None else loss + extra) * self._share(labels, num_items_in_batch)
        if self.in_backward and model.training:
            self._check(loss)  # afterwards the weights would be no numbers either
        return (loss, outputs) if return_outputs else loss

    def _share(self: Any, labels: Tensor, num_items_in_batch: Any) -> Any:
        """Return a micro-batch's part of the step's loss, so that a penalty is the same however a step is split.

        Where the model's loss is a sum over the tokens of all micro-batches, so is the penalty; else the Trainer
        divides by the number of micro-batches by itself.
        """
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            return 1.0
        shifted = labels.dim() == 2 and not self.model.config.is_encoder_decoder
        return (labels[:, 1:] if shifted else labels).ne(IGNORED_LABEL).sum() / num_items_in_batch

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._check(loss)
        return loss

    def _check(self: Any, loss: Tensor) -> None:
        """Stop a run whose loss is no number, before the step."""
        if not loss.isfinite():
            last = get_last_checkpoint(self.args.output_dir)
            kept = f"the last checkpoint is {last}" if last else "no checkpoint was written yet"
            raise Diverged(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}",
                f"training stopped before that step. Lower --learning_rate or look at the rows; {kept}",
            )


class MethodTrainer(MethodMixin, Trainer):
    """``Trainer`` with a method."""


class MethodSeq2SeqTrainer(MethodMixin, Seq2SeqTrainer):
    """``Seq2SeqTrainer`` with a method."""


def fit(
    model: Any,
    method: Method,
    dataset: Rows,
    tokenizer: Any,
    collate: Collate,
    arguments: TrainingArguments,
    *,
    eval_dataset: EncodedDataset | None = None,
    resume_from_checkpoint: str | None = None,
    optimizer_in_backward: bool = False,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Train a prepared model on a dataset and return the Trainer's log.

    Args:
        model: plain or protected; ``method.begin_task`` has been called on it.
        collate: makes a batch of rows.
        arguments: transformers' TrainingArguments.
        eval_dataset: for ``eval_strategy``.
        resume_from_checkpoint: a folder of ``checkpoint_to_resume``.
        optimizer_in_backward: see ``StepInBackward``; the arguments have gone through ``check_in_backward``.
        quiet: print none of the Trainer's log.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
        Diverged: the loss became NaN or infinite.
        LoricaError: the method or the optimizer cannot step in the backward pass.
    """
    kind = MethodSeq2SeqTrainer if model.config.is_encoder_decoder else MethodTrainer
    with SignalCatcher() as catcher, CheckpointKeeper(arguments, resume_from_checkpoint) as keeper:
        trainer = kind(
            method=method,
            optimizer_in_backward=optimizer_in_backward,
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[catcher, keeper],
        )
        keeper.scaler = trainer.accelerator.scaler
        if quiet:
            trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        # Mixed precision wraps ``forward`` on the model itself; without this it would stay there.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if catcher.signum is not None:
        raise Interrupted(catcher.signum, f"{arguments.output_dir}/checkpoint-{trainer.state.global_step}")
    return trainer.state.log_history
