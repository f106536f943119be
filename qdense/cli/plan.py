"""`qdense plan`"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from qdense.cli.arguments import add_json, add_recipe, add_shard, memory_size, positive
from qdense.errors import QDenseError
from qdense.libraries import quiet_libraries

if TYPE_CHECKING:
    from qdense.catalogs.models import CatalogModel
    from qdense.planning.plan import Machine
    from qdense.recipe import Recipe

HELP = "predict whether a run fits in memory, and how it will run"
DESCRIPTION = (
    "Predict a run's memory and speed from shapes alone: no model is loaded and no GPU is needed. If the data is a file of "
    "yours, also how long the run takes. The exit status is 0 even if the run does not fit."
)
EXAMPLES = """\
  qdense plan math10k --memory 24GiB
  qdense plan questions.toml --set data.max_length=2048 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="the card's memory, for instance 24GiB (default: what is free on this machine's GPU; without one, 24GiB)",
    )
    parser.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="cards that share each step's rows (default: 1)"
    )
    add_shard(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from qdense.modeling.locate import fetched_shape
    from qdense.planning.plan import longest_context, make_plan
    from qdense.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, [*arguments.set, *(["training.shard=true"] if arguments.shard else [])])
    if recipe.training.shard and arguments.gpus == 1:
        raise QDenseError("training.shard = true: divides the base among several cards; say how many with --gpus")
    shape = fetched_shape(recipe.model.name, recipe.model.revision)
    memory_bytes = arguments.memory
    if memory_bytes is None and not has_gpu():
        memory_bytes = 24 * 2**30
        print("no GPU here: planned for a 24 GiB card; name yours with --memory", file=sys.stderr)
    machine = replace(machine_for(recipe, shape, memory_bytes), num_processes=arguments.gpus)
    plan = make_plan(recipe, shape, machine)
    longest = longest_context(recipe, shape, machine)
    if arguments.json:
        print(json.dumps({**plan.as_json(), "longest_context_tokens": longest}, indent=2))
        return
    from qdense.ui.console import make_console
    from qdense.ui.tables import show_plan

    show_plan(make_console(), plan, f"{recipe.adapter.method} on {recipe.model.name}", longest)
    if recipe.data.path is not None and not os.path.isfile(recipe.data.path):
        print(
            f'data.path = "{recipe.data.path}": no such file here, so the run\'s length is not predicted',
            file=sys.stderr,
        )
    elif plan.fits and recipe.data.path is not None:
        from qdense.cli.estimate import predicted_time
        from qdense.data.examples import split_rows
        from qdense.data.sources import load_training_set

        data = recipe.data
        rows = load_training_set(data.model_copy(update={"bad_rows": "skip"}), None).rows
        split_rows(len(rows), validation_rows=data.validation_rows, fraction=data.fraction, seed=data.seed)
        print(f"this run: {predicted_time(plan, recipe, rows)}")


def machine_for(recipe: Recipe, shape: CatalogModel, memory_bytes: int | None) -> Machine:
    """A card with this memory; if None, this machine."""
    from qdense.planning.plan import Machine

    if memory_bytes is not None:
        name = f"a {memory_bytes / 2**30:g} GiB card"
        return Machine.card_of(memory_bytes, name, plain=recipe.training.kernels == "torch")
    quiet_libraries()
    from qdense.planning.machine import this_machine

    return this_machine(recipe, shape)


def has_gpu() -> bool:
    """Whether this machine seems to have an NVIDIA GPU. Importing torch to ask would take seconds."""
    import shutil

    return shutil.which("nvidia-smi") is not None
