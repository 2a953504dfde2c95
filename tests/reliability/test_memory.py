"""Where memory runs out a micro-batch is run in halves: the same step, the same rows, the same weights afterwards."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Seq2SeqTrainingArguments, T5ForConditionalGeneration

import lorica
from lorica.data.parts import is_out_of_memory
from lorica.errors import LoricaError
from lorica.methods import METHODS, Method, Targets
from lorica.methods.seqft import SeqFT
from lorica.training.trainer import fit
from tests.builders import task_of, tiny
from tests.experiments.conftest import Write, write  # noqa: F401
from tests.experiments.conftest import run as run_stream
from tests.reliability.trainings import Watched, all_finite, equal, fitted, written_rows
from tests.training.conftest import llama_folder, rows, t5_folder  # noqa: F401
from tests.training.test_penalty import Flatten, Pull, uneven

CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "34359738368 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS: dict[str, Callable[[], RuntimeError]] = {
    "accelerator": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(CPU_SAYS),
    "another": lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
}
WHOLE = 4
"""Rows of a micro-batch."""


class Device:
    """Stands for a device that holds no more than so many rows at a time.

    Attributes:
        seen: rows of every forward pass that was tried.
    """

    def __init__(self, most: int, *, after: int = 0, error: str = "accelerator") -> None:
        self.most, self.after, self.error = most, after, error
        self.seen: list[int] = []

    def see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.seen.append(len(kwargs["input_ids"]))

    def forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.see(module, args, kwargs)
        self._raise_if_above(self.seen[-1])

    def backward(self, module: nn.Module, grad_inputs: Any, grad_outputs: Any) -> None:
        self._raise_if_above(len(grad_outputs[0]))

    def _raise_if_above(self, rows: int) -> None:
        if rows > self.most and len(self.seen) > self.after:
            raise ERRORS[self.error]()

    def limit(self, model: nn.Module, where: str) -> None:
        """Run out of memory in a model's forward pass, or late in its backward pass, when gradients are there."""
        if where == "forward":
            model.register_forward_pre_hook(self.forward, with_kwargs=True)
        else:
            model.register_forward_pre_hook(self.see, with_kwargs=True)
            (mlp,) = (module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
            mlp.register_full_backward_hook(self.backward)


def trained(
    model: Any, method: Method, folder: Path, device: Device | None = None, where: str = "forward", *,
    size: int = WHOLE, steps: int = 3, rows: int = 8,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:  # fmt: skip
    """Train by SGD, eight rows a step of unequal numbers of trained tokens; return the weights and the log."""
    classifies = type(model).__name__.endswith("SequenceClassification")
    task = task_of(model, rows=rows) if classifies else uneven(model)
    method.begin_task(model, task)
    if device is not None:
        device.limit(model, where)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=0.1, optim="sgd", per_device_train_batch_size=size,
        gradient_accumulation_steps=rows // size, save_strategy="no", report_to="none", disable_tqdm=True, seed=3,
        logging_steps=1, remove_unused_columns=False, dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    log: list[dict[str, Any]] = fit(model, method, task.rows, None, task.collate, arguments, quiet=True)
    method.end_task(model, task)
    return model.state_dict(), log


def assert_same(one: tuple[dict[str, Tensor], Any], other: tuple[dict[str, Tensor], Any]) -> None:
    for name, weight in one[0].items():
        torch.testing.assert_close(weight, other[0][name], rtol=0, atol=1e-6)
    for mine, theirs in zip(figures(one[1]), figures(other[1]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def figures(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in log if "loss" in row]


@pytest.mark.reliability("R18")
@pytest.mark.parametrize("error", ["accelerator", "cpu"])
@pytest.mark.parametrize("after", [0, 1, 3], ids=["first micro-batch", "second micro-batch", "second step"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_step_is_run_again_in_halves(
    where: str, after: int, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = Device(2, after=after, error=error)
    halved = trained(tiny("llama"), SeqFT(Targets()), tmp_path, device, where)
    told = capsys.readouterr().out
    small = trained(tiny("llama"), SeqFT(Targets()), tmp_path, size=2)
    assert_same(halved, small)
    step = after // 2 + 1
    assert device.seen == [WHOLE] * (after + 1) + [2] * (4 * (4 - step)), "that step's rows, and all after it"
    notice = f"memory ran out at step {step} with 4 rows at a time; from this step on at most 2 are run at a time"
    assert told.count(f"notice: {notice}") == 1
    noted = [row for row in halved[1] if "notice" in row]
    assert [row["step"] for row in noted] == [step]
    assert noted[0]["notice"].startswith(notice)


@pytest.mark.reliability("R18")
def test_what_is_rehearsed_is_what_the_smaller_batches_would(tmp_path: Path) -> None:
    def method() -> Method:
        return METHODS["osft"].build({"rehearse": 0.5, "rehearse_tokens": 300})

    halved = trained(tiny("llama"), method(), tmp_path, Device(2, after=1))
    assert_same(halved, trained(tiny("llama"), method(), tmp_path, size=2))


@pytest.mark.reliability("R18")
@pytest.mark.parametrize("kind", [SeqFT, Pull, Flatten])
@pytest.mark.parametrize("name", ["llama", "t5", "bert-classifier"])
def test_whatever_the_loss_is_the_mean_of(name: str, kind: type[SeqFT], tmp_path: Path) -> None:
    if name == "bert-classifier" and kind is Flatten:
        pytest.skip("its logits are of rows, not of tokens")
    device = Device(1, after=1)
    halved = trained(tiny(name), kind(Targets()), tmp_path, device, "forward")
    assert_same(halved, trained(tiny(name), kind(Targets()), tmp_path))
    assert device.seen[:4] == [WHOLE, WHOLE, 2, 1], "halved until it fits"


@pytest.mark.reliability("R18")
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_mean_over_micro_batches_stays_one(name: str, tmp_path: Path) -> None:
    """Where a model takes no count the Trainer averages the micro-batches, however many tokens each of them trains."""
    ends = []
    for device in (None, Device(3, after=1)):
        model = tiny(name)
        model.accepts_loss_kwargs = False
        ends.append(trained(model, Flatten(Targets()), tmp_path, device))
    assert_same(*ends)


@pytest.mark.reliability("R18")
@pytest.mark.parametrize(
    ("name", "options"),
    [("osft", {}), ("osft", {"constraint": "block"}), ("lora", {}), ("lwf", {"from_first_task": True})],
    ids=str,
)
def test_with_every_kind_of_method(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    halved = trained(tiny("llama"), METHODS[name].build(options), tmp_path, Device(2, after=1), "backward")
    assert_same(halved, trained(tiny("llama"), METHODS[name].build(options), tmp_path, size=2))


@pytest.mark.reliability("R18")
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("kind", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_dropout_draws_what_it_would_have_drawn(
    kind: str, after: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    kinds: dict[str, Any] = {"llama": LlamaForCausalLM, "t5": T5ForConditionalGeneration}
    ends = []
    for device, size, seed in ((Device(2, after=after), 4, 0), (None, 2, 0), (None, 2, 1)):
        model = kinds[kind].from_pretrained(folder)
        if device is not None:
            device.limit(model, "forward")
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 2}
        fitted(model, SeqFT(Targets()), written_rows(tmp_path), tmp_path / "out", seed=seed, **options)
        ends.append({name: weight.clone() for name, weight in model.state_dict().items()})
    halved, small, other = ends
    assert equal(halved, small)
    assert not equal(halved, other)


@pytest.mark.reliability("R18")
def test_a_row_that_does_not_fit_alone_is_named(llama_folder: Path, tmp_path: Path) -> None:
    model, method, data = LlamaForCausalLM.from_pretrained(llama_folder), Watched(), written_rows(tmp_path)
    model.register_forward_pre_hook(too_long_for(data.examples[9].input_ids), with_kwargs=True)
    message = rf"rows\.jsonl:11: memory ran out at step \d with this row alone, of {len(data[9]['input_ids'])} tokens"
    with pytest.raises(LoricaError, match=rf"{message}; lower --max_length"):
        fitted(model, method, data, tmp_path / "out")
    assert all_finite(model)
    assert [line for batch in method.batches for line in batch if line == 11] == []


def too_long_for(ids: list[int]) -> Callable[..., None]:
    """Return a hook that runs out of memory whenever one row is among a batch's."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if any(row[: len(ids)].tolist() == ids for row in kwargs["input_ids"]):
            raise ERRORS["accelerator"]()

    return hook


@pytest.mark.reliability("R18")
def test_a_step_in_the_backward_pass_cannot_be_run_again(llama_folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    Device(2).limit(model, "backward")
    options = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    with pytest.raises(LoricaError, match=r"at step 1, with 4 rows at a time; .*lower --per_device_train_batch_size"):
        fitted(model, SeqFT(Targets()), written_rows(tmp_path), tmp_path / "out", **options)


@pytest.mark.reliability("R18")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_filled_the_memory_is_gone_when_the_halves_are_run(where: str, tmp_path: Path) -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Full(Device):
        def _raise_if_above(self, rows: int) -> None:
            alive.extend(one() is not None for one in held)
            activations = torch.ones(8)
            held.append(weakref.ref(activations))
            super()._raise_if_above(rows)

    device = Full(2)
    trained(tiny("llama"), SeqFT(Targets()), tmp_path, device, where, steps=1)
    assert device.seen == [4, 2, 2, 2, 2]
    assert alive
    assert not any(alive)


@pytest.mark.reliability("R18")
def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    device = Device(2, error="another")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trained(tiny("llama"), SeqFT(Targets()), tmp_path, device)
    assert device.seen == [WHOLE]


@pytest.mark.reliability("R18")
def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("a view of a leaf"))


@contextmanager
def limited(folder: Path, device: Device) -> Iterator[None]:
    """Limit the training passes of the model that will be loaded from a folder."""

    def hook(module: nn.Module, args: Any, kwargs: Any = None) -> None:
        ours = isinstance(module, LlamaForCausalLM) and module.name_or_path == str(folder)
        if ours and module.training and module.device.type != "meta":
            module.register_forward_pre_hook(device.forward, with_kwargs=True)
            handle.remove()

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.reliability("R18")
def test_the_record_of_an_update_tells_of_it(llama_folder: Path, rows: Any, tmp_path: Path) -> None:
    def update(name: str, size: int, accumulation: int) -> dict[str, Any]:
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        options |= {"learning_rate": 1e-3, "disable_tqdm": True, "train_file": file, "output_dir": tmp_path / name}
        options |= {"model_name_or_path": str(llama_folder), "preset": "paper"}
        return lorica.train(options, say=lambda line: None)

    file = rows("new")
    device = Device(2)
    with limited(llama_folder, device):
        halved = update("halved", 4, 2)
    assert device.seen == [4] + 12 * [2], "the first forward pass was under way when the limit was set"
    small = update("small", 2, 4)
    assert [notice["step"] for notice in halved["notices"]] == [1]
    assert "at most 2 are run at a time" in halved["notices"][0]["notice"]
    assert small["notices"] == []
    assert json.loads((tmp_path / "halved" / "lorica.json").read_text())["notices"] == halved["notices"]
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("halved", "small")]
    assert all((ends[0][name] - ends[1][name]).abs().max() <= 1e-6 for name in ends[0])


@pytest.mark.reliability("R18")
def test_the_record_of_a_run_tells_of_it(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    device = Device(4)
    with limited(llama_folder, device):
        records, _ = run_stream(write(), llama_folder, tmp_path / "out", seeds=3, methods=["seqft"], max_steps=3)
    assert [(told["task"], told["step"]) for told in records[0]["notices"]] == [("first", 2), ("second", 1)]
