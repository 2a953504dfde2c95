"""The rows of one task of a stream: found, checked, put into the task's prompt and encoded for the model at hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica.data.classes import encode_classes
from lorica.data.dataset import EncodedDataset, Kind, render
from lorica.data.encode import encode
from lorica.data.example import Example, Pair
from lorica.data.formats import Format
from lorica.data.layouts import FORMAT, LayoutSource
from lorica.data.question_sets import LAYOUTS
from lorica.data.reader import HubSource as HubRows
from lorica.data.reader import Source, open_source
from lorica.data.record import RowError
from lorica.data.scored import HubSource, Scored, Task
from lorica.data.stream import TaskStream
from lorica.data.template import PairTemplate, fill
from lorica.data.validate import Report, validate
from lorica.errors import LoricaError, did_you_mean
from lorica.hub import check_pinned, commit_of

HUB_SEED = 0
"""Draws the rows of a hub data set, the same in every run: they are part of the task."""


def load_rows(
    stream: TaskStream,
    scored: Scored,
    part: str,
    tokenizer: Any,
    *,
    kind: Kind,
    max_length: int,
    labels: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    require_pinned: bool = False,
) -> EncodedDataset:
    """Return the rows of a task or an ability, ready for a model; ``summary["from_hub"]``: there was no file of them.

    Args:
        part: "train" or "test".
        kind: of the model; a "classifier" gets the class of each row as its label.
        max_length: in tokens, of a whole row; encoder-decoder: of the source and of the target.
        labels: a classifier's classes in the order of its outputs; by default the task's choices.
        limit: so many rows, drawn without replacement; all where there are no more.
        seed: of that draw.
        require_pinned: take rows of the hub only where the stream names their whole commit.

    Raises:
        LoricaError: the rows are found neither as a file nor on the hub, a row does not fit its prompt, or a
            classifier is asked for a task without choices. Each message names the stream and the task.
    """
    try:
        if kind == "classifier" and not scored.choices:
            raise LoricaError(
                "give choices: a classifier needs to know its classes; or leave the task out with --tasks."
            )
        report = _report(stream, scored, part, len(tokenizer), kind == "seq2seq", require_pinned)
        rows = _encoded(report, scored, tokenizer, kind, max_length, labels, limit, seed)
    except LoricaError as error:
        what = "task" if isinstance(scored, Task) else "ability"
        raise LoricaError(f"stream {stream.name!r}, {what} {scored.name!r}: {error}") from error
    rows.summary["from_hub"] = isinstance(report.source, HubRows)
    return rows


def _report(
    stream: TaskStream, scored: Scored, part: str, vocab_size: int, seq2seq: bool, require_pinned: bool
) -> Report:
    source, notices = _source(stream, scored, part, require_pinned)
    report = validate(source, _format(scored), vocab_size=vocab_size, seq2seq=seq2seq)
    report.notices[:0] = notices
    return report


def _encoded(
    report: Report,
    scored: Scored,
    tokenizer: Any,
    kind: Kind,
    max_length: int,
    labels: Sequence[str],
    limit: int | None,
    seed: int,
) -> EncodedDataset:
    examples = [_with_choices(example, scored) for example in _drawn(report, limit, seed)]
    if kind == "classifier":
        longest = min(max_length, scored.max_prompt_length or max_length)
        rows, counts = encode_classes(examples, tokenizer, labels or scored.choices, longest)
    else:
        longest_prompt = _longest_prompt(scored, kind, max_length)
        rows, counts = encode(
            examples, tokenizer, max_length, seq2seq=kind == "seq2seq", max_prompt_length=longest_prompt
        )
    return EncodedDataset(rows, report, counts, render(rows[0], tokenizer, kind), kind)


def _longest_prompt(scored: Scored, kind: Kind, max_length: int) -> int | None:
    """Return the tokens a prompt may have; a decoder that writes its answer freely needs room behind the prompt.

    That is room for ``max_new_tokens``, but for no more than half of a row. Choices get what the longest needs.
    """
    if kind == "seq2seq" or scored.choices or scored.scoring == "choose" or scored.max_new_tokens is None:
        return scored.max_prompt_length
    room = max_length - min(scored.max_new_tokens, max_length // 2)
    return min(room, scored.max_prompt_length or room)


def _source(stream: TaskStream, scored: Scored, part: str, require_pinned: bool) -> tuple[Source, list[str]]:
    """Return where the rows come from, and what is to be said about it."""
    if part not in ("train", "test"):
        raise ValueError(f"{part=} is neither 'train' nor 'test'")
    if part == "train" and not isinstance(scored, Task):
        raise ValueError(f"{scored.name} is an ability and never trained")
    file = scored.train_file if part == "train" and isinstance(scored, Task) else scored.test_file
    path = stream.path(file)
    if Path(path).exists():
        if scored.reader != "rows":
            return LayoutSource(path, LAYOUTS[scored.reader]), []
        return open_source(path), []
    if scored.hub is None:
        raise LoricaError(f"no file {path}; give the folder that holds {file} as --data_dir.")
    if require_pinned:
        check_pinned(scored.hub.path, scored.hub.revision, "hub.revision in the stream's file", "dataset")
    return _hub_rows(scored.hub, part, path, file), [f"no file {path}: rows of the hub's data set {scored.hub.path}"]


def _hub_rows(hub: HubSource, part: str, path: str, file: str) -> HubRows:
    import datasets

    split, count = (hub.train_split, hub.train_rows) if part == "train" else (hub.test_split, hub.test_rows)
    commit = commit_of(hub.path, hub.revision, "dataset") or hub.revision
    try:
        rows = datasets.load_dataset(hub.path, hub.name, split=split, revision=commit)
    except Exception as error:  # the hub's client raises many kinds; all mean that there is no data
        reason = str(error).strip().split("\n")[0]
        raise LoricaError(
            f"no file {path}, and split {split!r} of the hub's data set {hub.path!r} could not be loaded: {reason} "
            f"({type(error).__name__}). Give the folder that holds {file} as --data_dir, or connect to the network."
        ) from error
    if count is not None and count < len(rows):
        rows = rows.select(sorted(random.Random(HUB_SEED).sample(range(len(rows)), count)))
    name = "/".join(part for part in (hub.path, hub.name) if part) + (f"@{commit}" if commit else "")
    return HubRows(f"{name}[{split}]", [_with_fields(row, hub, f"{name}:{n}") for n, row in enumerate(rows, 1)])


def _with_fields(row: dict[str, Any], hub: HubSource, where: str) -> dict[str, Any]:
    """Return a row of a hub data set with its numbers as words and the fields made of its columns."""
    try:
        words = {column: _word(row, column, names) for column, names in hub.labels.items()}
        worded = {**row, **words}
        return {**worded, **{name: fill(template, worded)[0] for name, template in hub.fields.items()}}
    except RowError as error:
        raise LoricaError(f"{where}: {error}") from None


def _word(row: dict[str, Any], column: str, words: Sequence[str]) -> str:
    if column not in row:
        raise RowError("missing field", f"{column!r}; the data set has {', '.join(row)}.{did_you_mean(column, row)}")
    if not isinstance(row[column], int) or not 0 <= row[column] < len(words):
        raise RowError("unknown label", f"{column!r} is {row[column]!r}, expected 0 to {len(words) - 1}")
    return words[row[column]]


def _format(scored: Scored) -> Format | None:
    if scored.reader != "rows":
        return FORMAT
    if scored.prompt is None:
        return None
    return PairTemplate(
        scored.prompt, scored.answer, scored.choices, scored.shorten, scored.drop_labels, scored.source_between
    ).as_format()


def _with_choices(example: Example, scored: Scored) -> Example:
    """Return a pair with the task's choices where it has none of its own."""
    if isinstance(example, Pair) and not example.choices and scored.choices:
        return replace(example, choices=tuple(scored.choices))
    return example


def _drawn(report: Report, limit: int | None, seed: int) -> list[Example]:
    count = len(report.examples)
    if limit is None or limit >= count:
        return report.examples
    report.notices.append(f"{limit} of {count} rows drawn without replacement, seed {seed}")
    return [report.examples[index] for index in sorted(random.Random(seed).sample(range(count), limit))]
