"""No pickle is written, and none is run on loading: whatever lies where a run or a resumption could read it."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorica.errors import LoricaError
from lorica.scoring import evaluate_model
from lorica.scoring_options import EvalOptions
from lorica.training.models import read_model, read_model_config
from tests.reliability.small_runs import Bomb, bomb, files_in, is_pickle, rows_file, run, stream_of, update
from tests.training.conftest import llama_folder  # noqa: F401

LOADED_BY_OTHERS = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth",
    "training_args.bin", "pytorch_model.bin", "adapter_model.bin",
)  # fmt: skip
"""Files that the Trainer, PEFT and their kin would look for in a checkpoint."""


@pytest.fixture(scope="module")
def finished(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an update with its checkpoints, and of a run with its model."""
    folder = tmp_path_factory.mktemp("finished")
    rows = rows_file(folder / "data")
    update(llama_folder, folder / "out", rows, save_steps=2, save_total_limit=5, eval_file=rows, retention_file=rows)
    run(stream_of(folder / "data", ("one",)), llama_folder, folder / "runs", save_models=True)
    return folder


def torch_archive(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def test_a_pickle_is_known_in_every_form(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert is_pickle(pickle.dumps({"a": [1, Bomb(tmp_path / "x")]}, protocol=protocol))
    assert is_pickle(torch_archive(torch.ones(2)))
    assert is_pickle(torch_archive(torch.ones(2), _use_new_zipfile_serialization=False))
    assert not any(map(is_pickle, (b"", b"{}", b'{"a": 1}\n', b"<!DOCTYPE html>", b"# report", b"a: 1")))


def without_pickles(outputs: list[Path]) -> None:
    assert [file for file in outputs if is_pickle(file.read_bytes())] == []
    assert {file.suffix for file in outputs} <= {".json", ".jsonl", ".safetensors", ".html", ".md", ".jinja", ".txt"}
    assert not [file for file in outputs if file.name in LOADED_BY_OTHERS]


@pytest.mark.reliability("S1", "S3")
def test_no_file_of_an_update_or_a_run_is_a_pickle(finished: Path) -> None:
    outputs = [file for folder in ("out", "runs") for file in files_in(finished / folder)]
    assert {"lorica.json", "plan.json", "manifest.json", "run.json"} <= {file.name for file in outputs}
    assert any(file.parent.name == "checkpoint-4" for file in outputs)
    without_pickles(outputs)


@pytest.mark.slow
@pytest.mark.reliability("S1", "S3")
def test_no_file_of_a_sweep_or_of_methods_with_memories_and_adapters_is_one(llama_folder: Path, tmp_path: Path) -> None:
    run(stream_of(tmp_path / "data", ("one",)), llama_folder, tmp_path / "runs", learning_rates=[1e-3, 1e-2])
    options = {"source": "activation", "calibration": "random", "remember_tasks": True}
    methods = {"osft": {"method": "osft", "options": options}, "lora": {"method": "lora"}, "ewc": {"method": "ewc"}}
    run(stream_of(tmp_path / "data", methods=methods), llama_folder, tmp_path / "runs", save_models=True)
    outputs = files_in(tmp_path / "runs")
    assert {"sweep.json", "run.json", "model.safetensors"} <= {file.name for file in outputs}
    without_pickles(outputs)


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> tuple[Path, str]:
    """Return the folder of an update that was stopped before it ended, and its rows."""
    shutil.copytree(finished / "out", tmp_path / "out")
    for name in ("lorica.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    return tmp_path / "out", str(finished / "data" / "new.jsonl")


def resume(llama_folder: Path, out: Path, rows: str) -> tuple[dict[str, Any], list[str]]:
    options = {"save_steps": 2, "save_total_limit": 5, "eval_file": rows, "retention_file": rows}
    return update(llama_folder, out, rows, resume_from_checkpoint="true", **options)


@pytest.mark.reliability("S2")
@pytest.mark.parametrize("name", LOADED_BY_OTHERS)
def test_a_pickle_in_a_checkpoint_is_not_run(
    name: str, stopped: tuple[Path, str], llama_folder: Path, tmp_path: Path
) -> None:
    out, rows = stopped
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / name).write_bytes(bomb(tmp_path / "ran"))
    with pytest.raises(LoricaError, match=rf"{name} is a pickle, which no run of Lorica writes"):
        resume(llama_folder, out, rows)
    assert not (tmp_path / "ran").exists()


@pytest.mark.reliability("S2")
def test_a_run_goes_on_from_the_checkpoint_before_and_leaves_all_other_pickles_alone(
    stopped: tuple[Path, str], llama_folder: Path, tmp_path: Path
) -> None:
    out, rows = stopped
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    for folder in (out, model, out / "checkpoint-4"):
        for name in LOADED_BY_OTHERS:
            (folder / name).write_bytes(bomb(tmp_path / "ran"))
    _, told = resume(model, out, rows)
    assert any("checkpoint-4 is passed over: checkpoint-4/" in line and "is a pickle" in line for line in told)
    assert not (tmp_path / "ran").exists()
    assert (out / "model.safetensors").exists()


# --- weights that are pickles -----------------------------------------------------------------------------------------


@pytest.fixture
def pickled(llama_folder: Path, tmp_path: Path) -> Path:
    """Return a model whose weights are a pickle."""
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model


def sharded(model: Path) -> str:
    (model / "pytorch_model.bin").rename(model / "pytorch_model-00001-of-00001.bin")
    keys = torch.load(model / "pytorch_model-00001-of-00001.bin", weights_only=True)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "pytorch_model-00001-of-00001.bin")}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return "pytorch_model-00001-of-00001.bin"


