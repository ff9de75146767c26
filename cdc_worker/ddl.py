"""Changes of a database's structure, in steps that wait for locks so briefly that the application doesn't notice.

A step is a statement, or a query whose rows are the statements: what the catalog lacks, and nothing when nothing is
missing. The files of `schema/` are made of such steps, and psql runs them as well: a query ends there with `\\gexec`.
The comment right above a step says what it brings about and, after `lock:`, what it locks and whether it rewrites it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql
from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from cdc_worker import errors, failpoints, log, postgres
from cdc_worker.config import Settings
from cdc_worker.postgres import Connection, fetch_one


@dataclass(frozen=True, slots=True)
class Step:
    """`text` is a statement, or a query for statements if it `generates`. `lock` is as "ACCESS EXCLUSIVE on lead".

    One that is for an `administrator` needs more than the ownership of database and tables.
    """

    title: str
    text: str
    lock: str = ""
    generates: bool = False
    administrator: bool = False

    @property
    def tables(self) -> list[str]:
        """What it locks."""
        found = re.findall(r" on ([\w.\", ]+?)(?:;|$| and (?=[A-Z]))", self.lock)
        return [name for names in found for name in names.split(", ")]

    def statements(self, connection: Connection) -> list[str]:
        """What there is to do."""
        if not self.generates:
            return [self.text]
        return [statement for (statement,) in connection.execute(self.text.encode()) if statement is not None]


_TOKEN: Final = re.compile(
    r"""--[^\n]*|/\*.*?\*/|\$(\w*)\$.*?\$\1\$|'(?:[^']|'')*'|"(?:[^"]|"")*"|(?P<end>;|\\gexec\b)""", re.DOTALL
)


def steps(script: str, variables: Mapping[str, str] | None = None) -> Iterator[Step]:
    """The steps of a file of `schema/`, with psql's variables filled in where they stand as `:'name'`."""
    for name, value in (variables or {}).items():
        script = script.replace(f":'{name}'", sql.quote(value))
    start = 0
    for token in _TOKEN.finditer(script):
        end = token.lastgroup == "end" and token["end"]
        if end:
            yield _step(script[start : token.start()], generates=end != ";")
            start = token.end()


def _step(text: str, *, generates: bool) -> Step:
    comment, statement = _comment_and_statement(text.strip())
    said = {name: value.strip() for name, _, value in (line.partition(":") for line in comment) if name in _NOTES}
    title = " ".join(line for line in comment if line.partition(":")[0] not in _NOTES).split(". ")[0].removesuffix(".")
    return Step(title, statement, said.get("lock", ""), generates, "administrator" in said)


_NOTES: Final = ("lock", "administrator")
"""Lines of a comment that say something of their own, behind a colon."""


def _comment_and_statement(text: str) -> tuple[list[str], str]:
    paragraph: list[str] = []
    lines = text.split("\n")  # and nothing else: names may have what Python takes for the end of a line
    for number, line in enumerate(lines):
        if line.startswith("--"):
            paragraph.append(line.removeprefix("--").strip())
        elif line.strip():
            return paragraph, "\n".join(lines[number:]).rstrip()
        else:
            paragraph = []
    return paragraph, ""


def transaction(*statements: sql.Composable | str) -> str:
    """Statements as one transaction. Strings are taken as they are."""
    texts = [part if isinstance(part, str) else part.as_string() for part in statements]
    return ";\n".join(["BEGIN", *texts, "COMMIT"])


def attempt(restore: str) -> str:
    """Statements that bring something back, as far as what they speak of is still there and nothing is in its place."""
    return (
        f"DO $restore$ BEGIN\n    {restore};\nEXCEPTION WHEN undefined_object OR undefined_table OR undefined_function"
        " OR duplicate_object THEN\n    RAISE WARNING 'not brought back: %', SQLERRM;\nEND $restore$"
    )


