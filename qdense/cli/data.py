"""`qdense data`: `check` and `show`."""

from __future__ import annotations

import argparse
import json
import sys

from qdense.cli.arguments import add_data_dir, add_json, add_recipe, positive
from qdense.errors import counted
from qdense.libraries import quiet_libraries

HELP = "inspect data sets"
DESCRIPTION = "Inspect data sets."
EXAMPLES = """\
  qdense data show questions.toml
  qdense data check math10k gsm8k,addsub
  qdense data check questions.jsonl all --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    show = commands.add_parser(
        "show",
        help="show rows as the model reads them",
        description="Show rows as the model reads them, with what counts in the loss; their lengths; what is cut or skipped; and "
        "whether the model learns to end its answers. The weights are not needed.",
        epilog="example: qdense data show questions.toml -n 5",
    )
    add_recipe(show)
    show.add_argument("-n", metavar="N", dest="num_rows", type=positive, default=3, help="rows to show (default: 3)")
    add_data_dir(show)
    add_json(show)
    show.set_defaults(data_command=_show)
    check = commands.add_parser(
        "check",
        help="find test items in a training set",
        description="Find the test items that a training set contains, exactly or nearly. The exit status is 0 whatever is "
        "found.",
        epilog="example: qdense data check questions.jsonl gsm8k,addsub",
    )
    check.add_argument("train", metavar="TRAIN", help="a known training set (math10k, ...), a file, or a recipe")
    check.add_argument("tasks", metavar="TASKS", help="comma-separated tasks: gsm8k, math, commonsense, all, ...")
    add_data_dir(check)
    add_json(check)
    check.set_defaults(data_command=_check)


def run(arguments: argparse.Namespace) -> None:
    arguments.data_command(arguments)


def _show(arguments: argparse.Namespace) -> None:
    from qdense.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)
    quiet_libraries()
    from dataclasses import asdict

    from qdense.training.preview import preview
    from qdense.ui.console import make_console
    from qdense.ui.data import show_preview, warnings_of

    shown = preview(recipe, arguments.data_dir, arguments.num_rows)
    if arguments.json:
        print(json.dumps(asdict(shown) | {"warnings": warnings_of(shown)}, indent=2))
    else:
        show_preview(make_console(), shown)


def _check(arguments: argparse.Namespace) -> None:
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
        rows = counted(len(training.skipped), "row could not be read and is", "rows could not be read and are")
        make_console(sys.stderr).print(f"{rows} left out; the first: {training.skipped[0]}")
    if arguments.json:
        print(json.dumps(found, indent=2))
        return

    show_contamination(make_console(), training.origin, found)
