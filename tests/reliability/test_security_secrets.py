"""Tokens and passwords are in no file, line, record, report or message, wherever they came in."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica import cli
from lorica.artefacts.apply import apply_updates
from lorica.artefacts.export import export_update
from lorica.errors import Interrupted, LoricaError
from lorica.evaluation.endpoint import EndpointJudge
from lorica.record import environment
from lorica.redaction import HIDDEN, redacted
from lorica.training.arguments import check_arguments
from tests.reliability.small_runs import files_in, rows_file, stream_of, update
from tests.training.conftest import llama_folder  # noqa: F401

SECRETS = {
    "hugging face": ("hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh", "{}"),
    "open ai": ("sk-proj-Ab12Cd34Ef56Gh78Ij90", "{}"),
    "anthropic": ("sk-ant-api03-Ab12Cd34_Ef56-Gh78Ij90", "{}"),
    "github": ("ghp_AbCdEfGh12345678IjKlMnOpQrStUvWx", "{}"),
    "github, fine": ("github_pat_11ABCDEFG0aBcDeFgHiJkL_mNoPq", "{}"),
    "gitlab": ("glpat-AbCd1234EfGh5678IjKl", "{}"),
    "aws": ("AKIAIOSFODNN7EXAMPLE", "{}"),
    "google": ("AIzaSyAbCdEfGhIjKlMnOpQrStUvWxYz0123456", "{}"),
    "slack": ("xoxb-123456789012-abcdefABCDEF", "{}"),
    "json web token": ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmN", "{}"),
    "password": ("pw-5ecret", "https://user:{}@host/path"),
    "password with signs": ("p@ss:w0rd!", "ssh://user:{}@host:22/path"),
    "bearer": ("Zm9vYmFyYmF6cXV4MTIz", "Authorization: Bearer {}"),
    "bearer of letters": ("abcdefghijklmnopqrstuvwxyz", "bearer {}"),
    "assigned": ("s3cr3t/val+ue==", "AWS_SECRET_ACCESS_KEY={}"),
    "written out": ("hunter2hunter2", "password: {}"),
    "json": ("hunter2hunter2", '"api_key": "{}"'),
    "option": ("hunter2hunter2", "--wandb_api_key {}"),
    "query": ("hunter2hunter2", "https://host/file?X-Amz-Signature={}&part=1"),
    "token in a query": ("hunter2hunter2", "https://host/file?token={}"),
}
"""What is secret, and how it is written."""

every_secret = pytest.mark.parametrize(("secret", "written"), SECRETS.values(), ids=SECRETS.keys())


@every_secret
@pytest.mark.reliability("S12")
def test_a_secret_is_hidden_wherever_it_stands(secret: str, written: str) -> None:
    text = written.format(secret)
    for whole in (text, f"before {text} after", f"({text})", f"{text}\n{text}"):
        assert secret not in redacted(whole)
        assert redacted(redacted(whole)) == redacted(whole)
    nested = redacted({"a": [{"b": (text, 1)}], text: None})
    assert secret not in json.dumps(nested)
    assert secret not in str(LoricaError(f"cannot read {text}: no such file"))


@pytest.mark.reliability("S12")
def test_what_is_under_the_name_of_a_secret_is_hidden_as_a_whole() -> None:
    names = ("hub_token", "api_key", "judge_api_key", "password", "AWS_SECRET_ACCESS_KEY", "client_secret", "token")
    assert redacted(dict.fromkeys(names, "plain words")) == dict.fromkeys(names, HIDDEN)
    assert redacted(dict.fromkeys(names)) == dict.fromkeys(names)


KEPT = {
    "num_tokens": 5, "trained_tokens": 12, "max_new_tokens": 256, "pad_token": "<pad>", "eos_token_id": 1,
    "include_num_input_tokens_seen": "no", "judge_api_key_env": "OPENAI_API_KEY", "model": "owner/sketch-7b-v2",
    "notice": "12 tokens were cut; the token at 3 is unknown", "url": "https://host:8080/v1/chat?model=a&limit=3",
    "revision": "0123456789abcdef0123456789abcdef01234567", "sha256": "ab" * 32,
    "path": "/hf_checkpoints/sk-learn-models/risk-averse.jsonl",
    "mail": "someone@example.org", "text": "bearer of good news", "region": "asia pacific economics",
    "variable": "HF_HUB_DISABLE_TELEMETRY=1", "message": "--hub_token is not taken", "other": "--password in a file",
}  # fmt: skip


@pytest.mark.reliability("S12")
def test_what_is_no_secret_stays() -> None:
    assert redacted(KEPT) == KEPT
    for value in KEPT.values():
        assert redacted(f"before {value} after") == f"before {value} after"


@given(st.text(max_size=200) | st.text("hf_sk-:/@ =&abc123", max_size=60))
def test_hiding_twice_hides_no_more(text: str) -> None:
    assert redacted(redacted(text)) == redacted(text)


# --- whole commands ---------------------------------------------------------------------------------------------------

IN_NAMES = ("hf_ModelModelModelModelModelModelMode", "sk-data12345678data", "ghp_TaskTaskTask12345678")
IN_SETTINGS = ("https://user:pw-5ecret@host/x", "Bearer Zm9vYmFyYmF6cXV4MTIz", "AKIAIOSFODNN7EXAMPLE")
IN_ENVIRONMENT = "hf_EnvironmentEnvironmentEnvironme"
INJECTED = (*IN_NAMES, "pw-5ecret", "Zm9vYmFyYmF6cXV4MTIz", "AKIAIOSFODNN7EXAMPLE", IN_ENVIRONMENT)


@pytest.fixture
def lorica(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command as a process would and return its exit status and all that it printed."""
    monkeypatch.setenv("HF_TOKEN", IN_ENVIRONMENT)
    monkeypatch.setenv("WANDB_API_KEY", IN_ENVIRONMENT)

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lorica", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return call


