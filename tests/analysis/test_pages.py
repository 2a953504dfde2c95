"""What the pages say of a record made by hand: the summary word for word, the pictures to the pixel."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lorica.report.inspection import inspection_part, inspection_text
from lorica.report.inspection_record import InspectionRecord
from lorica.report.layer_grid import bullet, signed, spectrum


def layer(name: str, k: int, energy: tuple[float, float, float] | None, sigma: list[float]) -> dict[str, Any]:
    shares = energy and dict(zip(("protected", "random", "best"), energy, strict=True))
    return {
        "name": name, "shape": [4, 8], "k": k, "free": 1, "share": k / 4, "source": "weight", "constraint": "two-sided",
        "spectrum": {"index": [0, 1, 2, 3], "sigma": sigma}, "effective_rank": 2.5, "squared_share": 0.75,
        "similarity": -0.125, "energy": shares,
    }  # fmt: skip


def removed(which: str, fraction: float, loss: float, match: float | None) -> dict[str, Any]:
    return {"layer": None, "which": which, "fraction": fraction, "directions": 2, "loss": loss, "exact_match": match}


def record(**changes: Any) -> InspectionRecord:
    data = {
        "schema": 1,
        "kind": "inspect",
        "model": "small",
        "calibration": "self",
        "layers": [
            layer("model.layers.0.q_proj", 3, (0.9, 0.375, 0.95), [4.0, 2.0, 1.0, 0.5]),
            layer("model.layers.1.q_proj", 1, (0.3, 0.125, 0.65), [0.0, 0.0, 0.0, 0.0]),
        ],
        "before": {"loss": 0.5, "exact_match": 80.0, "rows": 40, "answers": 40},
        "interventions": [
            removed("top", 0.01, 1.0, 50.0), removed("top", 0.1, 2.0, 20.0), removed("top", 0.5, 9.0, 0.0),
            removed("bottom", 0.01, 0.5, 80.0), removed("bottom", 0.1, 0.625, 75.0), removed("bottom", 0.5, 3.0, 10.0),
        ],
        "curvature": {"rows": 32, "spearman": {"model.layers.0.q_proj": 0.75, "model.layers.1.q_proj": 0.25}},
    }  # fmt: skip
    return InspectionRecord.model_validate(data | changes)


def test_the_summary_word_for_word() -> None:
    assert inspection_text(record()).split("\n\n")[0].splitlines() == [
        "The protected directions (50 % of each weight's, mean over 2 layers) hold 60.0 % of the energy of the inputs; "
        "random ones would hold 25.0 %, the best possible 80.0 %.",
        "Intact, the model has exact match 80.0 %, loss 0.500; without the smallest 10 % of the directions of all "
        "layers, exact match 75.0 %, loss 0.625; without the largest 10 % of the directions of all layers, exact match "
        "20.0 %, loss 2.000.",
        "Rank correlation of singular value and curvature: +0.50 (median): small directions tend to be flatter, but "
        "many are not.",
    ]


def test_a_line_per_layer() -> None:
    rows = inspection_text(record()).split("\n\n")[1].splitlines()
    assert rows[1].split() == "layers.0.q_proj 4x8 3 2.5 75.0 -0.12 90.0 37.5 95.0 +0.75".split()
    assert len(rows) == 3


def test_nothing_is_said_of_what_was_not_measured() -> None:
    alone = {"interventions": [], "curvature": None, "before": {}}
    assert len(inspection_text(record(**alone)).split("\n\n")[0].splitlines()) == 1
    unranked = {"curvature": {"rows": 2, "spearman": {"model.layers.0.q_proj": None}}}
    assert "correlation" not in inspection_text(record(**unranked))
    unseen = [layer("model.layers.0.q_proj", 3, None, [1.0, 1.0, 1.0, 1.0])]
    assert inspection_text(record(layers=unseen)).startswith("The layers saw nothing but zeros.")
    unanswered = [removed("bottom", 0.2, 0.75, None)]
    told = inspection_text(record(interventions=unanswered, before={"loss": 0.5}))
    assert "has loss 0.500; without the smallest 20 % of the directions of all layers, loss 0.750." in told


def test_pictures_and_tables_hold_the_same_layers() -> None:
    part = inspection_part(record())
    figures = [figure for section in part.sections if section for figure in section.figures]
    assert [len(figure.table.rows) for figure in figures] == [2, 2, 7, 7, 2]
    assert all(str(figure.svg).startswith("<svg") for figure in figures)


def widths(svg: str, kind: str) -> list[float]:
    return [float(x) for x in re.findall(rf'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)"[^>]*class="{kind}"', svg)]


def test_bar_dot_and_tick_stand_where_their_shares_are() -> None:
    svg = bullet(100, 0, 130, share=0.5, random=0.25, best=0.75, note="")
    assert widths(svg, "track") == [100]
    assert widths(svg, "bar") == [50]
    assert 'cx="125"' in svg
    assert 'x1="175"' in svg


@pytest.mark.parametrize(("value", "start", "width"), [(0.5, 150, 25), (-0.5, 125, 25), (0.0, 150, 0), (7.0, 150, 50)])
def test_signed_bars_leave_the_middle(value: float, start: float, width: float) -> None:
    svg = signed(100, 0, 138, value, 1.0, "", "")
    assert f'<rect x="{start}" y="5" width="{width}"' in re.sub(r"\.0\b", "", svg)


def test_the_coloured_area_ends_at_the_cut() -> None:
    points = [(0.125, 1.0), (0.375, 0.5), (0.625, 0.25), (0.875, 0.0)]
    svg = spectrum(0, 0, 100, 40, points, cut=0.5, note="")
    bar, track = re.findall(r'<path d="([^"]+)"', svg)
    assert bar == "M12.5 40.0L12.5 0.0L37.5 20.0L50.0 25.0L50.0 40.0Z"
    assert track == "M50.0 40.0L50.0 25.0L62.5 30.0L87.5 40.0L87.5 40.0Z"
    whole = spectrum(0, 0, 100, 40, points, cut=None, note="")
    assert 'class="bar"' not in whole
    assert "reference" not in whole
