"""The searches as Optuna's studies: what was tried and at which loss, for its dashboard, and its successive halving.

One study for each arm, one trial for each learning rate and seed. The files of the cells decide what is still to be done
(`cells.py`); a study that was lost is written again from them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from qdense.errors import RunError
from qdense.experiments.cells import Outcome
from qdense.experiments.experiment import Arm, Cell, Experiment

_RATES: dict[str, BaseDistribution] = {"learning_rate": FloatDistribution(1e-12, 1.0, log=True)}


def open_storage(storage: str) -> BaseStorage:
    """Optuna's storage: a database's URL (sqlite:///..., postgresql://...), or a file that ends in .log, a journal.

    Raises:
        RunError: it cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if storage.endswith(".log"):
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(storage, lock_obj=JournalFileOpenLock(storage)))
        if storage.startswith("sqlite:///"):
            Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            # Workers wait for each other's writes instead of failing.
            return RDBStorage(storage, engine_kwargs={"connect_args": {"timeout": 60}})
        return RDBStorage(storage)
    except Exception as error:  # whatever a database's driver raises
        raise RunError(
            f"--storage {storage}: cannot be opened: {str(error).splitlines()[0].rstrip('.')}. It must be sqlite:///FILE, "
            "another database's URL whose driver is installed (postgresql://...: pip install psycopg), or FILE.log for Optuna's "
            "journal."
        ) from None


class ArmStudy:
    """The study of one arm's search."""

    def __init__(self, storage: BaseStorage, experiment: Experiment, arm: Arm) -> None:
        assert experiment.search is not None
        pruner = (
            SuccessiveHalvingPruner(min_resource=1, reduction_factor=2) if experiment.search.halving else NopPruner()
        )
        self._study: Study = optuna.create_study(
            storage=storage,
            study_name=f"{experiment.name}: {arm.name} ({arm.digest})",
            direction="minimize",
            pruner=pruner,
            load_if_exists=True,
        )

    def start(self, cell: Cell) -> optuna.Trial:
        """A trial for a cell that the caller has locked. One that a killed worker left open is closed."""
        self._close(cell)
        while True:
            self._study.enqueue_trial({"learning_rate": cell.learning_rate}, user_attrs=_attributes(cell))
            trial = self._study.ask(_RATES)
            if trial.user_attrs.get("cell") == cell.digest:
                return trial
            # It was left by a worker that was killed between the two lines above.
            self._study.tell(trial, state=TrialState.FAIL)

    def end(self, trial: optuna.Trial, outcome: Outcome) -> None:
        trial.set_user_attr("outcome", outcome.state)
        if outcome.problem:
            trial.set_user_attr("problem", outcome.problem)
        if outcome.state == "trained":
            self._study.tell(trial, outcome.loss)
        else:
            self._study.tell(trial, state=TrialState.PRUNED if outcome.state == "stopped" else TrialState.FAIL)

    def record(self, cell: Cell, outcome: Outcome) -> None:
        """Add a cell that was trained elsewhere, unless the study has it."""
        if outcome.state != "trained" or not math.isfinite(outcome.loss) or self._of(cell, TrialState.COMPLETE):
            return
        self._close(cell)
        self._study.add_trial(
            create_trial(
                value=outcome.loss,
                params={"learning_rate": cell.learning_rate},
                distributions=dict(_RATES),
                user_attrs=_attributes(cell) | {"outcome": outcome.state},
            )
        )

    def _close(self, cell: Cell) -> None:
        for trial in self._of(cell, TrialState.RUNNING):
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _of(self, cell: Cell, state: TrialState) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False, states=(state,))
        return [trial for trial in trials if trial.user_attrs.get("cell") == cell.digest]


def _attributes(cell: Cell) -> dict[str, Any]:
    return {"cell": cell.digest, "seed": cell.seed}


def is_storage_failure(error: BaseException) -> bool:
    """Whether an error is the database's (a full disk, a lost connection)."""
    return isinstance(error, StorageInternalError)
