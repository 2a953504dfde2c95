"""What the preset ``retain`` stands for: all that keeps, as far as a model and the other options can have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, LlamaConfig, T5Config, TrainingArguments

from lorica.config import UpdateConfig, build_config
from lorica.errors import LoricaError
from lorica.forecast.options import build_forecast_config
from lorica.forecast.story import forecast
from lorica.lineage import Lineage
from lorica.methods import build_method
from lorica.methods.protection import given_options
from lorica.preset import RETAIN, filled_in, with_preset
from lorica.update import train
from lorica.update_record import identity_of
from tests.forecast.conftest import Folder, config_folder  # noqa: F401
from tests.forecast.test_forecast import CPU
from tests.training.conftest import llama_folder, rows, t5_folder  # noqa: F401

LLAMA = LlamaConfig(vocab_size=61, bos_token_id=1, eos_token_id=2)
T5 = T5Config(vocab_size=61)
NEEDED = {"model_name_or_path": "m", "train_file": "t", "output_dir": "o"}


SHORT = {"rehearse_tokens": 200, "rehearse_length": 32}
QUICK = SHORT | {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
NONE_REHEARSED = {"rehearse": 0.0, "rehearse_tokens": 32_768, "rehearse_length": 64, "rehearse_prompts": 0.0}


def filled(model: Any = LLAMA, **options: Any) -> UpdateConfig:
    return with_preset(build_config(NEEDED | {"preset": "retain"} | options), model)


def decided(config: UpdateConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in RETAIN}


def test_a_model_that_writes_gets_all_of_it() -> None:
    config = filled()
    assert decided(config) == RETAIN
    assert config.calibration is None


def test_it_is_what_an_update_does_that_asks_for_nothing() -> None:
    assert decided(with_preset(build_config(NEEDED), LLAMA)) == RETAIN


def test_the_papers_form_is_what_the_options_say_by_themselves() -> None:
    plain = build_config(NEEDED | {"preset": "paper"})
    assert with_preset(plain, LLAMA) is plain
    assert decided(plain) == {
        "source": "weight", "unfreeze_rank_ratio": None, "remember_tasks": False, "curvature_penalty": 0.0,
        "rehearse": 0.0, "rehearse_tokens": 32_768, "rehearse_length": 64, "rehearse_prompts": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "amount",
    [
        {"effective_rank": 3},
        {"osft_unfreeze_rank_ratio": 0.2},
        {"rank_schedule": [0.3, 0.6]},
        {"unfreeze_rank_ratio": 0.1},
    ],
    ids=str,
)
def test_an_amount_that_is_given_stays(amount: dict[str, Any]) -> None:
    assert decided(filled(**amount)) == RETAIN | {"unfreeze_rank_ratio": amount.get("unfreeze_rank_ratio")}


def test_expected_forgetting_is_an_amount_too() -> None:
    config = filled(ranks="marginal", expected_forgetting=0.1)
    assert decided(config) == RETAIN | {"unfreeze_rank_ratio": None, "curvature_penalty": 0.0}


def test_what_is_given_stays_even_where_it_is_an_options_own_default() -> None:
    given = {
        "rehearse": 0.5,
        "rehearse_tokens": 32_768,
        "rehearse_length": 64,
        "rehearse_prompts": 0.0,
        "curvature_penalty": 50.0,
    }
    assert decided(filled(**given)) == RETAIN | given
    assert not filled(remember_tasks=False).remember_tasks


def test_without_rehearsal_nothing_is_said_of_it() -> None:
    config = filled(rehearse=0.0)
    assert decided(config) == RETAIN | NONE_REHEARSED
    build_method("osft", given_options(config), {})


@pytest.mark.parametrize(
    "options",
    [
        {"constraint": "input"},
        {"constraint": "block"},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_schedule": [0.0, 0.5]},
        {"unfreeze_rank_ratio": 1.0},
        {"osft_unfreeze_rank_ratio": 1.0},
        {"effective_rank": 0},
        {"ranks": "marginal"},
    ],
    ids=str,
)
def test_no_penalty_where_it_is_not_defined(options: dict[str, Any]) -> None:
    assert filled(**options).curvature_penalty == 0


@pytest.mark.parametrize(
    "model",
    [T5, GPT2Config(vocab_size=61), LlamaConfig(vocab_size=61, bos_token_id=None, eos_token_id=None)],
    ids=["encoder-decoder", "tokens outside of the vocabulary", "no such tokens"],
)
def test_a_model_that_begins_no_text_rehearses_none(model: Any) -> None:
    config = filled(model)
    assert decided(config) == RETAIN | NONE_REHEARSED
    assert config.calibration == "random"
    assert filled(model, calibration_file="c").calibration is None


def test_an_encoder_decoder_rehearses_answers_to_prompts() -> None:
    config = filled(T5, prompts_file="p")
    assert decided(config) == RETAIN | {"rehearse_prompts": 0.0}
    assert config.calibration is None


def test_prompts_are_not_trained_where_there_are_no_logits() -> None:
    assert decided(filled(use_liger_kernel=True)) == RETAIN | {"rehearse_prompts": 0.0}
    method = build_method("osft", {"rehearse_prompts": 0.1, "rehearse": 0.5}, {})
    with pytest.raises(LoricaError, match="rehearse_prompts needs logits, and --use_liger_kernel makes none"):
        method.penalty(torch.nn.Linear(1, 1), {}, None)  # type: ignore[arg-type]


def test_a_configuration_that_names_no_vocabulary_is_taken_at_its_word() -> None:
    config = SimpleNamespace(bos_token_id=7, eos_token_id=None, is_encoder_decoder=False)
    config.get_text_config = lambda: config
    assert decided(filled(config)) == RETAIN


def test_one_of_several_ends_of_a_text_is_enough() -> None:
    assert decided(filled(LlamaConfig(vocab_size=61, bos_token_id=None, eos_token_id=[99, 2]))) == RETAIN


def test_a_sharded_model_gets_the_directions_alone() -> None:
    config = filled(fsdp="full_shard")
    assert decided(config) == RETAIN | NONE_REHEARSED | {"curvature_penalty": 0.0, "remember_tasks": False}
    assert config.calibration == "random"


@pytest.mark.parametrize("model", [LLAMA, T5])
@pytest.mark.parametrize("options", [{}, {"effective_rank": 3}, {"fsdp": "full_shard"}], ids=str)
def test_filling_in_twice_changes_nothing(model: Any, options: dict[str, Any]) -> None:
    once = filled(model, **options)
    assert with_preset(once, model) == once


OTHERWISE: list[tuple[dict[str, Any], str]] = [
    ({"method": "lora"}, "--preset retain is for method osft, not lora; leave it out"),
    ({"plan_file": "p"}, "--preset retain and --plan_file both say what is protected"),
    ({"source": "weight"}, "protects by source curvature; leave it or --source weight out"),
    ({"ranks": "energy"}, "does not go with --ranks energy"),
]


@pytest.mark.parametrize(("options", "told"), OTHERWISE)
def test_what_contradicts_it_is_refused_where_it_was_asked_for(options: dict[str, Any], told: str) -> None:
    with pytest.raises(LoricaError, match=told):
        filled(**options)
    assert filled(source="curvature").source == "curvature"


@pytest.mark.parametrize("options", [options for options, _ in OTHERWISE], ids=str)
def test_it_gives_way_where_it_was_not(options: dict[str, Any]) -> None:
    given = build_config(NEEDED | options)
    settled = with_preset(given, LLAMA)
    assert settled == given.model_copy(update={"preset": "paper"})
    assert with_preset(settled, LLAMA) is settled


def test_what_it_added_is_told() -> None:
    asked = build_config(NEEDED | {"rehearse": 0.1, "constraint": "input"})
    told = filled_in(asked, with_preset(asked, LLAMA))
    assert told == (
        "preset retain: source curvature, unfreeze_rank_ratio 0.5, remember_tasks True, rehearse_tokens auto, "
        "rehearse_length auto, rehearse_prompts 0.1; --preset paper leaves these out"
    )
    plain = build_config(NEEDED)
    assert "curvature_penalty auto, calibration random" in str(filled_in(plain, with_preset(plain, T5)))
    lora = build_config(NEEDED | {"method": "lora"})
    assert filled_in(lora, with_preset(lora, LLAMA)) is None


def test_resuming_asks_what_it_stands_for_and_not_for_its_name() -> None:
    rows = SimpleNamespace(sha256="rows", digest=lambda: "tokens")
    inputs: Any = SimpleNamespace(train=rows, prompts=None, eval=None)
    arguments = TrainingArguments("o", use_cpu=True)
    named, spelled = (
        identity_of(config, arguments, inputs, Lineage("m"), sharded=False)
        for config in (filled(), build_config(NEEDED | RETAIN))
    )
    assert named == spelled


def test_an_update_under_it_is_recorded_and_foretold(
    llama_folder: Path, rows: Callable[..., str], tmp_path: Path
) -> None:
    given = {"model_name_or_path": str(llama_folder), "train_file": rows("new")}
    given |= QUICK
    told: list[str] = []
    record = train(given | {"output_dir": str(tmp_path / "out")}, say=told.append)
    assert {name: record["config"][name] for name in RETAIN} == RETAIN | SHORT
    assert {entry["source"] for entry in record["plan"]} == {"curvature"}
    assert (record["rehearse_tokens"], record["rehearse_length"]) == (200, 32)
    assert record["carried_bytes"] > 0
    assert 300 <= record["curvature_strength"] <= 10_000
    assert f"curvature_penalty auto: {record['curvature_strength']:,.0f} for these rows" in told
    assert all(row["holds"] for row in record["leakage"])
    assert "rehearsal: the model first writes 200 tokens of text of its own" in told
    assert told[0] == (
        "preset retain: source curvature, unfreeze_rank_ratio 0.5, remember_tasks True, curvature_penalty auto, "
        "rehearse 0.5, rehearse_prompts 0.1; --preset paper leaves these out"
    )
    foreseen = forecast(build_forecast_config({name: value for name, value in given.items() if name != "train_file"}))
    assert "curvature" in foreseen.ways[0].peak.device
    assert any(note.startswith("rehearse:") for note in foreseen.notes)


def test_everything_free_is_plain_fine_tuning_by_default_too(
    llama_folder: Path, rows: Callable[..., str], tmp_path: Path
) -> None:
    given = {"model_name_or_path": str(llama_folder), "train_file": rows("new"), "unfreeze_rank_ratio": 1.0, **QUICK}
    record = train(given | {"output_dir": str(tmp_path / "out")}, say=lambda line: None)
    assert record["curvature_strength"] == 0
    assert forecast(build_forecast_config(given | {"output_dir": ""}), machine=CPU).ways
    with pytest.raises(LoricaError, match=r"nothing of any weight is protected.*leave curvature_penalty out"):
        forecast(build_forecast_config(given | {"output_dir": "", "curvature_penalty": 3.0}), machine=CPU)


def test_an_encoder_decoder_is_updated_again_and_again(
    t5_folder: Path, rows: Callable[..., str], tmp_path: Path
) -> None:
    carried, asked = [], {"prompts_file": rows("asked"), "rehearse_tokens": 200}
    for index, (name, beside) in enumerate([("one", {}), ("two", asked), ("three", {})]):
        model = tmp_path / str(index - 1) if index else t5_folder
        given = {"model_name_or_path": str(model), "max_steps": 2, "report_to": "none", "use_cpu": True, **beside}
        record = train(given | {"train_file": rows(name), "output_dir": str(tmp_path / str(index))}, say=lambda _: None)
        carried.append(record["carried_bytes"])
        assert all(row["holds"] for row in record["leakage"])
    assert carried[0] == carried[1] == carried[2] > 0


def test_resumed_it_is_the_undisturbed_run(llama_folder: Path, rows: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = {"model_name_or_path": str(llama_folder), "train_file": rows("new"), "output_dir": str(out), **QUICK}
    given |= {"max_steps": 6, "save_steps": 2}
    train(given, say=lambda line: None)
    whole = load_file(out / "model.safetensors")
    for file in ("lorica.json", "model.safetensors"):
        (out / file).unlink()
    train(given | {"resume_from_checkpoint": str(out / "checkpoint-4")}, say=lambda line: None)
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(("options", "noted"), [({}, True), ({"fsdp": "full_shard"}, False)], ids=str)
def test_a_forecast_of_several_devices_says_what_a_sharded_model_does_without(
    options: dict[str, Any], noted: bool, config_folder: Folder
) -> None:
    config = {"model_name_or_path": config_folder("llama"), "devices": 2, "use_cpu": True} | options
    foreseen = forecast(build_forecast_config(config), machine=CPU)
    assert any(note.startswith("sharded, a model is counted with rehearse") for note in foreseen.notes) == noted
