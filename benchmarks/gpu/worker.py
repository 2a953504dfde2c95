"""The process that does the work: takes one part after the other from the driver, so that torch is imported once.

    python -m benchmarks.gpu.worker --device cuda --output FOLDER [--tiny]

Reads a line of JSON per part from standard input (name, module, settings, seconds) and answers each with a line of
JSON on standard output (status, message, whether this process is fit for more). All else that is printed goes to
standard error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.workbench import Workbench, message_of

LEFT_BEHIND = 2**28
"""Bytes on the device that a finished part may leave; with more, the next part gets a fresh process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    for line in sys.stdin:
        answers.write(json.dumps(work(json.loads(line), options)) + "\n")


def work(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Do one part and return how it ended."""
    start = time.monotonic()
    print(f"== {job['name']} ({job['seconds']:.0f} s)", file=sys.stderr, flush=True)
    try:
        from benchmarks.gpu.hardware import hardware

        left = job["seconds"] - (time.monotonic() - start)  # the imports took their part of it
        bench = Workbench(job["name"], hardware(options.device), options.output, left, tiny=options.tiny)
        importlib.import_module(f"benchmarks.gpu.{job['module']}").run(bench, **job["settings"])
        answer = {"status": "ok", "message": ""}
    except Exception as error:
        traceback.print_exc()
        answer = {"status": "failed", "message": message_of(error)}
    return answer | {"fit": _fit(options.device)}


def _fit(device: str) -> bool:
    """Return whether the device still answers and is empty again."""
    if device == "cpu":
        return True
    import gc

    import torch

    try:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated() < LEFT_BEHIND
    except Exception:
        traceback.print_exc()
        return False


if __name__ == "__main__":
    main()
