"""Checks of the slot and of what the worker has done so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cdc_worker import slot as slots
from cdc_worker.checks import Check, Finding, Look, ok


def checkpoint(look: Look) -> Iterator[Finding]:
    """Whether checkpoint, slot and cluster speak of the same."""
    known, _ = slots.check_checkpoint(look.connection, look.settings.worker, look.settings.slot)
    yield ok(f"at {known.position}, and nothing is missing between it and the slot")


CHECKS: Final[tuple[Check, ...]] = (checkpoint,)
