"""What all cells of a run share: the stream, the model's kind, the encoded rows, and how a method is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from lorica.benchmarks import check_data, find_stream
from lorica.data.collate import Collator
from lorica.data.dataset import Kind
from lorica.data.scored import Scored, Task
from lorica.data.stream import TaskStream
from lorica.errors import LoricaError
from lorica.evaluation.metrics import checked
from lorica.evaluation.scorer import TaskScores, check_answers, check_choices
from lorica.experiments.abilities import FromFile, FromHarness, HeldOut, check_harness, named_ability
from lorica.experiments.arguments import check_training, layered
from lorica.experiments.chosen import check_orders, chosen_settings
from lorica.experiments.config import RunConfig
from lorica.experiments.rows import Rows, longest_row
from lorica.inputs import prompts_of
from lorica.lineage import weights_sha256
from lorica.methods import METHODS, Method
from lorica.names import check_folder_name
from lorica.training.arguments import check_arguments, check_trackers, default_learning_rate, training_arguments
from lorica.training.classifiers import read_any_config, read_classifier
from lorica.training.deepspeed import check_deepspeed
from lorica.training.models import model_width, pinned, read_model, read_tokenizer
from lorica.training.sharding import OPTIONS as SHARDING
from lorica.training.sharding import check_sharded, sharding


class Setup:
    """Everything about a run that is the same for each of its cells; what can be wrong with it shows here.

    Args:
        config: of the run.
        stream: used instead of ``config.stream``, by who has one already.

    Raises:
        LoricaError: the stream, its files, the methods' settings, the training arguments or the model cannot be used.
    """

    def __init__(self, config: RunConfig, stream: TaskStream | None = None) -> None:
        found = stream or find_stream(config.stream)
        self.config = config = pinned(config.model_copy(update={"seeds": config.seeds or found.seeds or [0]}))
        self.stream = found.within(config.data_dir).only(config.tasks)
        self.orders: list[str | None] = list(config.orders) or [next(iter(self.stream.orders), None)]
        check_orders(self.stream, self.orders)
        self.held_out = self._held_out()
        check_data(self._wanted(), config.data_dir, trains=True)
        self.settings = chosen_settings(config, self.stream)
        self.tokenizer = read_tokenizer(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
        self.model_config, classifies = read_any_config(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
        self.kind: Kind = (
            "classifier" if classifies else "seq2seq" if self.model_config.is_encoder_decoder else "causal"
        )
        self._prompts: dict[str, list[list[int]]] = {}
        self.training = self.stream.training | config.training
        for name, one in self.settings.items():
            self.build_method(name)
            check_training(self.training | one.training, self._where(name))
            if own := next((option for option in SHARDING if option in one.training), None):
                raise LoricaError(f"{self._where(name)}: --{own} is for all methods: give it to lorica run")
        self.sharding = sharding(check_arguments(self.training))
        for name in (*self.settings, *(order for order in self.orders if order is not None)):
            check_folder_name(name, "settings or order")
        choices = dict.fromkeys(choice for task in self.stream.tasks for choice in task.choices)
        self.labels = list(choices) if self.kind == "classifier" else []
        self.collate = Collator(self.tokenizer, seq2seq=self.kind == "seq2seq", classifier=self.kind == "classifier")
        self._check_harness()
        self.rows = Rows(config, self.stream, self.held_out, self.tokenizer, self.model_config, self.kind, self.labels)
        self.base_scores: dict[tuple[str, bool], TaskScores] = {}
        self._check_rows()
        self._check_arguments()

    def _held_out(self) -> list[HeldOut]:
        config = self.config
        own: list[HeldOut] = [FromFile(self.stream, ability) for ability in self.stream.held_out]
        more = [named_ability(name, config.data_dir, config.max_test_rows) for name in config.held_out]
        every = [*own, *(one for found in more for one in found)]
        names = [one.name for one in every] + [task.name for task in self.stream.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise LoricaError(f"--held_out: the name {twice!r} is taken by another ability or a task of the stream")
        return every

    def _wanted(self) -> list[tuple[TaskStream, Scored]]:
        """Return what is learned, in any of the orders, and what is held out in files, with its stream."""
        tasks = {task.name: task for order in self.orders for task in self.stream.in_order(order)}
        if not tasks:
            raise LoricaError(f"stream {self.stream.name!r} has no task to learn; lorica eval scores its abilities")
        held = [(one.stream, one.scored) for one in self.held_out if isinstance(one, FromFile)]
        return [*((self.stream, task) for task in tasks.values()), *held]

    def _check_harness(self) -> None:
        harness = [one.name for one in self.held_out if isinstance(one, FromHarness)]
        if harness and self.kind == "classifier":
            raise LoricaError(f"--held_out {harness[0]}: lm-eval scores models that write; this one classifies")
        check_harness(harness, "--held_out", require_pinned=self.config.require_pinned)

    def _check_rows(self) -> None:
        """Read every file once, so that what is wrong with the last task shows before the first is learned."""
        for _, scored in self._wanted():
            for metric in (scored.metric, *scored.metrics_beside):
                checked(metric)
            check_choices(scored)
            check_answers(self.rows.test(scored.name))
            if self.kind == "classifier" and (foreign := [one for one in scored.choices if one not in self.labels]):
                raise LoricaError(f"ability {scored.name!r}: its choice {foreign[0]!r} is no class of the stream's")
            if isinstance(scored, Task):
                self.rows.train(scored.name)
                if len(self.config.learning_rates) > 1:
                    self.rows.split(scored.name)

    def _check_arguments(self) -> None:
        if self.config.padding_free and self.kind == "classifier":
            raise LoricaError("--padding_free is for causal models; this one classifies, so leave it out")
        if self.sharding is not None and self.kind == "classifier":
            raise LoricaError("--fsdp is for models that write text; this one classifies, so leave it out")
        for name, settings in self.settings.items():
            for task in self.stream.tasks:
                arguments = self.arguments("", self.config.seeds[0], None, name=name, task=task)
            if self.sharding is not None:
                with self._naming(name):
                    check_sharded(arguments, settings.method, vars(self.build_method(name).options) | settings.options)
            if arguments.deepspeed:
                with self._naming(name):
                    check_deepspeed(arguments, settings.method, vars(self.build_method(name).options))
        check_trackers(arguments)

    def _where(self, name: str) -> str:
        return f"stream {self.stream.name!r}, method {name!r}"

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Begin what is wrong with a method's settings by their name."""
        try:
            yield
        except LoricaError as error:
            raise LoricaError(f"{self._where(name)}: {error}") from error

    @cached_property
    def weights_sha256(self) -> str | None:
        """One digest of the weight files of the model that came in; None for a name on the hub."""
        return weights_sha256(Path(self.config.model_name_or_path).expanduser())

    def describe(self) -> list[str]:
        """Return the lines printed before the first method starts."""
        stream, config = self.stream, self.config
        tasks = [task.name for task in stream.in_order(self.orders[0])]
        lines = [f"stream {stream.name}, version {stream.version}: {', '.join(tasks)}"]
        if stream.left_out:
            lines.append(f"notice: a subset of the stream; left out: {', '.join(stream.left_out)}")
        lines += [f"notice: {told}" for told in (*self._cuts(), *self.rows.notices(tasks))]
        lines.append(
            f"methods: {', '.join(self.settings)}   seeds: {' '.join(map(str, config.seeds))}"
            + (f"   orders: {' '.join(map(str, self.orders))}" if stream.orders else "")
        )
        return lines

    def _cuts(self) -> list[str]:
        cuts = {"training": self.config.max_train_rows, "scored": self.config.max_test_rows}
        return [f"at most {limit} {what} rows of each task" for what, limit in cuts.items() if limit]

    def read_model(self, folder: str | None = None) -> tuple[Any, list[str]]:
        """Return the model that came in, or the one a folder holds, and the patterns of new parameters that train.

        What has no weights, a classifier's head, is drawn by the first seed: it is the same for every cell.
        """
        config = self.config
        set_seed(config.seeds[0])
        options: dict[str, Any] = {"dtype": config.dtype, "attn_implementation": config.attn_implementation}
        options |= {"device": self.arguments("", 0, None).device, "trust_remote_code": config.trust_remote_code}
        options |= {"allow_pickle": config.allow_pickle and folder is None}
        options |= {"revision": config.model_revision if folder is None else None}
        name = folder or config.model_name_or_path
        if self.kind == "classifier":
            return read_classifier(name, self.labels, **options)
        return read_model(name, self.model_config, sharding=self.sharding, **options), []

    def build_method(self, name: str, train_also: list[str] | None = None) -> Method:
        """Return a new method by its settings; ``train_also`` is added to what they say."""
        settings = self.settings[name]
        options = dict(settings.options)
        if train_also:
            options["train_also"] = [*options.get("train_also", []), *train_also]
        with self._naming(name):
            if "prompts_file" in options and "prompts" in {
                f.name for f in fields(METHODS[settings.method].options_type)
            }:
                options["prompts"] = self.prompts(options.pop("prompts_file"))
            return METHODS[settings.method].build(options)

    def prompts(self, file: str) -> list[list[int]]:
        """Return the token ids of the prompts in a ``prompts_file``, which lies where the stream's files do."""
        if self.kind == "classifier":
            raise LoricaError("prompts_file is for models that write text; this one classifies, so leave it out")
        if file not in self._prompts:
            longest = longest_row(self.config, self.stream, self.model_config)
            path = self.stream.path(file)
            self._prompts[file] = prompts_of(path, self.tokenizer, seq2seq=self.kind == "seq2seq", max_length=longest)
        return self._prompts[file]

    def arguments(
        self, output_dir: str, seed: int, learning_rate: float | None, *, name: str | None = None,
        task: Task | None = None,
    ) -> TrainingArguments:  # fmt: skip
        """Return the training arguments for one task of one method.

        The run's come before those of the method's settings, these before the task's epochs and the stream's.
        """
        epochs = {"num_train_epochs": task.num_train_epochs} if task and task.num_train_epochs else {}
        own = self.settings[name].training if name else {}
        given = layered(self.stream.training, epochs, own, self.config.training)
        rate = 1.0 if learning_rate is None else learning_rate
        given |= {"seed": seed, "learning_rate": rate * (task.learning_rate_scale if task else 1.0)}
        return training_arguments(
            given, output_dir, hidden_size=None, seq2seq=self.kind == "seq2seq", padding_free=self.config.padding_free
        )

    def grid(self, name: str) -> list[float]:
        """Return the learning rates to choose from, ascending: as many for every method."""
        return sorted(rate * self.settings[name].grid_scale for rate in self.config.learning_rates)

    def rate(self, name: str) -> float:
        """Return the one learning rate where there is no choice.

        It is the run's, else the settings', else the default for the model's width and the method.
        """
        settings = self.settings[name]
        if self.config.learning_rates:
            return self.grid(name)[0]
        if settings.learning_rate is not None:
            return settings.learning_rate
        width = model_width(self.model_config)
        if width is None:
            raise LoricaError("the model's width cannot be told; give --learning_rates")
        return default_learning_rate(width) * METHODS[settings.method].learning_rate_scale
