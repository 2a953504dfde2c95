"""A small GPT-2 beside the Llama and the T5 of the training tests: one folder per layout of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.training.conftest import byte_tokenizer, llama_folder, rows, t5_folder

__all__ = ["llama_folder", "rows", "t5_folder"]


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(llama_folder: Path, t5_folder: Path, gpt2_folder: Path) -> Callable[[str], str]:
    """Return the folder of a model by its family."""
    known = {"llama": llama_folder, "t5": t5_folder, "gpt2": gpt2_folder}
    return lambda name: str(known[name])
