"""A model that several processes can train as one does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training.conftest import llama_folder  # noqa: F401


@pytest.fixture
def model_folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A model without dropout, which is drawn in each process."""
    shutil.copytree(llama_folder, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.1', '"attention_dropout": 0.0'))
    return tmp_path / "model"
