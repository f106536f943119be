"""Accuracies of one run: their interval, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson_interval(num_correct: int, num_items: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927): reliable near 0 and 1 and for few items, unlike the normal one.

    Returns:
        (low, high), both between 0 and 1; (0, 1) without items.
    """
    if num_items == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_correct / num_items
    centre = share + z * z / (2 * num_items)
    margin = z * math.sqrt(share * (1 - share) / num_items + z * z / (4 * num_items**2))
    scale = 1 + z * z / num_items
    low, high = (centre - margin) / scale, (centre + margin) / scale
    # exact at the ends, where rounding would give 1e-17
    return (0.0 if num_correct == 0 else low, 1.0 if num_correct == num_items else high)


def pass_at(k: int, outcomes: Sequence[Sequence[bool]]) -> float:
    """The probability that at least one of k samples is right, averaged over items.

    The unbiased estimate from n >= k samples of which c are right: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021,
    arXiv:2107.03374, eq. 1).

    Args:
        outcomes: for each item, whether each of its n samples is right.
    """
    if not outcomes:
        return 0.0
    misses = (math.comb(len(item) - sum(item), k) / math.comb(len(item), k) for item in outcomes)
    return 1.0 - math.fsum(misses) / len(outcomes)
