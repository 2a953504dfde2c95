"""Loads, protects, trains, resumes, releases and saves one model, and prints how much memory each of these took.

    python -m tests.training.phases WIDTH BLOCKS MODE FOLDER

A process of its own: peaks are the system's account of the whole process (Linux). Everything is done once with a
tiny model first, so that imports and pools are not taken for the model's.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import lorica
from lorica.data.collate import Collator
from lorica.methods import METHODS
from lorica.training.models import read_model, read_model_config
from lorica.training.output import make_output_dir, save_model
from lorica.training.trainer import fit
from tests.training.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()


def account(field: str) -> int:
    """Return bytes of this process: VmHWM (peak resident), VmRSS (resident) or RssAnon (without mapped files)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Phases:
    """Peak and growth of resident memory by phase, bytes; ``anonymous`` leaves mapped files out."""

    def __init__(self) -> None:
        gc.collect()
        self.start = {field: account(field) for field in ("VmRSS", "RssAnon")}
        self.peaks: dict[str, dict[str, int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        gc.collect()
        before, highest, done = account("VmRSS"), [0], threading.Event()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

        def watch() -> None:
            while not done.is_set():
                highest[0] = max(highest[0], account("RssAnon"))
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        yield
        done.set()
        watcher.join()
        peak = account("VmHWM")
        self.peaks[name] = {
            "peak": peak - self.start["VmRSS"],
            "growth": peak - before,
            "anonymous": highest[0] - self.start["RssAnon"],
        }


class Rows(Dataset[dict[str, list[int]]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [3, 4, 5], "labels": [3, 4, 5], "attention_mask": [1, 1, 1]}


def train(model: Any, folder: Path, **options: Any) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, report_to="none", disable_tqdm=True, use_cpu=True,
        logging_strategy="no", remove_unused_columns=False, save_strategy="steps", save_steps=2,
        max_steps=options.pop("max_steps"),
    )  # fmt: skip
    method, collate = METHODS["seqft"].build({}), Collator(TOKENIZER, seq2seq=False)
    fit(model, method, Rows(), TOKENIZER, collate, arguments, quiet=True, **options)


def held(model: Any) -> int:
    """Return the bytes of weights, W0 where it is no file, bases, cores, their gradients and AdamW's states."""
    cores = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + 3 * cores


def measure(folder: Path, width: int, blocks: int, mode: str) -> dict[str, Any]:
    """Go through all phases with a random Llama and return its sizes and peaks."""
    write_model(folder / "model", width, blocks)
    phases = Phases()
    with phases.phase("load"):
        model = read_model(str(folder / "model"), read_model_config(str(folder / "model")))
    with phases.phase("protect"):
        lorica.protect(model, lorica.plan(model, 0.25), memory=mode)
    steady = held(model)
    with phases.phase("train"):
        train(model, folder / "run", max_steps=3)
    with phases.phase("resume"):
        train(model, folder / "run", max_steps=4, resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    with phases.phase("release"):
        lorica.release(model)
    with phases.phase("save"):
        save_model(model, TOKENIZER, make_output_dir(str(folder / "saved")))
    return {"weights": sum(p.nbytes for p in model.parameters()), "steady": steady, "phases": phases.peaks}


def write_model(folder: Path, width: int, blocks: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": blocks}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=len(TOKENIZER), num_attention_heads=4, **sizes, **special)
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    width, blocks, mode, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    measure(folder / "warm-up", 24, 1, mode)
    gc.freeze()  # collecting what was imported takes half a second each time
    print(json.dumps(measure(folder, width, blocks, mode)))
