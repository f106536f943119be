"""Download one file of known content, with progress, resume, a timeout, and verification by git blob id."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from qdense.cache import require_free_space
from qdense.errors import DataError

# (bytes so far, bytes in all or None if the server does not say)
Progress = Callable[[int, int | None], None]


def git_blob_id(path: Path) -> str:
    """What `git hash-object` prints: SHA-1 of `blob <size>\\0` and the file's bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(
    url: str,
    target: Path,
    blob_id: str,
    *,
    progress: Progress | None = None,
    timeout_seconds: float = 30.0,
    num_attempts: int = 4,
    pause_seconds: float = 1.0,
) -> None:
    """Fetch `url` to `target`, which appears only once its blob id is right.

    If a connection breaks or stays silent for `timeout_seconds`, the download continues from where it stopped (HTTP
    Range), after a pause that doubles each time. A complete file with the wrong blob id is discarded and fetched
    once more.

    Raises:
        DataError: with the address, what happened, and how to proceed without the download.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    failure = "no attempt was made"
    num_corrupt = 0
    for attempt in range(num_attempts):
        if attempt:
            time.sleep(pause_seconds * 2 ** (attempt - 1))
        try:
            _fetch(url, partial, progress, timeout_seconds)
        except urllib.error.HTTPError as error:
            failure = f"HTTP status {error.code} ({error.reason})"
            if error.code == 416:  # the part on disk is not the beginning of this file
                partial.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                break  # a retry will not help
            continue
        except TimeoutError:
            failure = f"no data for {timeout_seconds:g} s"
            continue
        except (OSError, http.client.HTTPException, EOFError) as error:  # refused, unreachable, reset, cut short, TLS
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            failure = str(getattr(error, "reason", error)) or type(error).__name__
            continue
        found = git_blob_id(partial)
        if found == blob_id:
            os.replace(partial, target)
            return
        partial.unlink()
        num_corrupt += 1
        failure = f"its bytes are not the expected ones (git blob {found}, expected {blob_id})"
        if num_corrupt == 2:
            break
    raise DataError(
        f"download of {url} failed: {failure}. Run again to continue from where it stopped, or fetch the file by other means "
        f"and put it at {target}."
    )


def _fetch(url: str, partial: Path, progress: Progress | None, timeout_seconds: float) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "qdense"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
        if response.status != 206:  # the server sends the whole file although a part was requested
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None and length.isdigit() else None
        if total is not None:
            require_free_space(partial.parent, total - have, f"the download of {url}")
        with partial.open("ab" if have else "wb") as stream:
            while block := response.read1(1 << 16):  # keep what has arrived, in case the rest does not
                stream.write(block)
                have += len(block)
                if progress:
                    progress(have, total)
    if total is not None and have < total:
        raise EOFError(f"the connection ended after {have:,} of {total:,} bytes")
