"""Tests and intervals against formulas by hand, plain enumeration, and simulated data."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from qdense.comparison import statistics
from qdense.comparison.statistics import bootstrap_interval, holm, paired_p_value


def single(only_first, only_second, both=3, neither=2):
    """Outcomes of two runs, one seed each, by the four counts of McNemar's table."""
    first = [1] * only_first + [0] * only_second + [1] * both + [0] * neither
    second = [0] * only_first + [1] * only_second + [1] * both + [0] * neither
    return np.array([first]), np.array([second])


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (1, 8, 0.0390625),  # 2 (C(9,0) + C(9,1)) / 2^9
        (8, 1, 0.0390625),
        (0, 6, 0.03125),  # 2 / 2^6
        (0, 1, 1.0),
        (2, 3, 1.0),  # 2 (1 + 5 + 10) / 2^5
        (4, 4, 1.0),
        (0, 0, 1.0),
        (2, 8, 0.109375),  # 2 (1 + 10 + 45) / 2^10
    ],
)
def test_mcnemar_by_hand(only_first, only_second, p):
    assert paired_p_value(*single(only_first, only_second)) == p


@pytest.mark.parametrize(("only_first", "only_second"), [(40, 70), (500, 431), (3000, 3100), (1000, 9042)])
def test_one_seed_a_side_is_mcnemar_s_exact_test(only_first, only_second):
    n, least = only_first + only_second, min(only_first, only_second)
    ways, tail = 1, 0
    for k in range(least + 1):
        tail, ways = tail + ways, ways * (n - k) // (k + 1)
    binomial = Fraction(2 * tail, 2**n)
    expected = float(binomial) or 2.0**-1022  # 1000 against 9042: a p value that no float can hold
    assert paired_p_value(*single(only_first, only_second)) == pytest.approx(expected, rel=1e-10, abs=0)


@pytest.mark.parametrize(("num_first", "num_second"), [(1, 1), (1, 2), (2, 2), (3, 1), (3, 3), (2, 3), (4, 6)], ids=str)
def test_pooled_seeds_against_all_sign_flips(num_first, num_second):
    generator = random.Random(num_first * 10 + num_second)
    p_values = set()
    for _ in range(8):
        first = np.array([[generator.random() < 0.4 for _ in range(9)] for _ in range(num_first)], dtype=np.int8)
        second = np.array([[generator.random() < 0.7 for _ in range(9)] for _ in range(num_second)], dtype=np.int8)
        differences = [
            Fraction(int(sum(b)), num_second) - Fraction(int(sum(a)), num_first)
            for a, b in zip(first.T, second.T, strict=True)
        ]
        flipped = [
            abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=9)
        ]
        expected = sum(total >= abs(sum(differences)) for total in flipped) / len(flipped)
        assert paired_p_value(first, second) == pytest.approx(expected, rel=1e-12)
        assert paired_p_value(second, first) == pytest.approx(expected, rel=1e-12)
        p_values.add(round(expected, 6))
    assert len(p_values) > 3  # the data were not all trivial


def test_many_items_under_several_seeds_against_whole_numbers():
    generator = np.random.default_rng(5)
    first, second = generator.random((2, 300)) < 0.5, generator.random((3, 300)) < 0.57
    differences = [int(d) for d in 2 * second.sum(axis=0) - 3 * first.sum(axis=0)]
    sums = {0: 1}
    for d in differences:
        grown: dict[int, int] = {}
        for total, ways in sums.items():
            for sign in (1, -1):
                grown[total + sign * d] = grown.get(total + sign * d, 0) + ways
        sums = grown
    far = sum(ways for total, ways in sums.items() if abs(total) >= abs(sum(differences)))
    expected = float(Fraction(far, 2**300))
    assert 1e-6 < expected < 0.5
    assert paired_p_value(first.astype(np.int8), second.astype(np.int8)) == pytest.approx(expected, rel=1e-11)


def test_the_largest_task_under_several_seeds_is_within_reach():
    # hellaswag, and every item differs: as extreme as it gets
    p = paired_p_value(np.zeros((3, 10_042), dtype=np.int8), np.ones((3, 10_042), dtype=np.int8))
    assert 0 < p < 1e-300


def test_identical_sides_give_no_evidence():
    outcomes = np.array([[1, 0, 1, 1], [0, 0, 1, 1]])
    assert paired_p_value(outcomes, outcomes) == 1.0
    assert bootstrap_interval([outcomes[:1]], [outcomes[:1]]) == (0.0, 0.0)  # paired: items cancel


