"""docs/speed.md and the README's table are what the script makes of the kept results, and what they claim holds.

The results themselves appear with the first ``make bench``; from then on nothing here is skipped. How tables, claims
and charts follow from results is tested on made-up ones, whose figures can be worked out by hand.
"""

from __future__ import annotations

import importlib
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results" / "speed"
needs_results = pytest.mark.skipif(not KEPT.is_dir(), reason="make bench has not been run yet")

PLAIN_SECONDS, PLAIN_STATE = 2.0, 1000
SLOWNESS = {"lorica fast": 0.98, "lorica lean": 1.1, "mini_trainer": 1.6, "peft osf": 1.9, "LoRA": 0.7}
STATE = {"lorica fast": 850, "lorica lean": 500, "mini_trainer": 700, "peft osf": 880, "LoRA": 300}
LEAKAGE = {"lorica fast": 2e-7, "lorica lean": 3e-7, "mini_trainer": 4e-4, "peft osf": 0.1}
RECORD = {
    "hardware": {"cpu": "Abacus 2", "machine": "x86_64"},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
    "threads": 2,
    "date": "2026-01-02T00:00:00Z",
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("speed_page")
    for name in [name for name in sys.modules if name.startswith("speed_")]:
        del sys.modules[name]


def spread(middle: float) -> dict[str, float]:
    return {"median": middle, "low": middle - 0.01, "high": middle + 0.01}


def step_rows(shares: list[float]) -> list[dict[str, Any]]:
    rows = []
    for family in ("plain", *SLOWNESS):
        for share in [None] if family in ("plain", "LoRA") else shares:
            ratio, state = SLOWNESS.get(family, 1.0), STATE.get(family, PLAIN_STATE)
            rows.append(
                {
                    "family": family,
                    "protected": share,
                    "seconds_median": PLAIN_SECONDS * ratio,
                    "tokens_per_second": 1024 / ratio,
                    "ratio": spread(ratio),
                    "state_ratio": state / PLAIN_STATE,
                    "state_bytes": state,
                    "mapped_bytes": 400 if family == "lorica lean" else 0,
                    "leakage": LEAKAGE.get(family),
                }
            )
    return rows


def peak_rows() -> list[dict[str, Any]]:
    rows = []
    for family in ("plain", *SLOWNESS):
        size = STATE.get(family, PLAIN_STATE)
        names = {"load": 0.2, "protect": 0.7, "train": 1.5, "release": 1.05, "save": 1.0}
        phases = {
            name: {"seconds": 1.0} | {f"{what}_{kind}": size * (1.0 if what == "end" else factor)
                                      for what in ("peak", "end") for kind in ("rss", "anonymous")}
            for name, factor in names.items()
        }  # fmt: skip
        rows.append({"family": family, "protected": 0.75 if family in LEAKAGE else None, "phases": phases})
    return rows


SPLIT = {
    "model": "tiny", "weights": 2, "numbers": 200, "dtype": "float32", "protected": 0.75, "threads": 2,
    "model_seconds": {"full": 4.0, "first": 4.2, "cached": 1.0, "after_task": 3.0},
    "shapes": [{"shape": [10, 10], "count": 2, "angle": 1e-12,
                "seconds": {"full": [2.0], "first": [2.1], "cached": [0.5], "after_task": [1.5]}}],
}  # fmt: skip
"""As scripts/split_time.py writes it."""


def task_rows() -> list[dict[str, Any]]:
    same = {"protect_seconds": 1.0, "steps_seconds": 0.9, "release_seconds": 0.1, "state_bytes": 50}
    old = [{"stream": "old", "task": i, "resident_bytes": 100 if i < 40 else 104} | same for i in range(1, 51)]
    return old + [{"stream": "young", "task": i, "resident_bytes": 100} | same for i in range(1, 22)]


def inference_rows() -> list[dict[str, Any]]:
    return [
        {"family": family, "activity": activity, "ratio": spread(1.01)}
        for activity in ("evaluation", "generation")
        for family in ("lorica fast", "lorica lean")
    ]


def arithmetic_rows() -> list[dict[str, Any]]:
    sizes = {"plain": 128.5e9, "mini_trainer": 84.9e9, "peft osf": 82.4e9, "lorica fast": 62.3e9, "lorica lean": 42e9}
    return [
        {"model": "Llama-3.1-8B", "protected": share, "family": family, "state_bytes": size, "aside_bytes": 14e9}
        for share in (0.5, 0.75)
        for family, size in sizes.items()
    ]


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """Return a folder with results of every kind."""
    all_shares = [0.5, 0.75, 0.9]
    grid = [(256, 4, 65536, [0.75]), (1024, 2, 2048, all_shares), (1024, 2, 8192, all_shares)]
    files: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "arithmetic": ({}, arithmetic_rows()),
        "inference-512": ({"width": 512}, inference_rows()),
    }
    for width, layers, tokens, shares in grid:
        point = {"width": width, "layers": layers, "tokens": tokens, "rounds": 5}
        files[f"step-time-{width}-{tokens}"] = (point, step_rows(shares))
        files[f"peak-memory-{width}-{tokens}"] = (point, peak_rows())
    for mode in ("fast", "lean"):
        settings = {"memory": mode, "tasks": 50, "rounds": 20, "width": 512, "layers": 2, "steps": 4, "tokens": 512}
        files[f"tasks-{mode}"] = (settings, task_rows())
    (tmp_path / "split-time.json").write_text(json.dumps(SPLIT))
    for name, (settings, rows) in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": settings, "rows": rows} | RECORD))
    return tmp_path


