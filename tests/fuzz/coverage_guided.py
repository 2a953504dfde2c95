"""Coverage-guided fuzzing, for a person to run for as long as they like.

    pip install atheris
    python -m tests.fuzz.coverage_guided rows -atheris_runs=1000000
    python -m tests.fuzz.coverage_guided checkpoint -max_total_time=3600

The first byte of an input says which file it stands for, the rest is what is in it. It starts from valid files.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("coverage-guided fuzzing needs atheris: pip install atheris")

with atheris.instrument_imports(include=["lorica"]):
    from tests.fuzz.readers import READERS


def main() -> None:
    """Fuzz the reader that the first word names; the others go to the fuzzer."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in READERS:
        sys.exit(f"give one of {', '.join(READERS)}, then options of libFuzzer")
    reader = READERS[name]
    names = sorted({file for file, _ in reader.seeds()})
    with tempfile.TemporaryDirectory() as corpus, tempfile.TemporaryDirectory() as folder:
        for number, (file, data) in enumerate(reader.seeds()):
            Path(corpus, str(number)).write_bytes(bytes([names.index(file)]) + data)

        def one(data: bytes) -> None:
            reader.check(Path(folder), (names[data[0] % len(names)] if data else names[0], data[1:]))

        atheris.Setup([sys.argv[0], corpus, *sys.argv[2:]], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
