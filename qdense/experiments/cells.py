"""What is known of each cell, on disk. Only this module spells the names in a sweep's folder:

The folder of `qdense sweep` (--runs, by default runs/sweeps):

    cells/DIGEST/        one run and what is known of it; DIGEST is a checksum of its recipe and data
    bases/DIGEST/        evaluations of a bare model, with scores.json, log.txt and .lock as below
    reports/NAME/        pages of `qdense report`
    studies.db           Optuna's record of the searches
    .lock                held briefly, while a worker chooses its next cell

cells/DIGEST/:
    recipe.toml          the resolved recipe that `qdense train` was given
    run/                 the run's folder
    cell.json            how it ended; written last: a cell without it must be trained or continued
    scores.json          the run's evaluations by their settings
    log.txt              what `qdense train` and `qdense evaluate` printed
    .lock                held by the worker that has the cell; the system releases it however the worker ends

Equal cells of several experiments share a folder, so what one has trained serves the others.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w
from filelock import FileLock, Timeout

from qdense.cache import LOCK_FILE, write_atomically
from qdense.errors import RunError
from qdense.experiments.experiment import Cell, EvaluateTable
from qdense.runs import RunFolder
from qdense.schema import flattened
from qdense.training.metrics import read_metrics

_LONGEST_CHOICE_SECONDS = 600.0
_LOG, _SCORES = "log.txt", "scores.json"
State = Literal["missing", "started", "trained", "stopped", "diverged", "failed"]
SETTLED = ("trained", "stopped", "diverged")  # and "failed", until it is retried


@dataclass(frozen=True)
class Outcome:
    """How a cell stands.

    Attributes:
        loss: validation loss of the weights that were kept; of a run that was stopped or diverged, infinity.
        problem: why it failed or diverged, in the command's own words.
        seconds: of training, over all sessions.
    """

    state: State
    loss: float = math.inf
    best_loss: float | None = None
    last_loss: float | None = None
    num_steps: int = 0
    seconds: float = 0.0
    problem: str = ""

    @property
    def is_settled(self) -> bool:
        return self.state in SETTLED


@dataclass(frozen=True)
class CellFolder:
    """The folder of one cell; it need not exist yet."""

    path: Path
    cell: Cell

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path / "run")

    @property
    def log(self) -> Path:
        return self.path / _LOG

    @property
    def _outcome(self) -> Path:
        return self.path / "cell.json"

    @property
    def _scores(self) -> Path:
        return self.path / _SCORES

    def prepare(self) -> None:
        """Write the recipe that `qdense train` reads."""
        self.path.mkdir(parents=True, exist_ok=True)
        tables = self.cell.recipe.resolved()
        del tables["output"]
        write_atomically(self.recipe, tomli_w.dumps(tables))

    def lock(self) -> FileLock:
        """A lock that one worker holds; `acquire` raises filelock.Timeout if another does."""
        self.path.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path / LOCK_FILE, timeout=0)

    def outcome(self) -> Outcome:
        """From cell.json; without it, from the run. Raises RunError if another version of qdense trained something else."""
        self._refuse_other_defaults()
        if not self._outcome.is_file():
            return Outcome("started" if self.run.path.exists() else "missing")
        found = _read_object(self._outcome)
        try:
            loss = found.pop("loss")
            return Outcome(**found, loss=math.inf if loss is None else loss)
        except (TypeError, KeyError, ValueError):
            raise RunError(f"{self._outcome}: damaged. Remove it; the cell is then checked again.") from None

    def _refuse_other_defaults(self) -> None:
        """DIGEST covers what the recipe chooses; what it leaves to qdense must not have changed since."""
        if not self.recipe.is_file():
            return
        try:
            before = flattened(tomllib.loads(self.recipe.read_text(encoding="utf-8")))
        except ValueError:
            raise RunError(f"{self.recipe}: damaged. Remove {self.path} to train it again.") from None
        now = self.cell.recipe.flattened()
        for key in sorted(before.keys() & now.keys()):
            if key.endswith(".dtype") and (before[key], now[key]) == ("bfloat16", "auto"):
                continue  # what "auto" stands for, except on cards that could not have run it
            if before[key] != now[key]:
                raise RunError(
                    f"{self.path}: was trained with {key} = {before[key]!r}, the default of another version of qdense; "
                    f"now it is {now[key]!r}. Set {key} in the experiment, or remove this folder to train it again."
                )

    def settle(self, state: State, problem: str = "") -> Outcome:
        """Record how the cell has ended; the losses are those of the run."""
        lines = read_metrics(self.run.metrics) if self.run.metrics.is_file() else []
        losses = [line["loss"] for line in lines if line["event"] == "validation" and line["loss"] is not None]
        steps = [line for line in lines if line["event"] == "step"]
        outcome = Outcome(
            state,
            best_loss=min(losses, default=None),
            last_loss=losses[-1] if losses else None,
            num_steps=max((line["step"] for line in steps), default=0),
            seconds=max((line["seconds"] for line in steps), default=0.0),
            problem=problem,
        )
        if state == "trained" and losses:
            keeps_best = self.cell.recipe.training.keep == "best"
            outcome = replace(outcome, loss=min(losses) if keeps_best else losses[-1])
        values = asdict(outcome) | {"loss": outcome.loss if math.isfinite(outcome.loss) else None}
        write_atomically(self._outcome, json.dumps(values, indent=2) + "\n")
        return outcome

    def forget(self) -> None:
        """Forget how it ended, so that it is tried again; what it trained is kept."""
        self._outcome.unlink(missing_ok=True)

    def drop_checkpoints(self) -> None:
        """Remove the run's checkpoints: once finished it needs none, and a sweep would fill the disk with them."""
        shutil.rmtree(self.run.checkpoints, ignore_errors=True)

    # --- evaluations ------------------------------------------------------------------------------------------------------

    def evaluation(self, how: EvaluateTable) -> Path | None:
        """The folder of the run's evaluation with these settings; None if there is no finished one."""
        name = _recorded(self._scores, how)
        folder = self.run.evaluation(name) if name else None
        return folder.path if folder is not None and folder.is_finished else None

    def record_evaluation(self, how: EvaluateTable, folder: Path) -> None:
        _record(self._scores, how, folder.name)


