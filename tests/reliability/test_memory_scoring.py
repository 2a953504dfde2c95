"""Where memory runs out in scoring, batches are halved and scores stay; in the optimizer's step a run ends clearly."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

from lorica import cli
from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset, load
from lorica.data.parts import in_parts, told_of_memory
from lorica.errors import LoricaError
from lorica.evaluation.choices import choice_scores
from lorica.evaluation.evaluator import mean_loss
from lorica.evaluation.generate import greedy_answers
from lorica.evaluation.scorer import _classified
from lorica.methods import Targets
from lorica.methods.seqft import SeqFT
from lorica.training.trainer import fit
from tests.builders import task_of, tiny
from tests.reliability.interruptions import quick_updates
from tests.reliability.test_memory import ERRORS, Device
from tests.reliability.trainings import TOKENIZER, Watched, arguments, equal, fitted, written_rows
from tests.training.conftest import llama_folder, rows, t5_folder  # noqa: F401

ROWS = [{"prompt": "ab" * i + "?", "completion": " " + "vwxyz"[: 1 + i % 5]} for i in range(1, 12)]


@given(st.lists(st.integers(), min_size=1, max_size=40), st.integers(1, 40))
def test_parts_are_joined_in_order_and_as_large_as_they_may_be(items: list[int], most: int) -> None:
    tried: list[int] = []

    def work(part: Any) -> list[int]:
        tried.append(len(part))
        if len(part) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [2 * item for item in part]

    assert in_parts(work, items) == [2 * item for item in items]
    done = [size for size in tried if size <= most]
    assert sum(done) == len(items)
    assert len(items) <= most or 2 * min(done) + 1 > most // 2, "none is smaller than halving makes it"


@pytest.mark.reliability("R18")
def test_one_row_that_does_not_fit_and_another_error() -> None:
    def work(part: Any) -> list[int]:
        raise ERRORS[kind]()

    kind = "cpu"
    with pytest.raises(LoricaError, match=r"memory ran out in scoring, with one row at a time; a lower --max_length"):
        in_parts(work, [1, 2, 3])
    kind = "another"
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        in_parts(work, [1, 2, 3])


@pytest.mark.reliability("R18")
def test_what_cannot_be_made_smaller_is_told_in_one_line() -> None:
    with (
        pytest.raises(LoricaError, match=r"^memory ran out there; lower --batch_size$"),
        told_of_memory(lambda: "there; lower --batch_size"),
    ):
        raise ERRORS["accelerator"]()
    with pytest.raises(RuntimeError, match="mat1 and mat2"), told_of_memory(lambda: "never said"):
        raise ERRORS["another"]()


def data(folder: Path, *, seq2seq: bool = False) -> EncodedDataset:
    path = folder / "uneven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return load(path, TOKENIZER, seq2seq=seq2seq)


def losses(model: Any, folder: Path) -> list[float]:
    dataset = data(folder, seq2seq=model.config.is_encoder_decoder)
    return [mean_loss(model, dataset, TOKENIZER, batch_size=4)]


def answers(model: Any, folder: Path) -> list[Any]:
    prompts = [list(range(5, 6 + i)) for i in range(11)]
    return greedy_answers(model, TOKENIZER, prompts, max_new_tokens=5, batch_size=4)


def choices(model: Any, folder: Path) -> list[float]:
    prompts = [list(range(5, 6 + i)) for i in range(6)]
    found = choice_scores(model, TOKENIZER, prompts, [[" a", " bcd", " ef"]] * 6, batch_size=4)
    return [score for row in found for score in row]


@pytest.mark.reliability("R18")
@pytest.mark.parametrize("score", [losses, answers, choices])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_scores_are_those_of_whole_batches(name: str, score: Callable[[Any, Path], list[Any]], tmp_path: Path) -> None:
    model = tiny(name)
    model.resize_token_embeddings(len(TOKENIZER))
    model.eval()
    whole = score(model, tmp_path)
    device = Device(2)
    entry = model.get_encoder() if name == "t5" else model
    entry.register_forward_pre_hook(device.forward, with_kwargs=True)
    in_halves = score(model, tmp_path)
    assert {4, 2} <= set(device.seen)
    assert in_halves == (whole if score is answers else pytest.approx(whole, rel=1e-5))


@pytest.mark.reliability("R18")
def test_so_are_those_of_a_classifier() -> None:
    model: Any = tiny("bert-classifier").eval()
    labels = list(model.config.label2id)
    scored: Any = type("Scored", (), {"choices": labels})
    numbers = random.Random(0)
    examples: Any = [type("Row", (), {"input_ids": numbers.choices(range(3, 60), k=2 + i)}) for i in range(9)]
    torch.nn.init.normal_(model.classifier.weight)
    whole = _classified(model, examples, scored, TOKENIZER, 4)
    device = Device(1)
    model.register_forward_pre_hook(device.forward, with_kwargs=True)
    assert _classified(model, examples, scored, TOKENIZER, 4) == whole
    assert device.seen[:4] == [4, 2, 1, 1]
    assert len(set(whole)) > 1


# --- while training -----------------------------------------------------------------------------------------------


def trained(model: Any, folder: Path, device: Device | None = None, **given: Any) -> tuple[list[float], dict[str, Any]]:
    """Train with scores at every step; return them and the weights."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if device is not None and not module.training:
            device.forward(module, args, kwargs)

    model.register_forward_pre_hook(hook, with_kwargs=True)
    dataset = data(folder, seq2seq=model.config.is_encoder_decoder)
    method, task = SeqFT(Targets()), task_of(model)
    method.begin_task(model, task)
    collate = Collator(TOKENIZER, seq2seq=model.config.is_encoder_decoder)
    chosen = arguments(
        folder / "out", max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4,
        seq2seq=model.config.is_encoder_decoder, **given,
    )  # fmt: skip
    log = fit(model, method, dataset, TOKENIZER, collate, chosen, eval_dataset=dataset, quiet=True)
    return [row["eval_loss"] for row in log if "eval_loss" in row], model.state_dict()


