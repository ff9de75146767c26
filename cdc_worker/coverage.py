"""Which commits have been read: stretches of where commits end, and single ones."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from typing import Final

from cdc_worker.lsn import LSN


class Coverage:
    """Stretches `(after, until]` of ends of commits, merged where they touch."""

    def __init__(self) -> None:
        self._starts: list[LSN] = []
        self._ends: list[LSN] = []

    def add(self, after: LSN, until: LSN) -> None:
        """All commits that end after the one and at or before the other."""
        if until <= after:
            return
        first, beyond = bisect_left(self._ends, after), bisect_right(self._starts, until)
        if first < beyond:
            after, until = min(after, self._starts[first]), max(until, self._ends[beyond - 1])
        self._starts[first:beyond] = [after]
        self._ends[first:beyond] = [until]

    def covers(self, after: LSN, until: LSN) -> bool:
        """Whether every commit that ends in the stretch is in here."""
        return until <= after or self.reach(after) >= until

    def reach(self, after: LSN) -> LSN:
        """How far it goes from there on without a gap."""
        place = bisect_right(self._starts, after) - 1
        return max(after, self._ends[place]) if place >= 0 else after

    def next(self, after: LSN) -> LSN | None:
        """Where the first stretch begins that begins later."""
        place = bisect_right(self._starts, after)
        return self._starts[place] if place < len(self._starts) else None

    @property
    def until(self) -> LSN | None:
        """Where the last stretch ends."""
        return self._ends[-1] if self._ends else None

    def gaps(self) -> Iterator[tuple[LSN, LSN]]:
        """What lies between the stretches."""
        return zip(self._ends, self._starts[1:], strict=False)


class Seen:
    """What single commits are known by, as they came. The first ones are forgotten when there are too many."""

    CHUNK: Final = 1 << 14
    CHUNKS: Final = 128

    def __init__(self) -> None:
        self._chunks: deque[array[int]] = deque([array("Q")], maxlen=self.CHUNKS)

    def add(self, end: LSN) -> None:
        """One more."""
        last = self._chunks[-1]
        if last and (end < last[-1] or len(last) >= self.CHUNK):
            self._chunks.append(last := array("Q"))
        if not last or end > last[-1]:
            last.append(end)

    def __contains__(self, end: LSN) -> bool:
        return any(
            chunk[0] <= end <= chunk[-1] and chunk[bisect_left(chunk, end)] == end for chunk in self._chunks if chunk
        )
