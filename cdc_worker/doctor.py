"""The doctor: looks at all that the worker depends on, and says what is wrong and how to mend it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

import psycopg
from pydantic import BaseModel, Field

from cdc_worker import postgres, profile, server_checks, slot_checks, table_checks
from cdc_worker.checks import Check, Finding, Look, examine, failed
from cdc_worker.config import Settings
from cdc_worker.errors import CdcWorkerError

CHECKS: Final[tuple[Check, ...]] = (*server_checks.CHECKS, *table_checks.CHECKS, *slot_checks.CHECKS)

CHECK_TIMEOUTS: Final = "SET statement_timeout = '10s'; SET lock_timeout = '300ms'"
"""So long a check may let the server work, and wait for a lock, which may hold up one check after another."""


class Report(BaseModel):
    """All findings, in the order of the checks. This is `doctor --json`."""

    findings: list[Finding] = Field(description="one or more of each check")
    healthy: bool = Field(description="nothing has failed: the exit code is 0")


def doctor(settings: Settings, checks: Iterable[Check] = CHECKS) -> Report:
    """Look at everything. Changes nothing."""
    findings = _findings(settings, checks)
    return Report(findings=findings, healthy=all(finding.outcome != "failed" for finding in findings))


def _findings(settings: Settings, checks: Iterable[Check]) -> list[Finding]:
    step = "profile"
    try:
        loaded = profile.load(settings.profile)
        rules = settings.rules(loaded)
        step = "connection"
        with postgres.connect(settings.dsn.get_secret_value(), settings.worker, name=postgres.DOCTOR) as connection:
            connection.execute(CHECK_TIMEOUTS)
            look = Look(settings, loaded, rules, connection, postgres.server(connection))
            return [finding for check in checks for finding in examine(check, look)]
    except (CdcWorkerError, psycopg.Error) as error:
        known = postgres.failure(error) if isinstance(error, psycopg.Error) else error
        return [failed(str(known), known.hint or "").model_copy(update={"check": step})]


def lines(report: Report) -> list[str]:
    """The report as a person reads it: a line a finding, with its fix below."""
    width = max(len(finding.check) for finding in report.findings)
    found = []
    for finding in report.findings:
        found.append(f"{finding.outcome:8} {finding.check + ':':{width + 1}} {finding.message}")
        if finding.fix:
            found.append(f"{'':8} {'fix:':{width + 1}} {finding.fix}")
    counts = Counter[str](finding.outcome for finding in report.findings)
    return [*found, ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("ok", "warning", "failed", "unknown"))]
