"""The command line: help without torch, and one line and exit status 2 for every mistake, nothing written."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorica
from lorica import cli
from lorica.commands.options import normalised
from lorica.config import UpdateConfig
from tests.training.conftest import llama_folder, rows  # noqa: F401

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; return its status, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorica", *words])
        status: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return int(status or 0) if isinstance(status, int) or status is None else 1, captured.out, captured.err

    return run


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "sys.argv = ['lorica', 'train', '--help']\n"
        "from lorica.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    for name in ("--model_name_or_path", "--unfreeze_rank_ratio", "--retention_file", "TrainingArguments"):
        assert name in done.stdout


MISTAKES: list[tuple[list[str], str]] = [
    (["--train_file", "{rows}", "--model_name_or_path", "./no/such/model"], r"no such folder"),
    (["--train_file", "{tmp}/nothing.jsonl"], r"nothing\.jsonl: no such file"),
    ([], r"give what to learn: --train_file"),
    (["--train_file", "{empty}"], r"empty\.jsonl: no rows"),
    (["--train_file", "{broken}"], r"broken\.jsonl:2: malformed JSON"),
    (["--train_file", "{incomplete}"], r"incomplete\.jsonl: no known format matches\. Columns found: prompt"),
    (["--train_file", "{rows}", "--lerning_rate", "1"], r"unknown option --lerning_rate\. Did you mean 'learning_r"),
    (["--train_file", "{rows}", "--learning_rate", "fast"], r"--learning_rate: .*'fast'"),
    (["--train_file", "{rows}", "stray"], r"'stray' is not an option"),
    (["--train_file", "{rows}", "--seed", "1", "--seed", "2"], r"--seed is given twice"),
    (["--train_file", "{rows}", "--target_modules", "qproj"], r"'qproj' matches no module.*Did you mean 'q_proj'"),
    (["--train_file", "{rows}", "--target_modules", "("], r"'\(' is no regular expression"),
    (["--train_file", "{rows}", "--rank_pattern", "nothing=0.5"], r"rank_pattern: 'nothing' matches none of the 14"),
    (["--train_file", "{rows}", "--rank_pattern", "q_proj"], r"expected PATTERN=AMOUNT"),
    (["--train_file", "{rows}", "--unfreeze_rank_ratio", "1.5"], r"--unfreeze_rank_ratio: .*'1\.5'"),
    (["--train_file", "{rows}", "--effective_rank", "40"], r"effective_rank = 40 is out of range for .*k_proj"),
    (["--train_file", "{rows}", "--ranks", "unifrom"], r"--ranks: Input should be 'uniform'"),
    (["--train_file", "{rows}", "--method", "osftt"], r"unknown method 'osftt'.*Did you mean 'osft'"),
    (["--train_file", "{rows}", "--training", "x"], r"'training' holds names and values"),
    (["--train_file", "{rows}", "--eval_strategy", "epoch"], r"--eval_strategy needs rows to score: give --eval_file"),
    (["--train_file", "{rows}", "--method", "seqft", "--ranks", "energy"], r"ranks has no effect with method 'seqft'"),
    (["--train_file", "{rows}", "--train_also", "nothing"], r"train_also: 'nothing' matches no parameter"),
    (["--train_file", "{rows}", "--source", "activation", "--constraint", "two-sided"], r"the inputs only"),
    (["--train_file", "{rows}", "--resume_from_checkpoint", "true"], r"holds no checkpoint"),
    (["--train_file", "{rows}", "--plan_file", "{tmp}/none.json"], r"none\.json: cannot read the plan"),
    (["--train_file", "{rows}", "--config", "{yaml}"], r"options\.yaml: unknown option --lr"),
    (["--train_file", "{rows}", "--output_dir", "{tmp}"], r"is not empty"),
    (["--train_file", "{rows}", "--output_dir", "{empty}/out"], r"--output_dir .*: .*empty\.jsonl is a file"),
    (["--train_file", "{rows}", "--learning_rate", "--bf16", "false"], r"--learning_rate needs a value"),
    (["--train_file", "{rows}", "--effective_rank", "most"], r"--effective_rank: expected a share such as 0\.5"),
    (["--train_file", "{rows}", "--dtype", "floaty"], r"--dtype floaty is no dtype"),
    (["--train_file", "{model}"], r"that is the folder of a model, not of rows"),
    (["--train_flie", "{rows}"], r"give what to learn: .*; 'train_flie' is no option\. Did you mean 'train_file'\?"),
    (["--train_file", "{rows}", "--preset=paper", "--remember_rows", "3"], r"remember_rows has no effect without"),
    (["--train_file", "{rows}", "--model_name_or_path", "{nan}"], r"self_attn\.q_proj.*holds NaN or inf"),
]  # fmt: skip


@pytest.mark.reliability("R26")
@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=lambda value: None if isinstance(value, list) else value[:40]
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: list[str],
    message: str,
    command: Run,
    llama_folder: Path,
    rows: Callable[..., str],
    tmp_path: Path,
) -> None:
    places = {"tmp": str(tmp_path), "rows": rows("new"), "nan": str(_with_nan(llama_folder, tmp_path / "nan"))}
    places["model"] = str(llama_folder)
    for name, text in {"empty": "", "broken": '{"text": "a"}\n{"text"\n', "incomplete": '{"prompt": "a"}\n'}.items():
        places[name] = str(tmp_path / f"{name}.jsonl")
        Path(places[name]).write_text(text)
    places["yaml"] = str(tmp_path / "options.yaml")
    Path(places["yaml"]).write_text("lr: 3\n")
    out = tmp_path / "out"
    given = [word.format(**places) if "{" in word else word for word in words]
    defaults = {"--model_name_or_path": str(llama_folder), "--output_dir": str(out)}
    given += [word for pair in defaults.items() if pair[0] not in given for word in pair]
    status, told, errors = command("train", *given)
    last = errors.strip().splitlines()
    assert status == 2, errors
    assert re.search(message, errors), errors
    assert "Traceback" not in errors
    (complaint,) = [line.removeprefix("lorica: ") for line in last if line.startswith("lorica: ")]
    assert "not forecast" not in told, "it is told once"
    assert complaint not in told
    assert not out.exists()


def _with_nan(folder: Path, target: Path) -> Path:
    if not target.exists():
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        state = load_file(folder / "model.safetensors")
        state["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_audit_of_two_checkpoints(command: Run, llama_folder: Path, tmp_path: Path) -> None:
    state = load_file(llama_folder / "model.safetensors")
    moved = {key: value + 1e-3 * torch.randn_like(value) for key, value in state.items()}
    save_file(moved, tmp_path / "moved.safetensors")
    status, out, _ = command(
        "audit", str(llama_folder), str(tmp_path / "moved.safetensors"), "--json", str(tmp_path / "a.json")
    )
    assert status == 1, "an unconstrained change leaks"
    assert "14 of 14 weights leak" in out
    assert "tensors outside the plan changed" in out
    assert (tmp_path / "a.json").exists()
    status, out, _ = command("audit", str(llama_folder), str(llama_folder))
    assert status == 0
    assert "nothing changed in 14 of 14 weights" in out


def test_list_names_what_there_is(command: Run) -> None:
    status, out, _ = command("list")
    assert status == 0
    for word in ("osft", "seqft", "two-sided", "importance", "llama", "gpt2", "t5"):
        assert word in out


def test_flags_take_true_and_false_as_training_arguments_do() -> None:
    words = ["train", "--skip_invalid_rows", "false", "--freeze_experts", "true", "--bf16", "true"]
    assert normalised(words, [UpdateConfig]) == [
        "train",
        "--no_skip_invalid_rows",
        "--freeze_experts",
        "--bf16",
        "true",
    ]


def test_command_line_wins_over_the_file(
    command: Run, llama_folder: Path, rows: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "options.yaml").write_text(
        f"model_name_or_path: {llama_folder}\ntrain_file: {rows('new')}\nmax_steps: 9\nunfreeze_rank_ratio: 0.5\n"
        f"output_dir: {tmp_path / 'out'}\ndisable_tqdm: true\npreset: paper\n"
    )
    status, out, errors = command("train", "--config", str(tmp_path / "options.yaml"), "--max_steps=2")
    assert status == 0, errors
    assert "uniform: 0.5 protected" in out
    assert (tmp_path / "out" / "lorica.json").read_text().count('"max_steps": "2"') == 1
    assert "Writing model shards" not in errors
    (tmp_path / "out" / "report.html").unlink()
    assert command("report", str(tmp_path / "out"))[:2] == (0, f"report: {tmp_path / 'out' / 'report.html'}\n")
    assert (tmp_path / "out" / "report.html").exists()


def test_the_version_is_told(command: Run) -> None:
    assert command("--version") == (0, f"lorica {lorica.__version__}\n", "")


def test_python_m_lorica_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "lorica", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"lorica {lorica.__version__}\n", "")


def test_audit_has_somewhere_to_write_before_it_begins(command: Run, llama_folder: Path, tmp_path: Path) -> None:
    status, out, errors = command("audit", str(llama_folder), str(llama_folder), "--json", str(tmp_path / "no" / "a"))
    assert (status, out) == (2, "")
    assert re.fullmatch(r"lorica: --json .*: there is no folder .*no\n", errors)
