"""``lorica check``: read the configuration and the data, take a dry step, and tell what the run will need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lorica.config import UpdateConfig
from lorica.constrain.origin import MEMORY_MODES
from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.files import free_bytes
from lorica.forecast.batches import batches_of
from lorica.forecast.communication import Layout, sizes_of, units_of
from lorica.forecast.devices import shares
from lorica.forecast.dry_model import assumptions, begin, blank_model
from lorica.forecast.dry_run import Batch, Step, dry_score, dry_step
from lorica.forecast.measuring import Measuring, dry_measure, shown
from lorica.forecast.needs import (
    Disk,
    Phase,
    audit_workspace,
    disk,
    largest,
    phases,
    protected_directions,
    split_workspace,
)
from lorica.forecast.options import ForecastConfig, build_forecast_config
from lorica.forecast.rates import Machine, split_seconds, this_machine, unmeasured_machine
from lorica.forecast.result import Forecast, Way
from lorica.inputs import Inputs
from lorica.lineage import read_lineage
from lorica.methods import METHODS, TaskData
from lorica.methods.base import Method
from lorica.methods.carried import LONGEST
from lorica.methods.osft import OSFT
from lorica.preset import with_preset
from lorica.training.arguments import training_arguments
from lorica.training.deepspeed import undivided
from lorica.training.models import load_model_config, model_width, pinned
from lorica.training.sharding import check_option, offloads

RATIOS = [round(0.05 * i, 2) for i in range(1, 20)]
"""Free shares that are tried for a memory, which they need more and more of. 1 is not one of them: plain fine-tuning
has neither W0 nor bases."""


def forecast(
    config: UpdateConfig | Mapping[str, Any], *, machine: Machine | None = None, inputs: Inputs | None = None
) -> Forecast:
    """Tell what a run of ``lorica.train`` with the same configuration will need. No weight is read.

    The model is built without values (on the meta device) and takes two true training steps, of which the second is
    followed: every tensor that is alive, and every operation. From this come the memory of each phase and, with the
    machine's rates, the time. The same is done for plain fine-tuning of the same weights, for comparison.

    Args:
        config: an ``UpdateConfig``, or its fields by name; output_dir and the data may be left out.
        machine: where it will run; by default measured: this machine.
        inputs: the rows, if they have been read already.

    Raises:
        LoricaError: something in the configuration, the model's config.json or the data is wrong, or the method cannot
            be told from shapes.
    """
    settings = pinned(config if isinstance(config, UpdateConfig) else build_forecast_config(dict(config)))
    run = _Run(settings, machine, inputs)
    settings = run.settings
    ways = [run.way(settings)]
    if settings.method != "seqft":
        ways.append(run.way(_plain(settings)))
    return Forecast(
        model=settings.model_name_or_path,
        machine=run.machine,
        batch=run.batches.worst,
        accumulation=run.arguments.gradient_accumulation_steps,
        steps=run.batches.steps,
        ways=ways,
        largest=run.largest() if settings.method == "osft" and settings.plan_file is None else {},
        notes=[*run.batches.notes, *assumptions(settings), *run.assumed_of_devices()],
        disk_free=_free_disk(settings.output_dir),
    )


def expected(config: UpdateConfig, inputs: Inputs, layout: Layout | None = None) -> Way:
    """Return what a run itself will need, without times: what ``lorica.train`` tells before it begins.

    Call it before the model is loaded: what the process takes by then counts as the process.

    Args:
        layout: of the processes that share the model; what each of them takes is the last of ``shares`` then.

    Raises:
        LoricaError: see ``forecast``.
    """
    run = _Run(config, unmeasured_machine(device_of(config)), inputs, layout)
    return run.way(run.settings)


def device_of(config: UpdateConfig) -> str:
    """Return the device that a run takes: "cpu" or "cuda"."""
    return "cpu" if not torch.cuda.is_available() or config.training.get("use_cpu") else "cuda"


def least_disk(config: UpdateConfig, inputs: Inputs) -> Disk | None:
    """Return the least that a run writes whose needs cannot be forecast; None if not even its weights are known."""
    try:
        run = _Run(config, unmeasured_machine(device_of(config)), inputs)
        return disk(blank_model(config, run.model_config), None, run.arguments, run.batches.steps)
    except Exception:  # see ``told.foreseen``, which has said why
        return None


def _plain(settings: UpdateConfig) -> UpdateConfig:
    """Return the configuration of plain fine-tuning of the same weights."""
    return settings.model_copy(
        update={"method": "seqft", "method_options": {}, "memory_mode": "fast", "remember_tasks": False}
    )


class _Run:
    """What all ways of training have in common: the model's configuration, the arguments and the batches."""

    def __init__(
        self, settings: UpdateConfig, machine: Machine | None, inputs: Inputs | None, layout: Layout | None = None
    ) -> None:
        self.model_config = load_model_config(settings)
        self.settings = settings = with_preset(settings, self.model_config)
        self.arguments = training_arguments(
            undivided(settings.training), settings.output_dir, hidden_size=model_width(self.model_config),
            seq2seq=bool(self.model_config.is_encoder_decoder),
            learning_rate_scale=METHODS[settings.method].learning_rate_scale,
            optimizer_in_backward=settings.optimizer_in_backward, padding_free=settings.padding_free,
        )  # fmt: skip
        _check_no_compiler(self.arguments)
        self.machine = machine or this_machine(self.arguments.device.type)
        lineage = read_lineage(settings.model_name_or_path)
        self.index = lineage.updates
        longest = int(lineage.remembered("osft", LONGEST) or 0)
        self.batches = batches_of(settings, self.arguments, self.model_config, inputs, longest)
        self.layout = layout or _layout(settings, self.machine)
        self.in_parts = layout is not None
        self.measuring: Measuring | None = None

    def way(self, settings: UpdateConfig) -> Way:
        """Return what one way of training needs."""
        model, method, step = self._dry(settings, self.batches.worst)
        same = self.batches.mean == self.batches.worst
        typical = step if same else self._dry(settings, self.batches.mean)[2]
        measuring = self._measuring(settings, method)
        if settings is self.settings:
            self.measuring = measuring
        micro, update = self.machine.seconds(typical.micro), self.machine.seconds(typical.update)
        count = self.arguments.gradient_accumulation_steps
        split = [layer for layer in protected_layers(model).values() if protected_directions(layer)]
        shapes = Counter((layer.out_basis.dim, layer.in_basis.dim) for layer in split)
        found = self._phases(model, step, measuring)
        several = self.layout.devices > 1
        return Way(
            label=_label(settings),
            trainable=step.trainable,
            phases=found,
            disk=disk(
                model,
                step,
                self.arguments,
                self.batches.steps,
                in_parts=self.in_parts,
                remembered=settings.remember_size if settings.remember_tasks else 0.0,
            ),
            measure_seconds=measuring.seconds if measuring else 0.0,
            split_seconds=split_seconds(shapes, self.machine, spectra=not (measuring and measuring.directions)),
            step_seconds=None if micro is None or update is None else count * micro + update,
            shares=shares(found, sizes_of(model, units_of(model)), self.layout, count) if several else [],
        )

    def assumed_of_devices(self) -> list[str]:
        """Return, in words, what is assumed of several devices."""
        if self.layout.devices == 1:
            return []
        told = ["each device trains on micro-batches of that size; sharded, each of them ends in averaged gradients"]
        if self.machine.device == "cpu":
            told.append("each device is a CPU with a machine of its own")
        whole = self.settings.rehearse or self.settings.curvature_penalty
        if whole and check_option("fsdp", self.settings.training.get("fsdp")) is None:
            told.append(
                "sharded, a model is counted with rehearse and curvature_penalty, which --fsdp does not take: with "
                "--fsdp full_shard it is counted as it would be trained"
            )
        return told

    def _dry(self, settings: UpdateConfig, batch: Batch) -> Any:
        model = blank_model(settings, self.model_config)
        task = TaskData("forecast", self.index, self.index + 1, [], dict, self.arguments.seed)  # type: ignore[arg-type]
        method = begin(model, settings, task, self.batches.prompt, self.batches.extent)
        in_backward = settings.optimizer_in_backward
        step = dry_step(model, method, batch, self.arguments, self.machine.device, in_backward=in_backward)
        return model, method, step

    def _measuring(self, settings: UpdateConfig, method: Method) -> Measuring | None:
        """Return what is measured before the run, None where nothing is and nothing is written."""
        if not isinstance(method, OSFT) or method.plan is None:
            return None
        seen = shown(settings, method.plan, self.model_config, self.batches.prompt, self.batches.extent)
        if seen.batch is None and not seen.written.tokens:
            return None
        model = blank_model(settings, self.model_config)
        whole = self.layout.shards > 1
        return dry_measure(model, settings, method.plan, seen, self.machine, whole=whole)

    def _phases(self, model: Any, step: Step, measuring: Measuring | None) -> list[Phase]:
        scored = self.batches.scored
        scoring = None if scored is None else dry_score(model, scored, self.machine.device)
        splitting, auditing = (largest(kind, model) for kind in (split_workspace, audit_workspace))
        return phases(step, splitting, auditing, self.machine, scoring, measuring)

    def largest(self) -> dict[str, float | None]:
        """Return, for each memory mode, the largest free share that fits the device, None where none does."""
        return {mode: self._largest(mode) for mode in MEMORY_MODES}

    def _largest(self, mode: str) -> float | None:
        low, high = -1, len(RATIOS) - 1  # RATIOS[low] fits, what is above high does not
        if self._fits(mode, RATIOS[high]):
            return RATIOS[high]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(mode, RATIOS[middle]) else (low, middle)
        return RATIOS[low] if low >= 0 else None

    def _fits(self, mode: str, ratio: float) -> bool:
        amounts = (
            "effective_rank", "osft_unfreeze_rank_ratio", "rank_schedule", "mrr", "trr", "expected_forgetting",
        )  # fmt: skip
        update = dict.fromkeys(amounts) | {"unfreeze_rank_ratio": ratio, "memory_mode": mode, "ranks": "uniform"}
        model, _, step = self._dry(self.settings.model_copy(update=update), self.batches.worst)
        found = self._phases(model, step, self.measuring)
        return max(sum(phase.device.values()) for phase in found) <= self.machine.memory


def _check_no_compiler(arguments: TrainingArguments) -> None:
    if arguments.torch_compile:
        raise LoricaError(
            "--torch_compile cannot be forecast: what a compiler keeps and fuses is its own; leave it out for an "
            "upper bound"
        )


def _layout(settings: UpdateConfig, machine: Machine) -> Layout:
    if isinstance(settings, ForecastConfig):
        offload = machine.device != "cpu" and offloads(settings.training)
        return Layout(settings.devices // settings.replicas, settings.replicas, offload)
    return Layout(1)


def _label(settings: UpdateConfig) -> str:
    if settings.method == "seqft":
        return "plain fine-tuning"
    return f"{settings.method}, {settings.memory_mode}" if settings.method == "osft" else settings.method


def _free_disk(output_dir: str) -> int | None:
    """Return the free bytes where the output folder is to be, if one is named."""
    return free_bytes(Path(output_dir)) if output_dir else None
