"""Two methods, two orders, two seeds: every figure of the comparison against means worked out by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.errors import LoricaError
from lorica.report import summary_text, write_report

Make = Callable[..., dict[str, Any]]

# (diagonal of the first and second task, the first task at the end), by order and seed
OURS = {("1", 0): (80, 90, 60), ("2", 0): (70, 92, 61), ("1", 1): (90, 90, 80), ("2", 1): (100, 80, 91)}
PLAIN = dict.fromkeys(OURS, (95, 95, 45))
ORDERS = {"1": ["a", "b"], "2": ["b", "a"]}


def cell(method: str, order: str, seed: int, scores: tuple[float, float, float], **changes: Any) -> dict[str, Any]:
    first, second, end = scores
    kept = 70.0 if method == "osft" else 30.0
    record = {
        "schema": 1, "kind": "run", "stream": "letters", "stream_version": 1, "order": order, "seed": seed,
        "method": method, "name": method, "label": method.upper(), "model": "tiny", "tasks": ORDERS[order],
        "scores": [[1.0, 2.0], [float(first), 2.0], [float(end), float(second)]],
        "retention": {"atlas": [90.0, 80.0, kept]}, "learning_rate": 1e-4 if method == "osft" else 3e-5,
        "facts": {"stores": "nothing", "needs_old_data": False, "needs_task_id": False},
        "carried_bytes": [1000, 2000], "cost": {"seconds_per_step": 0.3 if method == "osft" else 0.2, "steps": 10},
    }  # fmt: skip
    return record | changes


def cells() -> list[dict[str, Any]]:
    ours = [cell("osft", order, seed, scores) for (order, seed), scores in OURS.items()]
    return ours + [cell("seqft", order, seed, scores) for (order, seed), scores in PLAIN.items()]


def markdown(records: list[dict[str, Any]], folder: Path) -> str:
    write_report(records, folder)
    return (folder / "report.md").read_text(encoding="utf-8")


def row(text: str, section: str, label: str) -> list[str]:
    """Return the cells of a row of the last table of a section."""
    lines = text.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    found = [line for line in lines if line.startswith(f"| {label} |")]
    return [one.strip().replace("\\", "") for one in found[-1].strip("|").split("|")]


def test_the_figures_are_means_over_seeds_of_means_over_orders(tmp_path: Path) -> None:
    text = markdown(cells(), tmp_path)
    # learned: seed 0 (85 + 81) / 2 = 83, seed 1 (90 + 90) / 2 = 90; sd = 7 / sqrt 2
    # at the end: (75 + 76.5) / 2 = 75.75 and (85 + 85.5) / 2 = 85.25; t-interval 80.5 +- 12.706 * 9.5 / 2
    # backward transfer: (-20 - 9) / 2 = -14.5 and (-10 - 9) / 2 = -9.5
    half = 12.7062047 * 9.5 / 2
    assert row(text, "The figures", "OSFT") == [
        "OSFT", "86.5 ± 4.9", "80.5 ± 6.7", f"[{80.5 - half:.1f}, {80.5 + half:.1f}], seeds", "-12.0 ± 3.5",
        "12.0 ± 3.5", "+0.0 ± 0.0", "-20.0 ± 0.0", "4",
    ]  # fmt: skip
    assert row(text, "The figures", "SEQFT")[1:] == [
        "95.0 ± 0.0", "70.0 ± 0.0", "[70.0, 70.0], seeds", "-50.0 ± 0.0",
        "50.0 ± 0.0", "+0.0 ± 0.0", "-60.0 ± 0.0", "4",
    ]  # fmt: skip
    assert math.isclose(7 / math.sqrt(2), 4.9, abs_tol=0.05)
    assert math.isclose(9.5 / math.sqrt(2), 6.7, abs_tol=0.05)


def test_a_difference_over_seeds_has_the_paired_interval(tmp_path: Path) -> None:
    # per seed 75.75 - 70 and 85.25 - 70: mean 10.5, sd 9.5 / sqrt 2, so zero lies inside
    half = 12.7062047 * 9.5 / 2
    found = row(markdown(cells(), tmp_path), "Which differences are more than chance", "OSFT")
    assert found[-2:] == [f"+10.5, seeds [{10.5 - half:.1f}, {10.5 + half:.1f}]", "no"]


def test_single_tasks_are_means_over_all_runs(tmp_path: Path) -> None:
    text = markdown(cells(), tmp_path)
    # a: 60 and 80 at the end of order 1, 92 and 80 of order 2: seeds 76 and 80; b: 90, 90, 61, 91: 75.5 and 90.5
    assert row(text, "Each task at the end", "OSFT") == ["OSFT", "78.0 ± 2.8", "83.0 ± 10.6"]
    assert row(text, "Each task at the end", "before training") == ["before training", "1.5", "1.5"]


def test_curves_are_averaged_by_place(tmp_path: Path) -> None:
    text = markdown(cells(), tmp_path)
    section = text.split("## Learning and keeping")[1].split("## ")[0]
    # after one task (80 + 70) / 2 = 75 and (90 + 100) / 2 = 95; after two the averages at the end
    assert "| OSFT | 85.0 ± 14.1 | 80.5 ± 6.7 |" in section.split("Accuracy so far")[1]
    assert "| OSFT | 90.0 ± 0.0 | 80.0 ± 0.0 | 70.0 ± 0.0 |" in section


def test_matrices_are_means_over_the_seeds_of_the_first_order(tmp_path: Path) -> None:
    section = markdown(cells(), tmp_path).split("## Every score after every task")[1].split("## ")[0]
    assert "| 2 b | 70.0 | 90.0 |" in section, "mean of the seeds of order 1"
    assert "| seed 1 | 2 b | 80.0 | 90.0 |" in section
    assert "Each seed, order 2" in section


def test_what_was_learned_lost_and_kept_stands_first(tmp_path: Path) -> None:
    head = markdown(cells(), tmp_path).split("\n## ")[0]
    assert (
        "**What was learned?** A new task, right after learning it, mean over tasks: SEQFT 95.0 ± 0.0 %; OSFT" in head
    )
    assert "Earlier tasks by the end of the stream: OSFT -12.0 ± 3.5 points; SEQFT -50.0 ± 0.0 points." in head
    assert "What is held out (atlas): OSFT -20.0 ± 0.0 points; SEQFT -60.0 ± 0.0 points." in head
    assert "OSFT ends above SEQFT by +10.5" in head
    assert "which may be chance" in head


def test_costs_are_beside_those_of_plain_fine_tuning(tmp_path: Path) -> None:
    assert row(markdown(cells(), tmp_path), "What it cost", "OSFT") == ["OSFT", "10", "300 ms", "1.50"]


def test_the_table_for_the_terminal_holds_the_same_figures() -> None:
    lines = summary_text(cells()).splitlines()
    assert lines[0].split() == (
        "method learned at the end backward transfer forgetting held out, change learning rate carried old data "
        "task id runs"
    ).split()  # fmt: skip
    assert lines[1].split()[:7] == ["OSFT", "86.5", "±", "4.9", "80.5", "±", "6.7"]
    assert lines[1].split()[-6:] == ["1.0e-04", "2.0", "kB", "no", "no", "4"]
    assert (
        lines[-1]
        == "Percent and points, mean ± standard deviation over 2 seeds, each seed the mean of 2 orders of the tasks."
    )


def test_the_order_of_the_records_changes_nothing_but_their_own(tmp_path: Path) -> None:
    shuffled = cells()
    random.Random(0).shuffle(shuffled)
    first = sorted(summary_text(cells()).splitlines())
    assert sorted(summary_text(shuffled).splitlines()) == first
    assert markdown(cells(), tmp_path / "a") == markdown(cells(), tmp_path / "b")


def test_what_is_no_number_in_memory_is_not_measured() -> None:
    record = cell("osft", "1", 0, (80, 90, 60), retention={"atlas": [90.0, math.nan, math.nan]})
    assert "held out" not in summary_text([record])
    record["scores"] = [[1.0, 2.0], [math.nan, 2.0], [60.0, 90.0]]
    assert summary_text([record]).splitlines()[1].split()[:3] == ["OSFT", "75.0", "1.0e-04"]


def test_one_missing_run_takes_its_seed_out(tmp_path: Path) -> None:
    records = [record for record in cells() if (record["method"], record["order"], record["seed"]) != ("osft", "2", 1)]
    text = markdown(records, tmp_path)
    assert row(text, "The figures", "OSFT")[1:3] == ["83.0", "75.8"], "seed 0 alone: 83 and 75.75"
    assert "OSFT: 1 of its seeds did not run in every order and do not count." in text
    assert "Not every method ran the same seeds. OSFT: 0; SEQFT: 0, 1." in text


def test_one_unmeasured_run_leaves_no_mean(tmp_path: Path) -> None:
    records = cells()
    records[3]["scores"][2][0] = None
    text = markdown(records, tmp_path)
    assert row(text, "The figures", "OSFT")[2] == "-"


def test_the_same_run_twice_is_not_two_seeds(tmp_path: Path) -> None:
    text = markdown([cell("osft", "1", 0, (80, 90, 60)), cell("osft", "1", 0, (90, 90, 80))], tmp_path)
    assert row(text, "The figures", "OSFT")[1] == "85.0"
    assert row(text, "The figures", "OSFT (2)")[1] == "90.0"


@pytest.mark.parametrize(
    "change",
    [
        {"stream": "others"},
        {"stream_version": 2},
        {"model": "another"},
        {"tasks": ["a", "c"]},
        {"tasks": ["b", "a"]},
        {"config": {"run": {"max_test_rows": 5}}},
    ],
)
def test_what_cannot_be_compared_is_a_part_of_its_own(change: dict[str, Any], tmp_path: Path) -> None:
    text = markdown([cell("osft", "1", 0, (80, 90, 60)), cell("seqft", "1", 0, (90, 90, 80), **change)], tmp_path)
    assert text.count("1 method\n") == 2
    text = markdown([cell("osft", "1", 0, (80, 90, 60)), cell("seqft", "1", 0, (90, 90, 80))], tmp_path)
    assert text.count("2 methods\n") == 1


def test_limits_are_told_in_page_and_markdown(tmp_path: Path) -> None:
    data = {"a": {"train": {"kept": 10, "truncated": 2, "notices": ["odd rows"]}, "test": {"kept": 5, "left_out": 1}}}
    sweep = {"selected": 1e-4, "selected_by": "average_accuracy", "at_edge_of_grid": True,
             "validation": {"0.0001": {"average_accuracy": 71.25}, "1e-05": {"average_accuracy": 60.0}}}  # fmt: skip
    config = {"run": {"max_train_rows": 10, "max_test_rows": 5}}
    record = cell("osft", "1", 0, (80, 90, 60), left_out=["c", "d"], data=data, sweep=sweep, config=config)
    text = markdown([record], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for notice in (
        "A subset of the stream; left out: c and d.",
        "At most 10 training rows of each task.",
        "At most 5 scored rows of each task.",
        "One seed: too few to say how much another training run would differ; 3 would.",
        "Learning rate at the edge of the grid, so that a better one may lie outside: OSFT.",
        "a, train: 2 truncated; a, test: 1 left out.",
        "odd rows",
    ):
        assert notice in text
        assert notice in page
    assert row(text, "How the learning rates were chosen", "OSFT")[1:] != []
    assert "| OSFT | 60.0 | 71.2 \\* | 1.0e-04 | yes |" in text


def test_floors_and_other_metrics_stand_beside_the_scores(tmp_path: Path) -> None:
    beside = {"stripped": {"a": [1.0, 85.0, 66.0]}}
    record = cell("osft", "1", 0, (80, 90, 60), floors={"a": 62.2}, beside=beside, metric_names={"a": "em", "b": "f1"})
    text = markdown([record], tmp_path)
    assert row(text, "Each task at the end", "always the most frequent answer")[1:] == ["62.2", "-"]
    assert row(text, "Each task at the end", "metric")[1:] == ["em", "f1"]
    section = text.split("## Each task at the end")[1].split("## ")[0]
    assert "| OSFT | 60.0 ! | 90.0 |" in section, "60 is below the floor"
    assert "| OSFT | 66.0 |" in section


def test_a_bad_string_of_row_scores_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=r"run record of 'OSFT': row_scores: .*'x'"):
        write_report([cell("osft", "1", 0, (80, 90, 60), row_scores={"a": "1 x", "b": "1 1"})], tmp_path)


def test_old_records_read(make_run: Make, tmp_path: Path) -> None:
    text = markdown([make_run("osft"), make_run("seqft")], tmp_path)
    assert row(text, "The figures", "Sequential fine-tuning")[0] == "Sequential fine-tuning"
    assert "## The methods" not in text
    assert "## Which differences" not in text, "no rows were kept and there is one seed"


def test_folders_are_read_to_any_depth_but_for_sweeps(tmp_path: Path) -> None:
    for record in cells():
        folder = tmp_path / "out" / record["method"] / f"order-{record['order']}-seed-{record['seed']}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(record))
    sweep = tmp_path / "out" / "osft" / "sweep" / "lr-1"
    sweep.mkdir(parents=True)
    (sweep / "run.json").write_text("no record at all")
    write_report([tmp_path / "out", tmp_path / "out" / "osft"], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert row(text, "The figures", "OSFT") == row(markdown(cells(), tmp_path / "again"), "The figures", "OSFT")
    with pytest.raises(LoricaError, match=r"no run\.json, lorica\.json, judge\.json or inspect\.json"):
        write_report([tmp_path / "again"], tmp_path)
