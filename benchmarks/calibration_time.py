"""How long the sources ``activation`` and ``curvature`` take to calibrate on a model of the shapes of Llama-3.2-1B.

    python benchmarks/calibration_time.py               # all 16 layers, about 20 minutes on 2 cores
    python benchmarks/calibration_time.py --layers 2    # a trial, into another folder with --output

The weights are random, float32; the vocabulary is cut to 4096 tokens, as no source measures anything of embeddings and
head. Calibrated is on 64 sequences of 64 random tokens, 3/4 protected, with the default constraint of the source:

- ``passes``: all layers, as many passes over the batches as 4 GiB of sums make necessary.
- ``factors``: the sums to principal directions. Layers are alike, so this is done for the first ``--decomposed`` of
  them; ``model_seconds`` and ``model_bytes`` count all layers by these.
- ``bases``: the directions to the bases that training uses, of the same layers, counted likewise.

``phases`` holds what was used beyond the loaded model, with the directions of the decomposed layers alone; those of the
others, in ``model_bytes``, come on top. The last row is a text that the model writes by itself (``calibration="self"``,
which writes 32,768 tokens unless told otherwise). Linux only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.arithmetic import MODELS
from benchmarks.measures import RESULTS, storage_bytes, unique, write_result
from benchmarks.peak_memory import Phases
from lorica.config import UpdateConfig
from lorica.constrain.bases import Bases
from lorica.constrain.plan_counts import wanted
from lorica.constrain.targets import find_targets
from lorica.forecast.dry_model import assumed_plan
from lorica.record import Stopwatch
from lorica.subspace.calibration import TOKENS, Batch, own_text, random_tokens
from lorica.subspace.factor import Factors
from lorica.subspace.measure import Sums, measure
from lorica.subspace.plan_entry import Source

MODEL, VOCABULARY, KEY_HEADS = "Llama-3.2-1B", 4096, 8
SEQUENCES, LENGTH, PROTECTED = 64, 64, 0.75
SOURCES: tuple[Source, ...] = ("activation", "curvature")
Row = dict[str, Any]


class Passes(list[Batch]):
    """Calibration batches that write down what each pass over them takes.

    Attributes:
        rows: of each pass the number of its weights, its seconds and the bytes of its sums.
    """

    def __init__(self, batches: list[dict[str, torch.Tensor]], decomposed: Collection[str]) -> None:
        super().__init__(batches)
        self.rows: list[Row] = []
        self._decomposed, self._clock = decomposed, Stopwatch()

    def __iter__(self) -> Iterator[Batch]:
        self._clock = Stopwatch()
        for number, batch in enumerate(super().__iter__(), 1):
            print(f"\r  pass {len(self.rows) + 1}, batch {number} of {len(self)} ", end="", flush=True)
            yield batch

    def summed(self, sums: Sums) -> Sums:
        """Take down a pass that is over, and return the sums that are to be decomposed: ``together`` of ``measure``."""
        moments = [moment.sum for sides in sums.values() for moment in sides.values()]
        nbytes = sum(map(storage_bytes, moments))
        self.rows.append({"weights": len(sums), "seconds": self._clock.seconds, "sum_bytes": nbytes})
        print(f"of {len(sums)} weights: {self._clock.seconds:.1f} s, {nbytes / 1e9:.2f} GB of sums", flush=True)
        chosen = {name: own for name, own in sums.items() if name in self._decomposed}
        if chosen:
            print(f"  decomposing the sums of {len(chosen)} weights", flush=True)
        return chosen


def measured_bytes(factors: Mapping[str, Factors]) -> int:
    """Return the bytes of what was measured, until the bases are made of it; layers have some of it in common."""
    sides = [side for one in factors.values() for side in (one.inputs, one.outputs) if side is not None]
    return sum(map(storage_bytes, unique([[side.vectors_DR, side.energies_R] for side in sides])))


def calibrated(model: LlamaForCausalLM, source: Source, decomposed: int) -> Row:
    """Calibrate a source and return its row.

    Args:
        decomposed: of so many layers the factors and bases are made.
    """
    asked = {"source": source, "effective_rank": PROTECTED}
    config = UpdateConfig(model_name_or_path="-", train_file="-", output_dir="-", **asked)
    plan, targets = assumed_plan(model, config), find_targets(model)
    made = {id(module) for module in model.model.layers[:decomposed].modules()}
    entries = [entry for entry in plan.entries if id(targets[entry.name]) in made]
    passes = Passes(
        random_tokens(model.config.vocab_size, sequences=SEQUENCES, length=LENGTH), [e.name for e in entries]
    )
    sides = {entry.name: wanted(entry, marginal=False) for entry in plan.entries}
    phases = Phases()
    with phases.phase("measure"):
        factors = measure(model, targets, passes, sides, together=passes.summed)
    with phases.phase("bases"):
        bases = Bases(plan.with_measured(factors=factors), "fast")
        made_of = [basis for entry in entries for basis in bases.of(entry, targets[entry.name].get_parameter("weight"))]
    in_passes = sum(row["seconds"] for row in passes.rows)
    seconds = {
        "factors": phases.rows["measure"]["seconds"] - in_passes,
        "bases": phases.rows["bases"]["seconds"],
    }
    nbytes = {
        "factors": measured_bytes(factors),
        "bases": sum(map(storage_bytes, unique([nn.ModuleList(made_of)]))),
    }
    times = len(model.model.layers) / decomposed
    return {
        "source": source,
        "constraint": plan.entries[0].constraint,
        "protected": PROTECTED,
        "passes": passes.rows,
        "seconds": seconds,
        "model_seconds": {"passes": in_passes} | {part: taken * times for part, taken in seconds.items()},
        "model_bytes": {part: count * times for part, count in nbytes.items()},
        "phases": phases.rows,
    }


def written(model: LlamaForCausalLM, tokens: int) -> Row:
    """Let the model write a text and return the row of that."""
    phases = Phases()
    with phases.phase("write"):
        batches = own_text(model, tokens=tokens)
    count = sum(int(batch["attention_mask"].sum()) for batch in batches)
    seconds = phases.rows["write"]["seconds"]
    return {"source": "self", "tokens": count, "seconds": seconds, "tokens_per_second": count / seconds,
            "default_tokens": TOKENS, "phases": phases.rows}  # fmt: skip


def random_model(sizes: dict[str, Any]) -> LlamaForCausalLM:
    """Return a model whose own texts begin with token 0 and never end early."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=None, pad_token_id=None)).eval()


