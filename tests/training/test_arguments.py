"""Training arguments: our defaults, their types, and names that do not exist."""

from __future__ import annotations

import importlib.util
import warnings

import pytest

from lorica.errors import LoricaError
from lorica.training.arguments import check_arguments, check_trackers, default_learning_rate, training_arguments


def test_strings_of_a_command_line_get_the_types_of_their_fields() -> None:
    checked = check_arguments(
        {"learning_rate": "1e-4", "bf16": "true", "max_steps": "7", "report_to": "none", "eval_strategy": "steps"}
    )
    assert checked["learning_rate"] == 1e-4
    assert checked["bf16"] is True
    assert checked["max_steps"] == 7


@pytest.mark.reliability("R26")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lerning_rate": 1}, r"unknown option --lerning_rate\. Did you mean 'learning_rate'\?"),
        ({"train_fil": 1}, r"unknown option --train_fil\. Did you mean 'train_file'\?"),
        ({"evaluation_strategy": "steps"}, r"transformers 5 calls it --eval_strategy"),
        ({"learning_rate": "fast"}, r"--learning_rate: .*got 'fast'"),
        ({"output_dir": "x"}, r"--output_dir is set by lorica train itself"),
    ],
)
def test_what_is_no_argument_is_refused_by_name(given: dict[str, object], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        check_arguments(given)


def test_the_file_is_named() -> None:
    with pytest.raises(LoricaError, match=r"^my\.yaml: unknown option --lr\b"):
        check_arguments({"lr": 1}, where="my.yaml: ")


def test_defaults_give_way_to_what_is_given() -> None:
    ours = training_arguments({}, "out", hidden_size=4096, seq2seq=False)
    theirs = training_arguments({"learning_rate": 1e-3, "warmup_steps": 9}, "out", hidden_size=4096, seq2seq=False)
    assert (ours.learning_rate, ours.lr_scheduler_type, ours.logging_nan_inf_filter) == (0.08 / 4096, "cosine", False)
    assert (theirs.learning_rate, theirs.warmup_steps, theirs.lr_scheduler_type) == (1e-3, 9, "cosine")


def test_learning_rate_falls_with_the_width() -> None:
    assert default_learning_rate(4096) == pytest.approx(2e-5, rel=0.03)
    assert default_learning_rate(768) == pytest.approx(1e-4, rel=0.05)


def test_encoder_decoder_arguments_are_for_encoder_decoders() -> None:
    assert training_arguments({"generation_max_length": 9}, "out", hidden_size=64, seq2seq=True)
    with pytest.raises(LoricaError, match="--generation_max_length is for encoder-decoder models"):
        training_arguments({"generation_max_length": 9}, "out", hidden_size=64, seq2seq=False)


def test_a_refusal_of_transformers_is_one_message() -> None:
    with pytest.raises(LoricaError, match="transformers refuses these training arguments"):
        training_arguments({"load_best_model_at_end": True}, "out", hidden_size=64, seq2seq=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": -1.0}, "--learning_rate -1.0 is negative"),
        ({"learning_rate": "nan"}, "--learning_rate nan is no finite number"),
        ({"learning_rate": True}, "--learning_rate needs a value"),
        ({"max_steps": True}, "--max_steps needs a value"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0 is no number of rows"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0"),
        ({"num_train_epochs": 0}, "--num_train_epochs 0 trains nothing"),
        ({"num_train_epochs": -1}, "--num_train_epochs -1 trains nothing"),
        ({"seed": -4}, "--seed -4 is none; give a number from 0 to 4294967295"),
        ({"optim": "adamw_troch"}, "--optim adamw_troch: there is none of that name. Did you mean 'adamw_torch'"),
        ({"lr_scheduler_type": "cosin"}, "--lr_scheduler_type cosin: .* Did you mean 'cosine'"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "--lr_scheduler_kwargs of --lr_scheduler_type cosine: .*'foo'"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "of --lr_scheduler_type warmup_stable_decay: .*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "of --lr_scheduler_type cosine_with_min_lr: .*min_lr"),
        ({"metric_for_best_model": "exact_match"}, "--metric_for_best_model exact_match: .* only the loss is scored"),
        ({"eval_steps": 5}, "--eval_steps has no effect without --eval_strategy"),
        ({"hub_token": "hf_aaaaaaaaaaaa"}, "--hub_token is not taken: .*HF_TOKEN"),
        ({"push_to_hub": True}, "--push_to_hub is not taken"),
        ({"do_train": True}, "--do_train is set by lorica train itself"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size is not taken: .*run in halves by itself"),
    ],
)
def test_values_that_fail_later_or_do_harm_are_refused_now(given: dict[str, object], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        training_arguments(given, "out", hidden_size=64, seq2seq=False)


def test_without_a_width_the_learning_rate_must_be_given() -> None:
    assert training_arguments({"learning_rate": 1e-3}, "out", hidden_size=None, seq2seq=False).learning_rate == 1e-3
    with pytest.raises(LoricaError, match="--learning_rate is needed"):
        training_arguments({}, "out", hidden_size=None, seq2seq=False)


def test_a_tracker_that_is_not_there_is_refused() -> None:
    arguments = training_arguments({"report_to": "none"}, "out", hidden_size=64, seq2seq=False)
    check_trackers(arguments)
    arguments.report_to = ["wandb"]
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(LoricaError, match=r"--report_to: .*wandb"):
            check_trackers(arguments)
    arguments.report_to = ["nobody"]
    with pytest.raises(LoricaError, match=r"--report_to: .*nobody"):
        check_trackers(arguments)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_gradient_checkpointing_are_taken_without_a_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = training_arguments({name: True}, "out", hidden_size=64, seq2seq=False)
    assert arguments.gradient_checkpointing
