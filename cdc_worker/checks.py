"""What a check of the doctor sees and says.

A check is a function of a `Look` that yields findings, or raises the error with which `run` would stop: its words are
the doctor's too. A fix is SQL, or a command, with a word of who does it; what follows `then:` comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import psycopg
from pydantic import BaseModel, Field

from cdc_worker.config import Settings
from cdc_worker.errors import CdcWorkerError
from cdc_worker.postgres import Connection, Server, failure, told
from cdc_worker.profile import Profile
from cdc_worker.rules import Rules


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to look at: a server, through a connection whose statements end after some seconds."""

    settings: Settings
    profile: Profile
    rules: Rules
    connection: Connection
    server: Server


class Finding(BaseModel, frozen=True):
    """What a check came to. These are the fields of `doctor --json`."""

    check: str = Field(description="name of the check")
    outcome: Literal["ok", "warning", "failed", "unknown"] = Field(
        description="`warning`: it works, and may do harm; `unknown`: the check could not be made, `message` says why"
    )
    message: str = Field(description="what was found; of a failure, the cause")
    fix: str | None = Field(description="SQL or a command that mends it")


Check = Callable[[Look], Iterator[Finding]]


def ok(message: str) -> Finding:
    """All is well."""
    return Finding(check="", outcome="ok", message=message, fix=None)


def warning(message: str, fix: str) -> Finding:
    """It works, and may do harm."""
    return Finding(check="", outcome="warning", message=message, fix=fix)


def failed(message: str, fix: str) -> Finding:
    """The worker can't work like this, or not rightly."""
    return Finding(check="", outcome="failed", message=message, fix=fix)


def unknown(message: str, fix: str | None = None) -> Finding:
    """It can't be told. `fix` is what lets it be told."""
    return Finding(check="", outcome="unknown", message=message, fix=fix)


def examine(check: Check, look: Look) -> Iterator[Finding]:
    """What a check finds, under its name."""
    try:
        found = [*check(look)]
    except CdcWorkerError as error:
        found = [failed(str(error), error.hint or "")]
    except psycopg.errors.InsufficientPrivilege as error:
        found = [unknown(f'role "{look.server.role}" may not look: {told(error)}')]
    except psycopg.errors.QueryCanceled:
        found = [unknown("the server took too long to tell")]
    except psycopg.errors.LockNotAvailable:
        found = [unknown("a lock is in the way (see writing)")]
    except psycopg.Error as error:
        if look.connection.closed:
            raise
        known = failure(error)
        found = [failed(str(known), known.hint or "")]
    for finding in found:
        yield finding.model_copy(update={"check": check.__name__})
