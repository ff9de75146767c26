"""What tests of the doctor share: what it finds, and doing what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable

from psycopg.conninfo import make_conninfo
from support import Crm, eventually

from cdc_worker import config
from cdc_worker.checks import Check, Finding
from cdc_worker.cluster import Cluster
from cdc_worker.doctor import CHECKS, doctor


def report(crm: Crm, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """All that the doctor finds, in the order of its checks."""
    return doctor(config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings), checks).findings


def findings(crm: Crm, check: str) -> list[Finding]:
    """What one check of the doctor finds."""
    found = report(crm, [function for function in CHECKS if function.__name__ == check])
    assert found, f"no check {check}"
    assert {finding.check for finding in found} == {check}, found
    return found


def healthy(crm: Crm, check: str) -> bool:
    """Whether a check finds nothing to mend."""
    return all(finding.outcome == "ok" for finding in findings(crm, check))


def ailing(crm: Crm, check: str) -> Finding:
    """The only finding of a check that isn't ok."""
    (found,) = (finding for finding in findings(crm, check) if finding.outcome != "ok")
    return found


_WHO = re.compile(r"^(?:[a-z][\w ,'/]*: )+")

_SQL = re.compile(r"[A-Z]{2,} ")

_PROGRAM = re.compile(r"(?:createdb|dropdb|pg_dump|psql) ")


def mend(crm: Crm, fix: str, *, server: Cluster | None = None) -> None:
    """Do what a fix says, as it is printed, statement by statement and command by command, as a superuser.

    One that restarts the server, or has programs of PostgreSQL in it, needs to know the `server`.
    """
    for part in fix.split("; "):
        step = _WHO.sub("", part)
        if _SQL.match(step):
            crm.connection.execute(step.encode())
        elif step.startswith("cdc-worker "):
            crm.succeed(*shlex.split(step)[1:], dsn=crm.dsn)
        elif named := re.fullmatch(r"name (\w+) in CDC_WORKER_(PLUGIN|PUBLICATION)", step):
            crm.settings[named[2].lower()] = named[1]
        elif named := re.fullmatch(r"name (.+) in CDC_WORKER_DSN", step):
            crm.settings["dsn"] = make_conninfo(crm.settings.get("dsn", crm.dsn), dbname=shlex.split(named[1])[0])
        elif step == "restart the server":
            assert server, fix
            server.restart()
            crm.reconnect()
        else:
            assert server, fix
            assert _PROGRAM.match(step), f"nothing that can be executed: {step}"
            path = f"{server.binaries.bindir}:{os.environ['PATH']}"
            subprocess.run(
                ["bash", "-euo", "pipefail", "-c", step], env=server.environment() | {"PATH": path}, check=True
            )


def cure(crm: Crm, check: str, *, server: Cluster | None = None) -> Finding:
    """The only finding of a check that isn't ok, after its fix has been done and the check has become ok."""
    found = ailing(crm, check)
    assert found.fix, found
    mend(crm, found.fix, server=server)
    eventually(lambda: healthy(crm, check), what=f"{check} is ok after: {found.fix}")
    return found
