"""Ask what is known against the packages of requirements.lock, and write their bill of materials, sbom.json.

    python scripts/audit.py path/to/pip-audit

`make audit` gives it pip-audit in an environment of its own. Exit status 1: something is known; 2: no answer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK, BILL = ROOT / "requirements.lock", ROOT / "sbom.json"
LINE = re.compile(r"([\w.-]+)==([\w.!-]+)(\+\w+)? --hash=sha256:([0-9a-f]{64})")
FOUND, NO_ANSWER = 1, 2


def components(lock: str) -> list[dict[str, Any]]:
    """Return the packages of a lock as CycloneDX has them. The build of a version (+cpu) is left out of its name."""
    return [
        {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{version}",
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for name, version, _, digest in LINE.findall(lock)
    ]


def bill(packages: list[dict[str, Any]]) -> str:
    """Return a CycloneDX bill of materials."""
    head = {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
    }
    return json.dumps(head | {"version": 1, "components": packages}, indent=1) + "\n"


def answers(auditor: str, packages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what pip-audit says of each package."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "requirements.txt"
        asked.write_text("".join(f"{one['name']}=={one['version']}\n" for one in packages))
        words = ["--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json", "--requirement"]
        done = subprocess.run([auditor, *words, str(asked)], capture_output=True, text=True, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        sys.exit(f"make audit: pip-audit gave no answer, which takes the network:\n{done.stderr.strip()}")
    return found


def verdict(found: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Return the exit status and what to say. A package that the database does not know counts as no answer."""
    known = [f"{one['name']} {one['version']}: {flaw['id']}" for one in found for flaw in one.get("vulns", [])]
    unknown = [one["name"] for one in found if "skip_reason" in one]
    if known:
        return FOUND, known
    if unknown or not found:
        told = f"{len(unknown)} of {len(found)} packages, such as {unknown[0]}" if unknown else "any package"
        return NO_ANSWER, [f"make audit: no answer about {told}; it takes the network, and the index of PyPI itself"]
    return 0, [f"nothing is known against the {len(found)} packages of {LOCK.name}"]


if __name__ == "__main__":
    locked = components(LOCK.read_text(encoding="utf-8"))
    BILL.write_text(bill(locked), encoding="utf-8")
    print(f"bill of materials: {BILL}", flush=True)
    status, lines = verdict(answers(sys.argv[1], locked))
    print("\n".join(lines), file=sys.stderr if status else sys.stdout)
    sys.exit(status)
