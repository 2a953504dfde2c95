"""Write the scorecards of docs/reliability.md from tests/reliability/scorecard.yaml and the marks of the tests.

    python scripts/reliability_page.py

A row names every test that carries its mark, or says why no test can show it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.reliability.marks import marked  # noqa: E402

PAGE, ROWS = ROOT / "docs" / "reliability.md", ROOT / "tests" / "reliability" / "scorecard.yaml"
PEERS = ("trainer", "trl", "peft")


def page(text: str) -> str:
    """Return the page with both scorecards made anew."""
    tests = marked()
    for name, rows in scorecards().items():
        lines = ["| | must hold | Trainer | TRL | PEFT | Lorica | shown by |", "|---|---|---|---|---|---|---|"]
        lines += [_line(row, told, tests.get(row, [])) for row, told in rows.items()]
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: m[1] + "\n".join(lines) + "\n" + m[2],  # noqa: B023
                      text, flags=re.S)  # fmt: skip
    return text


def scorecards() -> dict[str, dict[str, Mapping[str, str]]]:
    """Return the rows of both scorecards, by name and id."""
    found: dict[str, dict[str, Mapping[str, str]]] = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    return found


def _line(row: str, told: Mapping[str, str], tests: Sequence[str]) -> str:
    ours = told.get("ours", "holds" if tests else "see right")
    shown = [*([told["answer"]] if "answer" in told else []), *_files(tests)]
    return f"| {row} | {told['must']} | {' | '.join(told[peer] for peer in PEERS)} | {ours} | {'; '.join(shown)} |"


def _files(tests: Sequence[str]) -> list[str]:
    """Return each file with how many of its tests carry the mark."""
    files = [test.partition("::")[0] for test in tests]
    return [f"[{Path(file).stem}](../{file}) ({files.count(file)})" for file in dict.fromkeys(files)]


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