def named_in_the_configuration(model: Path) -> str:
    (model / "pytorch_model.bin").rename(model / "adapter_model.bin")
    config = json.loads((model / "config.json").read_text()) | {"transformers_weights": "adapter_model.bin"}
    (model / "config.json").write_text(json.dumps(config))
    return "adapter_model.bin"


def load(folder: Path, **options: Any) -> Any:
    return read_model(str(folder), read_model_config(str(folder)), **options)


@pytest.mark.reliability("S4")
@pytest.mark.parametrize("form", [lambda model: "pytorch_model.bin", sharded, named_in_the_configuration])
def test_pickled_weights_are_refused_by_name_and_read_as_tensors_where_allowed(
    form: Callable[[Path], str], pickled: Path, llama_folder: Path
) -> None:
    name = form(pickled)
    with pytest.raises(LoricaError, match=rf"{name} is a pickle.*--allow_pickle"):
        load(pickled)
    expected = load_file(llama_folder / "model.safetensors")
    found = load(pickled, allow_pickle=True).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.reliability("S2", "S4")
@pytest.mark.parametrize("form", [lambda model: "pytorch_model.bin", sharded, named_in_the_configuration])
def test_code_in_pickled_weights_is_not_run_even_where_they_are_allowed(
    form: Callable[[Path], str], pickled: Path, tmp_path: Path
) -> None:
    (pickled / form(pickled)).write_bytes(torch_archive({"model.embed_tokens.weight": Bomb(tmp_path / "ran")}))
    for allowed in (False, True):
        with pytest.raises(LoricaError):
            load(pickled, allow_pickle=allowed)
    assert not (tmp_path / "ran").exists()


@pytest.mark.reliability("S2", "S4")
def test_a_pickled_adapter_is_refused_beside_whole_weights_too(llama_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(model)}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    (model / "adapter_model.bin").write_bytes(bomb(tmp_path / "ran"))
    with pytest.raises(LoricaError, match=r"adapter_model\.bin is a pickle"):
        load(model)
    with pytest.raises(LoricaError):
        load(model, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.reliability("S4")
def test_every_command_that_loads_a_model_has_the_option(pickled: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path)
    with pytest.raises(LoricaError, match="--allow_pickle"):
        update(pickled, tmp_path / "out", rows, max_steps=1)
    with pytest.raises(LoricaError, match="--allow_pickle"):
        run(stream_of(tmp_path / "data", ("one",)), pickled, tmp_path / "runs")
    options = {"model_name_or_path": str(pickled), "tasks": [rows], "limit": 2, "max_new_tokens": 1}
    with pytest.raises(LoricaError, match="--allow_pickle"):
        evaluate_model(EvalOptions(**options), lambda line: None)
    assert evaluate_model(EvalOptions(**options, allow_pickle=True), lambda line: None)["scores"]
