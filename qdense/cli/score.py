"""`qdense score`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qdense.cli.arguments import add_data_dir, add_json, positive

HELP = "score existing completions, without a model"
DESCRIPTION = (
    'Score completions, one {"index": i, "completion": "..."} per line, against a test set. No model is needed.'
)
EXAMPLES = """\
  qdense score gsm8k completions.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help="a benchmark, for instance gsm8k")
    parser.add_argument("completions", metavar="COMPLETIONS.jsonl", type=Path, help="the file of completions")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="the file holds only the first N items (default: all)"
    )
    add_data_dir(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from qdense.benchmarks.results import read_completions, score_task
    from qdense.benchmarks.tasks import load_items, task_named

    task = task_named(arguments.task)
    labels = [row.answer for row in load_items(task, arguments.data_dir).rows[: arguments.limit]]
    result, _ = score_task(task, labels, read_completions(arguments.completions, len(labels)))
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    from qdense.ui.console import make_console
    from qdense.ui.tables import show_score

    show_score(make_console(), result)
