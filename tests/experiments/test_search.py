"""Which learning rates are tried."""

import math

import pytest

from qdense.experiments.search import best_rate, is_at_edge, next_rates

GRID = (1e-3, 3e-3, 1e-2)


def searched(loss_at, grid=GRID):
    """All rates that a search tries, with their losses."""
    losses = {}
    while rates := next_rates(grid, losses):
        losses |= {rate: loss_at(rate) for rate in rates}
    return losses


def test_the_whole_grid_is_tried_first():
    assert next_rates(GRID, {3e-3: 0.5}) == [1e-3, 1e-2]


@pytest.mark.parametrize("best", [1e-5, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1])
def test_it_ends_between_two_worse(best):
    losses = searched(lambda rate: abs(math.log(rate / best)))
    assert best_rate(losses) == best
    assert not is_at_edge(losses)


def test_half_decades_go_on_as_half_decades():
    assert sorted(searched(lambda rate: rate)) == [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, *GRID]
    assert sorted(searched(lambda rate: -rate)) == [*GRID, 3e-2, 1e-1, 3e-1]
    assert next_rates((1e-3, 2e-3), {1e-3: 1.0, 2e-3: 2.0}) == [5e-4]


def test_a_search_that_never_turns_ends_at_the_edge():
    losses = searched(lambda rate: rate)
    assert len(losses) == len(GRID) + 6
    assert is_at_edge(losses)


def test_rates_that_diverged_are_never_the_best():
    losses = searched(lambda rate: math.inf if rate > 5e-3 else -rate)
    assert best_rate(losses) == 3e-3
    assert searched(lambda rate: math.inf).keys() == set(GRID)
    assert best_rate(searched(lambda rate: math.inf)) is None
