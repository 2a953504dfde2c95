"""How near `lorica check` comes to what `lorica train` then takes: peak memory, forecast over measured.

    python benchmarks/forecast_accuracy.py                       # the grid of step_time.py, about 20 minutes on 2 cores
    python benchmarks/forecast_accuracy.py --width 512 --layers 2 --tokens 1024 4096

At every point plain fine-tuning and both memory modes at 0.75 protected, at some also the other shares. For each a
Llama of random weights and a file of random rows are written to a temporary folder. Then two processes of their own run
in turn: one forecasts, from the folder's config.json and the rows alone, and one is ``lorica.train`` with the very same
options. What it took is the system's figure for that process (VmHWM: the most that was resident at once), which Linux
lets a process set back, so that each part of the run has one. Memory, unlike time, can be measured on a busy machine.
Results are written after each point; points that are there are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_time import GRID, Configuration
from lorica.record import environment, write_json

VOCABULARY = 512
STEPS = 3
ALL_SHARES_AT = 2048
"""Tokens per step at which every protected share of the grid is run."""

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "forecast.json"
HERE = Path(__file__)


def make_model(folder: Path, width: int, layers: int, length: int) -> None:
    """Write a Llama of random weights with a tokenizer that knows its vocabulary."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=int(2.75 * width),
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", pad_token="w2")
    fast.save_pretrained(folder)


def make_rows(file: Path, rows: int, length: int) -> None:
    """Write rows of random tokens, all of one length."""
    import torch

    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    file.write_text("".join(json.dumps({"input_ids": row, "labels": row}) + "\n" for row in ids.tolist()))


def options(folder: Path, tokens: int, length: int, method: str, mode: str) -> dict[str, Any]:
    """Return the options of one run."""
    shared: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "out"),
        "max_length": length,
        "per_device_train_batch_size": tokens // length,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "preset": "paper",
    }
    if method == "plain":
        return shared | {"method": "seqft"}
    return shared | {"effective_rank": float(method), "memory_mode": mode}


def predict(values: dict[str, Any]) -> dict[str, Any]:
    """Return the forecast of a run; to be called in a process of its own."""
    from lorica.forecast.rates import machine_for
    from lorica.forecast.story import forecast

    return forecast(values, machine=machine_for("cpu")).to_json()


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Run ``lorica.train`` and return its peaks in bytes: the whole one, and one for each part between what it says."""
    import lorica

    parts: list[dict[str, Any]] = []

    def say(line: str) -> None:
        parts.append({"until": Path(line.split(maxsplit=1)[0].rstrip(":")).name, "bytes": peak_and_restart()})

    lorica.train(values, say)
    return {"parts": parts, "bytes": max(part["bytes"] for part in parts)}


def peak_and_restart() -> int:
    """Return the most that was resident since the last call, and let the system count anew."""
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def in_own_process(what: str, values: dict[str, Any], result: Path) -> dict[str, Any]:
    """Return what one of the functions above returns in a new process."""
    command = [sys.executable, str(HERE), "--child", what, json.dumps(values), str(result)]
    without_cache = os.environ | {"LORICA_CACHE": "off"}  # every run splits
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without_cache)
    if done.returncode:
        raise SystemExit(f"{what} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def child(what: str, values: dict[str, Any], result: Path) -> None:
    if what == "make":
        folder = Path(values["folder"])
        make_model(folder / "model", values["width"], values["layers"], values["length"])
        make_rows(folder / "rows.jsonl", STEPS * values["tokens"] // values["length"], values["length"])
        found: dict[str, Any] = {}
    else:
        found = {"predict": predict, "measure": measure}[what](values)
    result.write_text(json.dumps(found))


def compare(shape: dict[str, Any], method: str, mode: str, folder: Path) -> dict[str, Any]:
    """Return forecast and measurement of one configuration whose model and rows are in the folder."""
    values = options(folder, shape["tokens"], shape["length"], method, mode)
    forecast = in_own_process("predict", values, folder / "forecast.json")
    measured = in_own_process("measure", values, folder / "measured.json")
    shutil.rmtree(folder / "out")
    way = forecast["ways"][0]
    return shape | {
        "method": method,
        "memory_mode": mode,
        "forecast_bytes": way["device_bytes"],
        "measured_bytes": measured["bytes"],
        "ratio": way["device_bytes"] / measured["bytes"],
        "forecast_phase": way["peak_phase"],
        "forecast": way,
        "measured_parts": measured["parts"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    lines = [
        f"{'width':>5} {'layers':>6} {'tokens':>6} {'method':>7} {'mode':>5} "
        f"{'forecast':>9} {'measured':>9} {'ratio':>6}"
    ]
    for row in rows:
        lines.append(
            f"{row['width']:5} {row['layers']:6} {row['tokens']:6} {row['method']:>7} {row['memory_mode']:>5} "
            f"{row['forecast_bytes'] / 1e6:6.0f} MB {row['measured_bytes'] / 1e6:6.0f} MB {row['ratio']:6.2f}"
        )
    return "\n".join(lines)


def runs_at(point: Configuration) -> list[tuple[str, str]]:
    """Return the methods, and their memory modes, that are run at a point of the grid."""
    shares = point.shares if point.tokens == ALL_SHARES_AT else (0.75,)
    return [("plain", "fast"), *itertools.product(map(str, shares), ("fast", "lean"))]


def measure_point(point: Configuration) -> list[dict[str, Any]]:
    """Return a row for each run at a point of the grid."""
    shape = {"width": point.width, "layers": point.layers, "tokens": point.tokens, "length": point.length}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_own_process("make", shape | {"folder": name}, folder / "made.json")
        for method, mode in runs_at(point):
            rows.append(compare(shape, method, mode, folder))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="one width instead of the built-in grid")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--output", type=Path, default=RESULT)
    chosen = parser.parse_args()
    own = [Configuration(chosen.width, chosen.layers, tokens) for tokens in chosen.tokens]
    rows: list[dict[str, Any]] = json.loads(chosen.output.read_text())["rows"] if chosen.output.is_file() else []
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    for point in own if chosen.width else GRID:
        if not any(all(row[name] == getattr(point, name) for name in ("width", "layers", "tokens")) for row in rows):
            rows += measure_point(point)
            settings = {"steps": STEPS, "vocabulary": VOCABULARY}
            write_json(chosen.output, {"settings": settings, "rows": rows, **environment()})
    print(table(rows))
    worst = max(rows, key=lambda row: abs(math.log(row["ratio"])))
    print(f"farthest off: forecast / measured = {worst['ratio']:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