def change(folder: Path, name: str, of: str, **values: Any) -> None:
    """Change figures of one family's rows in one result file."""
    file = folder / f"{name}.json"
    record = json.loads(file.read_text())
    for row in record["rows"]:
        if row["family"] == of:
            row.update(values)
    file.write_text(json.dumps(record))


def broken(script: Any, folder: Path) -> list[str]:
    claims = importlib.import_module("speed_claims").claims(script.read(folder))
    return [claim.what for claim in claims if not claim.holds]


@needs_results
def test_pages_and_charts_are_what_the_script_makes_of_the_kept_results(script: Any) -> None:
    for path, text in script.files(script.read(KEPT)).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python scripts/speed_page.py"


@needs_results
def test_every_block_of_both_pages_is_filled(script: Any) -> None:
    found = "".join(path.read_text(encoding="utf-8") for path in script.PAGES)
    for name, part in importlib.import_module("speed_tables").blocks(script.read(KEPT)).items():
        assert f"<!-- {name} -->\n{part}\n<!-- end -->" in found, name


@needs_results
def test_what_is_claimed_holds_in_the_kept_results(script: Any) -> None:
    assert broken(script, KEPT) == []


def test_made_up_results_hold_what_is_claimed(script: Any, made_up: Path) -> None:
    assert broken(script, made_up) == []


@pytest.mark.parametrize(
    ("name", "family", "values", "what"),
    [
        ("step-time-1024-2048", "lorica fast", {"seconds_median": 2.12}, "step time over plain"),
        ("step-time-1024-8192", "lorica fast", {"seconds_median": 2.02}, "step time over plain"),
        ("step-time-256-65536", "mini_trainer", {"seconds_median": 1.9}, "mini_trainer over ours, the worst"),
        ("step-time-1024-8192", "lorica lean", {"state_ratio": 0.56}, "training state over plain"),
        ("step-time-1024-2048", "lorica lean", {"state_bytes": 701}, "over that of a peer"),
        ("step-time-1024-2048", "lorica fast", {"leakage": 2e-5}, "protected directions"),
        ("arithmetic", "lorica lean", {"state_bytes": 47e9}, "Llama-3.1-8B"),
        ("inference-512", "lorica lean", {"ratio": spread(1.03)}, "evaluation of a protected model"),
    ],
)
def test_a_claim_falls_with_its_figure(
    script: Any, made_up: Path, name: str, family: str, values: dict[str, Any], what: str
) -> None:
    change(made_up, name, family, **values)
    assert any(what in one for one in broken(script, made_up))


