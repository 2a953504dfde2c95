"""``lorica run`` with rows that lie end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorica.data.collate import FlatCollator
from lorica.data.stream import TaskStream
from lorica.errors import LoricaError
from tests.experiments.conftest import Write, llama_folder, run, write  # noqa: F401
from tests.experiments.test_classifier import bert_folder, labelled  # noqa: F401


def test_every_training_batch_of_a_run_lies_end_to_end(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    lay = FlatCollator.__call__
    monkeypatch.setattr(FlatCollator, "__call__", lambda self, some: rows.append(len(some)) or lay(self, some))
    options: dict[str, Any] = {"methods": "half", "max_steps": 2, "per_device_train_batch_size": 4}
    stream, out = write(), tmp_path / "out"
    run(stream, llama_folder, out, padding_free=True, **options)
    assert rows == [2, 1, 4, 4, 4, 4], "two rows and then one are tried on the model; two tasks of two steps"
    run(stream, llama_folder, out, padding_free=True, **options)
    with pytest.raises(LoricaError, match="padding_free"):
        run(stream, llama_folder, out, **options)


def test_a_classifier_is_refused(labelled: TaskStream, bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="--padding_free is for causal models; this one classifies"):
        run(labelled, bert_folder, tmp_path / "out", methods="seqft", learning_rates=3e-3, padding_free=True)
