"""Experiment trackers (TensorBoard, trackio, wandb, MLflow, ...): driven by accelerate, fed by the run's events."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from qdense.errors import RunError
from qdense.events import Emit, Notice, StepDone, Validated
from qdense.recipe import Recipe
from qdense.runs import RunFolder

PROJECT = "qdense"
_NAMED = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
}  # the run's name there


def require_trackers(recipe: Recipe) -> None:
    """Raise RunError for a tracker whose package is not installed, which accelerate would silently omit."""
    available = {str(tracker.value) for tracker in get_available_trackers()}
    for name in recipe.training.trackers:
        if name not in available:
            raise RunError(
                f'training.trackers: "{name}" needs a package that is not installed: pip install {name}. Or omit it.'
            )


class Trackers:
    """Passes a run's steps and validations on to trackers. A tracker that fails later does not end the run."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe, folder: RunFolder, emit: Emit) -> None:
        self.emit = emit
        self.trackers: list[GeneralTracker] = []
        if not recipe.training.trackers:
            return
        config = {key: _plain(value) for key, value in recipe.flattened().items()}
        options = {name: {_NAMED[name]: folder.path.name} for name in recipe.training.trackers if name in _NAMED}
        try:
            accelerator.init_trackers(PROJECT, config, options)
        except Exception as error:  # their own errors: no network, no login, a read-only folder
            raise RunError(
                f"training.trackers = {list(recipe.training.trackers)}: cannot be started: {error}. Set them up, or leave out "
                "training.trackers."
            ) from error
        self.trackers = list(accelerator.trackers)

    def __call__(self, event: Any) -> None:
        if not self.trackers or not isinstance(event, StepDone | Validated):
            return
        table = "train" if isinstance(event, StepDone) else "validation"
        values = {
            f"{table}/{key}": value
            for key, value in asdict(event).items()
            if key != "step" and not (isinstance(value, float) and not math.isfinite(value))
        }
        self._have_each(lambda tracker: tracker.log(values, step=event.step))

    def close(self) -> None:
        self._have_each(lambda tracker: tracker.finish())

    def _have_each(self, action: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                action(tracker)
            except Exception as error:  # a run that trains well must not end because of its tracker
                self.trackers.remove(tracker)
                what = f"training.trackers: {tracker.name}: {error}; the run continues without it"
                self.emit(Notice(what, "warning"))


def _plain(value: Any) -> bool | int | float | str:
    """Settings as every tracker accepts them."""
    return value if isinstance(value, bool | int | float | str) else str(value)
