"""`qdense merge`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qdense.cli.arguments import add_json, tell
from qdense.libraries import quiet_libraries

HELP = "merge an adapter into its base model"
DESCRIPTION = (
    "Merge an adapter into its base model. LoRA and others can be merged; DenseLoRA cannot (see `qdense export --fit`). The sum "
    "is computed in fp32 and rounded once, and the loss is reported."
)
EXAMPLES = """\
  qdense merge runs/only-matrix merged-model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or an adapter's")
    parser.add_argument("output", metavar="DIR", type=Path, help="the folder to write the model to")
    parser.add_argument(
        "--onto",
        choices=("original", "nf4"),
        default="original",
        help="the weights to add to: the base's original ones (default), or the NF4 values the adapter was trained on",
    )
    parser.add_argument(
        "--into-nf4-with-loss",
        action="store_true",
        help="quantize the sum to NF4 again, which rounds most of a small adapter away; the loss is reported",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    from qdense.modeling.merge import merge

    report = merge(
        arguments.run, arguments.output, onto=arguments.onto, into_nf4=arguments.into_nf4_with_loss, notice=tell
    )
    if arguments.json:
        from dataclasses import asdict

        print(json.dumps(asdict(report), indent=2))
        return
    from qdense.ui.console import make_console
    from qdense.ui.tables import show_merge

    show_merge(make_console(), report)
