"""The files of one update: checked and encoded before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorica.config import UpdateConfig
from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset, load
from lorica.data.validate import Report, overlap, validate, write_rejected
from lorica.errors import LoricaError
from lorica.subspace.calibration import Batch

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
        self._note_overlaps()

    def calibration(self) -> list[Batch] | str | None:
        """Return what the method is told to calibrate on; None where it is to choose by itself, if at all."""
        config = self.config
        if config.calibration_file is None:
            return config.calibration
        data = self._load(config.calibration_file)
        collate = Collator(self.tokenizer, seq2seq=self.seq2seq)
        rows = [data[index] for index in range(min(len(data), CALIBRATION_ROWS))]
        return [collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]

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
        }

    def write_rejected(self, output_dir: Path) -> None:
        """Write the rows of all files that ``skip_invalid_rows`` left out to ``rejected.jsonl``, if there are any."""
        if incomplete := {report.path: report for report in self.reports if report.rejected}:
            write_rejected(incomplete.values(), output_dir / "rejected.jsonl")

    def _load(self, path: str, *, new_task: bool = False) -> EncodedDataset:
        config = self.config
        if (Path(path) / "config.json").is_file():
            raise LoricaError(f"{path}: that is the folder of a model, not of rows")
        report = validate(
            path,
            config.dataset_format if new_task else None,
            config.dataset_text_field,
            config.skip_invalid_rows,
            vocab_size=len(self.tokenizer),
            seq2seq=self.seq2seq,
        )
        self.reports.append(report)
        return load(
            path,
            self.tokenizer,
            validated=report,
            max_length=self.max_length,
            completion_only_loss=config.completion_only_loss if new_task else None,
            assistant_only_loss=config.assistant_only_loss and new_task,
            truncation_policy=config.truncation_policy,
            seq2seq=self.seq2seq,
        )

    def _note_overlaps(self) -> None:
        train, *others = self.reports
        for report in others:
            shared = overlap(train, report)
            if shared:
                self.notices.append(f"{shared} of the rows of {report.path} are also trained on")


def _named(paths: list[str]) -> dict[str, str]:
    """Name each file by its stem, or by its path where two share a stem."""
    if len(set(paths)) < len(paths):
        raise LoricaError(f"--retention_file names a file twice: {', '.join(paths)}")
    stems = [Path(path).stem for path in paths]
    return {stem if stems.count(stem) == 1 else path: path for stem, path in zip(stems, paths, strict=True)}
