"""``eval``, ``judge`` and ``inspect``: the commands that measure one model, or two against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorica.commands.options import given_values, takes_options_of
from lorica.errors import LoricaError
from lorica.scoring_options import EvalOptions
from lorica.values import validated


@takes_options_of(EvalOptions, positional=["model_name_or_path"])
def evaluate(ctx: typer.Context, config: str | None, **given: Any) -> None:
    """Score a model on files of rows, benchmarks and lm-eval tasks.

    MODEL is a folder or a name on the hub. Example: lorica eval OUT --tasks new.jsonl general arc_easy
    """
    from lorica.scoring import evaluate_model
    from lorica.values import read_config

    evaluate_model(validated(EvalOptions, (read_config(config) if config else {}) | given_values(given)))


def judge(
    before: Annotated[str, typer.Argument(help="The model before: a folder or a name on the hub.")],
    after: Annotated[str, typer.Argument(help="The model after.")],
    prompts_file: Annotated[str, typer.Option("--prompts_file", help="Prompts: .jsonl, .json or one a line in .txt.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Gets judgements.jsonl and judge.json.")],
    judge_function: Annotated[
        str | None,
        typer.Option("--judge_function", help="A scorer of yours: package.module:function or file.py:function."),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option("--judge_url", help="An OpenAI-compatible endpoint; prompts and answers go there.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option("--judge_model", help="Name of the endpoint's model.")] = None,
    judge_api_key_env: Annotated[
        str, typer.Option("--judge_api_key_env", help="Environment variable of the key; empty: no key.")
    ] = "OPENAI_API_KEY",
    judge_prompt_file: Annotated[
        Path | None, typer.Option("--judge_prompt_file", help="Instruction to the endpoint, instead of ours.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Scores of --judge_function that differ by no more are a tie.")
    ] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="Longest answer.")] = 256,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Prompts at a time.")] = 8,
    limit: Annotated[int | None, typer.Option("--limit", help="At most so many prompts.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow_pickle", help="Take folders whose weights are pickles (*.bin) as well.")
    ] = False,
) -> None:
    """Judge a model after training against the one before it: win, tie and lose, both orders of every pair."""
    if (judge_function is None) == (judge_url is None):
        raise LoricaError("give who judges: --judge_function or --judge_url (one of them)")
    if (judge_url is None) != (judge_model is None):
        raise LoricaError("--judge_url and --judge_model belong together")
    if judge_url is None and judge_prompt_file is not None:
        raise LoricaError("--judge_prompt_file has no effect without --judge_url")
    from lorica.judging import judge_models

    who: Any
    if judge_function is not None:
        from lorica.evaluation.function_judge import local_judge

        who = local_judge(judge_function, tolerance=tolerance)
    else:
        from lorica.evaluation.endpoint import PROMPT, EndpointJudge

        assert judge_url is not None
        assert judge_model is not None
        template = PROMPT if judge_prompt_file is None else _read(judge_prompt_file)
        key = judge_api_key_env or None
        who = EndpointJudge(judge_url, judge_model, api_key_env=key, prompt_template=template)
    judge_models(
        before, after, prompts_file, judge=who, max_new_tokens=max_new_tokens, batch_size=batch_size, limit=limit,
        output_dir=output_dir, allow_pickle=allow_pickle,
    )  # fmt: skip


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoricaError(f"--judge_prompt_file {path}: cannot read it: {error}") from error
