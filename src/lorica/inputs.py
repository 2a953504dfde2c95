"""The files of one update: checked and encoded before any weight is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorica.config import UpdateConfig
from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset, load
from lorica.data.validate import Report, overlap, validate, write_rejected
from lorica.errors import LoricaError
from lorica.evaluation.prompts import prompt_ids, read_prompts
from lorica.subspace.answers import room_for_answer
from lorica.subspace.calibration import Batch
from lorica.training.models import load_tokenizer

CALIBRATION_ROWS = 256
"""How many rows of ``calibration_file`` are used at most."""


class Inputs:
    """What is learned, what is scored, and what calibrates.

    ``dataset_format`` and the choice of loss are for the new task: its rows and the evaluation rows. Retention and
    calibration files are other tasks and are read as they come.

    Args:
        config: names the files.
        tokenizer: of the model.
        seq2seq: whether the model is an encoder-decoder.
        position_limit: how many positions the model has, or None.

    Attributes:
        train, eval, retention: the encoded rows; ``eval`` may be None, ``retention`` empty.
        prompts: token ids of each prompt that the model is to answer; None: there are none.

    Raises:
        LoricaError: anything is wrong with a file; see ``lorica.data``.
    """

    def __init__(
        self, config: UpdateConfig, tokenizer: Any, *, seq2seq: bool, position_limit: int | None = None
    ) -> None:
        self.config, self.tokenizer, self.seq2seq = config, tokenizer, seq2seq
        self.max_length = min(config.max_length, position_limit or config.max_length)
        self.reports: list[Report] = []
        self.notices: list[str] = []
        if self.max_length < config.max_length:
            self.notices.append(f"max_length is {self.max_length}: the model has no more positions")
        self.train = self._load(config.source_of_rows, new_task=True)
        self.eval = self._load(config.eval_file, new_task=True) if config.eval_file else None
        self.retention = {name: self._load(path) for name, path in _named(config.retention_file).items()}
        self.prompts = asked_of(config, seq2seq=seq2seq, max_length=self.max_length, tokenizer=tokenizer)
        self._note_overlaps()

    def calibration(self) -> list[Batch] | str | None:
        """Return what the method is told to calibrate on; None where it is to choose by itself, if at all."""
        config = self.config
        if config.calibration_file is None:
            return config.calibration
        return calibrating(self._load(config.calibration_file), self.tokenizer, seq2seq=self.seq2seq)

    def describe(self) -> list[str]:
        """Return the lines printed before training: the new rows in full, of the others what was read."""
        others = [data for data in (self.eval, *self.retention.values()) if data is not None]
        lines = [self.train.describe(), *(data.describe().splitlines()[0] for data in others)]
        lines += [f"notice: {note}" for data in others for note in data.summary["notices"]]
        return lines + [f"notice: {note}" for note in self.notices]

    def summaries(self) -> dict[str, Any]:
        """Return counts, hashes and notices of all files, for the record."""
        return {
            "train": self.train.summary,
            "eval": self.eval.summary if self.eval else None,
            "retention": {name: data.summary for name, data in self.retention.items()},
        } | self._prompts_summary()

    def _prompts_summary(self) -> dict[str, Any]:
        path, ids = self.config.prompts_file, self.prompts
        return {} if ids is None else {"prompts": {"path": path, "kept": len(ids), "sha256 as tokens": digest_of(ids)}}

    def write_rejected(self, output_dir: Path) -> None:
        """Write the rows of all files that ``skip_invalid_rows`` left out to ``rejected.jsonl``, if there are any."""
        if incomplete := {report.path: report for report in self.reports if report.rejected}:
            write_rejected(incomplete.values(), output_dir / "rejected.jsonl")

    def _load(self, path: str, *, new_task: bool = False) -> EncodedDataset:
        report, data = read_rows(
            self.config, path, self.tokenizer, seq2seq=self.seq2seq, max_length=self.max_length, new_task=new_task
        )
        self.reports.append(report)
        return data

    def _note_overlaps(self) -> None:
        train, *others = self.reports
        for report in others:
            shared = overlap(train, report)
            if shared:
                self.notices.append(f"{shared} of the rows of {report.path} are also trained on")


def read_rows(
    config: UpdateConfig, path: str, tokenizer: Any, *, seq2seq: bool, max_length: int, new_task: bool = False
) -> tuple[Report, EncodedDataset]:
    """Return the encoded rows of one file of an update, and what was found when they were checked.

    Args:
        new_task: whether they are the new task's.

    Raises:
        LoricaError: anything is wrong with the file; see ``lorica.data``.
    """
    if (Path(path) / "config.json").is_file():
        raise LoricaError(f"{path}: that is the folder of a model, not of rows")
    report = validate(
        path,
        config.dataset_format if new_task else None,
        config.dataset_text_field,
        config.skip_invalid_rows,
        vocab_size=len(tokenizer),
        seq2seq=seq2seq,
    )
    data = load(
        path,
        tokenizer,
        validated=report,
        max_length=max_length,
        completion_only_loss=config.completion_only_loss if new_task else None,
        assistant_only_loss=config.assistant_only_loss and new_task,
        truncation_policy=config.truncation_policy,
        seq2seq=seq2seq,
    )
    return report, data


def calibrating(data: EncodedDataset, tokenizer: Any, *, seq2seq: bool) -> list[Batch]:
    """Return the first rows of a ``calibration_file``, in batches."""
    collate = Collator(tokenizer, seq2seq=seq2seq)
    rows = [data[index] for index in range(min(len(data), CALIBRATION_ROWS))]
    return [collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]


def asked_of(config: UpdateConfig, *, seq2seq: bool, max_length: int, tokenizer: Any = None) -> list[list[int]] | None:
    """Return the token ids of the prompts that an update names, None where it names none.

    Raises:
        LoricaError: see ``prompts_of``.
    """
    if config.prompts_file is None:
        return None
    tokenizer = tokenizer or load_tokenizer(config)
    return prompts_of(config.prompts_file, tokenizer, seq2seq=seq2seq, max_length=max_length)


def prompts_of(path: str, tokenizer: Any, *, seq2seq: bool, max_length: int) -> list[list[int]]:
    """Return the token ids of the prompts in a file, of which a model is to have room for each and an answer.

    Args:
        max_length: of prompt and answer; of an encoder-decoder of the prompt alone.

    Raises:
        LoricaError: something is wrong with the file, see ``read_prompts``, or a prompt is too long.
    """
    answer = 0 if seq2seq else room_for_answer(max_length)
    longest = max_length - answer
    room = f"{answer} of max_length {max_length} are for its answer" if answer else "that is max_length"
    too_long = f"and it may have {longest} ({room}); shorten it, or raise max_length up to the model's positions"
    return prompt_ids(read_prompts(path), tokenizer, seq2seq=seq2seq, longest=longest, too_long=too_long)


def digest_of(prompts: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256 of prompts as tokens."""
    return hashlib.sha256(repr([list(ids) for ids in prompts]).encode()).hexdigest()


def _named(paths: list[str]) -> dict[str, str]:
    """Name each file by its stem, or by its path where two share a stem."""
    if len(set(paths)) < len(paths):
        raise LoricaError(f"--retention_file names a file twice: {', '.join(paths)}")
    stems = [Path(path).stem for path in paths]
    return {stem if stems.count(stem) == 1 else path: path for stem, path in zip(stems, paths, strict=True)}