@pytest.mark.reliability("R18", "R34")
@pytest.mark.parametrize("given", [{}, {"label_smoothing_factor": 0.1}], ids=["", "smoothed labels"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_scores_while_training_too(
    kind: str, given: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    load_it = (AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM).from_pretrained
    device = Device(1)
    whole, undisturbed = trained(load_it(folder), tmp_path, **given)
    halved, weights = trained(load_it(folder), tmp_path, device, **given)
    assert device.seen[:7] == [4, 2, 1, 1, 2, 1, 1]
    assert len(whole) == 2
    assert halved == pytest.approx(whole, rel=1e-5)
    assert equal(weights, undisturbed)


# --- the optimizer's step -----------------------------------------------------------------------------------------


@contextmanager
def no_room_at(step: int) -> Iterator[None]:
    """Let AdamW run out of memory at one of its steps."""
    taken: list[int] = []
    real = torch.optim.AdamW.step

    def run_out(self: Any, *args: Any) -> Any:
        taken.append(1)
        if len(taken) == step:
            raise ERRORS["accelerator"]()
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", run_out)
        yield


@pytest.mark.reliability("R18")
@pytest.mark.parametrize("step", [1, 3])
def test_the_optimizer_without_room_ends_the_run_clearly(step: int, llama_folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with no_room_at(step), pytest.raises(LoricaError) as stopped:
        fitted(model, Watched(), written_rows(tmp_path), tmp_path / "out", save_strategy="steps", save_steps=1)
    told = str(stopped.value)
    assert told.startswith(f"memory ran out after the backward pass of step {step}, in the optimizer's step; ")
    assert "--optim adafactor" in told
    assert "--optimizer_in_backward true" in told
    last = tmp_path / "out" / f"checkpoint-{step - 1}"
    assert told.endswith(f"the last good checkpoint is {last}" if step > 1 else "no checkpoint was written yet")
    assert step > 1 or equal(before, model.state_dict())
    assert not (tmp_path / "out" / f"checkpoint-{step}").exists()


@pytest.mark.reliability("R18")
def test_the_command_ends_with_status_2_and_no_traceback(
    llama_folder: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"lorica train --model_name_or_path {llama_folder} --train_file {rows('new')} --output_dir {tmp_path}/out"
    words += " --disable_tqdm true --max_steps 4 --preset paper"
    monkeypatch.setattr(sys, "argv", words.split())
    with quick_updates(), no_room_at(1), pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("memory ran out after the backward pass of step 1") == 1
    assert "Traceback" not in shown
    assert not (tmp_path / "out" / "model.safetensors").exists()
