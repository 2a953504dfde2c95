"""A BERT-style encoder runs the same stream as a classifier of all its labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from lorica.data.stream import TaskStream
from lorica.errors import Interrupted, LoricaError
from lorica.training.classifiers import read_classifier
from tests.experiments.conftest import Write, llama_folder, run, t5_folder, write  # noqa: F401
from tests.experiments.test_resume import check_same_files, stop_at
from tests.training.conftest import byte_tokenizer

PROMPT = "{sentence}, of {options}:"


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.cls_token, tokenizer.sep_token = "<s>", "</s>"
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=2)
    folder = tmp_path / "bert"
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def labelled(write: Write, tmp_path: Path) -> TaskStream:
    """Two tasks with two labels each; the word in a sentence decides."""
    tasks = []
    for name, labels in (("colour", ["Red", "Blue"]), ("size", ["Big", "Small"])):
        rows = [{"sentence": f"{labels[i % 2].lower()} {i}", "label": labels[i % 2]} for i in range(16)]
        for part in ("train", "test"):
            (tmp_path / "stream").mkdir(exist_ok=True)
            (tmp_path / "stream" / f"{name}.{part}.json").write_text(json.dumps(rows))
        files = {f"{part}_file": f"{name}.{part}.json" for part in ("train", "test")}
        tasks.append({"name": name, "prompt": PROMPT, "choices": labels, "max_new_tokens": 6} | files)
    return write(tasks=tasks, held_out=[], training={"max_steps": 40, "per_device_train_batch_size": 16})


@pytest.mark.parametrize("methods", [["seqft", "half", "lora", "ewc", "replay", "lwf"]], ids="+".join)
def test_a_masked_language_model_becomes_a_classifier(
    methods: list[str], labelled: TaskStream, bert_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"methods": methods, "learning_rates": 3e-3, "save_models": True}
    records, _ = run(labelled, bert_folder, tmp_path / "out", **options)
    for record in records:
        assert record["model_kind"] == "classifier"
        assert record["scores"][1][0] == 100.0, record["label"]
        assert record["scores"][2][1] == 100.0, record["label"]
    model = BertForSequenceClassification.from_pretrained(tmp_path / "out" / "half" / "model")
    assert sorted(model.config.label2id, key=model.config.label2id.get) == ["Red", "Blue", "Big", "Small"]
    assert {record["scores"][0][0] for record in records} == {records[0]["scores"][0][0]}, "the same new head for all"


def test_a_head_that_came_with_the_model_stays_as_it_is(
    labelled: TaskStream, bert_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"methods": "seqft", "learning_rates": 3e-3, "max_steps": 4, "save_models": True}
    run(labelled, bert_folder, tmp_path / "first", **options)
    first, second = (tmp_path / name / "seqft" / "model" for name in ("first", "second"))
    run(labelled, first, tmp_path / "second", **options)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 12
    assert all(".layer." in key and key.endswith("weight") for key in changed)


def test_a_head_of_other_labels_gives_way_to_a_new_one_that_trains(
    labelled: TaskStream, bert_folder: Path, tmp_path: Path
) -> None:
    run(labelled, bert_folder, tmp_path, methods="seqft", learning_rates=3e-3, max_steps=1, save_models=True)
    model, new = read_classifier(str(tmp_path / "seqft" / "model"), ["Red", "Blue", "Green"])
    assert model.classifier.out_features == 3
    assert new == [r"^classifier\.bias$", r"^classifier\.weight$"]


@pytest.mark.reliability("R10", "R11")
@pytest.mark.parametrize("method", ["seqft", "per-task"])
def test_a_stopped_classifier_goes_on_to_the_same_end(
    method: str, labelled: TaskStream, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"methods": method, "learning_rates": 3e-3, "max_steps": 4, "seeds": 5}
    options["save_models"] = True
    run(labelled, bert_folder, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            run(labelled, bert_folder, tmp_path / "parts", **options)
    run(labelled, bert_folder, tmp_path / "parts", **options)
    check_same_files(tmp_path / "whole" / method, tmp_path / "parts" / method)


def test_every_task_of_its_own_model_starts_from_the_same_head(
    labelled: TaskStream, bert_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"methods": "per-task", "learning_rates": 1e-12, "max_steps": 1, "save_models": True}
    heads = []
    for seed, tasks in enumerate((["colour"], ["colour", "size"])):
        run(labelled, bert_folder, tmp_path / str(seed), tasks=tasks, **options)
        heads.append(load_file(tmp_path / str(seed) / "per-task" / "model" / "model.safetensors")["classifier.weight"])
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_same_stream_runs_on_models_that_write(
    kind: str, labelled: TaskStream, llama_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    folder = llama_folder if kind == "llama" else t5_folder
    records, _ = run(labelled, folder, tmp_path / "out", methods=["seqft", "half"])
    assert [record["model_kind"] for record in records] == ["causal" if kind == "llama" else "seq2seq"] * 2


def test_a_classifier_needs_choices(write: Write, bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="give choices: a classifier needs to know its classes"):
        run(write(), bert_folder, tmp_path / "out", methods="seqft")
