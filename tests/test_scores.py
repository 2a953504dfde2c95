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


OLORA_LOGS = {
    # method and order: the logged exact match after each task, the average that follows, and backward transfer
    "O-LoRA, order 1": (
        [[98.7105], [98.5526, 57.7632], [97.4079, 57.4079, 71.9079], [97.7368, 56.0658, 71.0395, 88.6184]],
        78.4,
        -1.2,
    ),
    "SeqFT, order 1": (
        [[97.0132], [89.1053, 55.25], [74.7632, 53.4474, 72.2763], [79.5263, 52.6711, 48.8421, 90.0263]],
        67.8,
        -14.5,
    ),
    "IncLoRA, order 1": (
        [[98.7105], [82.4737, 57.0132], [80.7763, 44.9474, 72.3816], [79.5, 40.8158, 64.1447, 90.0132]],
        68.6,
        -14.5,
    ),
}


@pytest.mark.parametrize(("logged", "average", "transfer"), OLORA_LOGS.values(), ids=OLORA_LOGS.keys())
def test_olora_s_published_logs(logged: list[list[float]], average: float, transfer: float) -> None:
    """The per-task results that the authors of O-LoRA (arXiv 2310.14152) ship with their code, T5-large."""
    size = len(logged)
    rows = [[math.nan] * size] + [row + [math.nan] * (size - len(row)) for row in logged]
    matrix = ScoreMatrix(["dbpedia", "amazon", "yahoo", "agnews"], np.array(rows))
    assert matrix.average_accuracy == pytest.approx(average, abs=0.05)
    assert matrix.backward_transfer == pytest.approx(transfer, abs=0.05)
    assert matrix.forward_transfer is None, "tasks not yet learned were not scored"


def test_olora_s_order_6_is_averaged_over_tasks_not_rows() -> None:
    """The log's own ``predict_exact_match`` for this stage is 73.88: it weights tasks by their number of rows."""
    final = [62.1447, 60.0, 61.2368, 73.2143, 64.0, 72.7895, 69.6751, 94.9342, 91.9725, 98.4079, 86.4211, 65.1974,
             61.1386, 69.4495, 52.0376]  # fmt: skip
    learned = [60.5658, 60.7895, 69.4211, 87.5, 54.0, 72.7763, 66.787, 94.3421, 91.7431, 98.7105, 87.2895, 65.4079,
               62.335, 69.1743, 52.0376]  # fmt: skip
    rows = np.full((16, 15), math.nan)
    np.fill_diagonal(rows[1:], learned)
    rows[-1] = final
    matrix = ScoreMatrix([str(task) for task in range(15)], rows)
    assert matrix.average_accuracy == pytest.approx(72.17, abs=0.005)
    assert matrix.backward_transfer == pytest.approx(-0.7, abs=0.05)
