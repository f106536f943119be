"""`qdense analyze`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qdense.cli.arguments import add_json, layer_numbers, positive
from qdense.libraries import quiet_libraries, require_library

HELP = "show what training changed in the adapters"
DESCRIPTION = (
    "Compare the updates of finished runs, from each run's initial and final values: size, share near zero, effective rank; "
    'with heat maps of slices of equal size, and histograms, as PNG. Needs "qdense[plots]".'
)
EXAMPLES = """\
  qdense analyze runs/dense runs/lora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a finished run's folder")
    parser.add_argument(
        "--layers",
        metavar="N,N",
        type=layer_numbers,
        help="layers to draw heat maps of (default: the first, a middle one, the last)",
    )
    parser.add_argument(
        "--side",
        type=positive,
        metavar="N",
        help="side length of the square slices (default: the smallest matrix's, up to 64)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed for drawing the slices (default: 0)")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="folder for the files (default: analysis/ in the first run)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    require_library("matplotlib", extra="plots", purpose="qdense analyze")
    quiet_libraries()
    from qdense.analysis import analyze

    analysis = analyze(
        arguments.runs, arguments.output, layers=arguments.layers, side=arguments.side, seed=arguments.seed
    )
    if arguments.json:
        from dataclasses import asdict

        print(json.dumps(asdict(analysis), indent=2))
        return
    from qdense.ui.console import make_console
    from qdense.ui.tables import show_analysis

    show_analysis(make_console(), analysis)
