"""`qdense push`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qdense.libraries import quiet_libraries
from qdense.text import printable

HELP = "upload an adapter to the Hugging Face hub"
DESCRIPTION = (
    "Upload a run's adapter, its recipe, and a model card that is written from the run: method, data, curve, results. The "
    "repository is private unless you say otherwise. Paths of this machine are left out."
)
EXAMPLES = """\
  qdense push runs/questions me/questions-denselora --dry-run
  qdense push runs/questions me/questions-denselora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or an adapter's")
    parser.add_argument(
        "repository", metavar="OWNER/NAME", help="the repository on the hub; it is created if it does not exist"
    )
    parser.add_argument(
        "--base",
        metavar="OWNER/NAME",
        help="the base model's name on the hub, if it was loaded from a folder (default: as recorded)",
    )
    parser.add_argument("--public", action="store_true", help="let everyone see it (of a new repository)")
    parser.add_argument("--dry-run", action="store_true", help="print the model card and upload nothing")


def run(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    from qdense.publish import model_card, push

    if arguments.dry_run:
        print(printable(model_card(arguments.run, arguments.repository, base=arguments.base)))
        return
    address = push(arguments.run, arguments.repository, base=arguments.base, is_public=arguments.public)
    print(printable(address))
    print(printable(f"Try it: qdense chat {arguments.repository}"), file=sys.stderr)
