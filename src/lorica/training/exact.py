"""Everything but the weights on which the next step or the log depends, so that a resumed run is the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from transformers import TrainerState

from lorica import processes
from lorica.errors import LoricaError
from lorica.training.states import random_state, set_random_state

SCHEDULED = {"learning_rate", "num_train_epochs", "max_steps"}
"""Training arguments from which the learning rate of a step follows."""

SETTINGS = (*sorted(SCHEDULED), "weight_decay")
"""Training arguments that the saved state would override."""


class TrainingState:
    """The state of a Trainer between two steps: optimizer, schedule, random generators, method, log.

    Args:
        trainer: has a ``method``.

    Attributes:
        seconds: how long earlier processes have trained.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seconds = 0.0
        self._began = time.perf_counter()
        self._random_at_epoch: Any = None
        self._to_restore: Mapping[str, Any] | None = None

    def tree(self) -> dict[str, Any]:
        """Return the state as nested data and tensors, all but the optimizer's; these are its own."""
        trainer, scaler = self.trainer, self.trainer.accelerator.scaler
        state = {
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "method": trainer.method.training_state(),
            "settings": {name: getattr(trainer.args, name) for name in SETTINGS},
            "seconds": self.seconds + time.perf_counter() - self._began,
            "processes": processes.size(),
        }
        return state | self.own()

    def own(self) -> dict[str, Any]:
        """Return what of the state each of several processes has for itself."""
        return {
            "random": random_state(),
            "random_at_epoch": self._random_at_epoch,
            "log": {"loss": self.trainer._tr_loss, "logged": self.trainer._globalstep_last_logged},
        }

    def load(self, tree: Mapping[str, Any], take_optimizer: Callable[[], None] | None) -> None:
        """Take over what ``tree`` returned; call it when the Trainer has made its optimizer and its schedule.

        Where its ``SETTINGS`` are others than they were, it goes on with the new ones.

        Args:
            tree: all but the optimizer's state.
            take_optimizer: takes over that; None: it begins anew, at the rate that the schedule has reached.

        Raises:
            KeyError, ValueError, TypeError: it is of another Trainer.
            LoricaError: a change cannot be made.
        """
        trainer, scaler = self.trainer, self.trainer.accelerator.scaler
        asked = [dict(group) for group in trainer.optimizer.param_groups]
        trainer.lr_scheduler.load_state_dict(tree["scheduler"])
        if take_optimizer is not None:
            take_optimizer()
        else:
            for group, rate in zip(trainer.optimizer.param_groups, tree["scheduler"]["_last_lr"], strict=True):
                group["lr"] = rate
        self._change({name for name in SETTINGS if tree["settings"][name] != getattr(trainer.args, name)}, asked)
        if scaler is not None:
            scaler.load_state_dict(tree["scaler"])
        trainer.method.load_training_state(tree["method"])
        loss = tree["log"]["loss"]
        trainer._tr_loss += loss.to(trainer._tr_loss)
        trainer._total_loss_scalar -= loss.item()  # the mean at the end is that of this process's steps
        trainer._globalstep_last_logged = tree["log"]["logged"]
        self.seconds = tree["seconds"]
        self._to_restore = tree

    def _change(self, changed: Set[str], asked: Sequence[Mapping[str, Any]]) -> None:
        groups, schedule = self.trainer.optimizer.param_groups, self.trainer.lr_scheduler
        if changed & SCHEDULED and not hasattr(schedule, "lr_lambdas"):
            raise LoricaError(
                f"--allow_changed {min(changed & SCHEDULED)}: a {type(schedule).__name__} goes by what it has seen so "
                "far; it cannot go on with another rate or length"
            )
        for name, key in {"weight_decay": "weight_decay", "learning_rate": "initial_lr"}.items():
            for group, own in zip(groups, asked, strict=True) if name in changed else ():
                group[key] = own[key]
        if changed & SCHEDULED:
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = rate * factor(schedule.last_epoch)

    def at_epoch_begin(self, state: TrainerState) -> None:
        """Set the random generators as they were when the epoch's order was drawn."""
        if self._to_restore is not None:
            between = at_epoch_end(state)
            set_random_state(self._to_restore["random" if between else "random_at_epoch"])
            self._to_restore = None if between else self._to_restore
        self._random_at_epoch = random_state()

    def at_step_begin(self) -> None:
        """Set the random generators as they were; the batches of the steps that were done have been skipped."""
        if self._to_restore is not None:
            set_random_state(self._to_restore["random"])
            self._to_restore = None


def at_epoch_end(state: TrainerState) -> bool:
    """Tell whether all batches of an epoch have been trained on, and none of the next."""
    return state.epoch is not None and state.epoch == int(state.epoch)
