"""`qdense compare`"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qdense.errors import QDenseError

HELP = "compare runs side by side, with paired tests"
DESCRIPTION = (
    "Compare evaluated runs side by side, on the items they have in common: accuracies, differences from the first run with "
    "an exact paired test for each task, and a bootstrap interval for the average. Seeds of one recipe are pooled."
)
EXAMPLES = """\
  qdense compare runs/lora-1 runs/lora-2 runs/dense-1 runs/dense-2 --published llama3-8b
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        type=Path,
        help="a run's folder, one evaluation's (RUN/eval/DIGEST), or runs/base-MODEL",
    )
    parser.add_argument(
        "--rule",
        choices=("paper", "strict"),
        default="paper",
        help="how answers are read: by the authors' rule (paper, the default) or strictly",
    )
    parser.add_argument(
        "--published", choices=("llama3-8b", "llama2-7b"), help="add the published rows for this model, marked as such"
    )
    parser.add_argument(
        "--format", choices=("table", "json", "csv", "markdown"), help="default: from the suffix of FILE, else table"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="write to FILE (.json, .csv, .md, .txt) instead of stdout"
    )


def run(arguments: argparse.Namespace) -> None:
    if not arguments.runs and arguments.published is None:
        raise QDenseError("nothing to compare: name evaluated runs, or published rows with --published llama3-8b")
    from qdense.cache import write_atomically
    from qdense.comparison.compare import compare
    from qdense.comparison.evaluations import load_evaluation
    from qdense.comparison.tables import as_csv, as_markdown
    from qdense.text import clean
    from qdense.ui.comparison import show_comparison
    from qdense.ui.console import drawn, make_console

    comparison = compare(
        [load_evaluation(run) for run in arguments.runs], rule=arguments.rule, published=arguments.published
    )
    output: Path | None = arguments.output
    by_suffix = {".json": "json", ".csv": "csv", ".md": "markdown", ".txt": "table"}
    form = arguments.format or (by_suffix.get(output.suffix.lower()) if output else "table")
    if form is None:
        raise QDenseError(f"--output {output}: its suffix must be one of {', '.join(by_suffix)}, or name a --format")
    if form == "table" and output is None:
        show_comparison(make_console(), comparison)
        return
    if form == "json":
        text = json.dumps(comparison, indent=2) + "\n"
    elif form == "table":
        text = drawn(lambda console: show_comparison(console, comparison))
    else:
        text = as_csv(comparison) if form == "csv" else as_markdown(comparison)
        text = "\n".join(map(clean, text.split("\n")))  # it may be printed, and contains names of folders
    if output is None:
        sys.stdout.write(text)
    else:
        write_atomically(output, text)
