"""``lorica.run``: two tasks, one after the other, with and without protection."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

import lorica
import lorica.sequence
from lorica.data.stream import TaskStream, read_stream
from lorica.errors import Interrupted, LoricaError
from lorica.report import read_record, write_report
from lorica.scores import ScoreMatrix
from lorica.sequence import StreamRun
from lorica.training.trainer import MethodTrainer
from tests.training.conftest import llama_folder, t5_folder  # noqa: F401

Write = Callable[..., TaskStream]
SETTINGS: dict[str, Any] = {
    "seqft": {"method": "seqft", "label": "sequential fine-tuning", "learning_rate": 1e-2},
    "half": {
        "method": "osft", "label": "OSFT", "learning_rate": 1e-2, "protection": {"unfreeze_rank_ratio": 0.5},
    },
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a stream of two tasks, each one answer for all rows, and read it; ``changes`` replace fields."""

    def make(**changes: Any) -> TaskStream:
        folder = tmp_path / "stream"
        folder.mkdir(exist_ok=True)
        for name, answer in (("first", "a"), ("second", "b"), ("known", "c")):
            rows = [{"prompt": f"{name} {i}?", "completion": answer} for i in range(8)]
            for part in ("train", "test"):
                (folder / f"{name}.{part}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        fields = {
            "name": "letters",
            "version": 1,
            "description": "two answers",
            "tasks": [
                {"name": name, "train_file": f"{name}.train.jsonl", "test_file": f"{name}.test.jsonl"}
                for name in ("first", "second")
            ],
            "held_out": [{"name": "known", "test_file": "known.test.jsonl"}],
            "training": {"max_steps": 15, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 3},
            "methods": SETTINGS,
        }
        (folder / "stream.yaml").write_text(json.dumps(fields | changes))
        return read_stream(folder / "stream.yaml")

    return make