def run(sizes: dict[str, Any], decomposed: int, tokens: int, folder: Path) -> None:
    """Measure all of it and write the result."""
    print(f"making {sizes['num_hidden_layers']} layers of random weights", flush=True)
    model = random_model(sizes)
    rows = []
    for source in SOURCES:
        print(f"{source}", flush=True)
        rows.append(calibrated(model, source, decomposed))
        print(_line(rows[-1]), flush=True)
    rows.append(written(model, tokens))
    print(f"own text: {rows[-1]['tokens']} tokens, {rows[-1]['tokens_per_second']:.0f} in a second")
    settings = {"model": MODEL, "parameters": model.num_parameters(), "dtype": "float32", "sequences": SEQUENCES,
                "length": LENGTH, "decomposed": decomposed} | sizes  # fmt: skip
    write_result(folder / "calibration-time.json", settings, rows, [])


def _line(row: Row) -> str:
    seconds = [f"{part} {taken:.0f} s" for part, taken in row["model_seconds"].items()]
    peaks = [f"{name} {one['peak_anonymous'] / 1e9:.2f} GB" for name, one in row["phases"].items()]
    return f"  {', '.join(seconds)}; peak beyond the model: {', '.join(peaks)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--decomposed", type=int, default=1, help="layers whose factors and bases are made")
    parser.add_argument("--tokens", type=int, default=4096, help="of own text; a multiple of 4096 is fastest")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = MODELS[MODEL] | {
        "num_key_value_heads": KEY_HEADS, "vocab_size": VOCABULARY, "num_hidden_layers": options.layers,
    }  # fmt: skip
    if not (options.output / "calibration-time.json").exists():
        run(sizes, min(options.decomposed, options.layers), options.tokens, options.output)


if __name__ == "__main__":
    main()
