"""What holds for every projection method."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lorica.errors import LoricaError
from lorica.methods.base import METHODS, Method
from lorica.methods.gpm import GPM
from lorica.methods.ogd import OGD
from lorica.methods.osft_factored import OSFTFactored
from lorica.methods.osft_gradient import OSFTGradient
from lorica.methods.sgp import SGP
from tests.builders import task_of, tiny
from tests.methods.learning import assert_same_weights, learn, reloaded

PROJECTED: dict[str, tuple[type[Method], dict[str, object]]] = {
    "gpm": (GPM, {}),
    "sgp": (SGP, {}),
    "ogd": (OGD, {"gradients_per_task": 3}),
    "ogd-logit": (OGD, {"gradients_per_task": 3, "gradient_of": "logit"}),
    "gradient-matrix": (OSFTGradient, {"refresh": 2}),
    "gradient-flat": (OSFTGradient, {"form": "flat", "k": 2, "refresh": 1}),
    "delta-matrix": (OSFTGradient, {"snapshot": "delta", "constraint": "two-sided"}),
    "delta-flat": (OSFTGradient, {"snapshot": "delta", "form": "flat"}),
    "factored": (OSFTFactored, {}),
}
every_method = pytest.mark.parametrize("name", PROJECTED)


def built(name: str) -> Method:
    kind, options = PROJECTED[name]
    return kind.build(options)


def test_they_are_registered_and_say_what_they_are() -> None:
    assert {METHODS[name] for name in ("gpm", "sgp", "ogd", "osft-gradient", "osft-factored")} == {
        kind for kind, _ in PROJECTED.values()
    }
    assert all(kind.summary and kind.__doc__ for kind, _ in PROJECTED.values())


@every_method
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_saved_state_goes_on_bit_for_bit(name: str, family: str, tmp_path: Path) -> None:
    model, method = tiny(family), built(name)
    assert method.state_dict() == {}
    learn(method, model)
    learn(method, model, 1, steps=2)
    copied, restored = copy.deepcopy(model), reloaded(method, tmp_path)
    for each, one in ((method, model), (restored, copied)):
        learn(each, one, 2)
    assert_same_weights(model, copied)
    for key, value in method.state_dict().items():
        assert torch.equal(value, restored.state_dict()[key]), key


@every_method
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_the_model_is_plain_after_each_task(name: str, family: str) -> None:
    model, method = tiny(family), built(name)
    modules = {name: type(module) for name, module in model.named_modules()}
    keys, start = list(model.state_dict()), copy.deepcopy(model)
    for index in range(2):
        learn(method, model, index, steps=1)
        assert {name: type(module) for name, module in model.named_modules()} == modules
        assert list(model.state_dict()) == keys
        assert all(parameter.requires_grad for parameter in model.parameters())
    moved = [name for name, new in model.named_parameters() if not torch.equal(new, start.get_parameter(name))]
    assert len(moved) > 4
    assert all(".weight" in name and "norm" not in name and "embed" not in name for name in moved)


@every_method
def test_narrow_weights_are_refused_and_the_model_left_alone(name: str) -> None:
    model = tiny("llama", torch.bfloat16)
    with pytest.raises(LoricaError, match=r"q_proj is torch\.bfloat16; .* needs float32 weights"):
        built(name).begin_task(model, task_of(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
