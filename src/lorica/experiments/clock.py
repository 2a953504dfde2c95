"""How far a long run is."""

from __future__ import annotations

from lorica.record import Stopwatch


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
        return f"[{finished}/{self.stages}, about {duration(left)} left]" if finished < self.stages else "[done]"

    def skip(self, stages: int) -> None:
        """Count stages that were done before this process; they say nothing about its pace."""
        self.skipped += stages


def duration(seconds: float) -> str:
    """Return a time in the largest fitting unit: ``45 s``, ``12 min``, ``3.2 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
