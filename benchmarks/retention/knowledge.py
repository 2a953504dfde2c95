"""Write the knowledge bed: a model that knows 1800 facts and four skills is to learn four more sets of 1800 facts.

    python -m benchmarks.retention.knowledge --output_dir BED --seed 0
    python -m benchmarks.retention.base_model --data_dir BED --output_dir BED/1m --size 1m
    lorica run BED/stream.yaml --config benchmarks/retention/knowledge.yaml \\
        --model_name_or_path BED/1m --output_dir OUT
    python -m benchmarks.retention.recall OUT

The people of all sets are others; their names are put together from the same 128 words, and the answers are the same
120 words, so that what is new has to be kept apart from what is old. The model can know no fact before it has learned
it, and a scored row is one that was learned: nothing can be held back to choose settings on. Choose them on a bed of
another seed.

``--mixed 0.01 0.05 0.2`` writes ``mixed-1.yaml``, ``mixed-5.yaml`` and ``mixed-20.yaml`` too: the same stream with old
rows mixed into what is learned, which is replay, for any method.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.retention.bed import add_mixed, people_for, run_script, write_bed, write_mixed


def write(arguments: argparse.Namespace) -> None:
    people = people_for(arguments.facts)
    tasks = [f"facts-{number}" for number in range(1, arguments.sets + 1)]
    write_bed(
        arguments.output_dir,
        "knowledge",
        f"a model that knows {arguments.facts} facts learns {arguments.sets} more sets of as many",
        seed=arguments.seed,
        base=people,
        tasks=tasks,
        people=people,
        test_rows=arguments.test_rows,
    )
    for share in arguments.mixed:
        write_mixed(arguments.output_dir, share, tasks, arguments.seed)
    print(f"{arguments.output_dir}: {arguments.sets + 1} sets of {arguments.facts} facts, seed {arguments.seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the bed")
    parser.add_argument("--seed", type=int, default=0, help="of the names, the facts and the skills' rows")
    parser.add_argument("--sets", type=int, default=4, help="sets that are learned one after the other")
    parser.add_argument("--facts", type=int, default=1800, help="of each set, and of what the base knows")
    parser.add_argument("--test_rows", type=int, default=300, help="facts of each set that are scored")
    add_mixed(parser)
    run_script(parser, write)


if __name__ == "__main__":
    main()
