"""Where prepared models and downloaded data are kept, and how folders appear there complete.

`QDENSE_CACHE` names the folder; by default it is `$XDG_CACHE_HOME/qdense` or `~/.cache/qdense`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qdense.errors import QDenseError


def cache_dir(*parts: str) -> Path:
    """The cache folder, or a path inside it. Nothing is created."""
    root = os.environ.get("QDENSE_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "qdense")
    return Path(root).expanduser().joinpath(*parts)


def require_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise QDenseError unless the disk of `folder` has `num_bytes` free for `what`."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < num_bytes:
        raise QDenseError(
            f"not enough disk space for {what}: {num_bytes / 2**20:,.0f} MiB needed under {folder}, "
            f"{free_bytes / 2**20:,.0f} MiB free. Free some space, or point QDENSE_CACHE or --output to another disk."
        )


@contextmanager
def appearing_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that is renamed to it when the block ends without an error.

    Two processes may prepare the same folder: the first to finish wins, the other's copy is dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkdtemp, whose folders only their owner can read.
    building = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        try:
            os.replace(building, target)
        except OSError:
            if not target.exists():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path, in_use: Callable[[], QDenseError]) -> Iterator[None]:
    """Keep other processes that use this lock out of `folder`. Raises `in_use()` if one holds it.

    The system releases the lock when its process dies, however it dies; the file stays. Raises PermissionError where no lock can
    be made: in the kernel's own folders, or in the place of a symbolic link, which might lead to any file.
    """
    path = folder / LOCK_FILE
    if path.is_symlink():
        raise PermissionError(errno.EPERM, "is a symbolic link, and is not followed. Remove it", str(path))
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        if not path.exists():  # the lock has asked for it, and was refused
            raise PermissionError(errno.EACCES, "no file can be created here", str(path)) from None
        raise in_use() from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path`, then rename it, so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if str(error.filename) == str(temporary):
            error.filename, error.filename2 = str(path), None  # the name that the user knows
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()
