"""What a method is: a few hooks around training that is always the Trainer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.config import UpdateConfig
from lorica.constrain.audit_report import AuditReport
from lorica.constrain.kept import KeptBases
from lorica.errors import LoricaError, did_you_mean, one_line
from lorica.methods.forgetting import Forgetting
from lorica.methods.options import checked_options
from lorica.methods.task import Rows, TaskData
from lorica.registry import Registry
from lorica.subspace.calibration import Progress as Progress
from lorica.subspace.plan import Plan


@dataclass(frozen=True)
class Targets:
    """Which weights a method trains; every method takes these options.

    Attributes:
        target_modules: names or regular expressions; default: all linear layers of the blocks.
        train_also: regular expressions of other parameters that train freely.
        freeze_experts: leave 3-D expert weights of a mixture of experts frozen and train the rest.
    """

    target_modules: Sequence[str] | None = None
    train_also: Sequence[str] = ()
    freeze_experts: bool = False


class Method:
    """One way to learn a stream of tasks without losing what came before. The default of every hook does nothing.

    One object lives through a whole stream: for each task ``begin_task``, training with ``training_data``,
    ``penalty`` and ``wrap_optimizer``, then ``audit`` and ``end_task``. What it remembers from task to task is
    ``state_dict``, and nothing else, so that a stream can be stopped and gone on with between any two tasks. Within a
    task it goes on from what ``begin_task`` makes of the same model and memory, ``kept`` and ``training_state``.
    A method never calls ``backward`` or ``step``: the Trainer is the loop.

    Attributes:
        options: an ``options_type``.
        plan: what the current task trains, once it has begun; None for methods without a plan.
    """

    summary: ClassVar[str] = ""
    """One line for ``lorica list``."""

    stores: ClassVar[str] = "nothing"
    """What it carries from task to task, in words; the bytes are measured from ``state_dict``."""

    reproduction: ClassVar[str] = ""
    """How far it is known to be the published method: what its definition is tested against, and which figures."""

    needs_old_data: ClassVar[bool] = False
    """Whether it sees rows of earlier tasks."""

    needs_task_id: ClassVar[bool] = False
    """Whether a row can be answered only by who knows which task it belongs to."""

    extra: ClassVar[str] = ""
    """The optional package that it cannot do without, which is also the name of Lorica's extra."""

    restarts: ClassVar[bool] = False
    """Whether every task starts from the model that came in, not from the one that the task before left."""

    bound: ClassVar[bool] = False
    """Whether it is an upper bound on a whole stream rather than a way to learn one task after another."""

    learning_rate_scale: ClassVar[float] = 1.0
    """Factor on the default learning rate; adapters need about ten times that of full fine-tuning."""

    options_type: ClassVar[type[Targets]] = Targets
    """The dataclass of its options."""

    plan: Plan | None = None

    forgetting: Forgetting | None = None
    """How far the finished task moved the model's predictions, where that was asked for."""

    kept: KeptBases | None = None
    """What an interrupted training of the task that begins had split the weights into; nothing is then split anew. To
    be set before ``begin_task``."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def build(cls, given: Mapping[str, Any]) -> Self:
        """Return the method with options by name.

        Raises:
            LoricaError: an option that the method does not have, a value of the wrong type or out of range, or a
                package is missing.
        """
        if cls.extra and find_spec(cls.extra) is None:
            raise LoricaError(f"the method needs the package {cls.extra}: pip install 'lorica[{cls.extra}]'")
        return cls(checked_options(cls.options_type, given))

    def learns(self, task: TaskData) -> bool:
        """Tell whether there is training for this task; ``joint`` waits for the last."""
        return True

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        """Prepare the model for a task, in place; called before the optimizer is built."""

    def to_keep(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Return what ``begin_task`` split the weights into, tensors by name, for ``kept``; None: it split nothing.

        It stays the same while the task trains. What is empty but not None keeps the plan.
        """
        return None

    def training_state(self) -> Any:
        """Return what was gathered in this task's steps so far, nested data and tensors; None where nothing is."""
        return None

    def load_training_state(self, state: Any) -> None:
        """Take over what ``training_state`` returned, once the optimizer of the same task is there."""

    def training_data(self, task: TaskData) -> Rows:
        """Return the rows to train on."""
        return task.rows

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        """Return what is added to the loss of a training batch, in the loss's unit (nats per trained token).

        Args:
            model: in training.
            inputs: the batch, with ``labels``.
            logits: what the model made of it.
        """
        return None

    def wrap_optimizer(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        """Return the optimizer to train with; called once a task, with the Trainer's optimizer."""
        return optimizer

    @property
    def clips(self) -> bool:
        """Whether the optimizer of ``wrap_optimizer`` clips gradients itself, so that the Trainer must not."""
        return False

    def audit(self, model: nn.Module) -> AuditReport | None:
        """Return the proof of the constraint after training, or None for a method without one."""
        return None

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        """Take from the trained model what is to be remembered, and make it plain again, in place."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is carried from task to task, tensors by name; empty where nothing is."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what an earlier ``state_dict`` returned."""


METHODS: Registry[type[Method]] = Registry("method")


def build_method(name: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> Method:
    """Return the method of an update.

    Args:
        name: of the method.
        given: the options of the update that are the method's too, such as ``target_modules``.
        own: its further ones, ``--method_options``.

    Raises:
        LoricaError: see ``Method.build``; each message names the method and, where some are given, --method_options.
    """
    kind = METHODS[name]
    known = [f.name for f in fields(kind.options_type) if f.name not in {*UpdateConfig.model_fields, *given}]
    for option in own:
        if option in UpdateConfig.model_fields:
            raise LoricaError(f"--method_options {option}: that is an option of its own; give it as --{option}")
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            hint = did_you_mean(option, known)
            raise LoricaError(f"--method_options {option}: unknown option of method {name!r}; {takes}.{hint}")
    try:
        return kind.build({**given, **own})
    except LoricaError as error:
        pairs = one_line(" ".join(f"{option}={value}" for option, value in own.items()), limit=100)
        raise LoricaError(f"--method {name}{' --method_options ' * bool(own)}{pairs}: {error}") from error
