"""Checkpoints on disk: written under another name, verified, renamed, and checked before use. Tensors and numbers only.

A run's checkpoints/ holds `checkpoint-<step>` folders, each with the same files:

    weights.safetensors    the adapter's tensors by their names in the model, frozen ones included
    best.safetensors       the same at the lowest validation loss so far; empty before the first validation
    optimizer.safetensors  master weights and moments
    schedule.safetensors   the state of the method's schedule, such as AdaLoRA's averages
    state.json             the best step and its loss, the layout of steps, scalars of the optimizer and the schedule
    manifest.json          the format, and the size and SHA-256 of every other file

There is no random state, because a step's random numbers follow from the seed and the step's number
(`qdense/training/batches.py`). While a checkpoint is being written it is in a hidden folder, which a killed run may
leave behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qdense.cache import write_atomically
from qdense.errors import RunError

CHECKPOINTS_TO_KEEP = 3  # as the authors keep
FORMAT = 2
_TENSORS = ("weights", "best", "optimizer", "schedule")
_STATE, _MANIFEST, _UNFINISHED = "state.json", "manifest.json", ".unfinished"
_FILES = {_STATE, *(f"{name}.safetensors" for name in _TENSORS)}


@dataclass
class Checkpoint:
    """Everything that a run needs to continue after `step`; the module's docstring lists its parts."""

    step: int
    weights: dict[str, Tensor]
    best: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    schedule: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write checkpoint-<step> into `folder`. The oldest ones are removed only once it is on disk and reads back as written.

        Raises:
            OSError, SafetensorError: it cannot be written; earlier checkpoints are intact.
        """
        with _appearing(folder, self.step) as building:
            for name in _TENSORS:
                save_file(_unshared(getattr(self, name)), building / f"{name}.safetensors")
            (building / _STATE).write_text(json.dumps({"step": self.step} | self.values), encoding="utf-8")
        for old in checkpoints(folder)[CHECKPOINTS_TO_KEEP:]:
            shutil.rmtree(old)
        return _place(folder, self.step)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint that `fault_of` found intact. Raises SafetensorError, ValueError or KeyError otherwise."""
        values = json.loads((path / _STATE).read_text(encoding="utf-8"))
        tensors = {name: load_file(path / f"{name}.safetensors") for name in _TENSORS}
        return cls(step=values.pop("step"), values=values, **tensors)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors requires: contiguous, and no two sharing memory (8-bit AdamW's maps are one tensor for all)."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        found[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return found


def _place(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a folder `checkpoint-<step>`."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The newest first, intact or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=checkpoint_step, reverse=True)


def last_good_checkpoint(folder: Path) -> str:
    """A sentence that says where a run that stops now can continue."""
    found = checkpoints(folder)
    if not found:
        return "There is no checkpoint yet: the run must start over."
    return f"The last good checkpoint is {found[0]}; continue from it with --resume."


@contextmanager
def _appearing(folder: Path, step: int) -> Iterator[Path]:
    """A folder in which to write `checkpoint-<step>`. It gets that name once everything is on disk and reads back as written."""
    building, target = folder / _UNFINISHED, _place(folder, step)
    remove_unfinished(folder)
    building.mkdir(parents=True)
    try:
        yield building
        _seal(building)
        if fault := fault_of(building):
            raise OSError(f"{target}: was not written correctly: {fault}")
        if target.exists():
            shutil.rmtree(target)  # of this step, from before a resume
        os.replace(building, target)
        _sync(folder)
    finally:
        remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove what a run left behind when it was killed while saving."""
    shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)


def _seal(checkpoint: Path) -> None:
    files = {path.name: _facts(path, sync=True) for path in sorted(checkpoint.iterdir())}
    write_atomically(checkpoint / _MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
    _sync(checkpoint)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is there and matches the manifest.

    Raises:
        RunError: it is intact, but in the format of another version of qdense.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, Any] = manifest["files"]
        found = manifest.get(
            "format", 1 if "qdense.json" in files else None
        )  # the first version did not write its format
        if isinstance(found, int) and found != FORMAT:
            raise RunError(
                f"{checkpoint}: another version of qdense wrote it (format {found}, not {FORMAT}). Continue with that version, "
                "or start a new run with another --output."
            )
        if found != FORMAT:
            return f"{_MANIFEST} does not say its format"
        if unlisted := sorted(_FILES - files.keys()):
            return f"{_MANIFEST} does not list {unlisted[0]}"
        for name in sorted(_FILES):
            path, facts = checkpoint / name, files[name]
            if not path.is_file():
                return f"{name} is missing"
            is_now = _facts(path)
            if is_now["bytes"] != facts["bytes"]:
                return f"{name} has {is_now['bytes']:,} bytes, not {facts['bytes']:,}"
            if is_now["sha256"] != facts["sha256"]:
                return f"{name} is not the file that was written (SHA-256 {is_now['sha256'][:12]}...)"
    except FileNotFoundError:
        return f"it has no {_MANIFEST}: the run ended while writing it, or another version of qdense wrote it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read: {error!r}"
    return None


def _facts(path: Path, *, sync: bool = False) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        while block := stream.read(1 << 20):
            digest.update(block)
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


def _sync(folder: Path) -> None:
    """Flush the folder's entries to disk; only then does a rename survive a power cut."""
    if os.name == "nt":  # there, folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
