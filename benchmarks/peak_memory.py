"""Peak memory and seconds of loading, protecting, three steps, releasing and saving, each method in its own process.

    python benchmarks/peak_memory.py            # the built-in configurations, about 10 minutes on 2 cores
    python benchmarks/peak_memory.py --width 512 --layers 4 --tokens 2048

A method starts from a folder that ``save_pretrained`` wrote and ends with one. Per phase the peak of the resident size
is the system's own high-water mark; the *anonymous* part, memory that is in no file and cannot be dropped, is polled
every two milliseconds. Both are what the phase took beyond the process after all imports. The allocator is told to
give freed memory back, so that what is seen is what is needed. Memory can be measured while the machine is busy, the
seconds cannot. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import LlamaForCausalLM

from benchmarks.contestants import CONTESTANTS, PEERS, SOURCES, batches, chosen, llama
from benchmarks.measures import ALLOCATOR, RESULTS, empty_cache, resident, write_result

SHARE, STEPS, PAUSE = 0.75, 3, 0.002
METHODS = CONTESTANTS | SOURCES


class Configuration(NamedTuple):
    """A model and a batch."""

    width: int
    layers: int
    tokens: int
    length: int = 256

    @property
    def file(self) -> str:
        return f"peak-memory-{self.width}x{self.layers}-{self.tokens}.json"


GRID = [
    Configuration(1024, 2, 2048),
    Configuration(1024, 2, 8192),
    Configuration(512, 16, 1024),  # deep: no single matrix is large beside the model
]


class Phases:
    """What each phase took, beyond what the process held when this was made."""

    def __init__(self) -> None:
        gc.collect()
        self.start = resident()
        self.rows: dict[str, dict[str, float]] = {}
        self._peak = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
        self._peak, done = 0, threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,))
        watcher.start()
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
        gc.collect()
        after = resident()
        self.rows[name] = {
            "seconds": seconds,
            "peak_rss": after["peak_rss"] - self.start["rss"],
            "peak_anonymous": self._peak - self.start["anonymous"],
            "end_rss": after["rss"] - self.start["rss"],
            "end_anonymous": after["anonymous"] - self.start["anonymous"],
        }

    def _watch(self, done: threading.Event) -> None:
        while not done.is_set():
            self._peak = max(self._peak, resident()["anonymous"])
            done.wait(PAUSE)
        self._peak = max(self._peak, resident()["anonymous"])


def measure(name: str, folder: Path, tokens: int, length: int) -> dict[str, Any]:
    """Take a model from its folder through all phases with one method, in this process."""
    contestant = METHODS[name]
    for module in PEERS if name in CONTESTANTS else ():  # what all that are compared have imported
        with contextlib.suppress(ImportError):
            importlib.import_module("mini_trainer.osft_utils" if module == "mini_trainer" else module)
    phases = Phases()
    with phases.phase("load"):
        model = LlamaForCausalLM.from_pretrained(folder)
    with phases.phase("protect"):
        runner = contestant.build(model)
        del model
    with phases.phase("train"):
        for ids in batches(STEPS, tokens, length):
            runner.step(ids)
            runner.optimizer.zero_grad()
    trained: Any = runner.model
    finish: Callable[[], Any] = runner.finish
    del runner  # and with it the optimizer: training is over
    with phases.phase("release"):
        plain = finish()
    with phases.phase("save"), tempfile.TemporaryDirectory() as target:
        if isinstance(plain, dict):
            trained.save_pretrained(target, state_dict=plain)
        else:
            plain.save_pretrained(target)
    return {"method": name, "family": contestant.family, "protected": contestant.share, "phases": phases.rows}


def in_a_process(name: str, folder: Path, point: Configuration) -> dict[str, Any]:
    """Measure one method in a new process."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        words = [sys.executable, __file__, "--method", name, "--model", str(folder), "--tokens", str(point.tokens),
                 "--length", str(point.length), "--output", file.name]  # fmt: skip
        done = subprocess.run(words, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        row: dict[str, Any] = json.loads(Path(file.name).read_text(encoding="utf-8"))
    print(_line(row), flush=True)
    return row


def _line(row: dict[str, Any]) -> str:
    peaks = [f"{name} {one['peak_anonymous'] / 1e6:.0f}" for name, one in row["phases"].items()]
    return f"{row['method']:20} peak of anonymous memory, MB: {', '.join(peaks)}"


def run(configurations: list[Configuration], folder: Path) -> None:
    """Measure what is not in the folder yet."""
    for point in configurations:
        if (folder / point.file).exists():
            continue
        print(f"width {point.width}, {point.layers} layers, {point.tokens} tokens per step")
        contestants, missing = chosen((SHARE,))
        with tempfile.TemporaryDirectory() as model:
            llama(point.width, point.layers, point.length).save_pretrained(model)
            rows = [in_a_process(one.name, Path(model), point) for one in contestants]
        write_result(folder / point.file, point._asdict() | {"steps": STEPS, "allocator": ALLOCATOR}, rows, missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="one width instead of the built-in configurations")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="per step; with --width or --method")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence; with --width or --method")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder; with --method a file")
    parser.add_argument("--method", choices=METHODS, help="measure this one alone, in this process, on --model")
    parser.add_argument("--model", type=Path, help="folder of the model; with --method")
    options = parser.parse_args()
    if options.method:
        with empty_cache():
            row = measure(options.method, options.model, options.tokens, options.length)
        options.output.write_text(json.dumps(row), encoding="utf-8")
        return
    own = [Configuration(options.width or 0, options.layers, options.tokens, options.length)]
    run(own if options.width else GRID, options.output)


if __name__ == "__main__":
    main()
