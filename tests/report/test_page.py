"""The page as a whole: every section where its data is, nothing from outside, everything escaped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.report import write_report
from lorica.report.pareto import Spot, front, scatter
from lorica.report.svg import COLOURS, marker
from tests.report.conftest import run_record, train_record
from tests.report.test_chain import FIRST, REJECTED, SECOND
from tests.report.test_comparison import cell, cells
from tests.report.test_judgement import judge_record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "<script>alert(1)</script>\"'&{{ 7 * 7 }}|_*"

SWEEP = {"selected": 1e-4, "selected_by": "average_accuracy",
         "validation": {"0.0001": {"average_accuracy": 71.0}, "1e-05": {"average_accuracy": 60.0}}}  # fmt: skip
WHOLE = {**run_record(), "stream": "trace", "facts": {"stores": "bases"}, "sweep": SWEEP, "floors": {"colours": 30.0},
         "data": {"colours": {"train": {"kept": 5}}}, "worst_leakage": [1e-7]}  # fmt: skip

SECTIONS = {
    "The figures": "scores",
    "Learning and keeping": "scores",
    "What keeping costs in learning": "scores",
    "How each task fades": "scores",
    "Every score after every task": "",
    "What is held out, before and after": "retention",
    "Beside published figures": "stream",
    "The methods": "facts",
    "How the learning rates were chosen": "sweep",
    "What was protected": "plan",
    "Did the protection hold": "leakage",
    "What it cost": "cost",
    "The rows": "data",
}
"""The sections of a comparison by the field without which they are not there; scores and costs can be nulls."""


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def markdown(records: list[dict[str, Any]], folder: Path) -> str:
    write_report(records, folder)
    return (folder / "report.md").read_text(encoding="utf-8")


def everything() -> list[dict[str, Any]]:
    return [*cells(), WHOLE, run_record("seqft"), train_record(), FIRST, SECOND, REJECTED, judge_record()]


def test_every_section_is_there_with_its_data(tmp_path: Path) -> None:
    assert set(SECTIONS) <= set(headings(markdown([WHOLE], tmp_path)))


@pytest.mark.parametrize(("section", "field"), [pair for pair in SECTIONS.items() if pair[1] not in ("", "scores")])
def test_a_section_without_its_data_is_not_there(section: str, field: str, tmp_path: Path) -> None:
    record = {key: value for key, value in WHOLE.items() if key not in (field, "worst_leakage", "carried_bytes")}
    record |= {"stream": "of my own"} if field == "stream" else {}
    found = headings(markdown([record], tmp_path))
    assert section not in found
    assert "The figures" in found


def test_the_page_is_whole_in_itself(tmp_path: Path) -> None:
    page = write_report(everything(), tmp_path).read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href|action|srcset)\s*=\s*["\'](?!#)', page)
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert "<link" not in page
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    for tag in ("div", "section", "article", "figure", "details", "table", "svg", "dl", "nav", "aside"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower().replace("finance", "")


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_report(everything(), tmp_path / name).read_bytes() for name in "ab")
    assert first == second
    assert (tmp_path / "a" / "report.md").read_bytes() == (tmp_path / "b" / "report.md").read_bytes()


@pytest.mark.reliability("S8")
def test_names_from_records_are_escaped(tmp_path: Path) -> None:
    record = cell(
        "osft", "1", 0, (80, 90, 60), label=NASTY, name=NASTY, stream=NASTY, model=NASTY, command=NASTY,
        tasks=[NASTY, NASTY + "2"], retention={NASTY: [90.0, 80.0, 70.0]}, left_out=[NASTY], floors={NASTY: 20.0},
        beside={NASTY: {NASTY: [1.0, 2.0, 3.0]}}, facts={"stores": NASTY}, metric_names={NASTY: NASTY},
        data={NASTY: {"train": {"kept": 3, "truncated": 1, "notices": [NASTY]}}},
        config={"settings": {"options": {NASTY: NASTY}}}, versions={NASTY: NASTY},
    )  # fmt: skip
    chain = [FIRST | {"data": {"train": {"path": NASTY}}}, SECOND | {"rejected": {}, "command": NASTY}]
    judged = judge_record(before=NASTY, after=NASTY, judge={"prompt": NASTY}, ties={NASTY: 1})
    page = write_report([record, *chain, judged], tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "49" not in re.findall(r"<h1>.*?</h1>", page)[0]
    assert "&lt;script&gt;" in page
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    outside_code = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "\\<script\\>" in outside_code
    assert not re.search(r"(?<!\\)<script", outside_code)


def test_many_methods_and_tasks_have_marks_and_names_of_their_own(tmp_path: Path) -> None:
    assert len({str(marker(index, 0, 0)) for index in range(4 * COLOURS)}) == 4 * COLOURS
    tasks = [f"task {j}" for j in range(15)]
    scores = [[float(5 * (i > j) + 40 + i) for j in range(15)] for i in range(16)]
    records = [
        {"schema": 1, "kind": "run", "stream": "long", "method": f"method-{m}", "seed": 0, "tasks": tasks,
         "scores": scores, "retention": {"atlas": [float(90 - m)] * 16}}
        for m in range(17)
    ]  # fmt: skip
    page = write_report(records, tmp_path).read_text(encoding="utf-8")
    assert "11 more" in page
    assert 'class="card' not in page
    for m in range(17):
        assert page.count(f"method-{m}</text>") >= 4


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(-50, 50)), min_size=1, max_size=20))
def test_the_front_holds_exactly_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    spots = [Spot(f"m{i}", i, x, y) for i, (x, y) in enumerate(points)]
    best = {(one.x, one.y) for one in front(spots)}
    for x, y in points:
        beaten = any((a > x and b >= y) or (a >= x and b > y) for a, b in points)
        assert ((x, y) in best) != beaten
    assert scatter(spots, title="t", description="d", x_title="x", y_title="y").count('class="mark') == len(points)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_a_browser_shows_it_without_errors_or_requests(tmp_path: Path) -> None:
    page = write_report(everything(), tmp_path)
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "What was learned?" in done.stdout
    assert "CONSOLE" not in done.stderr
    # What the browser wants of its maker is not the page's doing, and goes nowhere.
    requested = re.findall(r'"url":"((?:https?|file|data):[^"]*)"', log.read_text(encoding="utf-8"))
    assert [url for url in requested if url.startswith("http") and "google" not in url] == []


def test_records_of_every_kind_share_a_page(tmp_path: Path) -> None:
    layer = run_record()["plan"][0] | {"spectrum": {"index": [0, 1], "sigma": [2.0, 1.0]}, "effective_rank": 1.9}
    inspected = {"schema": 1, "kind": "inspect", "model": "looked-at", "layers": [layer]}
    for name, record in {"run": WHOLE, "lorica": train_record(), "judge": judge_record(), "inspect": inspected}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps(record))
    write_report([tmp_path], tmp_path)
    titles = re.findall(r"^# (.*)$", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert len(titles) == 4
    assert titles[-1].startswith("looked-at")
