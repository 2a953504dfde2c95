"""The tables and sentences of the speed page and of the README, from the result files alone."""

from __future__ import annotations

from statistics import median

from speed_claims import claims
from speed_results import (
    FAMILIES,
    OURS,
    PEERS,
    Measurement,
    Results,
    Row,
    advantage,
    beside_training,
    late_over_early,
    peak,
    thousands,
    time_ratio,
)

from lorica.units import MISSING, duration, listed, scientific, size

PHASES = ("load", "protect", "train", "release", "save")
OTHERS = [family for family in FAMILIES if family != "plain"]


STEP_CHARTS = [
    "![Step time over plain fine-tuning against tokens per step, narrow models](speed-steps-1.svg)",
    "![Step time over plain fine-tuning against tokens per step, wide models](speed-steps-2.svg)",
]
STATE_CHART = "![Training state, measured and counted](speed-state.svg)"
TASK_CHART = "![Seconds and memory, task after task](speed-tasks.svg)"


def blocks(results: Results) -> dict[str, str]:
    """Return everything that stands between marks, by the name of the mark."""
    return {
        "speed": "\n\n".join([_short_table(results), f"{_against_peers(results)} {_largest_model(results)}"]),
        "machine": _machine(results),
        "claims": _claims(results),
        "steps": "\n\n".join([*STEP_CHARTS, *(_step_table(results, share) for share in _shares(results))]),
        "state": f"{STATE_CHART}\n\n{_state_table(results)}",
        "peaks": "\n\n".join(_peak_table(one) for one in results.peaks),
        "tasks": f"{_tasks(results)}\n\n{TASK_CHART}",
        "inference": _inference(results),
        "arithmetic": _arithmetic(results),
        "split": _split(results.split),
    }


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return a Markdown table; unlike those of the report its cells hold Markdown."""
    rule = [":--" if j < left else "--:" for j in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def _short_table(results: Results) -> str:
    steps = [results.at("steps", 1024, tokens) for tokens in (2048, 8192)]
    peaks = [results.at("peaks", 1024, tokens) for tokens in (2048, 8192)]
    header = ["width 1024, 3/4 protected; x plain", "step, 2k tokens", "step, 8k tokens", "training state",
              "peak memory, 2k", "peak memory, 8k", "leakage"]  # fmt: skip
    rows = []
    for family, name in FAMILIES.items():
        found = [row for one in steps if one and (row := one.row(family))]
        state = f"{found[0]['state_ratio']:.2f}" if found else MISSING
        leak = scientific(found[0]["leakage"]) if found else MISSING
        rows.append(
            [name, *(_ratio(one, family) for one in steps), state, *(_peak_ratio(one, family) for one in peaks), leak]
        )
    return table(header, rows)


def _ratio(one: Measurement | None, family: str) -> str:
    row = one.row(family) if one else None
    return f"{time_ratio(one, row):.2f}" if one and row else MISSING


def _peak_ratio(one: Measurement | None, family: str) -> str:
    row, plain = (one.row(family), one.row("plain")) if one else (None, None)
    return f"{peak(row, 'anonymous') / peak(plain, 'anonymous'):.2f}" if row and plain else MISSING


def _against_peers(results: Results) -> str:
    widths = [one.settings["width"] for one in results.steps]
    tokens = [one.settings["tokens"] for one in results.steps]
    beaten = []
    for peer in PEERS:
        times = [x for one, share in results.cells() if (x := advantage(one, "lorica fast", peer, share)) is not None]
        if times:
            spread = f"{min(times):.2f} to {max(times):.2f}"
            beaten.append(f"**{median(times):.2f} times** as long with {FAMILIES[peer]} ({spread})")
    return (
        f"Over {len(results.steps)} configurations (width {min(widths)} to {max(widths)}, {thousands(min(tokens))} to "
        f"{thousands(max(tokens))} tokens per step; 1/2, 3/4 and 0.9 protected) a step takes, in the median, "
        f"{listed(beaten)}."
    )


def _largest_model(results: Results) -> str:
    (counted,) = results.arithmetic
    rows = {r["family"]: r for r in counted.rows if r["model"] == "Llama-3.1-8B" and r["protected"] == 0.75}
    told = [f"{FAMILIES[family]} {rows[family]['state_bytes'] / 1e9:.1f}" for family in FAMILIES if family in rows]
    return f"Counted from shapes, the training state of Llama-3.1-8B in bfloat16 takes, in GB: {listed(told)}."


def _machine(results: Results) -> str:
    record = results.steps[0].record
    hardware, versions = record["hardware"], record["versions"]
    packages = ["torch", "transformers", "peft", "rhai-innovation-mini-trainer"]
    used = listed([f"{name} {versions[name]}" for name in packages if versions.get(name)])
    cpu = hardware.get("cpu") or hardware["machine"]
    return f"Measured on {cpu} with {record['threads']} threads, {used}, {record['date'][:10]}."


def _claims(results: Results) -> str:
    signs = {"<=": "at most", ">=": "at least", "<": "below", ">": "above"}
    rows = [
        [one.what, f"{signs[one.sign]} {one.told(one.bound)}", one.told(one.found), "yes" if one.holds else "**no**"]
        for one in claims(results)
    ]
    return table(["claim", "bound", "measured", "holds"], rows)


def _shares(results: Results) -> list[float]:
    return sorted({share for _, share in results.cells()}, key=lambda share: (share != 0.75, share))


def _step_table(results: Results, share: float) -> str:
    rows = []
    for one in (one for one in results.steps if share in one.shares):
        plain = one.row("plain")
        assert plain is not None
        cells = [_with_quartiles(one, one.row(family, share)) for family in OTHERS]
        rows.append([one.label, str(one.settings["rounds"]), f"{plain['tokens_per_second']:.0f}", *cells])
    header = ["width, tokens", "rounds", "tokens/s, plain", *(FAMILIES[family] for family in OTHERS)]
    return f"{share:g} protected:\n\n{table(header, rows)}"


def _with_quartiles(one: Measurement, row: Row | None) -> str:
    if row is None:
        return MISSING
    return f"{time_ratio(one, row):.2f} ({row['ratio']['low']:.2f}-{row['ratio']['high']:.2f})"


def _state_table(results: Results) -> str:
    sizes: dict[int, Measurement] = {}
    for one in results.steps:
        sizes.setdefault(one.settings["width"], one)
    header = ["width", "protected", "plain", *(FAMILIES[family] for family in OTHERS), "mapped, lean"]
    return table(header, [_state_row(one, share) for one in sizes.values() for share in one.shares])


def _state_row(one: Measurement, share: float) -> list[str]:
    rows = {family: one.row(family, share) for family in FAMILIES}
    ratios = [f"{row['state_ratio']:.2f}" if row else MISSING for row in (rows[family] for family in OTHERS)]
    plain, lean = rows["plain"], rows["lorica lean"]
    in_full = size(plain["state_bytes"]) if plain else MISSING
    return [str(one.settings["width"]), f"{share:g}", in_full, *ratios, size(lean["mapped_bytes"]) if lean else MISSING]


def _peak_table(one: Measurement) -> str:
    settings = one.settings
    what = f"width {settings['width']}, {settings['layers']} layers, {thousands(settings['tokens'])} tokens"
    header = [what, *PHASES, "to protect", "to release", "others / training"]
    return table(header, [_peak_row(row, name) for family, name in FAMILIES.items() if (row := one.row(family))])


def _peak_row(row: Row, name: str) -> list[str]:
    peaks = [size(round(row["phases"][phase]["peak_anonymous"])) for phase in PHASES]
    clock = [row["phases"][phase]["seconds"] for phase in ("protect", "release")]
    seconds = ["< 1 ms" if taken < 1e-3 else duration(taken) for taken in clock]
    return [name, *peaks, *seconds, f"{beside_training(row):.2f}"]


def _tasks(results: Results) -> str:
    first = results.tasks[0].settings
    rows = [
        [FAMILIES[f"lorica {one.settings['memory']}"],
         *(f"{late_over_early(one, value):.3f}" for value in ("seconds", "state_bytes", "resident_bytes"))]
        for one in results.tasks
    ]  # fmt: skip
    told = (
        f"{first['tasks']} tasks in a row on one model (width {first['width']}, {first['layers']} layers), each "
        f"of them protect, {first['steps']} steps, release. The last {first['rounds']} take turns with the first ones "
        f"of a new stream in a new process; a figure is the median of task {first['tasks']} over task "
        f"{first['rounds'] + 1}, of the two before them, and so on (`benchmarks/tasks.py`):"
    )
    return f"{told}\n\n{table(['', 'seconds', 'state', 'resident memory'], rows)}"


def _split(timed: Row) -> str:
    """Return a row per shape and one for the model, seconds."""
    kinds = list(timed["model_seconds"])
    rows = [
        ["{} x {}".format(*one["shape"]), str(one["count"]),
         *(f"{median(one['seconds'][kind]):.2f}" for kind in kinds), scientific(one["angle"])]
        for one in timed["shapes"]
    ]  # fmt: skip
    rows.append(["all", str(timed["weights"]), *(f"{seconds:.0f}" for seconds in timed["model_seconds"].values()), ""])
    told = (
        f"The {timed['weights']} constrained weights of {timed['model']} ({timed['numbers'] / 1e9:.2f} billion "
        f"numbers, random, {timed['dtype']}), {timed['protected']:g} protected, one after the other on "
        f"{timed['threads']} threads; seconds, the median for one weight of each shape and, last, for all of them:"
    )
    names = ["in full", "in full, stored", "from the cache", "after a task"]
    return f"{told}\n\n{table(['shape', 'weights', *names, 'angle'], rows)}"


def _inference(results: Results) -> str:
    rows = []
    for one in results.inference:
        for family in OURS:
            found = {row["activity"]: row for row in one.rows if row["family"] == family}
            cells = [_inference_cell(found[activity]) for activity in ("evaluation", "generation")]
            rows.append([str(one.settings["width"]), FAMILIES[family], *cells])
    return table(["width", "", "evaluation", "generation"], rows, left=2)


def _inference_cell(row: Row) -> str:
    ratio = row["ratio"]
    return f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"


def _arithmetic(results: Results) -> str:
    (counted,) = results.arithmetic
    families = ["plain", *PEERS, *OURS]
    cells = {(r["model"], r["protected"], r["family"]): r for r in counted.rows}
    rows = [
        [model, f"{share:g}", *(_gigabytes(cells[model, share, family]["state_bytes"]) for family in families),
         _gigabytes(cells[model, share, "lorica lean"]["aside_bytes"])]
        for model, share in dict.fromkeys((model, share) for model, share, _ in cells)
    ]  # fmt: skip
    return table(["model", "protected", *(FAMILIES[family] for family in families), "aside, lean"], rows)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}"
