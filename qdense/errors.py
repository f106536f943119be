"""The errors that a user sees.

A mistake of the user, or a fault of a file or of the environment, is a `QDenseError`: the command line prints its text
and exits with status 2. Anything else is a bug in qdense and keeps its traceback.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

_MOST_SHOWN = 40  # names in a list of known ones
_MOST_COMPARED = 1000  # names that a misspelt one is compared with


class QDenseError(Exception):
    """An error whose text says what is wrong, where, what is accepted and what to do next."""


class RecipeError(QDenseError):
    """A recipe or a `--set` override is invalid."""


class ModelError(QDenseError):
    """A base model cannot be found, read or prepared."""


class AdapterError(QDenseError):
    """An adapter cannot be found, read, or does not fit the base."""


class DataError(QDenseError):
    """Training or test data cannot be found, downloaded or read."""


class RunError(QDenseError):
    """A training run cannot start or must not continue."""


class DivergedError(RunError):
    """A loss or gradient of a training run is not finite."""


class RunStopped(QDenseError):  # noqa: N818 (no error)
    """A signal has stopped a training run after its checkpoint was saved; `signal_number` is its number."""

    def __init__(self, text: str, signal_number: int) -> None:
        super().__init__(text)
        self.signal_number = signal_number


class ToldElsewhereError(QDenseError):
    """Another process of the job has failed, or reports why all of them do: this one says nothing."""


class EvaluationError(QDenseError):
    """An evaluation cannot start or continue."""


def shortened(text: str, limit: int = 60) -> str:
    """The text, cut off after `limit` characters: a name in a stranger's file may have any length."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def counted(number: int, one: str, several: str | None = None) -> str:
    """`1 row`, `2,000 rows`; `several` where it is not `one` and an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is spelt most like this one, in upper or lower case; None if none is close.

    Args:
        cutoff: the least similarity, from 0 to 1; 0.8 allows a typing mistake in a name of five letters.
    """
    folded = {candidate.lower(): candidate for candidate in known}
    if len(name) > 200 or len(folded) > _MOST_COMPARED:  # comparing takes the product of the lengths
        return None
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=cutoff)
    return folded[close[0]] if close else None


def listed(known: Iterable[str]) -> str:
    """The names in order, as far as a reader will follow."""
    known = sorted(known)
    return ", ".join([shortened(each) for each in known[:_MOST_SHOWN]] + (["..."] if len(known) > _MOST_SHOWN else []))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the closest known name (empty if none is close) and the list of all."""
    known = list(known)
    close = closest(name, known)
    guess = f'; did you mean "{shortened(close)}"?' if close else ";"
    return f"{guess} known: {listed(known)}"


def near_file(path: str | Path, endings: Sequence[str] = ()) -> str:
    """`; did you mean "x"?` for the file beside a missing one, with one of these endings, whose name is closest. Without endings
    for the closest folder. Empty if none is close."""
    path = Path(path)

    def stem(name: str) -> str:
        return next((name.removesuffix(ending) for ending in endings if name.lower().endswith(ending)), name)

    try:
        with os.scandir(path.parent) as entries:
            names = [
                entry.name
                for entry in itertools.islice(entries, _MOST_COMPARED)
                if (entry.name.lower().endswith(tuple(endings)) if endings else entry.is_dir())
            ]
    except (OSError, ValueError):  # ValueError: a NUL character
        return ""
    # Of several with one stem, the one with the given ending.
    beside = {stem(name): name for name in sorted(names, key=lambda name: name.endswith(path.suffix))}
    found = closest(stem(path.name), beside)
    return f'; did you mean "{path.parent / beside[found]}"?' if found else ""
