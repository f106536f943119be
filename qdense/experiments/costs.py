"""What an experiment will take, before it runs: memory and hours of each arm, from the plan, the data's size and the cells that
are done."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qdense.catalogs.datasets import TRAINING_SETS
from qdense.data import wordproblems
from qdense.data.sources import load_training_set
from qdense.errors import DataError, ModelError
from qdense.experiments.cells import SweepFolder
from qdense.experiments.experiment import Experiment
from qdense.experiments.standing import ArmStanding, num_unknown
from qdense.planning.parameters import count_parameters
from qdense.planning.plan import Machine, Plan, make_plan
from qdense.planning.shapes import model_shape
from qdense.recipe import DataRecipe, Recipe
from qdense.training.metrics import read_metrics


@dataclass(frozen=True)
class ArmCost:
    """How much of an arm is done, and what each of its runs takes.

    Attributes:
        num_left: cells that are known to be left; a search may add rates beyond its edges.
        tokens: that a run trains on, about; None if the data's size is not known.
        is_bound: whether `tokens` counts every row as data.max_length tokens, since nothing better is known.
        measured_seconds: mean training time of the arm's finished runs, or without one, of the experiment's.
        trainable_parameters: None for a model whose shapes are not known.
        plan: None likewise.
    """

    standing: ArmStanding
    num_done: int
    num_left: int
    num_failed: int
    num_steps: int | None
    tokens: int | None
    is_bound: bool
    measured_seconds: float | None
    trainable_parameters: int | None
    plan: Plan | None

    @property
    def speeds(self) -> Mapping[str, float]:
        """Tokens per second by card."""
        return self.plan.speeds if self.plan is not None else {}

    def hours(self, card: str) -> float | None:
        """Predicted hours that one run trains on a card."""
        return self.tokens / self.speeds[card] / 3600 if self.tokens is not None and card in self.speeds else None


def costs_of(
    experiment: Experiment, stands: Sequence[ArmStanding], machine: Machine | None, folder: SweepFolder
) -> list[ArmCost]:
    """The cost of each arm on a machine; None if its memory and speed are not asked for."""
    seconds = {each.arm.name: _seconds(each) for each in stands}
    all_seconds = [one for values in seconds.values() for one in values]
    costs = []
    for each in stands:
        recipe, own = each.arm.recipe, seconds[each.arm.name] or all_seconds
        measured = _measured_tokens(each, folder)
        num_rows, tokens_of_row = _size_of_data(recipe)
        num_steps = recipe.training.max_steps if num_rows is None else recipe.training.num_steps(num_rows)
        tokens = measured
        if tokens is None and num_steps is not None:
            tokens = round(num_steps * recipe.training.batch_size * (tokens_of_row or recipe.data.max_length))
        num_done = sum(outcome.is_settled for outcome in each.outcomes)
        num_failed = len(each.problems)
        costs.append(
            ArmCost(
                standing=each,
                num_done=num_done,
                num_left=len(each.outcomes) + num_unknown(experiment, [each]) - num_done - num_failed,
                num_failed=num_failed,
                num_steps=num_steps,
                tokens=tokens,
                is_bound=measured is None and tokens_of_row is None,
                measured_seconds=statistics.fmean(own) if own else None,
                trainable_parameters=_count(recipe),
                plan=_plan(recipe, machine),
            )
        )
    return costs


def _seconds(each: ArmStanding) -> list[float]:
    return [outcome.seconds for outcome in each.outcomes if outcome.state == "trained"]


def _measured_tokens(each: ArmStanding, folder: SweepFolder) -> int | None:
    """Tokens that a finished run of the arm has trained on."""
    for cell, outcome in each.cells():
        metrics = folder.of(cell).run.metrics
        if outcome.state == "trained" and metrics.is_file():
            return sum(line["num_tokens"] for line in read_metrics(metrics) if line["event"] == "step")
    return None


def _size_of_data(recipe: Recipe) -> tuple[int | None, float | None]:
    """Rows that a run trains on, and tokens of one, as far as they are known without loading a tokenizer."""
    data = recipe.data
    tokens_of_row: float | None = None
    if data.path is not None:
        num_rows = _rows_of_file(data)
    elif data.name == "wordproblems":
        num_rows = wordproblems.NUM_TRAINING_ROWS
    else:
        file = TRAINING_SETS.get(data.name or "")
        num_rows, tokens_of_row = (file.num_rows, file.tokens_of_row) if file is not None else (None, None)
    if num_rows is None:
        return None, tokens_of_row
    kept = max(1, num_rows - data.validation_rows)
    return max(1, round(kept * data.fraction)), min(tokens_of_row, data.max_length) if tokens_of_row else None


@functools.lru_cache(maxsize=16)
def _rows_of_file(data: DataRecipe) -> int | None:
    try:
        return len(load_training_set(data, None).rows)
    except DataError:
        return None


def _count(recipe: Recipe) -> int | None:
    try:
        return count_parameters(recipe.model.name, recipe.adapter).trainable_parameters
    except ModelError:
        return None


def _plan(recipe: Recipe, machine: Machine | None) -> Plan | None:
    if machine is None:
        return None
    try:
        return make_plan(recipe, model_shape(recipe.model.name), machine)
    except ModelError:
        return None