def clean(told: str, *folders: Path) -> None:
    for secret in INJECTED:
        assert secret not in told, f"{secret} was printed"
        for file in (file for folder in folders for file in files_in(folder)):
            assert secret.encode() not in file.read_bytes(), f"{secret} is in {file}"


@pytest.fixture
def secret_model(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / IN_NAMES[0] / "model"))


@pytest.mark.reliability("S3", "S12")
def test_an_update_leaves_no_secret_anywhere(
    lorica: Callable[..., tuple[int, str]], secret_model: Path, tmp_path: Path
) -> None:
    rows = rows_file(tmp_path / IN_NAMES[1])
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"run_name": IN_SETTINGS[0], "project": IN_SETTINGS[2], "train_also": []}))
    status, told = lorica(
        "train", "--config", config, "--model_name_or_path", secret_model, "--train_file", rows, "--eval_file", rows,
        "--retention_file", rows, "--output_dir", tmp_path / "out", "--max_steps", 2, "--save_steps", 1,
        "--per_device_train_batch_size", 4,
    )  # fmt: skip
    assert status == 0, told
    clean(told, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "lorica.json").read_text())
    assert HIDDEN in record["model"]
    assert HIDDEN in record["command"]
    assert record["training_arguments"]["run_name"] == f"https://{HIDDEN}@host/x"
    assert record["data"]["train"]["tokens"] > 0
    said: list[str] = []
    update(secret_model, tmp_path / "plain", rows, max_steps=3)
    export_update(str(secret_model), str(tmp_path / "plain"), str(tmp_path / "update"), say=said.append)
    moved = Path(shutil.copytree(tmp_path / "update", tmp_path / IN_NAMES[2]))
    apply_updates(str(secret_model), [str(moved)], str(tmp_path / "again"), say=said.append)
    clean("\n".join(said), tmp_path / "update", tmp_path / "again")
    assert lorica("report", tmp_path / "out", "--output_dir", tmp_path / "report")[0] == 0
    clean("", tmp_path / "report")


@pytest.mark.reliability("S12")
def test_a_run_leaves_no_secret_anywhere(
    lorica: Callable[..., tuple[int, str]], secret_model: Path, tmp_path: Path
) -> None:
    methods = {"seqft": {"method": "seqft", "learning_rate": 1e-2, "training": {"project": IN_NAMES[2]}}}
    stream_of(tmp_path / IN_NAMES[1], ("one",), description=IN_SETTINGS[0], methods=methods)
    status, told = lorica(
        "run", tmp_path / IN_NAMES[1] / "stream.yaml", "--methods", "seqft", "--model_name_or_path", secret_model,
        "--output_dir", tmp_path / "runs", "--run_name", IN_SETTINGS[1], "--save_models",
    )  # fmt: skip
    assert status == 0, told
    clean(told, tmp_path / "runs")


