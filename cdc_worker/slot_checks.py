"""Checks of the slot, and of how the worker has fared with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import checkpoint as checkpoints
from cdc_worker import errors, gap, pgoutput, postgres
from cdc_worker import publication as publications
from cdc_worker import slot as slots
from cdc_worker.checks import Check, Finding, Look, failed, ok, unknown, warning
from cdc_worker.postgres import fetch_one
from cdc_worker.publication import Publication
from cdc_worker.rules import qualified
from cdc_worker.slot import Slot
from cdc_worker.target_checks import otherwise


def _on_slot(check: Callable[[Look, Slot], Iterator[Finding]]) -> Check:
    """A check that is made where there is a slot: that there is none is the checkpoint's to tell."""

    @wraps(check)
    def made(look: Look) -> Iterator[Finding]:
        name = slots.own(look.connection, look.settings.worker, look.settings.slot)
        found = slots.read(look.connection, name)
        if found is None:
            yield unknown(f'there is no slot "{name}" (see checkpoint)')
        else:
            yield from check(look, found)

    return made


def checkpoint(look: Look) -> Iterator[Finding]:
    """Whether checkpoint, slot and cluster speak of the same, and nothing is missing between them."""
    known, found = slots.check_checkpoint(look.connection, look.settings.worker, look.settings.slot)
    slots.check_plugin(found, look.settings.plugin)
    yield ok(f"at {known.position.lsn}, and the slot at {found.confirmed_flush_lsn}: nothing is missing between them")
    for left in gap.pending(look.connection, look.settings.worker):
        yield failed(f"gap {left}: not reconciled", "as the owner: cdc-worker recover")


def publication(look: Look) -> Iterator[Finding]:
    """Whether pgoutput is sent all changes of captured tables, or would be, and the application can update them."""
    name, worker = look.settings.publication_name, look.settings.worker
    own = slots.read(look.connection, slots.own(look.connection, worker, look.settings.slot))
    if own is None:
        yield unknown("there is no slot yet for which it would matter (see checkpoint)", "cdc-worker setup")
        return
    found = publications.look(look.connection, name, look.rules)
    healthy = f'"{name}" has {len(found.members)} tables and partitions, and nothing else'
    yield from otherwise(_misleading(look, found, needed=own.plugin == pgoutput.PLUGIN), healthy)


def _misleading(look: Look, found: Publication, *, needed: bool) -> Iterator[Finding]:
    try:
        publications.check_owner(found, look.settings.worker)
        noted = publications.noted(look.connection, look.settings.worker) if needed else None
        publications.check(look.connection, found.name, look.rules, noted=noted)
    except errors.PublicationError as error:
        if needed:
            yield failed(str(error), error.hint or "")
        else:
            yield warning(f"switched to pgoutput, the worker would stop: {error}", error.hint or "")
    ours = found.is_of(look.settings.worker)
    others = [*map(".".join, found.others), *(f"all tables of {schema}" for schema in found.schemas)]
    if ours and others:
        yield warning(
            f'the publication "{found.name}" has what nobody captures: {", ".join(others)}', "cdc-worker setup"
        )
    for relation, unidentified in publications.unwritable(look.connection, found.name).items():
        name = ".".join(relation)
        why = "without a replica identity" if unidentified else "with generated columns that are not"
        full = f"as its owner: ALTER TABLE {sql.Identifier(*relation).as_string()} REPLICA IDENTITY FULL"
        yield failed(
            f'the application can\'t update {name}, which is in the publication "{found.name}" {why}',
            "cdc-worker setup" if ours else full,
        )


_INACTIVE: Final = """
SELECT to_char(coalesce((to_jsonb(s) ->> 'inactive_since')::timestamptz,
                        (SELECT max(ended_at) FROM cdc_worker.process WHERE worker = %s)), 'YYYY-MM-DD HH24:MI:SS TZ')
FROM pg_replication_slots s WHERE slot_name = %s
"""


