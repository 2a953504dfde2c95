"""The options of ``lorica check``: those of ``lorica train``, and which machine is meant."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lorica.config import UpdateConfig
from lorica.values import with_training

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Return the bytes that a size such as 24GB, 80GiB or 16000000000 stands for.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError("expected a size such as 24GB or 80GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


class ForecastConfig(UpdateConfig):
    """What ``lorica check`` takes: the options of ``lorica train``, of which data and output folder may be left out."""

    output_dir: str = ""
    """Where the run will write; only to see how much room there is."""

    device: Literal["cpu", "cuda"] | None = None
    """The device that is meant; by default the GPU of this machine if it has one, else its CPU."""

    device_memory: int | None = None
    """Memory of the device, such as 24GB or 80GiB; by default what this machine's device has."""

    peak_flops: float | None = None
    """Floating point operations per second that the device reaches in matrix products, such as 4e14; by default
    measured here."""

    bandwidth: float | None = None
    """Bytes per second that the device's memory reads and writes, such as 3e12; by default measured here."""

    devices: int = Field(default=1, ge=1)
    """How many such devices train one model: told besides are the memory of each and the bytes that it receives in
    each step, under DDP and sharded by FSDP2."""

    replicas: int = Field(default=1, ge=1)
    """How many copies of the sharded model there are, which only average gradients; it has to divide --devices."""

    measure: bool = False
    """Load the model besides, calibrate as training would, and tell how much of what the model is sensitive to the
    plan protects, beside source weight; for method osft."""

    @field_validator("device_memory", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("peak_flops", "bandwidth")
    @classmethod
    def _rate(cls, value: float | None) -> float | None:
        if value is not None and not value > 0:
            raise ValueError("expected a rate above 0")
        return value

    @model_validator(mode="after")
    def _equal_shares(self) -> Self:
        if self.devices % self.replicas:
            raise ValueError(f"--replicas {self.replicas} does not divide --devices {self.devices}")
        return self

    @model_validator(mode="after")
    def _shards_over_several(self) -> Self:
        if self.training.get("fsdp") and self.devices == 1:
            raise ValueError("--fsdp shards over several devices: give --devices, and what each of them holds is told")
        return self

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if self.train_file is not None and self.dataset_name is not None:
            raise ValueError("give what to learn: --train_file FILE, or --dataset_name NAME (one of them)")
        return self


def build_forecast_config(values: dict[str, Any]) -> ForecastConfig:
    """Return the configuration of a forecast that flat values stand for; see ``values.with_training``."""
    return with_training(ForecastConfig, values)
