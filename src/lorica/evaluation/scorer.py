"""Scores of a model on the rows of one task, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lorica.data.dataset import EncodedDataset
from lorica.data.encoder import Encoded
from lorica.data.parts import in_parts
from lorica.data.scored import Scored
from lorica.data.tokens import Codec
from lorica.errors import LoricaError
from lorica.evaluation.choices import choose
from lorica.evaluation.evaluator import answer_length
from lorica.evaluation.generate import Progress, batches_by_length, greedy_answers
from lorica.evaluation.metrics import METRICS, Answer, normalise_answer
from lorica.processes import reshard, together


@dataclass(frozen=True)
class TaskScores:
    """What a model scored on one task.

    Attributes:
        rows: score of each row, percent, in the order of the rows.
        predictions: what the model answered.
        beside: mean of other metrics on the same answers, percent, by name.
    """

    rows: list[float]
    predictions: list[str]
    beside: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean over the rows, percent."""
        return sum(self.rows) / len(self.rows)


def score_task(
    model: nn.Module,
    dataset: EncodedDataset,
    tokenizer: Any,
    scored: Scored,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> TaskScores:
    """Return a model's scores on a task's rows; the model's mode and the random state are as before.

    A sequence classifier answers with the likeliest of the task's choices; any other model writes its answer
    greedily or, with ``scoring: choose``, answers with the choice it finds likeliest.

    Args:
        dataset: the encoded rows; each has an answer.
        scored: the task's metric, scoring, choices and longest answer.
        max_new_tokens: over what the task says; where neither does, one more than the longest answer of the rows.

    Raises:
        LoricaError: a row without an answer.
    """
    rows = dataset.examples
    check_answers(dataset)
    training = model.training
    model.eval()
    try:
        if _is_classifier(model):
            predictions = _classified(model, rows, scored, tokenizer, batch_size)
        elif scored.scoring == "choose":
            predictions = _chosen(model, rows, scored, tokenizer, batch_size, progress)
        else:
            longest = max_new_tokens or scored.max_new_tokens
            predictions = _written(model, rows, scored, tokenizer, longest, batch_size, progress)
    finally:
        model.train(training)
    reshard(model)
    return _measured(predictions, rows, scored, exact=_is_classifier(model) or scored.scoring == "choose")


def check_answers(dataset: EncodedDataset) -> None:
    """Refuse rows that cannot be scored.

    Raises:
        LoricaError: a row has no answer; names its file and line.
    """
    if missing := next((row for row in dataset.examples if row.answer is None), None):
        raise LoricaError(f"{missing.where}: the row has no answer to score; give prompts with completions")


def check_choices(scored: Scored) -> None:
    """Refuse choices that the metric cannot tell apart, such as 4 and -4 for one that deletes punctuation.

    Raises:
        LoricaError: names the two choices and a metric that tells them apart.
    """
    seen: dict[str, str] = {}
    for choice in scored.choices if scored.metric == "exact_match" and scored.scoring == "generate" else ():
        same = seen.setdefault(normalise_answer(choice), choice)
        if same != choice:
            raise LoricaError(
                f"{scored.name}: metric 'exact_match' takes {same!r} and {choice!r} for the same answer, for it leaves "
                "case and punctuation aside; give metric: stripped_string"
            )


def _measured(predictions: list[str], rows: list[Encoded], scored: Scored, *, exact: bool) -> TaskScores:
    answers = [Answer(text, row.answer or "", row.source) for text, row in zip(predictions, rows, strict=True)]
    metric = METRICS["exact_string" if exact else scored.metric]
    beside = {} if exact else {name: METRICS[name] for name in scored.metrics_beside}
    means = {name: sum(map(one, answers)) / len(answers) for name, one in beside.items()}
    return TaskScores([metric(answer) for answer in answers], predictions, means)


def _written(
    model: nn.Module, rows: list[Encoded], scored: Scored, tokenizer: Any, longest: int | None, batch_size: int,
    progress: Progress | None,
) -> list[str]:  # fmt: skip
    codec = Codec(tokenizer)
    # The longest answer's length, not each row's own: where a prediction ends must not hang on the answer it is due.
    length = longest or max(answer_length(row, codec) for row in rows) + 1
    prompts = [row.prompt_ids or [] for row in rows]
    written = greedy_answers(model, tokenizer, prompts, max_new_tokens=length, batch_size=batch_size, progress=progress)
    return [trimmed(one.text, scored) for one in written]


def trimmed(text: str, scored: Scored) -> str:
    """Return the part of a generated text that counts as the answer: see ``stop`` and ``answer_after``."""
    for mark in scored.stop:
        text = text.split(mark, 1)[0]
    return text.rpartition(scored.answer_after)[2] if scored.answer_after else text


def _chosen(
    model: nn.Module, rows: list[Encoded], scored: Scored, tokenizer: Any, batch_size: int, progress: Progress | None
) -> list[str]:
    choices = [list(row.choices or scored.choices) for row in rows]
    prompts = [row.prompt_ids or [] for row in rows]
    picked = choose(model, tokenizer, prompts, choices, batch_size=batch_size, progress=progress)
    return [options[index] for options, index in zip(choices, picked, strict=True)]


@torch.no_grad()
def _classified(model: Any, rows: list[Encoded], scored: Scored, tokenizer: Any, batch_size: int) -> list[str]:
    """Return the likeliest of the task's choices for each row; other classes of the head are left out."""
    classes = [model.config.label2id[choice] for choice in scored.choices]

    def likeliest(indices: Sequence[int]) -> list[int]:
        batch = tokenizer.pad({"input_ids": [rows[index].input_ids for index in indices]}, return_tensors="pt")
        best: list[int] = model(**batch.to(model.device)).logits[:, classes].argmax(dim=1).tolist()
        return best

    batches = batches_by_length([len(row.input_ids) for row in rows], batch_size)
    answers = [""] * len(rows)
    for indices, found in zip(batches, together(batches, partial(in_parts, likeliest)), strict=True):
        for index, best in zip(indices, found, strict=True):
            answers[index] = scored.choices[best]
    return answers


def _is_classifier(model: Any) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")
