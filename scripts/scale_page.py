"""Put what several GPUs are computed to need into docs/scale.md: memory, bytes received and time, from shapes alone.

    python scripts/scale_page.py              fill the page from shapes and from the kept counts
    python scripts/scale_page.py --measure    first train on 2 and 4 processes here and keep what they received

The tables stand between the marks of the page, such as ``<!-- memory -->`` and ``<!-- end -->``. All that is assumed of
the hardware is in ``scale_time.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from scale_time import ASSUMED, MODELS, Model, seconds, sizes
from speed_page import filled

from lorica.forecast.communication import TRAFFIC, Layout, received_sharded
from lorica.forecast.devices import gathered, state_sharded

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "scale.md", ROOT / "docs" / "results" / "scale" / "bytes.json"
GPUS = (1, 2, 4, 8, 16, 32, 64, 128)
SHARES = (0.0, 0.5, 0.75, 0.9)
GB = 1e9


def blocks() -> dict[str, str]:
    """Return every part of the page, by the name of its mark."""
    parts = {"memory": _each(memory), "bytes": _each(received), "kinds": kinds(), "time": _each(time)}
    return parts | {"assumed": assumed(), "measured": counted(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])}


def _each(table: Any) -> str:
    return "\n\n".join(table(name, model) for name, model in MODELS.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _label(share: float) -> str:
    return f"**Lorica**, {share:g}" if share else "plain FSDP2"


def needed(model: Model, share: float, gpus: int) -> float:
    """Return the bytes of each GPU: its part of the training state, and what is gathered for a while.

    Plain fine-tuning has float32 master weights, gradients and moments, of which FSDP2 gathers and averages copies in
    bfloat16; Lorica is counted as it is for a model in bfloat16.
    """
    size = sizes(model, share)
    state = state_sharded(size, gpus).total() if share else 16 * model.parameters / gpus
    return state + (gathered(size, gpus) if gpus > 1 else 0)


def memory(name: str, model: Model) -> str:
    """Return GB per GPU."""
    rows = [[_label(share), *(f"{needed(model, share, n) / GB:.1f}" for n in GPUS)] for share in SHARES]
    return _table([name, *map(str, GPUS)], rows)


def received(name: str, model: Model) -> str:
    """Return GB that each GPU receives in a step, and their ratio to plain fine-tuning's."""
    plain = [received_sharded(sizes(model, 0.0), Layout(n)).total() for n in GPUS[1:]]
    rows = [["plain FSDP2", *(f"{nbytes / GB:.1f}" for nbytes in plain)]]
    for share in SHARES[1:]:
        for wrapped in (False, True):
            ours = [received_sharded(sizes(model, share), Layout(n), wrapped=wrapped).total() for n in GPUS[1:]]
            cells = [f"{one / GB:.1f} ({one / other:.2f})" for one, other in zip(ours, plain, strict=True)]
            rows.append([_label(share) + (", wrapped afterwards" if wrapped else ""), *cells])
    return _table([name, *map(str, GPUS[1:])], rows)


def kinds() -> str:
    """Return where the bytes of the smallest model go, at 3/4 protected."""
    name, model = next(iter(MODELS.items()))
    columns = [(share, n) for n in (2, 4, 8, 64) for share in (0.0, 0.75)]
    counts = [received_sharded(sizes(model, share), Layout(n)) for share, n in columns]
    rows = [[kind, *(f"{count[kind] / GB:.2f}" if count[kind] else "-" for count in counts)] for kind in TRAFFIC]
    rows.append(["all", *(f"{count.total() / GB:.2f}" for count in counts)])
    return _table([name, *(f"{n}: {'Lorica' if share else 'plain'}" for share, n in columns)], rows)


def time(name: str, model: Model) -> str:
    """Return seconds of a step, where its state fits the GPU."""
    rows = []
    for share in SHARES:
        fits = [needed(model, share, n) <= ASSUMED.memory for n in GPUS]
        told = [f"{seconds(model, share, n):.2f}" if fit else "-" for n, fit in zip(GPUS, fits, strict=True)]
        rows.append([_label(share), *told])
    return _table([name, *map(str, GPUS)], rows)


def assumed() -> str:
    """Return what the times rest on."""
    return _table(["assumed", "value"], [[words, value] for words, value in ASSUMED.told().items()])


def counted(rows: Sequence[dict[str, Any]]) -> str:
    """Return what processes received, as counted, and what is computed from the shapes."""
    head = ["", "processes", "computed, MB", "counted, MB", "over plain"]
    plain = {(row["setup"], row["processes"]): row["counted"] for row in rows}
    cells = [
        [
            row["setup"],
            str(row["processes"]),
            *(f"{row[kind] / 1e6:.3f}" for kind in ("computed", "counted")),
            f"{row['counted'] / plain['plain DDP' if 'DDP' in row['setup'] else 'plain', row['processes']]:.3f}",
        ]
        for row in rows
    ]
    return _table(head, cells)


def measure() -> None:
    """Train on processes of this machine and keep what they received; see tests/distributed/test_bytes.py."""
    from benchmarks.measures import write_result
    from tests.distributed import test_bytes as trials
    from tests.distributed.trainings import PROTECTED

    rows = [
        {
            "setup": setup,
            "processes": size,
            "computed": trials.computed(setup, Layout(size)).total(),
            "counted": trials.of_collectives(trials.measured(setup, Layout(size))),
        }
        for size in (2, 4)
        for setup in trials.SETUPS
    ]
    settings = {"model": trials.SHAPE, "micro_batches": 1, "protected": PROTECTED}
    write_result(RESULTS, settings, rows, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="count on this machine anew")
    if parser.parse_args().measure:
        measure()
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
