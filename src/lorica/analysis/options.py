"""The options of ``lorica inspect``, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lorica.errors import LoricaError, did_you_mean
from lorica.subspace.plan_entry import Source

Side = Literal["top", "bottom"]
"""An end of the spectrum."""

SIDES: tuple[Side, ...] = get_args(Side)

FRACTIONS = (0.01, 0.1, 0.5)
"""Shares of the singular directions that are removed by default."""

CURVATURE_ROWS = 32
"""Rows over which curvature is averaged by default."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What to look at. The fields are the options of the command, under the same names.

    Attributes:
        model_name_or_path: a folder, or a name on the hub.
        output_dir: gets ``inspect.json``, ``inspect.html`` and ``inspect.md``; made if missing.
        task_file: rows of something that the model can do. Needed for interventions and curvature.
        unfreeze_rank_ratio, ranks, source, target_modules, freeze_experts: the plan to look at; see ``lorica.plan``.
        calibration: what the layers are shown: "self" (default for causal models) or "random" (default for
            encoder-decoders).
        calibration_file: a file of rows for it instead; the first 256 are used.
        fractions: shares of the singular directions to remove, each between 0 and 1; 0.01, 0.1 and 0.5 by default.
        which: "top", "bottom" or both (default): the end of the spectrum that is removed.
        per_layer: remove them in one layer at a time as well, layers x fractions x ends more evaluations.
        curvature_rows: rows of ``task_file`` for the curvature, spread evenly over it; 32 by default, 0 for none.
        max_length: longest row, in tokens.
        batch_size: rows scored at a time.
        dtype, model_revision, trust_remote_code, allow_pickle: see ``lorica.training.models.read_model``.
        require_pinned: take nothing from the hub without its whole commit.

    Raises:
        LoricaError: a value out of range, or an option that would be without effect.
    """

    model_name_or_path: str
    output_dir: str | Path
    task_file: str | Path | None = None
    unfreeze_rank_ratio: float | None = None
    ranks: str = "uniform"
    source: Source = "weight"
    target_modules: str | Sequence[str] | None = None
    freeze_experts: bool = False
    calibration: Literal["self", "random"] | None = None
    calibration_file: str | Path | None = None
    fractions: Sequence[float] | None = None
    which: Sequence[Side] | None = None
    per_layer: bool = False
    curvature_rows: int | None = None
    max_length: int = 1024
    batch_size: int = 16
    dtype: str = "auto"
    model_revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    require_pinned: bool = False

    def __post_init__(self) -> None:
        self._check_task()
        self._check_interventions()
        self._check_calibration()
        for name, least in (("curvature_rows", 0), ("max_length", 2), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LoricaError(f"--{name} {value} is out of range: {least} or more")

    def _check_task(self) -> None:
        for name in ("fractions", "which", "per_layer", "curvature_rows"):
            if self.task_file is None and getattr(self, name):
                raise LoricaError(f"--{name} needs rows to score: give --task_file")

    def _check_interventions(self) -> None:
        for name in ("fractions", "which"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise LoricaError(f"--{name} {', '.join(map(str, values))}: give one or more different values")
        for fraction in self.fractions or ():
            if not 0 < fraction < 1:
                raise LoricaError(f"--fractions {fraction:g} is out of range: a share between 0 and 1, such as 0.1")
        for side in self.which or ():
            if side not in SIDES:
                raise LoricaError(f"--which {side!r} is unknown; known: {', '.join(SIDES)}.{did_you_mean(side, SIDES)}")

    def _check_calibration(self) -> None:
        if self.calibration is not None and self.calibration_file is not None:
            raise LoricaError("--calibration and --calibration_file say the same thing; give one of them")
        known = ("self", "random")
        if self.calibration not in (None, *known):
            hint = did_you_mean(str(self.calibration), known)
            raise LoricaError(f"--calibration {self.calibration!r} is unknown; known: {', '.join(known)}.{hint}")
