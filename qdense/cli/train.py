"""`qdense train`"""

from __future__ import annotations

import argparse
from pathlib import Path

from qdense.cli.arguments import (
    add_data_dir,
    add_gpus,
    add_quiet,
    add_recipe,
    add_shard,
    as_toml,
    launched,
    must_launch,
)
from qdense.libraries import quiet_libraries
from qdense.processes import is_first

HELP = "train an adapter from a recipe"
DESCRIPTION = "Train an adapter from a recipe."
EXAMPLES = """\
  qdense train demo
  qdense train math10k --fraction 0.1 --output runs/math10k-10
  qdense train questions.toml --set adapter.r=64 --output runs/r64
  qdense train questions.toml --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--fraction",
        type=float,
        metavar="F",
        help="train on this fraction of the rows (data.fraction; default: the recipe's, 1)",
    )
    parser.add_argument("--output", metavar="DIR", help="the run's folder (default: the recipe's output.dir)")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the run's folder")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --resume: continue even if the recipe, data, base or versions differ from those the run began with",
    )
    add_gpus(parser)
    add_shard(parser)
    add_data_dir(parser)
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    from qdense.recipe import load_recipe
    from qdense.runs import RunFolder, refuse_misspelt

    overrides = list(arguments.set)
    if arguments.fraction is not None:
        overrides.append(f"data.fraction={arguments.fraction!r}")
    if arguments.output is not None:
        overrides.append(f"output.dir={as_toml(arguments.output)}")
    if arguments.shard:
        overrides.append("training.shard=true")
    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.resume and arguments.output is not None:
        refuse_misspelt(RunFolder(Path(recipe.output.dir)))

    from qdense.ui.console import make_console
    from qdense.ui.training import TrainingDisplay

    if must_launch(arguments, recipe.model.device):
        return launched(arguments)
    with TrainingDisplay(make_console(), quiet=arguments.quiet or not is_first()) as show:
        show.status = "loading libraries"
        quiet_libraries()
        from qdense.training.run import train

        train(
            recipe,
            resume=arguments.resume,
            data_dir=arguments.data_dir,
            emit=show,
            accept_changes=arguments.accept_changes,
        )
    return 0
