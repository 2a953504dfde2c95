"""The story of ``lorica eval``: one model on files of rows, streams of tasks and lm-eval tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lorica.benchmarks import catalogue, check_data, find_stream
from lorica.bootstrap import interval
from lorica.data.dataset import EncodedDataset
from lorica.data.positions import position_limit
from lorica.data.scored import Scored
from lorica.data.stream import TaskStream
from lorica.data.task_rows import load_rows
from lorica.errors import LoricaError
from lorica.evaluation.metrics import checked, majority_floor
from lorica.evaluation.scorer import check_answers, score_task
from lorica.experiments.abilities import check_harness, is_rows, rows_of
from lorica.hub import commits
from lorica.lineage import weights_sha256
from lorica.record import SCHEMA, Stopwatch, environment, redacted, write_json
from lorica.redaction import cleaned
from lorica.scoring_options import EvalOptions
from lorica.training.models import pinned, read_model, read_model_config, read_tokenizer
from lorica.yaml_file import compose_yaml, top_names

Say = Callable[[str], None]


def evaluate_model(options: EvalOptions, say: Say = print) -> dict[str, Any]:
    """Score a model and return the record: for each task its mean, its 95 % interval and its rows.

    Raises:
        LoricaError: a task, a file or the model cannot be used; files show before the model is loaded.
    """
    return Evaluation(options, say).run()


class Evaluation:
    """One model on some tasks. What is wrong with a file shows before the weights are loaded."""

    def __init__(self, options: EvalOptions, say: Say) -> None:
        self.options = options = pinned(options)
        self.say, self.watch = cleaned(say), Stopwatch()
        if options.output_file and not Path(options.output_file).parent.is_dir():
            raise LoricaError(f"--output_file {options.output_file}: there is no such folder")
        self.harness = [task for task in options.tasks if not _is_ours(task)]
        check_harness(self.harness, "--tasks", require_pinned=options.require_pinned)
        found = _named(self._scored())
        check_data(found.values(), options.data_dir, trains=False)
        name, more = options.model_name_or_path, {"revision": options.model_revision}
        trust = options.trust_remote_code
        self.tokenizer = read_tokenizer(name, trust_remote_code=trust, **more)
        self.model_config = read_model_config(name, trust_remote_code=trust, **more)
        self.kind = "seq2seq" if self.model_config.is_encoder_decoder else "causal"
        self.rows = {name: (scored, self._rows(stream, scored)) for name, (stream, scored) in found.items()}

    def run(self) -> dict[str, Any]:
        """Score everything and return the record."""
        options = self.options
        model = read_model(
            options.model_name_or_path, self.model_config, dtype=options.dtype, revision=options.model_revision,
            trust_remote_code=options.trust_remote_code, allow_pickle=options.allow_pickle, device=_device(),
        )  # fmt: skip
        scores = {}
        for name, (scored, rows) in self.rows.items():
            scores[name] = self._score(model, scored, rows)
            self.say(_line(name, scores[name]))
        record = {"schema": SCHEMA, "kind": "eval", "model": redacted(options.model_name_or_path), "scores": scores}
        record |= {"commits": commits(options.model_name_or_path, options.model_revision)}
        record |= {"lm_eval": self._lm_eval(model) if self.harness else None}
        record |= {"weights_sha256": self._weights(), "seconds": self.watch.seconds}
        record |= {"options": redacted(options.model_dump(mode="json")), **environment()}
        if options.output_file:
            write_json(Path(options.output_file), record)
        return record

    def _scored(self) -> Iterable[tuple[str, TaskStream, Scored]]:
        for task in self.options.tasks:
            if not _is_ours(task):
                continue
            if is_rows(task):
                rows = rows_of(task, "--tasks", self.options.metric)
                yield rows.name, rows.stream, rows.scored
                continue
            stream = find_stream(task).within(self.options.data_dir)
            wanted = self.options.only
            stream.only(wanted)  # names that there are
            for scored in (*stream.in_order(None), *stream.held_out):
                if not wanted or scored.name in wanted:
                    yield f"{stream.name}/{scored.name}", stream, scored

    def _rows(self, stream: TaskStream, scored: Scored) -> Any:
        for metric in (scored.metric, *scored.metrics_beside):
            checked(metric)
        asked = self.options.max_length
        rows = load_rows(
            stream, scored, "test", self.tokenizer, kind=self.kind,  # type: ignore[arg-type]
            max_length=min(asked, position_limit(self.model_config) or asked), limit=self.options.limit,
            require_pinned=self.options.require_pinned,
        )  # fmt: skip
        check_answers(rows)
        return rows

    def _score(self, model: Any, scored: Scored, rows: Any) -> dict[str, Any]:
        options = self.options
        found = score_task(
            model, rows, self.tokenizer, scored, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
        )
        whole = interval({scored.name: found.rows})
        how = "accuracy of the likeliest choice" if scored.scoring == "choose" else scored.metric
        return {
            "score": whole.mean, "low": whole.low, "high": whole.high, "metric": how, "beside": found.beside,
            "floor": self._floor(scored, rows), "rows": len(found.rows), "data": redacted(rows.summary),
        }  # fmt: skip

    def _floor(self, scored: Scored, rows: EncodedDataset) -> float | None:
        return majority_floor([row.answer or "" for row in rows.examples]) if scored.choices else scored.floor

    def _lm_eval(self, model: Any) -> dict[str, Any]:
        from lorica.evaluation.harness import lm_eval_record

        options = self.options
        record = lm_eval_record(
            model, self.tokenizer, self.harness, num_fewshot=options.num_fewshot, limit=options.limit,
            batch_size=options.batch_size, allow_task_code=options.allow_task_code,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )  # fmt: skip
        for task, metrics in record["scores"].items():
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if value is not None)
            self.say(f"{task} (lm-eval {record['lm_eval_version']}): {shown}")
        return record

    def _weights(self) -> str | None:
        folder = Path(self.options.model_name_or_path).expanduser()
        return weights_sha256(folder) if folder.is_dir() else None


def _named(found: Iterable[tuple[str, TaskStream, Scored]]) -> dict[str, tuple[TaskStream, Scored]]:
    """Name what is scored: STREAM/TASK, or a file's stem; its path where two share a stem."""
    every = list(found)
    names = [name for name, _, _ in every]
    named = {name if names.count(name) == 1 else scored.test_file: (stream, scored) for name, stream, scored in every}
    if len(named) < len(every):
        raise LoricaError(f"--tasks names {next(name for name in names if names.count(name) > 1)!r} twice")
    return named


def _is_ours(task: str) -> bool:
    path = Path(task)
    if path.suffix in (".yaml", ".yml"):
        return "task" not in top_names(compose_yaml(path, "stream"))  # lm-eval has one task, streams have tasks
    return task in catalogue() or is_rows(task)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _line(name: str, score: dict[str, Any]) -> str:
    beside = "".join(f"   {metric} {value:.1f}" for metric, value in score["beside"].items())
    floor = "" if score["floor"] is None else f"   (always the most frequent answer: {score['floor']:.1f})"
    return (
        f"{name}: {score['score']:.1f} % [{score['low']:.1f}, {score['high']:.1f}] {score['metric']}, "
        f"{score['rows']} rows{beside}{floor}"
    )
