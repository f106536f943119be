"""`qdense tasks`"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qdense.cli.arguments import add_data_dir, add_json
from qdense.errors import QDenseError, counted

if TYPE_CHECKING:
    from qdense.benchmarks.tasks import Task

HELP = "list the benchmarks, or export them to lm-evaluation-harness"
DESCRIPTION = "List the benchmarks, or write them as task files for lm-evaluation-harness, as a second opinion."
EXAMPLES = """\
  qdense tasks
  qdense tasks math --export lm-eval exported
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", metavar="TASKS", nargs="?", help="only these, comma-separated (default: all)")
    add_json(parser)
    parser.add_argument("--export", nargs=2, metavar=("lm-eval", "DIR"), help="write task files into this folder")
    parser.add_argument(
        "--template", metavar="NAME", help="with --export: prompt template of the tasks (default: alpaca)"
    )
    parser.add_argument(
        "--decoding",
        choices=("greedy", "beam4"),
        help="with --export: decoding of the tasks (default: greedy; the harness cuts beam searches short)",
    )
    add_data_dir(parser)


def run(arguments: argparse.Namespace) -> None:
    from qdense.benchmarks.tasks import GROUPS, TASKS, describe, tasks_named

    chosen = TASKS if arguments.tasks is None else {task.name: task for task in tasks_named(arguments.tasks)}
    if own := [str(task.file) for task in chosen.values() if isinstance(task.file, Path)]:
        raise QDenseError(
            f"{own[0]}: only benchmarks are listed and exported; `qdense evaluate {own[0]}` scores a file"
        )
    groups = {name: members for name, members in GROUPS.items() if chosen.keys() >= set(members)}
    if arguments.export is not None:
        _export(arguments, list(chosen.values()))
        return
    for option in ("template", "decoding"):
        if getattr(arguments, option) is not None:
            raise QDenseError(f"--{option}: only for exported tasks; add --export lm-eval DIR")
    if arguments.json:
        print(json.dumps({"tasks": [describe(task) for task in chosen.values()], "groups": groups}, indent=2))
        return
    from qdense.ui.console import make_console
    from qdense.ui.tables import show_tasks

    show_tasks(make_console(), chosen, groups)


def _export(arguments: argparse.Namespace, tasks: Sequence[Task]) -> None:
    import shlex

    kind, folder = arguments.export
    if kind != "lm-eval":
        raise QDenseError(f'--export "{kind}": unknown format; known: lm-eval')
    if not folder:
        raise QDenseError("--export lm-eval: name the folder to write into")

    from qdense.benchmarks.harness import export
    from qdense.cache import cache_dir
    from qdense.data.templates import template_named
    from qdense.inference.generation import DECODINGS

    template, decoding = template_named(arguments.template or "alpaca"), DECODINGS[arguments.decoding or "greedy"]
    names = export(tasks, Path(folder), arguments.data_dir, template, decoding)
    if arguments.json:
        print(json.dumps({"folder": folder, "num_tasks": len(tasks), "names": names}, indent=2))
        return
    print(f"wrote {counted(len(tasks), 'task')} to {folder} (template {template.name}, {decoding.name})")
    if decoding.name == "beam4":
        print(
            "The harness ends the beam search of a whole batch as soon as one beam ends, so its completions will differ."
        )
    print(
        "\nRun them (pip install lm-eval) on an adapter that was trained with this template:\n"
        "  python -m qdense.tuners lm_eval --model hf --model_args pretrained=MODEL,peft=RUN/adapter,dtype=bfloat16 \\\n"
        f"    --include_path {shlex.quote(folder)} --tasks {','.join(names)} --batch_size 16\n"
        "MODEL is a hub id or a folder. For an NF4 base, name the folder that qdense has cached, and the tokenizer:\n"
        f"  pretrained={cache_dir('quantized')}/NAME-...,tokenizer=MODEL"
    )
