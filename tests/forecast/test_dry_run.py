"""One step on shapes alone, against real models and against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, TrainingArguments

import lorica
from lorica.config import UpdateConfig
from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.forecast.dry_model import assumptions, begin, blank_model
from lorica.forecast.dry_run import Batch, Step, dry_step
from lorica.methods import TaskData
from lorica.training.arguments import training_arguments
from tests.builders import DENSE, tiny
from tests.forecast.conftest import Folder

GENERATIVE = [name for name in DENSE if not name.startswith("bert")]
BATCH = Batch(4, 16)


def arguments(**given: Any) -> TrainingArguments:
    return training_arguments({"use_cpu": True, **given}, "", hidden_size=32, seq2seq=False)


def take(folder: str, batch: Batch = BATCH, device: str = "cpu", trainer: Any = None, **options: Any) -> Step:
    """Return a dry step of the model in a folder."""
    config = UpdateConfig(model_name_or_path=folder, train_file="rows.jsonl", output_dir="out", **options)
    model = blank_model(config, AutoConfig.from_pretrained(folder))
    method = begin(model, config, TaskData("task", 0, 1, [], dict, 0))  # type: ignore[arg-type]
    return dry_step(model, method, batch, trainer or arguments(), device, in_backward=config.optimizer_in_backward)


@pytest.mark.parametrize(
    ("name", "memory_mode"), [*((name, "fast") for name in GENERATIVE), ("llama", "lean"), ("gpt2", "lean")]
)
def test_what_stays_is_what_a_real_protected_model_holds(config_folder: Folder, name: str, memory_mode: str) -> None:
    folder = config_folder(name)
    batch = Batch(2, 8, 8) if name.startswith("t5") else Batch(2, 8)
    step = take(folder, batch, unfreeze_rank_ratio=0.5, memory_mode=memory_mode)
    real = tiny(name)
    lorica.protect(real, lorica.plan(real, 0.5), memory=memory_mode)
    layers = protected_layers(real).values()
    optimizer = torch.optim.AdamW([p for p in real.parameters() if p.requires_grad])
    for layer in layers:
        layer.core.grad = torch.zeros_like(layer.core)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    bases = [b for layer in layers for basis in (layer.out_basis, layer.in_basis) for b in basis.buffers()]
    assert step.steady["cores"] == sum(layer.core.nbytes for layer in layers)
    assert step.steady["W0"] + step.host["W0"] == sum(layer.base.nbytes for layer in layers)
    assert bool(step.host["W0"]) == (memory_mode == "lean")
    assert step.steady["bases"] == sum(b.nbytes for b in bases)
    assert step.steady["optimizer states"] == sum(t.nbytes for t in states)
    assert step.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)


def test_plain_training_by_hand(config_folder: Folder) -> None:
    folder = config_folder("llama")
    step = take(folder, method="seqft")
    model = tiny("llama")
    trained = [p for n, p in model.named_parameters() if "_proj" in n]
    numbers = sum(p.numel() for p in trained)
    assert step.trainable == numbers
    assert step.steady["weights"] >= sum(p.nbytes for p in model.parameters())
    assert step.steady["optimizer states"] == 2 * 4 * numbers + 4 * len(trained)  # two moments, and a count each
    assert step.steady["gradients"] == step.steady["activations"] == 0


def test_accumulation_holds_all_gradients_while_the_next_rows_pass(config_folder: Folder) -> None:
    folder = config_folder("llama", hidden_size=64)
    one = take(folder, method="seqft")
    more = take(folder, method="seqft", trainer=arguments(gradient_accumulation_steps=3))
    assert more.peak["gradients"] >= 4 * more.trainable > one.peak["gradients"]
    assert sum(op.flops * n for op, n in more.micro.items()) == sum(op.flops * n for op, n in one.micro.items())


def test_a_step_in_the_backward_pass_holds_one_gradient_at_a_time(config_folder: Folder) -> None:
    folder = config_folder("llama", hidden_size=64)
    plain = arguments(max_grad_norm=0.0)
    all_of_them = take(folder, Batch(1, 4), method="seqft", trainer=plain)
    one = take(folder, Batch(1, 4), method="seqft", trainer=plain, optimizer_in_backward=True)
    assert one.peak["gradients"] <= 2 * 4 * 64 * 64 < all_of_them.peak["gradients"]
    assert one.steady["optimizer states"] == all_of_them.steady["optimizer states"]


def test_checkpointing_holds_less_and_computes_more(config_folder: Folder) -> None:
    folder = config_folder("llama", num_hidden_layers=4)
    kept = take(folder, Batch(4, 64))
    again = take(folder, Batch(4, 64), trainer=arguments(activation_checkpointing=True))
    assert again.peak["activations"] < 0.6 * kept.peak["activations"]
    assert sum(op.flops * n for op, n in again.micro.items()) > 1.2 * sum(op.flops * n for op, n in kept.micro.items())


def test_activations_and_work_grow_with_the_rows(config_folder: Folder) -> None:
    folder = config_folder("llama")
    few, many = (take(folder, Batch(rows, 32), method="seqft") for rows in (8, 16))
    assert many.peak["activations"] == pytest.approx(2 * few.peak["activations"], rel=0.02)
    assert sum(op.flops * n for op, n in many.micro.items()) == 2 * sum(op.flops * n for op, n in few.micro.items())
    assert few.steady == many.steady


def test_a_large_vocabulary_shows_as_logits_and_loss(config_folder: Folder) -> None:
    step = take(config_folder("llama", vocab_size=50_000))
    logits = BATCH.rows * BATCH.length * 50_000 * 4
    assert 2 * logits <= step.peak["logits and loss"] <= 4 * logits
    assert step.peak["activations"] < logits / 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_the_dtype_that_is_asked_for(config_folder: Folder, dtype: str) -> None:
    step = take(config_folder("llama"), method="seqft", dtype=dtype)
    numbers = sum(p.numel() for p in tiny("llama").parameters())
    size = 2 if dtype == "bfloat16" else 4
    assert step.steady["weights"] == pytest.approx(size * numbers, rel=0.01)
    assert step.steady["cores"] == (4 * step.trainable if dtype == "bfloat16" else 0)  # 16 bits train through a core


def test_adapters_are_forecast_too(config_folder: Folder) -> None:
    pytest.importorskip("peft")
    step = take(config_folder("llama"), method="lora")
    numbers = sum(p.numel() for n, p in tiny("llama").named_parameters() if "_proj" in n)
    assert 0 < step.trainable < numbers
    assert step.steady["optimizer states"] == pytest.approx(8 * step.trainable, rel=0.05)


@pytest.mark.parametrize("source", ["activation", "hybrid"])
def test_measured_sources_have_the_shapes_of_their_constraint(config_folder: Folder, source: str) -> None:
    step = take(config_folder("llama"), source=source, unfreeze_rank_ratio=0.5)
    real = tiny("llama")
    lorica.protect(real, lorica.plan(real, 0.5, source=source, calibration="random"))  # type: ignore[arg-type]
    assert step.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ewc"}, "methods that can be forecast"),
        ({"constraint": "block"}, "--constraint block"),
        ({"dtype": "float33"}, "--dtype float33"),
    ],
)
def test_what_cannot_be_told_from_shapes_is_refused(config_folder: Folder, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoricaError, match=said):
        take(config_folder("llama"), **options)


@pytest.mark.parametrize(("optim", "numbers"), [("sgd", 0), ("adamw_torch", 2), ("lion_32bit", 1)])
def test_states_are_those_of_the_optimizer(config_folder: Folder, optim: str, numbers: int) -> None:
    if optim.startswith("lion"):
        pytest.importorskip("bitsandbytes")
    step = take(config_folder("llama"), method="seqft", trainer=arguments(optim=optim))
    assert step.steady["optimizer states"] == pytest.approx(4 * numbers * step.trainable, rel=0.01)


def test_a_fused_step_makes_nothing_that_the_plain_form_makes(config_folder: Folder) -> None:
    folder = config_folder("llama", hidden_size=256)
    fused, plain = (
        take(folder, Batch(1, 2), method="seqft", trainer=arguments(optim=optim))
        for optim in ("adamw_torch_fused", "adamw_torch")
    )
    largest = 4 * 256 * 256
    assert plain.peak.total() - fused.peak.total() >= largest


def test_flash_attention_need_not_be_installed_and_plain_attention_keeps_the_scores(config_folder: Folder) -> None:
    folder = config_folder("llama")
    long = Batch(1, 512)
    flash, sdpa, eager = (
        take(folder, long, attn_implementation=name).peak.total() for name in ("flash_attention_2", "sdpa", "eager")
    )
    assert flash == sdpa
    assert eager - sdpa >= 2 * 4 * 512 * 512 * 4  # both layers' scores of four heads


def test_rehearsal_is_a_second_pass_of_texts_of_full_length(config_folder: Folder) -> None:
    folder = config_folder("llama")
    options = {"unfreeze_rank_ratio": 0.5}

    def flops(step: Step) -> int:
        return sum(op.flops * n for op, n in step.micro.items())

    plain, texts, both = (
        take(folder, **options),
        take(folder, Batch(2, 64), **options),
        take(folder, rehearse=0.5, **options),
    )
    assert flops(both) == pytest.approx(flops(plain) + flops(texts), rel=0.02)
    assert both.trainable == plain.trainable
    assert both.peak.total() - plain.peak.total() > 0.8 * texts.peak["activations"]
    config = UpdateConfig(model_name_or_path=folder, train_file="rows.jsonl", output_dir="out", rehearse=0.5)
    assert any(line.startswith("rehearse: ") for line in assumptions(config))


def test_rehearsal_of_an_encoder_decoder_is_refused(config_folder: Folder) -> None:
    with pytest.raises(LoricaError, match="rehearse is for causal models"):
        take(config_folder("t5"), Batch(2, 8, 8), rehearse=0.5)
