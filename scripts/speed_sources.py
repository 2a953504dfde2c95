"""What the sources that measure cost: a step beside one of ``weight``, and the calibration before it."""

from __future__ import annotations

from speed_results import Measurement, Results, Row
from speed_tables import table

from lorica.units import duration, size

NOT_YET = "Not measured yet; `make bench` does."


def source_blocks(results: Results) -> dict[str, str]:
    """Return what stands between the marks of the section on sources."""
    calibrations = [_calibration(one) for one in results.calibration]
    return {"sources": _steps(results) or NOT_YET, "calibration": "\n\n".join(calibrations) or NOT_YET}


def _steps(results: Results) -> str:
    rows = [_step_row(one, row) for one in results.sources for row in one.rows if row["source"] != "weight"]
    header = ["width, tokens", "source", "constraint", "protected", "rounds", "step", "state", "peak of a step"]
    return table(header, rows, left=3) if rows else ""


def _step_row(one: Measurement, row: Row) -> list[str]:
    ratio = row["ratio"]
    what = [one.label, f"`{row['source']}`", f"`{row['constraint']}`", f"{row['protected']:g}"]
    step = f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"
    return [*what, str(len(row["seconds"])), step, f"{row['state_ratio']:.3f}", f"{row['peak_ratio']:.3f}"]


def _calibration(one: Measurement) -> str:
    *sources, text = one.rows
    settings = one.settings
    told = (
        f"The shapes of {settings['model']} ({settings['num_hidden_layers']} layers, width {settings['hidden_size']}, "
        f"vocabulary cut to {settings['vocab_size']}: {settings['parameters'] / 1e9:.2f} billion numbers, random, "
        f"{settings['dtype']}), {settings['sequences']} sequences of {settings['length']} random tokens, "
        f"{sources[0]['protected']:g} protected, on {one.record['threads']} threads. Directions and bases were made of "
        f"{settings['decomposed']} of the {settings['num_hidden_layers']} layers, which are alike, and are counted for "
        "all; the passes are over all of them:"
    )
    header = ["source", "passes", "sums of a pass", "passes take", "directions", "bases", "together",
              "peak", "directions kept", "bases kept"]  # fmt: skip
    rate = text["tokens_per_second"]
    own = (
        f"The model wrote {text['tokens']:,} tokens of its own in {duration(text['seconds'])}, {rate:.0f} a second; at "
        f'that rate `calibration="self"` writes its {text["default_tokens"]:,} in '
        f"{duration(text['default_tokens'] / rate)}. The passes take in proportion to the tokens, directions and bases "
        "do not depend on them."
    )
    return f"{told}\n\n{table(header, [_calibration_row(row) for row in sources])}\n\n{own}"


def _calibration_row(row: Row) -> list[str]:
    seconds, nbytes = row["model_seconds"], row["model_bytes"]
    times = [seconds["passes"], seconds["factors"], seconds["bases"], sum(seconds.values())]
    sums = max(one["sum_bytes"] for one in row["passes"])
    sizes = [row["phases"]["measure"]["peak_anonymous"], nbytes["factors"], nbytes["bases"]]
    return [f"`{row['source']}`, `{row['constraint']}`", str(len(row["passes"])), size(sums),
            *map(duration, times), *(size(round(one)) for one in sizes)]  # fmt: skip
