"""`qdense models`"""

from __future__ import annotations

import argparse
import json

from qdense.cli.arguments import add_json

HELP = "list the families of models, and what qdense does on each"
DESCRIPTION = (
    "List the families of models that qdense knows, by the model_type in config.json: whether rows are packed, whether memory is "
    "planned, what it was tried on. A model of another family can be trained too, if its layers have linear modules: padded, "
    "with the modules named in adapter.target_modules."
)
EXAMPLES = """\
  qdense models
  qdense models --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from qdense.catalogs.families import FAMILIES

    if arguments.json:
        print(json.dumps({"families": [family.as_json() for family in FAMILIES.values()]}, indent=2))
        return
    from qdense.ui.console import make_console
    from qdense.ui.tables import show_families

    show_families(make_console(), list(FAMILIES.values()))
