"""The worker: connects, makes sure that all is as the checkpoint says, streams, and keeps that going."""

from __future__ import annotations

import gc
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Final

import psycopg
from psycopg import sql
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_when_event_set, wait_random_exponential

from cdc_worker import (
    catalog,
    checkpoint,
    decoders,
    errors,
    gap,
    pgoutput,
    postgres,
    process,
    publication,
    recorder,
    setup,
    skips,
    slot,
    wal2json,
)
from cdc_worker.activities import Scope
from cdc_worker.changes import BeginToldError, Change
from cdc_worker.checkpoint import Checkpoint
from cdc_worker.config import Settings
from cdc_worker.log import Logger
from cdc_worker.lookups import Lookups
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.partitions import Partitions
from cdc_worker.process import Process
from cdc_worker.profile import Profile
from cdc_worker.profile import load as load_profile
from cdc_worker.recorder import Recorder
from cdc_worker.replication import Replication
from cdc_worker.rules import Rules
from cdc_worker.sink import Sink
from cdc_worker.skips import Skips
from cdc_worker.stop import Hung, Stop, Stopped
from cdc_worker.stream import SILENCE, Stream
from cdc_worker.tracing import Trace
from cdc_worker.transform import PREFIXES, Transformer
from cdc_worker.vitals import Vitals
from cdc_worker.watch import INTERVAL as WATCH_INTERVAL
from cdc_worker.watch import Watch

FAREWELL: Final = 0.6
"""So many seconds a process that ends waits for the server to note it."""

SETTLED: Final = 60.0
"""A connection that held for so many seconds has worked, though there was nothing to write."""

