"""Tiny trainings by ``fit`` on rows of a file, and what they leave behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset, load
from lorica.methods import Targets
from lorica.methods.seqft import SeqFT
from lorica.methods.task import TaskData
from lorica.training.arguments import training_arguments
from lorica.training.trainer import fit
from tests.builders import trainable
from tests.training.conftest import byte_tokenizer

Extra = Callable[[nn.Module], Tensor]
TOKENIZER = byte_tokenizer()


def written_rows(folder: Path, count: int = 24) -> EncodedDataset:
    """Write rows whose prompts hold a number of two digits, so that all are of one length; and read them."""
    lines = [{"prompt": f"row {10 + i}?", "completion": f" {(7 * i) % 10}"} for i in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(["", *map(json.dumps, lines)]) + "\n")
    return load(folder / "rows.jsonl", TOKENIZER)


def lines_of(ids: Tensor) -> list[int]:
    """Return the lines in ``rows.jsonl`` of a batch's rows: row 10 is in line 2, for the first is empty."""
    prompts = TOKENIZER.batch_decode(ids)
    return [int(re.search(r"row (\d+)\?", text)[1]) - 8 for text in prompts]  # type: ignore[index]


class Watched(SeqFT):
    """Sequential fine-tuning that notes the lines of each batch, and adds to the loss of one of them.

    Attributes:
        batches: the lines of each batch, in the order of the forward passes.
        extra: what is added.
        at: to which forward pass, counted from 1.
    """

    def __init__(self, extra: Extra | None = None, at: int = 0, targets: Targets | None = None) -> None:
        super().__init__(targets or Targets())
        self.batches: list[list[int]] = []
        self.extra, self.at = extra, at

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        self.batches.append(lines_of(inputs["input_ids"]))
        return self.extra(model) if self.extra is not None and len(self.batches) == self.at else None


def arguments(folder: Path, **given: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1, "seed": 1,
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    seq2seq = given.pop("seq2seq", False)
    return training_arguments(defaults | given, str(folder), hidden_size=None, seq2seq=seq2seq)


def fitted(model: Any, method: Any, rows: Any, folder: Path, **given: Any) -> list[dict[str, Any]]:
    """Train and return the log; the method's task is not ended."""
    in_backward = given.pop("optimizer_in_backward", False)
    collate = Collator(TOKENIZER, seq2seq=model.config.is_encoder_decoder)
    task = TaskData("task", 0, 1, rows, collate)
    method.begin_task(model, task)
    given |= {"seq2seq": model.config.is_encoder_decoder}
    chosen = arguments(folder, **given)
    log: list[dict[str, Any]] = fit(
        model, method, method.training_data(task), TOKENIZER, collate, chosen, optimizer_in_backward=in_backward
    )
    return log


def all_finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def first_weight_sum(model: nn.Module) -> Tensor:
    """Return the sum of the weight that trains nearest to the input, so that its gradient comes last."""
    return trainable(model)[0].float().sum()


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
