"""What measuring before a task takes, foretold from shapes: against the passes of real models, and by hand."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

import lorica
from lorica.config import UpdateConfig
from lorica.constrain.plan_counts import wanted
from lorica.constrain.targets import find_targets
from lorica.forecast import measuring
from lorica.forecast.dry_model import blank_model
from lorica.forecast.dry_run import Batch
from lorica.forecast.ledger import Ledger
from lorica.forecast.measuring import DIRECTIONS, MOMENTS, Shown, dry_measure, shown
from lorica.forecast.needs import FREED, Phase
from lorica.forecast.rates import Machine
from lorica.forecast.result import Forecast, Way
from lorica.forecast.story import forecast
from lorica.methods.own_texts import Amount
from lorica.subspace import observe
from lorica.subspace.calibration import LENGTH
from lorica.subspace.measure import measure
from tests.builders import batch, tiny
from tests.forecast.conftest import Folder, profiled
from tests.forecast.test_forecast import CPU, GPU, SMALL
from tests.training.conftest import byte_tokenizer

CURVATURE = {"source": "curvature", "unfreeze_rank_ratio": 0.5}

texts = partial(Amount, length=LENGTH)
NOTHING = texts(0)


def told(folder: str, machine: Machine = CPU, **options: Any) -> Forecast:
    return forecast({"model_name_or_path": folder, **SMALL, **options}, machine=machine)


def settings(**options: Any) -> UpdateConfig:
    return UpdateConfig(model_name_or_path="m", train_file="rows", output_dir="out", **options)


def phase(way: Way, name: str) -> Phase:
    return next(one for one in way.phases if one.name == name)


def phase_of(phases: Sequence[Phase]) -> int:
    """Return the bytes of the phase of measuring."""
    return next(sum(one.device.values()) for one in phases if one.name == "measure")


def names(way: Way) -> list[str]:
    return [one.name for one in way.phases]


@pytest.mark.parametrize("source", ["curvature", "activation"])
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "qwen3"])
def test_a_blank_pass_holds_what_the_profiler_sees_of_a_real_one(name: str, source: Any) -> None:
    model, options = tiny(name), {"source": source, "unfreeze_rank_ratio": 0.5}
    plan = lorica.plan(model, **options, calibration="random")
    sides, targets = {entry.name: wanted(entry, marginal=False) for entry in plan.entries}, find_targets(model)
    inputs = batch(model, rows=8, length=32)
    size = Batch(8, 32)
    if name == "t5":  # of inputs and targets of one length the encoder's would be padded, and so need a mask
        inputs["labels"], size = inputs["labels"][:, :30].clone(), Batch(8, 32, 30)
    measure(model, targets, [inputs], sides)  # the profiler would see the libraries' own first steps
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        measure(model, targets, [inputs], sides, together=lambda sums: {})
    made = dry_measure(tiny(name).to("meta"), settings(**options), plan, Shown(size, 1, NOTHING), CPU)
    held = made.peak.total() - made.peak["weights"] - sum(value.nbytes for value in inputs.values())
    assert held == pytest.approx(profiled(profiler), rel=0.05)
    sums = sum(8 * dim**2 for side in sides.values() for dim, rank in zip(side.shape, side[:0:-1], strict=True) if rank)
    assert made.peak[MOMENTS] == sums


def test_the_directions_are_those_that_a_plan_measures() -> None:
    """Counted as if layers had nothing in common."""
    model = tiny("llama")
    plan = lorica.plan(model, **CURVATURE, calibration="random")
    made = dry_measure(tiny("llama").to("meta"), settings(**CURVATURE), plan, Shown(Batch(2, 8), 1, NOTHING), CPU)
    found = [plan.factors(name) for name in plan.names()]
    sides = [side for one in found if one is not None for side in (one.inputs, one.outputs)]
    assert made.directions == sum(side.vectors_DR.nbytes for side in sides if side is not None)


def test_a_table_has_a_row_for_it_and_plain_fine_tuning_has_none(config_folder: Folder) -> None:
    folder = config_folder("llama")
    result, plain = told(folder, **CURVATURE), told(folder)
    assert names(result.ways[0]) == ["load", "measure", "split", "train", "audit", "save"]
    assert names(result.ways[1]) == names(plain.ways[0]) == ["load", "split", "train", "audit", "save"]
    rows = {line.split("  ")[0]: line.split()[-2:] for line in result.table().splitlines()}
    assert rows["writing and measuring, estimated"][0] == "0", "of plain fine-tuning: 0 s"
    assert any(line.startswith("  while it runs: measure") for line in result.table().splitlines())
    assert "writing and measuring" not in plain.table()
    way = result.to_json()["ways"][0]
    assert way["measure_seconds"] > 0
    assert json.loads(json.dumps(way)) == way


def test_the_split_begins_with_what_was_measured(config_folder: Folder) -> None:
    split = {name: phase(told(config_folder("llama"), **options).ways[0], "split").device
             for name, options in (("measured", CURVATURE), ("weight", {"unfreeze_rank_ratio": 0.5}))}  # fmt: skip
    assert split["measured"][DIRECTIONS] > 0
    assert DIRECTIONS not in split["weight"]


def test_freed_memory_is_kept_by_a_cpu_alone(config_folder: Folder) -> None:
    folder = config_folder("llama")
    measured = {device.device: phase(told(folder, device, **CURVATURE).ways[0], "measure") for device in (CPU, GPU)}
    assert (measured["cpu"].device.get(FREED, 0) > 0) == (sys.platform == "linux")
    assert FREED not in measured["cuda"].device


def test_a_rehearsing_model_writes_and_measures_what_it_wrote(config_folder: Folder) -> None:
    folder = config_folder("llama")
    seconds = [
        told(folder, **options).ways[0].measure_seconds
        for options in ({}, {"rehearse": 0.5}, CURVATURE, CURVATURE | {"rehearse": 0.5, "rehearse_tokens": 65_536})
    ]
    assert seconds[0] == 0
    assert 0 < seconds[1] < seconds[2]
    assert seconds[3] > 1.9 * seconds[2], "writing and passes are twice as long, what is made of the sums is not"


@pytest.mark.parametrize(
    ("family", "options", "prompt", "expected"),
    [
        ("llama", {"source": "weight"}, 0, Shown(None, 0, NOTHING)),
        ("llama", {"source": "weight", "rehearse": 0.5}, 0, Shown(None, 0, texts(32_768))),
        ("llama", CURVATURE, 0, Shown(Batch(64, LENGTH), 8, texts(32_768))),
        ("llama", CURVATURE | {"calibration_tokens": 8192}, 0, Shown(Batch(64, LENGTH), 2, texts(8192))),
        ("llama", CURVATURE | {"calibration": "random"}, 0, Shown(Batch(16, LENGTH), 4, NOTHING)),
        (
            "llama",
            CURVATURE | {"rehearse": 1.0, "rehearse_tokens": 16_384},
            0,
            Shown(Batch(64, LENGTH), 4, texts(16_384)),
        ),
        ("llama", CURVATURE | {"rehearse": 1.0}, 9, Shown(Batch(64, LENGTH + 9), 4, texts(32_768))),
        ("llama", {"ranks": "importance"}, 0, Shown(Batch(64, LENGTH), 8, texts(32_768))),
        ("t5", CURVATURE, 0, Shown(Batch(16, LENGTH, LENGTH), 4, NOTHING)),
        ("t5", CURVATURE, 9, Shown(Batch(64, 9, LENGTH), 8, texts(32_768))),
        (
            "t5",
            CURVATURE | {"rehearse": 1.0, "calibration_tokens": 4096},
            9,
            Shown(Batch(64, 9, LENGTH), 1, texts(32_768)),
        ),
    ],
    ids=str,
)
def test_what_a_model_is_shown(family: str, options: dict[str, Any], prompt: int, expected: Shown) -> None:
    model = tiny(family)
    source = options.get("source", "weight")
    plan = lorica.plan(model, source=source, calibration=None if source == "weight" else "random")
    assert shown(settings(**options), plan, model.config, prompt) == expected


def test_a_calibration_file_is_read_for_it(config_folder: Folder, tmp_path: Path) -> None:
    folder = config_folder("llama", vocab_size=len(byte_tokenizer()))
    byte_tokenizer().save_pretrained(folder)
    file = tmp_path / "shown.jsonl"
    seconds = []
    for count in (8, 64):
        file.write_text("".join('{"prompt": "a", "completion": "bcd"}\n' for _ in range(count)), encoding="utf-8")
        seconds.append(told(folder, **CURVATURE, calibration_file=str(file)).ways[0].measure_seconds)
    assert 0 < seconds[0] < seconds[1]


def test_a_large_vocabulary_goes_through_in_parts(config_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What measuring holds beside the weights does not grow with the logits of all texts together."""
    monkeypatch.setattr(observe, "PART", 2**20)
    held = {}
    for vocabulary in (64, 8000):
        way = told(config_folder("llama", vocab_size=vocabulary), **CURVATURE).ways[0]
        device = phase(way, "measure").device
        held[vocabulary] = sum(device.values()) - device["weights"] - device["process"]
    assert held[8000] < 6 * 4 * 2**20
    assert held[64] > held[8000] / 20


