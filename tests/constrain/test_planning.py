"""Choosing targets and counting what is protected in them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import LoricaError
from lorica.subspace.plan import Plan
from tests.builders import Stack, matrix, tiny


def counts(plan: Plan) -> dict[str, int]:
    return {entry.name: entry.k for entry in plan.entries}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def stack() -> Stack:
    return Stack([(10, 8), (4, 10)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [6, 3]),
        ({"unfreeze_rank_ratio": 0.5}, [4, 2]),
        ({"unfreeze_rank_ratio": 0.0}, [8, 4]),
        ({"unfreeze_rank_ratio": 1.0}, [0, 0]),
        ({"unfreeze_rank_ratio": 1}, [0, 0]),
        ({"osft_unfreeze_rank_ratio": 0.5}, [4, 2]),
        ({"osft_unfreeze_rank_ratio": 0.0}, [8, 4]),
        ({"effective_rank": 3}, [3, 3]),
        ({"effective_rank": 0}, [0, 0]),
        ({"effective_rank": 1}, [1, 1]),
        ({"effective_rank": 1.0}, [8, 4]),
        ({"effective_rank": 0.0}, [0, 0]),
        ({"effective_rank": 0.5}, [4, 2]),
        ({"rank_pattern": {"layers.1": 1}}, [6, 1]),
        ({"rank_pattern": {r"layers\.\d": 0.5, "layers.0": 0}}, [0, 2]),
        ({"constraint": "input"}, [6, 3]),
    ],
    ids=str,
)
def test_how_many_directions(options: dict[str, Any], expected: list[int]) -> None:
    assert list(counts(lorica.plan(stack(), **options)).values()) == expected


def test_nine_tenths_of_ten_is_nine() -> None:
    model = Stack([(10, 10)])
    assert list(counts(lorica.plan(model, 0.9)).values()) == [1]  # (1 - 0.9) * 10 is 0.9999999999999998
    assert list(counts(lorica.plan(model, 0.1)).values()) == [9]


def with_spectra(*spectra: list[float]) -> Stack:
    model = Stack([(len(sigma), len(sigma)) for sigma in spectra])
    for layer, sigma in zip(model.layers, spectra, strict=True):
        u, _, vh = torch.linalg.svd(layer.weight.detach())
        layer.weight.data.copy_(u * torch.tensor(sigma) @ vh)
    return model


def test_energy_on_known_spectra() -> None:
    model = with_spectra([4.0, 2, 2, 1], [1.0, 1, 1, 1, 1])
    assert list(counts(lorica.plan(model, 0.25, ranks="energy")).values()) == [2, 4]
    assert list(counts(lorica.plan(model, 0.0, ranks="energy")).values()) == [4, 5]
    assert list(counts(lorica.plan(model, 1.0, ranks="energy")).values()) == [0, 0]


def test_effective_rank_of_known_spectra() -> None:
    model = with_spectra([1.0] * 7, [2.0, 1, 1], [3.0, 0, 0])
    model.layers[0].weight.data.copy_(torch.eye(7))
    assert list(counts(lorica.plan(model, ranks="effective-rank")).values()) == [7, 2, 1]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) + self.a(x)


def test_importance_follows_the_cosine_of_inputs_and_outputs() -> None:
    model = Pair()
    model.a.weight.data.copy_(2 * torch.eye(4))  # cosine 1
    model.b.weight.data.copy_(torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1], [0, 0, -1, 0]]))  # cosine 0
    plan = lorica.plan(model, ranks="importance", calibration=[{"x": matrix(6, 4)}], mrr=0.25, trr=0.5)
    assert counts(plan) == {"a": 3, "b": 1}  # I = 2 and 0: 0.25 + 2 * 0.25 and 0.25
    over = lorica.plan(model, ranks="importance", calibration=[{"x": matrix(6, 4)}], mrr=0.25, trr=0.9)
    assert counts(over)["a"] == 4  # 0.25 + 2 * 0.65 is clamped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unfreeze_rank_ratio": 1.2}, "unfreeze_rank_ratio = 1.2 is out of range: 0"),
        ({"unfreeze_rank_ratio": float("nan")}, "unfreeze_rank_ratio = nan is out of range"),
        ({"osft_unfreeze_rank_ratio": -0.1}, "osft_unfreeze_rank_ratio = -0.1 is out of range"),
        ({"unfreeze_rank_ratio": 0.5, "effective_rank": 2}, "say the same thing; give one of them"),
        ({"effective_rank": 5}, r"effective_rank = 5 is out of range for layers\.1 \(4 x 10\): 0 to 4"),
        ({"effective_rank": 1.5}, "effective_rank = 1.5 is out of range"),
        ({"effective_rank": -1}, "effective_rank = -1 is out of range"),
        ({"effective_rank": True}, "effective_rank = True is out of range"),
        ({"rank_pattern": {"layers.0": 9}}, r"out of range for layers\.0 \(10 x 8\): 0 to 8"),
        ({"rank_pattern": {"layer.0": 1}}, r"rank_pattern: 'layer\.0' matches none of the 2 constrained weights"),
        ({"ranks": "uniformly"}, "ranks 'uniformly' is unknown.* Did you mean 'uniform'"),
        ({"source": "weights"}, "source 'weights' is unknown.* Did you mean 'weight'"),
        ({"constraint": "two_sided"}, "constraint 'two_sided' is unknown.* Did you mean 'two-sided'"),
        ({"ranks": "importance"}, "^ranks 'importance' needs calibration inputs; give calibration"),
        ({"source": "activation"}, "^source 'activation' needs calibration inputs; give calibration"),
        ({"source": "activation", "calibration": "self"}, "calibration 'self' is for Hugging Face models; give Stack"),
        ({"source": "activation", "calibration": "random"}, "calibration 'random' is for Hugging Face models"),
        ({"source": "activation", "constraint": "output"}, "directions of the inputs only"),
        ({"source": "activation", "calibration": "randm"}, "calibration 'randm' is unknown"),
        ({"ranks": "energy", "effective_rank": 3}, "needs a share, not a count"),
        ({"target_modules": ["q_prj"]}, r"target_modules: 'q_prj' matches no module of the model"),
        ({"target_modules": "(("}, r"target_modules: '\(\(' is no regular expression"),
        ({"target_modules": "a)(b"}, r"target_modules: 'a\)\(b' is no regular expression"),
        ({"rank_pattern": {"[": 1}}, r"rank_pattern: '\[' is no regular expression"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoricaError, match=message) as caught:
        lorica.plan(stack(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["(?i)LAYERS.1", r"(?:l)ayers\.(1)", r"(?<=layers\.)1", r"(1)|nothing"])
def test_any_regular_expression_matches_the_end_of_names(pattern: str) -> None:
    assert counts(lorica.plan(stack(), target_modules=[pattern])) == {"layers.1": 3}
    assert counts(lorica.plan(stack(), rank_pattern={pattern: 0})) == {"layers.0": 6, "layers.1": 0}


def test_a_pattern_matches_whole_parts_of_names_only() -> None:
    plan = lorica.plan(tiny("llama"), target_modules=["mlp.up_proj"])
    assert len(plan) == 2
    with pytest.raises(LoricaError, match="matches no module"):
        lorica.plan(tiny("llama"), target_modules=["p_proj"])


def test_one_pattern_of_train_also_is_not_a_list_of_letters() -> None:
    assert lorica.plan(stack(), train_also="bias").train_also == ["bias"]


def test_a_misspelt_target_gets_a_suggestion() -> None:
    with pytest.raises(LoricaError, match="Did you mean 'q_proj'"):
        lorica.plan(tiny("llama"), target_modules=["q_porj"])


@pytest.mark.parametrize(
    ("target_modules", "leaves"),
    [
        ("q_proj", {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r"mlp\.(up|down)_proj", {"up_proj", "down_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
    ids=["name", "names", "pattern", "all-linear"],
)
def test_target_modules(target_modules: Any, leaves: set[str]) -> None:
    plan = lorica.plan(tiny("llama"), target_modules=target_modules)
    assert {entry.name.rpartition(".")[2] for entry in plan.entries} == leaves


def test_a_model_of_unknown_type_takes_all_linear_layers_but_the_head() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.conv = Conv1D(4, 4)
            self.out = nn.Linear(4, 5)

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    assert set(counts(lorica.plan(Unknown()))) == {"blocks.0", "blocks.1", "blocks.2", "conv"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ranks": "importance", "unfreeze_rank_ratio": 0.3},
            "unfreeze_rank_ratio has no effect with ranks 'importance'",
        ),
        ({"ranks": "effective-rank", "effective_rank": 3}, "effective_rank has no effect with ranks 'effective-rank'"),
        ({"mrr": 0.1}, "mrr has no effect with ranks 'uniform'; it is for importance"),
        ({"ranks": "importance", "trr": 2.0, "calibration": "random"}, "trr = 2.0 is out of range"),
        (
            {"calibration": []},
            "calibration (or calibration_file) has no effect with source 'weight' and ranks 'uniform'",
        ),
        ({"calibration": "self"}, "calibration 'self' has no effect with source 'weight' and ranks 'uniform'"),
    ],
)
def test_no_option_is_accepted_and_ignored(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoricaError, match=re.escape(message)):
        lorica.plan(tiny("llama"), **options)
