"""Switching the plugin of a slot: nothing is lost, nothing comes twice, and a worker that runs goes on by itself.

A slot keeps plugin and name for life. So it is copied with the other plugin, at the same position; in one transaction,
between two commits of the stream, the checkpoint says that the copy is the worker's; and the slot from before is
dropped. The checkpoint names a slot beside it that is ours to drop, the copy until it is taken and the other one after:
so whatever is interrupted can be done again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import (
    checkpoint,
    ddl,
    decoders,
    errors,
    failpoints,
    fence,
    pgoutput,
    postgres,
    publication,
    replication,
    slot,
)
from cdc_worker.config import Settings
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Connection, Server, fetch_one
from cdc_worker.profile import Profile
from cdc_worker.rules import Rules
from cdc_worker.slot import Slot
from cdc_worker.transform import PREFIXES

PATIENCE: Final = 60.0
"""So many seconds a worker may take to come beyond what the publication doesn't have."""

ABSENCE: Final = 5.0
"""A worker that is away for so many seconds is not waited for any longer."""

FAREWELL: Final = 5.0
"""So many seconds a worker may take to let go of its slot by itself."""

PAUSE: Final = 0.05
"""Seconds between two looks."""


def switch_plugin(
    settings: Settings, profile: Profile, plugin: str | None = None, *, dry_run: bool = False
) -> Iterator[str]:
    """Switch to this plugin, or to the one that the settings name, or else to the other one.

    Yields a line for each thing done, or that would be. Raises what `run` would be stopped by, and what keeps the
    plugin from reading on where the other one is.
    """
    worker, rules = settings.worker, settings.rules(profile)
    with ddl.connected(settings) as connection:
        server = postgres.server(connection)
        if not server.may_replicate:
            right = postgres.replication_right(connection, server.role)
            raise errors.ServerError(
                f'role "{server.role}" lacks {right.name}: it may not copy a slot',
                hint=f"name the worker's role in CDC_WORKER_DSN, or {right.hint}",
            )
        if not dry_run:
            ddl.one_at_a_time(connection)
            yield from _tidy(connection, worker)
        _, old = slot.check_checkpoint(connection, worker, settings.slot)
        plugin = plugin or _wanted(settings, old)
        _check_settings(settings, plugin)
        if plugin == old.plugin:
            yield f'nothing to do: slot "{old.name}" is of {plugin}'
            return
        if old.active_pid is not None and not old.held_by_worker:
            raise slot.taken(old)
        switch = _Switch(connection, settings, rules, server, old, plugin)
        if plugin == pgoutput.PLUGIN:
            publication.check(connection, settings.publication_name, rules)
            switch.wait_until_published(wait=not dry_run)
        yield from switch.look() if dry_run else switch.go()


def _wanted(settings: Settings, old: Slot) -> str:
    if settings.plugin != "auto":
        return settings.plugin
    return next(plugin for plugin in decoders.PLUGINS if plugin != old.plugin)


def _check_settings(settings: Settings, plugin: str) -> None:
    if settings.plugin not in ("auto", plugin):
        raise errors.SettingsError(
            f'the settings name the plugin "{settings.plugin}": with {plugin} the worker would refuse its slot',
            hint=f'leave out CDC_WORKER_PLUGIN, or name "{plugin}" there, for the worker as well; then the same again',
        )


_NOTE: Final = "UPDATE cdc_worker.checkpoint SET spare_slot = %s WHERE worker = %s"


def _tidy(connection: Connection, worker: str) -> Iterator[str]:
    """Drop what is left, and what an interrupted switch has left."""
    found = slot.spare(connection, worker)
    if found is not None:
        slot.give_up(connection, found.name, worker)
        failpoints.reach("spare_dropped")
        yield f'slot "{found.name}" is dropped'
    with checkpoint.as_set_up():
        connection.execute(_NOTE, (None, worker))


# A publication is read as it was at each change: what was written before its rows were is not in it. Transactions
# before the catalog_xmin are in the past for whatever the slot has still to read, also for what was open for long.
_PUBLISHED: Final = """
SELECT coalesce(bool_and(age(written) > age(catalog_xmin) OR age(written) < 0), true)
FROM pg_replication_slots, (
    SELECT xmin FROM pg_publication WHERE pubname = %s
    UNION ALL
    SELECT r.xmin FROM pg_publication_rel r JOIN pg_publication p ON p.oid = prpubid WHERE pubname = %s
) AS rows (written)
WHERE slot_name = %s
"""