def test_the_second_part_meets_the_sums_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients' sums begin with the first backward pass, so that the second forward pass is the peak."""
    plan = lorica.plan(tiny("llama"), **CURVATURE, calibration="random")

    def measured(rows: int, together: int) -> Any:
        monkeypatch.setattr(measuring, "rows_together", lambda *_: together)
        shapes = Shown(Batch(rows, 16), 1, NOTHING)
        return dry_measure(tiny("llama").to("meta"), settings(**CURVATURE), plan, shapes, CPU)

    once, often = measured(8, 8), measured(64, 8)
    assert often.peak.total() > once.peak.total()
    assert often.seconds > once.seconds
    model, sides = tiny("llama"), {entry.name: wanted(entry, marginal=False) for entry in plan.entries}
    inputs = batch(model, rows=24, length=16)
    monkeypatch.setattr(observe, "rows_together", lambda *_: 8)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        measure(model, find_targets(model), [inputs], sides, together=lambda sums: {})
    held = often.peak.total() - often.peak["weights"] - 2 * 3 * 8 * 16 * 8  # two parts' own tensors
    assert held == pytest.approx(profiled(profiler), rel=0.05)


def test_what_processes_share_goes_through_whole(config_folder: Folder) -> None:
    folder = config_folder("llama", vocab_size=20_000)
    plan = lorica.plan(tiny("llama"), **CURVATURE, calibration="random")
    shapes = Shown(Batch(64, 64), 1, NOTHING)
    model = blank_model(settings(**CURVATURE), AutoConfig.from_pretrained(folder))
    cut, whole = (
        dry_measure(model, settings(**CURVATURE), plan, shapes, CPU, whole=whole).peak.total()
        for whole in (False, True)
    )
    assert whole > 64 * 64 * 20_000 * 4 * 3 > cut
    shared = told(folder, **CURVATURE, calibration="random", fsdp="full_shard", devices=2).ways[0].shares[-1]
    alone = told(folder, **CURVATURE, calibration="random").ways[0]
    assert phase_of(shared.phases) > 2 * phase_of(alone.phases)


