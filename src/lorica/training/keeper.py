"""A callback that makes the Trainer's checkpoints complete or invisible, and resumes from them exactly."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica import processes
from lorica.constrain.kept import write_held
from lorica.errors import LoricaError
from lorica.files import remove_folder, writing
from lorica.training.checkpoints import STATE, bases_of, checkpoints_in, note_bases
from lorica.training.exact import TrainingState, at_epoch_end
from lorica.training.interrupt import SignalCatcher
from lorica.training.manifest import MANIFEST, damage, write_manifest
from lorica.training.output import stored_bytes
from lorica.training.states import load_tree, save_tree


class CheckpointKeeper(TrainerCallback):
    """Writes what the Trainer would pickle as safetensors and JSON, the manifest last, and only then removes old ones.

    With the first checkpoint the method's bases are written beside it; they are the same for all that follow. A
    checkpoint that is due at the end of an epoch, or of the training, is written after what else is done there, so that
    none of it is lost.

    As a context it takes both over from the Trainer: ``save_only_model`` and ``save_total_limit`` are set so that it
    neither pickles nor removes, and are as they were afterwards.

    Args:
        arguments: of the Trainer.
        resume: the checkpoint to go on from.
        catcher: a checkpoint that is written because of a signal is one to resume from, whatever is asked for.
        reset_optimizer: leave the optimizer's state of the checkpoint alone and begin a new one.

    Attributes:
        trainer: set it before training begins.
        state: of the trainer.
    """

    trainer: Any
    state: TrainingState

    def __init__(
        self,
        arguments: TrainingArguments,
        resume: str | None,
        catcher: SignalCatcher,
        *,
        reset_optimizer: bool = False,
    ) -> None:
        self.arguments, self.resume, self.catcher = arguments, resume, catcher
        self.reset_optimizer = reset_optimizer
        self.keeps_state, self.limit = not arguments.save_only_model, arguments.save_total_limit
        self._starts_with_scores = bool(arguments.eval_on_start)
        self._ends_with_best = bool(arguments.load_best_model_at_end)
        self._bases = bases_of(Path(resume)) if resume else None
        self._due = False
        self._model: Any = None
        self._optimizer: Any = None
        self._folder: Path | None = None

    def __enter__(self) -> CheckpointKeeper:
        self.arguments.save_only_model, self.arguments.save_total_limit = True, None
        self.arguments.eval_on_start = self._starts_with_scores and self.resume is None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.arguments.save_only_model, self.arguments.save_total_limit = not self.keeps_state, self.limit
        self.arguments.eval_on_start = self._starts_with_scores
        self.arguments.load_best_model_at_end = self._ends_with_best
        if isinstance(error, Exception) and processes.first():
            self._take_back(error)

    def _take_back(self, error: Exception) -> None:
        """Remove a checkpoint that was not finished; where the system took no more, tell what it needs."""
        folder = self._folder
        begun = folder is not None and (folder.is_dir() or str(folder) in str(error))
        if folder is None or not begun or (folder / MANIFEST).exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        with writing(folder, needs=self._bytes):
            raise error

    def _bytes(self) -> int:
        states = tree_leaves(list(self._optimizer.state.values()))
        return stored_bytes(self._model) + sum(leaf.nbytes for leaf in states if isinstance(leaf, Tensor))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._model, self._optimizer = kwargs["model"], kwargs["optimizer"]
        self.state = TrainingState(self.trainer)
        if self.resume is None:
            return
        state.compute_steps(args, state.max_steps)  # else those of the checkpoint would go on
        if self._ends_with_best:
            state.best_model_checkpoint = self._best_before(Path(self.resume))
        place = Path(self.resume) / STATE
        try:
            found = load_tree(place, "state")
            alike = found["processes"] == processes.size()  # else all go on with what the first one had for itself
            own = load_tree(place, processes.name()) if alike and not processes.first() else {}
            take = partial(self.trainer.model_state.load_optimizer, self._optimizer, place)
            self.state.load(found | own, None if self.reset_optimizer else take)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise LoricaError(f"{self.resume}: the optimizer's state cannot be taken over: {error}") from error

    def _best_before(self, resume: Path) -> str | None:
        """Return the best of the checkpoints so far, wherever the run was when it was noted; None: there is none."""
        noted = TrainerState.load_from_json(str(resume / "trainer_state.json")).best_model_checkpoint
        best = resume.parent / Path(noted).name if noted else None
        if best is not None and (wrong := damage(best)):
            raise LoricaError(
                f"{best} is the best so far, which --load_best_model_at_end may need: {wrong}; name a checkpoint from "
                "before it, or begin anew in another --output_dir"
            )
        return None if best is None else str(best)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.state.at_epoch_begin(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.state.at_step_begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"  # if any is written next
        self._due = control.should_save and (at_epoch_end(state) or state.global_step >= state.max_steps)
        control.should_save = control.should_save and not self._due
        if control.should_training_stop and state.global_step < state.max_steps:
            args.load_best_model_at_end = False  # of a run that is stopped the checkpoint may be written afterwards
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_save = control.should_save or self._due
        self._due = False
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        stopping = self.catcher.agreed() is not None
        if self.keeps_state or stopping:
            self._write_state(folder / STATE)
            self._keep_bases(folder)
        processes.by_first(lambda: self._complete(folder, state.best_model_checkpoint))

    def _write_state(self, place: Path) -> None:
        with processes.agreed():
            place.mkdir(parents=True, exist_ok=True)  # the first process may not have come so far
            if processes.first():
                save_tree(self.state.tree(), place, "state")
            else:
                save_tree(self.state.own(), place, processes.name())
        self.trainer.model_state.save_optimizer(self._optimizer, place)

    def _complete(self, folder: Path, best: str | None) -> None:
        write_manifest(folder)
        self._remove_old(folder, best)

    def _keep_bases(self, folder: Path) -> None:
        method = self.trainer.method
        tensors = method.to_keep(self._model) if self._bases is None else None
        if tensors is not None:
            self._bases = write_held(folder.parent, method.plan, tensors)
        if self._bases is not None and processes.first():
            note_bases(folder, self._bases)

    def keep(self) -> Path | None:
        """Return the checkpoint of the last step, written now if it has not been; None if no step was taken."""
        trainer, step = self.trainer, self.trainer.state.global_step
        folder = Path(str(self.arguments.output_dir)) / f"checkpoint-{step}"
        missing = step and not ((folder / MANIFEST).exists() and (folder / STATE).is_dir())
        if processes.largest(int(missing and processes.first())):
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(self.arguments, trainer.state, trainer.control)
        return folder if step else None

    def _remove_old(self, newest: Path, best: str | None) -> None:
        """Remove what is more than the limit, in which the best one counts; it and the newest stay.

        Above the newest lie those that a resumed run has passed over.
        """
        if not self.limit or self.limit < 0:
            return
        kept = Path(best).name if best else None
        found = checkpoints_in(newest.parent)
        place = found.index(newest)
        in_order = found[place + 1 :] + found[: place + 1]
        in_order.sort(key=lambda folder: (folder == newest, folder.name == kept))
        for folder in in_order[: -self.limit]:
            if folder.name != kept:
                remove_folder(folder)
