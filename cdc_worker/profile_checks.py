"""Checks of a profile: what is wrong with its text, and where it doesn't fit a database, line by line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from cdc_worker import catalog, pgoutput, postgres, profile, target_checks
from cdc_worker.checks import Check, Finding, Look, examine
from cdc_worker.config import Settings
from cdc_worker.doctor import CHECK_TIMEOUTS
from cdc_worker.errors import ProfileError, ProfileFault
from cdc_worker.places import Places
from cdc_worker.profile import Profile
from cdc_worker.rules import Rules
from cdc_worker.table_checks import backfill_faults, misfit

PROFILE: Final = f"{postgres.APPLICATION_NAME}-profile"
"""What the connections are called that only look at what a profile comes to."""

READ_ONLY: Final = f"{CHECK_TIMEOUTS}; SET default_transaction_read_only = on"


@dataclass(frozen=True, slots=True)
class Told:
    """What is wrong on a line, and what mends it. With a `warning` the worker runs, or will after setup."""

    line: int
    outcome: Literal["fault", "warning"]
    message: str
    fix: str | None = None


def check(settings: Settings, name_or_path: str) -> Iterator[Told]:
    """What is wrong with a profile, first by itself, then, with a DSN, for its database. Changes nothing.

    Raises ProfileError if it can't be read, and what connecting raises.
    """
    text = profile.read(name_or_path)
    try:
        found, faults = profile.parse_parts(text, source=name_or_path)
    except ProfileError as error:
        if not error.faults:
            yield Told(_line(str(error), text), "fault", str(error))
        else:
            yield from _in_text(error.faults, Places(text))
        return
    found, rules = _compiled(settings, found, faults)
    places = Places(text)
    yield from _in_text(faults, places)
    if dsn := settings.dsn.get_secret_value():
        with postgres.connect(dsn, settings.worker, name=PROFILE) as connection:
            connection.execute(READ_ONLY)
            look = Look(settings, found, rules, connection, postgres.server(connection))
            yield from _in_order(_misfits(look, places, target=not _of_target(faults)))


def _in_text(faults: Iterable[ProfileFault], places: Places) -> list[Told]:
    return _in_order(Told(places.line(fault.place), "fault", fault.message) for fault in faults)


def _in_order(told: Iterable[Told]) -> list[Told]:
    """By line; what two checks have found once."""
    return sorted({one.message: one for one in told}.values(), key=lambda one: (one.line, one.message))


def _line(message: str, text: str) -> int:
    """The line that tomllib names, which has no other word for it."""
    named = re.search(r"\(at line (\d+), column \d+\)", message)
    return int(named[1]) if named else text.count("\n") + 1


def _compiled(settings: Settings, found: Profile, faults: list[ProfileFault]) -> tuple[Profile, Rules]:
    """The rules of what has no faults; those of the others are added."""
    while True:
        try:
            return found, settings.rules(found)
        except ProfileError as error:
            faults += error.faults
            found = profile.without(found, error.faults)


def _of_target(faults: list[ProfileFault]) -> bool:
    return any(fault.place[:1] in ((), ("target",)) for fault in faults)


_CHECKS: Final[tuple[Check, ...]] = (target_checks.target, target_checks.target_checks)


def _misfits(look: Look, places: Places, *, target: bool) -> Iterator[Told]:
    for check in _CHECKS if target else ():
        for finding in examine(check, look):
            yield from _told(finding, places.line(("target",)))
    # A profile is for either plugin, unless one is named: which it will be may change with an upgrade of the server.
    plugin = pgoutput.PLUGIN if look.settings.plugin == "auto" else look.settings.plugin
    faults = catalog.faults(look.connection, look.profile, look.rules, plugin=plugin)
    for fault in (*faults, *backfill_faults(look)):
        if fault.captured or target:
            at = places.mention(fault.place, fault.missing) if fault.captured else places.line(fault.place)
            yield from _told(misfit(look, fault), at)


def _told(finding: Finding, line: int) -> Iterator[Told]:
    if finding.outcome != "ok":
        certain = finding.outcome == "failed" and finding.fix != "cdc-worker setup"
        yield Told(line, "fault" if certain else "warning", finding.message, finding.fix)
