"""Checkpoints on disk: written beside and renamed, with a manifest of checksums; checked before they are trusted.

A run's checkpoints/ holds `checkpoint-<step>` folders. Each has all that a run needs to go on, and manifest.json: size and
SHA-256 of every other file in it. While one is being written it lies in a hidden folder, which a killed run may leave behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdense.cache import write_atomically

CHECKPOINTS_TO_KEEP = 3  # as the authors'
_MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished"


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies among those in `folder`."""
    return folder / f"checkpoint-{step}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step of a folder `checkpoint-<step>`."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The newest first; whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=checkpoint_step, reverse=True)


@contextmanager
def appearing_checkpoint(folder: Path, step: int) -> Iterator[Path]:
    """The folder in which to make `checkpoint-<step>`: it takes its place when all is on the disk and reads back as written.

    Only then do the oldest ones go. Raises OSError, with the ones before intact.
    """
    building, target = folder / _UNFINISHED, checkpoint_folder(folder, step)
    made = checkpoint_folder(building, step)
    remove_unfinished(folder)
    made.mkdir(parents=True)
    try:
        yield building
        _seal(made)
        if fault := fault_of(made):
            raise OSError(f"{target}: was not written as it should be: {fault}")
        if target.exists():
            shutil.rmtree(target)  # of this step, from before a resume
        os.replace(made, target)
        _sync(folder)
    finally:
        remove_unfinished(folder)
    for old in checkpoints(folder)[CHECKPOINTS_TO_KEEP:]:
        shutil.rmtree(old)


def remove_unfinished(folder: Path) -> None:
    """Remove what a run that was killed while saving has left."""
    shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)


def _seal(checkpoint: Path) -> None:
    files = {path.name: _facts(path, sync=True) for path in sorted(checkpoint.iterdir())}
    write_atomically(checkpoint / _MANIFEST, json.dumps({"files": files}, indent=1))
    _sync(checkpoint)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: None if every file is as its manifest says."""
    try:
        files: dict[str, Any] = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            path = checkpoint / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            found = _facts(path)
            if found["bytes"] != facts["bytes"]:
                return f"{name} has {found['bytes']:,} bytes, not {facts['bytes']:,}"
            if found["sha256"] != facts["sha256"]:
                return f"{name} is not the file that was written (SHA-256 {found['sha256'][:12]}...)"
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
    """Have the folder's entries on the disk: a rename is only safe from a power cut with them."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