@pytest.mark.reliability("S12")
def test_an_evaluation_and_an_inspection_leave_no_secret_anywhere(
    lorica: Callable[..., tuple[int, str]], secret_model: Path, tmp_path: Path
) -> None:
    rows = rows_file(tmp_path / IN_NAMES[1], count=3)
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "scores.json"
    words = ("--tasks", rows, "--max_new_tokens", 1, "--output_file", output)
    status, told = lorica("eval", secret_model, *words)
    assert status == 0, told
    clean(told, tmp_path / "out")
    status, told = lorica("inspect", secret_model, "--output_dir", tmp_path / "in", "--calibration_file", rows)
    assert status == 0, told
    clean(told, tmp_path / "in")


@every_secret
@pytest.mark.reliability("S12")
def test_a_mistake_is_told_without_the_secret(
    secret: str, written: str, lorica: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    text = written.format(secret)
    status, told = lorica(
        "train", "--model_name_or_path", f"./{text}", "--train_file", "x.jsonl", "--output_dir", tmp_path / "out"
    )
    assert status == 2
    assert secret not in told


@pytest.mark.reliability("S12")
@pytest.mark.parametrize("option", ["hub_token", "push_to_hub_token", "token", "api_key", "judge_api_key", "hf_token"])
def test_a_token_on_the_command_line_is_refused_and_not_repeated(
    option: str, lorica: Callable[..., tuple[int, str]], llama_folder: Path, tmp_path: Path
) -> None:
    words = (
        "--model_name_or_path",
        llama_folder,
        "--train_file",
        rows_file(tmp_path),
        "--output_dir",
        tmp_path / "out",
    )
    status, told = lorica("train", *words, f"--{option}", "plain-words-99")
    assert status == 2
    assert f"--{option}" in told
    assert "plain-words-99" not in told
    assert not (tmp_path / "out").exists()
    if option in ("hub_token", "push_to_hub_token", "token"):
        assert "HF_TOKEN" in told


@pytest.mark.reliability("S12")
def test_a_row_s_secret_is_not_in_the_message_of_its_mistake(
    lorica: Callable[..., tuple[int, str]], llama_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    bad = {"messages": [{"role": IN_NAMES[0], "content": "x"}, {"role": "assistant", "content": IN_NAMES[1]}]}
    rows.write_text(json.dumps(bad) + "\n" + json.dumps(bad).replace('"x"', IN_NAMES[2]) + "\n")
    status, told = lorica(
        "train", "--model_name_or_path", llama_folder, "--train_file", rows, "--output_dir", tmp_path / "out"
    )
    assert status == 2
    assert f"{rows}:1" in told
    clean(told)


@pytest.mark.reliability("S12")
def test_a_defect_s_traceback_is_told_without_the_secret(
    lorica: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError(f"no connection to https://user:pw-5ecret@host with {IN_NAMES[0]}")

    monkeypatch.setattr(cli, "app", fail)
    status, told = lorica("list")
    assert status == 1
    assert "RuntimeError: no connection to" in told
    clean(told)


@pytest.mark.reliability("S12")
def test_the_command_of_a_record_and_the_key_of_a_judge_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lorica", "train", "--x", IN_NAMES[0], "--wandb_api_key", "hunter2hunter2"])
    assert environment()["command"] == f"lorica train --x {HIDDEN} --wandb_api_key {HIDDEN}"
    monkeypatch.setenv("JUDGE_KEY", IN_ENVIRONMENT)
    judge = EndpointJudge("https://host/v1?key=hunter2hunter2", "m", api_key_env="JUDGE_KEY")
    told = json.dumps(judge.description) + repr(judge) + repr(vars(judge))
    assert IN_ENVIRONMENT not in told
    assert "hunter2" not in json.dumps(judge.description)
    with pytest.raises(LoricaError) as caught:
        EndpointJudge("https://user:pw-5ecret@host/v1", "m")
    assert "pw-5ecret" not in str(caught.value)


@pytest.mark.reliability("S12")
def test_a_wrong_value_is_told_without_the_secret() -> None:
    with pytest.raises(LoricaError) as caught:
        check_arguments({"learning_rate": IN_NAMES[0]})
    assert IN_NAMES[0] not in str(caught.value)
    assert "checkpoint" in str(Interrupted(15, "out/checkpoint-3"))
