"""How far a long command has come: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from tqdm import tqdm

from cdc_worker.log import Logger

INTERVAL: Final = 10.0
"""Seconds between two log lines."""


class Advance(Protocol):
    """Told how many more are done."""

    def __call__(self, count: int, /) -> object: ...


@contextmanager
def shown(log: Logger, what: str, *, unit: str, total: int | None, done: int = 0) -> Iterator[Advance]:
    """Show how many of about `total` are done, how fast, and what is left of the time; `done` were done before.

    The `unit` B is that of bytes.
    """
    if sys.stderr.isatty():
        scaled = unit == "B"  # bytes are many
        name = unit if scaled else f" {unit}"
        with tqdm(desc=what, total=total, initial=done, unit=name, unit_scale=scaled, dynamic_ncols=True) as bar:
            yield bar.update
        return
    began = at = time.monotonic()
    count = 0

    def advance(more: int) -> None:
        nonlocal count, at
        count += more
        now = time.monotonic()
        if now >= at + INTERVAL:
            at = now
            rate = count / (now - began)
            left = None if total is None or not rate else round(max(0, total - done - count) / rate)
            log.info("progress", what=what, done=done + count, total=total, per_second=round(rate), seconds_left=left)

    yield advance
