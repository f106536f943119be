"""A run's folder: every name in it, who may write there, what is finished. Only this module spells these names.

RUN/:

    recipe.toml          the resolved recipe, with [provenance]: versions, device, data checksum, base fingerprint, git hash and
                         the plan's layout, which a resumed run keeps
    metrics.jsonl        a line for each step and each validation
    skipped_rows.txt     the rows that were dropped, and why, one a line (with data.bad_rows = "skip")
    initial.safetensors  the trained tensors before the first step (except for full fine-tuning, which starts from the base)
    adapter/             the result: PEFT's files and qdense.json
    checkpoints/         what --resume continues from
    eval/DIGEST/         results of `qdense evaluate`, a folder for each way of evaluating
    analysis/            pictures and figures of `qdense analyze`
    logs/                files of trackers
    .lock, .running      there while a process trains here, and after it was killed

Models that were not trained here have evaluations only: bare bases in runs/base-MODEL/, models behind an endpoint in
runs/endpoint-MODEL/, adapters from the hub in runs/hub-OWNER--NAME/.

eval/DIGEST/:
    settings.json        everything that could change a completion (decoding, template, dtype, base, adapter, data, versions,
                         ...); DIGEST is their checksum, so results never mix
    TASK.jsonl           a task's completions, one a line
    sessions.json        each session that completed something: time, commit, batch sizes, server
    items.json           which items are right by which rule; `qdense compare` pairs runs by them
    summary.json         accuracies with their intervals; written last
    .lock                held by the process that evaluates here
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdense.cache import LOCK_FILE, locked, write_atomically
from qdense.errors import AdapterError, EvaluationError, RunError, closest, listed, near_file
from qdense.processes import is_first

CARD_FILE = "qdense.json"  # beside an adapter's own files: its origin
PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's own names
_ADAPTER, _EVALUATIONS = "adapter", "eval"
_RUNS = Path("runs")  # where models that were not trained here are evaluated


@dataclass(frozen=True)
class AnalysisFolder:
    """RUN/analysis, or another folder that `qdense analyze` writes to."""

    path: Path

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def heat_maps(self) -> Path:
        return self.path / "heatmaps.png"

    @property
    def layers(self) -> Path:
        return self.path / "layers.png"

    @property
    def histograms(self) -> Path:
        return self.path / "histograms.png"


@dataclass(frozen=True)
class EvaluationFolder:
    """RUN/eval/DIGEST: one way of evaluating a model."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "settings.json"

    @property
    def sessions(self) -> Path:
        return self.path / "sessions.json"

    @property
    def items(self) -> Path:
        return self.path / "items.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def completions(self, task: str) -> Path:
        return self.path / f"{task}.jsonl"

    @property
    def run(self) -> RunFolder | None:
        """The run that it belongs to; None if the folder was moved."""
        return RunFolder(self.path.parent.parent) if self.path.parent.name == _EVALUATIONS else None

    @property
    def is_finished(self) -> bool:
        return self.summary.is_file() and self.items.is_file()

    @contextmanager
    def sole_writer(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it. Raises EvaluationError if one is evaluating there."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not is_first():
            yield
            return

        def in_use() -> EvaluationError:
            return EvaluationError(f"{self.path}: another process is running this evaluation. Wait until it ends.")

        with locked(self.path, in_use):
            yield


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; it need not exist yet."""

    path: Path

    @classmethod
    def of_adapter(cls, adapter: Path) -> RunFolder:
        """The run whose adapter is in this folder; an adapter from elsewhere counts as a run itself.

        One in the hub's cache, where qdense does not write, has its run in runs/.
        """
        if adapter.parent.name == "snapshots":
            return cls(_RUNS / f"hub-{adapter.parent.parent.name.removeprefix('models--')}")
        return cls(adapter.parent if adapter.name == _ADAPTER else adapter)

    @classmethod
    def of_base(cls, model: str) -> RunFolder:
        """The folder for evaluations of a bare base."""
        return cls(_RUNS / f"base-{Path(model).name}")

    @classmethod
    def of_endpoint(cls, model: str) -> RunFolder:
        """The folder for evaluations of an endpoint's model."""
        safe_name = "".join(c if c.isalnum() or c in "-_." else "-" for c in model).strip(".") or "model"
        return cls(_RUNS / f"endpoint-{safe_name}")

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def skipped_rows(self) -> Path:
        return self.path / "skipped_rows.txt"

    @property
    def initial(self) -> Path:
        return self.path / "initial.safetensors"

    @property
    def adapter(self) -> Path:
        return self.path / _ADAPTER

    @property
    def card(self) -> Path:
        return self.adapter / CARD_FILE

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def analysis(self) -> AnalysisFolder:
        return AnalysisFolder(self.path / "analysis")

    @property
    def _running(self) -> Path:
        return self.path / ".running"

    def evaluation(self, digest: str) -> EvaluationFolder:
        return EvaluationFolder(self.path / _EVALUATIONS / digest)

    def evaluations(self) -> list[EvaluationFolder]:
        """Finished or not, in no particular order."""
        return [EvaluationFolder(path) for path in (self.path / _EVALUATIONS).glob("*") if path.is_dir()]

    @property
    def is_empty(self) -> bool:
        """Whether the folder is empty except for a lock."""
        return not any(path.name != LOCK_FILE for path in self.path.iterdir())

    @property
    def is_finished(self) -> bool:
        """Whether the adapter is saved, which is the last thing a run does."""
        return self.card.is_file()

    def provenance(self) -> dict[str, Any]:
        """The [provenance] table of recipe.toml; empty if another program wrote the file."""
        tables = tomllib.loads(self.recipe.read_text(encoding="utf-8"))
        found = tables.get("provenance")
        found = found if isinstance(found, dict) else {}
        for key in ("versions", "data", "plan"):  # tables; a file that someone edited may hold anything
            if not isinstance(found.get(key, {}), dict):
                found[key] = {}
        return found

    # --- who may write ----------------------------------------------------------------------------------------------------

    @contextmanager
    def sole_writer(self) -> Iterator[None]:
        """Make the folder and keep other training processes out of it. Raises RunError if one is at work there."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: is a file; output.dir (or --output) must be a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        if not is_first():
            yield
            return

        def in_use() -> RunError:
            owner = self.left_behind().get("pid")
            who = f" (process {owner})" if owner else ""
            return RunError(
                f"{self.path}: another process is training in this folder{who}. Wait until it ends, or name another folder with "
                "--output."
            )

        with locked(self.path, in_use):
            try:
                yield
            finally:
                # While the lock is held, so that a refused process cannot remove what another has just begun.
                with suppress(OSError):
                    if self.is_empty:  # the run wrote nothing
                        shutil.rmtree(self.path)

    def is_in_use(self) -> bool:
        """Whether a process is training here at this moment."""
        if not self.path.is_dir():
            return False
        try:
            with locked(self.path, lambda: RunError(str(self.path))):
                return False
        except RunError:
            return True

    @contextmanager
    def running(self, facts: dict[str, Any]) -> Iterator[None]:
        """While a process trains here, keep `facts` on disk for the next process, in case this one is killed."""
        write_atomically(self._running, json.dumps({"pid": os.getpid()} | facts))
        try:
            yield
        finally:
            self._running.unlink(missing_ok=True)

    def left_behind(self) -> dict[str, Any]:
        """The facts of a process that is training here, or was killed while it did; else empty."""
        try:
            facts = json.loads(self._running.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return facts if isinstance(facts, dict) else {}


def newest_finished_run(folder: Path) -> RunFolder:
    """The run at most two levels below `folder` whose adapter was saved last. Raises AdapterError."""
    patterns = (f"*/{_ADAPTER}/{CARD_FILE}", f"*/*/{_ADAPTER}/{CARD_FILE}")
    cards = [path for pattern in patterns for path in folder.glob(pattern)]
    if not cards:
        raise AdapterError(
            f"no finished run under {folder}/: train one (`qdense train RECIPE`; --resume finishes a stopped one), or name "
            "a run's folder, or a bare base with --model NAME"
        )
    return RunFolder(max(cards, key=lambda path: path.stat().st_mtime_ns).parent.parent)


def refuse_misspelt(run: RunFolder) -> None:
    """Raise RunError if the run to resume does not exist, and one beside it is spelt almost alike.

    Otherwise it is new: `qdense sweep`, and whoever starts a run again until it ends, resume from the first time on. Names
    that differ in numbers alone, as those of several seeds do, are no misspelling.
    """
    if run.path.exists():
        return
    beside = sorted(path.parent.name for path in run.path.parent.glob(f"*/{run.recipe.name}"))
    letters = _without_digits(run.path.name)
    close = closest(run.path.name, (name for name in beside if _without_digits(name) != letters), cutoff=0.8)
    if close is not None:
        raise RunError(
            f'{run.path}: there is nothing to resume; did you mean "{run.path.parent / close}"? Runs here: {listed(beside)}. '
            "Omit --resume to start a new one."
        )


def _without_digits(name: str) -> str:
    return "".join(c for c in name if not c.isdigit())


def find_adapter(path: Path) -> Path:
    """The adapter's folder, given itself or the run that holds it. Raises AdapterError."""
    run = RunFolder(path)
    for folder in (run.adapter, path):
        if any((folder / name).is_file() for name in (CARD_FILE, PEFT_CONFIG_FILE)):
            return folder
    if not path.exists():
        raise AdapterError(f"{path}: no such run or adapter{near_file(path)}")
    if path.suffix == ".toml" and path.is_file():
        raise AdapterError(f"{path}: is a recipe; name its run, the folder that it gives as output.dir")
    hint = " The run is not finished: `qdense train RECIPE --resume` continues it." if run.checkpoints.exists() else ""
    if within := [each.parent.parent.name for each in path.glob(f"*/{_ADAPTER}/{CARD_FILE}")]:
        hint = f" Name one of the runs in it: {listed(within)}"
    raise AdapterError(f"{path}: holds no adapter ({PEFT_CONFIG_FILE} or {CARD_FILE}, here or in {_ADAPTER}/).{hint}")


def find_evaluation(path: Path) -> EvaluationFolder:
    """An evaluation's folder, given itself, its run, RUN/adapter or RUN/eval; of several, the one finished last. It may be

    unfinished.

    Raises:
        EvaluationError: there is none.
    """
    if not path.is_dir():
        raise EvaluationError(
            f"{path}: no such folder{near_file(path) or '.'} Name a run, its RUN/{_EVALUATIONS}/DIGEST, or runs/base-MODEL."
        )
    if path.name in (_ADAPTER, _EVALUATIONS):
        path = path.parent
    named = EvaluationFolder(path)
    if named.settings.is_file() or named.run is not None:
        return named
    found = RunFolder(path).evaluations()
    if not found:
        raise EvaluationError(
            f"{path}: not evaluated yet; run `qdense evaluate TASKS --adapter {path}`, or with --model NAME for a bare base"
        )

    def rank(evaluation: EvaluationFolder) -> tuple[bool, int]:
        has_summary = evaluation.summary.is_file()
        return evaluation.is_finished, evaluation.summary.stat().st_mtime_ns if has_summary else -1

    return max(found, key=rank)
