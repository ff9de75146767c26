"""What is made of what was measured: medians, percentiles, ratios, and whether a cost is flat."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

FLAT = 0.15
"""A cost that changes by less than this part of itself from the smallest size to the largest is flat."""

LINEAR = 0.9
"""So much of its variance a straight line explains where a cost is linear."""

Growth = Literal["flat", "falling", "linear", "uneven"]


class Spread(TypedDict):
    """A measure over the rounds, in their order."""

    median: float
    min: float
    max: float
    rounds: list[float]


class Fit(TypedDict):
    """A straight line through costs: what one more costs, and how much dearer the largest size is than the smallest."""

    growth: Growth
    slope: float
    increase: float
    r_squared: float


def spread(values: Sequence[float]) -> Spread:
    """Raises statistics.StatisticsError if there are none."""
    rounds = [rounded(value) for value in values]
    return Spread(median=rounded(statistics.median(values)), min=min(rounds), max=max(rounds), rounds=rounds)


def ratio(ours: Spread, theirs: Spread) -> Spread:
    """Round by round: each is held against what was measured next to it."""
    return spread([one / other if other else 0.0 for one, other in zip(ours["rounds"], theirs["rounds"], strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent don't exceed, between two if need be. Raises ValueError if there are none."""
    if not values:
        raise ValueError("nothing was measured")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def percentiles(values: Sequence[float]) -> list[float]:
    """p50, p95 and p99."""
    return [percentile(values, percent) for percent in (50, 95, 99)]


def tail(values: Sequence[float]) -> dict[str, float]:
    """By name: p50, p95, p99, p99.9 and the maximum."""
    found = {f"p{percent}": rounded(percentile(values, percent)) for percent in (50, 95, 99, 99.9)}
    return found | {"max": rounded(max(values))}


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Whether a cost grows with the size. Raises statistics.StatisticsError if there are not two sizes at least."""
    slope, intercept = statistics.linear_regression(sizes, costs)
    least, most = (intercept + slope * size for size in (min(sizes), max(sizes)))
    increase = most / least - 1 if least > 0 else 0.0
    constant = len({*costs}) == 1
    r_squared = 1.0 if constant else statistics.correlation(sizes, costs) ** 2
    growth: Growth = "flat"
    if abs(increase) >= FLAT:
        growth = "falling" if increase < 0 else "linear" if r_squared >= LINEAR else "uneven"
    return Fit(growth=growth, slope=rounded(slope), increase=rounded(increase), r_squared=rounded(r_squared))


def rounded(value: float) -> float:
    """To four digits that count, which is more than what any of this is exact to."""
    return float(f"{value:.4g}") if abs(value) < 1e4 else float(round(value))


def merged(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Results with those of other parts, which stay; a part that was measured again is replaced as a whole."""
    return {**known, **found, "parts": {**known.get("parts", {}), **found.get("parts", {})}}
