"""What Lorica overrides or reads of transformers' Trainer is there, and called as it expects."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from lorica.training.trainer import MethodMixin

OVERRIDDEN = {
    "create_optimizer", "train", "log", "evaluate", "compute_loss", "training_step", "get_batch_samples",
    "prediction_step", "_run_epoch", "_load_from_checkpoint", "_load_best_model", "_save", "_get_grad_norm",
    "_get_num_items_in_batch", "get_train_dataloader",
}  # fmt: skip
READ = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_save_checkpoint")


def test_these_are_all_that_is_overridden() -> None:
    own = {name for name, value in vars(MethodMixin).items() if callable(value)}
    assert {name for name in own if hasattr(Trainer, name)} - {"__init__"} == OVERRIDDEN


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_the_trainer_has_what_is_overridden(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(kind, name)).parameters for kind in (Trainer, MethodMixin))
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in ours.values())
    assert takes_all or set(theirs) <= set(ours), f"{name} takes {set(theirs) - set(ours)} besides"


@pytest.mark.parametrize("name", READ)
def test_the_trainer_has_what_is_read(name: str) -> None:
    assert f"self.{name}" in inspect.getsource(inspect.getmodule(Trainer))  # type: ignore[arg-type]
