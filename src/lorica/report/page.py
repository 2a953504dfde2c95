"""Write a report: one self-contained ``report.html`` and the same tables in ``report.md``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader
from jinja2.sandbox import SandboxedEnvironment

from lorica.errors import LoricaError
from lorica.report.compare import compare_part
from lorica.report.parts import Part, Section
from lorica.report.records import Record, RunRecord, TrainRecord, read_records
from lorica.report.svg import colour, marker
from lorica.report.tables import markdown
from lorica.report.update import update_part

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"


def write_report(runs: Iterable[Mapping[str, Any] | Path | str], output_dir: Path | str) -> Path:
    """Write ``report.html`` and ``report.md`` from run records alone.

    Runs of one stream and task order are compared in one part; every training record is a part of its own.
    The page needs no network and no other file. The same records give the same bytes.

    Args:
        runs: records, paths of ``run.json`` or ``lorica.json``, or output folders that hold them.
        output_dir: where to write; made if missing.

    Returns:
        The path of ``report.html``.

    Raises:
        LoricaError: no record, a record that cannot be read, or a folder that cannot be written.
    """
    parts = report_parts(read_records(runs))
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKDOWN_NAME).write_text(markdown_report(parts), encoding="utf-8")
        (folder / HTML_NAME).write_text(html_report(parts), encoding="utf-8")
    except OSError as error:
        raise LoricaError(f"{folder}: the report cannot be written there ({error.strerror})") from None
    return folder / HTML_NAME


def report_parts(records: Sequence[Record]) -> list[Part]:
    """Return the report as data: one part per stream, then one per training run."""
    streams: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        if isinstance(record, RunRecord):
            streams.setdefault((record.stream, *record.tasks), []).append(record)
    updates = [record for record in records if isinstance(record, TrainRecord)]
    return [*map(compare_part, streams.values()), *map(update_part, updates)]


def html_report(parts: Sequence[Part]) -> str:
    """Return the page. Everything that comes from a record is escaped."""
    environment = SandboxedEnvironment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja").render(parts=parts, colour=colour, mark=marker)


def markdown_report(parts: Sequence[Part]) -> str:
    """Return every sentence and table of the page as Markdown."""
    return "\n\n".join(block for part in parts for block in _part_blocks(part)) + "\n"


def _part_blocks(part: Part) -> list[str]:
    sections = [block for section in part.sections if section for block in _section_blocks(section)]
    return [f"# {markdown(part.title)}", markdown(part.sentence), *sections]


def _section_blocks(section: Section) -> list[str]:
    blocks = [f"## {section.heading}"]
    if section.intro:
        blocks.append(markdown(section.intro))
    for figure in section.figures:
        title = f"**{markdown(figure.entry.label)}.** " if figure.entry else ""
        blocks += [title + markdown(figure.caption), figure.table.markdown()]
    if section.table:
        blocks.append(section.table.markdown())
    for label, command in section.code:
        blocks += [markdown(label)] if label else []
        blocks.append("\n".join(f"    {line}" for line in command.splitlines()))
    return blocks
