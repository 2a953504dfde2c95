"""Scripts that are called as from a command line, and runs that they start and that are not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from benchmarks.retention import compare

from lorica.json_file import sealed


def pretend_runs(monkeypatch: pytest.MonkeyPatch, outcome: Callable[[list[str]], dict[str, Any] | str]) -> None:
    """Let each run leave what ``outcome`` makes of its command: a record, or words with which it fails."""

    def run(command: list[str], **given: Any) -> SimpleNamespace:
        left = outcome(command)
        if isinstance(left, str):
            given["stdout"].write(left)
            return SimpleNamespace(returncode=1)
        file = Path(command[command.index("--output_dir") + 1]) / "run.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(sealed(left)))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", run)


def call(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *words: object) -> None:
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, words)])
    script.main()


def mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: ModuleType, *words: object
) -> str:
    """Return the one line with which a script ends."""
    with pytest.raises(SystemExit):
        call(monkeypatch, script, *words)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error
