"""Intervals for accuracies, and tests of two models on the same items.

With one run on each side, the numbers are about these two runs only. Two runs of one recipe differ by their seed too, and only
several seeds can show by how much.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# Outcomes of several runs of one recipe on one task: (num_seeds, num_items), 0 or 1; all tasks list the seeds in the same order.
OutcomeMatrix = NDArray[np.integer]

DRAWS_AT_A_TIME = 2**20  # elements in a block of draws, so that many patterns of outcomes do not fill the memory


def paired_p_value(first: OutcomeMatrix, second: OutcomeMatrix) -> float:
    """Exact two-sided test of whether two recipes do equally well on the same items.

    Items are the units: an item's outcomes under several seeds are not independent, so its difference is the mean over the
    second's seeds minus that over the first's. If the two are equal, each sign is equally likely, and the p value is the
    share of all 2^n assignments of signs whose sum is at least as far from 0 as the observed one
    (Fisher's randomisation test, 1935). With one seed a side this is McNemar's exact test: the binomial test of the
    discordant pairs. With different numbers of seeds on the two sides the differences are only nearly symmetric, and the test
    nearly exact. The seeds are fixed: the test says nothing about seeds that were not run.

    Args:
        first: (seeds of the first, items).
        second: (seeds of the second, items), the same items in the same order.

    Returns:
        at most 1, and never 0; the smallest float if the value is too small for one.
    """
    differences = len(first) * second.sum(axis=0, dtype=np.int64) - len(second) * first.sum(axis=0, dtype=np.int64)
    magnitudes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    observed = abs(int(differences.sum()))
    if observed == 0:
        return 1.0
    unit = int(np.gcd.reduce(magnitudes))
    magnitudes, observed = magnitudes // unit, observed // unit
    # Of the c differences of magnitude m, K are positive, K ~ Binomial(c, 1/2), and the sum of all is
    # sum(2 m K) - sum(m c). So its distribution is that of independent binomials on different grids: convolution with
    # a binomial on a grid of m convolves every m-th entry separately. All terms are positive: nothing cancels.
    weights = np.ones(1)
    for magnitude, count in zip(magnitudes.tolist(), counts.tolist(), strict=True):
        grown = np.zeros(len(weights) + magnitude * count)
        binomial = _fair_coin(count)
        for offset in range(magnitude):
            residue = weights[offset::magnitude]
            if len(residue):
                grown[offset::magnitude] = np.convolve(residue, binomial)
        weights = grown
    # Symmetric about the middle, so twice the tail of sums of at most -observed.
    tail = math.fsum(weights[: (len(weights) - 1 - observed) // 2 + 1].tolist())
    num_differences = int(counts.sum())
    smallest = max(2.0 ** max(1 - num_differences, -1022), sys.float_info.min)
    return min(1.0, max(2 * tail, smallest))


def _fair_coin(num_throws: int) -> NDArray[np.float64]:
    """The probabilities of 0 to `num_throws` heads. Quotients of exact integers, so each is rounded once."""
    total, ways = 1 << num_throws, 1
    half = []
    for k in range(num_throws // 2 + 1):
        half.append(ways / total)
        ways = ways * (num_throws - k) // (k + 1)
    return np.array(half + half[: (num_throws + 1) // 2][::-1])


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, in the order given (Holm 1979).

    Calling those of at most 0.05 significant gives any false positive with a probability of at most 0.05.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = highest
    return adjusted


def bootstrap_interval(
    tasks: Sequence[OutcomeMatrix],
    reference: Sequence[OutcomeMatrix] | None = None,
    *,
    confidence: float = 0.95,
    num_draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of the unweighted average over tasks, or of its difference.

    Each draw resamples the items of every task with replacement, the same for both sides (paired), and each side's
    seeds, the same in every task. With one seed the interval does not include the variance over seeds; with a few
    it does, but too little: the mean of n drawn seeds varies by (n - 1) / n of what it should.
    An accuracy of 0 or 1 gives an interval of zero width.

    Args:
        tasks: for each task (seeds, items).
        reference: the other side, (its seeds, the same items) for each task; its average is subtracted.

    Returns:
        (low, high), deterministic.
    """
    others: Sequence[OutcomeMatrix] = reference if reference is not None else [task[:0] for task in tasks]
    num_seeds, num_others = len(tasks[0]), len(others[0])
    generator = np.random.default_rng(seed)
    # The weight of each run, negative for the reference: a row for each draw.
    weights = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_draws) / num_seeds
    if num_others:
        theirs = generator.multinomial(num_others, np.full(num_others, 1 / num_others), num_draws) / num_others
        weights = np.hstack([weights, -theirs])
    averages = np.zeros(num_draws)
    for ours, other in zip(tasks, others, strict=True):
        # Items with the same outcomes in all runs are interchangeable, so a draw is a count of each kind.
        num_items = ours.shape[1]
        patterns, counts = np.unique(np.vstack([ours, other]), axis=1, return_counts=True)
        for rows in _blocks(num_draws, len(counts)):
            drawn = generator.multinomial(num_items, counts / num_items, rows.stop - rows.start)
            accuracies = drawn @ patterns.T / num_items
            averages[rows] += (accuracies * weights[rows]).sum(axis=1) / len(tasks)
    low, high = np.quantile(averages, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _blocks(num_draws: int, num_patterns: int) -> Iterator[slice]:
    step = max(1, DRAWS_AT_A_TIME // num_patterns)
    for start in range(0, num_draws, step):
        yield slice(start, min(start + step, num_draws))