def published(connection: Connection, name: str, publication: str) -> bool:
    """Whether all that a slot has still to read was written after the publication had come to be as it is."""
    (known,) = fetch_one(connection, _PUBLISHED, publication, publication, name)
    return bool(known)


_DROP: Final = "SELECT pg_drop_replication_slot(%s)"

_COPY: Final = "SELECT lsn FROM pg_copy_logical_replication_slot(%s, %s, %s, %s)"

_LOCKED: Final = """
SELECT lsn, commit_lsn FROM cdc_worker.checkpoint WHERE worker = %s AND slot = %s FOR UPDATE
"""

_TAKE: Final = """
UPDATE cdc_worker.checkpoint
SET slot = %(new)s, plugin = %(plugin)s, spare_slot = %(old)s, nonce = gen_random_uuid(),
    commit_lsn = '0/0', changes = 0
WHERE worker = %(worker)s
"""


def _mend(error: errors.CdcWorkerError) -> str:
    """How a plugin can be had that can't; not that there is another."""
    return (error.hint or "").partition("; or")[2].lstrip(", ")


@dataclass(frozen=True, slots=True)
class _Switch:
    """From the slot `old` to a copy of it with this plugin."""

    connection: Connection
    settings: Settings
    rules: Rules
    server: Server
    old: Slot
    plugin: str

    @property
    def new(self) -> str:
        """The copy's name."""
        names = slot.names(self.settings.slot)
        named = dict(zip(decoders.PLUGINS, names[1:], strict=True))
        return next(name for name in (named[self.plugin], *names) if name != self.old.name)

    def wait_until_published(self, *, wait: bool) -> None:
        """Have the worker come to where all that the slot has still to read is published. Raises PublicationError."""
        connection, name = self.connection, self.old.name
        deadline = time.monotonic() + PATIENCE
        while not published(connection, name, self.settings.publication_name):
            found = slot.read(connection, name)
            running = found is not None and found.active_pid is not None
            if not (wait and running) or time.monotonic() > deadline:
                raise self._unpublished(running=running)
            # To begin a slot, the server writes down which transactions are open: so it is known what is in the past.
            with suppress(psycopg.errors.QueryCanceled, psycopg.errors.ConfigurationLimitExceeded):
                self._peek(None, self.plugin)
            fence.mark(connection)
            until = time.monotonic() + 1
            here = slot.committed_so_far(connection)
            while time.monotonic() < until and not self._confirmed(here):
                time.sleep(PAUSE)

    def _confirmed(self, position: LSN) -> bool:
        found = slot.read(self.connection, self.old.name)
        return found is None or found.confirmed_flush_lsn >= position

    def _unpublished(self, *, running: bool) -> errors.PublicationError:
        said = (
            f'slot "{self.old.name}" has still to read what was written before the publication '
            f'"{self.settings.publication_name}" was as it is: pgoutput would leave out changes'
        )
        refusal = self._refusal()
        again = "cdc-worker run, and beside it the same again"
        if refusal is not None:
            again = f"{_mend(refusal)}; then: {again}"
        elif running:
            held_by = slot.holders(self.connection, 0) or "none by now"
            again = f"the same again, once the transactions have ended that are open ({held_by})"
        else:
            again = f"run: {again}"
        return errors.PublicationError(said, hint=again)

    def _refusal(self) -> errors.CdcWorkerError | None:
        """Why the old plugin can't read any more, if so."""
        try:
            self._peek(self.old.name, self.old.plugin)
        except psycopg.errors.ObjectInUse:
            return None
        except psycopg.Error as error:
            found = slot.plugin_error(error, self.server, self.old.plugin)
            if isinstance(found, slot.RoleRefusedError):
                raise found from error
            if isinstance(found, errors.CdcWorkerError):
                return found
            raise
        return None

    def _peek(self, name: str | None, plugin: str) -> None:
        """Let a plugin begin to read a slot as the worker does; see slot.peek."""
        publication = self.settings.publication_name
        options, optional = decoders.options(plugin, self.rules, PREFIXES, publication=publication)
        replication.offer(options, optional, lambda accepted: slot.peek(self.connection, name, accepted, plugin=plugin))

    def look(self) -> Iterator[str]:
        """Try it, without a trace."""
        self._check_name()
        temporary = f"cdc_worker_{self.connection.info.backend_pid}"
        self._copy(temporary, temporary=True)
        self.connection.execute(_DROP, (temporary,))
        yield f'slot "{self.old.name}" would be copied to "{self.new}" with {self.plugin}'
        yield f'worker "{self.settings.worker}" would go on with that, and slot "{self.old.name}" would be dropped'

    def go(self) -> Iterator[str]:
        """Do it."""
        connection, worker, old, new = self.connection, self.settings.worker, self.old.name, self.new
        self._check_name()
        connection.execute(_NOTE, (new, worker))
        failpoints.reach("copy_noted")
        try:
            position = self._copy(new, temporary=False)
            failpoints.reach("slot_copied")
            yield f'slot "{old}" is copied to "{new}" with {self.plugin} at {position}'
            yield from self._take()
        except BaseException:
            with suppress(psycopg.Error, errors.CdcWorkerError):
                for _ in _tidy(connection, worker):
                    pass
            raise
        failpoints.reach("checkpoint_moved")
        self._farewell()
        yield from _tidy(connection, worker)

    def _check_name(self) -> None:
        """Raise unless the copy's name is free."""
        found = slot.read(self.connection, self.new)
        if found is not None:
            raise errors.SlotMismatchError(
                f'slot "{self.new}" is there, and is not known to be this worker\'s',
                hint="see whose it is; if nobody needs it: "
                + sql.SQL("SELECT pg_drop_replication_slot({})").format(self.new).as_string(),
            )

    def _copy(self, name: str, *, temporary: bool) -> LSN:
        """Copy the slot, and see that the worker can read it; returns where it is."""
        connection, settings, plugin = self.connection, self.settings, self.plugin
        try:
            (position,) = fetch_one(connection, _COPY, self.old.name, name, temporary, plugin)
            self._peek(name, plugin)
        except psycopg.Error as error:
            known = slot.plugin_error(error, self.server, plugin)
            if isinstance(known, errors.PluginMissingError | errors.PluginRefusedError):
                raise type(known)(str(known), hint=_mend(known)) from error
            raise known from error
        if self.old.failover and not temporary:
            dsn = settings.dsn.get_secret_value()
            with closing(postgres.connect_replication(dsn, settings.worker)) as replicating:
                replicating.execute(sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER true)").format(sql.Identifier(name)))
        return LSN.parse(position)

    def _take(self) -> Iterator[str]:
        """Let the worker go on with the copy, as soon as it is between two commits."""
        connection, worker, told = self.connection, self.settings.worker, None
        seen = time.monotonic()
        while (within := self._taken(whole=False)) is not None:
            if told != within:
                told = within
                yield f"waiting: of the commit at {within} a part is written"
            found = slot.read(connection, self.old.name)
            if found is not None and found.active_pid is not None:
                seen = time.monotonic()
            elif time.monotonic() > seen + ABSENCE:
                if self._refusal() is None:
                    raise errors.NotRunningError(
                        f"of the commit at {within} a part is written, and no worker writes the rest",
                        hint="run: cdc-worker run, and beside it the same again",
                    )
                # Nobody can read the rest of it as the beginning was read. Its activities are known by their keys.
                self._taken(whole=True)
                yield f"the commit at {within} is read from its beginning: what is written of it is not written again"
                break
            time.sleep(PAUSE)
        yield f'worker "{worker}" goes on with slot "{self.new}"'

    def _taken(self, *, whole: bool) -> LSN | None:
        """Move the checkpoint to the copy; if it is within a commit, that is returned, unless it is to be read `whole`.

        The worker, if it runs, comes to a marker then, has to write, and so hears of it.
        """
        connection, worker = self.connection, self.settings.worker
        with connection.transaction():
            row = connection.execute(_LOCKED, (worker, self.old.name)).fetchone()
            if row is None:
                raise errors.SlotMismatchError(
                    f'the worker "{worker}" no longer reads the slot "{self.old.name}"', hint="see who has changed that"
                )
            position, commit = map(LSN.parse, row)
            if commit and not whole:
                return commit
            copy = slot.read(connection, self.new)
            slot.check(copy, name=self.new, database=connection.info.dbname, checkpoint=position)
            connection.execute(_TAKE, {"new": self.new, "plugin": self.plugin, "old": self.old.name, "worker": worker})
            connection.execute(publication.note(self.settings.publication_name, worker).encode())
            fence.mark(connection)
        return None

    def _farewell(self) -> None:
        """Let the worker come to the marker: whom it does not reach is ended as the slot is dropped."""
        deadline = time.monotonic() + FAREWELL
        while (found := slot.read(self.connection, self.old.name)) is not None:
            if found.active_pid is None or time.monotonic() > deadline:
                return
            time.sleep(PAUSE)
