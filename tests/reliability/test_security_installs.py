"""What is installed is pinned and hashed: the lock agrees with the constraints and leaves nothing out."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKED = re.compile(r"([\w.-]+)==([\w.+!-]+) --hash=sha256:[0-9a-f]{64}")


def locked() -> dict[str, str]:
    """Return the version of each package in the lock, every line of which names one with its hash."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = {}
    for line in lines:
        if not line.startswith(("#", "--extra-index-url https://download.pytorch.org/")):
            matched = LOCKED.fullmatch(line)
            assert matched is not None, line
            found[canonicalize_name(matched[1])] = matched[2]
    return found


def constraints() -> dict[str, str]:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    pairs = (line.split("==") for line in lines)
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.reliability("S18")
def test_every_package_of_the_lock_is_one_of_the_constraints() -> None:
    pinned = constraints()
    for name, version in locked().items():
        assert version.partition("+")[0] == pinned[name], name


@pytest.mark.reliability("S18")
def test_the_lock_holds_what_lorica_and_its_tests_need_and_all_that_these_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [*project["dependencies"], *project["optional-dependencies"]["dev"], "hatchling"]
    held, seen = locked(), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra, "python_version": "3.11"})
            for extra in ("", *requirement.extras)
        )
        if not applies or (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        assert name in held, f"{name} is not in requirements.lock: make lock"
        assert requirement.specifier.contains(held[name], prereleases=True), requirement
        try:
            needs = distribution(name).requires or []
        except ModuleNotFoundError:
            continue  # not of this machine
        for text in needs:
            needed = Requirement(text)
            extras = ("", *requirement.extras)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                needed.marker = None
                waiting.append(str(needed))


@pytest.mark.reliability("S18")
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_locked_installation_takes_nothing_without_its_hash() -> None:
    told = subprocess.run(["make", "-n", "locked"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, second = [line for line in told.splitlines() if "pip install" in line]
    assert "--require-hashes --no-deps -r requirements.lock" in first
    assert "--no-deps --no-build-isolation" in second


@pytest.mark.reliability("S18")
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_audit_says_what_is_wrong_where_there_is_no_network(tmp_path: Path) -> None:
    words = ["make", "audit", f"AUDIT={tmp_path / 'none'}", "PYTHON=false"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "make audit: pip-audit could not be installed" in done.stderr


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    return importlib.import_module("audit")


@pytest.mark.reliability("S18")
def test_the_audit_names_what_is_known_and_takes_no_silence_for_an_answer(audit: Any) -> None:
    clean = {"name": "one", "version": "1.0", "vulns": []}
    unknown = {"name": "two", "skip_reason": "not found"}
    flawed = {"name": "three", "version": "3.0", "vulns": [{"id": "PYSEC-1"}]}
    assert audit.verdict([clean])[0] == 0
    assert "no answer about 1 of 2 packages, such as two" in audit.verdict([clean, unknown])[1][0]
    assert audit.verdict([clean, unknown, flawed]) == (1, ["three 3.0: PYSEC-1"])
    assert audit.verdict([])[0] == 2


@pytest.mark.reliability("S18")
def test_the_bill_of_materials_holds_every_package_of_the_lock(audit: Any) -> None:
    packages = audit.components((ROOT / "requirements.lock").read_text())
    assert {canonicalize_name(one["name"]) for one in packages} == locked().keys()
    bill = json.loads(audit.bill(packages))
    assert bill["bomFormat"] == "CycloneDX"
    torch = next(one for one in bill["components"] if one["name"] == "torch")
    assert torch["purl"] == f"pkg:pypi/torch@{constraints()['torch']}"
