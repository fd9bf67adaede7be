"""common/judge/frontier.py against its definition, point by point."""

import math
from itertools import pairwise

import numpy as np
import pytest

from common.judge.frontier import Reading, frontier, perplexity_at

GRID = [(3.2, 100.0), (3.6, 400.0), (3.4, 90.0), (3.6, 300.0), (3.0, 95.0), (3.8, 900.0), (3.7, 1200.0)]
KEPT = [(3.4, 90.0), (3.6, 300.0), (3.8, 900.0)]


def test_frontier_by_hand() -> None:
    assert frontier(GRID) == KEPT
    assert frontier([(3.0, 50.0), (3.0, 50.0), (2.0, 50.0)]) == [(3.0, 50.0)]
    assert frontier([]) == frontier([(math.nan, 5.0), (3.0, math.nan), (3.0, math.inf)]) == []


@pytest.mark.parametrize("seed", range(5))
def test_frontier_has_what_nothing_dominates(seed: int) -> None:
    """Also where grids share values, and in any order of the points."""
    rng = np.random.default_rng(seed)
    points = [(float(h), float(p)) for h, p in zip(rng.integers(0, 8, 30), rng.integers(1, 9, 30), strict=True)]

    def dominated(a: tuple[float, float]) -> bool:
        return any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in points)

    found = frontier(points)
    assert found == sorted({a for a in points if not dominated(a)}) == frontier(points[::-1])
    assert all(b.perplexity > a.perplexity for a, b in pairwise(found))


def test_perplexity_at_interpolates_the_logarithm_between_neighbours() -> None:
    for h, p in KEPT:
        assert perplexity_at(GRID, h) == (pytest.approx(p), "")
    assert perplexity_at(GRID, 3.5).perplexity == pytest.approx(math.sqrt(90 * 300))
    assert perplexity_at(GRID, 3.65).perplexity == pytest.approx(300 * 3**0.25)
    with_bend = [*GRID, (3.7, 850.0)]  # above the chord of its neighbours, and on the frontier all the same
    assert perplexity_at(with_bend, 3.7).perplexity == pytest.approx(850)


def test_perplexity_at_does_not_extrapolate() -> None:
    assert perplexity_at(GRID, 3.3) == Reading(90.0, "<")
    assert perplexity_at(GRID, 3.81) == Reading(900.0, ">")
    assert perplexity_at([(3.0, 50.0)], 3.0) == (pytest.approx(50.0), "")
    assert [str(perplexity_at([(3.0, 1234.4)], h)) for h in (2.9, 3.0, 3.1)] == ["<1,234", "1,234", ">1,234"]
    with pytest.raises(ValueError, match="at least one point"):
        perplexity_at([(3.0, math.nan)], 3.0)


def test_perplexity_at_rises_with_the_entropy_asked_for() -> None:
    values = [perplexity_at(GRID, h).perplexity for h in np.linspace(3.3, 3.9, 61)]
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(values)) and values[0] < values[-1]
