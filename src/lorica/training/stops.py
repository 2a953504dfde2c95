"""What a Trainer says and raises where a run has to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorica import processes
from lorica.constrain.protect import bases_of
from lorica.errors import LoricaError
from lorica.training.guards import Diverged, last_good_checkpoint
from lorica.training.rows import named


class Stops:
    """The part of ``MethodMixin`` that stops a run: it names the step, the rows and the last good checkpoint."""

    def _check_loss(self: Any, loss: Tensor) -> None:
        with processes.agreed():  # else the others would wait for this one
            if not loss.isfinite():
                raise self._diverged(f"the loss is {loss.item()}", self.micro_batches.current)

    def _check_gradient(self: Any, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if not torch.linalg.vector_norm(parameter.grad).isfinite():
            name = next(name for name, one in self.model.named_parameters() if one is parameter)
            raise self._diverged(f"the gradient of {name} holds NaN or inf", self.micro_batches.current)

    def _stop_at_weight(self: Any, name: str) -> None:
        raise self._all_diverged(f"{name} holds NaN or inf after the optimizer's step,", self.micro_batches.whole_step)

    def _stop_at_scale(self: Any, scale: float, skipped: int) -> None:
        step = self.state.global_step + 1
        raise self._diverged(
            f"the gradients overflow float16 even at a loss scale of {scale:g}, and {skipped} steps in a row were "
            "skipped, the last",
            self.micro_batches.whole_step,
            advice="Give --bf16 instead of --fp16, lower --learning_rate",
            before=step - skipped + 1,
        )

    def _after_the_passes(self: Any) -> str:
        """Tell where it was that no batch can be made smaller."""
        step = self.micro_batches.step
        where = f"after the backward pass of step {step}, in the optimizer's step" if step else "before the first step"
        return (
            f"{where}; the optimizer needs less with --optim adafactor or adamw_bnb_8bit, a lower "
            "--unfreeze_rank_ratio, or --optimizer_in_backward true (lorica check tells how much). Nothing of the step "
            "was saved; " + last_good_checkpoint(self.args.output_dir)
        )

    def _all_diverged(self: Any, what: str, numbers: Sequence[int]) -> LoricaError:
        """Return what all processes raise when they come to the same: the first one tells, of all their rows."""
        if processes.size() == 1:
            return self._diverged(what, numbers)
        every = [number for part in processes.gathered(list(numbers)) for number in part]
        return self._diverged(what, every) if processes.first() else processes.Elsewhere(what)

    def _diverged(
        self: Any, what: str, numbers: Sequence[int], *, advice: str = "Lower --learning_rate", before: float = math.inf
    ) -> Diverged:
        return Diverged(
            f"{what} at step {self.state.global_step + 1}, rows {named(self.rows, numbers)}",
            f"training stopped there. {advice} or look at the rows; "
            + last_good_checkpoint(self.args.output_dir, before),
        )

    def _note(self: Any, notice: str) -> None:
        """Tell of something that the run's record is to hold as well."""
        if processes.first():
            print(f"notice: {notice}")
        self.state.log_history.append({"step": self.state.global_step + 1, "notice": notice})


def check_same_bases(model: nn.Module) -> None:
    """Raise where processes have split the same weights otherwise: their cores would stand for other directions."""
    if processes.size() == 1 or processes.in_step(model):  # of a sharded model each weight is split by one of them
        return
    with torch.no_grad():
        own = {name: float(tensor.sum(dtype=torch.float64)) for name, tensor in bases_of(model).items()}
    for other in processes.gathered(own):
        for name, value in own.items():
            if not math.isclose(value, other.get(name, math.nan), rel_tol=1e-4, abs_tol=1e-3):
                raise LoricaError(
                    f"{name}: the processes have made different bases of the same weight, as other hardware or "
                    "libraries can; let LORICA_CACHE name a folder that all of them see, and start one before the rest"
                )
