"""How an experiment stands: which cells are done, which rates are found, and what is left to do. All from files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qdense.experiments.cells import Outcome, SweepFolder
from qdense.experiments.experiment import Arm, Cell, EvaluateTable, Experiment
from qdense.experiments.search import best_rate, next_rates
from qdense.recipe import ModelRecipe


@dataclass(frozen=True)
class ArmStanding:
    """What is known of an arm.

    Attributes:
        search: outcomes by learning rate and seed; rates that are still to be tried are in it, too.
        finals: outcomes by seed; empty while the learning rate is not known.
        learning_rate: of the final runs: the best of the search, or what the recipe says; None while it is not known.
        evaluations: the folder of each final run's evaluation, by seed.
    """

    arm: Arm
    search: Mapping[float, Mapping[int, Outcome]]
    finals: Mapping[int, Outcome]
    learning_rate: float | str | None
    evaluations: Mapping[int, Path]

    @property
    def losses(self) -> dict[float, float]:
        """Mean validation loss over the search's seeds of each rate that all its seeds have tried."""
        return _mean_losses(self.search)

    def final(self, seed: int) -> Cell:
        """The final run with this seed, at the rate that was found."""
        return _final(self.arm, seed, self.learning_rate)

    def searched(self) -> Iterator[tuple[Cell, Outcome]]:
        """The runs of the search."""
        for rate, by_seed in self.search.items():
            for seed, outcome in by_seed.items():
                yield self.arm.cell("search", seed, rate), outcome

    def cells(self) -> Iterator[tuple[Cell, Outcome]]:
        """The runs of the search, then the final ones."""
        yield from self.searched()
        for seed, outcome in self.finals.items():
            yield self.final(seed), outcome

    @property
    def outcomes(self) -> list[Outcome]:
        """Of the search and the final runs."""
        return [*(one for by_seed in self.search.values() for one in by_seed.values()), *self.finals.values()]

    @property
    def problems(self) -> list[str]:
        return [outcome.problem for outcome in self.outcomes if outcome.state == "failed"]


@dataclass(frozen=True)
class Job:
    """A cell to train, evaluate or both; without a cell, a bare model to evaluate."""

    cell: Cell | None
    arm: Arm
    evaluates: bool


def _final(arm: Arm, seed: int, rate: float | str | None) -> Cell:
    return arm.cell("final", seed, rate if isinstance(rate, float) else None)


def _mean_losses(search: Mapping[float, Mapping[int, Outcome]]) -> dict[float, float]:
    return {
        rate: statistics.fmean(outcome.loss for outcome in by_seed.values())
        for rate, by_seed in sorted(search.items())
        if all(outcome.is_settled for outcome in by_seed.values())
    }


def standing(experiment: Experiment, folder: SweepFolder) -> list[ArmStanding]:
    """How each arm stands, from the files. Raises RunError for a damaged one."""
    return [_arm_standing(experiment, arm, folder) for arm in experiment.arms]


def _arm_standing(experiment: Experiment, arm: Arm, folder: SweepFolder) -> ArmStanding:
    def outcome(cell: Cell) -> Outcome:
        found = folder.of(cell).outcome()
        halves = experiment.search is not None and experiment.search.halving
        # A run that another experiment's halving stopped continues where it was stopped.
        return replace(found, state="started") if found.state == "stopped" and not halves else found

    search: dict[float, dict[int, Outcome]] = {}
    rate: float | str | None = arm.recipe.training.learning_rate
    if arm.is_searched and experiment.search is not None:
        grid = experiment.search.learning_rate
        rate = None
        while wanted := next_rates(grid, _mean_losses(search)):
            new = [each for each in wanted if each not in search]
            if not new:
                break  # what is to be tried next is not settled yet
            for each in new:
                search[each] = {seed: outcome(arm.cell("search", seed, each)) for seed in experiment.search.seeds}
        else:
            rate = best_rate(_mean_losses(search))
    finals, evaluations = {}, {}
    if rate is not None:
        for seed in experiment.seeds:
            cell = _final(arm, seed, rate)
            finals[seed] = outcome(cell)
            found = folder.of(cell).evaluation(experiment.evaluate) if experiment.evaluate is not None else None
            if found is not None:
                evaluations[seed] = found
    return ArmStanding(arm, dict(sorted(search.items())), finals, rate, evaluations)


def base_key(model: ModelRecipe) -> str:
    """A bare model as text. "auto" is what it stands for on most devices, as in `Recipe.choices`."""
    model = model.settled(has_bfloat16=True)
    return json.dumps(model.model_dump(exclude={"device"}, exclude_none=True), sort_keys=True)


def jobs_of(experiment: Experiment, folder: SweepFolder, stands: Sequence[ArmStanding]) -> Iterator[Job]:
    """What is known to be left, in the order in which it is to be done: searches, final runs, and last the bare model."""
    for each in stands:
        for cell, outcome in each.searched():
            if outcome.state in ("missing", "started"):
                yield Job(cell, each.arm, evaluates=False)
    for each in stands:
        for seed, outcome in each.finals.items():
            is_trained = outcome.state == "trained"
            to_evaluate = experiment.evaluate is not None and seed not in each.evaluations
            if outcome.state in ("missing", "started") or (is_trained and to_evaluate):
                yield Job(each.final(seed), each.arm, evaluates=experiment.evaluate is not None)
    how = experiment.evaluate
    if how is not None and how.base:
        arm = reference_arm(experiment)
        if folder.base_evaluation(base_key(arm.recipe.model), base_settings(arm, how)) is None:
            yield Job(None, arm, evaluates=True)


def reference_arm(experiment: Experiment) -> Arm:
    return next(arm for arm in experiment.arms if arm.variant == experiment.reference)


def base_settings(arm: Arm, how: EvaluateTable) -> EvaluateTable:
    """How the bare model is evaluated: with the template that the adapters are trained with."""
    template = how.template or arm.recipe.data.template
    return how.model_copy(update={"template": None if template == "auto" else template, "clean": False})


def num_unknown(experiment: Experiment, stands: Sequence[ArmStanding]) -> int:
    """Final runs that wait for their arm's learning rate."""
    return sum(len(experiment.seeds) for each in stands if each.learning_rate is None and _is_open(experiment, each))


def _is_open(experiment: Experiment, each: ArmStanding) -> bool:
    """Whether the arm's search is still in progress."""
    assert experiment.search is not None
    return bool(next_rates(experiment.search.learning_rate, each.losses)) and not each.problems
