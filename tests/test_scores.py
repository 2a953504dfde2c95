"""The metrics against a hand-worked matrix, a published table, and their algebra."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from lorica.errors import LoricaError
from lorica.scores import METRICS, ScoreMatrix

# Rows: before, after a, after b, after c.
WORKED = [[10, 20, 30], [80, 30, 40], [90, 70, 20], [60, 50, 100]]

percent = st.floats(0, 100)


@st.composite
def matrices(draw: st.DrawFn) -> ScoreMatrix:
    t = draw(st.integers(1, 6))
    scores = draw(npst.arrays(np.float64, (t + 1, t), elements=percent | st.just(math.nan)))
    return ScoreMatrix([f"task {j}" for j in range(t)], scores)


def test_worked_example() -> None:
    matrix = ScoreMatrix(["a", "b", "c"], WORKED)
    assert matrix.metrics() == {
        "average_accuracy": pytest.approx((60 + 50 + 100) / 3),
        "backward_transfer": ((60 - 80) + (50 - 70)) / 2,
        "forgetting": ((90 - 60) + (70 - 50)) / 2,  # the best of task a is 90, after task b
        "forward_transfer": ((30 - 20) + (20 - 30)) / 2,
        "learning_accuracy": pytest.approx((80 + 70 + 100) / 3),
    }
    assert tuple(matrix.metrics()) == METRICS


def test_trace_seqft_row() -> None:
    """TRACE (arXiv 2310.06762) Table 8: the final scores and the diagonal give its OP and BWT."""
    final = [45.4, 60.9, 45.7, 51.2, 63.7, 27.2, 54.8, 40.8]
    diagonal = [50.0, 73.5, 52.3, 58.0, 76.4, 38.3, 58.2, 40.8]
    scores = np.full((9, 8), np.nan)
    scores[1:][np.diag_indices(8)] = diagonal
    scores[8] = final
    matrix = ScoreMatrix([f"task {j}" for j in range(8)], scores)
    assert matrix.average_accuracy == pytest.approx(48.7, abs=0.05)
    assert matrix.backward_transfer == pytest.approx(-8.3, abs=0.05)
    assert matrix.forgetting is None  # it needs the cells between the diagonal and the last row
    assert matrix.forward_transfer is None


def test_one_task_has_no_transfer() -> None:
    metrics = ScoreMatrix(["only"], [[10], [70]]).metrics()
    assert metrics.pop("average_accuracy") == metrics.pop("learning_accuracy") == 70
    assert set(metrics.values()) == {None}


@given(matrices())
def test_metrics_are_none_exactly_where_a_cell_they_need_is_missing(matrix: ScoreMatrix) -> None:
    t, seen = len(matrix.tasks), ~np.isnan(matrix.scores)
    needs = {
        "average_accuracy": [(t, j) for j in range(t)],
        "learning_accuracy": [(j + 1, j) for j in range(t)],
        "backward_transfer": [(i, j) for j in range(t - 1) for i in (j + 1, t)],
        "forgetting": [(i, j) for j in range(t - 1) for i in range(j + 1, t + 1)],
        "forward_transfer": [(i, j) for j in range(1, t) for i in (0, j)],
    }
    for name, cells in needs.items():
        measured = bool(cells) and all(seen[cell] for cell in cells)
        assert (getattr(matrix, name) is not None) == measured, name


@given(matrices())
def test_forgetting_is_at_least_minus_backward_transfer(matrix: ScoreMatrix) -> None:
    if matrix.forgetting is not None and matrix.backward_transfer is not None:
        assert matrix.forgetting >= -matrix.backward_transfer - 1e-9


@given(matrices())
def test_json_round_trip(matrix: ScoreMatrix) -> None:
    text = json.dumps(matrix.to_json(), allow_nan=False)
    assert ScoreMatrix.from_json(json.loads(text)) == matrix


def test_input_is_neither_kept_nor_changed() -> None:
    given_scores = np.array(WORKED, dtype=float)
    matrix = ScoreMatrix(["a", "b", "c"], given_scores)
    before = matrix.metrics()
    assert (given_scores == WORKED).all()
    given_scores[:] = 0
    assert matrix.metrics() == before
    with pytest.raises(ValueError, match="read-only"):
        matrix.scores[0, 0] = 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"scores": [[1], [2]]}, "r.json: field 'tasks' is missing"),
        ({"tasks": ["a"]}, "r.json: field 'scores' is missing"),
        ({"tasks": [], "scores": []}, "at least one task"),
        ({"tasks": [1], "scores": [[1], [2]]}, "not a name"),
        ({"tasks": ["a"], "scores": [[1]]}, "shape 1 x 1, but 1 tasks need 2 x 1"),
        ({"tasks": ["a"], "scores": [[1], [2, 3]]}, "unequal length"),
        ({"tasks": ["a"], "scores": [["x"], [2]]}, "not a number"),
        ({"tasks": ["a"], "scores": [[1], [101]]}, r"scores\[1\]\[0\] is 101"),
        ({"tasks": ["a"], "scores": [[-1], [1]]}, r"scores\[0\]\[0\] is -1"),
        ({"tasks": ["a"], "scores": [[math.inf], [1]]}, r"scores\[0\]\[0\] is inf"),
    ],
)
def test_wrong_json_is_refused_by_name(data: dict, message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        ScoreMatrix.from_json(data, where="r.json")


def test_table() -> None:
    matrix = ScoreMatrix(["short", "a very long task name"], [[1, None], [100, 2.25], [50.04, 99]])
    assert matrix.table().splitlines() == [
        "                     1      2 ",
        "0 before           1.0      - ",
        "1 short          100.0*   2.2 ",
        "2 a very long ..  50.0   99.0*",
    ]


def test_table_strips_control_characters() -> None:
    assert "\x1b" not in ScoreMatrix(["\x1b[31mred"], [[1], [2]]).table()
