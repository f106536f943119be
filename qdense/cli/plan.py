"""`qdense plan`"""

from __future__ import annotations

import argparse
import json

from qdense.cli.arguments import add_json, add_recipe, memory_size
from qdense.libraries import quiet_libraries

HELP = "predict whether a run fits in memory, and how it will run"
DESCRIPTION = (
    "Predict a run's memory and speed from shapes alone: nothing is loaded and no GPU is needed. The exit status is 0 even "
    "if the run does not fit."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="the card's memory, for instance 24GiB (default: what is free on this machine's GPU; without one, 24GiB)",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    from qdense.planning.plan import Machine, longest_context, make_plan
    from qdense.planning.shapes import model_shape
    from qdense.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)
    shape = model_shape(recipe.model.name)
    if arguments.memory is None and _has_gpu():
        quiet_libraries()
        from qdense.planning.machine import this_machine

        machine = this_machine(recipe, shape)
    else:
        memory_bytes = arguments.memory or 24 * 2**30
        name = f"a {memory_bytes / 2**30:g} GiB card"
        machine = Machine.card_of(memory_bytes, name, plain=recipe.training.kernels == "torch")
    plan = make_plan(recipe, shape, machine)
    longest = longest_context(recipe, shape, machine)
    if arguments.json:
        print(json.dumps({**plan.as_json(), "longest_context_tokens": longest}, indent=2))
        return
    from qdense.ui.console import make_console
    from qdense.ui.tables import show_plan

    show_plan(make_console(), plan, f"{recipe.adapter.method} on {recipe.model.name}", longest)


def _has_gpu() -> bool:
    """Whether this machine seems to have an NVIDIA GPU; asking torch would take seconds on a machine without one."""
    import shutil

    return shutil.which("nvidia-smi") is not None
