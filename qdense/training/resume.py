"""What a process finds in a run's folder: nothing, a run to continue from its last intact checkpoint, or a reason not to."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdense.errors import RunError
from qdense.events import Emit, Notice
from qdense.planning.memory import StepLayout
from qdense.provenance import package_versions
from qdense.recipe import Recipe, load_recipe
from qdense.runs import RunFolder
from qdense.training.checkpoint import checkpoints, fault_of, remove_unfinished
from qdense.training.metrics import read_metrics

_DECIDES_LAYOUT = {"training.micro_batch_size", "training.recompute", "training.packing", "data.max_length"}
_DECIDES_NOTHING = {"output.dir", "training.trackers", "training.shard"}


@dataclass(frozen=True)
class Resumed:
    """What a resumed run continues from.

    Attributes:
        layout: how its steps are divided; None where changes of the recipe require a new plan.
        recipe: the given one; where it says "auto" or names no columns, the values that the run began with.
    """

    checkpoint: Path
    layout: StepLayout | None
    recipe: Recipe


def checkpoint_to_resume(
    recipe: Recipe, run: RunFolder, emit: Emit, *, resume: bool, accept_changes: bool
) -> Resumed | None:
    """The checkpoint to continue from, or None for a fresh start. Raises RunError if neither is safe."""
    if run.is_empty:
        if resume:
            emit(Notice(f"{run.path}: nothing to resume, starting afresh", "warning"))
        return None
    if not resume:
        raise RunError(f"{run.path}: is not empty. Resume it with --resume, or name another folder with --output.")
    if not run.recipe.is_file():
        raise RunError(
            f"{run.path}: holds files but no {run.recipe.name}, so it is not a run of qdense. Name another folder with --output."
        )
    begun = load_recipe(run.recipe)
    recipe = _as_begun(recipe, begun)
    changes = {
        key: line
        for key, line in _differences(begun.flattened(), recipe.flattened()).items()
        if key not in _DECIDES_NOTHING
    }
    if run.is_finished:
        changed = f" These values differ from the run's: {', '.join(changes)}." if changes else ""
        raise RunError(
            f"{run.path}: this run is finished ({run.adapter}). Evaluate it with `qdense evaluate TASKS --adapter {run.path}`, "
            f"or train a new one with another --output.{changed}"
        )
    found = _newest_whole(run.checkpoints, emit)
    _tell_of_a_killed_process(run, recipe, emit)
    if found is None:
        emit(Notice(f"{run.path}: has no checkpoint yet, starting afresh", "warning"))
        if changes:
            _refuse(run, "recipe", changes, accept_changes, emit)
        return None
    versions = _differences(run.provenance().get("versions", {}), package_versions())
    for what, differing in (("recipe", changes), ("versions", versions)):
        if differing:
            _refuse(run, what, differing, accept_changes, emit)
    emit(Notice(f"resuming from {found}"))
    return Resumed(found, None if _DECIDES_LAYOUT & set(changes) else _layout_of(run), recipe)


def refuse_other_inputs(
    run: RunFolder, *, data_checksum: str, data: str, fingerprint: Any, base: str, accept_changes: bool, emit: Emit
) -> None:
    """Refuse data or a base that changed although the recipe did not: an edited file, a replaced folder."""
    before = run.provenance()
    differing = {}
    if before.get("data", {}).get("sha256") != data_checksum:
        differing[f"the rows of {data}"] = f"  the rows of {data}"
    if before.get("base_fingerprint") != fingerprint:
        differing[f"the base {base}"] = f"  the base {base}"
    if differing:
        _refuse(run, "data and base", differing, accept_changes, emit)


def _refuse(run: RunFolder, what: str, differing: dict[str, str], accept_changes: bool, emit: Emit) -> None:
    if accept_changes:
        changes = "; ".join(line.strip() for line in differing.values())
        emit(Notice(f"{run.path}: continuing although the {what} changed since the run began: {changes}", "warning"))
        return
    lines = "\n".join(differing.values())
    raise RunError(
        f"{run.path}: --resume must continue with the same {what}; changed since the run began:\n{lines}\n"
        "Restore what it began with, start a new run with another --output, or add --accept-changes; then no single recipe "
        "describes the outcome."
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
        emit(Notice(f"{checkpoint}: {fault}. It is skipped and renamed {aside.name}", "warning"))
    return None


def _tell_of_a_killed_process(run: RunFolder, recipe: Recipe, emit: Emit) -> None:
    try:
        before = run.left_behind()
        planned, total = before["planned_bytes"] / 2**30, before["memory_total_bytes"] / 2**30
        rows, layers = int(before["micro_batch_size"]), int(before["recompute_layers"])
        steps = [line for line in read_metrics(run.metrics) if line["event"] == "step"]
        used = f"; used after step {steps[-1]['step']}: {steps[-1]['memory_bytes'] / 2**30:.1f} GiB" if steps else ""
    except (OSError, ValueError, KeyError, TypeError):
        return
    emit(
        Notice(
            f"{run.path}: the previous process was killed, or the power failed. Planned: {planned:.1f} GiB{used}, of "
            f"{total:.1f} GiB. If it was killed because memory ran out (`dmesg | grep -i oom`), add --accept-changes and lower "
            f"training.micro_batch_size ({rows}) or data.max_length ({recipe.data.max_length}), or set "
            f'training.recompute = "all" ({layers} layers)',
            "warning",
        )
    )


def _as_begun(recipe: Recipe, begun: Recipe) -> Recipe:
    """`recipe` with the values of `begun`, the run's own recipe, where it leaves them to qdense."""
    training = {
        key: getattr(begun.training, key)
        for key in ("learning_rate", "warmup_steps")
        if getattr(recipe.training, key) == "auto"
    }
    is_same_data = (recipe.data.name, recipe.data.path) == (begun.data.name, begun.data.path)
    data: dict[str, Any] = {
        key: getattr(begun.data, key) for key in ("template", "train_on") if getattr(recipe.data, key) == "auto"
    }
    if recipe.data.columns is None and is_same_data:
        data["columns"] = begun.data.columns
    settled = {
        table: getattr(recipe, table).model_copy(update={"dtype": getattr(begun, table).dtype})
        for table in ("model", "adapter")
        if getattr(recipe, table).dtype == "auto"
    }
    return recipe.model_copy(
        update={
            **settled,
            "training": recipe.training.model_copy(update=training),
            "data": recipe.data.model_copy(update=data),
        }
    )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: f"  {key}: was {old.get(key)!r}, now {new.get(key)!r}" for key in keys}


def _layout_of(run: RunFolder) -> StepLayout:
    """The layout that the run began with. Raises RunError if another version of qdense wrote it."""
    try:
        return StepLayout(**run.provenance()["plan"]["layout"])
    except (KeyError, TypeError):
        raise RunError(
            f"{run.recipe}: has no [provenance.plan.layout]: another version of qdense wrote it. Continue with that "
            "version, or start a new run with another --output."
        ) from None
