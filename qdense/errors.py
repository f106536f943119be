"""The errors that a user sees.

A mistake of the user, or a fault of a file or of the environment, is a `QDenseError`: the command line prints its text
and exits with status 2. Anything else is a bug in qdense and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_SHOWN = 40  # names in a list of known ones


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


class EvaluationError(QDenseError):
    """An evaluation cannot start or continue."""


def shortened(text: str, limit: int = 60) -> str:
    """The text, cut off after `limit` characters: a name in a stranger's file may have any length."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the closest known name (empty if none is close) and the list of all."""
    known = sorted(known)
    shown = [shortened(each) for each in known[:_MOST_SHOWN]] + (["..."] if len(known) > _MOST_SHOWN else [])
    folded = {candidate.lower(): candidate for candidate in known}
    is_short = len(name) <= 200 and len(known) <= 1000  # comparing takes the product of the lengths
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6) if is_short else []
    guess = f'; did you mean "{shortened(folded[close[0]])}"?' if close else ";"
    return f"{guess} known: {', '.join(shown)}"