def test_a_plan_from_a_file_may_hold_other_weights(config_folder: Folder, tmp_path: Path) -> None:
    plan = lorica.plan(tiny("llama"), source="curvature", calibration="random", target_modules=["lm_head", ".*q_proj"])
    plan.save(tmp_path / "plan.json")
    way = told(config_folder("llama"), plan_file=str(tmp_path / "plan.json")).ways[0]
    assert phase(way, "measure").device[MOMENTS] > 0


def test_a_mask_leaves_all_of_a_blank_tensor_and_nothing_else_is_touched() -> None:
    mask = torch.tensor([True, False, True])
    with Ledger():
        assert torch.arange(3.0)[mask].tolist() == [0.0, 2.0]
        blank = torch.empty(3, 5, 7, device="meta")
        assert blank[mask.to("meta")].shape == (3, 5, 7)
        assert blank[torch.ones(3, 5, dtype=torch.bool, device="meta")].shape == (15, 7)
        assert blank[:, torch.zeros(2, dtype=torch.int64, device="meta")].shape == (3, 2, 7)


REHEARSE = """
import torch
from tests.training.phases import account
from transformers import LlamaConfig, LlamaForCausalLM
from lorica.methods.rehearsal import Rehearsal

sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes))
ids = torch.randint(32_000, (64, 64))
held = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
Rehearsal.of(model, [{name: value[:2] for name, value in held.items()}], 1.0, 1.0)
before = account("RssAnon")
kept = Rehearsal.of(model, [held], 1.0, 1.0)
print(account("RssAnon") - before - kept.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_what_is_rehearsed_does_not_scatter_over_the_heap() -> None:
    """Row by row 64 texts left 1 GB behind that was freed and not given back."""
    command = [sys.executable, "-c", REHEARSE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout.split()[-1]) < 3e8


def test_a_pass_leaves_the_plan_and_the_model_alone() -> None:
    model = tiny("llama").to("meta")
    plan = lorica.plan(tiny("llama"), **CURVATURE, calibration="random")
    dry_measure(model, settings(**CURVATURE), plan, Shown(Batch(4, 8), 1, NOTHING), CPU)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
