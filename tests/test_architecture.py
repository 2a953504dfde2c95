"""The directions in which the rooms of the package may import each other, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lorica"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"config", "values", "json_file", "files", "registry", "errors", "scores", "bootstrap"}
BASE |= {"redaction", "yaml_file", "hub", "names", "signals", "units", "processes"}
ROOMS: dict[str, set[str]] = {
    "redaction": set(),
    "errors": {"redaction"},
    "yaml_file": {"errors"},
    "hub": {"errors"},
    "names": {"errors"},
    "units": set(),
    "processes": {"errors"},
    "signals": {"errors"},
    "scores": BASE,
    "bootstrap": BASE,
    "config": BASE,
    "values": BASE,
    "files": {"errors"},
    "registry": BASE,
    "subspace": BASE,
    "constrain": BASE | {"subspace"},
    "data": BASE,
    "benchmarks": BASE | {"data"},
    "evaluation": BASE | {"data"},
    "methods": BASE | {"subspace", "constrain", "data"},
    "training": BASE | {"subspace", "constrain", "data"},
    "analysis": BASE | {"subspace", "constrain", "data", "evaluation", "training", "report", "record"},
    "artefacts": BASE | {"subspace", "constrain", "record"},
    "forecast": BASE
    | {"subspace", "constrain", "data", "methods", "training", "record", "inputs", "lineage", "preset"},
    "preset": BASE | {"training"},
    "report": BASE,
}
"""What each room may import besides itself. Files that are not listed (the story and the commands) may import all."""

EXCEPTIONS = {("training", "lorica.methods.base"), ("training", "lorica.methods.task")}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@every_file
def test_imports_follow_the_directions(path: Path) -> None:
    here = room(path)
    if here not in ROOMS:
        return
    for name in imports(parse(path)):
        parts = name.split(".")
        if parts[0] != "lorica" or len(parts) == 1 or parts[1] == "__version__":
            continue
        allowed = parts[1] in ROOMS[here] | {here} or any(
            here == room and name.startswith(module) for room, module in EXCEPTIONS
        )
        assert allowed, f"{here} imports {name}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if room(p) in ("report", "scores", "bootstrap", "errors", "config")], ids=name_of
)
def test_tables_need_no_torch(path: Path) -> None:
    assert not [name for name in imports(parse(path)) if name.split(".")[0] in ("torch", "transformers", "datasets")]


@pytest.mark.parametrize("path", [p for p in FILES if room(p) == "methods"], ids=name_of)
def test_a_method_never_calls_backward_or_step(path: Path) -> None:
    for call in calls(parse(path)):
        if isinstance(call.func, ast.Attribute):
            owner = ast.unparse(call.func.value)
            assert call.func.attr != "backward", ast.unparse(call)
            assert not (call.func.attr == "step" and "optim" in owner.lower()), ast.unparse(call)


@every_file
def test_environment_and_state_are_left_alone(path: Path) -> None:
    changers = ("os.chdir", "sys.path.append", "sys.path.insert", "torch.set_default_dtype", "torch.set_num_threads")
    found = [ast.unparse(call.func) for call in calls(parse(path)) if ast.unparse(call.func) in changers]
    # A command is a process of its own and may choose its threads; a library function is a guest.
    assert found == (["torch.set_num_threads"] if name_of(path) == "commands/learn.py" else [])


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_lorica_prints_nothing_and_needs_no_torch() -> None:
    code = "import sys, lorica, lorica.errors, lorica.scores, lorica.report; assert 'torch' not in sys.modules"
    assert python(code) == ""


def test_every_public_name_can_be_reached() -> None:
    code = "import lorica; [getattr(lorica, n) for n in lorica.__all__]; assert set(lorica.__all__) <= set(dir(lorica))"
    assert python(code) == ""


def test_an_unknown_name_is_an_attribute_error() -> None:
    import lorica

    with pytest.raises(AttributeError, match="no attribute 'protekt'"):
        lorica.protekt  # noqa: B018
