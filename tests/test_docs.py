"""Every Python example of docs/usage.md runs as it is printed, on a tiny model of the same names."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import lorica
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
