"""Trains and evaluates the missing cells of an experiment.

A worker claims one cell after another: it locks the cell's folder, which the system unlocks however the worker ends, runs
`qdense train` and `qdense evaluate` as a user would type them, and records how they ended. Any number of workers, in one
process (`jobs`) or in many, on one machine or on several that share the folder, divide the cells among themselves.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from filelock import BaseFileLock, Timeout

from qdense.cache import require_free_space
from qdense.errors import RunError
from qdense.events import CellChanged, Emit, Notice, SweepProgress
from qdense.experiments.cells import CellFolder, Outcome, SweepFolder
from qdense.experiments.experiment import EvaluateTable, Experiment
from qdense.experiments.standing import (
    ArmStanding,
    Job,
    base_key,
    base_settings,
    jobs_of,
    num_unknown,
    standing,
)
from qdense.experiments.studies import ArmStudy, is_storage_failure, open_storage
from qdense.training.metrics import parse_metrics

_LEAST_FREE_BYTES = 256 * 2**20
_POLL_SECONDS, _WAIT_SECONDS = 0.2, 1.0
_PATIENCE_SECONDS = 120.0  # for a run to save its checkpoint after it is told to stop


@dataclass
class _Claimed:
    job: Job
    lock: BaseFileLock
    trial: optuna.Trial | None = None


class _StoppedError(Exception):
    """This worker is to stop; nothing is wrong."""


@dataclass
class Sweep:
    """All workers of one process.

    Attributes:
        storage: Optuna's storage, as `--storage` names it.
        num_jobs: cells at a time.
        budget_seconds: after which the running cells save a checkpoint and stop; None for no limit.
        retries: whether cells that failed are tried again.
    """

    experiment: Experiment
    folder: SweepFolder
    storage: str
    data_dir: Path | None = None
    num_jobs: int = 1
    budget_seconds: float | None = None
    retries: bool = False
    emit: Emit = field(default=lambda event: None)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._failures: list[BaseException] = []
        self._given_up: dict[str, str] = {}  # cells and models whose evaluation failed in this process -> why
        self._seconds: list[float] = []  # of jobs that this process has done
        self._children: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()

    def run(self) -> None:
        """Work until nothing is left, the budget is spent, or Ctrl-C.

        Raises:
            RunError: the disk is full, or the studies cannot be written.
            KeyboardInterrupt: after the running cells have saved a checkpoint.
        """
        stands = standing(self.experiment, self.folder)
        if self.retries:
            self._forget_failures(stands)
        with self.folder.choosing():  # two workers that make the tables of a new database at once fail
            storage = open_storage(self.storage)
            searched = [arm for arm in self.experiment.arms if arm.is_searched]
            self._studies = {arm.name: ArmStudy(storage, self.experiment, arm) for arm in searched}
        self._record_known(stands)
        self._tell_progress()
        threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(self.num_jobs)]
        deadline = None if self.budget_seconds is None else time.monotonic() + self.budget_seconds
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                self._pass_on_events(0.1)
                if deadline is not None and time.monotonic() > deadline and not self._stop.is_set():
                    self.emit(Notice("the budget is spent: running cells save a checkpoint"))
                    self._stop.set()
        finally:
            self._stop.set()
            self._wait_for(threads)
        if self._failures:
            raise self._failures[0]

    def problems(self) -> list[tuple[str, str]]:
        """(what, why) of everything that failed, by this process or before."""
        found = []
        for each in standing(self.experiment, self.folder):
            found += [(each.arm.name, problem) for problem in each.problems]
        return found + list(self._given_up.items())

    # --- in the main thread -----------------------------------------------------------------------------------------------

    def _wait_for(self, threads: Sequence[threading.Thread]) -> None:
        """Let the workers end; a second Ctrl-C kills what they run."""
        try:
            while any(thread.is_alive() for thread in threads):
                self._pass_on_events(0.1)
        except KeyboardInterrupt:
            for child in list(self._children):
                child.kill()
            raise
        self._pass_on_events(0.0)

    def _pass_on_events(self, seconds: float) -> None:
        """Displays are not made for several threads, so all events are emitted by this one."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.emit(self._events.get(timeout=max(0.0, end - time.monotonic()) or 0.001))
            except queue.Empty:
                if time.monotonic() >= end:
                    return

    def _forget_failures(self, stands: Sequence[ArmStanding]) -> None:
        for each in stands:
            for cell, outcome in each.cells():
                if outcome.state == "failed":
                    self.folder.of(cell).forget()

    def _record_known(self, stands: Sequence[ArmStanding]) -> None:
        """Cells that another experiment trained, or whose study was lost, become trials."""
        with self.folder.choosing():
            for each in stands:
                for cell, outcome in each.searched():
                    self._studies[each.arm.name].record(cell, outcome)

    # --- in a worker's thread ---------------------------------------------------------------------------------------------

    def _work(self, number: int) -> None:
        try:
            while not self._stop.is_set():
                claimed, is_done = self._claim()
                if is_done:
                    return
                if claimed is None:
                    self._stop.wait(_WAIT_SECONDS)  # others have what is left; more may follow from it
                    continue
                start = time.monotonic()
                try:
                    self._do(claimed, number)
                finally:
                    claimed.lock.release()
                self._seconds.append(time.monotonic() - start)
                self._tell_progress()
        except _StoppedError:
            pass
        except BaseException as error:  # raised again in the main thread
            if is_storage_failure(error):
                error = RunError(
                    f"{self.storage}: cannot be written: {str(error.__cause__ or error).splitlines()[0]} Free some space or "
                    "check the connection, then run the same command again."
                )
            self._failures.append(error)
            self._stop.set()

    def _left(self) -> list[Job]:
        stands = standing(self.experiment, self.folder)
        return [job for job in jobs_of(self.experiment, self.folder, stands) if _key(job) not in self._given_up]

    def _claim(self) -> tuple[_Claimed | None, bool]:
        """Lock the first job that no other worker has, if there is one; and whether nothing is left for anyone."""
        require_free_space(self.folder.path, _LEAST_FREE_BYTES, "the sweep's next run")
        with self.folder.choosing():
            left = self._left()
            for job in left:
                lock = (
                    self.folder.of(job.cell).lock()
                    if job.cell is not None
                    else self.folder.base_lock(base_key(job.arm.recipe.model))
                )
                try:
                    lock.acquire()
                except Timeout:
                    continue
                trial = None
                if job.cell is not None and job.cell.stage == "search":
                    trial = self._studies[job.arm.name].start(job.cell)
                return _Claimed(job, lock, trial), False
        return None, not left

    def _do(self, claimed: _Claimed, number: int) -> None:
        job = claimed.job
        environment = _environment(number, self.num_jobs)
        if job.cell is None:
            self._evaluate_base(job, environment)
            return
        folder = self.folder.of(job.cell)
        outcome = folder.outcome()
        if outcome.state in ("missing", "started", "stopped"):
            outcome = self._train(job, folder, claimed.trial, environment)
            if claimed.trial is not None:
                self._studies[job.arm.name].end(claimed.trial, outcome)
        self._tell(job, outcome.state, loss=outcome.last_loss, text=outcome.problem)
        if outcome.state == "trained" and job.evaluates:
            self._evaluate(job, folder, environment)
        if outcome.state == "trained":
            folder.drop_checkpoints()

    def _train(
        self, job: Job, folder: CellFolder, trial: optuna.Trial | None, environment: Mapping[str, str]
    ) -> Outcome:
        assert job.cell is not None
        while folder.run.is_in_use():  # a worker was killed, and the run that it had started goes on
            self._tell(job, "waiting")
            if self._stop.wait(_WAIT_SECONDS):
                raise _StoppedError
        if folder.run.is_finished:
            return folder.settle("trained")
        folder.prepare()
        command = ["train", str(folder.recipe), "--output", str(folder.run.path), "--resume", "--quiet"]
        watch = _Watch(folder, trial)
        self._tell(job, "training")
        status, text = self._run(command, folder.log, environment, lambda: self._watched(job, watch))
        if status == 0:
            return folder.settle("trained")
        if watch.is_pruned:
            return folder.settle("stopped")
        if status == 3:
            return folder.settle("diverged", text)
        self._refuse_full_disk()
        return folder.settle("failed", text or _died(status))

    def _watched(self, job: Job, watch: _Watch) -> bool:
        """Report new steps; returns whether the run is to stop."""
        if watch.read_on():
            self._tell(job, "training", step=watch.step, num_steps=watch.num_steps(), loss=watch.loss)
        return watch.is_pruned

    def _evaluate(self, job: Job, folder: CellFolder, environment: Mapping[str, str]) -> None:
        how = self.experiment.evaluate
        assert how is not None
        self._tell(job, "evaluating")
        command = ["evaluate", *_evaluate_arguments(how), "--adapter", str(folder.run.path)]
        found = self._evaluation(job, command, folder.log, environment)
        if found is not None:
            folder.record_evaluation(how, found)
            self._tell(job, "evaluated")

    def _evaluate_base(self, job: Job, environment: Mapping[str, str]) -> None:
        assert self.experiment.evaluate is not None
        model, how = job.arm.recipe.model, base_settings(job.arm, self.experiment.evaluate)
        self._tell(job, "evaluating")
        command = ["evaluate", *_evaluate_arguments(how), "--model", model.name]
        command += ["--quantization", model.quantization]
        command += ["--dtype", model.dtype] if model.dtype != "auto" else []
        found = self._evaluation(job, command, self.folder.base_log(base_key(model)), environment)
        if found is not None:
            self.folder.record_base_evaluation(base_key(model), how, found)
            self._tell(job, "evaluated")

    def _evaluation(self, job: Job, command: list[str], log: Path, environment: Mapping[str, str]) -> Path | None:
        """Evaluate; returns the evaluation's folder, or None if it failed."""
        status, text = self._run([*command, "--json", "--quiet"], log, environment, lambda: False, keeps_output=True)
        if status == 0:
            return Path(json.loads(text)["folder"])
        self._refuse_full_disk()
        self._given_up[_key(job)] = text or _died(status)
        self._tell(job, "failed", text=self._given_up[_key(job)])
        return None

    def _run(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        is_to_stop: Any,
        *,
        keeps_output: bool = False,
    ) -> tuple[int, str]:
        """A qdense command in a process of its own, so that its memory is its own and its end is not ours.

        Returns:
            its status, and what it wrote: to stdout with `keeps_output` if it succeeded, else its error message.

        Raises:
            _StoppedError: the sweep is to stop; the command has saved what it had.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        if self.data_dir is not None:
            command = [*command, "--data-dir", str(self.data_dir)]
        with open(log, "ab") as errors:
            before = errors.tell()
            child = subprocess.Popen(
                [sys.executable, "-m", "qdense", *command],
                stdout=subprocess.PIPE if keeps_output else errors,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches us, and we tell it to stop
            )
        with self._guard:
            self._children.add(child)
        output: list[bytes] = []
        reader = threading.Thread(
            target=lambda: output.append(child.stdout.read()) if child.stdout else None, daemon=True
        )
        reader.start()
        was_told = False
        try:
            while child.poll() is None:
                if not was_told and (is_to_stop() or self._stop.is_set()):
                    child.send_signal(signal.SIGTERM)
                    was_told, since = True, time.monotonic()
                elif was_told and time.monotonic() - since > _PATIENCE_SECONDS:
                    child.kill()
                time.sleep(_POLL_SECONDS)
            is_to_stop()  # the last lines
        finally:
            if child.poll() is None:
                child.kill()
            with self._guard:
                self._children.discard(child)
        reader.join()
        if child.returncode and self._stop.is_set() and was_told:
            raise _StoppedError
        if child.returncode == 0 and keeps_output:
            return 0, output[0].decode("utf-8", errors="replace")
        with open(log, "rb") as stream:
            stream.seek(before)
            return child.returncode, _error_in(stream.read().decode("utf-8", errors="replace"))

    def _refuse_full_disk(self) -> None:
        """After a failure: on a full disk, every further cell would fail too. Raises RunError."""
        if shutil.disk_usage(self.folder.path).free < _LEAST_FREE_BYTES:
            raise RunError(
                f"{self.folder.path}: no space left on the disk. Free some space, then run the same command again; nothing is "
                "lost."
            )

    # --- telling ----------------------------------------------------------------------------------------------------------

    def _tell(self, job: Job, state: str, **more: Any) -> None:
        cell = job.cell
        self._events.put(
            CellChanged(
                key=_key(job),
                arm=cell.arm if cell else f"base {Path(job.arm.recipe.model.name).name}",
                stage=cell.stage if cell else "base",
                learning_rate=cell.learning_rate if cell else "",
                seed=cell.seed if cell else 0,
                state=state,
                **more,
            )
        )

    def _tell_progress(self) -> None:
        stands = standing(self.experiment, self.folder)
        left = list(jobs_of(self.experiment, self.folder, stands))
        unknown = num_unknown(self.experiment, stands)
        num_left = len(left) + unknown
        num_known = sum(len(each.outcomes) for each in stands) + unknown
        num_known += self.experiment.evaluate is not None and self.experiment.evaluate.base
        seconds = self._seconds
        self._events.put(
            SweepProgress(
                num_done=num_known - num_left,
                num_left=num_left,
                num_failed=sum(len(each.problems) for each in stands) + len(self._given_up),
                seconds_left=statistics.fmean(seconds) * num_left / self.num_jobs if seconds else None,
            )
        )


class _Watch:
    """Follows a run's metrics, and passes validation losses to its trial, which may say that the run is to stop."""

    def __init__(self, folder: CellFolder, trial: optuna.Trial | None) -> None:
        self._folder, self._trial = folder, trial
        self._offset = 0  # what was read of the file, in bytes
        self._num_validations = self._num_reported = 0
        self.step, self.loss, self.is_pruned = 0, None, False
        self._num_steps: int | None = None

    def read_on(self) -> bool:
        """Whether there is news."""
        lines = parse_metrics(self._new_text())
        for line in lines:
            self.step = line["step"]
            if line["event"] == "validation" and line["loss"] is not None:
                self.loss = line["loss"]
                self._num_validations += 1
                self._report(line)
        return bool(lines)

    def _new_text(self) -> str:
        """The whole lines that were added since. A resumed run first writes its file again, without what it will repeat."""
        try:
            with open(self._folder.run.metrics, "rb") as stream:
                if stream.seek(0, os.SEEK_END) < self._offset:
                    self._offset = self._num_validations = 0
                stream.seek(self._offset)
                whole, newline, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return ""
        self._offset += len(whole) + len(newline)
        return whole.decode("utf-8", errors="replace")

    def _report(self, line: Mapping[str, Any]) -> None:
        if self._trial is None or self._num_validations <= self._num_reported:
            return
        self._trial.report(line["loss"], self._num_validations)
        self._num_reported = self._num_validations
        is_last = line["step"] == self.num_steps()
        self.is_pruned = self.is_pruned or (not is_last and self._trial.should_prune())

    def num_steps(self) -> int | None:
        if self._num_steps is None and self._folder.run.recipe.is_file():
            found = self._folder.run.provenance().get("num_steps")
            self._num_steps = found if isinstance(found, int) else None
        return self._num_steps


