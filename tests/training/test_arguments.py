"""Training arguments: our defaults, their types, and names that do not exist."""

from __future__ import annotations

import pytest

from lorica.errors import LoricaError
from lorica.training.arguments import check_arguments, default_learning_rate, training_arguments


def test_strings_of_a_command_line_get_the_types_of_their_fields() -> None:
    checked = check_arguments(
        {"learning_rate": "1e-4", "bf16": "true", "max_steps": "7", "report_to": "none", "eval_strategy": "steps"}
    )
    assert checked["learning_rate"] == 1e-4
    assert checked["bf16"] is True
    assert checked["max_steps"] == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lerning_rate": 1}, r"unknown option --lerning_rate\. Did you mean 'learning_rate'\?"),
        ({"train_fil": 1}, r"unknown option --train_fil\. Did you mean 'train_file'\?"),
        ({"evaluation_strategy": "steps"}, r"transformers 5 calls it --eval_strategy"),
        ({"learning_rate": "fast"}, r"--learning_rate: .*got 'fast'"),
        ({"output_dir": "x"}, r"unknown option --output_dir"),
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
