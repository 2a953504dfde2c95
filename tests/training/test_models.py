"""Models come in with one clear message for whatever is wrong, and go out as they came."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    LEDConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    T5Config,
    Trainer,
    TrainingArguments,
    XLNetConfig,
)

from lorica.config import build_config
from lorica.errors import LoricaError
from lorica.training.models import (
    load_model,
    load_model_config,
    load_tokenizer,
    position_limit,
    read_model,
    read_model_config,
    read_tokenizer,
    stock_configuration,
)
from lorica.training.output import save_model


@pytest.fixture
def model_copy(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def read_all(folder: Path | str) -> Any:
    read_tokenizer(str(folder))
    return read_model(str(folder), read_model_config(str(folder)))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda f: halve(f / "model.safetensors"), "weights: Error while deserializing header"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "weights: Error while deserializing header"),
        (lambda f: (f / "model.safetensors").unlink(), "weights: Error no file named model.safetensors"),
        (lambda f: edit(f / "config.json", hidden_size=64), "weights: .*mismatched_sizes"),
        (lambda f: edit(f / "config.json", num_attention_heads="four"), "tokenizer: .*num_attention_heads"),
        (lambda f: halve(f / "config.json"), "tokenizer: .*not a valid JSON"),
        (lambda f: halve(f / "tokenizer.json"), "tokenizer: "),
        (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "none"}}'), "tokenizer: "),
    ],
    ids=["cut", "empty", "missing", "shapes", "type", "config", "tokenizer", "unknown"],
)
def test_a_damaged_model_is_one_message(damage: Callable[[Path], Any], what: str, model_copy: Path) -> None:
    damage(model_copy)
    with pytest.raises(LoricaError, match=f"^model {model_copy}: cannot load the {what}"):
        read_all(model_copy)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="nowhere: no such folder"):
        read_tokenizer(str(tmp_path / "nowhere"))


def test_a_folder_that_is_no_model_says_what_is_missing(model_copy: Path) -> None:
    with pytest.raises(LoricaError, match=r"config\.json is a file; name the model's folder"):
        read_tokenizer(str(model_copy / "config.json"))
    for file in model_copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(LoricaError, match=r"cannot load the tokenizer: the folder holds none; copy tokenizer\.json"):
        read_tokenizer(str(model_copy))
    (model_copy / "config.json").unlink()
    with pytest.raises(LoricaError, match=r"the folder holds no config\.json"):
        read_tokenizer(str(model_copy))


def test_an_unknown_dtype_is_named_with_those_there_are(model_copy: Path) -> None:
    with pytest.raises(LoricaError, match="--dtype fp16 is no dtype; give auto, float32, bfloat16 or float16"):
        read_model(str(model_copy), read_model_config(str(model_copy)), dtype="fp16")


def test_home_is_expanded(model_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_copy.parent))
    assert read_all("~/model").config.model_type == "llama"


def test_a_model_that_writes_no_text(tmp_path: Path) -> None:
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(LoricaError, match="BertForMaskedLM, which writes no text"):
        read_model_config(str(tmp_path))


def test_the_update_s_fields_are_passed_on(llama_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    config = build_config(
        {
            "model_name_or_path": str(llama_folder), "train_file": "x.jsonl", "output_dir": "out",
            "dtype": "bfloat16", "attn_implementation": "eager", "chat_template_path": str(template),
        }
    )  # fmt: skip
    assert load_tokenizer(config).chat_template == "{{ messages }}"
    model = load_model(config, load_model_config(config), "meta")
    assert (model.dtype, model.device.type) == (torch.bfloat16, "meta")
    assert model.config._attn_implementation == "eager"
    assert load_model(config, model.config).device.type == "cpu"


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.reliability("S5")
def test_code_of_the_model_s_own_runs_only_when_trusted(model_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(model_copy.parent / "modules"))
    (model_copy / "own.py").write_text(CUSTOM)
    kinds = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(model_copy / "config.json", model_type="own_llama", architectures=["OwnModel"], auto_map=kinds)
    with pytest.raises(LoricaError, match="trust_remote_code"):
        read_model_config(str(model_copy))
    config = read_model_config(str(model_copy), trust_remote_code=True)
    model = read_model(str(model_copy), config, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    save_model(model, read_tokenizer(str(model_copy)), model_copy.parent)
    assert (model_copy.parent / "own.py").read_text() == CUSTOM
    edit(model_copy / "config.json", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})
    with pytest.raises(LoricaError, match="OwnModel, which writes no text"):
        read_model_config(str(model_copy), trust_remote_code=True)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(n_positions=64), 64),
        (OPTConfig(max_position_embeddings=100), 100),
        (BertConfig(), 512),
        (LlamaConfig(max_position_embeddings=256), 256),
        (Gemma3Config(text_config={"max_position_embeddings": 99}), 99),
        (BartConfig(), 1024),
        (LEDConfig(max_encoder_position_embeddings=70, max_decoder_position_embeddings=30), 30),
        (T5Config(n_positions=512), None),
        (BloomConfig(), None),
        (MambaConfig(), None),
        (XLNetConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_positions_of_a_model(config: Any, limit: int | None) -> None:
    assert position_limit(config) == limit


def saved(folder: Path, name: str) -> dict[str, Any]:
    free = {"transformers_version", "dtype"}
    return {key: value for key, value in json.loads((folder / name).read_text()).items() if key not in free}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_configurations_go_out_as_they_came(kind: str, request: Any, tmp_path: Path) -> None:
    """Although the tokenizer's tokens are others, and temperature without sampling is refused in what has changed."""
    folder = Path(shutil.copytree(request.getfixturevalue(f"{kind}_folder"), tmp_path / "in"))
    edit(folder / "config.json", pad_token_id=None, bos_token_id=5)
    edit(folder / "generation_config.json", eos_token_id=[9, 1], do_sample=False, temperature=0.5, bos_token_id=6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = (AutoModelForCausalLM if kind == "llama" else AutoModelForSeq2SeqLM).from_pretrained(folder)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), report_to="none", max_steps=1, dataloader_pin_memory=False
    )
    with stock_configuration(model):
        rows = [{"input_ids": [5, 6], "labels": [5, 6]}]
        Trainer(model=model, args=arguments, processing_class=tokenizer, train_dataset=rows).train()
        assert model.config.use_cache is False
        assert model.generation_config.bos_token_id == tokenizer.bos_token_id
    save_model(model, tokenizer, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert saved(tmp_path / "out", name) == saved(folder, name)


def test_configurations_come_back_when_training_fails(llama_folder: Path) -> None:
    model = read_all(llama_folder)
    own, generation, before = model.config, model.generation_config, model.config.to_dict()

    def train() -> None:
        with stock_configuration(model):
            model.config.use_cache = False
            model.config.surplus = 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert model.config is own
    assert model.generation_config is generation
    assert model.config.to_dict() == before


def test_saving_replaces_older_files_and_leaves_the_others(llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("older")
    (out / "plan.json").write_text("mine")
    save_model(read_all(llama_folder), read_tokenizer(str(llama_folder)), out)
    assert saved(out, "config.json") == saved(llama_folder, "config.json")
    assert (out / "plan.json").read_text() == "mine"
    assert {path.name for path in out.iterdir()} == {path.name for path in llama_folder.iterdir()} | {"plan.json"}


@pytest.mark.parametrize("failing", range(6))
def test_a_failed_move_leaves_what_was_there(
    failing: int, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = read_all(llama_folder), read_tokenizer(str(llama_folder))
    (tmp_path / "config.json").write_text("older config")
    (tmp_path / "model.safetensors").write_text("older weights")
    moves, replace = iter(range(100)), Path.replace

    def full(self: Path, target: Path) -> Path:
        if next(moves) == failing:
            raise OSError(28, os.strerror(28))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(LoricaError, match=f"--output_dir {tmp_path}: cannot write the model: .*No space left"):
        save_model(model, tokenizer, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "config.json": "older config",
        "model.safetensors": "older weights",
    }


def test_a_failed_write_leaves_nothing(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = read_all(llama_folder), read_tokenizer(str(llama_folder))
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *args: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(LoricaError, match="cannot write the model"):
        save_model(model, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())