def schema(name: str) -> str:
    """A file of `schema/`, which lies beside the package in a checkout, and inside it once installed."""
    installed = resources.files("cdc_worker") / "schema" / name
    found = installed if installed.is_file() else Path(__file__).parent.parent / "schema" / name
    if not found.is_file():
        raise errors.ProfileError(f'the package has no file "{name}" to prepare a target with', hint='mend "prepare"')
    return found.read_text("utf-8")


def checksum(script: str) -> str:
    """What tells versions of a file apart: SHA-256."""
    return hashlib.sha256(script.encode()).hexdigest()


@contextmanager
def connected(settings: Settings) -> Iterator[Connection]:
    """A connection for changes of the structure, to a server that fits."""
    try:
        with postgres.connect(settings.dsn.get_secret_value(), settings.worker) as connection:
            postgres.check_server(postgres.server(connection), settings.worker)
            connection.execute("SET search_path = public")
            with suppress(psycopg.errors.InsufficientPrivilege):
                # For superusers: an autovacuum that is in the way gives way when the deadlock check finds it.
                connection.execute("SELECT set_config('deadlock_timeout', %s, false)", (str(brief(connection) // 2),))
            yield connection
    except psycopg.errors.InsufficientPrivilege as error:
        raise errors.ServerError(
            f"the server refused: {postgres.told(error)} (SQLSTATE {error.sqlstate})",
            hint="do it as a superuser, or as the owner of the tables, who needs CREATE on their schemas",
        ) from error


PATIENCE: Final = 600.0
"""Seconds in which a step must get its locks."""

# Who waited for it in the server would have a snapshot, and CREATE INDEX CONCURRENTLY waits for all who have one.
_ONE_AT_A_TIME: Final = "SELECT pg_try_advisory_lock(hashtext('cdc-worker setup'))"


def one_at_a_time(connection: Connection, *, patience: float = PATIENCE) -> None:
    """Wait until nobody else changes the structure for cdc-worker. Raises ServerError after so many seconds."""
    deadline = time.monotonic() + patience
    while fetch_one(connection, _ONE_AT_A_TIME) != (True,):
        if time.monotonic() > deadline:
            raise errors.ServerError(
                f"another setup, cutover or teardown has been at work for {patience:g} s", hint="see what it waits for"
            )
        log.get().warning("waiting_for_another_setup")
        time.sleep(min(2.0, patience))


def exists(connection: Connection, relation: str) -> bool:
    """Whether there is such a table or view."""
    return fetch_one(connection, "SELECT to_regclass(%s) IS NOT NULL", relation) == (True,)


LOCKS_AT_ONCE: Final = 4
"""So many relations a step locks at most."""


def perform(connection: Connection, step: Step, *, patience: float = PATIENCE, wait: int | None = None) -> list[str]:
    """Do a step, again and again until it gets its locks; returns the statements that were executed.

    Raises ServerError when it doesn't in so many seconds. `wait` is what is `brief`, where that is known.
    """
    wait = brief(connection) if wait is None else wait

    def tell(state: RetryCallState) -> None:
        log.get().warning("waiting_for_lock", step=step.title, lock=step.lock, held_by=_holders(connection, step))

    attempts = Retrying(
        retry=retry_if_exception_type((psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)),
        wait=wait_random_exponential(multiplier=wait / 1000, max=2),
        stop=stop_after_delay(patience),
        before_sleep=tell,
    )
    executed: list[str] = []
    try:
        for attempt in attempts:
            with attempt:
                for statement in step.statements(connection):
                    # Whoever waits to build an index makes nobody else wait.
                    timeout = "30s" if "CONCURRENTLY" in statement else str(wait)
                    connection.execute("SELECT set_config('lock_timeout', %s, false)", (timeout,))
                    try:
                        connection.execute(statement.encode())
                    except psycopg.Error:
                        connection.execute("ROLLBACK")
                        raise
                    executed.append(statement)
    except RetryError as error:
        holders = "; ".join(_holders(connection, step))
        raise errors.ServerError(
            f"{step.lock or step.title}: not to be had within {patience:g} s"
            + (f", for these hold it: {holders}" if holders else ""),
            hint="run it again when they have ended; an autovacuum a superuser can stop with pg_cancel_backend",
        ) from error
    return executed


def performing(connection: Connection, steps: Iterable[Step]) -> Iterator[str]:
    """Do these steps; yields a line for each that had something to do, and what the server warned of.

    Raises AdministratorError for one that needs more than ownership.
    """
    warnings: list[str] = []

    def note(notice: psycopg.errors.Diagnostic) -> None:
        # 25P01 is what a ROLLBACK says where nothing was begun.
        if notice.severity_nonlocalized == "WARNING" and notice.sqlstate != "25P01":
            warnings.append(f"note: {notice.message_primary}")

    connection.add_notice_handler(note)
    wait = brief(connection)  # once: the server makes a list of all its settings for it
    try:
        for step in steps:
            try:
                done = perform(connection, step, wait=wait)
            except psycopg.errors.InsufficientPrivilege as error:
                if not step.administrator:
                    raise
                raise AdministratorError(step.statements(connection)) from error
            if done:
                failpoints.reach("step_done")
            if done and step.title:
                yield step.title
            yield from warnings
            warnings.clear()
    finally:
        connection.remove_notice_handler(note)


class AdministratorError(errors.ServerError):
    """Statements that need more than the ownership of database and tables."""

    def __init__(self, statements: Iterable[str]) -> None:
        self.statements = [*statements]
        super().__init__(
            "this needs more than the ownership of database and tables:\n"
            + "\n".join(f"  {statement};" for statement in self.statements),
            hint="have an administrator do it, then the same again",
        )


def brief(connection: Connection) -> int:
    """How long to wait for one lock, in milliseconds: all that a step waits for, in less than half a deadlock_timeout.

    So neither do others queue behind us for long, nor can it be one of them whom the server ends in a deadlock.
    """
    (milliseconds,) = fetch_one(
        connection, "SELECT least(reset_val::int, boot_val::int) FROM pg_settings WHERE name = 'deadlock_timeout'"
    )
    return max(1, int(milliseconds * 0.4 / LOCKS_AT_ONCE))


_HOLDERS: Final = """
SELECT DISTINCT coalesce(format('process %%s (%%s)', pid, coalesce(nullif(application_name, ''), backend_type)),
                         'a prepared transaction')
FROM pg_locks LEFT JOIN pg_stat_activity USING (pid)
WHERE granted AND pid IS DISTINCT FROM pg_backend_pid()
    AND relation = ANY (SELECT to_regclass(name) FROM unnest(%s::text[]) name)
ORDER BY 1
"""


def _holders(connection: Connection, step: Step) -> list[str]:
    return [holder for (holder,) in connection.execute(_HOLDERS, (step.tables,))]


_SIZES: Final = """
SELECT relname::text, pg_size_pretty(pg_total_relation_size(c.oid))
FROM pg_class c WHERE c.oid = ANY (SELECT to_regclass(name) FROM unnest(%s::text[]) name)
"""


def script(connection: Connection, step: Step) -> str:
    """What a step would execute, as SQL with comments; empty when there is nothing to do."""
    statements = step.statements(connection)
    if not statements:
        return ""
    lines = [f"-- {step.title}"] if step.title else []
    if step.lock:
        sizes = ", ".join(f"{name}: {size}" for name, size in connection.execute(_SIZES, (step.tables,)))
        lines.append(f"-- lock: {step.lock}" + (f" ({sizes})" if sizes else ""))
    if step.administrator:
        lines.append("-- for an administrator, unless you may do it yourself")
    lines += [f"{statement.rstrip().removesuffix(';')};" for statement in statements]
    if any("CONCURRENTLY" in statement for statement in statements):  # which makes nobody wait
        lines = [*lines[:1], "SET lock_timeout = '30s';", *lines[1:], f"SET lock_timeout = {brief(connection)};"]
    return "\n".join(lines) + "\n"


def header(connection: Connection) -> str:
    """How a script begins that psql may run: it ends at the first error, and waits for locks as briefly as we do."""
    return f"\\set ON_ERROR_STOP on\nSET search_path = public;\nSET lock_timeout = {brief(connection)};\n"