@dataclass(frozen=True)
class SweepFolder:
    """SWEEPS: all cells of all experiments."""

    path: Path

    def of(self, cell: Cell) -> CellFolder:
        return CellFolder(self.path / "cells" / cell.digest, cell)

    @property
    def reports(self) -> Path:
        return self.path / "reports"

    @property
    def studies(self) -> Path:
        return self.path / "studies.db"

    def base_evaluation(self, base: str, how: EvaluateTable) -> Path | None:
        """The evaluation of a bare model; None if there is no finished one."""
        name = _recorded(self._scores_of_base(base), how)
        folder = self._base(base).evaluation(name) if name else None
        return folder.path if folder is not None and folder.is_finished else None

    def record_base_evaluation(self, base: str, how: EvaluateTable, folder: Path) -> None:
        """Copy the evaluation, which `qdense evaluate` has put into runs/base-MODEL, so that this folder is complete."""
        copy = self._base(base).evaluation(folder.name).path
        shutil.copytree(folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK_FILE))
        _record(self._scores_of_base(base), how, folder.name)

    def base_lock(self, base: str) -> FileLock:
        folder = self._base(base).path
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / LOCK_FILE, timeout=0)

    def base_log(self, base: str) -> Path:
        return self._base(base).path / _LOG

    def _base(self, base: str) -> RunFolder:
        return RunFolder(self.path / "bases" / hashlib.sha256(base.encode()).hexdigest()[:16])

    def _scores_of_base(self, base: str) -> Path:
        return self._base(base).path / _SCORES

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Only one worker at a time chooses its next cell and records that. Raises RunError if another takes far too long."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=_LONGEST_CHOICE_SECONDS)
        except Timeout:
            raise RunError(
                f"{self.path / LOCK_FILE}: held by another process for {_LONGEST_CHOICE_SECONDS:.0f} seconds, although "
                "a worker needs it only briefly. Look for one that hangs, or is stopped (Ctrl-Z)."
            ) from None
        try:
            yield
        finally:
            lock.release()


def _recorded(file: Path, how: EvaluateTable) -> str | None:
    name = _read_object(file).get(_key(how)) if file.is_file() else None
    return str(name) if name is not None else None


def _record(file: Path, how: EvaluateTable, name: str) -> None:
    known = _read_object(file) if file.is_file() else {}
    write_atomically(file, json.dumps(known | {_key(how): name}, indent=2) + "\n")


def _key(how: EvaluateTable) -> str:
    """What decides the completions, as text."""
    return json.dumps(how.model_dump(exclude={"batch_size", "base"}, exclude_none=True), sort_keys=True)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{file}: damaged. Remove it; what it recorded is then checked again.")
    return found
