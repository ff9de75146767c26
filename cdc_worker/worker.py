"""The worker: one loop over two sockets, and what keeps it going.

    for transactions in the slot's stream:
        batch = transform(transactions)
        sink.write(batch)                  # activities, dead letters and checkpoint: one database transaction
        ack(batch.end)                     # only now may the server forget

While a batch goes to the database, the next changes are read. Everything is in one thread: order is the product.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

import psycopg
from psycopg import sql
from psycopg.waiting import Ready, Wait
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_when_event_set, wait_random_exponential

from cdc_worker import (
    catalog,
    checkpoint,
    decoders,
    errors,
    pgoutput,
    postgres,
    process,
    publication,
    recorder,
    recover,
    setup,
    slot,
    wal2json,
)
from cdc_worker.activities import Activity, Batch, Line, Person, Position, Prepared, Scope
from cdc_worker.changes import MARKER_PREFIX, Assembler, BeginToldError, Change, Transaction
from cdc_worker.checkpoint import Checkpoint
from cdc_worker.config import Settings
from cdc_worker.decoders import Decoder
from cdc_worker.log import Logger
from cdc_worker.lookups import Found, Lookups
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.partitions import Partitions
from cdc_worker.process import Process
from cdc_worker.profile import Profile
from cdc_worker.profile import load as load_profile
from cdc_worker.protocol import PrimaryKeepalive
from cdc_worker.recorder import Recorder
from cdc_worker.recover import Skips
from cdc_worker.replication import Replication
from cdc_worker.rules import Rules
from cdc_worker.sink import Sink, Writing, Written
from cdc_worker.transform import PREFIXES, Outcome, Transformer
from cdc_worker.watch import INTERVAL as WATCH_INTERVAL
from cdc_worker.watch import MOVED, Watch

GRACE: Final = 0.8
"""So long a batch in hand may take to be written after a shutdown was requested; we exit in the rest of a second."""

FAREWELL: Final = 0.6
"""So long a process that ends waits for the server to note it."""

# In seconds, as all that follows.
STATUS_INTERVAL: Final = 10.0
STATUS_INTERVAL_BEHIND: Final = 0.5
PROGRESS_INTERVAL: Final = 10.0
WRITING_INTERVAL: Final = 0.002
WRITING_USUAL: Final = 0.1
"""A batch that takes longer to write is held up, by a lock perhaps: there is no haste to read on."""

SETTLED: Final = 60.0
"""A connection that held for so long has worked, though there was nothing to write."""

SILENCE: Final = 60.0
"""After so long without a byte from the server, which was asked for one, the connection is given up.

Unless the server says that it is at work: begun anew, it would have to do all of it again.
"""

STANDBY_INTERVAL: Final = 0.25
"""Between two looks of a stand-by whether the slot is free."""

TURN: Final = 256
"""So many messages are read before the writing connection gets a look."""


class Stopped(BaseException):
    """A shutdown was requested while we were waiting in a call that can't be selected on."""


class Stop:
    """A request to shut down, by signal: something to look at, to wait for, and to select on.

    A request to read the profile anew comes the same way; it is taken up at the next commit boundary.
    """

    def __init__(self) -> None:
        self.reload_requested = False
        self._set = False
        self._interruptible = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def install(self) -> None:
        """Let SIGTERM and SIGINT request it, and SIGHUP the other."""
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self.reload_requested = True
            return
        self._set = True
        if self._interruptible:
            raise Stopped

    def request(self) -> None:
        """Request it, from another thread."""
        self._set = True
        os.write(self._writer, b"\0")

    def is_set(self) -> bool:
        """Whether it has been requested."""
        return self._set

    def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond a request."""
        select.select([self], [], [], seconds)
        self.clear()

    def fileno(self) -> int:
        """Readable once something has been requested."""
        return self._reader

    def clear(self) -> None:
        """Make it unreadable until the next request."""
        with suppress(BlockingIOError):
            os.read(self._reader, 512)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a request raise Stopped at once: for calls that wait without our select."""
        self._interruptible = True
        try:
            if self._set:
                raise Stopped
            yield
        finally:
            self._interruptible = False


@dataclass(slots=True)
class Totals:
    """What a process has done so far."""

    transactions: int = 0
    activities: Counter[str] = field(default_factory=Counter)
    dead_letters: Counter[str] = field(default_factory=Counter)
    batches: int = 0


