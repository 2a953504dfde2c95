"""One small model of every supported architecture, from protect to a folder that plain transformers loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.constrain.audit import audit
from lorica.errors import LoricaError
from tests.builders import ARCHITECTURES, BLOCKS, DENSE, EXPERTS, batch, leakage, tiny, train, trainable

PER_BLOCK = {"phi3": 4, "gpt2": 4, "opt": 6, "bert": 6, "bert-classifier": 6, "mixtral": 4, "qwen3-moe": 4}
"""Linear layers in one block; 7 (four of attention, three of a gated MLP) where nothing is said."""


def linear_layers(name: str, model: nn.Module) -> int:
    """Return how many linear layers the blocks have, from the configuration."""
    if name.startswith("t5"):
        mlp = 3 if model.config.is_gated_act else 2
        return model.config.num_layers * (4 + mlp) + model.config.num_decoder_layers * (8 + mlp)
    return model.config.num_hidden_layers * PER_BLOCK.get(name, 7)


def in_blocks(model: nn.Module) -> set[str]:
    """Return the names of all linear modules below a list of blocks."""
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return {name for name in linear if name.startswith(tuple(lists))}


def plan_for(name: str, model: nn.Module) -> lorica.Plan:
    return lorica.plan(model, 0.5, freeze_experts=name in EXPERTS)


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all linear weights, (out, in)."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    return {n: (m.weight.T if isinstance(m, Conv1D) else m.weight).detach().clone() for n, m in found.items()}


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_of_the_blocks_is_found(name: str) -> None:
    model = tiny(name)
    plan = plan_for(name, model)
    assert set(plan.names()) == in_blocks(model)
    assert len(plan) == linear_layers(name, model)
    assert plan.family == model.config.model_type


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.reliability("R29")
def test_protect_train_release(name: str) -> None:
    model = tiny(name)
    before = matrices(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    parameters = {n: (p.dtype, p.device, p.requires_grad) for n, p in model.named_parameters()}
    data = batch(model)
    start = logits(model, data)
    plan = plan_for(name, model)
    planned = {entry.name: entry.k for entry in plan.entries}

    lorica.protect(model, plan)
    assert torch.equal(logits(model, data), start)

    losses = train(model, AdamW(trainable(model), lr=5e-3), 5, lambda _: data)
    assert losses[-1] < losses[0]
    loss_before_release = model(**data).loss

    lorica.release(model)
    assert torch.equal(model(**data).loss, loss_before_release)
    assert dict(model.named_modules()) == modules  # the same objects, in the same places
    assert {n: (p.dtype, p.device, p.requires_grad) for n, p in model.named_parameters()} == parameters
    final = model.state_dict()
    assert {key: value.shape for key, value in final.items()} == {key: value.shape for key, value in state.items()}
    after = matrices(model)
    for layer, k in planned.items():
        assert max(leakage(before[layer], after[layer], k)) <= 1e-5, layer
    for key, value in final.items():
        if key.removesuffix(".weight") not in planned:
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5", "bert"])
def test_tied_embeddings_stay_tied_and_frozen(name: str) -> None:
    model = tiny(name)
    tied = model.get_output_embeddings().weight
    assert tied is model.get_input_embeddings().weight
    lorica.protect(model, lorica.plan(model, 0.5))
    assert not tied.requires_grad
    train(model, AdamW(trainable(model), lr=5e-3), 1, partial(batch, model))
    lorica.release(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is tied


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_refused_by_name_unless_frozen(name: str) -> None:
    model = tiny(name)
    with pytest.raises(
        LoricaError, match=r"mlp\.experts\.\w+ and \d+ more are stacks of expert weights.*freeze_experts"
    ):
        lorica.plan(model)
    lorica.protect(model, lorica.plan(model, freeze_experts=True))
    frozen = [n for n, p in model.named_parameters() if p.dim() == 3 or "gate.weight" in n]
    assert len(frozen) == 3 * BLOCKS
    assert not any(model.get_parameter(n).requires_grad for n in frozen)


def test_experts_that_are_plain_linear_layers_are_protected() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 2)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    assert list(lorica.plan(Routed()).names()) == ["experts.0", "experts.1"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-gated"])
@pytest.mark.reliability("R29")
def test_bf16_models_stay_bf16_and_leak_what_rounding_leaks(name: str) -> None:
    model, base = (tiny(name, torch.bfloat16) for _ in range(2))
    plan = lorica.plan(model, 0.5)
    lorica.protect(model, plan)
    train(model, AdamW(trainable(model), lr=2e-2), 5, partial(batch, model))
    lorica.release(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    report = audit(base, model, plan)
    assert report.holds, report.table()
    assert not report.elsewhere


LOADER = """
import json, sys
from pathlib import Path

class NoLorica:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lorica":
            raise ImportError("lorica is not installed here")

sys.meta_path.insert(0, NoLorica())
import torch, transformers
from safetensors.torch import load_file, save_file

try:
    import lorica
    raise SystemExit("lorica could be imported")
except ImportError:
    pass
for folder, kind in json.loads(sys.argv[1]).items():
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**load_file(Path(folder) / "inputs")).logits
    save_file({"logits": logits.contiguous()}, Path(folder) / "logits")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train every model a little, save it, and let a process without Lorica compute logits from the folder."""
    folders = {}
    for name in DENSE:
        folder = tmp_path_factory.mktemp(name)
        model = tiny(name)
        lorica.protect(model, lorica.plan(model, 0.5))
        train(model, AdamW(trainable(model), lr=5e-3), 2, partial(batch, model))
        lorica.release(model).eval()
        model.save_pretrained(folder)
        inputs = batch(model, seed=9)
        save_file(inputs, folder / "inputs")
        save_file({"logits": logits(model, inputs).contiguous()}, folder / "expected")
        folders[name] = folder
    kinds = {str(folder): ARCHITECTURES[name][1] for name, folder in folders.items()}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADER, json.dumps(kinds)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.reliability("R33")
def test_the_saved_folder_is_a_plain_model(exported: dict[str, Path], name: str) -> None:
    folder = exported[name]
    assert torch.equal(load_file(folder / "logits")["logits"], load_file(folder / "expected")["logits"])
    keys = {key for file in folder.glob("*.safetensors") for key in load_file(file)}
    assert not [key for key in keys if key.endswith((".core", ".base"))]
    assert not list(folder.glob("*.bin"))
