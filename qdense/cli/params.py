"""`qdense params`"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from qdense.cli.arguments import add_json, as_toml, positive
from qdense.errors import QDenseError, did_you_mean

if TYPE_CHECKING:
    from qdense.planning.parameters import ParameterCount

HELP = "count trainable parameters"
DESCRIPTION = "Count trainable parameters from built-in shapes, without weights or network."
EXAMPLES = """\
  qdense params llama3-8b --r 32 --method all
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", metavar="RECIPE_OR_MODEL", help="a recipe, or a built-in model such as llama3-8b")
    parser.add_argument(
        "--method", metavar="NAME", help="a method's name, or all (default: the recipe's; for a model, denselora)"
    )
    parser.add_argument("--r", type=positive, help="rank (default: the recipe's; for a model, 32)")
    parser.add_argument(
        "--target-modules",
        metavar="LETTERS",
        help="the paper's letters (default: the recipe's; for a model, \"QKVUD\")",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from qdense.methods import METHODS

    if arguments.method not in (None, "all", *METHODS):
        raise QDenseError(
            f'--method "{arguments.method}": unknown method{did_you_mean(arguments.method, METHODS)}; or "all"'
        )
    methods = list(METHODS) if arguments.method == "all" else [arguments.method]
    counts = [_count(arguments, method) for method in methods]
    if arguments.json:
        from dataclasses import asdict

        records = [asdict(counted) for counted in counts]
        print(json.dumps(records if arguments.method == "all" else records[0], indent=2))
        return
    from qdense.ui.console import make_console
    from qdense.ui.tables import show_methods, show_parameters

    if arguments.method == "all":
        show_methods(make_console(), counts)
    else:
        show_parameters(make_console(), counts[0])


def _count(arguments: argparse.Namespace, method: str | None) -> ParameterCount:
    from qdense.modeling.locate import fetched_shape
    from qdense.planning.parameters import count_parameters
    from qdense.recipe import builtin_recipes, load_recipe, recipe_from_tables

    asked = {"method": method, "r": arguments.r, "target_modules": arguments.target_modules}
    asked = {key: value for key, value in asked.items() if value is not None}
    is_recipe = arguments.subject in builtin_recipes() or arguments.subject.endswith(".toml")
    if is_recipe or os.path.isfile(arguments.subject):
        overrides = [f"adapter.{key}={as_toml(value)}" for key, value in asked.items()]
        overrides.append('model.quantization="none"')  # full fine-tuning requires it; no count depends on it
        recipe = load_recipe(arguments.subject, overrides)
        return count_parameters(fetched_shape(recipe.model.name, recipe.model.revision), recipe.adapter)
    base = {"name": "llama3-8b", "quantization": "none"}
    tables = {"model": base, "data": {"name": "wordproblems"}, "adapter": asked}
    return count_parameters(
        fetched_shape(arguments.subject), recipe_from_tables(tables, source="qdense params").adapter
    )