def test_p_values_are_right_as_often_as_they_say():
    generator = np.random.default_rng(3)
    p_values = []
    for _ in range(1000):
        hardness = generator.random(60)  # shared by both sides, so their seeds and items are correlated
        first, second = ((generator.random((seeds, 60)) < hardness).astype(np.int8) for seeds in (2, 3))
        p_values.append(paired_p_value(first, second))
    for level in (0.05, 0.2, 0.5):
        share = np.mean(np.array(p_values) <= level)
        # sums of few values tie, so an exact test stays a little below its level
        assert 0.75 * level < share < level + 0.03, level


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def slow_bootstrap(tasks, reference, num_draws):
    """The same draws, an item and a seed at a time."""
    generator = random.Random(11)
    averages = []
    for _ in range(num_draws):
        ours = [generator.randrange(len(tasks[0])) for _ in tasks[0]]
        theirs = [generator.randrange(len(reference[0])) for _ in reference[0]]
        total = 0.0
        for task, other in zip(tasks, reference, strict=True):
            items = [generator.randrange(len(task[0])) for _ in task[0]]
            total += sum(task[seed][i] for seed in ours for i in items) / len(ours) / len(items)
            total -= sum(other[seed][i] for seed in theirs for i in items) / len(theirs) / len(items)
        averages.append(total / len(tasks))
    averages.sort()
    return averages[round(0.025 * num_draws)], averages[round(0.975 * num_draws)]


@pytest.mark.parametrize(("num_first", "num_second"), [(1, 1), (3, 2)])
def test_bootstrap_against_a_plain_one(num_first, num_second):
    generator = np.random.default_rng(num_first)
    first, second = [], []
    for num_items in (40, 25):
        hardness = generator.random(num_items)
        tilt = np.linspace(0, 0.3, num_first)[:, None]  # the seeds differ
        first.append((hardness + tilt > 0.4).astype(np.int8))
        second.append((hardness + 0.2 * generator.random((num_second, num_items)) > 0.6).astype(np.int8))
    quick = bootstrap_interval(first, second)
    slow = slow_bootstrap([task.tolist() for task in first], [task.tolist() for task in second], 3000)
    assert quick[1] - quick[0] > 0.1
    assert quick == pytest.approx(slow, abs=0.02)


def test_bootstrap_of_one_run_is_near_the_normal_interval():
    outcomes = np.array([[1] * 600 + [0] * 400])
    margin = 1.96 * math.sqrt(0.6 * 0.4 / 1000)
    assert bootstrap_interval([outcomes]) == pytest.approx((0.6 - margin, 0.6 + margin), abs=0.002)
    # the average of two equal tasks varies by 1 / sqrt(2) of that, however many items each has
    margin /= math.sqrt(2)
    assert bootstrap_interval([outcomes, outcomes]) == pytest.approx((0.6 - margin, 0.6 + margin), abs=0.002)


def test_seeds_that_differ_widen_the_interval():
    alike = np.array([[1] * 500 + [0] * 500] * 2)
    apart = np.array([[1] * 700 + [0] * 300, [1] * 300 + [0] * 700])
    low, high = bootstrap_interval([alike])
    assert high - low < 0.07
    low, high = bootstrap_interval([apart])
    assert low < 0.32
    assert high > 0.68


def test_the_bootstrap_repeats_itself_and_does_not_depend_on_its_blocks(monkeypatch):
    generator = np.random.default_rng(2)
    tasks = [(generator.random((2, n)) < 0.5).astype(np.int8) for n in (30, 50)]
    whole = bootstrap_interval(tasks)
    assert whole == bootstrap_interval(tasks)
    assert whole != bootstrap_interval(tasks, seed=1)
    monkeypatch.setattr(statistics, "DRAWS_AT_A_TIME", 1000)
    assert bootstrap_interval(tasks) == whole


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(8)
    covered = 0
    for _ in range(300):
        first, second = [], []
        for num_items in (100, 60):
            hardness = generator.random(num_items)
            first.append((hardness > 0.35 + 0.1 * generator.standard_normal((1, num_items))).astype(np.int8))
            second.append((hardness > 0.5 + 0.1 * generator.standard_normal((1, num_items))).astype(np.int8))
        low, high = bootstrap_interval(first, second, num_draws=1000)
        covered += low <= 0.15 <= high
    assert 0.90 < covered / 300 < 0.985
