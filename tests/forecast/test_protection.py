"""``lorica check --measure``: what a plan protects of a real model, against plans and dense matrices made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorica.cli import app
from lorica.config import UpdateConfig
from lorica.errors import LoricaError
from lorica.forecast.dry_model import assumptions
from lorica.forecast.options import build_forecast_config
from lorica.forecast.protection import ALL, Protection, measured, protection_text
from lorica.methods import own_texts
from lorica.subspace.calibration import own_text
from lorica.subspace.measure import Wanted, measure
from lorica.update import train
from tests.methods.little_text import little_text  # noqa: F401
from tests.training.conftest import llama_folder, rows, t5_folder  # noqa: F401


def look(folder: Path, **options: Any) -> list[Protection]:
    config = {"model_name_or_path": str(folder), "use_cpu": True, "measure": True, "unfreeze_rank_ratio": 0.5}
    return measured(build_forecast_config(config | {"preset": "paper"} | options))


def test_curvature_and_the_weights_own_directions(llama_folder: Path) -> None:
    curvature, weight = look(llama_folder, source="curvature")
    assert [one.source for one in (curvature, weight)] == ["curvature", "weight"]
    assert curvature.groups.keys() == weight.groups.keys()
    assert {"self_attn.q_proj", "mlp.down_proj", ALL} < curvature.groups.keys()
    for kind, mine in curvature.groups.items():
        theirs = weight.groups[kind]
        assert mine.free <= theirs.free
        for side in ("inputs", "outputs"):
            one, other = getattr(mine, side), getattr(theirs, side)
            assert one.protected == pytest.approx(one.best, abs=0.01)
            assert other.protected < other.best
        assert mine.expected < theirs.expected
    text = protection_text([curvature, weight])
    assert f"source curvature leaves {100 * curvature.groups[ALL].expected:.3g} % of what a change" in text


def test_the_shares_are_those_of_dense_matrices(llama_folder: Path) -> None:
    """Of the weights' own directions, by hand, of one kind of layer."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    layers = {name: model.get_submodule(name) for name in names}
    wanted = {name: Wanted(tuple(one.weight.shape), *one.weight.shape[::-1]) for name, one in layers.items()}
    found = measure(model, layers, own_text(model), wanted)
    opened, whole, free, size, held = 0.0, 0.0, 0, 0, []
    for name in names:
        w = layers[name].weight.detach().double()
        u, _, vh = torch.linalg.svd(w)
        k = min(w.shape) // 2
        assert found[name].inputs is not None
        assert found[name].outputs is not None
        a, b = found[name].inputs.matrix(), found[name].outputs.matrix()
        opened += float((u[:, k:].T @ b @ u[:, k:]).trace() * (vh[k:] @ a @ vh[k:].T).trace())
        whole += float(a.trace() * b.trace())
        free, size = free + (w.shape[0] - k) * (w.shape[1] - k), size + w.numel()
        held.append(float((vh[:k] @ a @ vh[:k].T).trace() / a.trace()))
    (weight,) = look(llama_folder)
    group = weight.groups["mlp.up_proj"]
    assert group.expected == pytest.approx(opened / free / (whole / size), rel=0.01)
    assert group.inputs is not None
    assert group.inputs.protected == pytest.approx(sum(held) / 2, rel=0.01)


def test_activation_is_compared_under_its_own_constraint(llama_folder: Path, rows: Callable[..., str]) -> None:
    activation, weight = look(llama_folder, source="activation", calibration_file=rows("old"))
    assert [one.constraint for one in (activation, weight)] == ["input", "input"]
    group = activation.groups[ALL]
    assert group.outputs is not None
    assert group.outputs.protected == 0
    assert group.inputs is not None
    assert group.inputs.protected > 0.9 * group.inputs.best


def test_the_model_is_not_loaded_unless_asked_for(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.forecast.protection.load_model", None)
    command = ["check", "--model_name_or_path", str(llama_folder), "--use_cpu", "--peak_flops", "1e9"]
    told = CliRunner().invoke(app, [*command, "--bandwidth", "1e9", "--device_memory", "8GB"])
    assert told.exit_code == 0, told.output
    assert "protected by" not in told.output


def test_the_command_prints_and_writes_it(llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    command = ["check", "--model_name_or_path", str(llama_folder), "--use_cpu", "--peak_flops", "1e9", "--measure"]
    command += ["--bandwidth", "1e9", "--device_memory", "8GB", "--source", "curvature", "--json", str(file)]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    assert "protected by source curvature, constraint two-sided: share of the energy" in told.output
    protection = json.loads(file.read_text())["protection"]
    assert [one["source"] for one in protection] == ["curvature", "weight"]
    assert 0 < protection[0]["groups"]["all"]["expected"] < protection[1]["groups"]["all"]["expected"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "seqft"}, "--measure looks at the plan of method osft; --method seqft has none"),
        ({"source": "weight", "calibration": "random"}, "has no effect with source 'weight'"),
    ],
)
def test_what_training_would_refuse_is_refused(options: dict[str, Any], message: str, llama_folder: Path) -> None:
    with pytest.raises(LoricaError, match=message):
        look(llama_folder, **options)


def test_what_predicting_takes_is_told() -> None:
    given = {"model_name_or_path": "m", "train_file": "rows.jsonl", "output_dir": "out"}
    told, untold = (assumptions(UpdateConfig(**given, predict_forgetting=asked)) for asked in (True, False))
    assert [line.partition(":")[0] for line in told] == ["predict_forgetting"]
    assert untold == []


def test_an_encoder_decoder_is_measured_on_random_tokens(t5_folder: Path) -> None:
    curvature, weight = look(t5_folder, source="curvature")
    assert curvature.groups[ALL].expected < weight.groups[ALL].expected


def test_as_much_is_written_as_training_would_let_it(
    llama_folder: Path, rows: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = own_texts.own_text

    def noting(*args: Any, tokens: int, **options: Any) -> Any:
        written.append(tokens)
        return write(*args, **options | {"tokens": 300})

    for name, value in {"FEWEST": 1, "MOST": 20_000, "own_text": noting}.items():
        monkeypatch.setattr(own_texts, name, value)
    config = {"model_name_or_path": str(llama_folder), "use_cpu": True, "train_file": rows("new")}
    measured(build_forecast_config(config | {"measure": True}))
    train(config | {"output_dir": str(tmp_path / "out"), "max_steps": 1, "disable_tqdm": True}, say=lambda line: None)
    measured(build_forecast_config({"model_name_or_path": str(llama_folder), "use_cpu": True, "measure": True}))
    assert written[0] == written[1] < written[2] == 20_000, "without data the most"
