"""`qdense data`: with one command, `check`."""

from __future__ import annotations

import argparse
import json
import sys

from qdense.cli.arguments import add_data_dir, add_json

HELP = "inspect data sets"
DESCRIPTION = "Inspect data sets."
EXAMPLES = """\
  qdense data check math10k gsm8k,addsub
  qdense data check questions.jsonl all --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    check = parser.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "check",
        help="find test items in a training set",
        description="Find the test items that a training set contains, exactly or nearly. The exit status is 0 whatever is "
        "found.",
    )
    check.add_argument("train", metavar="TRAIN", help="a known training set (math10k, ...), a file, or a recipe")
    check.add_argument("tasks", metavar="TASKS", help="comma-separated tasks: gsm8k, math, commonsense, all, ...")
    add_data_dir(check)
    add_json(check)


def run(arguments: argparse.Namespace) -> None:
    from qdense.benchmarks.tasks import load_items, tasks_named

    tasks = tasks_named(arguments.tasks)

    from qdense.data.contamination import describe, overlaps
    from qdense.data.sources import load_named_or_file

    training = load_named_or_file(arguments.train, arguments.data_dir)
    tests = {task.name: load_items(task, arguments.data_dir) for task in tasks}
    found = {task: describe(overlap, training, tests[task]) for task, overlap in overlaps(training, tests).items()}
    from qdense.ui.console import make_console
    from qdense.ui.tables import show_contamination

    if training.skipped:
        count = len(training.skipped)
        rows = f"{count:,} rows could not be read and are" if count > 1 else "1 row could not be read and is"
        make_console(sys.stderr).print(f"{rows} left out; the first: {training.skipped[0]}")
    if arguments.json:
        print(json.dumps(found, indent=2))
        return

    show_contamination(make_console(), training.origin, found)
