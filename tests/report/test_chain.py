"""Single updates that go on from each other: the score matrix is found by the hashes of weights and files."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from lorica.report import write_report
from lorica.report.chain import chains
from lorica.report.records import TrainRecord
from tests.report.conftest import train_record

Scores = dict[str, tuple[str, float | None, float | None]]


def update(
    name: str,
    start: str,
    end: str,
    files: Scores,
    *,
    rejected: dict[str, float] | None = None,
    own: str | None = "same",
) -> dict[str, Any]:
    """Return the record of an update; ``files`` by name: hash, score before, score after. The first is its own."""
    own = next(iter(files)) if own == "same" else own
    kept = {key: value for key, value in files.items() if key != own}
    summary = {key: {"path": f"{key}.jsonl", "sha256": value[0], "kept": 10} for key, value in files.items()}

    def measured(place: int) -> dict[str, Any]:
        scores = {key: {"loss": 1.0, "exact_match": value[place], "rows": 10} for key, value in files.items()}
        return {"eval": scores[own] if own else {}, "retention": {key: scores[key] for key in kept}}

    return train_record(
        parent={"model": f"models/{start}", "weights_sha256": start, "updates": 0}, weights_sha256=end,
        rejected=rejected or {}, carried_bytes=7, plan=[], leakage=[],
        data={"train": {"path": f"data/{name}.jsonl"}, "eval": summary[own] if own else None,
              "retention": {key: summary[key] for key in kept}},
        scores={"before": measured(1), "after": measured(2)},
    )  # fmt: skip


FIRST = update("one", "w0", "w1", {"one.eval": ("e1", 2.0, 90.0), "atlas": ("a", 96.0, 95.0)})
SECOND = update(
    "two", "w1", "w2", {"two.eval": ("e2", 3.0, 80.0), "old": ("e1", 90.0, 70.0), "atlas": ("a", 95.0, 94.0)}
)
THIRD = update(
    "three", "w2", "w3", {"three.eval": ("e3", 4.0, 60.0), "map": ("a", 94.0, 93.0), "two": ("e2", 80.0, 75.0)}
)
REJECTED = update(
    "bad", "w2", "wx", {"bad.eval": ("e9", 1.0, 99.0), "atlas": ("a", 94.0, 10.0)}, rejected={"atlas": 84.0}
)


def parsed(*records: dict[str, Any]) -> list[TrainRecord]:
    return [TrainRecord.model_validate(record) for record in records]


def markdown(records: list[dict[str, Any]], folder: Path) -> str:
    write_report(records, folder)
    return (folder / "report.md").read_text(encoding="utf-8")


def test_the_matrix_is_found_by_hashes() -> None:
    records = parsed(FIRST, SECOND, THIRD, REJECTED)
    random.Random(1).shuffle(records)
    (chain,), single = chains(records)
    assert single == []
    assert chain.names == ["one", "two", "three"]
    nan = math.nan
    expected: list[list[float]] = [[2, nan, nan], [90, 3, nan], [70, 80, 4], [nan, 75, 60]]
    assert np.array_equal(chain.matrix.scores, expected, equal_nan=True)
    assert chain.held_out == {"atlas": [96, 95, 94, 93]}, "known by its hash, under the name of the first update"
    assert [(place, one.weights_sha256) for place, one in chain.rejected] == [(2, "wx")]


def test_a_score_is_read_from_the_update_that_made_the_model() -> None:
    alone = update("two", "w1", "w2", {"two.eval": ("e2", 3.0, 80.0)})
    (chain,), _ = chains(parsed(FIRST, alone))
    assert chain.matrix.scores[1].tolist() == [90, 3], "the next update did not score it"
    again = update("two", "w1", "w2", {"two.eval": ("e2", 3.0, 80.0), "old": ("e1", 89.0, 70.0)})
    (chain,), _ = chains(parsed(FIRST, again))
    assert chain.matrix.scores[1].tolist() == [90, 3], "the next update scored it once more, on another machine"


def test_an_unknown_cell_is_never_a_zero(tmp_path: Path) -> None:
    text = markdown([FIRST, SECOND, THIRD], tmp_path)
    assert "| 3 three | - | 75.0 | 60.0 |" in text
    assert "Not measured: one after update 3." in text
    assert "New data, right after its update: 76.7 %." in text, "(90 + 80 + 60) / 3"
    assert "Earlier updates' data" not in text, "one of them was not measured"
    assert "Held out, atlas: from 96.0 to 93.0 %." in text


def test_all_measured_gives_the_transfer(tmp_path: Path) -> None:
    text = markdown([FIRST, SECOND], tmp_path)
    assert "Earlier updates' data by the end: -20.0 points." in text
    assert "models/w0: 2 updates in order" in text
    assert "Not measured" not in text


def test_a_rejected_update_is_marked_and_no_stage(tmp_path: Path) -> None:
    text = markdown([FIRST, SECOND, REJECTED, THIRD], tmp_path)
    assert "Rejected and set aside, after update 2: bad lost atlas 84.0 points." in text
    lines = [line for line in text.splitlines() if line.startswith("| after 2, rejected | bad |")]
    assert len(lines) == 1
    assert "| 1.0 | 99.0 | -84.0 |" in lines[0]
    assert "3 updates in order" in text


def test_an_update_that_went_on_from_a_rejected_one_keeps_it_in_line() -> None:
    after = update("after", "wx", "wy", {"after.eval": ("e8", 5.0, 50.0)})
    (chain,), single = chains(parsed(FIRST, SECOND, REJECTED, after))
    assert chain.names == ["one", "two", "bad", "after"]
    assert single == []


def test_what_is_not_linked_stays_single(tmp_path: Path) -> None:
    other = update("other", "v0", "v1", {"other.eval": ("e7", 5.0, 50.0)})
    unknown = train_record()
    linked, single = chains(parsed(other, FIRST, unknown))
    assert linked == []
    assert len(single) == 3
    text = markdown([other, FIRST, SECOND, unknown], tmp_path)
    assert text.count("\n# ") + 1 == 3, "a chain and two updates"


def test_a_lone_rejected_update_says_so(tmp_path: Path) -> None:
    assert "Rejected: atlas lost 84.0 points; the model was set aside." in markdown([REJECTED], tmp_path)


def test_of_two_lines_the_longer_is_the_chain() -> None:
    twin = update("twin", "w1", "w9", {"twin.eval": ("e5", 1.0, 2.0)})
    (chain,), single = chains(parsed(FIRST, twin, SECOND, THIRD))
    assert chain.names == ["one", "two", "three"]
    assert [one.weights_sha256 for one in single] == ["w9"]


def test_an_update_without_an_evaluation_file_is_an_unknown_column() -> None:
    silent = update("silent", "w1", "w2", {"old": ("e1", 90.0, 70.0)}, own=None)
    (chain,), _ = chains(parsed(FIRST, silent))
    assert np.array_equal(chain.matrix.scores, [[2, math.nan], [90, math.nan], [70, math.nan]], equal_nan=True)


def test_weights_that_lead_to_themselves_end() -> None:
    loop = [update("a", "x", "y", {"a.eval": ("e1", 1.0, 2.0)}), update("b", "y", "x", {"b.eval": ("e2", 1.0, 2.0)})]
    assert chains(parsed(*loop)) == ([], parsed(*loop))
    same = update("same", "z", "z", {"same.eval": ("e1", 1.0, 1.0)})
    assert chains(parsed(same)) == ([], parsed(same))
