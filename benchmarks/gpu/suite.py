"""The GPU suite: one command, one result folder, never longer than its budget.

    python benchmarks/gpu/suite.py                            on a machine with an NVIDIA GPU
    python benchmarks/gpu/suite.py --device cpu --tiny        every code path on tiny shapes, on the CPU

The parts (jobs.py) run in the order of their importance. Each has its share of the time and gets what earlier parts
left over; a part that does not end is ended, and costs nothing but its unmeasured rows. Results are written after every
part to the folder that LORICA_OUT names, by default benchmarks/gpu/results/DATE.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.jobs import JOBS, Job
from benchmarks.gpu.summary import summary
from benchmarks.gpu.workbench import ROWS, read_rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

BUDGET = 525.0
"""Seconds for everything, so that the whole command ends within nine minutes."""
GRACE = 15.0
"""Seconds a part may go on past its share, to finish what it is measuring."""

FILES = (ROWS, "results.json", "summary.txt", "profile.txt", "log.txt")
"""All that the suite writes."""

REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "pydantic", "numpy")
OPTIONAL = {
    "peft": "the rows of LoRA and PEFT's osf",
    "mini_trainer": "the rows of mini_trainer",
    "flash_attn": "flash attention (torch's own SDPA kernels are measured)",
    "triton": "torch.compile on a GPU",
}


class Worker:
    """The process that does the parts; see worker.py."""

    def __init__(self, device: str, folder: Path, log: TextIO, cache: str, *, tiny: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.worker", "--device", device, "--output", str(folder)]
        paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {
            "PYTHONPATH": os.pathsep.join(paths),
            "LORICA_CACHE": cache,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [*command, *(["--tiny"] if tiny else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | settings,
            start_new_session=True,
        )

    def do(self, job: Job, seconds: float, limit: float) -> dict[str, Any]:
        """Hand over a part and return its answer; after ``limit`` seconds without one the process is ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        task = {"name": job.name, "module": job.module, "settings": job.settings, "seconds": seconds}
        with contextlib.suppress(BrokenPipeError):  # the answer below is then empty
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        if not ready:
            return {"status": "ended", "message": f"not done after {limit:.0f} s", "fit": False}
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            return {"status": "failed", "message": f"the process ended with status {code}; see log.txt", "fit": False}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Suite:
    """The parts that were asked for, and what came out so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.start = time.monotonic()
        self.jobs: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        return self.options.seconds - (time.monotonic() - self.start)

    def run(self, chosen: list[Job]) -> None:
        """Do the parts one after the other."""
        worker: Worker | None = None
        with (
            (self.folder / "log.txt").open("a", encoding="utf-8") as log,
            tempfile.TemporaryDirectory(prefix="lorica-splits-", ignore_cleanup_errors=True) as cache,
        ):
            try:
                for index, job in enumerate(chosen):
                    reason = self._refused(job)
                    if reason:
                        self._note(job, {"status": "skipped", "message": reason}, 0.0)
                        continue
                    worker = worker or Worker(self.options.device, self.folder, log, cache, tiny=self.options.tiny)
                    spare = self.left - sum(later.seconds for later in chosen[index:])
                    seconds = min(job.seconds + max(spare, 0.0), self.left - GRACE)
                    begun = time.monotonic()
                    answer = worker.do(job, seconds, min(seconds + GRACE, self.left))
                    self._note(job, answer, time.monotonic() - begun)
                    if not answer["fit"]:
                        worker.end()
                        worker = None
            finally:
                if worker is not None:
                    worker.end()

    def _refused(self, job: Job) -> str | None:
        if importlib.util.find_spec(job.package) is None:
            return f"{job.package} is not installed"
        return None if self.left > GRACE + 5 else "no time left"

    def _note(self, job: Job, answer: dict[str, Any], seconds: float) -> None:
        ended = {"name": job.name, "status": answer["status"], "message": answer["message"], "seconds": seconds}
        self.jobs.append(ended)
        print(f"{job.name:16} {ended['status']:8} {seconds:6.1f} s  {ended['message']}", flush=True)
        self.write()

    def write(self) -> None:
        """Write all results so far."""
        rows = read_rows(self.folder)
        settings = {name: str(value) for name, value in vars(self.options).items()}
        result = {
            "settings": settings | {"shares": [asdict(job) for job in JOBS]},
            "missing": missing(),
            "jobs": self.jobs,
            "rows": rows,
            "seconds": time.monotonic() - self.start,
        }
        aside = self.folder / ".results.json.tmp"
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.folder / "results.json")
        (self.folder / "summary.txt").write_text(summary(self.jobs, rows), encoding="utf-8")


def missing() -> list[str]:
    """Return the optional packages that are not installed."""
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def check_packages() -> None:
    """Say what is missing; end where the suite cannot run without it."""
    print(f"python {sys.version.split()[0]} at {sys.executable}")
    lacking = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if lacking:
        sys.exit(
            f"not installed, and needed: {', '.join(lacking)}; give them, for example: pip install {' '.join(lacking)}"
        )
    for name in missing():
        print(f"{name} is not installed; left out: {OPTIONAL[name]}")


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: to try the suite itself")
    parser.add_argument("--seconds", type=float, default=BUDGET, help=f"for everything (default {BUDGET:.0f})")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"these parts: {', '.join(job.name for job in JOBS)}")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {job.name for job in JOBS}
    if unknown:
        parser.error(f"--only: no part is named {', '.join(sorted(unknown))}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the true shapes would take a CPU days")
    return options


def main() -> None:
    options = options_of()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is ended too
    check_packages()
    named = os.environ.get("LORICA_OUT")
    folder = Path(named) if named else HERE / "results" / time.strftime("%Y-%m-%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    print(f"results: {folder}\nlorica: {ROOT / 'src'}", flush=True)
    suite = Suite(options, folder)
    try:
        suite.run([job for job in JOBS if not options.only or job.name in options.only])
    finally:
        suite.write()
        print((folder / "summary.txt").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
