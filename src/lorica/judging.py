"""The story of one judgement: read prompts, answer them with both models, have the answers judged, tell."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorica.errors import LoricaError
from lorica.evaluation.generate import Written, greedy_answers
from lorica.evaluation.judge import Judge, Judgement, compare, describe, summary
from lorica.evaluation.prompts import Prompt, prompt_ids, read_prompts
from lorica.evaluation.refusal import refusal_rate
from lorica.files import sha256, writing
from lorica.hub import commit_of
from lorica.record import SCHEMA, Stopwatch, environment, redacted, write_record
from lorica.redaction import cleaned
from lorica.told import progress_bar
from lorica.training.models import position_limit, read_model, read_model_config, read_tokenizer
from lorica.training.output import check_output_dir, make_output_dir

JUDGEMENTS, RECORD = "judgements.jsonl", "judge.json"
SIDES = ("before", "after")


@dataclass(frozen=True)
class Asked:
    """A model that is to answer, and the prompts as its token ids; its weights are not loaded yet."""

    name: str
    commit: str | None
    config: Any
    tokenizer: Any
    prompt_ids: list[list[int]]


def judge_models(
    before: str,
    after: str,
    prompts_file: str | Path,
    *,
    judge: Judge,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    limit: int | None = None,
    output_dir: str | Path,
    allow_pickle: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Judge a model after training against the one before it, prompt by prompt; this is ``lorica judge``.

    Both answer greedily, one after the other in memory. The output folder gets ``judgements.jsonl``, every prompt
    with both answers, what the judge wrote in both orders, the outcome and its reason, line by line as they are
    judged; and ``judge.json``, the record, also returned.

    Args:
        before, after: model folders or names on the hub.
        prompts_file: see ``read_prompts``.
        judge: an ``EndpointJudge``, a ``local_judge``, or any function of a prompt and two answers.
        max_new_tokens: an answer that has not ended by then is cut; how many were is recorded.
        batch_size: prompts at a time.
        limit: how many prompts from the start of the file; None: all.
        output_dir: a new or empty folder.
        allow_pickle: see ``lorica.training.models.read_model``.
        say: takes each line of what is told along the way.

    Raises:
        LoricaError: anything about the input is wrong, and no weight has been loaded then; or the judge failed, and
            what was judged until then is in ``judgements.jsonl``.
    """
    watch, say = Stopwatch(), cleaned(say)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise LoricaError(f"{name} is {value}; give at least 1")
    check_output_dir(str(output_dir), resuming=False)
    prompts = read_prompts(prompts_file)[:limit]
    asked = [_asked(name, prompts) for name in (before, after)]
    folder = make_output_dir(str(output_dir))
    answers = {
        side: _answers(model, max_new_tokens, batch_size, allow_pickle=allow_pickle)
        for side, model in zip(SIDES, asked, strict=True)
    }
    texts = {side: [written.text for written in answers[side]] for side in SIDES}
    judgements = _judged(prompts, texts, judge, folder / JUDGEMENTS)
    record = {
        "schema": SCHEMA,
        "kind": "judge",
        "before": redacted(before),
        "after": redacted(after),
        "commits": {side: model.commit for side, model in zip(SIDES, asked, strict=True)},
        **summary(judgements),
        "judge": redacted(describe(judge)),
        "keyword_refusal_rate": {side: refusal_rate(texts[side]) for side in SIDES},
        "cut_answers": {side: sum(not written.ended for written in answers[side]) for side in SIDES},
        "max_new_tokens": max_new_tokens,
        "files": {  # none of a folder or a data set on the hub
            redacted(str(path)): sha256(path) if path.is_file() else None
            for path in (Path(prompts_file), folder / JUDGEMENTS)
        },
        "limit": limit,
        "seconds": watch.seconds,
        **environment(),
    }
    write_record(folder / RECORD, record)
    for line in told(record):
        say(line)
    say(f"judgements: {folder / JUDGEMENTS}   record: {folder / RECORD}")
    return record


def told(record: dict[str, Any]) -> list[str]:
    """Return the lines that tell a record: the percentages with their intervals, and why there were ties."""
    figures = ", ".join(
        f"{name} {record[name]['percent']:.1f} % [{record[name]['low']:.1f}, {record[name]['high']:.1f}]"
        for name in ("win", "tie", "lose")
    )
    cut, rates = record["cut_answers"], record["keyword_refusal_rate"]
    return [
        f"after against before, {record['prompts']} prompts: {figures}",
        *(f"  {count} ties: {reason}" for reason, count in record["ties"].items()),
        f"keyword refusal rate: {rates['before']:.1f} % -> {rates['after']:.1f} %",
        f"answers cut at {record['max_new_tokens']} tokens: {cut['before']} -> {cut['after']}",
    ]


def _asked(name: str, prompts: list[Prompt]) -> Asked:
    commit = commit_of(name)
    config, tokenizer = read_model_config(name, revision=commit), read_tokenizer(name, revision=commit)
    seq2seq, most = bool(config.is_encoder_decoder), position_limit(config)
    too_long = f"and {name} has {most} positions; shorten it"
    ids = prompt_ids(prompts, tokenizer, seq2seq=seq2seq, longest=most, too_long=too_long)
    return Asked(name, commit, config, tokenizer, ids)


def _answers(asked: Asked, max_new_tokens: int, batch_size: int, *, allow_pickle: bool) -> list[Written]:
    device = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
    model = read_model(asked.name, asked.config, revision=asked.commit, device=device, allow_pickle=allow_pickle).eval()
    bar = progress_bar(f"answers of {Path(asked.name).name}")
    try:
        return greedy_answers(
            model,
            asked.tokenizer,
            asked.prompt_ids,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=bar,
        )
    finally:
        del model  # the other one needs its room
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _judged(prompts: list[Prompt], texts: dict[str, list[str]], judge: Judge, path: Path) -> list[Judgement]:
    """Have all answers judged, each judgement written down at once: it may have been paid for."""
    written = 0

    def keep(judgement: Judgement) -> None:
        nonlocal written
        file.write(json.dumps(asdict(judgement), ensure_ascii=False) + "\n")
        file.flush()
        written += 1

    # A judge may write half of a surrogate pair, which is no UTF-8; JSON has an escape for it.
    with writing(path), path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        try:
            asked = [prompt.text for prompt in prompts]
            return compare(asked, texts["before"], texts["after"], judge, progress_bar("judging"), keep=keep)
        except LoricaError as error:
            raise LoricaError(f"{error}; the {written} prompts judged before that are in {path}") from error
