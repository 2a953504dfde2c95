"""Write requirements.lock: every package of the tests with its version and the hashes of its files.

    python scripts/lock.py

pip is asked what it would install here, within constraints.txt, and nothing is installed. The lock is for the machine
that it is made on: its system, its Python, and the build of torch that pip finds (a CPU's, as long as the index of CPU
builds is among pip's).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEAD = """\
# Every package of the tests and the hash of its file, for {system}, Python {python}, a CPU. Made by scripts/lock.py
# from pyproject.toml and constraints.txt; `make locked` installs it, `make audit` asks what is known against it.
--extra-index-url https://download.pytorch.org/whl/cpu
"""


def resolved() -> list[dict[str, Any]]:
    """Return what pip would install for the tests, with the hash of each file."""
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "-c", "constraints.txt"]
    wanted = [".[dev]", "hatchling"]  # which builds Lorica itself
    done = subprocess.run([sys.executable, "-m", "pip", *words, *wanted], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    return [one for one in found if one["metadata"]["name"] != "lorica"]


def lock(packages: list[dict[str, Any]]) -> str:
    """Return the text of the lock."""
    lines = []
    for one in packages:
        name, version = one["metadata"]["name"], one["metadata"]["version"]
        digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
    python = ".".join(platform.python_version_tuple()[:2])
    head = HEAD.format(system=f"{platform.system()} {platform.machine()}", python=python)
    return head + "".join(sorted(lines, key=str.lower))


if __name__ == "__main__":
    LOCK.write_text(lock(resolved()), encoding="utf-8")
    print(LOCK)
