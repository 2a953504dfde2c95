"""Which test shows which row of the scorecard to hold: read from the marks in the source, so that nothing is run."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MARK = "pytest.mark.reliability"


def marked() -> dict[str, list[str]]:
    """Return the tests of every row, as ``folder/file.py::name``, sorted."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(TESTS.rglob("test_*.py")):
        for name, rows in _marked_in(file):
            for row in rows:
                found[row].append(f"{file.relative_to(TESTS.parent).as_posix()}::{name}")
    return {row: sorted(tests) for row, tests in found.items()}


def _marked_in(file: Path) -> Iterator[tuple[str, list[str]]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == MARK:
                    yield node.name, [str(ast.literal_eval(argument)) for argument in decorator.args]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            for call in ast.walk(node.value):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == MARK:
                    yield "(all)", [str(ast.literal_eval(argument)) for argument in call.args]
