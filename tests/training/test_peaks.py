"""Loading, protecting, resuming, releasing and saving hold no second copy of the model: measured, phase by phase."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lorica
from lorica.config import build_config
from lorica.lineage import weights_sha256
from lorica.told import memory_told, progress_bar
from lorica.training import output
from lorica.training.model_state import load_weights
from lorica.training.models import read_model, read_model_config
from lorica.training.output import save_model
from lorica.update import train as update
from tests.builders import batch, protected_tiny, tiny, train, trainable
from tests.training.conftest import byte_tokenizer

ALLOWED = 1.15
"""Peak of each phase over what training holds, and of release and save over what was there before."""

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux' /proc")


def measured(width: int, blocks: int, mode: str, folder: Path) -> dict[str, Any]:
    """Run ``tests.training.phases`` in a process of its own."""
    command = [sys.executable, "-m", "tests.training.phases", str(width), str(blocks), mode, str(folder)]
    # Freed memory goes back to the system at once, instead of hiding what comes next.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


SLOW = [(512, 40, "fast", "peak"), (512, 40, "lean", "anonymous")]


@linux
@pytest.mark.parametrize(
    ("width", "blocks", "mode", "account"),
    [(288, 10, "fast", "peak"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_no_phase_holds_a_second_copy(width: int, blocks: int, mode: str, account: str, tmp_path: Path) -> None:
    """``anonymous`` leaves out mapped files, which is where ``lean`` keeps W0."""
    told = measured(width, blocks, mode, tmp_path)
    phases = told["phases"]
    assert told["weights"] > 3.5e7
    assert phases["train"]["anonymous"] > 0.8 * told["steady"], "what it is compared with is there"
    over = {name: peak[account] / told["steady"] for name, peak in phases.items()}
    assert max(over.values()) <= ALLOWED, over
    for name in ("release", "save"):
        assert phases[name]["growth"] <= (ALLOWED - 1) * told["weights"], (name, phases[name])


def test_the_peak_is_told_and_recorded(llama_folder: Path, rows: Callable[..., str], tmp_path: Path) -> None:
    values = {"model_name_or_path": str(llama_folder), "train_file": rows("new"), "output_dir": str(tmp_path / "out")}
    told: list[str] = []
    record = update(build_config(values | {"max_steps": 2, "disable_tqdm": True, "preset": "paper"}), say=told.append)
    cost = record["cost"]
    assert 2e8 < cost["peak_rss_bytes"] < 2e10
    assert (cost["peak_cuda_bytes"] is not None) == torch.cuda.is_available()
    assert memory_told(cost, record["model_parameters"]) in told
    (foretold,) = [line for line in told if line.startswith("memory: about ")]
    assert "expected, in " in foretold
    assert foretold.endswith(", fast")
    assert 2e8 < cost["expected_peak_bytes"] < 2e10


def test_each_stage_before_training_has_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after one that ends before its total, as answers to few prompts do."""
    told: list[tuple[str, int, str]] = []

    class Bar:
        def __init__(self, total: int, desc: str, leave: bool) -> None:
            self.total, self.desc, self.n = total, desc, 0

        def update(self, more: int) -> None:
            self.n += more

        def close(self) -> None:
            told.append((self.desc, self.n, f"of {self.total}"))

    monkeypatch.setattr("lorica.told.transformers_logging.tqdm", Bar)
    advance = progress_bar("splitting weights")
    for step in (
        ("writing text", 30, 100), ("writing text", 60, 100), ("measuring the model", 1, 2),
        ("measuring the model", 2, 2), ("a.weight", 1, 2), ("b.weight", 2, 2),
    ):  # fmt: skip
        advance(*step)
    assert told == [
        ("writing text", 60, "of 100"),
        ("measuring the model", 2, "of 2"),
        ("splitting weights", 2, "of 2"),
    ]


def test_a_method_that_cannot_be_forecast_says_so(llama_folder: Path, rows: Callable[..., str], tmp_path: Path) -> None:
    values = {"model_name_or_path": str(llama_folder), "train_file": rows("new"), "output_dir": str(tmp_path / "out")}
    told: list[str] = []
    record = update(build_config(values | {"max_steps": 2, "disable_tqdm": True, "method": "ewc"}), say=told.append)
    assert [line for line in told if line.startswith("memory: not forecast: ")]
    assert record["cost"]["expected_peak_bytes"] is None


def test_both_memories_are_told_where_there_are_two() -> None:
    cost = {"peak_rss_bytes": 3_000_000_000, "peak_cuda_bytes": 1_250_000_000, "trainable_parameters": 1234}
    line = "memory: peak 3.0 GB resident, 1.2 GB on the GPU; 1,234 numbers trained, 5,678 parameters"
    assert memory_told(cost, 5678) == line
    assert "peak unknown" in memory_told(cost | {"peak_rss_bytes": None, "peak_cuda_bytes": None}, 1)


def test_a_large_model_is_saved_in_several_files(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_model_config(str(llama_folder))
    model = read_model(str(llama_folder), config)
    monkeypatch.setattr(output, "MAX_SHARD", "60KB")
    save_model(model, byte_tokenizer(), tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 70_000
    again = read_model(str(tmp_path), config).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    assert weights_sha256(tmp_path) not in (None, weights_sha256(llama_folder))
    assert not lorica.audit(llama_folder, tmp_path, unfreeze_rank_ratio=0.5).elsewhere


# --- a checkpoint, module by module -------------------------------------------------------------------------------


def stepped(architecture: str, **options: Any) -> Any:
    """Return a protected model that has made a step."""
    model = protected_tiny(architecture, **options)
    optimizer = torch.optim.AdamW(trainable(model), 1e-2)
    train(model, optimizer, 2, lambda step: batch(model, step))
    return model


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one-file", "several-files"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "t5", "bert"])
def test_a_checkpoint_is_read_as_it_was_written(architecture: str, shard: str, tmp_path: Path) -> None:
    trained = stepped(architecture, train_also=["norm|ln_|layer_norm|LayerNorm"])
    trained.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard == "20KB"
    model = protected_tiny(architecture)
    assert load_weights(model, tmp_path)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in trained.state_dict().items())
    with torch.no_grad():
        expected, got = (one.eval()(**batch(one)).logits for one in (trained, model))
    assert torch.equal(expected, got), "the folded weights are used, not those from before"


def test_another_update_s_checkpoint_is_refused(tmp_path: Path) -> None:
    stepped("llama").save_pretrained(tmp_path)
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    lorica.protect(model, lorica.plan(model, 0.5))
    with pytest.raises(RuntimeError, match="core was saved by an update that began at another model"):
        load_weights(model, tmp_path)


def test_what_is_named_otherwise_is_left_to_the_trainer(tmp_path: Path) -> None:
    model = protected_tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not load_weights(model, tmp_path), "no weights at all, as beside an adapter"
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert not load_weights(model, tmp_path)
    some = {key: value.contiguous() for key, value in list(before.items())[:3]}
    save_file(some, tmp_path / "model.safetensors")
    assert not load_weights(model, tmp_path), "weights are missing"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
