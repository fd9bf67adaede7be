"""Perplexity at a given entropy: what makes samplers with temperatures of their own comparable.

A lower temperature or top-p lowers perplexity and entropy together, so one point says where on its curve a method was
looked at, not how good it is. A method at one number of calls is therefore measured on a grid of temperatures and
top-p, and read where its entropy is that of real text.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """Samples of one setting."""

    entropy: float  # nats
    perplexity: float


class Reading(NamedTuple):
    """A perplexity at the entropy asked for; with a mark it is the value of the nearest end of the frontier.

    "<": all of the frontier has more entropy; the perplexity there is at most this one.
    ">": all of it has less; the entropy was not reached, and what was costs this much already.
    """

    perplexity: float
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.mark}{self.perplexity:,.4g}"


def frontier(points: Iterable[tuple[float, float]]) -> list[Point]:
    """The points (entropy, perplexity) that no other dominates, by entropy; both values rise strictly along them.

    A point dominates another if it has at least as much entropy and at most as much perplexity; of equal points one
    stays. Points that are not finite numbers, such as the perplexity of texts without a word, are left out.
    """
    finite = [Point(*point) for point in points if all(map(math.isfinite, point))]
    kept: list[Point] = []
    for point in sorted(finite, key=lambda point: (-point.entropy, point.perplexity)):
        if not kept or point.perplexity < kept[-1].perplexity:
            kept.append(point)
    return kept[::-1]


def perplexity_at(points: Iterable[tuple[float, float]], entropy: float) -> Reading:
    """Log perplexity between the two neighbours on the frontier, linear in entropy; beyond its ends their values.

    Raises ValueError if there is no point.
    """
    ends = frontier(points)
    if not ends:
        raise ValueError("a frontier needs at least one point of finite numbers")
    if entropy < ends[0].entropy:
        return Reading(ends[0].perplexity, "<")
    if entropy > ends[-1].entropy:
        return Reading(ends[-1].perplexity, ">")
    x, y = zip(*ends, strict=True)
    return Reading(math.exp(np.interp(entropy, x, np.log(y))))
