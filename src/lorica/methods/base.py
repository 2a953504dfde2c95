"""What a method is: a few hooks around training that is always the Trainer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.config import UpdateConfig
from lorica.constrain.audit_report import AuditReport
from lorica.constrain.kept import KeptBases
from lorica.constrain.origin import MemoryMode
from lorica.errors import LoricaError, did_you_mean, one_line
from lorica.methods.forgetting import Forgetting
from lorica.methods.options import checked_options
from lorica.methods.task import Rows, TaskData
from lorica.registry import Registry
from lorica.subspace.calibration import TOKENS, Batch
from lorica.subspace.plan import MEASURED, Constraint, Plan, Source

Progress = Callable[[str, int, int], None]

REMEMBER_ROWS = 64
"""Default of ``remember_rows``."""

REMEMBER_SIZE = 0.5
"""Default of ``remember_size``."""


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


@dataclass(frozen=True)
class Protection(Targets):
    """What the methods that protect are told: the arguments of ``lorica.plan``, and what holds between tasks.

    Attributes:
        calibration: where none is given and it is needed, "self" for causal models and "random" for others.
        plan: a finished plan, instead of all other options but ``protect_learned``, those of rehearsal and
            ``memory_mode``.
        protect_learned: share of min(M, N), 0 to 1: so many of the top directions of what the finished tasks
            changed in a weight are protected besides. None: none; 0 also gives up those of earlier updates.
        remember_tasks: add what each finished task's inputs (and gradients) were to the calibration of the next ones;
            for every source but ``weight``.
        remember_rows: how many training rows of a task stand for it.
        remember_size: largest size of what is remembered of tasks, over that of the weights; above 0.
        prompts: token ids of prompts that the model answers by itself before each task. What it wrote calibrates in
            place of its text from BOS, and is what ``rehearse`` holds: of causal models beside text from BOS, half of
            the tokens each, of encoder-decoders alone.
        rehearse: rows of text that the model wrote before the task for each training row, 0 (none) or more: what it
            predicted there is held by a penalty, see ``lorica.methods.rehearsal``; for causal models, and with
            ``prompts`` for encoder-decoders. A micro-batch has at least one.
        rehearse_weight: weight of that penalty, above 0.
        rehearse_tokens: so many tokens are written before a task, at least 1.
        rehearse_prompts: what a token of a prompt counts in the loss beside one of an answer, 0 (nothing) or more: a
            model that has learned to write a task's prompts rehearses that task with the next ones.
        rank_schedule: protected share, 0 to 1, of each task in order; the last is for all further ones.
        memory_mode: as ``memory`` of ``lorica.protect``.
        predict_forgetting: take down before a task what is needed to foresee and to measure its forgetting, see
            ``lorica.methods.forgetting``; for causal models.
    """

    unfreeze_rank_ratio: float | None = None
    osft_unfreeze_rank_ratio: float | None = None
    effective_rank: float | int | None = None
    ranks: str = "uniform"
    source: Source = "weight"
    constraint: Constraint | None = None
    calibration: Sequence[Batch] | Literal["self", "random"] | None = None
    rank_pattern: Mapping[str, float | int] = field(default_factory=dict)
    mrr: float | None = None
    trr: float | None = None
    expected_forgetting: float | None = None
    plan: Plan | None = None
    protect_learned: float | None = None
    remember_tasks: bool = False
    remember_rows: int = REMEMBER_ROWS
    remember_size: float = REMEMBER_SIZE
    prompts: Sequence[Sequence[int]] | None = None
    rehearse: float = 0.0
    rehearse_weight: float = 1.0
    rehearse_tokens: int = TOKENS
    rehearse_prompts: float = 0.0
    rank_schedule: Sequence[float] | None = None
    memory_mode: MemoryMode = "fast"
    predict_forgetting: bool = False

    def __post_init__(self) -> None:
        if self.protect_learned is not None and not 0 <= self.protect_learned <= 1:
            raise ValueError(f"protect_learned = {self.protect_learned} is out of range: a share from 0 to 1")
        if self.remember_rows < 1:
            raise ValueError(f"remember_rows = {self.remember_rows} is out of range: at least 1")
        if self.remember_tasks and self.source not in MEASURED:
            raise ValueError(
                f"remember_tasks has no effect with source {self.source!r}; it is for {' and '.join(MEASURED)}"
            )
        if self.remember_size <= 0:
            raise ValueError(f"remember_size = {self.remember_size} is out of range: above 0")
        idle = {"remember_rows": REMEMBER_ROWS, "remember_size": REMEMBER_SIZE}
        for name, default in idle.items():
            if getattr(self, name) != default and not self.remember_tasks:
                raise ValueError(f"{name} has no effect without remember_tasks")
        if not 0 <= self.rehearse < float("inf"):
            raise ValueError(f"rehearse = {self.rehearse} is out of range: 0 (none) or more")
        if not 0 < self.rehearse_weight < float("inf"):
            raise ValueError(f"rehearse_weight = {self.rehearse_weight} is out of range: above 0")
        if self.rehearse_tokens < 1:
            raise ValueError(f"rehearse_tokens = {self.rehearse_tokens} is out of range: at least 1")
        if not 0 <= self.rehearse_prompts < float("inf"):
            raise ValueError(f"rehearse_prompts = {self.rehearse_prompts} is out of range: 0 (nothing) or more")
        beside = {"rehearse_weight": 1.0, "rehearse_tokens": TOKENS, "rehearse_prompts": 0.0}
        for name, default in beside.items():
            if getattr(self, name) != default and not self.rehearse:
                raise ValueError(f"{name} has no effect without rehearse")
        if self.prompts is not None and not (self.rehearse or self.calibrates_itself):
            raise ValueError("prompts_file has no effect without rehearse or calibration 'self' of what is measured")
        if self.rank_schedule is not None:
            self._check_schedule(self.rank_schedule)

    @property
    def calibrates_itself(self) -> bool:
        """Whether something is to be measured, and nothing but the model's own text was given for it."""
        measures = self.source in MEASURED or self.ranks == "importance"
        return measures and self.plan is None and (self.calibration is None or self.calibration == "self")

    def _check_schedule(self, shares: Sequence[float]) -> None:
        wrong = next((share for share in shares if not 0 <= share <= 1), None)
        if wrong is not None or not shares:
            got = "nothing" if wrong is None else wrong
            raise ValueError(f"rank_schedule holds {got}: give protected shares from 0 to 1, one per task")
        amounts = ("unfreeze_rank_ratio", "osft_unfreeze_rank_ratio", "effective_rank")
        beside = next((name for name in amounts if getattr(self, name) is not None), None)
        if beside is not None:
            raise ValueError(f"{beside} and rank_schedule both say how much is protected; give one of them")
        if self.ranks != "uniform":
            raise ValueError(f"rank_schedule is for ranks 'uniform', not {self.ranks!r}")

    def given(self) -> set[str]:
        """Return the names of the fields that differ from their defaults."""
        defaults = Protection()
        pairs = {f.name: (getattr(self, f.name), getattr(defaults, f.name)) for f in fields(self)}
        return {name for name, (mine, theirs) in pairs.items() if mine != theirs and [mine, theirs] != [[], ()]}


def scheduled_share(schedule: Sequence[float], index: int) -> float:
    """Return the protected share of a task, counted from 0: the last of a ``rank_schedule`` is for all further ones."""
    return float(schedule[min(index, len(schedule) - 1)])


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


def given_options(config: UpdateConfig) -> dict[str, Any]:
    """Return the options of an update that were given and may be its method's; without ``calibration``."""
    names = {f.name for f in fields(Protection)} & UpdateConfig.model_fields.keys() - {"calibration"}
    defaults = {name: UpdateConfig.model_fields[name].get_default(call_default_factory=True) for name in names}
    return {name: getattr(config, name) for name in names if getattr(config, name) != defaults[name]}


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