def _key(job: Job) -> str:
    return job.cell.digest if job.cell is not None else f"base {base_key(job.arm.recipe.model)}"


def _environment(number: int, num_jobs: int) -> dict[str, str]:
    """For the command of one of several jobs: each has its own GPU, or its share of the cores."""
    environment = dict(os.environ)
    if num_jobs == 1:
        return environment
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_jobs)))
    cards = _visible_cards()
    if cards:
        environment["CUDA_VISIBLE_DEVICES"] = cards[number % len(cards)]
    return environment


def _visible_cards() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU")]


def _evaluate_arguments(how: EvaluateTable) -> list[str]:
    arguments = [",".join(how.tasks), "--decoding", how.decoding]
    for option, value in (
        ("--template", how.template),
        ("--limit", how.limit),
        ("--max-new-tokens", how.max_new_tokens),
        ("--batch-size", how.batch_size),
    ):
        arguments += [option, str(value)] if value is not None else []
    return [*arguments, *(["--clean"] if how.clean else [])]


def _error_in(text: str) -> str:
    """The message of a command that failed: what follows its last "error: ", or its last lines."""
    _, found, message = text.rpartition("\nerror: ") if "\nerror: " in text else text.rpartition("error: ")
    return message.strip() if found else "\n".join(text.strip().splitlines()[-3:])


def _died(status: int) -> str:
    if status < 0:
        return f"ended by signal {-status} ({signal.Signals(-status).name}); SIGKILL may mean that the memory was full"
    return f"ended with status {status} and no message"
