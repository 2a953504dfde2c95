"""transformers' Trainer with a method's optimizer. Nothing else of the loop is ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PrinterCallback, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset
from lorica.errors import Interrupted, LoricaError
from lorica.methods.base import Method
from lorica.training.checkpoints import WithoutPickledArguments
from lorica.training.interrupt import SignalCatcher


class MethodMixin:
    """Lets a method wrap the optimizer that the Trainer builds. Put it before a Trainer class.

    Args:
        method: the method; its ``begin_task`` has been called.
    """

    def __init__(self: Any, *args: Any, method: Method, **kwargs: Any) -> None:
        self.method = method
        super().__init__(*args, **kwargs)
        self.max_grad_norm = self.args.max_grad_norm
        if method.clips:
            self.args.max_grad_norm = 0.0

    def create_optimizer(self: Any, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            super().create_optimizer(model)  # type: ignore[misc]
            self.optimizer = self.method.wrap_optimizer(self.optimizer, self.max_grad_norm)
        return self.optimizer

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not loss.isfinite():
            last = get_last_checkpoint(self.args.output_dir)
            kept = f"the last checkpoint is {last}" if last else "no checkpoint was written yet"
            raise LoricaError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; training stopped before that step. "
                f"Lower --learning_rate or look at the rows; {kept}"
            )
        return loss


class MethodTrainer(MethodMixin, Trainer):
    """``Trainer`` with a method."""


class MethodSeq2SeqTrainer(MethodMixin, Seq2SeqTrainer):
    """``Seq2SeqTrainer`` with a method."""


def fit(
    model: Any,
    method: Method,
    dataset: EncodedDataset,
    tokenizer: Any,
    arguments: TrainingArguments,
    *,
    eval_dataset: EncodedDataset | None = None,
    resume_from_checkpoint: str | bool | None = None,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Train a prepared model on a dataset and return the Trainer's log.

    Args:
        model: plain or protected; ``method.begin_task`` has been called on it.
        arguments: transformers' TrainingArguments.
        eval_dataset: for ``eval_strategy``.
        resume_from_checkpoint: as in ``Trainer.train``.
        quiet: print none of the Trainer's log.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    seq2seq = bool(model.config.is_encoder_decoder)
    kind = MethodSeq2SeqTrainer if seq2seq else MethodTrainer
    with SignalCatcher() as catcher:
        trainer = kind(
            method=method,
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=Collator(tokenizer, seq2seq=seq2seq),
            processing_class=tokenizer,
            callbacks=[catcher, WithoutPickledArguments()],
        )
        if quiet:
            trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        # Mixed precision wraps ``forward`` on the model itself; without this it would stay there.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if catcher.signum is not None:
        raise Interrupted(catcher.signum, f"{arguments.output_dir}/checkpoint-{trainer.state.global_step}")
    return trainer.state.log_history
