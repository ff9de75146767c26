"""Checks of the server: can it be decoded, does it allow it, and what would the worker do to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cdc_worker import postgres
from cdc_worker.checks import Check, Finding, Look, ok


def wal_level(look: Look) -> Iterator[Finding]:
    """Whether the WAL has what logical decoding needs."""
    postgres.check_wal_level(look.server)
    yield ok("logical")


CHECKS: Final[tuple[Check, ...]] = (wal_level,)
