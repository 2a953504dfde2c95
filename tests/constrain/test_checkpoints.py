"""The audit of checkpoints as they come: renamed, resized, incomplete, or none at all."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

import lorica
from lorica.errors import LoricaError
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import PlanEntry
from tests.builders import batch, matrix, tiny, train, trainable


def saved(folder: Path, name: str, edit: dict[str, Tensor | None] | None = None) -> Path:
    """Save a small model with some of its tensors replaced, or left out where None is given."""
    tiny(name).save_pretrained(folder)
    state = load_file(folder / "model.safetensors") | (edit or {})
    save_file({key: value for key, value in state.items() if value is not None}, folder / "model.safetensors")
    return folder


def test_tensors_that_cannot_be_compared_are_listed(tmp_path: Path) -> None:
    before = saved(tmp_path / "before", "llama")
    odd = {
        "model.embed_tokens.weight": torch.ones(65, 32),
        "model.norm.weight": None,
        "model.extra.weight": torch.ones(3),
    }
    report = lorica.audit(before, saved(tmp_path / "after", "llama", odd))
    assert report.differences == {
        "model.norm.weight": "only in the one before",
        "model.embed_tokens.weight": "61 x 32 before, 65 x 32 after",
        "model.extra.weight": "only in the one after",
    }
    assert not report.elsewhere
    assert "3 tensors cannot be compared: model.norm.weight (only in the one before), " in str(report)


def test_a_tensor_of_whole_numbers_or_of_nan_that_changed_is_listed(tmp_path: Path) -> None:
    edits = [{"model.steps": torch.tensor([3]), "model.norm.weight": torch.ones(32)} for _ in range(2)]
    edits[1] = {"model.steps": torch.tensor([4]), "model.norm.weight": torch.full((32,), torch.nan)}
    before, after = (saved(tmp_path / str(i), "llama", edit) for i, edit in enumerate(edits))
    assert lorica.audit(before, before).elsewhere == {}
    assert lorica.audit(before, after).elsewhere == {
        "model.steps": pytest.approx(1 / 3),
        "model.norm.weight": pytest.approx(torch.nan, nan_ok=True),
    }


@pytest.mark.parametrize("edit", [None, torch.ones(32, 31)], ids=["removed", "reshaped"])
def test_a_planned_weight_that_cannot_be_compared_is_refused(tmp_path: Path, edit: Tensor | None) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    after = saved(tmp_path / "after", "llama", {key: edit})
    with pytest.raises(LoricaError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        lorica.audit(tiny("llama"), after)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5", "bert"])
def test_a_model_in_memory_and_its_folder_have_the_same_tensors(tmp_path: Path, name: str) -> None:
    report = lorica.audit(tiny(name), saved(tmp_path, name))
    assert report.differences == {}
    assert "nothing changed" in report.verdict()


def trained_gpt2() -> tuple[torch.nn.Module, Plan]:
    model = tiny("gpt2")
    plan = lorica.plan(model, 0.5)
    lorica.protect(model, plan)
    train(model, AdamW(trainable(model), lr=1e-2), 2, partial(batch, model))
    return lorica.release(model), plan


def test_names_without_the_prefix_of_the_base_model_match(tmp_path: Path) -> None:
    model, plan = trained_gpt2()
    (old := tmp_path / "old").mkdir()
    (new := tmp_path / "new").mkdir()
    tiny("gpt2").transformer.save_pretrained(old)  # as on the hub: h.0, not transformer.h.0
    model.transformer.save_pretrained(new)
    expected = lorica.audit(tiny("gpt2"), model, plan)
    assert expected.holds
    assert not expected.assumed
    bare = lorica.plan(tiny("gpt2").transformer, 0.5)
    for before, after, by in [(old, new, plan), (old, model, plan), (tiny("gpt2"), new, bare), (old, model, bare)]:
        report = lorica.audit(before, after, by)
        figures = [
            row | {"name": f"transformer.{row['name'].removeprefix('transformer.')}"} for row in report.to_records()
        ]
        assert figures == expected.to_records()
        assert not report.differences
        assert not report.elsewhere
        assert "names are compared without 'transformer.'" in report.verdict()
    assert not lorica.audit(old, new, bare).assumed


def test_a_single_file_has_the_layout_of_the_other_side(tmp_path: Path) -> None:
    model, plan = trained_gpt2()
    model.save_pretrained(tmp_path)
    report = lorica.audit(tiny("gpt2"), tmp_path / "model.safetensors", plan)
    assert report.to_records() == lorica.audit(tiny("gpt2"), tmp_path, plan).to_records()
    assert report.holds


def test_checkpoints_of_other_models_have_nothing_in_common(tmp_path: Path) -> None:
    save_file({"a.b.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(LoricaError, match=r"no tensor in common: model\.embed_tokens\.weight against a\.b\.weight"):
        lorica.audit(tiny("llama"), tmp_path / "other.safetensors")


def test_a_plan_and_a_ratio_are_refused_together() -> None:
    model = tiny("llama")
    with pytest.raises(LoricaError, match="plan and unfreeze_rank_ratio both say what was protected"):
        lorica.audit(model, model, lorica.plan(model), unfreeze_rank_ratio=0.5)


def test_a_measured_plan_that_protects_nothing_needs_no_measurement(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        save_file({"w.weight": matrix(6, 4, seed)}, tmp_path / f"{name}.safetensors")
    files = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    (free, held) = (
        Plan(entries=[PlanEntry(name="w", shape=(6, 4), k=k, source="activation", constraint="input")]) for k in (0, 2)
    )
    assert lorica.audit(*files, free).verdict() == "nothing is protected in 1 of 1 weights"
    by_rank = lorica.audit(*files, held).verdict()
    assert "directions measured while training are not in the weights" in by_rank
    assert "1 of 1 weights leak" in by_rank


def test_a_real_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(LoricaError, match="an adapter, not a model; merge it"):
        lorica.audit(tiny("llama"), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no .safetensors file"),
        ({"pytorch_model.bin": b"x"}, "only pickled weights"),
        ({"adapter_config.json": b"{}"}, "an adapter"),
    ],
    ids=["empty", "pickle", "adapter"],
)
def test_folders_without_readable_weights_say_why(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(LoricaError, match=message):
        lorica.audit(tmp_path, tiny("llama"))
    with pytest.raises(LoricaError, match="no such file or folder"):
        lorica.audit(tmp_path / "nowhere", tiny("llama"))
