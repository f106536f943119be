"""How long `qdense data check commonsense170k all` takes, at its full size, where not all of its files are at hand.

    QDENSE_DATA=../shared/data .venv/bin/python tools/bench_contamination.py

Test sets that are not in the data folder are stood in for by training rows with some words exchanged, as many as the real
set has items: more alike than real ones, so no easier. The training set is filled up to 170,420 rows in the same way.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import time
from pathlib import Path

from qdense.benchmarks.tasks import GROUPS, TASKS, load_items
from qdense.catalogs.datasets import UpstreamFile
from qdense.data.contamination import TrainingIndex
from qdense.data.rows import Row, read_rows

NUM_ROWS = 170_420  # of Commonsense170K


def exchanged(row: Row, generator: random.Random, vocabulary: list[str]) -> Row:
    """The row with a fifth of its words exchanged for others."""
    words = [generator.choice(vocabulary) if generator.random() < 0.2 else word for word in row.instruction.split(" ")]
    return row._replace(instruction=" ".join(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", type=Path, default=os.environ.get("QDENSE_DATA"), required="QDENSE_DATA" not in os.environ
    )
    parser.add_argument("--train", default="ft-training_set/commonsense_SUBSTITUTE_148k.jsonl.gz")
    arguments = parser.parse_args()
    data_dir = Path(arguments.data_dir)
    generator = random.Random(0)
    rows = read_rows(data_dir / arguments.train).rows
    vocabulary = sorted({word for row in rows[:2000] for word in row.instruction.split()})
    num_real = len(rows)
    rows += [exchanged(generator.choice(rows), generator, vocabulary) for _ in range(NUM_ROWS - num_real)]
    tests, stand_ins = {}, []
    for name in GROUPS["all"]:
        task = TASKS[name]
        assert isinstance(task.file, UpstreamFile)
        if (data_dir / task.file.path).is_file():
            tests[name] = load_items(task, data_dir).rows
        else:
            stand_ins.append(name)
            tests[name] = [exchanged(generator.choice(rows), generator, vocabulary) for _ in range(task.num_items)]
    started = time.perf_counter()
    index = TrainingIndex(rows)
    for name, items in tests.items():
        found = index.check(items)
        print(f"{name}{' (stand-in)' if name in stand_ins else ''}: {found.num_exact} exact, {found.num_near} near")
    took = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    num_items = sum(map(len, tests.values()))
    print(f"{len(rows):,} rows ({num_real:,} real) against {num_items:,} items: {took:.1f} s, peak {peak:.2f} GiB")


if __name__ == "__main__":
    main()
