"""Names on the hub: the commit is recorded and can be required; code and kernels run where asked; nothing is sent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3Config

from lorica.analysis.inspect import inspect_model
from lorica.analysis.options import InspectOptions
from lorica.config import build_config
from lorica.data.reader import open_source
from lorica.errors import LoricaError
from lorica.experiments.config import build_run_config
from lorica.experiments.setup import Setup
from lorica.forecast.rates import unmeasured_machine
from lorica.forecast.story import forecast
from lorica.hub import check_pinned, check_pinned_data, commit_of, is_commit
from lorica.scoring import evaluate_model
from lorica.scoring_options import EvalOptions
from lorica.training.arguments import check_arguments, training_arguments
from lorica.training.models import pinned, read_model_config, read_tokenizer
from lorica.training.trust import refuse_hub_kernels, refuse_kernels_of
from lorica.update import Update, train
from tests.reliability.small_runs import FAST, rows_file, run, stream_of, update
from tests.training.conftest import llama_folder  # noqa: F401

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
NAME = "owner/tiny"


@pytest.fixture
def cached(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a cache of the hub that knows a model, ``owner/tiny``, and a data set, ``owner/rows``, both on main."""
    cache = tmp_path / "cache"
    for kind in ("models--owner--tiny", "datasets--owner--rows"):
        (cache / kind / "refs").mkdir(parents=True)
        (cache / kind / "refs" / "main").write_text(COMMIT)
    shutil.copytree(llama_folder, cache / "models--owner--tiny" / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)  # where no folder is called like them
    return cache


