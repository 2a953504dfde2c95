"""Put the measured speed and memory into docs/speed.md and the README and draw the charts, from the kept results alone.

    python scripts/speed_page.py

reads ``docs/results/speed/*.json`` (written by the scripts of benchmarks/, see ``make bench``), puts tables between
the marks of both pages, such as ``<!-- steps -->`` and ``<!-- end -->``, and draws ``docs/speed-*.svg``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from speed_charts import charts
from speed_results import Results, read
from speed_sources import source_blocks
from speed_tables import blocks

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "docs" / "results" / "speed", ROOT / "docs"
PAGES = (DOCS / "speed.md", ROOT / "README.md")


def files(results: Results) -> dict[Path, str]:
    """Return every file that is made of the results, with what is to be in it."""
    parts = blocks(results) | source_blocks(results)
    pages = {path: filled(path.read_text(encoding="utf-8"), parts) for path in PAGES}
    return pages | {DOCS / name: picture for name, picture in charts(results).items()}


def filled(page: str, parts: dict[str, str]) -> str:
    """Return a page with the parts between the marks of their names, as far as it has such marks."""
    for name, part in parts.items():
        mark, end = f"<!-- {name} -->\n", "<!-- end -->"
        pattern = rf"{re.escape(mark)}(?:.*?\n)??{re.escape(end)}"
        page = re.sub(pattern, (mark + part + "\n" + end).replace("\\", r"\\"), page, flags=re.S)
    return page


def main() -> None:
    for path, text in files(read(RESULTS)).items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
