"""``lorica train`` from files to a plain model: what comes out, what it proves, how it resumes."""

from __future__ import annotations

import json
import os
import pickletools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import lorica
from lorica.config import build_config
from lorica.data.collate import Collator
from lorica.data.dataset import load
from lorica.errors import LoricaError
from lorica.record import redacted
from lorica.report import read_record
from lorica.training.checkpoints import remove_checkpoints
from lorica.update import train

Rows = Callable[..., str]
FAST = {"max_steps": 6, "learning_rate": 3e-3, "disable_tqdm": True, "seed": 1, "preset": "paper"}


def run(model: Path, out: Path, train_file: str, **options: Any) -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []
    values = {"model_name_or_path": str(model), "train_file": train_file, "output_dir": str(out)} | FAST | options
    return train(build_config(values), say=told.append), told


def test_update_of_a_causal_model(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record, told = run(
        llama_folder, out, rows("new"), eval_file=rows("dev"), retention_file=[rows("old")], max_steps=40
    )
    before, after = record["scores"]["before"], record["scores"]["after"]
    assert after["eval"]["loss"] < before["eval"]["loss"] - 0.3
    assert before["eval"]["rows"] == 24
    assert set(after["retention"]) == {"old"}
    assert len(record["plan"]) == len(record["leakage"]) == 14
    assert max(row["leak_u"] for row in record["leakage"]) <= 1e-5
    assert max(row["leak_v"] for row in record["leakage"]) <= 1e-5
    assert any("«" in line for line in told), "one row is shown with its trained tokens marked"
    assert any("new task: loss" in line for line in told)
    read_record(out / "lorica.json")
    report = lorica.audit(llama_folder, out)
    assert report.holds, report.table()
    assert not report.elsewhere, "embeddings, head and norms are frozen"
    assert not report.assumed, "the plan is the recorded one"


@pytest.mark.reliability("R33")
def test_output_is_a_plain_model_without_pickles(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(llama_folder, out, rows("new"))
    names = {file.name for file in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "lorica.json", "plan.json", "report.html"} <= names
    assert not [name for name in names if name.startswith("checkpoint") or name.endswith((".bin", ".pt", ".tmp"))]
    for file in out.iterdir():
        with pytest.raises(ValueError, match=r".*"):
            pickletools.dis(file.read_bytes(), out=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    assert load_file(out / "model.safetensors").keys() == load_file(llama_folder / "model.safetensors").keys()
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 23).reshape(2, 10)
    code = (
        "import sys; sys.modules['lorica'] = None\n"
        "import json, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        "ids = torch.arange(3, 23).reshape(2, 10)\n"
        "print(json.dumps(model(ids).logits.double().tolist()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    elsewhere = torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]), dtype=torch.float64)
    assert torch.equal(elsewhere, model(ids).logits.double())


def test_update_of_an_encoder_decoder(t5_folder: Path, rows: Rows, tmp_path: Path) -> None:
    record, _ = run(t5_folder, tmp_path / "out", rows("new"), eval_file=rows("dev"), max_steps=30)
    scores = record["scores"]
    assert scores["after"]["eval"]["loss"] < scores["before"]["eval"]["loss"]
    assert scores["after"]["eval"]["exact_match"] is not None
    assert lorica.audit(t5_folder, tmp_path / "out").holds


@pytest.mark.parametrize(
    "options",
    [
        {"constraint": "input"},
        {"constraint": "output"},
        {"constraint": "block", "max_grad_norm": 0.1},
        {"source": "activation"},
        {"memory_mode": "lean"},
        {"memory_mode": "lean", "dtype": "bfloat16", "max_steps": 30},
        {"ranks": "energy"},
        {"ranks": "effective-rank", "rank_pattern": {"down_proj": 0.9}},
        {"train_also": ["norm"], "optim": "adafactor"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_protection_holds(options: dict[str, Any], llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    record, told = run(llama_folder, tmp_path / "out", rows("new"), **options)
    assert any("the constraint holds in all 14 weights" in line for line in told), told
    assert all(row["holds"] for row in record["leakage"])
    assert all(row["relative_change"] > 1e-4 for row in record["leakage"]), "every weight has learned"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "seqft"}, "memory_mode has no effect with method 'seqft'"),
        ({"constraint": "block"}, "memory_mode 'lean' has no effect with constraint 'block'"),
    ],
    ids=["another method", "another engine"],
)
def test_a_memory_mode_without_effect_is_refused(
    options: dict[str, Any], message: str, llama_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    with pytest.raises(LoricaError, match=message):
        run(llama_folder, tmp_path / "out", rows("new"), memory_mode="lean", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_protected_is_the_plain_trainer_bitwise(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    file = rows("new")
    run(llama_folder, tmp_path / "seqft", file, method="seqft")
    run(llama_folder, tmp_path / "all-free", file, unfreeze_rank_ratio=1.0)

    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj" in name)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"), max_steps=6, learning_rate=3e-3, seed=1, lr_scheduler_type="cosine",
        warmup_steps=0.03, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    data = load(file, tokenizer)
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=Collator(tokenizer)).train()
    plain = model.state_dict()
    for name in ("seqft", "all-free"):
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(trained[key], plain[key]) for key in plain), name


def test_everything_protected_moves_nothing(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    run(llama_folder, tmp_path / "out", rows("new"), unfreeze_rank_ratio=0.0)
    before, after = load_file(llama_folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.reliability("R9", "R11")
def test_interrupted_and_resumed_is_the_undisturbed_run_bitwise(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    file, stopped = rows("new"), tmp_path / "stopped"
    options = {"max_steps": 80, "logging_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    arguments = [f"--{key}={value}" for key, value in (FAST | options).items()]
    command = [sys.executable, "-m", "lorica.cli", "train", f"--model_name_or_path={llama_folder}"]
    command += [f"--train_file={file}", f"--output_dir={stopped}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "'loss'" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, "".join(seen) + rest
    assert "--resume_from_checkpoint true" in rest
    assert not (stopped / "lorica.json").exists()
    assert not (stopped / "model.safetensors").exists()

    run(llama_folder, stopped, file, **options, resume_from_checkpoint="true")
    run(llama_folder, tmp_path / "undisturbed", file, **options)
    resumed, whole = (load_file(folder / "model.safetensors") for folder in (stopped, tmp_path / "undisturbed"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_checkpoints_stay_when_asked_for(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    run(llama_folder, tmp_path / "out", rows("new"), save_steps=3)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_saved_plan_is_given_back(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    first, _ = run(llama_folder, tmp_path / "one", rows("new"), unfreeze_rank_ratio=0.5)
    plan = lorica.Plan.load(tmp_path / "one" / "plan.json")
    plan.entries[0] = plan.entries[0].model_copy(update={"k": 7})
    plan.save(tmp_path / "edited.json")
    second, _ = run(llama_folder, tmp_path / "two", rows("new"), plan_file=str(tmp_path / "edited.json"))
    assert [row["k"] for row in second["plan"]] == [7, *(row["k"] for row in first["plan"][1:])]


@pytest.mark.reliability("R33")
def test_bfloat16_model_stays_bfloat16(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    narrow = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16).save_pretrained(narrow)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(narrow)
    record, _ = run(narrow, tmp_path / "out", rows("new"))
    assert all(row["holds"] for row in record["leakage"])
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_rejected_rows_are_kept_aside(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    file = rows("new")
    with Path(file).open("a") as handle:
        handle.write('{"prompt": "no completion"}\n')
    record, _ = run(llama_folder, tmp_path / "out", file, skip_invalid_rows=True)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejected] == [25]
    assert record["data"]["train"]["kept"] == 24


@pytest.mark.reliability("R19")
def test_resuming_as_another_run_is_refused_by_name(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    file, out = rows("new"), tmp_path / "out"
    run(llama_folder, out, file, save_steps=3)
    (out / "lorica.json").unlink()
    for changed, message in {
        "learning_rate": "learning_rate was 0.003 and is now 0.1",
        "unfreeze_rank_ratio": "unfreeze_rank_ratio was None and is now 0.1",
        "method": "method was osft and is now seqft",
    }.items():
        value = {"method": "seqft"}.get(changed, 0.1)
        with pytest.raises(LoricaError, match=message):
            run(llama_folder, out, file, save_steps=3, resume_from_checkpoint="true", **{changed: value})
    Path(file).write_text(Path(file).read_text().replace("new 3", "old 3"))
    with pytest.raises(LoricaError, match="sha256 of the training rows was"):
        run(llama_folder, out, file, save_steps=3, resume_from_checkpoint="true")
    with pytest.raises(LoricaError, match=r"lies outside --output_dir"):
        run(llama_folder, tmp_path / "other", file, resume_from_checkpoint=str(out / "checkpoint-3"))
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_holds_no_pickled_arguments(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    run(llama_folder, tmp_path / "out", rows("new"), save_steps=3)
    assert (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").exists()
    assert not list(tmp_path.rglob("training_args.bin"))


def test_only_our_checkpoints_are_removed(tmp_path: Path) -> None:
    for name in ("checkpoint-12", "checkpoint-mine", "checkpoint-3-old"):
        (tmp_path / name).mkdir()
    remove_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-mine", "checkpoint-3-old"}


@pytest.mark.reliability("R15")
def test_a_diverged_run_stops_and_saves_nothing(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    options = {"learning_rate": 1e30, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 20}
    with pytest.raises(LoricaError, match=r"the loss is (nan|inf) at step \d+.*no checkpoint was written yet"):
        run(llama_folder, tmp_path / "out", rows("new"), **options)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    run(llama_folder, tmp_path / "out", rows("new"))  # what it left behind is in nobody's way


def test_before_and_after_are_measured_alike_under_mixed_precision(
    llama_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    record, _ = run(
        llama_folder, tmp_path / "out", rows("new"), eval_file=rows("dev"), bf16=True, use_cpu=True, learning_rate=0.0
    )
    assert record["scores"]["before"]["eval"]["loss"] == record["scores"]["after"]["eval"]["loss"]


@pytest.mark.reliability("S12")
def test_secrets_stay_out_of_the_record() -> None:
    given = {"command": "lorica --x hf_abcdefghijkl https://me:pass@host/x", "num_tokens": 5, "list": ["sk-12345678"]}
    assert redacted(given) == {
        "command": "lorica --x <secret> https://<secret>@host/x",
        "num_tokens": 5,
        "list": ["<secret>"],
    }


def test_files_of_one_stem_are_scored_apart(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    first = rows("old", count=5)
    (tmp_path / "sub").mkdir()
    second = str(tmp_path / "sub" / "old.jsonl")
    Path(second).write_text(Path(first).read_text() + Path(first).read_text().replace("old", "other"))
    record, _ = run(llama_folder, tmp_path / "out", rows("new"), retention_file=[first, second])
    assert {name: score["rows"] for name, score in record["scores"]["after"]["retention"].items()} == {
        first: 5,
        second: 10,
    }


def test_rows_that_are_also_trained_on_are_noticed(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    file = rows("new")
    _, told = run(llama_folder, tmp_path / "out", file, eval_file=file)
    assert any("24 of the rows of" in line and "are also trained on" in line for line in told)


def test_retention_rows_may_have_another_format(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "plain text"}\n')
    record, _ = run(
        llama_folder, tmp_path / "out", rows("new", text="both"), dataset_format="prompt_completion",
        retention_file=str(tmp_path / "text.jsonl"),
    )  # fmt: skip
    assert record["scores"]["after"]["retention"]["text"]["exact_match"] is None


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [("1", int, 1), ("1.0", float, 1.0), (1, int, 1), (1.0, float, 1.0), ("0.5", float, 0.5), ("64", int, 64)],
)
def test_one_direction_is_not_all_of_them(given: object, kind: type, value: float) -> None:
    base = {"model_name_or_path": "m", "train_file": "t", "output_dir": "o"}
    amount = build_config(base | {"effective_rank": given}).effective_rank
    assert type(amount) is kind
    assert amount == value
    assert build_config(base | {"rank_pattern": {"q_proj": given}}).rank_pattern == {"q_proj": value}
    assert type(build_config(base | {"rank_pattern": [f"q_proj={given}"]}).rank_pattern["q_proj"]) is kind
