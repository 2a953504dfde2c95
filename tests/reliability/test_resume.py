"""``lorica train``: interrupted anywhere and resumed, it is the undisturbed run, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorica.constrain.bases
import lorica.constrain.planning
from lorica.constrain.kept import BASES, KeptBases, write_bases
from lorica.constrain.protect import bases_of, protected_layers
from lorica.errors import Interrupted, LoricaError
from lorica.subspace.basis import Everything, Explicit, Reflector
from lorica.subspace.derived import Derived
from lorica.training.checkpoints import kept_bases
from lorica.training.identity import CHANGEABLE, PROCESSES
from lorica.training.manifest import write_manifest
from lorica.verification import verify
from tests.builders import plan_for, tiny
from tests.reliability.interruptions import assert_same, cases, outcome, quick_updates, stopped_at
from tests.reliability.small_runs import rows_file, update
from tests.training.conftest import llama_folder, t5_folder  # noqa: F401

SIX = {
    "max_steps": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3,
    "learning_rate": 5e-3, "unfreeze_rank_ratio": 0.5,
}  # fmt: skip
"""Twelve rows are three steps an epoch, and each of them is two micro-batches."""

GO_ON = {"resume_from_checkpoint": "true"}

QUICK = ("mid-epoch", "activation, lean", "in the backward pass", "padding-free")
CASES: dict[str, dict[str, Any]] = {
    "mid-epoch": {},
    "activation, lean": {"source": "activation", "calibration": "random", "memory_mode": "lean"},
    "in the backward pass": {
        "optimizer_in_backward": True, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "max_steps": 9,
    },
    "block": {"constraint": "block", "lr_scheduler_type": "constant"},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "workers": {"dataloader_num_workers": 2},
    "padding-free": {"padding_free": True},
    "lean": {"memory_mode": "lean"},
    "hybrid": {"source": "hybrid", "calibration": "random"},
    "also the norms": {"train_also": ["norm"], "weight_decay": 0.1},
    "nothing protected": {"unfreeze_rank_ratio": 1.0},
    "sgd, inverse square root": {"optim": "sgd", "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    "adafactor, restarts": {"optim": "adafactor", "lr_scheduler_type": "cosine_with_restarts"},
    "on a plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2,
        "metric_for_best_model": "loss",
    },
    "greedy, smoothed": {
        "lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss",
        "lr_scheduler_kwargs": {"patience": 1, "factor": 0.5, "min_lr": 0.0, "smooth": True, "window_size": 2},
    },
    "mixed precision": {"bf16": True, "use_cpu": True},
    "linear, warm-up": {"lr_scheduler_type": "linear", "warmup_steps": 3},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_updates():
        yield


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Return the path of twelve rows of different lengths."""
    path = tmp_path / "new.jsonl"
    lines = [{"prompt": f"new {i}?" + i * ".", "completion": f" {(7 * i) % 10}"} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def stop(
    model: Path, out: Path, file: str, event: str = "on_substep_end", step: int = 5, **options: Any
) -> Interrupted:
    """Begin an update, or go on with it, and interrupt it."""
    with stopped_at(event, step), pytest.raises(Interrupted) as stopped:
        update(model, out, file, **SIX | options)
    assert not (out / "model.safetensors").exists()
    return stopped.value


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("computed again")


def check(model: Path, file: str, folder: Path, options: dict[str, Any]) -> None:
    """An update that is interrupted and resumed equals the one that is not; nothing is split again for it."""
    update(model, folder / "whole", file, **SIX | options)
    event = "on_step_begin" if "optimizer_in_backward" in options else "on_substep_end"  # in mid-accumulation
    interrupted = stop(model, folder / "parts", file, event, **options)
    assert interrupted.checkpoint == str(folder / "parts" / "checkpoint-5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lorica.constrain.bases, "protected_directions", never)
        patch.setattr(lorica.constrain.planning, "observe", never)
        record, _ = update(model, folder / "parts", file, **SIX | options | GO_ON)
    assert all(row["holds"] for row in record["leakage"])
    assert_same(outcome(folder / "parts"), outcome(folder / "whole"))
    left = {path.name for path in (folder / "parts").iterdir()}
    assert not {name for name in left if name.startswith(("checkpoint", "bases", "update"))}


@pytest.mark.reliability("R8", "R9", "R10", "R11")
@pytest.mark.parametrize("options", cases(CASES, QUICK))
def test_resumed_it_is_the_undisturbed_run(
    options: dict[str, Any], llama_folder: Path, file: str, tmp_path: Path
) -> None:
    if "eval_strategy" in options:
        options = options | {"eval_file": rows_file(tmp_path, "dev", 4)}
    check(llama_folder, file, tmp_path, options)


@pytest.mark.reliability("R8", "R9")
@pytest.mark.parametrize("memory_mode", [pytest.param("fast", marks=pytest.mark.slow), "lean"])
def test_weights_of_16_bits(memory_mode: str, llama_folder: Path, file: str, tmp_path: Path) -> None:
    narrow = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16).save_pretrained(narrow)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(narrow)
    source = {"source": "activation", "calibration": "random"} if memory_mode == "lean" else {}
    check(narrow, file, tmp_path, {"memory_mode": memory_mode, "learning_rate": 2e-2} | source)


@pytest.mark.slow
@pytest.mark.reliability("R8", "R9")
def test_an_encoder_decoder(t5_folder: Path, file: str, tmp_path: Path) -> None:
    check(t5_folder, file, tmp_path, {})


@pytest.mark.reliability("R9", "R11")
@pytest.mark.parametrize("step", [3, 7], ids=["at an epoch's end", "in the last step"])
def test_scores_between_epochs_are_neither_lost_nor_doubled(
    step: int, llama_folder: Path, file: str, tmp_path: Path
) -> None:
    options = {"eval_strategy": "epoch", "logging_strategy": "epoch", "eval_file": rows_file(tmp_path, "dev", 4)}
    options |= {"lr_scheduler_type": "constant", "save_strategy": "no"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    update(llama_folder, whole, file, **SIX | options)
    interrupted = stop(llama_folder, parts, file, step=step, **options)
    assert interrupted.checkpoint == str(parts / f"checkpoint-{step}")
    state = json.loads((parts / f"checkpoint-{step}" / "trainer_state.json").read_text())
    scored = [row["epoch"] for row in state["log_history"] if "eval_loss" in row]
    assert scored == {3: [1.0], 7: [1.0, 2.0, pytest.approx(7 / 3)]}[step]
    update(llama_folder, parts, file, **SIX | options | GO_ON)
    assert_same(outcome(parts), outcome(whole))


@pytest.mark.slow
@pytest.mark.reliability("R9", "R11")
def test_two_interruptions_in_a_row(llama_folder: Path, file: str, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "constant"}
    update(llama_folder, tmp_path / "whole", file, **SIX | options)
    stop(llama_folder, tmp_path / "parts", file, step=1, **options)
    stop(llama_folder, tmp_path / "parts", file, step=5, **options | GO_ON)
    update(llama_folder, tmp_path / "parts", file, **SIX | options | GO_ON)
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


@pytest.mark.reliability("R9")
def test_from_its_last_checkpoint_no_step_is_taken(llama_folder: Path, file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = SIX | {"lr_scheduler_type": "constant", "save_steps": 4}
    update(llama_folder, out, file, **options)
    whole = outcome(out)
    for name in ("model.safetensors", "lorica.json"):
        (out / name).unlink()
    update(llama_folder, out, file, **options | GO_ON)
    assert_same(outcome(out), whole)


@pytest.mark.slow
def test_a_signal_keeps_the_state_also_where_weights_alone_are_asked_for(
    llama_folder: Path, file: str, tmp_path: Path
) -> None:
    options = {"save_only_model": True, "save_steps": 5}
    update(llama_folder, tmp_path / "whole", file, **SIX | options)
    stop(llama_folder, tmp_path / "parts", file, **options)
    update(llama_folder, tmp_path / "parts", file, **SIX | options | GO_ON)
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


# --- bases ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of an update with checkpoints at steps 2 and 4, stopped at step 5, and the file it learns."""
    folder = tmp_path_factory.mktemp("interrupted")
    file = rows_file(folder, count=12)
    stop(llama_folder, folder / "out", file, save_steps=2, save_total_limit=3)
    return folder / "out", file


@pytest.fixture
def copied(interrupted: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    shutil.copytree(interrupted[0], tmp_path / "out")
    return tmp_path / "out", interrupted[1]


def go_on(model: Path, copied: tuple[Path, str], **options: Any) -> list[str]:
    out, file = copied
    return update(model, out, file, **SIX | {"save_steps": 2, "save_total_limit": 3} | GO_ON | options)[1]


@pytest.mark.reliability("R5", "R10")
def test_without_its_bases_no_checkpoint_is_resumed(llama_folder: Path, copied: tuple[Path, str]) -> None:
    (copied[0] / BASES).unlink()
    with pytest.raises(LoricaError, match=r"none of the 3 checkpoints.*bases\.safetensors, .* is missing from"):
        go_on(llama_folder, copied)


@pytest.mark.reliability("R4", "R10")
def test_nor_with_other_bases(llama_folder: Path, copied: tuple[Path, str]) -> None:
    with (copied[0] / BASES).open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    assert all("bases.safetensors is not the one" in str(one.problem) for one in verify(copied[0]))
    with pytest.raises(LoricaError, match=r"bases\.safetensors is not the one that its weights were trained in"):
        go_on(llama_folder, copied, resume_from_checkpoint=str(copied[0] / "checkpoint-4"))


def test_a_note_that_names_no_bases_is_damage(llama_folder: Path, copied: tuple[Path, str]) -> None:
    folder = copied[0] / "checkpoint-5"
    (folder / "bases.json").write_text("[]")
    write_manifest(folder)
    with pytest.raises(LoricaError, match=r"bases\.json: cannot tell which bases the checkpoint belongs to"):
        go_on(llama_folder, copied, resume_from_checkpoint=str(folder))


def test_the_bases_are_written_once_and_hold_the_plan(copied: tuple[Path, str]) -> None:
    out, _ = copied
    notes = {(out / f"checkpoint-{step}" / "bases.json").read_text() for step in (2, 4, 5)}
    assert len(notes) == 1
    kept = kept_bases(out / "checkpoint-5")
    assert kept is not None
    assert kept.plan.model_dump() == lorica.Plan.load(out / "plan.json").model_dump()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_kept_bases_are_those_of_the_model(memory: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("llama", dtype)
    plan = plan_for(model, lambda m, n: min(m, n) // (2 if m < n else 4))
    lorica.protect(model, plan, memory=memory)
    written = bases_of(model)
    write_bases(tmp_path / BASES, plan, written)
    again = lorica.protect(tiny("llama", dtype), plan, memory=memory, kept=KeptBases(tmp_path / BASES))
    kinds = set()
    for one, other in zip(protected_layers(model).values(), protected_layers(again).values(), strict=True):
        for mine, theirs in zip(one.exact_bases, other.exact_bases, strict=True):
            kinds.add(type(mine))
            assert (type(mine), mine.dim, mine.free) == (type(theirs), theirs.dim, theirs.free)
        for mine, theirs in ((one.out_basis, other.out_basis), (one.in_basis, other.in_basis)):
            assert [(t.dtype, t.stride()) for t in mine.buffers()] == [(t.dtype, t.stride()) for t in theirs.buffers()]
            assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), theirs.buffers(), strict=True))
    assert kinds >= {Explicit, Reflector}
    assert Derived in kinds or (memory, dtype) == ("fast", torch.float32)
    read = bases_of(again)
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_basis_that_layers_share_is_written_once_and_shared_again(
    memory: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny("llama", dtype)
    plan = lorica.plan(model, 0.5, source="activation", calibration="random")
    lorica.protect(model, plan, memory=memory)
    write_bases(tmp_path / BASES, plan, bases_of(model))
    with safe_open(str(tmp_path / BASES), framework="pt") as source:
        assert len(source.keys()) == 2 * 4, "of each block: q, k, v; o; gate, up; down"
    again = lorica.protect(tiny("llama", dtype), plan, memory=memory, kept=KeptBases(tmp_path / BASES))
    for one in (model, again):
        layers = protected_layers(one)
        q, k = (layers[f"model.layers.1.self_attn.{name}_proj"] for name in "qk")
        assert q.in_basis is k.in_basis
        assert q.in_basis.shared
        assert isinstance(q.out_basis, Everything)
        exact = k.exact_bases[1].matrix()
        assert exact.dtype == torch.float32, "the fold is as exact in the layers that come second"
        assert (exact.T @ exact - torch.eye(exact.shape[1])).abs().max() < 1e-5


@pytest.mark.reliability("R29")
def test_a_fold_that_a_forward_pass_in_mixed_precision_asks_for_is_exact() -> None:
    layer = lorica.protect(nn.Sequential(nn.Linear(16, 16)), plan_for(nn.Sequential(nn.Linear(16, 16)), 4))[0]
    layer.core.data.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(2, 16))
    folded = layer.weight.clone()
    layer.fold()
    assert torch.equal(layer.weight, folded)


def test_bases_of_another_model_are_refused_and_it_is_left_alone(tmp_path: Path) -> None:
    model = tiny("llama")
    plan = plan_for(model, 8)
    write_bases(tmp_path / BASES, plan, bases_of(lorica.protect(model, plan)))
    other = tiny("gpt2")
    with pytest.raises(LoricaError, match="the plan names"):
        lorica.protect(other, plan, kept=KeptBases(tmp_path / BASES))
    write_bases(tmp_path / BASES, plan, {})
    with pytest.raises(LoricaError, match=r"does not belong to this plan: it holds 0 tensors of model\.layers\.0\."):
        lorica.protect(tiny("llama"), plan, kept=KeptBases(tmp_path / BASES))
    write_bases(tmp_path / BASES, plan, {f"{n}.out.q_DF": torch.eye(5) for n in plan.names()})
    with pytest.raises(LoricaError, match="the bases are of weights with a side of 5"):
        lorica.protect(tiny("llama"), plan, kept=KeptBases(tmp_path / BASES))
    assert not protected_layers(other)
    (tmp_path / BASES).write_bytes(b"\0" * 20)
    with pytest.raises(LoricaError, match=r"bases\.safetensors: cannot read the bases"):
        KeptBases(tmp_path / BASES)


# --- what a resumed run must have in common with the one it goes on with ----------------------------------------------


@pytest.mark.reliability("R19")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 2 and is now 4"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps was 2 and is now 1"),
        ({"seed": 7}, "seed was 1 and is now 7"),
        ({"data_seed": 7}, "data_seed was None and is now 7"),
        ({"learning_rate": 1e-4}, "learning_rate was 0.005 and is now 0.0001.*or --allow_changed learning_rate"),
        ({"max_length": 64}, "max_length was 1024 and is now 64"),
        ({"allow_changed": "seed", "seed": 7}, "--allow_changed seed: no run goes on with another; what may change is"),
        (
            {"allow_changed": ["per_device_train_batch_size"], "per_device_train_batch_size": 4},
            "a step had 4 rows and now has 8, which would begin at another row",
        ),
    ],
)
def test_another_run_is_not_gone_on_with(
    changed: dict[str, Any], message: str, llama_folder: Path, interrupted: tuple[Path, str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in interrupted[0].rglob("*")}
    with pytest.raises(LoricaError, match=message):
        go_on(llama_folder, interrupted, **changed)
    assert {path: path.stat().st_mtime_ns for path in interrupted[0].rglob("*")} == before


@pytest.mark.reliability("R19")
def test_nor_with_other_rows_or_another_number_of_processes(
    llama_folder: Path, copied: tuple[Path, str], tmp_path: Path
) -> None:
    other = rows_file(tmp_path, "other", 12)
    with pytest.raises(LoricaError, match="sha256 of the training rows was"):
        go_on(llama_folder, (copied[0], other))
    identity = copied[0] / "update.json"
    identity.write_text(identity.read_text().replace('"world_size": 1', '"world_size": 2'))
    with pytest.raises(LoricaError, match="world_size was 2 and is now 1"):
        go_on(llama_folder, copied)


def test_the_same_rows_and_model_may_have_moved(llama_folder: Path, copied: tuple[Path, str], tmp_path: Path) -> None:
    model = shutil.copytree(llama_folder, tmp_path / "moved")
    shutil.copy(copied[1], tmp_path / "moved.jsonl")
    go_on(Path(model), (copied[0], str(tmp_path / "moved.jsonl")))
    assert (copied[0] / "model.safetensors").exists()


def test_allowing_changes_is_for_resumed_runs(llama_folder: Path, file: str, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="--allow_changed has no effect without --resume_from_checkpoint"):
        update(llama_folder, tmp_path / "out", file, allow_changed=["learning_rate"])


@pytest.mark.reliability("R19")
def test_a_changed_learning_rate_takes_effect(llama_folder: Path, copied: tuple[Path, str]) -> None:
    at_the_stop = load_file(copied[0] / "checkpoint-5" / "model.safetensors")
    go_on(llama_folder, copied, allow_changed=["learning_rate"], learning_rate=0.0)
    after = load_file(copied[0] / "model.safetensors")
    assert all(torch.equal(after[name], at_the_stop[name]) for name in after)


@pytest.mark.reliability("R19")
def test_a_longer_run_is_the_one_that_was_as_long_from_the_start(llama_folder: Path, file: str, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "save_steps": 5}
    update(llama_folder, tmp_path / "whole", file, **SIX | options)
    update(llama_folder, tmp_path / "parts", file, **SIX | options | {"max_steps": 5})
    longer = SIX | options | GO_ON | {"allow_changed": ["max_steps"]}
    update(llama_folder, tmp_path / "parts", file, **longer)
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_the_same_rows_in_smaller_parts_lead_to_the_same_weights(
    llama_folder: Path, copied: tuple[Path, str], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    other = Path(shutil.copytree(copied[0], tmp_path / "other"))
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    go_on(model, copied)
    go_on(model, (other, copied[1]), allow_changed=list(parts), **parts)
    one, two = (load_file(folder / "model.safetensors") for folder in (copied[0], other))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


def test_a_schedule_that_goes_by_what_it_saw_takes_no_other_rate(llama_folder: Path, file: str, tmp_path: Path) -> None:
    options = {
        "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2,
        "metric_for_best_model": "loss", "eval_file": rows_file(tmp_path, "dev", 4),
    }  # fmt: skip
    stop(llama_folder, tmp_path / "out", file, **options)
    with pytest.raises(LoricaError, match="--allow_changed learning_rate: a ReduceLROnPlateau goes by"):
        update(
            llama_folder, tmp_path / "out", file,
            **SIX | options | GO_ON | {"allow_changed": ["learning_rate"], "learning_rate": 1e-4},
        )  # fmt: skip


def test_every_changeable_setting_is_one_of_the_trainers() -> None:
    from transformers import TrainingArguments

    assert set(CHANGEABLE) - {PROCESSES} <= set(TrainingArguments.__dataclass_fields__)
