"""Write a report: one self-contained ``report.html`` and the same tables in ``report.md``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader
from jinja2.sandbox import SandboxedEnvironment

from lorica.files import make_folder, write_text, writing
from lorica.report.chain import chains
from lorica.report.chain_part import chain_part
from lorica.report.compare import compare_part, comparisons
from lorica.report.inspection import inspection_part
from lorica.report.inspection_record import InspectionRecord
from lorica.report.judgement import judgement_part
from lorica.report.parts import Figure, Part, Section
from lorica.report.reading import Record, read_records
from lorica.report.records import JudgeRecord, RunRecord, TrainRecord
from lorica.report.svg import colour, marker
from lorica.report.tables import Table, markdown
from lorica.report.update import update_part

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"


def write_report(runs: Iterable[Mapping[str, Any] | Path | str], output_dir: Path | str) -> Path:
    """Write ``report.html`` and ``report.md`` from records alone.

    Runs of one stream on one model are compared in one part, in which orders and seeds are replicates of a method.
    Updates that go on from each other are one part, every other update, judgement and inspection one of its own.
    The page needs no network and no other file. The same records give the same bytes.

    Args:
        runs: records, paths of ``run.json``, ``lorica.json``, ``judge.json`` or ``inspect.json``, or folders that
            hold some of them, at any depth.
        output_dir: where to write; made if missing.

    Returns:
        The path of ``report.html``.

    Raises:
        LoricaError: no record, a record that cannot be read, or a folder that cannot be written (``CannotWrite``).
    """
    parts = report_parts(read_records(runs))
    folder = Path(output_dir)
    with writing(folder, f"{folder}: the report cannot be written there"):
        make_folder(folder)
        write_text(folder / MARKDOWN_NAME, markdown_report(parts))
        write_text(folder / HTML_NAME, html_report(parts))
    return folder / HTML_NAME


def report_parts(records: Sequence[Record]) -> list[Part]:
    """Return the report as data: comparisons, chains of updates, single updates, judgements, inspections."""
    linked, single = chains([record for record in records if isinstance(record, TrainRecord)])
    judged = [record for record in records if isinstance(record, JudgeRecord)]
    return [
        *map(compare_part, comparisons([record for record in records if isinstance(record, RunRecord)])),
        *map(chain_part, linked),
        *map(update_part, single),
        *([judgement_part(judged)] if judged else []),
        *(inspection_part(record) for record in records if isinstance(record, InspectionRecord)),
    ]


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
    answers = [f"**{markdown(question)}** {markdown(answer)}" for question, answer in part.answers]
    notices = ["\n".join(f"- notice: {markdown(notice)}" for notice in part.notices)] if part.notices else []
    sections = [block for section in part.sections if section for block in _section_blocks(section)]
    return [f"# {markdown(part.title)}", markdown(part.sentence), *answers, *notices, *sections]


def _section_blocks(section: Section) -> list[str]:
    blocks = [f"## {section.heading}"]
    if section.intro:
        blocks.append(markdown(section.intro))
    blocks += [block for figure in section.figures for block in _figure_blocks(figure)]
    if section.table:
        blocks.append(section.table.markdown())
    blocks += _folded(section.details)
    for label, command in section.code:
        blocks += [markdown(label)] if label else []
        blocks.append("\n".join(f"    {line}" for line in command.splitlines()))
    return blocks


def _figure_blocks(figure: Figure) -> list[str]:
    heading = figure.entry.label if figure.entry else figure.heading
    title = f"**{markdown(heading)}.** " if heading else ""
    return [title + markdown(figure.caption), figure.table.markdown(), *_folded(figure.details)]


def _folded(tables: Sequence[tuple[str, Table]]) -> list[str]:
    return [block for what, table in tables for block in (f"**{markdown(what)}**", table.markdown())]
