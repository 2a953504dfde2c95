"""Write the bed of many short tasks: the knowledge bed's model is to learn 50 sets of 120 facts, one after the other.

    python -m benchmarks.retention.many --output_dir BED --seed 0
    lorica run BED/stream.yaml --config benchmarks/retention/many.yaml \\
        --model_name_or_path KNOWLEDGE/1m --output_dir OUT
    python -m benchmarks.retention.recall OUT

KNOWLEDGE is a knowledge bed of the same seed, whose model is the one to start from. Each task is about 20 other people.
``--mixed 0.05`` writes the stream with replay too, ``mixed-5.yaml``, as knowledge.py does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.retention.bed import add_mixed, people_for, run_script, write_bed, write_mixed


def write(arguments: argparse.Namespace) -> None:
    tasks = [f"task-{number:02}" for number in range(1, arguments.tasks + 1)]
    write_bed(
        arguments.output_dir,
        "many",
        f"a model learns {arguments.tasks} sets of {arguments.facts} facts, one after the other",
        seed=arguments.seed,
        base=people_for(arguments.base_facts, "--base_facts"),
        tasks=tasks,
        people=people_for(arguments.facts),
        test_rows=arguments.test_rows,
    )
    for share in arguments.mixed:
        write_mixed(arguments.output_dir, share, tasks, arguments.seed)
    print(f"{arguments.output_dir}: {arguments.tasks} sets of {arguments.facts} facts, seed {arguments.seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the bed")
    parser.add_argument("--seed", type=int, default=0, help="of the knowledge bed that the model is from")
    parser.add_argument("--tasks", type=int, default=50, help="sets that are learned one after the other")
    parser.add_argument("--facts", type=int, default=120, help="of each set")
    parser.add_argument("--base_facts", type=int, default=1800, help="facts of the knowledge bed, which the base knows")
    parser.add_argument("--test_rows", type=int, default=24, help="facts of each set that are scored")
    add_mixed(parser)
    run_script(parser, write)


if __name__ == "__main__":
    main()
