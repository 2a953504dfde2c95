"""The story of one update: check, measure, protect, train, prove, measure again, save, tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils import logging as transformers_logging

from lorica.config import UpdateConfig, build_config
from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset, load
from lorica.data.validate import Report, validate, write_rejected
from lorica.errors import LoricaError
from lorica.evaluation.evaluator import Score, evaluate
from lorica.methods import METHODS, Protection
from lorica.record import SCHEMA, Stopwatch, environment, peak_memory, write_json
from lorica.report import write_report
from lorica.subspace.calibration import Batch
from lorica.subspace.plan import Plan
from lorica.training.arguments import check_arguments, training_arguments
from lorica.training.checkpoints import checkpoint_to_resume, remove_checkpoints
from lorica.training.models import (
    check_output_dir,
    load_model,
    load_model_config,
    load_tokenizer,
    make_output_dir,
    save_model,
)
from lorica.training.trainer import fit

Say = Callable[[str], None]

CALIBRATION_ROWS = 256
"""How many rows of ``calibration_file`` are used at most."""


def train(config: UpdateConfig | Mapping[str, Any], say: Say = print) -> dict[str, Any]:
    """Update one model with one data set; this is ``lorica train``.

    The output folder gets a plain Hugging Face model with its tokenizer, ``lorica.json`` (the record, also
    returned), ``plan.json``, ``report.html`` and ``report.md``.

    Args:
        config: see ``UpdateConfig``; or its fields, and any of TrainingArguments', by name.
        say: takes each line of what is told along the way.

    Raises:
        LoricaError: anything about the input is wrong; nothing has been written then.
        Interrupted: a signal came; a checkpoint was written.
    """
    settings = config if isinstance(config, UpdateConfig) else build_config(dict(config))
    return Update(settings, say).run()


class Update:
    """One update in its stages. Everything that can be wrong with the input shows before the weights load."""

    def __init__(self, config: UpdateConfig, say: Say = print) -> None:
        self.config, self.say = config, say
        self.watch = Stopwatch()
        given = check_arguments(config.training)
        self.resume = checkpoint_to_resume(given.get("resume_from_checkpoint"), config.output_dir)
        self.keeps_checkpoints = any(name.startswith(("save_", "load_best")) for name in given)
        check_output_dir(config.output_dir, resuming=self.resume is not None)
        self.tokenizer = load_tokenizer(config)
        self.model_config = load_model_config(config)
        self.seq2seq = bool(self.model_config.is_encoder_decoder)
        self.arguments = training_arguments(
            config.training, config.output_dir, hidden_size=_width(self.model_config), seq2seq=self.seq2seq
        )
        self.plan = Plan.load(config.plan_file) if config.plan_file else None
        source = config.train_file or config.dataset_name
        assert source is not None  # build_config sees to it
        self.report = self._validate(source)
        self.data = self._load(source, self.report)
        self.held = {Path(path).stem: self._load(path) for path in config.retention_file}
        self.eval_data = self._load(config.eval_file) if config.eval_file else None
        self.method = METHODS[config.method](self._protection())

    def run(self) -> dict[str, Any]:
        """Carry the update out and return its record."""
        set_seed(self.arguments.seed)
        model = load_model(self.config, self.model_config)
        self.say(self.data.describe())
        self.method.begin_task(model, progress=progress_bar("splitting weights"))
        assert self.method.plan is not None
        self.say(str(self.method.plan))
        output_dir = make_output_dir(self.config.output_dir)
        self.method.plan.save(output_dir / "plan.json")
        if self.report.rejected:
            write_rejected(self.report, output_dir / "rejected.jsonl")
        before = self._scores(model, "before")
        self.say(self._settings())
        log = fit(
            model, self.method, self.data, self.tokenizer, self.arguments,
            eval_dataset=self.eval_data, resume_from_checkpoint=self.resume,
        )  # fmt: skip
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        audit = self.method.audit(model)
        if audit is not None:
            self.say(audit.verdict())
        self.method.end_task(model)
        after = self._scores(model, "after")
        save_model(model, self.tokenizer, output_dir)
        record = self._record(model, before, after, log, trainable, audit.to_records() if audit else [])
        write_json(output_dir / "lorica.json", record)
        page = write_report([output_dir / "lorica.json"], output_dir)
        if not self.keeps_checkpoints:
            remove_checkpoints(output_dir)
        for line in _comparison(before, after):
            self.say(line)
        self.say(f"model: {output_dir}   record: {output_dir / 'lorica.json'}   report: {page}")
        return record

    def _validate(self, path: str) -> Report:
        config = self.config
        return validate(
            path,
            config.dataset_format,
            config.dataset_text_field,
            config.skip_invalid_rows,
            vocab_size=len(self.tokenizer),
            seq2seq=self.seq2seq,
        )

    def _load(self, path: str, report: Report | None = None) -> EncodedDataset:
        config = self.config
        return load(
            path,
            self.tokenizer,
            validated=report or self._validate(path),
            max_length=config.max_length,
            completion_only_loss=config.completion_only_loss,
            assistant_only_loss=config.assistant_only_loss,
            truncation_policy=config.truncation_policy,
            seq2seq=self.seq2seq,
        )

    def _protection(self) -> Protection:
        names = {f.name for f in fields(Protection)} - {"calibration", "plan"}
        given = {name: getattr(self.config, name) for name in names}
        return Protection(**given, calibration=self._calibration(), plan=self.plan)

    def _calibration(self) -> Any:
        config = self.config
        if config.calibration_file is None:
            needed = config.source == "activation" or config.ranks == "importance"
            return config.calibration or (("random" if self.seq2seq else "self") if needed else None)
        if config.calibration is not None:
            raise LoricaError("--calibration and --calibration_file say the same thing; give one of them")
        data = self._load(config.calibration_file)
        collate = Collator(self.tokenizer, seq2seq=self.seq2seq)
        rows = [data[index] for index in range(min(len(data), CALIBRATION_ROWS))]
        batches: list[Batch] = [collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]
        return batches

    def _scores(self, model: Any, when: str) -> dict[str, Any]:
        size = self.arguments.per_device_eval_batch_size
        scores: dict[str, Any] = {"eval": {}, "retention": {}}
        if self.eval_data is not None:
            self.say(f"scoring {when}: {self.config.eval_file}")
            scores["eval"] = evaluate(model, self.eval_data, self.tokenizer, batch_size=size)
        for name, data in self.held.items():
            self.say(f"scoring {when}: {name}")
            scores["retention"][name] = evaluate(model, data, self.tokenizer, batch_size=size)
        return scores

    def _settings(self) -> str:
        a = self.arguments
        batch = a.per_device_train_batch_size * a.gradient_accumulation_steps
        return (
            f"training: learning rate {a.learning_rate:.2g}, {a.num_train_epochs:g} epochs, {batch} rows a step, "
            f"seed {a.seed}"
        )

    def _record(
        self, model: Any, before: Any, after: Any, log: list[dict[str, float]], trainable: int, leakage: list[Any]
    ) -> dict[str, Any]:
        config, plan = self.config, self.method.plan
        assert plan is not None
        return {
            "schema": SCHEMA,
            "kind": "train",
            "method": config.method,
            "label": config.method,
            "seed": self.arguments.seed,
            "model": config.model_name_or_path,
            "model_parameters": model.num_parameters(),
            "learning_rate": self.arguments.learning_rate,
            "scores": {"before": before, "after": after},
            "loss_curve": [
                {"step": row["step"], "loss": row["loss"], "learning_rate": row.get("learning_rate")}
                for row in log
                if "loss" in row
            ],
            "data": self.data.summary,
            "plan": plan.records(),
            "leakage": leakage,
            "cost": {
                "seconds": self.watch.seconds,
                "peak_rss_bytes": peak_memory(),
                "trainable_parameters": trainable,
            },
            "config": config.model_dump(mode="json"),
            **environment(),
        }


def progress_bar(what: str) -> Callable[[str, int, int], None]:
    """Return a progress callback that draws transformers' progress bar, with the time left."""
    bar: Any = None

    def advance(name: str, done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = transformers_logging.tqdm(total=total, desc=what, leave=False)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return advance


def _width(model_config: Any) -> int:
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    for name in ("hidden_size", "d_model", "n_embd"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    raise LoricaError(f"{model_config.model_type}: cannot tell the model's width; give --learning_rate")


def _comparison(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    pairs = [("new task", before["eval"], after["eval"])] if before["eval"] else []
    pairs += [(name, before["retention"][name], after["retention"][name]) for name in before["retention"]]
    return [f"{name}: {_scored(a)} -> {_scored(b)}" for name, a, b in pairs]


def _scored(score: Score) -> str:
    match = score["exact_match"]
    return f"loss {score['loss']:.3f}" + (f", exact match {match:.1f} %" if match is not None else "")
