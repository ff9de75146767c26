"""Checks of the tables: those that are captured, and the target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cdc_worker import postgres
from cdc_worker.checks import Check, Finding, Look, ok


def profile(look: Look) -> Iterator[Finding]:
    """Whether the profile's tables and columns are there."""
    postgres.check_catalog(look.connection, look.profile, look.rules)
    yield ok(f"{look.profile.name}: its {len(look.rules)} tables and their columns are there")


CHECKS: Final[tuple[Check, ...]] = (profile,)