def run(stream: TaskStream, model: Path, out: Path, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    told: list[str] = []
    return lorica.run(stream, str(model), out, say=told.append, **options), told


def test_both_methods_learn_the_stream(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[nn.Module] = []
    close = StreamRun._record
    monkeypatch.setattr(StreamRun, "_record", lambda self: models.append(self.model) or close(self))
    records, told = run(write(), llama_folder, tmp_path / "out", seed=3)
    plain, protected = records
    for record, name in zip(records, SETTINGS, strict=True):
        scores = record["scores"]
        assert (len(scores), {len(row) for row in scores}) == (3, {2})
        assert scores[0] == [0.0, 0.0], "before training a random model knows nothing"
        assert scores[1][0] == scores[2][1] == 100.0, "each task is learned when it comes"
        assert len(record["retention"]["known"]) == 3
        assert record["metrics"] == ScoreMatrix.from_json(record).metrics()
        assert (record["kind"], record["stream"], record["seed"]) == ("run", "letters", 3)
        assert (tmp_path / "out" / name / "run.json").is_file()
        assert read_record(tmp_path / "out" / name / "run.json").title == record["label"]
        assert [path.name for path in (tmp_path / "out" / name).iterdir()] == ["run.json"]
    assert "sequential fine-tuning" in write_report([tmp_path / "out"], tmp_path).read_text()
    assert len(told) == 6
    assert told[-1].endswith("[done]")

    assert plain["plan"] == plain["leakage"] == []
    assert len(protected["plan"]) == len(protected["leakage"]) == 14
    assert max(row["leak_u"] for row in protected["leakage"]) <= 1e-5
    assert max(row["leak_v"] for row in protected["leakage"]) <= 1e-5
    assert 0 < protected["cost"]["trainable_parameters"] < plain["cost"]["trainable_parameters"]

    before = load_file(llama_folder / "model.safetensors")
    for model in models:
        assert type(model).__name__ == "LlamaForCausalLM"
        assert not [module for module in model.modules() if type(module).__module__.startswith("lorica")]
        assert model.state_dict().keys() == before.keys()
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
        assert model.config.use_cache is True


def test_the_same_seed_gives_the_same_scores(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write(training={"max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8})
    stages: list[dict[str, torch.Tensor]] = []

    class Kept(StreamRun):
        def _score(self, stage: int) -> None:
            super()._score(stage)
            stages.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    scores = []
    for seed in (1, 1, 2):
        told: list[str] = []
        folder = tmp_path / str(len(scores))
        scores.append(Kept(stream, "half", str(llama_folder), folder, seed, told.append).run()["scores"])
    first, second, other = (stages[start : start + 3] for start in (0, 3, 6))
    assert scores[0] == scores[1]
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(first[-1][name], other[-1][name]) for name in first[-1])


def test_an_encoder_decoder_runs(write: Write, t5_folder: Path, tmp_path: Path) -> None:
    records, _ = run(write(), t5_folder, tmp_path / "out", methods=["half"])
    assert [record["label"] for record in records] == ["OSFT"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["half"]


def test_scoring_takes_the_stream_s_batch_size(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def score(*args: Any, batch_size: int) -> tuple[float, int]:
        sizes.append(batch_size)
        return 0.0, 8

    monkeypatch.setattr(lorica.sequence, "exact_match", score)
    run(write(), llama_folder, tmp_path / "out", methods=["seqft"])
    assert sizes == [3] * 9


def test_a_signal_leaves_the_finished_record_and_no_checkpoint(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopper(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if Path(args.output_dir).name == "half" and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    start = MethodTrainer.__init__

    def with_stopper(self: Any, *args: Any, **given: Any) -> None:
        start(self, *args, **given | {"callbacks": [*given["callbacks"], Stopper()]})

    monkeypatch.setattr(MethodTrainer, "__init__", with_stopper)
    with pytest.raises(Interrupted) as stopped:
        run(write(), llama_folder, tmp_path / "out")
    assert stopped.value.signum == signal.SIGTERM
    assert read_record(tmp_path / "out" / "seqft" / "run.json").title == "sequential fine-tuning"
    assert not list((tmp_path / "out" / "half").iterdir())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "training": ({"training": {"learning_rat": 1}}, r"stream 'letters': unknown option --learning_rat\. Did you mean"),
    "key": (
        {"methods": {"half": SETTINGS["half"] | {"protection": {"unfreeze_rank": 0.5}}}},
        r"stream 'letters', method 'half': unknown protection 'unfreeze_rank'\. Did you mean 'unfreeze_rank_ratio'",
    ),
    "effect": (
        {"methods": {"seqft": SETTINGS["seqft"] | {"protection": {"source": "activation"}}}},
        r"stream 'letters', method 'seqft': source has no effect",
    ),
    "method": (
        {"methods": {"mine": SETTINGS["half"] | {"method": "ostf"}}},
        r"stream 'letters', method 'mine': unknown method 'ostf'.* Did you mean 'osft'",
    ),
    "no method": ({"methods": {}}, "stream 'letters' has settings for no method"),
    "train file": (
        {"tasks": [{"name": "one", "train_file": "none.jsonl", "test_file": "first.test.jsonl"}]},
        r"stream 'letters', task 'one': no file .*stream/none\.jsonl",
    ),
    "ability": (
        {"held_out": [{"name": "old", "test_file": "old.jsonl"}]},
        r"stream 'letters', ability 'old': no file .*stream/old\.jsonl",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_stream_is_one_error_before_anything_runs(
    changes: dict[str, Any], message: str, write: Write, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoricaError, match=message):
        run(write(**changes), llama_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "stream.yaml: "),
        ("name: x\n", "field version: Field required"),
        ("name: [\n", "stream.yaml: not YAML"),
        ("name: x\nversion: 1\ndescription: d\ntasks: []\n", "field tasks"),
    ],
)
def test_a_file_that_is_no_stream(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "stream.yaml").write_text(text)
    with pytest.raises(LoricaError, match=message):
        read_stream(tmp_path / "stream.yaml")


def test_an_unknown_method_is_named_with_the_nearest(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    message = r"stream 'letters' has no settings for method 'haf'; it has seqft, half\. Did you mean 'half'\?"
    with pytest.raises(LoricaError, match=message):
        run(write(), llama_folder, tmp_path / "out", methods=["seqft", "haf"])
    assert not (tmp_path / "out").exists()


def test_rows_without_answers_cannot_be_scored(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write()
    Path(stream.path("second.test.jsonl")).write_text('{"text": "only text"}\n')
    with pytest.raises(LoricaError, match=r"second\.test\.jsonl: no row has an answer to score"):
        run(stream, llama_folder, tmp_path / "out")


def test_a_missing_model_is_one_error(write: Write, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="nowhere: no such folder"):
        run(write(), tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(LoricaError, match="nobody: cannot load the tokenizer"):
        lorica.run(write(), "nobody", tmp_path / "out")
    assert not (tmp_path / "out").exists()