@_on_slot
def reader(look: Look, found: Slot) -> Iterator[Finding]:
    """Whether a worker reads the slot, and nobody else."""
    if found.active_pid is None:
        try:
            (since,) = fetch_one(look.connection, _INACTIVE, look.settings.worker, found.name)
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            since = None
        yield warning(
            f'nobody reads the slot "{found.name}"{f" since {since}" if since else ""}: the server keeps WAL for it',
            "cdc-worker run",
        )
    elif not found.held_by_worker:
        raise slots.taken(found)
    else:
        yield ok(found.reader)


def _held_up(look: Look) -> Finding | None:
    """That a lock holds up the worker's writing, or would, and whose it is."""
    tables = [sql.Identifier(*qualified(look.profile.target.table)).as_string(), *checkpoints.WRITTEN]
    blockers = postgres.blockers(look.connection, look.settings.worker, tables)
    if not blockers:
        return None
    ends = "; ".join(blocker.end for blocker in blockers)
    return failed(f"a lock holds up its writing, of {', '.join(map(str, blockers))}", f"as a superuser: {ends}")


def writing(look: Look) -> Iterator[Finding]:
    """Whether a lock keeps the worker from writing."""
    yield _held_up(look) or ok("no lock holds it up")


@_on_slot
def retained(look: Look, found: Slot) -> Iterator[Finding]:
    """Whether the server keeps more WAL for the slot than it should."""
    alarm = look.settings.retained_alarm_bytes
    said = f"the server keeps {found.retained:,} bytes of WAL for the slot ({found.wal_status})"
    if found.wal_status == "unreserved":
        said += ", and will discard it at its next checkpoint"
    elif found.retained <= alarm:
        yield ok(said)
        return
    else:
        said += f", more than the {alarm:,} of CDC_WORKER_RETAINED_ALARM_BYTES"
    held_up = _held_up(look)
    if found.active_pid is None:
        yield failed(f"{said}: nobody reads it", "cdc-worker run")
    elif not found.held_by_worker:
        yield failed(f"{said}: {found.reader} reads it", slots.taken(found).hint or "")
    elif held_up is not None:
        yield failed(f"{said}: {held_up.message}", held_up.fix or "")
    else:
        yield failed(
            f"{said}: the worker is catching up, or a transaction is open so long (see open_transactions)",
            "cdc-worker status --watch",
        )


@_on_slot
def spare_slot(look: Look, found: Slot) -> Iterator[Finding]:
    """Whether a switch of the plugin has left another slot, for which the server keeps WAL as well."""
    try:
        left = slots.spare(look.connection, look.settings.worker)
    except errors.NotSetUpError:
        yield unknown("there is no checkpoint that would name it (see checkpoint)")
        return
    if left is None:
        yield ok("no switch of the plugin has left a slot")
    else:
        yield warning(
            f'the slot "{left.name}" is left of a switch of the plugin that was interrupted, or goes on:'
            f" the server keeps {left.retained:,} bytes of WAL for it",
            f"cdc-worker switch-plugin --to {found.plugin}",
        )


_DEAD_LETTERS: Final = """
SELECT count(*), max(reason) FILTER (WHERE dead_letter_id = last)
FROM (SELECT dead_letter_id, reason, max(dead_letter_id) OVER () AS last
      FROM cdc_worker.dead_letter WHERE worker = %s AND discarded_at IS NULL) letter
"""


def dead_letters(look: Look) -> Iterator[Finding]:
    """Whether changes could not become activities."""
    try:
        count, reason = fetch_one(look.connection, _DEAD_LETTERS, look.settings.worker)
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        yield unknown("there is no table of them (see checkpoint)")
        return
    except psycopg.errors.UndefinedColumn:
        yield unknown("their table is that of an older version: run: cdc-worker setup")
        return
    if count:
        yield failed(
            f"{count:,} changes could not become activities, the last because {reason}",
            "see them: cdc-worker dead-letters list; when the cause is mended, as the owner:"
            " cdc-worker dead-letters retry --all; to leave it at that: cdc-worker dead-letters discard --all --yes",
        )
    else:
        yield ok("none wait to be seen to")


CHECKS: Final[tuple[Check, ...]] = (checkpoint, publication, reader, writing, retained, spare_slot, dead_letters)
