"""A loss, a gradient or a weight that is no number stops the run before it does harm, and says where."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import ConcatDataset
from transformers import LlamaForCausalLM

import lorica
from lorica import cli
from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.methods import Targets
from lorica.methods.osft import OSFT
from lorica.methods.replay import StoredRows, pack
from lorica.methods.seqft import SeqFT
from lorica.training.guards import Diverged, WeightWatch
from lorica.training.rows import NUMBER, SHOWN, Numbered, NumberedCollate, named, where
from lorica.training.trainer import MethodMixin, MethodTrainer
from tests.builders import Stack, plan_for, task_of, tiny
from tests.reliability.trainings import (
    Watched,
    all_finite,
    arguments,
    equal,
    first_weight_sum,
    fitted,
    written_rows,
)
from tests.training.conftest import llama_folder, rows  # noqa: F401

AT_STEP = 3
PER_STEP = 2
AT = (AT_STEP - 1) * PER_STEP + 1
"""The forward pass of which the loss is spoiled: the first of two of the third step."""

SAVED = {"gradient_accumulation_steps": PER_STEP, "save_strategy": "steps", "save_steps": 1}


def constant(value: float) -> Callable[[nn.Module], Tensor]:
    return lambda model: 0.0 * first_weight_sum(model) + value


def root_at_zero(model: nn.Module) -> Tensor:
    """Return 0, whose gradient is infinite."""
    total = first_weight_sum(model)
    return (total - total.detach()).sqrt()


def root_of_a_size_at_zero(model: nn.Module) -> Tensor:
    """Return 0, whose gradient is no number."""
    total = first_weight_sum(model)
    return (total - total.detach()).abs().sqrt()


SPOILS = {
    "nan loss": (constant(float("nan")), r"the loss is nan"),
    "inf loss": (constant(float("inf")), r"the loss is inf"),
    "inf gradient": (root_at_zero, r"the norm of the gradients is (inf|nan)"),
    "nan gradient": (root_of_a_size_at_zero, r"the norm of the gradients is nan"),
}


def llama(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder)


def lines_named(message: str) -> set[int]:
    found = re.search(r"rows \S*rows\.jsonl:([\d,]+)", message)
    assert found, message
    return set(map(int, found[1].split(",")))


@pytest.mark.reliability("R15", "R16")
@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("spoil", SPOILS)
def test_training_stops_before_the_step(
    spoil: str, clip: float, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, message = SPOILS[spoil]
    model, method = llama(llama_folder), Watched(extra, AT)
    with pytest.raises(Diverged, match=rf"{message} at step {AT_STEP}, ") as stopped:
        fitted(model, method, written_rows(tmp_path), tmp_path / "out", max_grad_norm=clip, **SAVED)
    shown = method.batches[AT - 1] if "loss" in spoil else method.batches[AT - 1] + method.batches[AT]
    assert lines_named(str(stopped.value)) == set(shown)
    last = tmp_path / "out" / f"checkpoint-{AT_STEP - 1}"
    assert f"the last good checkpoint is {last}" in str(stopped.value)
    assert equal(load_file(last / "model.safetensors"), model.state_dict()), "no step was taken since"
    losses = re.findall(r"'loss': '?([^',}]+)", capsys.readouterr().out)
    assert len(losses) == AT_STEP - 1
    assert all(0 < float(loss) < float("inf") for loss in losses), "and none was made up"


@pytest.mark.reliability("R16")
@pytest.mark.parametrize("spoil", SPOILS)
def test_so_it_does_with_the_step_in_the_backward_pass(spoil: str, llama_folder: Path, tmp_path: Path) -> None:
    extra, message = SPOILS[spoil]
    model, method = llama(llama_folder), Watched(extra, AT_STEP)
    message = message if "loss" in spoil else r"the gradient of model\.layers\.0\.\S+ holds NaN or inf"
    options = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    with pytest.raises(Diverged, match=rf"{message} at step {AT_STEP}, ") as stopped:
        fitted(model, method, written_rows(tmp_path), tmp_path / "out", **options)
    assert lines_named(str(stopped.value)) == set(method.batches[AT_STEP - 1])
    assert all_finite(model)


@pytest.mark.reliability("R16")
@pytest.mark.parametrize("constraint", ["two-sided", "block"])
def test_so_it_does_with_either_engine(constraint: Any, llama_folder: Path, tmp_path: Path) -> None:
    class SpoiledOSFT(OSFT):
        passes = 0

        def penalty(self, model: nn.Module, *given: Any) -> Tensor | None:
            self.passes += 1
            return root_at_zero(model) if self.passes == AT_STEP else None

    model, method = llama(llama_folder), SpoiledOSFT.build({"constraint": constraint})
    with pytest.raises(Diverged, match=rf"the norm of the gradients is (inf|nan) at step {AT_STEP}, "):
        fitted(model, method, written_rows(tmp_path), tmp_path / "out")
    assert all_finite(model)


@pytest.mark.reliability("R16")
def test_a_scaler_of_float16_is_left_to_skip_the_step(tmp_path: Path) -> None:
    model, task = tiny("llama"), task_of(tiny("llama"))
    trainer = MethodTrainer(
        method=SeqFT(Targets()), rows=task.rows, collate=task.collate, model=model, args=arguments(tmp_path)
    )
    trainer.micro_batches.begin_step(1, [{NUMBER: [0]}])
    root_at_zero(model).backward()
    with pytest.raises(Diverged):
        trainer._get_grad_norm(model)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert not trainer._get_grad_norm(model).isfinite()


@contextmanager
def scaled() -> Iterator[None]:
    """Scale losses and compute in float16, as ``--fp16`` does where there is an accelerator."""
    start = MethodMixin.__init__

    def with_scaler(self: Any, **given: Any) -> None:
        start(self, **given)
        self.accelerator.scaler, self.accelerator.native_amp = torch.amp.GradScaler("cpu"), True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MethodMixin, "__init__", with_scaler)
        yield


class Overflowing(Watched):
    """Has infinite gradients from one step on, up to another."""

    first, last = AT_STEP, 10**9

    def penalty(self, model: nn.Module, *given: Any) -> Tensor | None:
        super().penalty(model, *given)
        return root_at_zero(model) if self.first <= len(self.batches) <= self.last else None


IN_FLOAT16 = {"fp16": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 100, "max_steps": 40}


@pytest.mark.reliability("R16")
@pytest.mark.parametrize(("optim", "clip"), [("adamw_torch_fused", 0.0), ("adamw_torch", 1.0), ("sgd", 0.0)])
def test_steps_are_not_skipped_for_ever(optim: str, clip: float, llama_folder: Path, tmp_path: Path) -> None:
    model, method = llama(llama_folder), Overflowing()
    with scaled(), pytest.raises(Diverged) as stopped:
        fitted(model, method, written_rows(tmp_path), tmp_path / "out", max_grad_norm=clip, optim=optim, **IN_FLOAT16)
    told, skips = str(stopped.value), 17  # at 65536, 32768 ... 1
    assert f"overflow float16 even at a loss scale of 1, and {skips} steps in a row were skipped" in told
    assert f"the last at step {AT_STEP - 1 + skips}, rows " in told
    assert lines_named(told) == set(method.batches[-1])
    assert len(method.batches) == AT_STEP - 1 + skips
    last = tmp_path / "out" / f"checkpoint-{AT_STEP - 1}"
    assert told.endswith(f"the last good checkpoint is {last}")
    assert equal(load_file(last / "model.safetensors"), model.state_dict()), "no step was taken since"


@pytest.mark.reliability("R16")
def test_a_skipped_step_is_skipped_by_the_optimizer_inside(llama_folder: Path, tmp_path: Path) -> None:
    """A fused one takes the scale itself, but here another is around it."""

    class OverflowingOSFT(OSFT):
        passes = 0

        def penalty(self, model: nn.Module, *given: Any) -> Tensor | None:
            self.passes += 1
            return root_at_zero(model) if self.passes == AT_STEP else None

    model = llama(llama_folder)
    with scaled():
        method = OverflowingOSFT.build({"constraint": "block"})
        fitted(model, method, written_rows(tmp_path), tmp_path / "out", **IN_FLOAT16 | {"max_steps": AT_STEP + 2})
    assert method.passes == AT_STEP + 2
    assert all_finite(model)


@pytest.mark.reliability("R16")
def test_a_few_skipped_steps_are_no_reason_to_stop(llama_folder: Path, tmp_path: Path) -> None:
    model, method = llama(llama_folder), Overflowing()
    method.last = AT_STEP + 15
    with scaled():
        log = fitted(model, method, written_rows(tmp_path), tmp_path / "out", **IN_FLOAT16 | {"max_steps": 21})
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 22))
    saved = [load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 18, 20)]
    assert equal(saved[0], saved[1])
    assert not equal(saved[1], saved[2])
    assert all_finite(model)


@pytest.mark.reliability("R16")
def test_without_an_accelerator_float16_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=r"--fp16 has no effect on cpu, .* give --bf16"):
        fitted(llama(llama_folder), Watched(), written_rows(tmp_path), tmp_path / "out", fp16=True)


@pytest.mark.reliability("R15", "R16")
def test_a_weight_that_is_no_number_is_never_saved(llama_folder: Path, tmp_path: Path) -> None:
    """Without its epsilon Adam divides 0 by 0 where there was no gradient: the embeddings of unseen tokens."""
    model, method = llama(llama_folder), Watched(targets=Targets(train_also=["embed_tokens"]))
    with pytest.raises(Diverged, match=r"model\.embed_tokens\.weight holds NaN or inf .* at step 1, ") as stopped:
        fitted(model, method, written_rows(tmp_path), tmp_path / "out", adam_epsilon=0.0, **SAVED)
    assert lines_named(str(stopped.value)) == {line for batch in method.batches for line in batch}
    assert "no checkpoint was written yet" in str(stopped.value)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.reliability("R15")
def test_a_damaged_checkpoint_is_not_the_last_good_one(llama_folder: Path, tmp_path: Path) -> None:
    class Damaging(Watched):
        def penalty(self, *given: Any) -> Tensor | None:
            if len(self.batches) == AT - 1:
                file = tmp_path / "out" / f"checkpoint-{AT_STEP - 1}" / "model.safetensors"
                file.write_bytes(file.read_bytes()[:-1] + b"!")
            return super().penalty(*given)

    model, method = llama(llama_folder), Damaging(constant(float("nan")), AT)
    with pytest.raises(Diverged, match=rf"the last good checkpoint is \S+checkpoint-{AT_STEP - 2}$"):
        fitted(model, method, written_rows(tmp_path), tmp_path / "out", **SAVED)


@pytest.mark.reliability("R15")
def test_the_command_ends_with_status_2_and_one_line(
    llama_folder: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"lorica train --model_name_or_path {llama_folder} --train_file {rows('new')} --output_dir {tmp_path}/out"
    words += " --method seqft --train_also embed_tokens --adam_epsilon 0 --disable_tqdm true --max_steps 4"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "holds NaN or inf" in line]
    assert len(lines) == 1
    assert re.search(r"at step 1, rows \S+new\.jsonl:\d+", lines[0])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "lorica.json").exists()


# --- the weights --------------------------------------------------------------------------------------------------


def watch(model: nn.Module) -> WeightWatch:
    told = WeightWatch(lambda name: None)
    told.watch(model)
    return told


@pytest.mark.reliability("R16")
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e5), (torch.bfloat16, 3.4e38), (torch.float32, 3e38)])
def test_a_core_that_no_dense_weight_can_hold_is_seen(dtype: torch.dtype, value: float) -> None:
    model = Stack([(6, 8), (8, 6)], dtype=dtype)
    lorica.protect(model, plan_for(model, 2))
    told = watch(model)
    assert told.broken() is None
    layer = model.layers[1]
    with torch.no_grad():
        layer.core.fill_(value)
    layer.fold()
    assert layer.core.isfinite().all()
    assert not layer.weight.isfinite().all()
    assert told.broken() == "layers.1.weight"


def test_what_is_large_and_finite_goes_on() -> None:
    model = Stack([(6, 8)])
    lorica.protect(model, plan_for(model, 2))
    told = watch(model)
    with torch.no_grad():
        model.layers[0].core.fill_(1e25)  # whose norm overflows
    model.layers[0].fold()
    assert told.broken() is None
    with torch.no_grad():
        model.layers[0].core[0, 0] = float("nan")
    model.layers[0].fold()
    assert told.broken() == "layers.0.weight"


class LargestRead(TorchDispatchMode):
    """Sees every operation and remembers the most numbers that one of its tensors has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for arg in torch.utils._pytree.tree_leaves((args, kwargs)):
            self.numbers = max(self.numbers, arg.numel() if isinstance(arg, Tensor) else 0)
        return func(*args, **(kwargs or {}))