STANDBY_INTERVAL: Final = 0.25
"""Between two looks of a stand-by whether the slot is free, in seconds."""


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
        trace: Trace | None = None,
    ) -> None:
        self.vitals = Vitals()
        self._trace = trace
        self._settings = settings
        self._profile = profile
        self._rules = settings.rules(profile)
        self._stop = stop
        self._log = log
        self._once = once
        self._takeover = takeover
        self._waits = wait
        self._process = Process(settings.worker)
        self._watch = Watch(settings, self._process, log, self.vitals)
        self._slot, self._plugin = settings.slot, wal2json.PLUGIN  # until we have looked
        self._options: list[str] = []
        self._reachable = False
        self._misfits: list[str] = []
        self._alarmed: set[tuple[str, tuple[str, str]]] = set()
        self._partitions: Partitions | None = None
        self._started = False
        self._sessions: list[postgres.Session] = []  # of our last connections
        self._alive_at = time.monotonic()  # when a connection last worked, or stood by
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
            self.vitals.became("connecting")
            self.vitals.problems["connection"] = " ".join(filter(None, described.values()))
            self._process.failure = " ".join(filter(None, described.values()))
            if (since := time.monotonic() - self._alive_at) > SILENCE:
                self._watch.unhealthy(f"no connection has held for {since:.0f} s")
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
                        since, began = self.vitals.batches, time.monotonic()
                        try:
                            again = self._run(stack)
                        finally:
                            if self.vitals.batches > since or time.monotonic() > began + SETTLED:
                                attempt.retry_state.attempt_number = 1  # it worked: begin anew with short waits
                                self._alive_at = time.monotonic()
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
        log.info("worker_stopped", **self.vitals.summary)

    def _fail(self, error: errors.CdcWorkerError) -> None:
        """See to what an error leaves behind."""
        if isinstance(error, errors.SlotGivenUpError):
            try:
                with closing(self._connect()) as connection:
                    self._check_owner(checkpoint.read(connection, self._settings.worker))
                    # What waits for a lock on the target would be written later, without us, and the gap be another.
                    postgres.end(connection, self._settings.worker, self._sessions)
                    slot.give_up(connection, self._slot, self._settings.worker)
            except (psycopg.Error, errors.CdcWorkerError) as problem:
                self._log.error("slot_not_dropped", **_described(problem))
        self._process.failure = str(error)
        self._end(error.exit_code)
        self._log.error("worker_failed", error=type(error).__name__, exit_code=error.exit_code, **self.vitals.summary)

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
            stream = self._open(stack)
            with self._stop.turning():
                stream.run()
        except Hung as hung:
            self._watch.unhealthy(f"the loop hangs: {hung}")
            raise errors.HungError(
                f"the worker has hung for {hung}", hint="see what is waited for there; what was not written comes again"
            ) from hung
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

    def _open(self, stack: ExitStack) -> Stream:
        """Connect, make sure that all is as the checkpoint says, start the stream and become the owner."""
        settings, log = self._settings, self._log
        worker = settings.worker
        if self.vitals.role == "active":
            self.vitals.became("connecting")  # to begin anew may take as long as a lock is held
        with self._stop.interrupting():
            connection = self._connect()
            stack.callback(connection.close)
            self._reachable = False
            if postgres.end(connection, worker, self._sessions):
                log.info("own_sessions_ended")  # the server had not noticed: one may hold the slot
            self._sessions = [postgres.session(connection)]
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
            passing = Skips(
                skips.allowed(connection, found),
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
                self._sessions.append(postgres.session(reading))
                lookups = Lookups(reading, self._rules, on_failure=self._warn_of_lookup)
                stack.callback(lookups.cancel)
        self._started = True
        self.vitals.became("active")
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
        return Stream(
            replication,
            sink,
            transformer,
            lookups,
            recording,
            decoder=decoder,
            skips=passing,
            settings=settings,
            vitals=self.vitals,
            trace=self._trace,
            stop=self._stop,
            log=log,
            watch=self._watch,
            look=self._look,
            partitions=partitions,
            on_unknown=self._warn_of_unknown,
            on_missing=self._warn_of_missing,
            wal_sender_timeout=timeout,
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
        gap.check(connection, settings.worker)
        return server, found, table

    def _check_published(self, connection: postgres.Connection, rules: Rules) -> None:
        """Raise PublicationError if the server leaves out changes of captured tables."""
        if self._plugin == pgoutput.PLUGIN:
            noted = publication.noted(connection, self._settings.worker)
            publication.check(connection, self._settings.publication_name, rules, noted=noted)

    def _look(self, connection: postgres.Connection) -> None:
        """See whether what is to be recorded is still there and all asked for, and no commit waits for us."""
        postgres.check_no_standby(postgres.server(connection), self._settings.worker)
        if self._partitions is not None:
            self._partitions.look(connection)
        faults = catalog.faults(connection, self._profile, self._rules, plugin=self._plugin)
        self._warn_of_misfits([fault.message for fault in faults if fault.certain and fault.captured])
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
        self._sessions.append(postgres.session(sender))
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
            if self._stop.is_set():  # by another thread, which interrupts nothing
                raise Stopped
            if self._owner is not None:
                self._check_owner(checkpoint.read(connection, settings.worker))
            if not self._waits or (self._once and not found.held_by_worker):
                raise slot.taken(found)
            self._alive_at = time.monotonic()
            self._watch.healthy()
            if told != found.active_pid:
                told = found.active_pid
                self.vitals.became("standby")
                if not found.held_by_worker:
                    self.vitals.problems["slot"] = f"slot taken: it is read by {found.reader}"
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


def _full(schema: str, table: str) -> tuple[str, str]:
    """A table's name in SQL, and the statement with which its old rows come."""
    name = sql.Identifier(schema, table).as_string()
    return name, f"ALTER TABLE {name} REPLICA IDENTITY FULL"


def _described(error: BaseException | None) -> dict[str, str | None]:
    """What may be logged of an error: the server's words hold values of rows, libpq's own and ours don't."""
    if isinstance(error, psycopg.Error):
        told = None if error.sqlstate else postgres.told_by_libpq(error)
        return {"error": type(error).__name__, "sqlstate": error.sqlstate, "reason": told}
    return {"error": type(error).__name__, "sqlstate": None, "reason": " ".join(str(error).split())}
