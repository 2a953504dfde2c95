"""The part of a judgement: its shares with their intervals, beside the published ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorica.errors import LoricaError
from lorica.report import write_report


def judge_record(**changes: Any) -> dict[str, Any]:
    """Return a record of ``lorica judge``."""
    record = {
        "schema": 1, "kind": "judge", "before": "models/base", "after": "out/new", "prompts": 200, "level": 0.95,
        "win": {"percent": 24.0, "low": 18.0, "high": 30.0}, "tie": {"percent": 56.0, "low": 49.0, "high": 63.0},
        "lose": {"percent": 20.0, "low": 15.0, "high": 26.0}, "ties": {"a tie in both orders": 112},
        "judge": {"name": "a judge", "prompt": "Which is better?"},
        "keyword_refusal_rate": {"before": 3.0, "after": 4.5},
        "cut_answers": {"before": 1, "after": 2}, "max_new_tokens": 256, "files": {"prompts/self.jsonl": "ab" * 32},
        "limit": None, "command": "lorica judge",
    }  # fmt: skip
    return record | changes


def markdown(folder: Path, *records: dict[str, Any]) -> str:
    write_report(records, folder)
    return (folder / "report.md").read_text(encoding="utf-8")


def test_shares_and_intervals_stand_beside_published_ones(tmp_path: Path) -> None:
    text = markdown(tmp_path, judge_record())
    assert "win 24.0 % \\[18.0, 30.0\\], tie 56.0 % \\[49.0, 63.0\\] and lose 20.0 % \\[15.0, 26.0\\]" in text
    assert "wins and losses are not told apart by their intervals" in text
    assert "| SeqFT, helpfulness, LLaMA-2-13B-Chat | 14 % | 34 % | 53 % | - |" in text
    assert "| OSFT, safety, LLaMA-2-7B-Chat | 18 % | 78 % | 4 % | - |" in text
    assert text.count("not like for like") >= 8
    assert "| new against base, self | a tie in both orders | 112 |" in text
    assert "| new against base, self | 3.0 | 4.5 | 1 | 2 |" in text
    assert "prompt Which is better?" in text


@pytest.mark.parametrize(
    ("win", "lose", "told"),
    [
        ((50.0, 45.0, 55.0), (20.0, 15.0, 25.0), "wins are more than losses beyond their intervals"),
        ((10.0, 6.0, 14.0), (60.0, 52.0, 66.0), "losses are more than wins beyond their intervals"),
        ((30.0, None, None), (10.0, None, None), "no intervals are known"),
    ],
)
def test_the_verdict_follows_the_intervals(
    win: tuple[float, ...], lose: tuple[float, ...], told: str, tmp_path: Path
) -> None:
    shares = {
        name: dict(zip(("percent", "low", "high"), share, strict=True))
        for name, share in (("win", win), ("lose", lose))
    }
    assert told in markdown(tmp_path, judge_record(**shares))


def test_the_bars_are_as_long_as_the_shares(tmp_path: Path) -> None:
    page = write_report([judge_record()], tmp_path).read_text(encoding="utf-8")
    widths = [float(w) for w in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="22"', page)[:3]]
    assert widths[1] / widths[0] == pytest.approx(56 / 24, rel=0.02)
    assert widths[2] / widths[0] == pytest.approx(20 / 24, rel=0.02)


def test_several_judgements_are_one_part(tmp_path: Path) -> None:
    text = markdown(tmp_path, judge_record(), judge_record(after="out/other"))
    assert text.count("\n## Win, tie, lose") == 1
    assert "| new against base, self |" in text
    assert "| other against base, self |" in text


def test_a_wrong_field_is_named(tmp_path: Path) -> None:
    file = tmp_path / "judge.json"
    file.write_text(json.dumps(judge_record(win={"percent": "many"})))
    with pytest.raises(LoricaError, match=r"judge\.json: field 'win\.percent'"):
        write_report([tmp_path], tmp_path)
