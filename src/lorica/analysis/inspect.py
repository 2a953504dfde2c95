"""``lorica inspect``: look at a model before training it. Are its small directions free? What would be protected?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.analysis.curvature import LARGEST_MODEL, curvatures, spearman
from lorica.analysis.interventions import Interventions, removals, score_removals
from lorica.analysis.layers import describe_layer
from lorica.analysis.options import CURVATURE_ROWS, FRACTIONS, SIDES, InspectOptions
from lorica.constrain.linear import matrix_of
from lorica.constrain.planning import plan as make_plan
from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset, load
from lorica.errors import LoricaError
from lorica.evaluation.evaluator import Score, evaluate
from lorica.evaluation.generate import Progress
from lorica.files import write_text
from lorica.hub import commits
from lorica.record import SCHEMA, Stopwatch, environment, peak_memory, redacted, write_record
from lorica.redaction import cleaned
from lorica.report.inspection import inspection_part, inspection_text
from lorica.report.inspection_record import InspectionRecord
from lorica.report.page import html_report, markdown_report
from lorica.subspace.calibration import Batch, own_text, random_tokens
from lorica.subspace.observe import observe
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import MEASURED
from lorica.training.models import pinned, position_limit, read_model, read_model_config, read_tokenizer
from lorica.training.output import make_output_dir
from lorica.units import count, duration

CALIBRATION_ROWS = 256
"""How many rows of ``calibration_file`` are used at most."""

Say = Callable[[str], None]
Bars = Callable[[str], Progress]
"""From what is being done to the callback that is told how far it is; ``lorica.told.progress_bar`` is one."""


def inspect_model(options: InspectOptions, say: Say = print, bars: Bars | None = None) -> dict[str, Any]:
    """Measure a model and write what was found; nothing is trained and the model is not changed.

    For every weight that ``lorica.plan`` would constrain: its spectrum and effective rank, how much it turns its
    inputs, and how much of the inputs' energy the directions that would be protected hold. With ``task_file``
    also what is lost when the largest or the smallest directions are removed, and whether the loss is flat along
    the small ones.

    Args:
        options: what to look at.
        say: takes each line of what is told along the way.
        bars: makes a progress callback for each long part.

    Returns:
        The record that is in ``inspect.json``.

    Raises:
        LoricaError: the model or a file cannot be used, or options do not fit it.
    """
    return Inspection(options, say, bars).run()


class Inspection:
    """One look at one model, in its stages. Files are checked before weights are loaded."""

    def __init__(self, options: InspectOptions, say: Say = print, bars: Bars | None = None) -> None:
        self.options = options = pinned(options)
        self.say = cleaned(say)
        self.bar: Callable[[str], Progress | None] = bars or (lambda _: None)
        self.watch = Stopwatch()
        name, more = options.model_name_or_path, self._loading()
        self.tokenizer = read_tokenizer(name, **more)
        config = read_model_config(name, **more)
        self.seq2seq = bool(config.is_encoder_decoder)
        if options.calibration == "self" and self.seq2seq:
            raise LoricaError(
                f"--calibration self: {name} is an encoder-decoder, which does not write by itself; give "
                "--calibration random or --calibration_file"
            )
        self.max_length = min(options.max_length, position_limit(config) or options.max_length)
        self.task = self._load(options.task_file)
        self.calibration_rows = self._load(options.calibration_file)
        self.output_dir = make_output_dir(str(options.output_dir))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        more["allow_pickle"] = options.allow_pickle
        self.model = read_model(name, config, dtype=options.dtype, device=device, **more)
        self.curvature_rows = self._curvature_rows()

    def run(self) -> dict[str, Any]:
        """Measure everything, write the record and its pages, and print what they say."""
        self.say(f"inputs of the layers: {self._shown()}")
        batches = self._calibration()
        plan = self._plan(batches)
        layers = {name: self.model.get_submodule(name) for name in plan.names()}
        record = self._head() | {"family": plan.family, "layers": self._layers(plan, layers, batches)}
        if self.task is not None:
            record |= self._interventions(layers, self.task)
            record |= self._curvature(layers, self.task)
        record |= {"cost": {"seconds": self.watch.seconds, "peak_rss_bytes": peak_memory()}, **environment()}
        self._write(record)
        return record

    def _calibration(self) -> list[Batch]:
        if self.calibration_rows is not None:
            indices = list(range(min(len(self.calibration_rows), CALIBRATION_ROWS)))
            size = 1 if self.seq2seq else self.options.batch_size  # nothing marks the padding of a decoder's inputs
            return self._batches(self.calibration_rows, indices, size)
        if self._shown() == "self":
            return list(own_text(self.model))
        return list(random_tokens(self.model.get_input_embeddings().num_embeddings, decoder=self.seq2seq))

    def _shown(self) -> str:
        """Return what the layers are shown: a file's path, "self" or "random"."""
        default = "random" if self.seq2seq else "self"
        return str(self.options.calibration_file or self.options.calibration or default)

    def _plan(self, batches: list[Batch]) -> Plan:
        options = self.options
        measured = options.source in MEASURED or options.ranks == "importance"
        return make_plan(
            self.model, options.unfreeze_rank_ratio, ranks=options.ranks, source=options.source,
            target_modules=options.target_modules, freeze_experts=options.freeze_experts,
            calibration=batches if measured else None,
        )  # fmt: skip

    def _layers(self, plan: Plan, layers: dict[str, nn.Module], batches: list[Batch]) -> list[dict[str, Any]]:
        seen = observe(self.model, layers, batches, moments=True)
        advance, described = self.bar("spectra"), []
        for done, (entry, planned) in enumerate(zip(plan.entries, plan.records(), strict=True), start=1):
            factors = plan.factors(entry.name)
            described.append(planned | describe_layer(matrix_of(layers[entry.name]), entry, seen[entry.name], factors))
            if advance is not None:
                advance(entry.name, done, len(plan))
        return described

    def _interventions(self, layers: dict[str, nn.Module], task: EncodedDataset) -> dict[str, Any]:
        options = self.options
        wanted = removals(layers, options.fractions or FRACTIONS, options.which or SIDES, per_layer=options.per_layer)
        self.say(f"interventions: the {len(task)} rows of {options.task_file} are scored {1 + len(wanted)} times")
        watch = Stopwatch()
        before = self._score(task)
        self.say(f"once took {duration(watch.seconds)}; all take about {duration(watch.seconds * (1 + len(wanted)))}")
        rows = score_removals(Interventions(layers), wanted, lambda: self._score(task), self.bar("interventions"))
        return {"task": redacted(task.summary), "before": before, "interventions": rows}

    def _score(self, task: EncodedDataset) -> Score:
        return evaluate(self.model, task, self.tokenizer, batch_size=self.options.batch_size)

    def _curvature(self, layers: dict[str, nn.Module], task: EncodedDataset) -> dict[str, Any]:
        """Return the rank correlation of each layer, by name; nothing where it is not wanted or not possible."""
        rows = min(self.curvature_rows, len(task))
        if rows == 0:
            return {}
        indices = [index * len(task) // rows for index in range(rows)]
        found = curvatures(self.model, layers, self._batches(task, indices, 1), self.bar("curvature"))
        correlations = {name: spearman(sigma.cpu(), curvature.cpu()) for name, (sigma, curvature) in found.items()}
        return {"curvature": {"rows": rows, "spearman": correlations}}

    def _curvature_rows(self) -> int:
        """Return over how many rows curvature is averaged; 0 of a model that is too large, unless asked for."""
        wanted, parameters = self.options.curvature_rows, self.model.num_parameters()
        if self.task is None:
            return 0
        if wanted == 0 or parameters <= LARGEST_MODEL:
            return CURVATURE_ROWS if wanted is None else wanted
        reason = f"no curvature of {count(parameters)} parameters is measured, {count(LARGEST_MODEL)} at most"
        if wanted is None:
            self.say(reason)
            return 0
        raise LoricaError(f"--curvature_rows {wanted}: {reason}; give 0")

    def _batches(self, data: EncodedDataset, indices: list[int], size: int) -> list[Batch]:
        collate = Collator(self.tokenizer, seq2seq=self.seq2seq)
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        return [collate([data[index] for index in part]) for part in parts]

    def _load(self, path: str | Path | None) -> EncodedDataset | None:
        if path is None:
            return None
        return load(path, self.tokenizer, max_length=self.max_length, seq2seq=self.seq2seq)

    def _loading(self) -> dict[str, Any]:
        return {"revision": self.options.model_revision, "trust_remote_code": self.options.trust_remote_code}

    def _head(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "inspect",
            "model": redacted(Path(self.options.model_name_or_path).name),
            "commits": commits(self.options.model_name_or_path, self.options.model_revision),
            "model_parameters": self.model.num_parameters(),
            "calibration": redacted(self._shown()),
            "options": redacted({name: _plain(value) for name, value in asdict(self.options).items()}),
        }

    def _write(self, record: dict[str, Any]) -> None:
        path = self.output_dir / "inspect.json"
        write_record(path, record)
        # The pages say what the file says, and nothing else.
        told = InspectionRecord.model_validate_json(path.read_bytes())
        part = inspection_part(told)
        write_text(self.output_dir / "inspect.html", html_report([part]))
        write_text(self.output_dir / "inspect.md", markdown_report([part]))
        self.say(inspection_text(told))
        self.say(f"record: {path}   report: {self.output_dir / 'inspect.html'}")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
