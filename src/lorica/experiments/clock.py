"""How far a long run is."""

from __future__ import annotations

from lorica.record import Stopwatch
from lorica.units import estimate


class Clock:
    """How far a run of about equal stages is, and how long it will still take.

    Args:
        stages: how many there are.
    """

    def __init__(self, stages: int) -> None:
        self.stages, self.done, self.skipped, self.watch = stages, 0, 0, Stopwatch()

    def tick(self) -> str:
        """Count one stage as done and say how much time is left."""
        self.done += 1
        finished = self.done + self.skipped
        left = self.watch.seconds / self.done * (self.stages - finished)
        return f"[{finished}/{self.stages}, about {estimate(left)} left]" if finished < self.stages else "[done]"

    def skip(self, stages: int) -> None:
        """Count stages that were done before this process; they say nothing about its pace."""
        self.skipped += stages
