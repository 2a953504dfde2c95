"""What a plain model writes by itself before a task: the texts that it rehearses, and those that calibrate."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from lorica import processes
from lorica.constrain.sharded_plan import check_numbers
from lorica.errors import LoricaError
from lorica.methods.base import Progress
from lorica.methods.protection import Protection
from lorica.methods.rehearsal import INSTEAD, NEEDED_BY, Rehearsal, instead
from lorica.methods.task import Rows, TaskData
from lorica.subspace.answers import own_answers
from lorica.subspace.calibration import LENGTH, TOKENS, decodes, own_text
from lorica.subspace.observe import IGNORED_LABEL

Texts = list[dict[str, Tensor]]

AUTO = "auto"
"""In place of a number of tokens: see ``amount_for``."""

TIMES, FEWEST, MOST = 4, 8_192, 65_536
"""Under ``AUTO``: how many times the tokens of the rows, and the bounds, which are the amounts that served on the test
beds of fifty small tasks and of four large ones."""

SHORTEST, LONGEST = LENGTH, 512
"""Under ``AUTO``: the bounds of a text's length."""


class Asked(Protocol):
    """The options that say how much is written, of a method or of an update."""

    @property
    def rehearse_tokens(self) -> int | str: ...

    @property
    def rehearse_length(self) -> int | str: ...

    @property
    def calibration(self) -> Any: ...

    @property
    def calibration_tokens(self) -> int | None: ...


class Extent(NamedTuple):
    """How large a task is.

    Attributes:
        tokens: that its rows have, of an encoder-decoder without the answers.
        longest: tokens of the longest row, of an encoder-decoder of the longest answer.
    """

    tokens: int
    longest: int


class Amount(NamedTuple):
    """How much a model writes: so many tokens, in texts of at most a length."""

    tokens: int
    length: int


def amount_for(asked: Asked, rows: Extent | None) -> Amount:
    """Return how much is written to be rehearsed.

    For ``AUTO`` ``TIMES`` the tokens of the rows, and texts as long as they are, for what ends a row would be in no
    text that is cut off before; both within bounds. And no fewer tokens than ``calibration_tokens``, where the model is
    measured on them.

    Args:
        rows: of the task; None: not known, and so the most.
    """
    tokens, length = asked.rehearse_tokens, asked.rehearse_length
    if tokens == AUTO:
        own = asked.calibration is None or asked.calibration == "self"
        wanted = MOST if rows is None else min(MOST, TIMES * rows.tokens)
        tokens = max(FEWEST, wanted, (asked.calibration_tokens or 0) if own else 0)
    if length == AUTO:
        length = LONGEST if rows is None else max(SHORTEST, min(LONGEST, rows.longest))
    return Amount(int(tokens), int(length))


def extent_of(rows: Rows, longest: int = 0) -> Extent:
    """Return how large a task is, as far as it makes a difference: the rest of a large one is not looked at.

    Args:
        longest: of the tasks before, which the texts are to hold: it counts as one of the rows.
    """
    tokens = 0
    for index in range(len(rows)):  # type: ignore[arg-type]
        row = rows[index]
        tokens += len(row["input_ids"])
        longest = max(longest, len(row["labels"]))
        if TIMES * tokens >= MOST and longest >= LONGEST:
            break
    return Extent(tokens, longest)


def written(
    model: nn.Module,
    asked: Protection,
    task: TaskData,
    amount: Amount | None,
    *,
    calibrates: bool,
    progress: Progress | None = None,
) -> tuple[Rehearsal | None, Texts | None]:
    """Let a plain model write what is to be rehearsed and what calibrates, as far as the options ask for it.

    With prompts, half of what a causal model rehearses are its answers to them and the rest is text from BOS; an
    encoder-decoder rehearses answers alone. The answers calibrate, where there are some.

    Args:
        task: the task that begins, whose seed and place in the stream decide what is drawn.
        amount: how much is rehearsed; None: nothing.
        calibrates: whether anything is to be measured on it; a resumed task has its bases already.
        progress: is told of what is written, in tokens.

    Raises:
        LoricaError: the model writes no text, or is shared by processes.
    """
    if (asked.rehearse or asked.prompts) and processes.in_step(model):
        raise LoricaError(
            f"{NEEDED_BY if asked.rehearse else 'prompts_file'}: processes that share a model would write texts of "
            f"several lengths and then wait for each other; {INSTEAD}"
        )
    if asked.rehearse_prompts and decodes(model):
        raise LoricaError("rehearse_prompts is for causal models; an encoder-decoder writes no prompts: leave it out")
    if asked.rehearse or asked.prompts:
        check_numbers(model)
    if amount is not None:
        return _rehearsed(model, asked, amount, task.seed + task.index, progress)
    if asked.prompts and calibrates:
        tokens = asked.calibration_tokens or TOKENS
        return None, own_answers(model, asked.prompts, tokens=tokens, seed=task.seed + task.index, progress=progress)
    return None, None


def _rehearsed(
    model: nn.Module, asked: Protection, amount: Amount, seed: int, progress: Progress | None
) -> tuple[Rehearsal, Texts]:
    answers, texts, part = Texts(), Texts(), 0
    total, length = amount
    if asked.prompts:
        part = total if decodes(model) else total // 2
        answers = own_answers(model, asked.prompts, tokens=part, length=length, seed=seed, progress=progress)
    if part < total:
        texts = own_text(
            model, tokens=total - part, length=length, seed=seed, needed_by=NEEDED_BY, instead=instead(model),
            progress=progress,
        )  # fmt: skip
    held = Rehearsal.of(model, [*texts, *answers], asked.rehearse, asked.rehearse_weight)
    return held, first_tokens(answers or texts, asked.calibration_tokens)


def first_tokens(texts: Texts, tokens: int | None) -> Texts:
    """Return the first rows of what a model wrote, until it wrote so many tokens there; None: all of it."""
    if tokens is None:
        return texts
    kept, left = Texts(), tokens
    for batch in texts:
        wrote = batch["labels"] != IGNORED_LABEL if "labels" in batch else batch["attention_mask"].bool()
        together = wrote.sum(1).cumsum(0)
        rows = int((together < left).sum()) + 1
        kept.append({name: part[:rows] for name, part in batch.items()})
        left -= int(together[:rows][-1])
        if left <= 0:
            break
    return kept
