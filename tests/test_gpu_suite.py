"""The GPU suite, as far as a machine without a GPU can try it: the same code on tiny shapes, and its bookkeeping."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import splits, suite
from benchmarks.gpu.hardware import Cpu
from benchmarks.gpu.jobs import JOBS, Job
from benchmarks.gpu.lifts import Case, arithmetics, explicit_lift, high_low, reflector_lift
from benchmarks.gpu.methods import METHODS, adamw
from benchmarks.gpu.models import SHAPES, config_of, deepen, one_layer
from benchmarks.gpu.summary import summary
from benchmarks.gpu.workbench import Workbench, read_rows

from lorica.constrain.protect import protected_layers

ROOT = Path(__file__).parents[1]
QUICK = ("machine", "lifts", "splits", "steps-3b")


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench("job", Cpu(), tmp_path, 60, tiny=True)


def run_suite(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks/gpu/suite.py"), "--device", "cpu", "--tiny", *arguments]
    settings = {"LORICA_OUT": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def assert_complete(result: dict[str, Any], folder: Path) -> None:
    assert [job["message"] for job in result["jobs"] if job["status"] not in ("ok", "skipped")] == []
    assert [row for row in result["rows"] if row["status"] == "failed"] == []
    leaks = [row["master_leakage"] for row in result["rows"] if "master_leakage" in row]
    assert leaks
    assert max(leaks) < 1e-5
    assert sorted(file.name for file in folder.iterdir() if file.stat().st_size) == sorted(
        set(suite.FILES)
        if any(job["name"] == "profile" for job in result["jobs"])
        else {*suite.FILES} - {"profile.txt"}
    )


def test_parts_run_on_the_cpu(tmp_path: Path) -> None:
    result = run_suite(tmp_path, "--only", *QUICK)
    assert_complete(result, tmp_path)
    assert [job["name"] for job in result["jobs"]] == [job.name for job in JOBS if job.name in QUICK]
    steps = [row for row in result["rows"] if row["job"] == "steps-3b" and row.get("what") == "step"]
    assert all(row["ratio"] > 0 and row["update_seconds"] < row["seconds"] for row in steps if row["status"] == "ok")
    assert steps[-1]["method"] == "plain bf16 again"


@pytest.mark.slow
def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    result = run_suite(tmp_path)
    assert_complete(result, tmp_path)
    assert [job["name"] for job in result["jobs"]] == [job.name for job in JOBS]


def test_the_shares_leave_time_for_the_main_parts() -> None:
    names = [job.name for job in JOBS]
    before_8b = sum(job.seconds for job in JOBS[: names.index("steps-8b") + 1])
    assert before_8b < suite.BUDGET < 9 * 60
    assert len(set(names)) == len(names)


def test_only_and_device_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.options_of(["--only", "lift"])
    assert "no part is named lift" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        suite.options_of(["--device", "cpu"])
    assert "needs --tiny" in capsys.readouterr().err


def test_a_failure_costs_its_own_row(bench: Workbench, tmp_path: Path) -> None:
    assert bench.measure({"method": "a"}, lambda: {"x": 1 / 0}) is None
    assert bench.measure({"method": "b"}, lambda: {"x": 2}) is not None
    assert not bench.fits({"method": "c"}, 1e6)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"job": "cut o')
    first, second, third = read_rows(tmp_path)
    assert (first["status"], first["message"]) == ("failed", "ZeroDivisionError: division by zero")
    assert (second["status"], second["x"]) == ("ok", 2)
    assert third["status"] == "skipped"
    assert "needs about 1000000 s" in third["message"]


@pytest.fixture
def small_suite(tmp_path: Path) -> suite.Suite:
    return suite.Suite(argparse.Namespace(device="cpu", tiny=True, seconds=60.0, only=None), tmp_path)


def test_a_part_that_does_not_end_is_ended(small_suite: suite.Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "GRACE", 0.2)
    start = time.monotonic()
    monkeypatch.setattr(small_suite.options, "seconds", 5.4)  # the first part's share, and nothing to spare
    absent = Job("absent", "splits", 1.0, package="no_such_package")
    small_suite.run([Job("long", "splits", 0.1), absent, Job("late", "splits", 100.0)])
    assert time.monotonic() - start < 10
    assert [job["status"] for job in small_suite.jobs] == ["ended", "skipped", "skipped"]
    assert small_suite.jobs[2]["message"] == "no time left"
    assert "no_such_package" in small_suite.jobs[1]["message"]


def test_a_worker_that_is_ended_is_gone(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("w") as log:
        worker = suite.Worker("cpu", tmp_path, log, "off", tiny=True)
        answer = worker.do(JOBS[0], 60.0, 0.01)
        worker.end()
        assert (answer["status"], answer["fit"]) == ("ended", False)
        assert worker.process.poll() is not None
        worker = suite.Worker("cpu", tmp_path, log, "off", tiny=True)
        worker.end()
        assert worker.do(JOBS[0], 60.0, 10.0)["status"] == "failed"


def test_copies_of_the_layer_are_tensors_of_their_own() -> None:
    method = METHODS["lorica lean 0.75"]
    model = method.prepare(one_layer("Llama-3.1-8B", torch.bfloat16, "cpu", tiny=True))
    deepen(model, 3)
    layers = list(protected_layers(model).values())
    assert len(layers) == 21
    assert len({layer.core.data_ptr() for layer in layers}) == len({layer.weight.data_ptr() for layer in layers}) == 21
    ids = torch.arange(32)[None] % 64
    optimizer = adamw(model)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    for layer in layers:
        assert layer.core.detach().abs().max() > 0
        expected = (layer.base.float() + layer.delta()).bfloat16()
        assert torch.equal(layer.weight, expected)


def test_shapes_have_the_published_sizes() -> None:
    billions = {}
    for shape in SHAPES:
        config = config_of(shape, tiny=False)
        heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        attention = 2 * config.hidden_size * (config.hidden_size + heads)
        layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
        tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        billions[shape] = (config.num_hidden_layers * layer + tables + config.hidden_size) / 1e9
    assert billions == pytest.approx({"Llama-3.2-1B": 1.236, "Llama-3.2-3B": 3.213, "Llama-3.1-8B": 8.030}, abs=1e-3)


def test_high_and_low_parts_hold_sixteen_bits() -> None:
    torch.manual_seed(0)
    a = torch.randn(200, 100)
    high, low = high_low(a)
    assert high.dtype == low.dtype == torch.bfloat16
    assert ((high.float() + low.float() - a).abs() <= 2.0**-16 * a.abs()).all()


@pytest.mark.parametrize("build", [explicit_lift, reflector_lift])
def test_lifts_agree_with_their_definition(bench: Workbench, build: Any) -> None:
    case = Case.make(bench, 112, 32)
    allowed = {"fp32": 1e-6, "tf32": 1e-6, "bf16 hi+lo": 2e-5, "bf16": 1e-2}
    for how in arithmetics(bench):
        lift, q_u = build(case, how)
        torch.testing.assert_close(q_u.T @ q_u, torch.eye(q_u.shape[1], dtype=torch.float64))
        assert (q_u.T @ case.u).abs().max() < 1e-12
        exact = q_u @ case.core.double() @ case.q_v.T
        assert (lift().double() - exact).norm() <= allowed[how.name] * exact.norm()


def test_the_subspace_error_is_the_sine_of_the_angle() -> None:
    exact = torch.eye(5, dtype=torch.float64)[:, :2]
    turned = exact.clone()
    angle = torch.tensor(0.3, dtype=torch.float64)
    turned[:, 1] = angle.cos() * exact[:, 1] + angle.sin() * torch.eye(5, dtype=torch.float64)[:, 4]
    assert splits.subspace_error(turned, exact) == pytest.approx(angle.sin().item(), rel=1e-12)
    assert splits.subspace_error(exact @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double(), exact) < 1e-15


def test_newton_finds_the_polar_factor() -> None:
    torch.manual_seed(0)
    a = torch.randn(40, 40, dtype=torch.float64)
    p = splits.newton_polar(a)
    stretch = p.T @ a
    torch.testing.assert_close(p.T @ p, torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(stretch, stretch.T)
    assert torch.linalg.eigvalsh(stretch).min() > 0


def test_the_summary_shows_numbers_and_failures() -> None:
    good = {"job": "steps-1b", "what": "step", "method": "plain", "tokens": 4096, "status": "ok", "seconds": 0.25}
    good |= {"tokens_per_second": 16384.0, "ratio": 1.0, "update_seconds": 0.1, "peak_allocated": 2.5e9}
    bad = {"job": "steps-1b", "what": "step", "method": "other", "status": "failed", "message": "OutOfMemoryError: x"}
    ended = {"name": "steps-1b", "status": "ok", "seconds": 3.0, "message": ""}
    text = summary([ended], [good, bad])
    assert "16,384" in text
    assert "2.5" in text
    assert "failed: step, other: OutOfMemoryError: x" in text
    assert "steps-1b         ok" in text