class Worker:
    """Records what the slot delivers, until it is stopped; with `once`, until all that is committed now is recorded.

    While another process reads the slot it stands by, unless it is not to `wait`. With `takeover` it does not wait for
    another process of the same worker, and ends its connections.
    """

    def __init__(
        self,
        settings: Settings,
        profile: Profile,
        *,
        stop: Stop,
        log: Logger,
        once: bool = False,
        takeover: bool = False,
        wait: bool = True,
    ) -> None:
        self.totals = Totals()
        self._settings = settings
        self._profile = profile
        self._rules = settings.rules(profile)
        self._stop = stop
        self._log = log
        self._once = once
        self._takeover = takeover
        self._waits = wait
        self._process = Process(settings.worker)
        self._watch = Watch(settings, self._process, log)
        self._slot, self._plugin = settings.slot, wal2json.PLUGIN  # until we have looked
        self._options: list[str] = []
        self._reachable = False
        self._misfits: list[str] = []
        self._alarmed: set[tuple[str, tuple[str, str]]] = set()
        self._partitions: Partitions | None = None
        self._started = False
        self._owner: uuid.UUID | None = None
        self._nonce: uuid.UUID | None = None  # what was in force when the profile was read
        self._until: LSN | None = None
        self._begins: dict[LSN, bytes] = {}  # by the positions of those that can't be read, their commits

    def run(self) -> None:
        """Stream until stopped. What may heal is tried again for ever, anything else is raised."""
        log, stop = self._log, self._stop
        # Every change is a handful of containers without a cycle, and looking for one takes a tenth of the time.
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            wait = state.next_action.sleep if state.next_action else 0
            described = _described(error)
            self._reachable = False
            self._process.failure = " ".join(filter(None, described.values()))
            event = "recording_failed" if isinstance(error, errors.RecordingError) else "connection_lost"
            log.warning(event, **described, attempt=state.attempt_number, retry_in=round(wait, 2))

        attempts = Retrying(
            retry=retry_if_exception(self._may_heal),
            wait=wait_random_exponential(multiplier=0.2, max=30),
            stop=stop_when_event_set(stop),  # type: ignore[arg-type]  # it asks no more than is_set
            sleep=stop.sleep,
            before_sleep=tell,
            reraise=True,
        )
        try:
            if self._settings.recording_directory is not None:
                recorder.check(self._settings.recording_directory)
            again = True
            while again:
                for attempt in attempts:
                    with attempt, ExitStack() as stack:
                        since, began = self.totals.batches, time.monotonic()
                        try:
                            again = self._run(stack)
                        finally:
                            if self.totals.batches > since or time.monotonic() > began + SETTLED:
                                attempt.retry_state.attempt_number = 1  # it worked: begin anew with short waits
        except Stopped:
            self._end(0)
        except errors.CdcWorkerError as error:
            self._fail(error)
            raise
        except psycopg.Error as error:
            if not stop.is_set():
                failure = postgres.failure(error)
                self._fail(failure)
                raise failure from error
        else:
            self._end(0)
        log.info("worker_stopped", **_summary(self.totals))

    def _fail(self, error: errors.CdcWorkerError) -> None:
        """See to what an error leaves behind."""
        if isinstance(error, errors.SlotGivenUpError):
            try:
                with closing(self._connect()) as connection:
                    self._check_owner(checkpoint.read(connection, self._settings.worker))
                    slot.give_up(connection, self._slot, self._settings.worker)
            except (psycopg.Error, errors.CdcWorkerError) as problem:
                self._log.error("slot_not_dropped", **_described(problem))
        self._process.failure = str(error)
        self._end(error.exit_code)
        self._log.error("worker_failed", error=type(error).__name__, exit_code=error.exit_code, **_summary(self.totals))

    def _end(self, exit_code: int) -> None:
        """Leave word of how it ended, if there is anybody to leave it with."""

        def leave_word() -> None:
            dsn, worker = self._settings.dsn.get_secret_value(), self._settings.worker
            told = suppress(psycopg.Error, errors.CdcWorkerError)
            with told, closing(postgres.connect_briefly(dsn, worker)) as connection:
                process.ended(connection, self._process, exit_code)
                checkpoint.tally(connection, worker)

        if self._reachable:
            # In a thread, for nothing else ends the wait for a server that has stopped to answer.
            thread = threading.Thread(target=leave_word, daemon=True)
            thread.start()
            thread.join(FAREWELL)

    def _run(self, stack: ExitStack) -> bool:
        """Stream, until told to stop or to begin anew; returns whether it is the latter."""
        try:
            self._open(stack).run()
        except BeginToldError as found_out:
            self._begins[found_out.position] = found_out.commit
            return not self._stop.is_set()
        except errors.FencedError:
            with self._stop.interrupting(), closing(self._connect()) as connection:
                found = checkpoint.read(connection, self._settings.worker)
            if found.owner != self._owner:
                raise
            self._log.info("scope_changed")  # a cut-over, an erasure or a new table
            self._nonce = found.nonce
            self._stop.reload_requested = True
            if found.position.commit_lsn:
                return True  # the changes of this commit were counted with the profile that we have
        if not self._stop.reload_requested or self._stop.is_set():
            return False
        with self._stop.interrupting():
            self._reload()
        return True

    def _reload(self) -> None:
        """Read the profile anew; one that is wrong, or doesn't fit the database, changes nothing."""
        self._stop.reload_requested = False  # first: whoever requests it meanwhile has changed the profile again
        try:
            found = load_profile(self._settings.profile)
            rules = self._settings.rules(found)
            with closing(self._connect()) as connection:
                catalog.check(connection, found, rules, plugin=self._plugin)
                self._check_published(connection, rules)
                setup.check_grants(connection, found, rules, postgres.server(connection).role)
        except (
            errors.ProfileError,
            errors.CatalogMismatchError,
            errors.PublicationError,
            errors.TargetUnusableError,
        ) as error:
            self._log.error("profile_refused", reason=str(error))
        except psycopg.errors.InsufficientPrivilege as error:
            self._log.error("profile_refused", reason=str(postgres.failure(error)))
        except (errors.CdcWorkerError, psycopg.Error):
            self._stop.reload_requested = True  # the server couldn't be asked
            raise
        else:
            self._profile, self._rules = found, rules
            self._log.info("profile_reloaded", profile=found.name, tables=sorted(map(".".join, rules)))

    def _connect(self) -> postgres.Connection:
        return postgres.connect(self._settings.dsn.get_secret_value(), self._settings.worker)

    def _connect_briefly(self) -> postgres.Connection:
        with self._stop.interrupting():
            return postgres.connect_briefly(self._settings.dsn.get_secret_value(), self._settings.worker)

    def _may_heal(self, error: BaseException) -> bool:
        if self._once:
            return False
        if isinstance(error, psycopg.Error):
            return postgres.is_transient(error.sqlstate)
        if isinstance(error, errors.RecordingError):
            return True  # it was in order at the start: a disk is full, or gone
        # Once it has run with these credentials, a refusal is somebody's work in progress.
        return self._started and isinstance(error, errors.AuthenticationError | errors.DatabaseMissingError)

    def _open(self, stack: ExitStack) -> _Stream:
        """Connect, make sure that all is as the checkpoint says, start the stream and become the owner."""
        settings, log = self._settings, self._log
        worker = settings.worker
        with self._stop.interrupting():
            connection = self._connect()
            stack.callback(connection.close)
            self._reachable = False
            server, found, table = self._examine(connection)
            if self._until is None and self._once:
                self._until = slot.committed_so_far(connection)
            while (stood_by := self._stand_by(connection)) or (
                stream := self._read(stack, connection, found, server)
            ) is None:
                if stood_by:
                    self._catch_up(connection)
                server, found, table = self._examine(connection)  # it may be another now
            replication, partitions, timeout = stream
            # A table without rules tells of others: it counts, and it isn't recorded.
            tables = [f"{'.'.join(of)}{'' if any(t.rules.values()) else ' (facts)'}" for of, t in self._rules.items()]
            try:
                found = checkpoint.take_over(
                    connection, worker, sorted(tables), owner=self._process.process, reader=replication.pid
                )
            except psycopg.OperationalError:
                replication.check()  # the server may have let go of the slot, since it can't read it
                raise
            self._owner = self._watch.owner = found.owner
            if found.nonce != self._nonce:
                raise checkpoint.fenced(worker)  # a table that came with it would be passed over with our profile
            position = found.position
            scope = self._scope(checkpoint.scope(connection, found))
            # While we waited for the slot it may have become another one.
            _, replica = slot.check_checkpoint(connection, worker, settings.slot)
            self._watch.retained(replica, found)
            time_zone = settings.zone(self._profile, server.time_zone)
            tables_asked = None if partitions else frozenset(self._rules)
            decoder = decoders.decoder(self._plugin, tables_asked, PREFIXES, encoding=replication.encoding)
            sink = Sink(
                connection,
                self._profile.target,
                table=table,
                time_zone=time_zone,
                progress=found,
                decode=wal2json.decode,  # what a payload is of that is kept: others are kept as changes
            )
            recording = None
            if settings.recording_directory is not None:
                recording = Recorder(
                    settings.recording_directory,
                    self._rules,
                    settings=settings,
                    system_identifier=found.system_identifier,
                    database=connection.info.dbname,
                    start=position.lsn,
                    log=log,
                )
                stack.callback(recording.close)
            skips = Skips(
                recover.allowed(connection, found),
                self._rules,
                partitions.root_of if partitions else None,
                self._begins,
                decoder,
                raw=not settings.recording_masked,
                log=log,
            )
            lookups = None
            if any(table.looked_up for table in self._rules.values()):
                reading = postgres.connect_reading(settings.dsn.get_secret_value(), worker)
                stack.callback(reading.close)
                lookups = Lookups(reading, self._rules, on_failure=self._warn_of_lookup)
                stack.callback(lookups.cancel)
        self._started = True
        log.info(
            "replication_started",
            lsn=str(position.lsn),
            plugin=self._plugin,
            options=self._options,
            time_zone=time_zone,
        )
        transformer = Transformer(
            self._rules,
            worker=worker,
            system_identifier=found.system_identifier,
            scope=scope,
            policy=settings.policy(self._profile),
            resumed=position,
            keep=recording is not None,
        )
        return _Stream(
            replication,
            sink,
            transformer,
            lookups,
            recording,
            decoder=decoder,
            skips=skips,
            settings=settings,
            totals=self.totals,
            stop=self._stop,
            log=log,
            watch=self._watch,
            look=self._look,
            partitions=partitions,
            on_unknown=self._warn_of_unknown,
            on_missing=self._warn_of_missing,
            status_interval=min(STATUS_INTERVAL, timeout / 4) if timeout else STATUS_INTERVAL,
            until=self._until,
        )

    def _examine(self, connection: postgres.Connection) -> tuple[postgres.Server, Checkpoint, catalog.TargetTable]:
        """Make sure that server, checkpoint, slot and tables are as they should be. Raises what `run` ends with."""
        settings = self._settings
        server = postgres.server(connection)
        postgres.check_server(server, settings.worker)
        if not self._reachable:
            try:
                checkpoint.read(connection, settings.worker)  # where there is none, there is nobody to tell
                process.register(connection, self._process)
                checkpoint.tally(connection, settings.worker)
            except psycopg.errors.InsufficientPrivilege:
                setup.check_grants(connection, self._profile, self._rules, server.role)
                raise
            self._reachable = True
        found, replica = slot.check_checkpoint(connection, settings.worker, settings.slot)
        self._slot, self._plugin = replica.name, replica.plugin
        slot.check_plugin(replica, settings.plugin)
        self._check_owner(found)
        self._nonce = self._nonce or found.nonce
        # A column that an application renames while we run must not end what is recorded of all the others.
        tell = self._warn_of_misfits if self._started else None
        table = catalog.check(connection, self._profile, self._rules, plugin=self._plugin, tell=tell)
        self._check_published(connection, self._rules)
        setup.check_grants(connection, self._profile, self._rules, server.role)
        return server, found, table

    def _check_published(self, connection: postgres.Connection, rules: Rules) -> None:
        """Raise PublicationError if the server leaves out changes of captured tables."""
        if self._plugin == pgoutput.PLUGIN:
            noted = publication.noted(connection, self._settings.worker)
            publication.check(connection, self._settings.publication_name, rules, noted=noted)

    def _look(self, connection: postgres.Connection) -> None:
        """See whether what is to be recorded is still all asked for."""
        if self._partitions is not None:
            self._partitions.look(connection)
        try:
            self._check_published(connection, self._rules)
        except errors.PublicationError as error:
            # What setup no longer publishes may be gone from a profile that we have not read yet.
            try:
                rules = self._settings.rules(load_profile(self._settings.profile))
            except errors.CdcWorkerError:
                raise error from None
            self._check_published(connection, rules)
            self._stop.reload_requested = True

    def _read(
        self, stack: ExitStack, connection: postgres.Connection, found: Checkpoint, server: postgres.Server
    ) -> tuple[Replication, Partitions, float] | None:
        """Read the slot; returns with it whose partitions are, and the server's wal_sender_timeout.

        None if another process was faster, or has switched to another slot.
        """
        settings = self._settings
        sender = postgres.connect_replication(settings.dsn.get_secret_value(), settings.worker)
        replication = stack.enter_context(Replication(sender, on_dropped=self._warn_of_dropped))
        checkpoint.check_cluster(found, replication.system_identifier())
        timeout = replication.wal_sender_timeout()
        partitions = self._partitions = Partitions(
            connection,
            self._rules,
            settings.worker,
            connect=self._connect_briefly,
            log=self._log,
            on_lost=self._warn_of_lost,
        )
        stack.callback(partitions.close)
        options, optional = decoders.options(
            self._plugin, self._rules, PREFIXES, publication=settings.publication_name, without=partitions.others
        )
        try:
            refused = replication.start(
                self._slot,
                found.position.lsn,
                options,
                encoding=server.encoding,
                optional=optional,
                text=self._plugin != pgoutput.PLUGIN,
            )
        except psycopg.errors.ObjectInUse:
            replication.close()
            return None
        except psycopg.Error as error:
            if slot.own(connection, settings.worker, settings.slot) != self._slot:
                replication.close()
                return None
            raise slot.plugin_error(error, server, self._plugin) from error
        self._options = sorted(options.keys() - {*refused})
        return replication, partitions, timeout

    def _catch_up(self, connection: postgres.Connection) -> None:
        """Read the profile as it is by now, as the process that was active may have done."""
        if checkpoint.read(connection, self._settings.worker).position.commit_lsn:
            self._stop.reload_requested = True  # after that commit, which was counted with the profile as it was
        else:
            self._nonce = None
            self._reload()

    def _stand_by(self, connection: postgres.Connection) -> bool:
        """Wait until nobody reads the slot; returns whether somebody did. Raises SlotTakenError if it is not to wait.

        By looking, for who waits in the server for a lock holds up its vacuum.
        """
        settings, told, looked_at = self._settings, None, time.monotonic()
        while (found := slot.read(connection, self._slot)) is not None and found.active_pid is not None:
            if self._owner is not None:
                self._check_owner(checkpoint.read(connection, settings.worker))
            if not self._waits or (self._once and not found.held_by_worker):
                raise slot.taken(found)
            if told != found.active_pid:
                told = found.active_pid
                log = self._log.info if found.held_by_worker else self._log.warning
                log("waiting_for_slot", active_pid=told, holder=found.holder, client=found.client)
            if not (self._takeover and not self._started and slot.free(connection, self._slot, settings.worker)):
                time.sleep(STANDBY_INTERVAL)
            if time.monotonic() > looked_at + WATCH_INTERVAL:
                looked_at = time.monotonic()
                self._watch.alarm(found, checkpoint.read(connection, settings.worker))
        return told is not None

    def _check_owner(self, found: Checkpoint) -> None:
        """Raise FencedError if another process has taken over since we wrote."""
        if self._owner is not None and found.owner not in (None, self._owner):
            raise checkpoint.fenced(self._settings.worker)

    def _scope(self, known: Scope) -> Scope:
        """What is `known` to be left out, and whole tables that setup has not seen. Warns of what is to be done."""
        captured = {table.name for table in self._rules.values() if any(table.rules.values())}
        ends = known.open_ends(captured)
        for event, tables, mend in (
            ("table_not_set_up", ends.fresh, "cdc-worker setup"),
            ("cutover_pending", ends.waiting, "cdc-worker cutover"),
            ("cutover_pending", ends.marked, "once no old code runs any more: cdc-worker cutover"),
            ("table_not_in_profile", ends.others, "the profile, then SIGHUP"),
        ):
            if tables:
                self._log.warning(event, tables=sorted(map(".".join, tables)), mend=mend)
        left_out = {table: [(INVALID, None)] for table in ends.fresh}
        return Scope({**known.excluded, **left_out}, known.erased, known.marked)

    def _warn_of_misfits(self, faults: list[str]) -> None:
        """Warn that captured tables are no longer as the profile has them, once of each set of faults."""
        if faults and faults != self._misfits:
            self._log.warning("profile_misfits", faults=faults, mend="the profile, then SIGHUP")
        self._misfits = faults

    def _alarm(self, event: str, table: tuple[str, str]) -> bool:
        """Whether this alarm is the first of its kind for a table: one of each row would be too many."""
        new = (event, table) not in self._alarmed
        self._alarmed.add((event, table))
        return new

    def _warn_of_dropped(self, operation: str, schema: str, table: str) -> None:
        """Raise an alarm: the server warns of each row of a table without a replica identity, whosever it is."""
        with suppress(psycopg.Error, errors.CdcWorkerError):  # if it can't be asked whose it is, it may be ours
            if (
                self._partitions
                and self._partitions.root_of(Change("delete", schema, table, None, None), INVALID) is None
            ):
                return
        if self._alarm("change_dropped_by_plugin", (schema, table)):
            name, mend = _full(schema, table)
            self._process.failure = f"the plugin dropped {operation}s of {name}, which are lost; to mend it: {mend}"
            self._log.error("change_dropped_by_plugin", operation=operation, table=name, mend=mend)

    def _warn_of_unknown(self, change: Change) -> None:
        """Raise an alarm: updates of a table come without their old rows."""
        table = change.partition or (change.schema, change.table)
        if change.operation == "update" and self._alarm("old_values_unknown", table):
            name, mend = _full(*table)
            self._process.failure = (
                f"updates of {name} came without old rows: they are dead letters; to mend it: {mend}"
            )
            self._log.warning("old_values_unknown", table=name, mend=mend)

    def _warn_of_missing(self, schema: str, table: str, column: str) -> None:
        """Raise an alarm: a column that metadata is drawn from is gone, and the rest is recorded without it."""
        if self._alarm(f"column_missing {column}", (schema, table)):
            name = sql.Identifier(schema, table).as_string()
            self._process.failure = f"changes of {name} don't carry the column {column}: metadata lacks it"
            self._log.warning("column_missing", table=name, column=column, mend="the profile, then SIGHUP")

    def _warn_of_lookup(self, table: tuple[str, str], sqlstate: str) -> None:
        """Raise an alarm: a table can't be looked into as the profile has it, and its rows are taken as missing."""
        if self._alarm("lookup_failed", table):
            name = sql.Identifier(*table).as_string()
            self._process.failure = f"rows of {name} can't be looked up (SQLSTATE {sqlstate})"
            self._log.error("lookup_failed", table=name, sqlstate=sqlstate, mend="the profile, then SIGHUP")

    def _warn_of_lost(self, partition: tuple[str, str], root: tuple[str, str]) -> None:
        """Raise an alarm: a table that nobody has seen is gone, and looked like a part of one that is captured."""
        if self._alarm("partition_unknown", partition):
            part, table = (sql.Identifier(*name).as_string() for name in (partition, root))
            self._process.failure = f"{part} is gone: if it was a partition of {table}, changes of it are lost"
            self._log.error("partition_unknown", partition=part, table=table)


