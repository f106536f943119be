"""`qdense sweep`"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from qdense.cli.arguments import (
    add_data_dir,
    add_experiment,
    add_json,
    add_price,
    add_quiet,
    duration,
    memory_size,
    positive,
)
from qdense.cli.plan import has_gpu, machine_for
from qdense.errors import ModelError
from qdense.libraries import quiet_libraries, require_library

if TYPE_CHECKING:
    from qdense.experiments.cells import SweepFolder
    from qdense.experiments.costs import ArmCost
    from qdense.experiments.experiment import Experiment

HELP = "train and evaluate all runs of an experiment"
DESCRIPTION = (
    "Train and evaluate the missing runs of an experiment. It can be stopped, killed and started again at any time, "
    "and any number of processes may work on one experiment. The exit status is 1 if a run failed."
)
EXAMPLES = """\
  qdense sweep paper/table2 --dry-run --memory 24GiB
  qdense sweep small/wordproblems --budget 3h
  qdense sweep my-experiment.toml --jobs 4 --set training.max_steps=100
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="show what is done, what is left and what it will cost, and stop"
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=positive,
        default=1,
        help="runs at a time: one for each GPU, or a share of the cores each (default: the GPUs; without one, 1)",
    )
    parser.add_argument(
        "--budget", metavar="TIME", type=duration, help="stop after this time: 3h, 45m, 90s (default: when all is done)"
    )
    parser.add_argument("--retry", action="store_true", help="retry the runs that failed")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="Optuna's storage: a database's URL, or FILE.log (default: SQLite in the folder of --runs)",
    )
    parser.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="predict for a card with this memory (default: this machine's GPU; without one, 24GiB)",
    )
    add_price(parser)
    add_data_dir(parser)
    add_json(parser)
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    from qdense.experiments.cells import SweepFolder
    from qdense.experiments.experiment import load_experiment

    experiment = load_experiment(arguments.experiment, arguments.set)
    if not arguments.dry_run:
        require_library("optuna", extra="experiments", purpose="qdense sweep")
    quiet_libraries()
    from qdense.ui.console import make_console
    from qdense.ui.sweep import SweepDisplay, show_costs, show_problems

    folder = SweepFolder(arguments.runs)
    if arguments.json or arguments.dry_run or not arguments.quiet:
        costs = _costs(arguments, experiment, folder)
        if arguments.json:
            print(json.dumps(_as_json(experiment, costs), indent=2))
        else:
            show_costs(make_console(), experiment, costs, dict(arguments.price))
    if arguments.dry_run:
        return 0
    from qdense.experiments.sweep import Sweep

    storage = arguments.storage or f"sqlite:///{folder.studies.resolve()}"
    with SweepDisplay(make_console(), experiment.title, quiet=arguments.quiet or arguments.json) as show:
        sweep = Sweep(
            experiment,
            folder,
            storage,
            data_dir=arguments.data_dir,
            num_jobs=arguments.jobs,
            budget_seconds=arguments.budget,
            retries=arguments.retry,
            emit=show,
        )
        sweep.run()
    problems = sweep.problems()
    if not arguments.json:
        show_problems(make_console(), problems, str(arguments.experiment))
    return 1 if problems else 0


def _costs(arguments: argparse.Namespace, experiment: Experiment, folder: SweepFolder) -> list[ArmCost]:
    from qdense.experiments.costs import costs_of
    from qdense.experiments.standing import standing
    from qdense.planning.shapes import model_shape

    memory_bytes = arguments.memory or (None if has_gpu() else 24 * 2**30)
    recipe = experiment.arms[0].recipe
    try:
        machine = machine_for(recipe, model_shape(recipe.model.name), memory_bytes)
    except ModelError:  # a model whose shapes are known only once it is downloaded
        machine = None
    return costs_of(experiment, standing(experiment, folder), machine, folder)


def _as_json(experiment: Experiment, costs: list[ArmCost]) -> dict[str, Any]:
    return {
        "experiment": experiment.name,
        "arms": [
            {
                "arm": each.standing.arm.name,
                "learning_rate": each.standing.learning_rate,
                "done": each.num_done,
                "left": each.num_left,
                "failed": each.num_failed,
                "steps": each.num_steps,
                "tokens": each.tokens,
                "tokens_are_a_bound": each.is_bound,
                "trainable_parameters": each.trainable_parameters,
                "needed_bytes": each.plan.needed_bytes if each.plan else None,
                "fits": each.plan.fits if each.plan else None,
                "hours_of_a_run": {card: each.hours(card) for card in each.speeds},
                "measured_seconds_of_a_run": each.measured_seconds,
            }
            for each in costs
        ],
    }
