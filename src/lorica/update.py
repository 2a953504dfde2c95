"""The story of one update: check, measure, protect, train, prove, measure again, save, tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import set_seed

from lorica import processes
from lorica.config import UpdateConfig, build_config
from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset
from lorica.errors import LoricaError
from lorica.evaluation.evaluator import Score, evaluate
from lorica.files import Listing
from lorica.inputs import Inputs
from lorica.lineage import (
    candidate,
    check_forgetting,
    check_single_update,
    combined,
    forgotten,
    keep_memory,
    read_lineage,
    settle,
)
from lorica.memory import size_of
from lorica.methods import METHODS, TaskData, build_method
from lorica.methods.curvature_penalty import strength_for
from lorica.methods.osft import OSFT
from lorica.methods.own_texts import Amount
from lorica.methods.protection import given_options
from lorica.preset import filled_in, with_preset
from lorica.record import Stopwatch, peak_cuda_memory, peak_memory, write_record
from lorica.redaction import cleaned
from lorica.report import write_report
from lorica.subspace.plan import Plan
from lorica.told import comparison, first_steps, foreseen, memory_told, progress_bar
from lorica.training.arguments import check_arguments, check_trackers, training_arguments
from lorica.training.checkpoints import checkpoint_to_resume, kept_bases, remove_checkpoints
from lorica.training.deepspeed import check_deepspeed
from lorica.training.identity import check_identity, write_identity
from lorica.training.in_backward import check_method
from lorica.training.launcher import launcher_settings
from lorica.training.models import (
    load_model,
    load_model_config,
    load_tokenizer,
    model_width,
    pinned,
    position_limit,
    stock_configuration,
)
from lorica.training.optimizers import wide_states
from lorica.training.output import check_output_dir, make_output_dir, save_model
from lorica.training.padding_free import check_keeps_rows_apart
from lorica.training.room import telling_the_way_on
from lorica.training.sharded_state import whole_weights
from lorica.training.sharding import check_sharded, offloads, sharding
from lorica.training.trainer import fit
from lorica.update_record import identity_of, settled

Say = Callable[[str], None]


def _silent(line: str) -> None:
    """Say nothing: the first of several processes does."""


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
    with launcher_settings() as asked:
        settings = settings.model_copy(update={"training": asked | settings.training})
        with processes.working_together(on_host=offloads(settings.training)):
            with processes.agreed():
                made = Update(settings, say)
            return made.run()


class Update:
    """One update in its stages. What can be wrong with the input shows before the weights are trained."""

    def __init__(self, config: UpdateConfig, say: Say = print) -> None:
        self.config = config = pinned(config)
        self.say = cleaned(say) if processes.first() else _silent
        self.watch = Stopwatch()
        given = check_arguments(config.training)
        self.sharding = sharding(given)
        if config.eval_file is None and given.get("eval_strategy", "no") != "no":
            raise LoricaError("--eval_strategy needs rows to score: give --eval_file")
        self.resume = checkpoint_to_resume(
            given.get("resume_from_checkpoint"), config.output_dir, self.say, reset_optimizer=config.reset_optimizer
        )
        self.keeps_checkpoints = any(name.startswith(("save_", "load_best")) for name in given)
        check_output_dir(config.output_dir, resuming=self.resume is not None)
        self.plan = Plan.load(config.plan_file) if config.plan_file else None
        self.tokenizer = load_tokenizer(config)
        self.model_config = load_model_config(config)
        asked = config
        self.config = config = with_preset(asked, self.model_config)
        self.preset_told = filled_in(asked, config)
        self.seq2seq = bool(self.model_config.is_encoder_decoder)
        self.arguments = training_arguments(
            config.training, config.output_dir, hidden_size=model_width(self.model_config), seq2seq=self.seq2seq,
            learning_rate_scale=METHODS[config.method].learning_rate_scale,
            optimizer_in_backward=config.optimizer_in_backward, padding_free=config.padding_free,
        )  # fmt: skip
        check_trackers(self.arguments)
        if self.sharding is not None:
            check_sharded(self.arguments, config.method, vars(config))
        if self.arguments.deepspeed:
            check_deepspeed(self.arguments, config.method, vars(config))
        self.inputs = Inputs(
            config, self.tokenizer, seq2seq=self.seq2seq, position_limit=position_limit(self.model_config)
        )
        self.method = build_method(config.method, self._method_options(), config.method_options)
        self.lineage = read_lineage(config.model_name_or_path)
        check_single_update(config.method)
        check_forgetting(config.max_forgetting, self.inputs.retention)
        if self.resume is not None:
            check_identity(Path(config.output_dir), self._identity(), config.allow_changed)
        elif config.allow_changed:
            raise LoricaError("--allow_changed has no effect without --resume_from_checkpoint")
        elif config.reset_optimizer:
            raise LoricaError("--reset_optimizer has no effect without --resume_from_checkpoint")

    def run(self) -> dict[str, Any]:
        """Carry the update out and return its record."""
        with telling_the_way_on(Path(self.config.output_dir)):
            return self._run()

    def _run(self) -> dict[str, Any]:
        way, lines = processes.by_first(lambda: foreseen(self.config, self.inputs, self.sharding)) or (None, [])
        if self.preset_told:
            self.say(self.preset_told)
        for line in lines if way else []:
            self.say(line)
        set_seed(self.arguments.seed)
        self.method.load_state_dict(self.lineage.memory(self.config.method))
        with processes.agreed():
            model = load_model(self.config, self.model_config, self.arguments.device, self.sharding)
            if self.config.padding_free:
                check_keeps_rows_apart(model)
        for line in self.inputs.describe():
            self.say(line)
        if told := self.lineage.notice(self.config.method):
            self.say(f"notice: {told}")
        with processes.sharing(model):
            plan = self._begin(model)
        for line in [] if way else lines:  # only now: what is wrong with the options is an error by here
            self.say(line)
        output_dir = Path(self.config.output_dir)
        processes.by_first(lambda: self._open(output_dir, plan))
        before = self._scores(model, "before")
        self.say(self._settings())
        if self.config.reset_optimizer:
            self.say("notice: the optimizer begins anew here; the weights will not be those of the undisturbed run")
        with stock_configuration(model):
            log = fit(
                model, self.method, self.method.training_data(self._task()), self.tokenizer, self._task().collate,
                self.arguments, eval_dataset=self.inputs.eval, resume_from_checkpoint=self.resume,
                reset_optimizer=self.config.reset_optimizer, optimizer_in_backward=self.config.optimizer_in_backward,
                padding_free=self.config.padding_free,
            )  # fmt: skip
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        audit = self.method.audit(model) if self.sharding else processes.by_first(lambda: self.method.audit(model))
        if audit is not None:
            self.say(audit.verdict())
        self.method.end_task(model, self._task())
        forgetting = self.method.forgetting
        if forgetting is not None:
            self.say(forgetting.told())
        files = self._save(model, output_dir)  # what was trained is safe then
        after = self._scores(model, "after")
        record = settled(self.config, self.arguments, self.inputs, plan, log) | {
            "scores": {"before": before, "after": after},
            "parent": self.lineage.to_json(),
            "weights_sha256": combined(files),
            "files": files,
            "carried_bytes": size_of(self.method.state_dict()),
            "model_parameters": model.num_parameters(),
            "leakage": audit.to_records() if audit else [],
            "curvature_strength": self._strength(),
            **self._written(),
            "predicted_forgetting": None if forgetting is None else asdict(forgetting),
            "cost": self._cost(trainable) | {"expected_peak_bytes": None if way is None else way.device_bytes},
        }
        record["rejected"] = forgotten(record["scores"], self.config.max_forgetting)
        processes.by_first(lambda: self._finish(output_dir, record))
        return record

    def _strength(self) -> float:
        """Return the strength of the curvature penalty, in numbers."""
        return strength_for(self.config.curvature_penalty, self.inputs.train, causal=not self.seq2seq)

    def _written(self) -> dict[str, int]:
        """Return how much was written to be rehearsed, in numbers."""
        amount = self._amount()
        return {"rehearse_tokens": amount.tokens, "rehearse_length": amount.length}

    def _amount(self) -> Amount:
        found = self.method.amount(self._task()) if isinstance(self.method, OSFT) else None
        return found or Amount(0, 0)

    def _open(self, output_dir: Path, plan: Plan | None) -> None:
        """Write what is known before training."""
        make_output_dir(self.config.output_dir)
        write_identity(output_dir, self._identity())
        if plan is not None:
            plan.save(output_dir / "plan.json")
        self.inputs.write_rejected(output_dir)

    def _save(self, model: Any, output_dir: Path) -> Listing:
        target = output_dir if self.config.max_forgetting is None else candidate(output_dir)
        weights = whole_weights(model)

        def written() -> Listing:
            return save_model(model, self.tokenizer, target, weights) | keep_memory(target, self.method.state_dict())

        return processes.by_first(written) or {}

    def _cost(self, trainable: int) -> dict[str, Any]:
        return {
            "seconds": self.watch.seconds,
            "peak_rss_bytes": peak_memory(),
            "peak_cuda_bytes": peak_cuda_memory(),
            "trainable_parameters": trainable,
        }

    def _begin(self, model: Any) -> Plan | None:
        self.method.kept = kept_bases(self.resume)
        what = "splitting weights" if self.method.kept is None else "reading the bases of the weights"
        for line in first_steps(self.config, self.inputs, self._strength(), self._amount().tokens):
            self.say(line)
        self.method.begin_task(model, self._task(), progress=progress_bar(what))
        if self.config.optimizer_in_backward:
            check_method(self.method)
        if told := wide_states(self.arguments, model):
            self.say(f"notice: {told}")
        if self.method.plan is not None:
            self.say(str(self.method.plan))
        return self.method.plan

    def _finish(self, output_dir: Path, record: dict[str, Any]) -> None:
        kept = settle(output_dir, self.config.max_forgetting, record["rejected"])
        write_record(output_dir / "lorica.json", record)
        page = write_report([output_dir / "lorica.json"], output_dir)
        if not self.keeps_checkpoints:
            remove_checkpoints(output_dir)
        self.say(memory_told(record["cost"], record["model_parameters"]))
        for line in comparison(record["scores"]["before"], record["scores"]["after"]):
            self.say(line)
        for name, points in record["rejected"].items():
            self.say(
                f"rejected: {name} lost {points:.1f} points, and --max_forgetting is {self.config.max_forgetting:g}"
            )
        self.say(f"model: {kept}   record: {output_dir / 'lorica.json'}   report: {page}")

    def _method_options(self) -> dict[str, Any]:
        """Return the options of the configuration that were given and are the method's too.

        Raises:
            LoricaError: one that the method does not have.
        """
        config = self.config
        given = given_options(config) | {
            "calibration": self.inputs.calibration(), "plan": self.plan, "prompts": self.inputs.prompts,
        }  # fmt: skip
        known = {f.name for f in fields(METHODS[config.method].options_type)}
        for name in sorted(given.keys() - known):
            if given.pop(name) is not None:
                told = "prompts_file" if name == "prompts" else name
                raise LoricaError(f"{told} has no effect with method {config.method!r}")
        return given

    def _task(self) -> TaskData:
        rows = self.inputs.train
        collate = Collator(self.tokenizer, seq2seq=self.seq2seq)
        index = self.lineage.updates
        return TaskData(Path(self.config.source_of_rows).stem, index, index + 1, rows, collate, self.arguments.seed)

    def _identity(self) -> dict[str, Any]:
        return identity_of(
            self.config, self.arguments, self.inputs, self.lineage, sharded=self.sharding is not None
        )  # fmt: skip

    def _scores(self, model: Any, when: str) -> dict[str, Any]:
        size = self.arguments.per_device_eval_batch_size

        def score(name: str, data: EncodedDataset) -> Score:
            bar = progress_bar(f"scoring {name} {when}")
            return evaluate(model, data, self.tokenizer, batch_size=size, progress=bar)

        return {
            "eval": score("the new task", self.inputs.eval) if self.inputs.eval else {},
            "retention": {name: score(name, data) for name, data in self.inputs.retention.items()},
        }

    def _settings(self) -> str:
        a = self.arguments
        length = f"{a.max_steps} steps" if a.max_steps > 0 else f"{a.num_train_epochs:g} epochs"
        rows = a.per_device_train_batch_size * a.gradient_accumulation_steps * a.world_size
        return f"training: learning rate {a.learning_rate:.2g}, {length}, {rows} rows a step, seed {a.seed}"
