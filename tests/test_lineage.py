"""A sequence of single updates: each knows its parent, remembers, and is rejected when it loses too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorica
from lorica.errors import LoricaError
from lorica.lineage import forgotten, read_lineage, weights_sha256
from lorica.verification import verify
from tests.training.conftest import llama_folder, rows  # noqa: F401

Rows = Callable[..., str]


def update(model: Path, out: Path, file: str, **options: Any) -> dict[str, Any]:
    settings = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
    }
    config = {"model_name_or_path": model, "train_file": file, "output_dir": out, "preset": "paper"}
    return lorica.train(config | settings | options, say=lambda _: None)


def test_updates_know_their_parent(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    first = update(llama_folder, tmp_path / "one", rows("one"), eval_file=rows("one"))
    second = update(tmp_path / "one", tmp_path / "two", rows("two"), eval_file=rows("two"), retention_file=rows("one"))
    assert first["parent"] == {
        "model": str(llama_folder), "weights_sha256": weights_sha256(llama_folder), "updates": 0,
    }  # fmt: skip
    assert second["parent"]["weights_sha256"] == first["weights_sha256"] == weights_sha256(tmp_path / "one")
    assert second["parent"]["updates"] == 1
    assert second["data"]["retention"]["one"]["sha256"] == first["data"]["eval"]["sha256"]
    assert second["weights_sha256"] != first["weights_sha256"]


def test_one_weight_more_or_less_is_another_digest(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"one")
    one = weights_sha256(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"two")
    assert weights_sha256(tmp_path) != one
    assert weights_sha256(tmp_path / "nothing") is None
    assert read_lineage("org/name").to_json() == {"model": "org/name", "weights_sha256": None, "updates": 0}


@pytest.mark.parametrize("method", ["ewc", "replay", "olora", "gpm"])
def test_a_method_remembers_from_update_to_update(method: str, llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    first = update(llama_folder, tmp_path / "one", rows("one"), method=method)
    assert first["carried_bytes"] > 0
    assert (tmp_path / "one" / "memory" / "lorica-memory.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    update(tmp_path / "one", tmp_path / "two", rows("two"), method=method)
    forgetful = tmp_path / "forgetful"
    (tmp_path / "one" / "memory" / "lorica-memory.safetensors").unlink()
    update(tmp_path / "one", forgetful, rows("two"), method=method)
    with_memory, without = (load_file(path / "model.safetensors") for path in (tmp_path / "two", forgetful))
    assert not all(torch.equal(with_memory[key], without[key]) for key in without), "what it remembers has an effect"


def test_another_method_does_not_take_over_the_memory(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    update(llama_folder, tmp_path / "one", rows("one"), method="ewc")
    assert read_lineage(str(tmp_path / "one")).memory("replay") == {}
    assert read_lineage(str(tmp_path / "one")).memory("ewc")


def test_an_update_that_forgets_too_much_is_kept_aside(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    known = rows("known", count=8, completion=" 1")
    update(llama_folder, tmp_path / "one", known, max_steps=40, method="seqft")
    other = rows("other", count=8, completion=" 2")
    common: dict[str, Any] = {"retention_file": known, "max_steps": 40, "method": "seqft"}
    record = update(tmp_path / "one", tmp_path / "two", other, max_forgetting=5, **common)
    lost = record["scores"]["before"]["retention"]["known"]["exact_match"]
    lost -= record["scores"]["after"]["retention"]["known"]["exact_match"]
    assert record["rejected"] == {"known": lost}
    assert lost > 5
    out = tmp_path / "two"
    assert not list(out.glob("*.safetensors"))
    assert not (out / "config.json").exists(), "nobody loads it by mistake"
    AutoModelForCausalLM.from_pretrained(out / "rejected")
    assert json.loads((out / "lorica.json").read_text())["rejected"] == record["rejected"]
    assert (out / "report.html").is_file()
    accepted = update(tmp_path / "one", tmp_path / "three", other, max_forgetting=100, **common)
    assert accepted["rejected"] == {}
    assert (tmp_path / "three" / "model.safetensors").is_file()


@pytest.mark.reliability("R19")
def test_a_finished_update_that_is_judged_anew_is_only_where_the_last_verdict_puts_it(
    llama_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    """The limit is no part of the weights: gone on with from its last checkpoint, an update is measured once more."""
    known, out = rows("known", count=8, completion=" 1"), tmp_path / "two"
    update(llama_folder, tmp_path / "one", known, max_steps=40, method="seqft")
    other = rows("other", count=8, completion=" 2")
    common: dict[str, Any] = {"retention_file": known, "max_steps": 40, "method": "seqft", "save_steps": 40}
    assert update(tmp_path / "one", out, other, max_forgetting=100, **common)["rejected"] == {}
    weights = (out / "model.safetensors").read_bytes()
    with pytest.raises(LoricaError, match=r"two is not empty; name another folder"):
        update(tmp_path / "one", out, other, max_forgetting=5, **common)
    assert (out / "model.safetensors").read_bytes() == weights
    again = common | {"resume_from_checkpoint": "true"}
    for limit, rejected in ((5, True), (100, False), (5, True), (None, False)):
        record = update(tmp_path / "one", out, other, max_forgetting=limit, **again)
        assert bool(record["rejected"]) == rejected
        (place,) = (path.parent for path in out.rglob("model.safetensors") if "checkpoint" not in path.parent.name)
        assert place == (out / "rejected" if rejected else out)
        assert (place / "model.safetensors").read_bytes() == weights
        assert (out / "config.json").exists() != rejected
        assert (out / "rejected").exists() == rejected
        assert record["config"]["max_forgetting"] == limit
        assert not [one for one in verify(out) if one.problem]


def test_the_limit_counts_each_file() -> None:
    def scored(**files: float) -> dict[str, Any]:
        return {"retention": {name: {"exact_match": value} for name, value in files.items()}}

    scores = {"before": scored(a=90.0, b=50.0, c=10.0), "after": scored(a=85.0, b=44.9, c=30.0)}
    assert forgotten(scores, None) == {}
    assert forgotten(scores, 5.0) == {"b": pytest.approx(5.1)}
    assert set(forgotten(scores, 0.0)) == {"a", "b"}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"max_forgetting": 3}, r"--max_forgetting needs --retention_file"),
    "range": ({"max_forgetting": -1, "retention_file": "known"}, r"--max_forgetting: .*greater than or equal to 0"),
    "text": ({"max_forgetting": 3, "retention_file": "text"}, r"--max_forgetting counts points of exact match, and"),
    "bound": ({"method": "joint"}, r"method 'joint' is a bound on a whole stream; it runs with lorica run"),
    "per-task": ({"method": "per-task"}, r"method 'per-task' is a bound"),
    "option": ({"method": "lora", "method_options": ["rank=4"]}, r"--method_options rank: unknown option of method"),
    "its own": ({"method_options": ["ranks=energy"]}, r"--method_options ranks: .*give it as --ranks"),
    "no option": ({"method_options": ["rank=4"]}, r"rank: unknown option of method 'osft'; it takes none"),
    "value 0": ({"method": "lora", "method_options": ["r=-1"]}, r"^--method lora --method_options r=-1: r = -1 is"),
    "value": ({"method": "lora", "method_options": ["r=four"]}, r"lora --method_options r=four: option 'r': .*'four'"),
    "form": ({"method": "lora", "method_options": ["r"]}, r"--method_options: expected NAME=VALUE"),
    "foreign": ({"method": "lora", "mrr": 0.2}, r"mrr has no effect with method 'lora'"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_mistakes(options: dict[str, Any], message: str, llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    if options.get("retention_file") == "known":
        options = options | {"retention_file": rows("known")}
    if options.get("retention_file") == "text":
        (tmp_path / "text.jsonl").write_text('{"text": "only text"}\n')
        options = options | {"retention_file": str(tmp_path / "text.jsonl")}
    with pytest.raises(LoricaError, match=message):
        update(llama_folder, tmp_path / "out", rows("new"), **options)
    assert not (tmp_path / "out").exists()


def test_another_method_is_told_that_it_begins_without_the_memory(
    llama_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    update(llama_folder, tmp_path / "one", rows("one"), method="ewc")
    assert "carries what method 'ewc' remembers" in str(read_lineage(str(tmp_path / "one")).notice("gpm"))
    assert read_lineage(str(tmp_path / "one")).notice("ewc") is None
    assert read_lineage(str(llama_folder)).notice("ewc") is None


def test_adapters_start_at_ten_times_the_rate(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    config = {"model_name_or_path": llama_folder, "train_file": rows("new"), "max_steps": 1}
    rate = [
        lorica.train(config | {"output_dir": tmp_path / name, "method": name}, say=lambda _: None)["learning_rate"]
        for name in ("seqft", "lora")
    ]
    assert rate[1] == pytest.approx(10 * rate[0])