@contextmanager
def beside(settings: Settings, profile: Profile, log: Logger) -> Iterator[None]:
    """Let a worker run in this process for as long as the block does; it stands by if another one runs.

    What ends it before is raised at the end of the block, in place of what went wrong for want of it.
    """
    stop = Stop()
    failures: list[errors.CdcWorkerError] = []
    worker = Worker(settings, profile, stop=stop, log=log)

    def work() -> None:
        try:
            worker.run()
        except errors.CdcWorkerError as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="worker")
    thread.start()
    try:
        with closing(postgres.connect(settings.dsn.get_secret_value(), settings.worker)) as connection:
            while thread.is_alive() and not _is_read(connection, settings):
                time.sleep(STANDBY_INTERVAL / 10)
        yield
    except errors.NotRunningError:
        if not failures:
            raise
    finally:
        stop.request()
        thread.join()
    if failures:
        raise failures[0]


def _is_read(connection: postgres.Connection, settings: Settings) -> bool:
    found = slot.read(connection, slot.own(connection, settings.worker, settings.slot))
    return found is not None and found.active_pid is not None


class _Stream:
    """One connection's worth of the loop. `run` returns when it is told to stop, and raises when it can't go on."""

    def __init__(
        self,
        replication: Replication,
        sink: Sink,
        transformer: Transformer,
        lookups: Lookups | None,
        recording: Recorder | None,
        *,
        decoder: Decoder,
        skips: Skips,
        settings: Settings,
        totals: Totals,
        stop: Stop,
        log: Logger,
        watch: Watch,
        look: Callable[[postgres.Connection], None],
        partitions: Partitions,
        on_unknown: Callable[[Change], None],
        on_missing: Callable[[str, str, str], None],
        status_interval: float,
        until: LSN | None,
    ) -> None:
        self._replication = replication
        self._decoder = decoder
        self._sink = sink
        self._transformer = transformer
        self._lookups = lookups
        self._recorder = recording
        self._skips = skips
        self._unrecorded: Transaction | None = None  # a slice for which rows are still looked up
        self._held_back: tuple[list[Prepared], list[Person]] = [], []  # what has come of it
        self._fetching: Writing[Found] | None = None
        self._fetch_wants = Wait.R
        self._settings = settings
        self._totals = totals
        self._stop = stop
        self._log = log
        self._watch = watch
        self._status_interval = status_interval
        self._until = until
        self._resumed = sink.position
        self._on_unknown = on_unknown
        self._on_missing = on_missing
        self._look = look
        self._partitions = partitions
        self._assembler = Assembler(
            sink.position.lsn,
            root_of=partitions.root_of if partitions else None,
            stored_in=partitions.stored_in if partitions else None,
            keys=partitions.keys,
            keep=recording is not None,
            line=decoder.line,
            by_itself=decoder.by_itself,
        )
        self._batch = Batch(sink.position)
        self._unfinished: Transaction | None = None
        self._untrusted = False  # it was said that messages are not to be trusted: once is enough
        self._marked = False  # a cut-over may have changed what is ours: to write is to find out
        self._writing: Writing[Written] | None = None
        self._written: Batch = self._batch
        self._wants = Wait.R
        self._wal_end = self._told = sink.position.lsn
        now = time.monotonic()
        self._heard_at = self._status_at = self._advanced_at = self._began_at = self._asked_at = now
        self._looked_at = now - WATCH_INTERVAL
        self._looked_until, self._looked_after = sink.position.lsn, totals.batches
        self._progress_at = now
        self._progress_from = totals.activities.total()

    def run(self) -> None:
        """Read, transform, write, confirm."""
        stopping_until = float("inf")
        while True:
            drained = self._receive() if not self._batch.full else self._writing is not None
            now = time.monotonic()
            if self._writing is None and (drained or self._batch.full):
                self._begin(now)
            if self._writing is None:
                if self._stop.is_set() or self._complete or (self._reloading and self._idle):
                    break
            elif now > stopping_until:
                self._log.info("batch_rolled_back", activities=sum(type(o) is Line for o in self._written.outcomes))
                self._sink.cancel()
                break
            if self._stop.is_set() and stopping_until == float("inf"):
                stopping_until = now + GRACE
                self._log.info("shutdown_requested")
            self._tick(now)
            self._wait(min(self._next_tick(now), stopping_until) - now if drained else 0)
        self._send_status()
        self._replication.flush(0.1)

    @property
    def _received(self) -> LSN:
        """Up to where everything has been read, so that no commit before it can come any more."""
        return self._assembler.received if self._assembler.open else max(self._assembler.received, self._wal_end)

    @property
    def _idle(self) -> bool:
        """Whether nothing is open, unwritten or being written."""
        return not (self._assembler.open or self._unfinished or self._owed or self._writing)

    @property
    def _owed(self) -> bool:
        """Whether there is something to write, if only that a commit is done of which a part was written."""
        batch = self._batch
        done = bool(self._sink.position.commit_lsn) and not batch.end.commit_lsn
        return not batch.empty or self._marked or done

    @property
    def _reloading(self) -> bool:
        """Whether nothing more is to be read before the profile has been."""
        open_ = self._assembler.open or self._unfinished is not None or self._batch.end.commit_lsn
        return self._stop.reload_requested and not open_

    @property
    def _complete(self) -> bool:
        return self._until is not None and self._idle and self._received >= self._until

    def _receive(self) -> bool:
        """Take up to TURN messages. Returns whether that was all that has arrived."""
        replication, assembler, batch, decoder = self._replication, self._assembler, self._batch, self._decoder
        if self._stop.is_set() or self._reloading:
            return True
        while self._unfinished is not None:
            if batch.full:
                return False
            if self._transformer.wanted and not self._fetched(None):
                return True
            self._take(self._unfinished, self._transformer.rest())
        for _ in range(TURN):
            message = replication.receive()
            if message is None:
                replication.read()
                message = replication.receive()
                if message is None:
                    return True
                self._heard_at = time.monotonic()
            if not isinstance(message, PrimaryKeepalive):
                batch.size += len(message)
                try:
                    decoded = decoder.decode(message)
                    transaction = None if decoded is None else assembler.feed(decoded, message)
                except errors.MessageUnreadableError as error:
                    transaction = self._skips.pass_over(assembler, message, replication.position, error)
                if transaction is not None:
                    self._unrecorded = transaction
                    self._take(transaction, self._transformer.feed(transaction))
                    if batch.full or self._unfinished is not None or self._stop.reload_requested:
                        return False
            else:
                self._wal_end = max(self._wal_end, message.wal_end)
                if message.reply_requested:
                    # Without a flush position: the slot stays, and a server that shuts down need not wait for us.
                    replication.send_status(written=message.wal_end)
        return False

    def _take(self, transaction: Transaction, outcomes: list[Outcome]) -> None:
        transformer = self._transformer
        if transformer.refused:
            self._log.warning("context_refused", asked=sorted(transformer.refused), xid=transaction.xid)
        if transformer.untrusted and not self._untrusted:
            self._untrusted = True
            self._log.warning("context_untrusted", xid=transaction.xid)
        done = transformer.done
        if transaction.commit_lsn == self._resumed.commit_lsn:
            # A part of this commit was written before we came. It is read again for its messages and facts.
            outcomes = [outcome for outcome in outcomes if outcome.index >= self._resumed.changes]
            done = max(done, self._resumed.changes)
        if any(message.prefix == MARKER_PREFIX for _, message in transaction.messages):
            self._marked = True
        lines, given = self._held_back
        lines += [self._line(o, transaction) if isinstance(o, Activity) else o for o in outcomes]
        given += transformer.given
        more = transformer.ready or bool(transformer.wanted)
        # What was looked up is recorded with the whole slice: of what was written before, nobody else would know it.
        if self._recorder is None or not transformer.wanted:
            self._batch.add(lines, transaction, done=done, complete=transaction.last and not more, given=given)
            self._held_back = [], []
        self._unfinished = transaction if more else None
        while transformer.missing:
            self._on_missing(*transformer.missing.pop())
        if self._recorder is not None and self._unrecorded is not None and not transformer.wanted:
            # Whole, also if a part of it was written before we came: the end of the recording then lacks the rest.
            self._recorder.add(self._unrecorded, transformer.answered)
            self._unrecorded = None

    def _fetched(self, ready: Ready | None) -> bool:
        """Go on looking rows up that the transformer wants; returns whether it has been told."""
        transformer = self._transformer
        assert self._lookups is not None
        if self._fetching is None:
            self._fetching = self._lookups.fetch(transformer.wanted, transformer.unseen)
            self._asked_at = time.monotonic()
        elif ready is None:
            return False
        try:
            self._fetch_wants = self._fetching.send(ready)  # type: ignore[arg-type]  # None starts it
        except StopIteration as stop:
            self._fetching = None
            transformer.tell(stop.value, failed=self._lookups.failed)
            return True
        return False

    def _line(self, activity: Activity, transaction: Transaction) -> Line:
        place = activity.index - transaction.index
        if 0 <= place < len(transaction.changes) and transaction.changes[place] is activity.change:
            return self._sink.line(activity, transaction.payloads[place])
        return self._sink.line(activity, activity.change)  # of an earlier slice

    def _begin(self, now: float) -> None:
        """Start to write what has come together, or now and then where an otherwise quiet stream has got to."""
        batch = self._batch
        if self._owed:
            self._marked = False
            self._batch = Batch(batch.end)
        elif (
            self._idle
            and now >= self._advanced_at + self._settings.idle_advance_interval
            and self._received - self._sink.position.lsn > self._settings.idle_advance_bytes
        ):
            batch = Batch(Position(self._received))
            self._batch = Batch(batch.end)
            self._advanced_at = now
        else:
            if batch.full:
                batch.size = 0  # much was read, and none of it meant anything
                if self._recorder is not None:
                    self._recorder.flush()
            return
        if self._recorder is not None:
            # First: whatever the checkpoint has passed is durable in the recording.
            self._recorder.write(batch.end.lsn)
        self._written, self._began_at = batch, now
        self._writing = self._sink.write(batch)
        self._step(None)

    def _step(self, ready: Ready | None) -> None:
        """Go on writing, now that the socket is `ready`."""
        assert self._writing is not None
        try:
            self._wants = self._writing.send(ready)  # type: ignore[arg-type]  # None starts it
        except StopIteration as stop:
            self._writing = None
            self._confirm(stop.value)
        except psycopg.Error:
            if self._sink.position > self._resumed:
                self._totals.batches += 1  # a part of it was written: that is progress
            raise

    def _confirm(self, written: Written) -> None:
        batch, totals = self._written, self._totals
        self._send_status()
        refused = {letter.change_key for letter in written.dead_letters}
        totals.batches += 1
        totals.transactions += batch.transactions
        totals.dead_letters.update(letter.kind for letter in written.dead_letters)
        totals.activities.update(
            outcome.type for outcome in batch.outcomes if type(outcome) is Line and outcome.change_key not in refused
        )
        for letter in written.dead_letters:
            self._log.warning(
                "change_dead_lettered",
                kind=letter.kind,
                table=letter.change.table,
                sqlstate=letter.sqlstate,
                constraint=letter.constraint,
                lsn=str(letter.origin.commit_lsn),
                change_key=letter.change_key,
            )
            if letter.kind == "old_values_unknown":
                self._on_unknown(letter.change)
        self._log.debug(
            "batch_written",
            transactions=batch.transactions,
            activities=written.activities,
            dead_letters=len(refused),
            already_there=written.already_there,
            unlinked=written.unlinked,
            lsn=str(self._sink.position),
            seconds=round(time.monotonic() - self._began_at, 4),
        )

    def _send_status(self, *, reply_requested: bool = False) -> None:
        flushed = self._sink.position.lsn
        self._replication.send_status(
            written=self._received,
            flushed=flushed,
            applied=self._received if self._idle else flushed,
            reply_requested=reply_requested,
        )
        self._told = self._received
        self._status_at = time.monotonic()

    @property
    def _status_due(self) -> float:
        # The position of our own last commit, which comes back empty, need not wait: without it there seems to be lag.
        behind = self._told < self._received
        return self._status_at + (
            min(STATUS_INTERVAL_BEHIND, self._status_interval) if behind else self._status_interval
        )

    def _tick(self, now: float) -> None:
        if now >= self._status_due:
            if self._batch.full or self._unfinished is not None:
                self._heard_at = now  # nothing is read: it isn't the server that is silent
            silent = now - self._heard_at
            if silent > SILENCE and not self._decoding():
                raise psycopg.OperationalError(f"nothing was heard from the server for {silent:.0f} s")
            self._send_status(reply_requested=silent > self._status_interval)
        if self._recorder is not None:
            self._recorder.tend()
        if self._to_look_at and now >= self._looked_at + WATCH_INTERVAL:
            self._looked_until, self._looked_after = self._received, self._totals.batches
            with suppress(Stopped), self._stop.interrupting():
                self._watch.look(held_up=self._held_up, also=self._look)
            self._looked_at = time.monotonic()
            if overlooked := self._partitions.overlooked:
                names = sorted(map(".".join, overlooked))
                self._log.error("partitions_overlooked", partitions=names, lsn=str(self._sink.position))
                raise psycopg.OperationalError(
                    f"{', '.join(names)} became partitions of captured tables, and were not asked for: "
                    f"what was written to them before {self._sink.position} may be lost"
                )
        if now >= self._progress_at + PROGRESS_INTERVAL:
            activities = self._totals.activities.total()
            if activities > self._progress_from:
                rate = (activities - self._progress_from) / (now - self._progress_at)
                self._log.info(
                    "progress", **_summary(self._totals), per_second=round(rate), lsn=str(self._sink.position)
                )
            self._progress_at, self._progress_from = now, activities

    def _decoding(self) -> bool:
        """Whether the server reads a long transaction that has nothing for us, during which it may not answer."""
        settings = self._settings
        with (
            suppress(Stopped),
            self._stop.interrupting(),
            closing(postgres.connect_briefly(settings.dsn.get_secret_value(), settings.worker)) as connection,
        ):
            return postgres.at_work(connection, self._replication.pid, settings.worker)
        return True

    @property
    def _held_up(self) -> bool:
        """Whether a batch is not written, or a row not found, for so long that somebody should look why."""
        long_ago = time.monotonic() - WATCH_INTERVAL
        return (self._writing is not None and self._began_at < long_ago) or (
            self._fetching is not None and self._asked_at < long_ago
        )

    @property
    def _to_look_at(self) -> bool:
        """Whether anything has happened that the watch is about. A truly idle server is left alone."""
        # What pgoutput was not sent for, it doesn't tell of: that may be all that happens.
        moved = 0 if self._decoder.plugin == pgoutput.PLUGIN else MOVED
        return (
            self._totals.batches > self._looked_after
            or self._received - self._looked_until > moved
            or self._writing is not None
            or self._fetching is not None
            or self._watch.pending
        )

    def _next_tick(self, now: float) -> float:
        due = [self._status_due, self._advanced_at + self._settings.idle_advance_interval]
        if self._to_look_at:
            due.append(self._looked_at + WATCH_INTERVAL)
        return min(at for at in (*due, now + STATUS_INTERVAL) if at > now)

    def _wait(self, timeout: float) -> None:
        """Wait for one of the sockets, and let the sink use its own."""
        reading: list[Stop | Sink | Replication | Lookups] = [self._stop]
        writing: list[Sink | Lookups] = []
        if self._writing is not None and time.monotonic() < self._began_at + WRITING_USUAL:
            # What arrives now can't be written yet: let it come together, instead of waking up for each row of it.
            timeout = min(timeout, WRITING_INTERVAL)
        elif not (self._batch.full or self._stop.is_set() or self._reloading or self._fetching):
            reading.append(self._replication)
        if self._fetching is not None and self._lookups is not None:
            reading.append(self._lookups)
            writing += [self._lookups] if self._fetch_wants & Wait.W else []
        if self._writing is None or self._wants & Wait.R:
            reading.append(self._sink)
        if self._writing is not None and self._wants & Wait.W:
            writing.append(self._sink)
        readable, writable, _ = select.select(reading, writing, [], max(timeout, 0))
        if self._stop in readable:
            self._stop.clear()

        def ready(socket: Sink | Lookups | None) -> int:
            return (Ready.R if socket in readable else 0) | (Ready.W if socket in writable else 0)

        if self._fetching is not None and (fetch := ready(self._lookups)):
            self._fetched(Ready(fetch))
        if self._writing is None:
            if ready(self._sink):
                self._sink.read()
        elif write := ready(self._sink):
            self._step(Ready(write))


def _summary(totals: Totals) -> dict[str, int]:
    return {
        "transactions": totals.transactions,
        "activities": totals.activities.total(),
        "dead_letters": totals.dead_letters.total(),
    }


def _full(schema: str, table: str) -> tuple[str, str]:
    """A table's name in SQL, and the statement with which its old rows come."""
    name = sql.Identifier(schema, table).as_string()
    return name, f"ALTER TABLE {name} REPLICA IDENTITY FULL"


def _described(error: BaseException | None) -> dict[str, str | None]:
    """What may be logged of an error: the server's words hold values of rows, libpq's own and ours don't."""
    sqlstate = error.sqlstate if isinstance(error, psycopg.Error) else None
    reason = None if sqlstate else " ".join(str(error).split())
    return {"error": type(error).__name__, "sqlstate": sqlstate, "reason": reason}
