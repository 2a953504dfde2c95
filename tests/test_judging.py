"""The story of a judgement on two small models: what is asked, judged and written down."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorica.errors import LoricaError
from lorica.evaluation.judge import IDENTICAL, Verdict
from lorica.json_file import load_record
from lorica.judging import judge_models
from tests.training.conftest import llama_folder, t5_folder  # noqa: F401

PROMPTS = ["What is it?", "Name one.", "Why?"]


@pytest.fixture(scope="module")
def trained_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same model with other weights."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(llama_folder, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def greedy(folder: Path, text: str, tokens: int) -> str:
    """Return what transformers itself writes after a text, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(out, skip_special_tokens=True))


def prefers(wanted: Callable[[str], bool]) -> Any:
    """A judge that prefers the answer of which something holds."""

    def judge(prompt: str, first: str, second: str) -> Verdict:
        return Verdict("first" if wanted(first) else "second", raw=f"about {prompt}")

    return judge


def test_the_files_hold_what_was_asked_answered_and_judged(
    llama_folder: Path, trained_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    before, after = ([greedy(folder, text, 6) for text in PROMPTS] for folder in (llama_folder, trained_folder))
    assert all(old.strip() != new.strip() for old, new in zip(before, after, strict=True))
    said: list[str] = []
    out = tmp_path / "out"
    record = judge_models(
        str(llama_folder), str(trained_folder), prompts,
        judge=prefers(lambda answer: answer in (after[0], after[1], before[2])),
        max_new_tokens=6, batch_size=2, output_dir=out, say=said.append,
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["before"], row["after"]) for row in rows] == list(
        zip(PROMPTS, before, after, strict=True)
    )
    assert [row["outcome"] for row in rows] == ["win", "win", "lose"]
    verdict = {"choice": "second", "reason": "", "raw": "about What is it?", "usable": True}
    assert rows[0]["before_first"] == verdict
    assert rows[0]["after_first"] == verdict | {"choice": "first"}
    written = load_record(out / "judge.json")
    assert written == json.loads(json.dumps(record))
    assert written["kind"] == "judge"
    assert written["win"]["percent"] == pytest.approx(200 / 3)
    assert written["lose"]["percent"] == pytest.approx(100 / 3)
    assert written["prompts"] == 3
    assert written["judge"] == {"name": "tests.test_judging:prefers.<locals>.judge"}
    assert written["keyword_refusal_rate"] == {"before": 0.0, "after": 0.0}
    for path in (prompts, out / "judgements.jsonl"):
        assert written["files"][str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "lorica" in written["versions"]
    assert said[0].startswith("after against before, 3 prompts: win 66.7 % [")


def test_a_model_against_itself_ties_without_asking(llama_folder: Path, prompts: Path, tmp_path: Path) -> None:
    def judge(*_: str) -> Verdict:
        raise AssertionError("asked")

    folder = str(llama_folder)
    record = judge_models(
        folder, folder, prompts, judge=judge, max_new_tokens=3, limit=2, output_dir=tmp_path / "out", say=lambda _: None
    )
    assert record["tie"] == {"percent": 100.0, "low": 100.0, "high": 100.0}
    assert record["ties"] == {IDENTICAL: 2}
    assert record["cut_answers"] == {"before": 2, "after": 2}


def test_messages_go_through_the_template_of_each_model(
    llama_folder: Path, trained_folder: Path, tmp_path: Path
) -> None:
    templated = tmp_path / "templated"
    shutil.copytree(trained_folder, templated)
    tokenizer = AutoTokenizer.from_pretrained(templated)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer.save_pretrained(templated)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}))
    judge_models(
        str(llama_folder), str(templated), prompts, judge=prefers(bool), max_new_tokens=5,
        output_dir=tmp_path / "out", say=lambda _: None,
    )  # fmt: skip
    row = json.loads((tmp_path / "out" / "judgements.jsonl").read_text())
    assert row["prompt"] == "Hello"
    assert row["before"] == greedy(llama_folder, "### Instruction:\nHello\n\n### Response:\n", 5)
    assert row["after"] == greedy(templated, "[user]Hello[assistant]", 5)


def test_an_encoder_decoder_is_judged_too(t5_folder: Path, prompts: Path, tmp_path: Path) -> None:
    record = judge_models(
        str(t5_folder), str(t5_folder), prompts, judge=prefers(bool), max_new_tokens=3,
        output_dir=tmp_path / "out", say=lambda _: None,
    )  # fmt: skip
    assert record["tie"]["percent"] == 100.0


def test_what_was_judged_before_the_judge_failed_is_kept(
    llama_folder: Path, trained_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    def judge(prompt: str, first: str, second: str) -> Verdict:
        if prompt == PROMPTS[2]:
            raise LoricaError("judge: status 401")
        return Verdict("tie", raw="half a pair: \ud800")

    out = tmp_path / "out"
    with pytest.raises(LoricaError, match=r"status 401; the 2 prompts judged before that are in .*judgements.jsonl"):
        judge_models(
            str(llama_folder), str(trained_folder), prompts, judge=judge, max_new_tokens=3, output_dir=out,
            say=lambda _: None,
        )  # fmt: skip
    rows = [json.loads(line) for line in (out / "judgements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS[:2]
    assert rows[0]["before_first"]["raw"] == "half a pair: \ud800"
    assert not (out / "judge.json").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts_file": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"after": "./absent"}, "./absent: no such folder"),
        ({"limit": 0}, "limit is 0; give at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"output_dir": "."}, "not empty"),
    ],
)
def test_input_is_checked_before_any_weight_is_loaded(
    changed: dict[str, Any],
    message: str,
    llama_folder: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorica.judging.read_model", lambda *_, **__: pytest.fail("weights were loaded"))
    given: dict[str, Any] = {
        "before": str(llama_folder),
        "after": str(llama_folder),
        "prompts_file": prompts,
        "output_dir": tmp_path / "out",
    }
    with pytest.raises(LoricaError, match=message):
        judge_models(**given | changed, judge=prefers(bool))
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_does_not_fit_is_named(llama_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "long.txt"
    prompts.write_text("short\n" + "x" * 300 + "\n")
    with pytest.raises(LoricaError, match=r"long.txt:2: a prompt of 300 tokens, and .* has 256 positions"):
        judge_models(str(llama_folder), str(llama_folder), prompts, judge=prefers(bool), output_dir=tmp_path / "out")