@pytest.fixture
def rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Let every data set of the hub be the same rows, and note the revisions that are asked for."""
    asked: list[str | None] = []

    def load(path: str, name: str | None = None, *, split: str, revision: str | None = None) -> Any:
        asked.append(revision)
        return datasets.Dataset.from_list([{"prompt": f"{path} {i}?", "completion": f" {i}"} for i in range(8)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


# --- commits ----------------------------------------------------------------------------------------------------------


@pytest.mark.reliability("S11")
def test_the_commits_of_model_tokenizer_and_data_are_recorded(
    cached: Path, rows_of_the_hub: list[str | None], tmp_path: Path
) -> None:
    values = {"model_name_or_path": NAME, "dataset_name": "owner/rows", "output_dir": str(tmp_path / "out")}
    train(build_config(values | FAST | {"max_steps": 1}), say=lambda line: None)
    record = json.loads((tmp_path / "out" / "lorica.json").read_text())
    assert record["commits"] == {"model": COMMIT, "tokenizer": COMMIT}
    assert record["config"]["model_revision"] == COMMIT
    assert record["data"]["train"]["path"] == f"owner/rows@{COMMIT}"
    assert set(rows_of_the_hub) == {COMMIT}


@pytest.mark.slow
@pytest.mark.reliability("S11")
def test_every_command_records_the_commit_of_a_model(cached: Path, tmp_path: Path) -> None:
    rows, expected = rows_file(tmp_path), {"model": COMMIT, "tokenizer": COMMIT}
    (record,) = run(stream_of(tmp_path / "data", ("one",)), NAME, tmp_path / "runs")
    assert record["commits"] == expected
    options = {"model_name_or_path": NAME, "tasks": [rows], "limit": 2, "max_new_tokens": 1}
    assert evaluate_model(EvalOptions(**options), lambda line: None)["commits"] == expected
    inspected = inspect_model(InspectOptions(model_name_or_path=NAME, output_dir=tmp_path / "in"), lambda line: None)
    assert inspected["commits"] == expected


@pytest.mark.slow
@pytest.mark.reliability("S11")
def test_a_folder_has_a_digest_instead(llama_folder: Path, tmp_path: Path) -> None:
    record, _ = update(llama_folder, tmp_path / "out", rows_file(tmp_path), max_steps=1)
    assert record["commits"] == {"model": None, "tokenizer": None}
    assert len(record["parent"]["weights_sha256"]) == 64
    assert len(record["data"]["train"]["sha256"]) == 64


@pytest.mark.reliability("S11")
@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:12], COMMIT.upper()])
def test_a_name_of_the_hub_without_its_whole_commit_is_refused_where_that_is_asked(
    revision: str | None, cached: Path, tmp_path: Path
) -> None:
    rows = rows_file(tmp_path)
    options = {"model_revision": revision, "require_pinned": True}
    with pytest.raises(LoricaError, match=r"--require_pinned: owner/tiny .*--model_revision"):
        update(NAME, tmp_path / "out", rows, **options)
    with pytest.raises(LoricaError, match="--require_pinned: owner/tiny"):
        run(stream_of(tmp_path / "data", ("one",)), NAME, tmp_path / "runs", **options)
    with pytest.raises(LoricaError, match="--require_pinned: owner/tiny"):
        evaluate_model(EvalOptions(model_name_or_path=NAME, tasks=[rows], **options), lambda line: None)
    with pytest.raises(LoricaError, match="--require_pinned: owner/tiny"):
        inspect_model(InspectOptions(model_name_or_path=NAME, output_dir=tmp_path / "in", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.reliability("S11")
def test_the_message_tells_the_commit_of_now(cached: Path) -> None:
    with pytest.raises(LoricaError, match=f"main is {COMMIT} now"):
        check_pinned(NAME, None, "--model_revision")


@pytest.mark.reliability("S11")
def test_what_is_pinned_is_taken(cached: Path, tmp_path: Path) -> None:
    values = {"model_name_or_path": NAME, "train_file": rows_file(tmp_path), "output_dir": str(tmp_path / "out")}
    options = {"model_revision": COMMIT, "require_pinned": True}
    assert Update(build_config(values | options)).config.model_revision == COMMIT
    with pytest.raises(LoricaError, match="owner/tiny: cannot load"):
        Update(build_config(values | options | {"model_revision": OTHER}))


@pytest.mark.reliability("S11")
@pytest.mark.parametrize("field", ["train_file", "eval_file", "retention_file", "calibration_file", "prompts_file"])
def test_data_of_the_hub_must_be_pinned_as_well(
    field: str, cached: Path, rows_of_the_hub: list[str | None], tmp_path: Path
) -> None:
    values = {"train_file": rows_file(tmp_path), field: "owner/rows"}
    file, options = values.pop("train_file"), {"require_pinned": True, "model_revision": COMMIT}
    with pytest.raises(LoricaError, match=rf"--require_pinned: owner/rows .*owner/rows@COMMIT; main is {COMMIT} now"):
        update(NAME, tmp_path / "out", file, **values, **options)
    assert rows_of_the_hub == []
    for name in (None, str(tmp_path / "rows.jsonl"), f"owner/rows@{COMMIT}"):
        check_pinned_data(name)


@pytest.mark.reliability("S11")
def test_a_stream_s_data_of_the_hub_must_be_pinned_as_well(
    cached: Path, rows_of_the_hub: list[str | None], llama_folder: Path, tmp_path: Path
) -> None:
    def stream(revision: str | None) -> Any:
        hub = {"path": "owner/rows", "train_split": "train", "test_split": "test", "revision": revision}
        task = {"name": "one", "train_file": "absent.jsonl", "test_file": "absent.jsonl", "hub": hub}
        return stream_of(tmp_path / "data", ("one",), tasks=[task])

    with pytest.raises(LoricaError, match=r"task 'one': --require_pinned: owner/rows .*hub\.revision"):
        run(stream(None), llama_folder, tmp_path / "runs", require_pinned=True)
    values = {"stream": "small", "model_name_or_path": llama_folder, "output_dir": tmp_path / "runs"}
    setup = Setup(build_run_config(values | {"require_pinned": True}), stream(OTHER))
    assert setup.rows.train("one").summary["path"].startswith(f"owner/rows@{OTHER}")
    assert set(rows_of_the_hub) == {OTHER}


@pytest.mark.reliability("S11")
def test_tasks_of_the_harness_cannot_be_pinned(llama_folder: Path) -> None:
    options = {"model_name_or_path": str(llama_folder), "tasks": ["boolq"], "require_pinned": True}
    with pytest.raises(LoricaError, match="--require_pinned: lm-eval fetches the data of boolq without a commit"):
        evaluate_model(EvalOptions(**options))


@given(st.text("0123456789abcdefABCDEFg", max_size=42) | st.text("0123456789abcdef", min_size=40, max_size=40))
def test_a_commit_is_forty_digits(text: str) -> None:
    assert is_commit(text) == (len(text) == 40 and set(text) <= set("0123456789abcdef"))


def test_a_data_set_is_read_at_the_revision_in_its_name(cached: Path, rows_of_the_hub: list[str | None]) -> None:
    assert open_source(f"owner/rows@{OTHER}").name == f"owner/rows@{OTHER}"
    assert open_source("owner/rows@main").name == f"owner/rows@{COMMIT}"
    assert open_source("owner/unknown@v1").name == "owner/unknown@v1"
    assert open_source("owner/unknown").name == "owner/unknown"
    assert rows_of_the_hub == [OTHER, COMMIT, "v1", None]


def test_what_cannot_be_told_stays_as_it_was_asked_for(cached: Path) -> None:
    options = InspectOptions(model_name_or_path="owner/unknown", output_dir="x", model_revision="v1")
    assert pinned(options) == options
    assert commit_of("owner/unknown") is None


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_code(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return a model with Python code, and the file that this makes when it is run."""
    model, mark = Path(shutil.copytree(llama_folder, tmp_path / "model")), tmp_path / "ran"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (model / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (model / "config.json").write_text(json.dumps(config))
    return model, mark


@pytest.mark.reliability("S5")
def test_no_command_runs_a_model_s_code_unless_it_is_asked_to(with_code: tuple[Path, Path], tmp_path: Path) -> None:
    model, mark = with_code
    rows = rows_file(tmp_path)
    commands: list[Callable[[], Any]] = [
        lambda: update(model, tmp_path / "out", rows, max_steps=1),
        lambda: run(stream_of(tmp_path / "data", ("one",)), model, tmp_path / "runs"),
        lambda: evaluate_model(EvalOptions(model_name_or_path=str(model), tasks=[rows]), lambda line: None),
        lambda: inspect_model(InspectOptions(model_name_or_path=str(model), output_dir=tmp_path / "in")),
    ]
    for command in commands:
        with pytest.raises(LoricaError, match="trust_remote_code"):
            command()
    assert not mark.exists()


@pytest.mark.reliability("S5")
def test_that_code_is_run_is_said(
    with_code: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, mark = with_code
    values = {"model_name_or_path": str(model), "train_file": rows_file(tmp_path), "output_dir": str(tmp_path / "out")}
    Update(build_config(values | {"trust_remote_code": True}))
    assert mark.exists()
    assert capsys.readouterr().err.count(f"notice: Python code that comes with {model} is run (trust_remote_code)") == 1


# --- kernels ----------------------------------------------------------------------------------------------------------

KERNELS = [
    "kernels-community/flash-attn2", "kernels-community/flash-attn2@main", "kernels-community/flash-attn2@v1",
    f"somebody/flash-attn2@{COMMIT}", "somebody/flash-attn2", f"kernels-community/../evil/x@{COMMIT}",
    "paged|somebody/kernel", f"evil/kernels-community/x@{COMMIT}",
]  # fmt: skip


@pytest.mark.reliability("S19")
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_of_the_hub_is_refused_without_its_commit_and_from_others(
    name: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention", lambda *args, **_: asked.append(args)
    )
    message = r"--attn_implementation .*kernels-community/NAME@COMMIT"
    with pytest.raises(LoricaError, match=message):
        update(llama_folder, tmp_path / "out", rows_file(tmp_path), attn_implementation=name)
    config = {"model_name_or_path": str(llama_folder), "train_file": rows_file(tmp_path), "attn_implementation": name}
    with pytest.raises(LoricaError, match=message):
        forecast(config, machine=unmeasured_machine("cpu"))
    assert asked == []


@pytest.mark.reliability("S19")
@pytest.mark.parametrize("name", KERNELS[:5])
def test_a_model_s_configuration_cannot_ask_for_one_either(name: str, llama_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_implementation": name}))
    with pytest.raises(LoricaError, match=r"its configuration's attention .*code that would run here"):
        read_model_config(str(model))
    part = Gemma3Config(attn_implementation={"text_config": name})
    with pytest.raises(LoricaError, match=r"its configuration's attention .*code that would run here"):
        refuse_kernels_of(part, "m")


@pytest.mark.reliability("S19")
@pytest.mark.parametrize("name", [None, "sdpa", "eager", f"kernels-community/flash-attn2@{COMMIT}", {"": "sdpa"}])
def test_what_is_installed_or_pinned_is_taken(name: Any) -> None:
    refuse_hub_kernels(name, "--attn_implementation")


@pytest.mark.reliability("S19")
def test_flash_attention_that_is_not_installed_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.training.trust.import_utils.is_kernels_available", lambda: True)
    with pytest.raises(LoricaError, match="would fetch a kernel from the hub instead"):
        refuse_hub_kernels("flash_attention_2", "--attn_implementation")


@pytest.mark.reliability("S19")
@pytest.mark.parametrize("option", ["use_kernels", "kernel_config", "allow_all_kernels"])
def test_options_that_would_fetch_kernels_are_not_there(option: str) -> None:
    with pytest.raises(LoricaError, match=f"unknown option --{option}"):
        check_arguments({option: True})


# --- uploads ----------------------------------------------------------------------------------------------------------


@pytest.mark.reliability("S14")
@pytest.mark.parametrize("option", ["push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"])
def test_nothing_is_uploaded_and_the_message_says_how_to(option: str) -> None:
    with pytest.raises(LoricaError, match=rf"--{option} is not taken: .*hf upload .* --private --include .* --exclude"):
        check_arguments({option: "x"})


@pytest.mark.reliability("S14")
def test_the_trainer_is_told_to_upload_nothing() -> None:
    arguments = training_arguments({"push_to_hub": "false"}, "out", hidden_size=64, seq2seq=False)
    assert (arguments.push_to_hub, arguments.hub_token, arguments.report_to) == (False, None, [])


@pytest.mark.reliability("S5", "S11")
def test_a_tokenizer_comes_from_the_same_commit(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "lorica.training.models.AutoTokenizer.from_pretrained", lambda name, **options: asked.append(options)
    )
    options = InspectOptions(model_name_or_path=NAME, output_dir="x")
    read_tokenizer(NAME, revision=pinned(options).model_revision)
    assert asked == [{"revision": COMMIT, "trust_remote_code": False}]
