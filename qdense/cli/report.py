"""`qdense report`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qdense.cli.arguments import add_experiment, add_price
from qdense.libraries import quiet_libraries, require_library

HELP = "write a page with all results of experiments"
DESCRIPTION = (
    "Write the saved results of experiments as one HTML page, which needs no network, and as Markdown: tables beside "
    "published rows, charts, paired tests, how each learning rate was found, and cost. Nothing is trained or evaluated."
)
EXAMPLES = """\
  qdense report small/wordproblems --open
  qdense report paper/table1-llama3-8b paper/figure4 --output pages --price "RTX 4090=0.35"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser, several=True)
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="where report.html and report.md are written (default: RUNS/reports/NAME)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    add_price(parser)


def run(arguments: argparse.Namespace) -> None:
    from qdense.experiments.cells import SweepFolder
    from qdense.experiments.experiment import load_experiment

    experiments = [load_experiment(name, arguments.set) for name in arguments.experiments]
    for library in ("altair", "vl_convert"):
        require_library(library, extra="experiments", purpose="qdense report")
    quiet_libraries()
    from datetime import UTC, datetime

    from qdense.cache import write_atomically
    from qdense.experiments.page import as_html, as_markdown
    from qdense.experiments.report import report_on
    from qdense.provenance import git_hash
    from qdense.version import __version__

    folder = SweepFolder(arguments.runs)
    parts = report_on(experiments, folder, dict(arguments.price))
    title = parts[0].title if len(parts) == 1 else f"{len(parts)} experiments"
    made = f"Made on {datetime.now(UTC):%Y-%m-%d} by qdense {__version__}, commit {git_hash()[:12]}."
    output = arguments.output or folder.reports / "-".join(each.name.replace("/", "-") for each in experiments)
    write_atomically(output / "report.html", as_html(title, parts, made))
    write_atomically(output / "report.md", as_markdown(title, parts, made))
    print(f"{output / 'report.html'}\n{output / 'report.md'}")
    if arguments.open:
        import webbrowser

        if not webbrowser.open((output / "report.html").resolve().as_uri()):
            print(f"no browser found: open {output / 'report.html'} in one", file=sys.stderr)
