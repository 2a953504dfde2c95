"""What is scored after every task and never trained, named from outside the stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorica.experiments.setup
from lorica.errors import LoricaError
from lorica.experiments.abilities import FromFile, FromHarness, named_ability
from tests.experiments.conftest import Write, llama_folder, run, write  # noqa: F401


def test_a_file_of_rows_is_scored_after_every_task(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra.jsonl"
    extra.write_text('{"prompt": "first 1?", "completion": "a"}\n{"prompt": "nothing", "completion": "z"}\n')
    (record,), told = run(write(), llama_folder, tmp_path / "out", methods="seqft", held_out=str(extra))
    assert set(record["retention"]) == {"known", "extra"}
    assert record["retention"]["extra"][:2] == [0.0, 50.0], "the first task's answer is learned, the other never"
    assert record["row_scores"]["extra"].split()[1] == "0"
    assert all("extra" in line for line in told if "after" in line)


def test_names_from_outside() -> None:
    (piqa,) = named_ability("general/piqa", "data", None)
    assert isinstance(piqa, FromFile)
    assert piqa.stream.path(piqa.scored.test_file).startswith("data/")
    every = named_ability("general", "data", None)
    assert {"mmlu", "gsm8k", "piqa"} <= {one.name for one in every}
    assert named_ability("arc_easy", None, 7) == [FromHarness("arc_easy", 7)]


def test_a_task_of_the_harness_is_scored_and_told_apart(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FromHarness, "score", lambda *_: 40.0)
    monkeypatch.setattr(lorica.experiments.setup, "check_harness", lambda *_, **__: None)
    options: dict[str, Any] = {"methods": "seqft", "max_steps": 1}
    (record,), _ = run(write(), llama_folder, tmp_path / "out", held_out="arc_easy", **options)
    assert record["retention"]["arc_easy"] == [40.0, 40.0, 40.0]
    answers = [json.loads(line) for line in (tmp_path / "out" / "seqft" / "predictions.jsonl").read_text().splitlines()]
    assert {answer["task"] for answer in answers} == {"first", "second", "known"}
    with pytest.raises(LoricaError, match="was begun with held out "):
        run(write(), llama_folder, tmp_path / "out", **options)


def test_a_task_that_the_harness_does_not_have_shows_at_once(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=r"arc_eesy.*(Did you mean 'arc_easy'|lorica\[lm-eval\])"):
        run(write(), llama_folder, tmp_path / "out", methods="seqft", held_out="arc_eesy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ("cl-standard", r"--held_out cl-standard: stream 'cl-standard' has no held-out abilities"),
        ("general/piqua", r"general has no ability 'piqua'.*Did you mean 'piqa'"),
        ("nothing.jsonl", r"^--held_out nothing\.jsonl: no such file"),
        (
            "{tmp}/stream/known.tset.jsonl",
            r"^--held_out .*known\.tset\.jsonl: no such file.*Did you mean .*known\.test",
        ),
        (
            "general/piqa",
            r"stream 'general', ability 'piqa': no file general/piqa/.*; give the folder .* as --data_dir",
        ),
        ("{stream}/known.test.jsonl", r"known\.test"),
    ],
)
def test_mistakes(held_out: str, message: str, write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write()
    held_out = held_out.replace("{tmp}", str(tmp_path))
    if "{stream}" in held_out:
        held_out = str(tmp_path / "first.jsonl")
        Path(held_out).write_text('{"prompt": "a", "completion": "b"}\n')
        message = r"--held_out: the name 'first' is taken"
    with pytest.raises(LoricaError, match=message):
        run(stream, llama_folder, tmp_path / "out", methods="seqft", held_out=held_out)
    assert not (tmp_path / "out").exists()
