"""Every Python example of docs/usage.md runs as it is printed, on a tiny model of the same names."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

import lorica
from lorica.cli import app
from lorica.data.stream import read_stream
from lorica.evaluation.metrics import METRICS
from lorica.methods import METHODS
from lorica.training.arguments import known_arguments
from tests.training.conftest import llama_folder, rows  # noqa: F401

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"### ([^\n]*)\n+(?:[^`#]*)```python\n(.*?)```", (ROOT / "docs" / "usage.md").read_text(), re.S)


def test_the_examples_are_found() -> None:
    titles = [title for title, _ in EXAMPLES]
    assert any("Trainer" in title for title in titles)
    assert any("TRL" in title for title in titles)
    assert any("loop" in title for title in titles)


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example_runs(
    title: str,
    code: str,
    llama_folder: Path,
    rows: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "trl" in code:
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        pytest.importorskip("trl")
    assert len(code.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama_folder, "my-model")
    os.replace(rows("new"), "new.jsonl")  # noqa: PTH105
    exec(compile(code, title, "exec"), {"__name__": "__main__"})
    if "updated" in code:
        report = lorica.audit("my-model", "updated")
        assert report.holds, report.table()
        assert min(row.relative_change for row in report.rows) > 0


def test_public_names_exist_and_are_documented() -> None:
    for name in lorica.__all__:
        assert getattr(lorica, name).__doc__, name


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = re.compile(r"^lorica ([a-z-]+)((?:.*\\\n)*.*)$", re.M)


def options_of(command: str) -> set[str]:
    declared = get_command(app).commands[command].params  # type: ignore[attr-defined]
    own = {option for parameter in declared for option in parameter.opts + parameter.secondary_opts}
    return own | ({f"--{name}" for name in known_arguments()} if command in ("train", "run") else set())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_printed_command_exists_with_its_options(page: Path) -> None:
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.S):
        for command, words in COMMANDS.findall(block):
            unknown = set(re.findall(r"(?<!\S)--[\w-]+", words.split(" #")[0])) - options_of(command)
            assert not unknown, f"lorica {command}: {unknown}"


def test_the_stream_of_the_docs_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(name: .*?)```", (ROOT / "docs" / "streams.md").read_text(), re.S)
    (tmp_path / "desk.yaml").write_text(example)
    stream = read_stream(tmp_path / "desk.yaml")
    assert [task.name for task in stream.tasks] == ["routing", "summaries"]
    for settings in stream.methods.values():
        METHODS[settings.method].build(settings.options)
    for scored in (*stream.tasks, *stream.held_out):
        assert scored.metric in METRICS