def test_peers_that_were_not_measured_hold_no_claim(script: Any, made_up: Path) -> None:
    for name in ("step-time-256-65536", "step-time-1024-2048", "step-time-1024-8192"):
        change(made_up, name, "peft osf", family="somebody else")
    assert any("peft osf over ours" in one for one in broken(script, made_up))


def test_growth_over_the_tasks_is_found(script: Any, made_up: Path) -> None:
    file = made_up / "tasks-lean.json"
    record = json.loads(file.read_text())
    for row in record["rows"][35:50]:
        row["protect_seconds"] = 1.2  # 2.2 s a task in most of the rounds, beside 2.0 s
    file.write_text(json.dumps(record))
    assert broken(script, made_up) == ["time of a late task over an early one"]


def test_a_second_copy_while_releasing_is_found(script: Any, made_up: Path) -> None:
    file = made_up / "peak-memory-256-65536.json"  # the deepest model
    record = json.loads(file.read_text())
    next(row for row in record["rows"] if row["family"] == "lorica fast")["phases"]["release"]["peak_rss"] = 1000
    file.write_text(json.dumps(record))
    assert broken(script, made_up) == ["peak of load, protect, release and save over what training holds"]


def test_the_short_table_and_its_sentence_hold_the_figures(script: Any, made_up: Path) -> None:
    block = script.filled(
        "<!-- speed -->\n<!-- end -->\n", importlib.import_module("speed_tables").blocks(script.read(made_up))
    )
    rows = {line.split(" | ")[0][2:]: line.rstrip(" |").split(" | ")[1:] for line in block.splitlines() if "|" in line}
    assert rows["plain fine-tuning"] == ["1.00", "1.00", "1.00", "1.00", "1.00", "-"]
    assert rows["**Lorica**, fast"] == ["0.98", "0.98", "0.85", "0.85", "0.85", "2.0e-07"]
    assert rows["PEFT 0.21 `osf`"] == ["1.90", "1.90", "0.88", "0.88", "0.88", "0.1"]
    assert "**1.63 times** as long with mini_trainer 0.9 (1.63 to 1.63)" in block  # 1.6 / 0.98
    assert "plain fine-tuning 128.5" in block
    assert "Lorica**, lean 42.0" in block


def test_only_the_named_blocks_of_a_page_are_written(script: Any) -> None:
    page = "<!-- other: x -->\nkept\n<!-- end -->\nprose\n<!-- speed -->\nold\n<!-- end -->\n"
    once = script.filled(page, {"speed": "new"})
    assert once == page.replace("old", "new")
    assert script.filled(once, {"speed": "new"}) == once


def test_an_empty_block_does_not_swallow_the_next(script: Any) -> None:
    page = "<!-- a -->\n<!-- end -->\nprose\n<!-- b -->\n<!-- end -->\n"
    assert (
        script.filled(page, {"a": "1", "b": "2"}) == "<!-- a -->\n1\n<!-- end -->\nprose\n<!-- b -->\n2\n<!-- end -->\n"
    )


def test_charts_are_well_formed_and_name_every_method(script: Any, made_up: Path) -> None:
    pictures = {path.name: text for path, text in script.files(script.read(made_up)).items() if path.suffix == ".svg"}
    for text in pictures.values():
        ET.fromstring(text)
    for name in ("Lorica", "Lorica lean", "mini_trainer", "PEFT osf"):
        assert name in pictures["speed-steps-1.svg"]
    assert set(pictures) == {"speed-steps-1.svg", "speed-state.svg", "speed-tasks.svg"}


def test_a_kind_that_is_missing_is_named(script: Any, made_up: Path) -> None:
    (made_up / "arithmetic.json").unlink()
    with pytest.raises(SystemExit, match="arithmetic"):
        script.read(made_up)
