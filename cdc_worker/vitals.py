"""What a process of the worker knows of itself, in numbers: its loop writes them, and whoever asks reads them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, NamedTuple

Role = Literal["connecting", "active", "standby"]

BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper ends of the histogram of batches, in seconds."""

REMEMBERED: Final = 12
"""So many activities are remembered, none of which has more than SIZE bytes."""

SIZE: Final = 1 << 16


class Remembered(NamedTuple):
    """An activity that was written: its line of COPY, and which field is in each of its columns."""

    at: datetime
    type: str
    fields: tuple[str, ...]
    text: bytes


@dataclass(slots=True)
class Vitals:
    """Of one process, since it began. One thread writes them; another may read at any time what is so about then.

    Times are seconds of the monotonic clock. `problems` are by what they are about.
    """

    transactions: int = 0
    activities: Counter[str] = field(default_factory=Counter)
    dead_letters: Counter[str] = field(default_factory=Counter)
    batches: int = 0
    role: Role = "connecting"
    began_at: float = field(default_factory=time.monotonic)
    turned_at: float = field(default_factory=time.monotonic)
    streams: int = 0
    """How often it has begun to read."""
    decode_seconds: float = 0.0
    """Of reading, decoding and transforming."""
    write_seconds: float = 0.0
    writes: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    """Batches by how long they took to write."""
    problems: dict[str, str] = field(default_factory=dict)
    last: deque[Remembered] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def ready(self) -> bool:
        """Whether it records, or stands by to do so, and nothing is in its way."""
        return self.role != "connecting" and not self.problems

    @property
    def begun(self) -> bool:
        """Whether it records, stands by, or has found that it can't yet."""
        return self.role != "connecting" or bool(self.problems)

    @property
    def still(self) -> float:
        """For how many seconds the loop has not turned that is to turn."""
        return time.monotonic() - self.turned_at if self.role == "active" else 0.0

    @property
    def summary(self) -> dict[str, int]:
        """For the log."""
        return {
            "transactions": self.transactions,
            "activities": self.activities.total(),
            "dead_letters": self.dead_letters.total(),
        }

    def became(self, role: Role) -> None:
        """It has this role from now on, whatever was wrong before."""
        self.turned_at = time.monotonic()
        self.role = role
        self.problems.clear()
        self.streams += role == "active"

    def wrote(self, seconds: float) -> None:
        """A batch took so long to write."""
        self.batches += 1
        self.write_seconds += seconds
        self.writes[bisect_left(BUCKETS, seconds)] += 1
