"""A run's folder between processes: one at a time works in it, and goes on only with what the one before began.

Beside the files that qdense/training/run.py lists, a folder has .lock, which the process at work holds, and .running, which it
removes at its end: where that lies about without a process, one was killed.
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
from qdense.errors import RunError
from qdense.events import Emit, Notice
from qdense.modeling.adapter_files import CARD_FILE
from qdense.planning.memory import Choice
from qdense.planning.plan import Plan
from qdense.provenance import package_versions
from qdense.recipe import Recipe, load_recipe
from qdense.training.checkpoint import checkpoints, fault_of, remove_unfinished
from qdense.training.metrics import read_metrics

RECIPE_FILE, METRICS_FILE, INITIAL_FILE = "recipe.toml", "metrics.jsonl", "initial.safetensors"
ADAPTER_DIR, CHECKPOINT_DIR = "adapter", "checkpoints"
_RUNNING = ".running"
_DECIDES_CHOICE = {"training.micro_batch_size", "training.recompute", "training.packing", "data.max_length"}


@dataclass(frozen=True)
class Resumed:
    """What a resumed run goes on from; `choice` is None where the recipe's changes ask for another plan."""

    checkpoint: Path
    choice: Choice | None


@contextmanager
def sole_owner(run_dir: Path) -> Iterator[None]:
    """Make the folder and keep other processes' runs out of it. Raises RunError if one is at work there."""
    if run_dir.exists() and not run_dir.is_dir():
        raise RunError(f"{run_dir}: is a file; output.dir (or --output) must be a folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":  # torchrun's other processes belong to the first
        yield
        return

    def in_use() -> RunError:
        return RunError(
            f"{run_dir}: another process is training in this folder{_who(run_dir)}. Wait for its end, or give another folder by "
            "--output."
        )

    try:
        with locked(run_dir, in_use):
            yield
    finally:
        with suppress(OSError):
            if [path.name for path in run_dir.iterdir()] == [LOCK_FILE]:  # nothing came of it
                shutil.rmtree(run_dir)


def _who(run_dir: Path) -> str:
    try:
        return f" (process {json.loads((run_dir / _RUNNING).read_text())['pid']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def running(run_dir: Path, plan: Plan, memory_total_bytes: int) -> Iterator[None]:
    """While a process is at work, say so, for the one that comes after it should it be killed."""
    facts = {
        "pid": os.getpid(),
        "planned_bytes": plan.predicted_memory_bytes,
        "memory_total_bytes": memory_total_bytes,
        "micro_batch_size": plan.choice.micro_batch_size,
        "recompute_layers": plan.choice.recompute_layers,
    }
    write_atomically(run_dir / _RUNNING, json.dumps(facts))
    try:
        yield
    finally:
        (run_dir / _RUNNING).unlink(missing_ok=True)


def checkpoint_to_resume(
    recipe: Recipe, run_dir: Path, emit: Emit, *, resume: bool, accept_changes: bool
) -> Resumed | None:
    """The checkpoint to go on from, or None for a fresh start. Raises RunError where neither is safe."""
    if not any(path.name != LOCK_FILE for path in run_dir.iterdir()):
        if resume:
            emit(Notice(f"{run_dir}: nothing to resume, starting afresh", "warning"))
        return None
    if not resume:
        raise RunError(
            f"{run_dir}: is not empty. Go on with the run that is there by --resume, or give another folder by --output."
        )
    if not (run_dir / RECIPE_FILE).is_file():
        raise RunError(
            f"{run_dir}: holds files but no {RECIPE_FILE}, so it is no run of qdense. Give another --output."
        )
    changes = _changes_of_recipe(recipe, run_dir)
    if (run_dir / ADAPTER_DIR / CARD_FILE).is_file():
        changed = f" These values differ from its own: {', '.join(changes)}." if changes else ""
        raise RunError(
            f"{run_dir}: this run is finished ({run_dir / ADAPTER_DIR}). Evaluate it by `qdense evaluate TASKS --adapter "
            f"{run_dir}`, or train anew with another --output.{changed}"
        )
    found = _newest_whole(run_dir / CHECKPOINT_DIR, emit)
    _tell_of_a_killed_process(run_dir, recipe, emit)
    if found is None:
        emit(Notice(f"{run_dir}: has no checkpoint yet, starting afresh", "warning"))
        if changes:
            _refuse(run_dir, "recipe", changes, accept_changes, emit)
        return None
    versions = _differences(_provenance_of(run_dir).get("versions", {}), package_versions())
    for what, differing in (("recipe", changes), ("versions", versions)):
        if differing:
            _refuse(run_dir, what, differing, accept_changes, emit)
    emit(Notice(f"resuming from {found}"))
    return Resumed(found, None if _DECIDES_CHOICE & set(changes) else _choice_of(run_dir))


def refuse_other_inputs(
    run_dir: Path, *, data_checksum: str, data: str, fingerprint: Any, base: str, accept_changes: bool, emit: Emit
) -> None:
    """The recipe may be the same and name other things by now: an edited file, a replaced folder."""
    before = _provenance_of(run_dir)
    differing = {}
    if before.get("data", {}).get("sha256") != data_checksum:
        differing[f"the rows of {data}"] = f"  the rows of {data}"
    if before.get("base_fingerprint") != fingerprint:
        differing[f"the base {base}"] = f"  the base {base}"
    if differing:
        _refuse(run_dir, "data and base", differing, accept_changes, emit)


def _refuse(run_dir: Path, what: str, differing: dict[str, str], accept_changes: bool, emit: Emit) -> None:
    if accept_changes:
        changes = "; ".join(line.strip() for line in differing.values())
        emit(Notice(f"{run_dir}: going on with other {what} than the run began with: {changes}", "warning"))
        return
    lines = "\n".join(differing.values())
    raise RunError(
        f"{run_dir}: --resume must go on with the same {what}; changed since the run began:\n{lines}\n"
        "Restore what it began with, start a new run with another --output, or add --accept-changes: then the outcome is that of "
        "no single recipe."
    )


def _newest_whole(folder: Path, emit: Emit) -> Path | None:
    remove_unfinished(folder)
    for checkpoint in checkpoints(folder):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        emit(Notice(f"{checkpoint}: {fault}. It is passed over, and called {aside.name} from now on", "warning"))
    return None


def _tell_of_a_killed_process(run_dir: Path, recipe: Recipe, emit: Emit) -> None:
    try:
        before = json.loads((run_dir / _RUNNING).read_text())
        planned, total = before["planned_bytes"] / 2**30, before["memory_total_bytes"] / 2**30
        rows, layers = int(before["micro_batch_size"]), int(before["recompute_layers"])
        steps = [line for line in read_metrics(run_dir / METRICS_FILE) if line["event"] == "step"]
        used = f"; used, behind step {steps[-1]['step']}: {steps[-1]['memory_bytes'] / 2**30:.1f} GiB" if steps else ""
    except (OSError, ValueError, KeyError, TypeError):
        return
    emit(
        Notice(
            f"{run_dir}: the process before this one was killed, or lost its power. Planned: {planned:.1f} GiB{used}, of "
            f"{total:.1f} GiB. If the system killed it for its memory (`dmesg | grep -i oom`), add --accept-changes and lower "
            f"training.micro_batch_size ({rows}) or data.max_length ({recipe.data.max_length}), or set "
            f'training.recompute = "all" ({layers} layers)',
            "warning",
        )
    )


def _changes_of_recipe(recipe: Recipe, run_dir: Path) -> dict[str, str]:
    def flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in tables.items():
            values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return values

    old, new = (flat(r.resolved()) for r in (load_recipe(run_dir / RECIPE_FILE), recipe))
    return {key: line for key, line in _differences(old, new).items() if key != "output.dir"}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: f"  {key}: was {old.get(key)!r}, now {new.get(key)!r}" for key in keys}


def _provenance_of(run_dir: Path) -> dict[str, Any]:
    provenance: dict[str, Any] = tomllib.loads((run_dir / RECIPE_FILE).read_text(encoding="utf-8")).get(
        "provenance", {}
    )
    return provenance


def _choice_of(run_dir: Path) -> Choice:
    """What the run in this folder began with. Raises RunError where another version of qdense wrote it."""
    try:
        return Choice(**_provenance_of(run_dir)["plan"]["choice"])
    except (KeyError, TypeError):
        raise RunError(
            f"{run_dir / RECIPE_FILE}: has no [provenance.plan.choice]: another version of qdense wrote it. Go on with that "
            "version, or start a new run with another --output."
        ) from None
