"""How much is measured."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What the options say; `scale` makes all of it smaller that isn't said."""

    rounds: int = 5
    scale: float = 1.0
    count: int = 200_000
    large: int = 500_000
    seconds: int = 10
    rate: int = 500
    leads: int = 1_000_000
    backfill_rate: int = 1_000
    minutes: float = 3.0
    without: Collection[str] = ()

    def scaled(self, size: float, *, least: int = 1) -> int:
        """A size that no option is for."""
        return max(least, round(size * self.scale))


LEAST = {"count": 400, "large": 1_000, "seconds": 1, "leads": 1_000, "minutes": 0.02}
"""Below which nothing is scaled."""


def sized(scale: float, rounds: int, without: Collection[str], **given: float | None) -> Sizes:
    """Sizes as they are given, or else by the scale."""
    fields = {}
    for name, value in given.items():
        usual = getattr(Sizes, name)
        scaled = type(usual)(max(LEAST[name], usual * scale)) if name in LEAST else usual
        fields[name] = scaled if value is None else value
    return Sizes(rounds=rounds, scale=scale, without=without, **fields)  # type: ignore[arg-type]  # click knows the types
