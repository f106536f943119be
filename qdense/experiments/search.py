"""Which learning rates a search tries, and which it chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_MOST_EXTENSIONS = 6  # rates beyond the file's, of one arm
_LOWEST, _HIGHEST = 1e-7, 0.5


def next_rates(grid: Sequence[float], losses: Mapping[float, float]) -> list[float]:
    """The rates still to try: those of the grid, then beyond its edge while the best is at an edge.

    Args:
        grid: at least two rates, rising.
        losses: of the rates that were tried; infinite where every run diverged or was stopped.

    Returns:
        empty once a rate with two worse neighbours is known, all diverged, or the search has gone far enough.
    """
    missing = [rate for rate in grid if rate not in losses]
    best = best_rate(losses)
    if missing or best is None:
        return missing
    known = sorted(losses)
    if len(known) - len(grid) >= _MOST_EXTENSIONS:
        return []
    if best == known[0]:
        beyond = _beyond(known[0], known[1])
    elif best == known[-1]:
        beyond = _beyond(known[-1], known[-2])
    else:
        return []
    return [beyond] if _LOWEST <= beyond <= _HIGHEST and beyond not in losses else []


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest loss; None if none is finite."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def is_at_edge(losses: Mapping[float, float]) -> bool:
    """Whether the best rate has an untried neighbour on one side, so that a better one may lie beyond."""
    return best_rate(losses) in (min(losses, default=None), max(losses, default=None))


def _beyond(edge: float, neighbour: float) -> float:
    """The rate as far beyond the edge as its neighbour is inside. Half decades stay 1, 3, 10, 30, ..."""
    beyond = edge * edge / neighbour
    exponent = math.floor(math.log10(beyond))
    mantissa = beyond / 10**exponent
    factor = max(edge / neighbour, neighbour / edge)
    if 2.9 <= factor <= 3.5:
        mantissa = min((1.0, 3.0, 10.0), key=lambda each: abs(math.log(each / mantissa)))
    return float(f"{mantissa * 10**exponent:.2g}")
