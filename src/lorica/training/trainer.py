"""transformers' Trainer with a method's optimizer and penalty. Nothing else of the loop is ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PrinterCallback, Seq2SeqTrainer, Trainer, TrainingArguments

from lorica import processes
from lorica.data.dataset import EncodedDataset
from lorica.data.dealing import TokenBalanced
from lorica.data.example import IGNORED_LABEL
from lorica.data.parts import in_parts, told_of_memory
from lorica.errors import Interrupted, LoricaError
from lorica.methods.base import Method
from lorica.methods.task import Collate, Rows
from lorica.training.guards import ScaleWatch, WeightWatch
from lorica.training.in_backward import OPTION, StepInBackward, check_embeddings, check_method
from lorica.training.interrupt import SignalCatcher
from lorica.training.keeper import CheckpointKeeper
from lorica.training.manifest import damage
from lorica.training.micro_batches import MicroBatches
from lorica.training.padding_free import flat_collator
from lorica.training.rows import Numbered, NumberedCollate, tokens_of
from lorica.training.states import random_state, set_random_state
from lorica.training.stops import Stops, check_same_bases
from lorica.training.zero import UnderZero, state_of


class MethodMixin(UnderZero, Stops):
    """Lets a method wrap the optimizer that the Trainer builds, and add to the loss. Put it before a Trainer class.

    It also stops a run before a loss, a gradient or a weight that is no number does harm, runs micro-batches that do
    not fit into memory in parts (``MicroBatches``), and leaves no trace of an evaluation.

    Args:
        method: the method; its ``begin_task`` has been called.
        rows: what is trained on.
        collate: makes a batch of rows.
        optimizer_in_backward: step each parameter as soon as the backward pass has its gradient.
        padding_free: lay the rows of a training batch end to end instead.
    """

    def __init__(
        self: Any, *, method: Method, rows: Rows, collate: Collate, optimizer_in_backward: bool = False,
        padding_free: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        if optimizer_in_backward:
            check_method(method)
        self.method, self.rows, self.in_backward = method, rows, optimizer_in_backward
        self.model_state = state_of(kwargs["model"], kwargs["args"])
        self.stepper: StepInBackward | None = None
        self._scoring, self.padding_free = False, padding_free
        trained = flat_collator(kwargs["model"]) if padding_free else collate
        super().__init__(train_dataset=Numbered(rows), data_collator=NumberedCollate(trained, collate), **kwargs)
        assert not self.args.remove_unused_columns, "the rows' numbers would be removed"
        self.max_grad_norm = self.args.max_grad_norm
        if method.clips:
            self.args.max_grad_norm = 0.0
        self.micro_batches = MicroBatches(
            rows, trained, self._trained, self.args.train_batch_size,
            once=self._why_once(), method=method, tell=self._note,
        )  # fmt: skip
        self.add_callback(WeightWatch(self._stop_at_weight))
        self.add_callback(ScaleWatch(self.accelerator, self._stop_at_scale))

    def _why_once(self: Any) -> str | None:
        """Return why a step that has begun cannot be run again."""
        if self.in_backward:
            return f"--{OPTION} takes a part of the step before it shows"
        return "the other processes have gone on with it" if self.args.world_size > 1 else None

    def create_optimizer(self: Any, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            super().create_optimizer(model)  # type: ignore[misc]
            wrapped: Any = self.method.wrap_optimizer(self.optimizer, self.max_grad_norm)
            self._check_optimizer(self.optimizer, wrapped)
            if processes.in_step(self.model):  # torch cannot load the parts of a state with an empty group
                wrapped.param_groups[:] = [group for group in wrapped.param_groups if group["params"]]
            if self.in_backward:
                check_embeddings(self.model, wrapped)
                wrapped = self.stepper = StepInBackward(wrapped, self._check_gradient)
            self.optimizer = wrapped
        return self.optimizer

    def get_train_dataloader(self: Any) -> Any:
        """Return the batches of this process: of every step about as many tokens as the others'."""
        loader, args = super().get_train_dataloader(), self.args  # type: ignore[misc]
        if args.world_size > 1 and args.train_sampling_strategy != "batch_rebalance":  # which shares out by itself
            whole = loader.batch_sampler.batch_sampler  # of all processes
            balanced = TokenBalanced(
                whole.sampler, lambda number: tokens_of(self.rows[number]), size=whole.batch_size,
                ranks=args.world_size, rounds=args.gradient_accumulation_steps, padded=not self.padding_free,
                drop_last=whole.drop_last,
            )  # fmt: skip
            loader.set_sampler(balanced)
        return loader

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with told_of_memory(self._after_the_passes):
                return super().train(*args, **kwargs)
        finally:
            if self.stepper is not None:
                self.stepper.remove()

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.in_backward:
            logs.pop("grad_norm", None)  # of gradients that are gone by then
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _run_epoch(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # resumed from its last checkpoint a run has no step left
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.model_state.load(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self: Any) -> None:
        best = Path(self.state.best_model_checkpoint)
        if wrong := damage(best):
            raise LoricaError(f"{best} is the best model: {wrong}; go on from a checkpoint before it, or begin anew")
        if not self.model_state.load(best):
            super()._load_best_model()  # type: ignore[misc]

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the model and the tokenizer; the Trainer's own would add a pickle, which can hold a token."""
        folder = self.args.output_dir if output_dir is None else output_dir
        self.model_state.save(Path(folder))
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        random, training = random_state(), self.model.training  # the batches' loader draws a number, for one
        try:
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            set_random_state(random)
            self.model.train(training)
            processes.reshard(self.model)

    def prediction_step(
        self: Any, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the loss of a batch; in parts where memory runs out, each weighted by what it trains."""
        assert prediction_loss_only
        one_pass = super().prediction_step  # type: ignore[misc]
        self._scoring = True

        def shares(rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
            part = {name: value[rows[0] : rows[-1] + 1] for name, value in inputs.items()}
            return [(one_pass(model, part, True, *args, **kwargs)[0], self._trained(part["labels"]))]

        try:
            parts = in_parts(shares, range(len(inputs["labels"])), in_step=processes.in_step(self.model))
        finally:
            self._scoring = False
        if len(parts) == 1:
            return parts[0][0], None, None
        counts = torch.stack([count for _, count in parts])
        return sum(loss * count for loss, count in parts) / counts.sum(), None, None

    def _get_num_items_in_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        # In scoring a batch's loss is its own mean, and one that is run in halves is not counted with other processes.
        return None if self._scoring else super()._get_num_items_in_batch(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.micro_batches.begin_step(self.state.global_step + 1, batches)
        return batches, num_items_in_batch

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        one_pass = super().training_step
        loss: Tensor = self.micro_batches.run(
            inputs,
            lambda batch, trained: one_pass(
                model, batch, trained if num_items_in_batch is None else num_items_in_batch
            ),
            model.zero_grad,
        )
        self._check_loss(loss)
        return loss

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        if self.label_smoother is not None and self.model.config.is_encoder_decoder:  # which the labels are taken from
            inputs = {**inputs, "decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels=labels)}
        # Without a count the model returns the mean over this micro-batch. With one, some sum and divide by it and
        # some (T5) ignore it, and the Trainer would add such means up as if they were sums.
        loss, outputs = super().compute_loss(model, inputs, True, None)  # type: ignore[misc]
        extra = (
            self.method.penalty(self.model, {**inputs, "labels": labels}, outputs.logits) if model.training else None
        )
        # So a penalty is the same however a step is split.
        share = 1.0 if num_items_in_batch is None else self._trained(labels) / num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            share = share * self.args.world_size  # they were counted over all processes, whose gradients are averaged
        loss = (loss if extra is None else loss + extra) * share
        if self.in_backward and model.training:
            self._check_loss(loss)  # afterwards the weights would be no numbers either
        return (loss, outputs) if return_outputs else loss

    def _trained(self: Any, labels: Tensor) -> Tensor:
        """Return how many labels are trained. A loss is a mean over them, weighted by their share of a step's labels;
        where the Trainer divides by the number of micro-batches instead, of a micro-batch's labels."""
        shifted = labels.dim() == 2 and not self.model.config.is_encoder_decoder
        return (labels[:, 1:] if shifted else labels).ne(IGNORED_LABEL).sum()

    def _get_grad_norm(self: Any, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        if self.accelerator.scaler is None and not math.isfinite(norm):  # else the scaler skips the step
            raise self._all_diverged(f"the norm of the gradients is {float(norm)}", self.micro_batches.whole_step)
        return norm


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
    reset_optimizer: bool = False,
    optimizer_in_backward: bool = False,
    padding_free: bool = False,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Train a prepared model on a dataset and return the Trainer's log; ``notice`` are what a record should hold.

    Args:
        model: plain or protected; ``method.begin_task`` has been called on it.
        collate: makes a batch of rows.
        arguments: transformers' TrainingArguments, without ``remove_unused_columns``.
        eval_dataset: for ``eval_strategy``.
        resume_from_checkpoint: a folder of ``checkpoint_to_resume``.
        reset_optimizer: go on from there with a new optimizer state.
        optimizer_in_backward: see ``StepInBackward``; the arguments have gone through ``check_in_backward``.
        padding_free: see ``FlatCollator``; the model has gone through ``check_keeps_rows_apart``.
        quiet: print none of the Trainer's log.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint of the last finished step was written first.
        Diverged: the loss, a gradient or a weight became NaN or infinite.
        LoricaError: the method or the optimizer cannot step in the backward pass; or a row does not fit into memory.
    """
    check_same_bases(model)
    kind = MethodSeq2SeqTrainer if model.config.is_encoder_decoder else MethodTrainer
    with (
        SignalCatcher() as catcher,
        CheckpointKeeper(arguments, resume_from_checkpoint, catcher, reset_optimizer=reset_optimizer) as keeper,
    ):
        trainer = kind(
            method=method,
            rows=dataset,
            collate=collate,
            optimizer_in_backward=optimizer_in_backward,
            padding_free=padding_free,
            model=model,
            args=arguments,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[catcher, keeper],
        )
        keeper.trainer = trainer
        if arguments.fp16 and trainer.accelerator.scaler is None:
            raise LoricaError(f"--fp16 has no effect on {arguments.device}, which knows bfloat16: give --bf16")
        if quiet:
            trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        # Mixed precision wraps ``forward`` on the model itself; without this it would stay there.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
        if (signum := catcher.agreed()) is not None:
            raise Interrupted(signum, str(keeper.keep()))
    log: list[dict[str, float]] = trainer.state.log_history
    log[-1]["train_runtime"] += keeper.state.seconds
    return log
