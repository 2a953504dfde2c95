"""The part of a report that shows how answers were judged against those of the model before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from lorica.report.bars import Outcome, stacked_bars
from lorica.report.parts import Figure, Part, Section, flat
from lorica.report.records import JudgeRecord, Share
from lorica.report.tables import Table, percent
from lorica.units import MISSING, listed

PUBLISHED = (
    ("SeqFT, helpfulness", "LLaMA-2-13B-Chat", (14.0, 34.0, 53.0), "TRACE, arXiv 2310.06762, Fig. 2"),
    ("SeqFT, safety", "LLaMA-2-13B-Chat", (0.0, 98.0, 2.0), "TRACE, arXiv 2310.06762, Fig. 2"),
    ("LoRASeqFT, helpfulness", "LLaMA-2-13B-Chat", (3.0, 4.0, 94.0), "TRACE, arXiv 2310.06762, Fig. 2"),
    ("LoRASeqFT, safety", "LLaMA-2-13B-Chat", (0.0, 86.0, 14.0), "TRACE, arXiv 2310.06762, Fig. 2"),
    ("Replay, helpfulness", "LLaMA-2-13B-Chat", (10.0, 18.0, 72.0), "TRACE, arXiv 2310.06762, Fig. 2"),
    ("Replay, safety", "LLaMA-2-13B-Chat", (0.0, 88.0, 12.0), "TRACE, arXiv 2310.06762, Fig. 2"),
    ("OSFT, helpfulness", "LLaMA-2-7B-Chat", (24.0, 56.0, 20.0), "OSFT, arXiv 2504.07097, from a summary"),
    ("OSFT, safety", "LLaMA-2-7B-Chat", (18.0, 78.0, 4.0), "OSFT, arXiv 2504.07097, from a summary"),
)
"""Win, tie and lose against the model before training, after the trace stream; as printed, so rounded."""

OUTCOMES = ("win", "tie", "lose")


def judgement_part(records: Sequence[JudgeRecord]) -> Part:
    """Return all judgements as one part: the shares of wins, ties and losses beside the published ones."""
    labels = [_label(record) for record in records]
    sections = [
        _outcome_section(records, labels),
        _ties_section(records, labels),
        _other_section(records, labels),
        _judge_section(records, labels),
    ]
    told = "; ".join(_told(record, label) for record, label in zip(records, labels, strict=True))
    return Part("Answers judged against the model before", f"{told}.", sections=sections)


def _told(record: JudgeRecord, label: str) -> str:
    shares = listed([f"{name} {_share(getattr(record, name))}" for name in OUTCOMES])
    apart = _apart(record.win, record.lose)
    return f"{label}, {record.prompts} prompts: {shares}; {apart}"


def _apart(win: Share, lose: Share) -> str:
    if None in (win.low, win.high, lose.low, lose.high):
        return "no intervals are known"
    if (win.low or 0) > (lose.high or 0):
        return "wins are more than losses beyond their intervals"
    if (lose.low or 0) > (win.high or 0):
        return "losses are more than wins beyond their intervals"
    return "wins and losses are not told apart by their intervals"


def _outcome_section(records: Sequence[JudgeRecord], labels: Sequence[str]) -> Section:
    ours = [
        Outcome(label, (record.win.percent, record.tie.percent, record.lose.percent),
                tuple(_ends(getattr(record, name)) for name in OUTCOMES))
        for record, label in zip(records, labels, strict=True)
    ]  # fmt: skip
    theirs = [Outcome(f"{label}, {model}", parts, ours=False) for label, model, parts, _ in PUBLISHED]
    caption = (
        "Share of prompts where the model after training won, tied and lost; black lines: 95 % intervals over prompts. "
        "Paler: published rows, of other models, prompts and judges: not like for like."
    )
    rows = [
        [label, *(_share(getattr(record, name)) for name in OUTCOMES), str(record.prompts), "ours"]
        for record, label in zip(records, labels, strict=True)
    ]
    rows += [
        [f"{label}, {model}", *(f"{share:.0f} %" for share in parts), MISSING, f"{source}; not like for like"]
        for label, model, parts, source in PUBLISHED
    ]
    svg = stacked_bars([*ours, *theirs], ("win", "tie", "lose"), title="Win, tie, lose", description=caption)
    table = Table(["after against before", *OUTCOMES, "prompts", "source"], rows)
    return Section("Win, tie, lose", figures=[Figure(svg, caption, table)], wide=True)


def _ties_section(records: Sequence[JudgeRecord], labels: Sequence[str]) -> Section | None:
    rows = [
        [label, reason, str(count)]
        for record, label in zip(records, labels, strict=True)
        for reason, count in record.ties.items()
    ]
    intro = "Both orders of presentation are judged; only a judge that prefers the same answer in both decides."
    return (
        Section("Why there were ties", intro, table=Table(["judged", "reason", "prompts"], rows, 2)) if rows else None
    )


def _other_section(records: Sequence[JudgeRecord], labels: Sequence[str]) -> Section:
    rows = [
        [label, *map(percent, (r.keyword_refusal_rate.before, r.keyword_refusal_rate.after)),
         *(MISSING if n is None else f"{n:.0f}" for n in (r.cut_answers.before, r.cut_answers.after))]
        for r, label in zip(records, labels, strict=True)
    ]  # fmt: skip
    header = ["judged", "keyword refusals before, %", "after, %", "cut answers before", "after"]
    return Section("Refusals and cut answers", "A keyword count, no measure of safety.", table=Table(header, rows))


def _judge_section(records: Sequence[JudgeRecord], labels: Sequence[str]) -> Section:
    rows, code = [], []
    for record, label in zip(records, labels, strict=True):
        told = {
            "judge": flat(record.judge),
            "before": record.before,
            "after": record.after,
            "files": flat(record.files),
        }
        told |= {
            "first prompts only": str(record.limit or ""),
            "longest answer, tokens": str(record.max_new_tokens or ""),
        }
        told |= {"versions": flat(record.versions), "git revision": record.git_revision or ""}
        rows += [[label, name, value] for name, value in told.items() if value not in ("", MISSING)]
        code += [(label, record.command)] if record.command else []
    return Section("How to run it again", table=Table(["judged", "what", "value"], rows, left=3), code=code)


def _label(record: JudgeRecord) -> str:
    prompts = next((PurePath(name).stem for name in record.files), "")
    return f"{PurePath(record.after).name} against {PurePath(record.before).name}" + (f", {prompts}" if prompts else "")


def _share(share: Share) -> str:
    ends = _ends(share)
    return f"{share.percent:.1f} %" + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")


def _ends(share: Share) -> tuple[float, float] | None:
    return None if share.low is None or share.high is None else (share.low, share.high)