def test_no_dense_weight_is_read_while_all_is_well() -> None:
    model = tiny("llama")
    lorica.protect(model, lorica.plan(model, 0.25))
    told = watch(model)
    with LargestRead() as seen:
        assert told.broken() is None
    cores = [layer.core.numel() for layer in protected_layers(model).values()]
    assert 0 < seen.numbers <= max(cores) < min(layer.weight.numel() for layer in protected_layers(model).values())


# --- the names of rows --------------------------------------------------------------------------------------------


def test_rows_are_named_through_every_kind_of_dataset(tmp_path: Path) -> None:
    data = written_rows(tmp_path, 40)
    kept = StoredRows(pack([data[3], data[4]], task_index=7))
    joined = ConcatDataset([data.subset([5, 6]), ConcatDataset([kept, data])])
    file = str(tmp_path / "rows.jsonl")
    assert [where(joined, number) for number in (0, 1, 4)] == [f"{file}:7", f"{file}:8", f"{file}:2"]
    assert where(joined, 3) == "row 1 of those kept, of task 7"
    assert where([{}, {}], 1) == "row 1"  # type: ignore[arg-type]
    assert named(data, [1, 9, 2]) == f"{file}:3,11,4"
    assert named(joined, [0, 2, 4]) == f"{file}:7,2; row 0 of those kept, of task 7"
    assert named(data, range(40)).endswith(f",{SHOWN + 1} and {40 - SHOWN} more")


def test_numbers_reach_the_batch_and_nothing_else_changes(tmp_path: Path) -> None:
    data = written_rows(tmp_path)

    def collate(some: Any) -> dict[str, Any]:
        return {key: torch.tensor([row[key] for row in some]) for key in some[0]}

    numbered, wrapped = Numbered(data), NumberedCollate(collate)
    assert len(numbered) == len(data)
    batch = wrapped([numbered[5], numbered[2]])
    assert batch.pop("row_number") == [5, 2]
    plain = collate([data[5], data[2]])
    assert equal(batch, plain)
    assert equal(wrapped([data[5], data[2]]), plain), "as rows for evaluation are"


@pytest.mark.reliability("R15")
def test_what_a_filter_would_hide_is_shown(llama_folder: Path, tmp_path: Path) -> None:
    """The Trainer's own filter of losses is off: a log holds what was measured."""
    log = fitted(llama(llama_folder), Watched(), written_rows(tmp_path), tmp_path / "out", max_steps=2)
    assert [row["step"] for row in log if "loss" in row] == [1, 2]
    state = json.dumps(log)
    assert "NaN" not in state
