"""The whole forecast: from a config.json and rows to a table, JSON and a verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import lorica
from lorica.cli import app
from lorica.config import UpdateConfig
from lorica.constrain.audit_weight import audit_weight
from lorica.errors import LoricaError
from lorica.forecast.dry_model import assumed_plan, begin
from lorica.forecast.ledger import Operation
from lorica.forecast.needs import audit_workspace, split_workspace
from lorica.forecast.options import build_forecast_config, parse_bytes
from lorica.forecast.rates import Machine, host_memory, machine_for, split_seconds, this_machine
from lorica.forecast.result import Forecast
from lorica.forecast.story import forecast
from lorica.subspace.linalg import split
from lorica.subspace.orthonormal import complement, reflector
from lorica.subspace.plan_entry import PlanEntry
from tests.builders import tiny
from tests.forecast.conftest import Folder, profiled
from tests.training.conftest import byte_tokenizer

GB = 10**9
CPU = Machine("cpu", "a CPU", 8 * GB, process=10**8, flops=1e11, narrow_flops=1e11, bandwidth=1e10, eigh=1e-9)
GPU = Machine("cuda", "a GPU", 8 * GB, process=10**8, flops=1e14, narrow_flops=2e14, bandwidth=1e12)
SMALL = {"per_device_train_batch_size": 2, "max_length": 16, "use_cpu": True, "preset": "paper"}


def told(folder: str, machine: Machine = CPU, **options: Any) -> Forecast:
    return forecast({"model_name_or_path": folder, **SMALL, **options}, machine=machine)


def test_a_config_file_is_enough(config_folder: Folder) -> None:
    folder = config_folder("llama")
    assert [path.name for path in Path(folder).iterdir()] == ["config.json"]
    result = told(folder)
    assert [way.label for way in result.ways] == ["osft, fast", "plain fine-tuning"]
    assert (result.batch.rows, result.batch.length, result.steps) == (2, 16, None)
    assert "no data given" in result.table()
    assert json.loads(json.dumps(result.to_json()))["ways"][0]["device_bytes"] == result.ways[0].device_bytes


def test_what_deepspeed_shares_out_is_counted_whole(config_folder: Folder) -> None:
    folder = config_folder("llama")
    shared, copied = told(folder, deepspeed={"zero_optimization": {"stage": 2}}), told(folder)
    assert [way.device_bytes for way in shared.ways] == [way.device_bytes for way in copied.ways]
    assert "deepspeed: all of the optimizer's states are counted in each process" in shared.table()
    with pytest.raises(LoricaError, match="ZeRO-3 takes the weights apart"):
        told(folder, deepspeed={"zero_optimization": {"stage": 3}})


def test_the_sum_of_the_table_is_the_peak_of_its_phases(config_folder: Folder) -> None:
    for way in told(config_folder("llama")).ways:
        sums = {phase.name: sum(phase.device.values()) for phase in way.phases}
        assert list(sums) == ["load", "split", "train", "audit", "save"]
        assert way.device_bytes == max(sums.values()) == sums[way.peak.name]
        assert all(phase.device["process"] == CPU.process for phase in way.phases)


def test_beside_a_gpu_the_host_has_a_column_of_its_own(config_folder: Folder) -> None:
    folder = config_folder("llama")
    fast, lean = (told(folder, GPU, memory_mode=mode).ways[0] for mode in ("fast", "lean"))
    train = {phase.name: phase for phase in lean.phases}["train"]
    assert "W0" in fast.peak.device
    assert "W0" not in lean.peak.device
    assert train.host["W0"] == next(phase for phase in fast.phases if phase.name == "train").device["W0"]
    assert train.host["process"] == GPU.process


def test_the_largest_share_fits_to_the_byte_and_more_memory_fits_more(config_folder: Folder) -> None:
    folder = config_folder("llama")
    needed = told(folder, GPU, unfreeze_rank_ratio=0.5, max_length=64).ways[0].device_bytes
    none, less, enough, all_ = (
        told(folder, Machine("cuda", "a GPU", memory, process=0), max_length=64)
        for memory in (1000, needed - 1, needed, 8 * GB)
    )
    assert none.largest == {"fast": None, "lean": None}
    assert "no unfreeze_rank_ratio fits" in none.table()
    assert less.largest["fast"] == 0.45
    assert enough.largest["fast"] == 0.5 <= enough.largest["lean"]  # type: ignore[operator]
    assert all_.largest == {"fast": 0.95, "lean": 0.95}


@pytest.fixture
def llama_with_tokenizer(config_folder: Folder) -> str:
    folder = config_folder("llama", vocab_size=259)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[int]], str]:
    """Write rows of the given numbers of tokens."""

    def rows(lengths: list[int]) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"input_ids": [5] * n, "labels": [5] * n}) + "\n" for n in lengths))
        return str(file)

    return rows


def test_the_data_set_the_batch_and_the_steps(llama_with_tokenizer: str, write: Callable[[list[int]], str]) -> None:
    file = write([4, 9, 5, 6, 4, 4, 7])
    result = told(llama_with_tokenizer, train_file=file, num_train_epochs=3, gradient_accumulation_steps=2)
    assert (result.batch.rows, result.batch.length) == (2, 9)
    assert result.steps == 6  # 7 rows are 4 batches, 2 steps an epoch
    cut = told(llama_with_tokenizer, train_file=file, max_length=5, max_steps=11)
    assert (cut.batch.length, cut.steps) == (5, 11)


def test_rows_end_to_end_are_as_long_as_their_sum_and_have_a_mask(
    llama_with_tokenizer: str, write: Callable[[list[int]], str]
) -> None:
    file = write([4, 90, 5, 6, 4, 4, 7])
    padded, flat, flash = (
        told(llama_with_tokenizer, train_file=file, max_length=100, **given)
        for given in ({}, {"padding_free": True}, {"padding_free": True, "attn_implementation": "flash_attention_2"})
    )
    assert (padded.batch.rows, padded.batch.length) == (2, 90)
    assert [(one.batch.rows, one.batch.length, one.batch.masked) for one in (flat, flash)] == [
        (1, 97, True), (1, 97, False),
    ]  # fmt: skip
    peaks = [one.ways[1].device_bytes for one in (padded, flat, flash)]
    assert peaks[2] < peaks[1] < peaks[0]
    assert peaks[1] - peaks[2] >= 97 * 97
    nothing = told(llama_with_tokenizer, padding_free=True)
    assert (nothing.batch.rows, nothing.batch.length) == (1, 32)


def test_time_is_that_of_the_mean_batch_and_memory_that_of_the_largest(
    llama_with_tokenizer: str, write: Callable[[list[int]], str]
) -> None:
    even = told(llama_with_tokenizer, train_file=write([16] * 20)).ways[0]
    uneven = told(llama_with_tokenizer, train_file=write([16] + [4] * 19)).ways[0]
    train = [next(phase for phase in way.phases if phase.name == "train") for way in (even, uneven)]
    assert train[0].device == train[1].device
    assert even.step_seconds > uneven.step_seconds  # type: ignore[operator]


def test_rows_to_be_scored_are_a_phase_with_a_batch_of_its_own(
    llama_with_tokenizer: str, write: Callable[[list[int]], str], tmp_path: Path
) -> None:
    held_out = tmp_path / "eval.jsonl"
    train = write([4] * 4)
    held_out.write_text(Path(write([16] * 9)).read_text().replace("5", "6"))
    write([4] * 4)
    way = told(llama_with_tokenizer, train_file=train, eval_file=str(held_out), per_device_eval_batch_size=8).ways[0]
    score = next(phase for phase in way.phases if phase.name == "score").device
    logits = 8 * 16 * 259 * 4
    assert logits <= score["logits and loss"] <= 4 * logits
    assert "gradients" not in score


def test_a_bad_row_shows_at_once(llama_with_tokenizer: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(LoricaError, match=r"bad\.jsonl"):
        told(llama_with_tokenizer, train_file=str(file))


def test_disk_by_hand(config_folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path))
    folder = config_folder("llama", hidden_size=256, intermediate_size=512)
    way = told(folder, max_steps=10, save_steps=2, save_total_limit=1, unfreeze_rank_ratio=0.5).ways[0]
    held = next(phase for phase in way.phases if phase.name == "train").device
    assert way.disk.model == held["weights"]
    assert way.disk.checkpoints == 2 * (held["weights"] + held["cores"] + held["optimizer states"])
    square = 8 * (256 * 256 + 256)  # q, o, gate, up and down; k and v have 128 rows and are split faster than read
    assert way.disk.cache == 2 * 5 * square
    assert told(folder, save_strategy="no").ways[0].disk.checkpoints == 0


def test_the_best_checkpoint_is_kept_beside_the_newest(config_folder: Folder) -> None:
    chosen = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    plain, best = (
        told(config_folder("llama"), max_steps=10, save_steps=2, save_total_limit=1, **options).ways[0].disk
        for options in ({}, chosen)
    )
    assert (best.lasting, 2 * best.checkpoints) == (2, 3 * plain.checkpoints)


@pytest.mark.parametrize(("m", "n", "k"), [(300, 300, 75), (300, 300, 225), (800, 300, 150), (300, 800, 250)])
def test_the_workspace_covers_the_split_and_not_much_more(m: int, n: int, k: int) -> None:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        parts = split(weight, k)
        for basis in (parts.u_MK, parts.v_NK):
            _ = reflector(basis) if 2 * k < len(basis) else complement(basis)
    assert 0.9 * profiled(profiler) <= split_workspace(m, n, k) <= 2 * profiled(profiler)


@pytest.mark.parametrize(("m", "n", "k"), [(300, 300, 75), (800, 300, 150)])
def test_the_audit_holds_what_the_profiler_sees(m: int, n: int, k: int) -> None:
    before = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    entry = PlanEntry(name="layer", shape=(m, n), k=k)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        audit_weight(before, before + 1, entry, master_delta_MN=before.clone())
    assert 0.8 * profiled(profiler) <= audit_workspace(m, n, k) <= 1.25 * profiled(profiler)


def test_the_roofline_by_hand() -> None:
    work = {
        Operation(2 * 10**11, 100, narrow=False): 3,  # 2 s of arithmetic each
        Operation(0, 5 * 10**10, narrow=False): 1,  # 5 s of memory
        Operation(0, 0, narrow=False): 2,  # the least there is
    }
    assert CPU.seconds(work) == pytest.approx(3 * 2 + 5 + 2 * CPU.launch)
    assert Machine("cuda", "unknown", GB, process=0).seconds(work) is None
    narrow = {Operation(4 * 10**14, 0, narrow=True): 1}
    assert GPU.seconds(narrow) == pytest.approx(2.0)


def test_the_split_grows_with_the_cube() -> None:
    one, eight = (split_seconds({(n, n): 1}, CPU) for n in (100, 200))
    assert eight == pytest.approx(8 * one)  # type: ignore[operator]
    assert split_seconds({(100, 300): 2, (300, 100): 1}, CPU) == split_seconds({(100, 300): 3}, CPU)


@given(st.integers(1, 10**6), st.sampled_from([("GB", 10**9), ("MiB", 2**20), ("kb", 1000), ("", 1)]))
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{number}{unit[0]}") == parse_bytes(f"{number} {unit[0]}") == number * unit[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_memory": "24 parsecs"}, "--device_memory: expected a size"),
        ({"bandwidth": 0}, "--bandwidth: expected a rate above 0"),
        ({"train_file": "a", "dataset_name": "b"}, "one of them"),
        ({"peak_flop": 3}, "unknown option --peak_flop"),
        ({"torch_compile": True}, "--torch_compile cannot be forecast"),
    ],
)
def test_mistakes_are_named(config_folder: Folder, options: dict[str, Any], said: str) -> None:
    values = {"model_name_or_path": config_folder("llama"), "use_cpu": True}
    with pytest.raises(LoricaError, match=said):
        forecast(values | options, machine=CPU)


def test_the_command_writes_json_and_says_if_it_does_not_fit(config_folder: Folder, tmp_path: Path) -> None:
    file = tmp_path / "forecast.json"
    words = ["check", "--model_name_or_path", config_folder("llama"), "--max_length", "16", "--device", "cuda"]
    words += ["--device_memory", "1MB", "--peak_flops", "1e14", "--bandwidth", "1e12", "--json", str(file)]
    done = CliRunner().invoke(app, [*words, "--memory_mode", "lean", "--use_cpu"])
    assert done.exit_code == 1, done.output
    assert "does not fit" in done.output
    record = json.loads(file.read_text())
    assert record["fits"] is False
    assert record["ways"][0]["label"] == "osft, lean"
    assert record["ways"][0]["step_seconds"] > 0
    assert record["versions"]["torch"] == torch.__version__


def test_this_machine_is_measured() -> None:
    machine = this_machine("cpu")
    assert machine.memory == host_memory() > 10**8
    assert 10**7 < machine.process < machine.memory
    for rate in (machine.flops, machine.narrow_flops, machine.bandwidth):
        assert rate is not None
        assert 10**8 < rate < 10**15
    assert machine_for("cpu", memory=5, bandwidth=7.0).bandwidth == 7.0


def test_a_gpu_that_is_not_here_needs_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoricaError, match="--device_memory"):
        machine_for("cuda")


@pytest.mark.parametrize("source", ["weight", "activation", "curvature", "hybrid"])
@pytest.mark.parametrize(
    "amount", [{"unfreeze_rank_ratio": 0.3}, {"effective_rank": 12}, {"effective_rank": 0.7}], ids=str
)
def test_uniform_plans_are_told_exactly(source: Any, amount: dict[str, Any]) -> None:
    """The model has half as many keys as queries, and a pattern for one weight."""
    model, pattern = tiny("llama"), {"k_proj": 0.75, "layers.0.mlp.down_proj": 3}
    needed = {} if source == "weight" else {"calibration": "random"}
    made = lorica.plan(model, source=source, rank_pattern=pattern, **needed, **amount)
    told = UpdateConfig(
        model_name_or_path="m", train_file="rows", output_dir="out", source=source, rank_pattern=pattern, **amount
    )
    assert assumed_plan(model, told).entries == made.entries


def test_one_device_cannot_share_a_model() -> None:
    with pytest.raises(LoricaError, match="--fsdp shards over several devices: give --devices"):
        build_forecast_config({"model_name_or_path": "m", "train_file": "rows", "fsdp": "full_shard"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expected_forgetting": 0.1}, "expected_forgetting has no effect with ranks 'uniform'"),
        ({"remember_tasks": True}, "remember_tasks has no effect with source 'weight'"),
        ({"rehearse_weight": 3.0}, "rehearse_weight has no effect without rehearse"),
        ({"rehearse_tokens": 9}, "rehearse_tokens has no effect without rehearse"),
        ({"calibration_tokens": 9}, "calibration_tokens has no effect: nothing of what is protected is measured"),
        (
            {"source": "curvature", "calibration_tokens": 9, "calibration_file": "f"},
            "calibration_tokens .* beside",
        ),
        ({"rehearse_prompts": 0.1}, "rehearse_prompts has no effect without rehearse"),
        ({"ranks": "marginal"}, "ranks 'marginal' weighs measured energies"),
        ({"ranks": "energy", "source": "curvature"}, "ranks 'energy' reads the weight's spectrum"),
    ],
)
def test_options_that_do_not_fit_together_are_refused_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        begin(None, UpdateConfig(model_name_or_path="m", train_file="rows", output_dir="out", **options), None)  # type: ignore[arg-type]
