"""`qdense export`"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from qdense.cli.arguments import add_json, positive, tell
from qdense.libraries import quiet_libraries

HELP = "write an adapter as a plain LoRA, for other programs"
DESCRIPTION = (
    "Write an adapter as a LoRA in PEFT's format, which PEFT without qdense, vLLM and llama.cpp's converter read. It is "
    "exact for adapters that are a matrix (denselora-only-matrix, nora). Others are fitted to your rows by least squares, with a "
    "report of what is lost."
)
EXAMPLES = """\
  qdense export runs/only-matrix lora
  qdense export runs/questions lora --fit questions.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or an adapter's")
    parser.add_argument("output", metavar="DIR", type=Path, help="the folder to write the LoRA to")
    parser.add_argument("--to", choices=("lora",), default="lora", help="the format (default and only one: lora)")
    parser.add_argument(
        "--rank", type=positive, metavar="N", help="LoRA's rank (default: the adapter's, which is the most)"
    )
    parser.add_argument(
        "--fit",
        metavar="ROWS",
        type=Path,
        help="rows like those of training, for an adapter that cannot be written as a matrix (default: refuse it)",
    )
    parser.add_argument(
        "--rows", type=positive, metavar="N", default=512, help="with --fit: use at most N rows (default: 512)"
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        default=512,
        help="with --fit: cut rows at N tokens (default: 512)",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    from qdense.modeling.export import export_lora

    report = export_lora(
        arguments.run,
        arguments.output,
        rank=arguments.rank,
        fit=arguments.fit,
        num_rows=arguments.rows,
        max_length=arguments.max_length,
        notice=tell,
    )
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
        return
    from qdense.ui.console import make_console
    from qdense.ui.tables import show_export

    show_export(make_console(), report)
