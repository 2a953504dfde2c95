"""A callback that makes the Trainer's checkpoints complete or invisible, and resumes from them exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica.errors import LoricaError
from lorica.training.checkpoints import STATE, checkpoints_in
from lorica.training.manifest import write_manifest
from lorica.training.states import load_tree, random_state, save_tree, set_random_state


class CheckpointKeeper(TrainerCallback):
    """Writes what the Trainer would pickle as safetensors and JSON, the manifest last, and only then removes old ones.

    As a context it takes both over from the Trainer: ``save_only_model`` and ``save_total_limit`` are set so that it
    neither pickles nor removes, and are as they were afterwards.

    Args:
        arguments: of the Trainer.
        resume: the checkpoint to go on from.
        scaler: of mixed precision in float16.
    """

    def __init__(self, arguments: TrainingArguments, resume: str | None) -> None:
        self.arguments, self.resume = arguments, resume
        self.keeps_state, self.limit = not arguments.save_only_model, arguments.save_total_limit
        self.scaler: Any = None
        self._random: Any = None

    def __enter__(self) -> CheckpointKeeper:
        self.arguments.save_only_model, self.arguments.save_total_limit = True, None
        return self

    def __exit__(self, *error: object) -> None:
        self.arguments.save_only_model, self.arguments.save_total_limit = not self.keeps_state, self.limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resume is None:
            return
        try:
            tree = load_tree(Path(self.resume) / STATE, "state")
            kwargs["optimizer"].load_state_dict(tree["optimizer"])
            kwargs["lr_scheduler"].load_state_dict(tree["scheduler"])
            if self.scaler is not None:
                self.scaler.load_state_dict(tree["scaler"])
            self._random = tree["random"]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise LoricaError(f"{self.resume}: the optimizer's state cannot be taken over: {error}") from error

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.epoch is not None and state.epoch == int(state.epoch):
            self._restore_random()  # before the epoch's batches are drawn, as it was

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restore_random()  # after the batches of the steps that were done are skipped

    def _restore_random(self) -> None:
        if self._random is not None:
            set_random_state(self._random)
            self._random = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        output_dir = Path(str(args.output_dir))
        folder = output_dir / f"checkpoint-{state.global_step}"
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nothing reads, and can hold a token
        if self.keeps_state:
            tree = {
                "optimizer": kwargs["optimizer"].state_dict(),
                "scheduler": kwargs["lr_scheduler"].state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler is not None else None,
                "random": random_state(),
            }
            (folder / STATE).mkdir(exist_ok=True)
            save_tree(tree, folder / STATE, "state")
        write_manifest(folder)
        self._remove_old(output_dir, state.best_model_checkpoint)

    def _remove_old(self, output_dir: Path, best: str | None) -> None:
        if not self.limit or self.limit < 0:
            return
        kept = Path(best).name if best else None
        old = checkpoints_in(output_dir)[: -self.limit]
        for folder in old:
            if folder.name != kept:
                shutil.rmtree(folder)
