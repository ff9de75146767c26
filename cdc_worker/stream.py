"""The loop over the sockets, of one connection's worth.

    for transactions in the slot's stream:
        batch = transform(transactions)
        sink.write(batch)                  # activities, dead letters and checkpoint: one database transaction
        ack(batch.end)                     # only now may the server forget

While a batch goes to the database, the next changes are read. Everything is in one thread: order is the product.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import psycopg
from psycopg.waiting import Ready, Wait

from cdc_worker import (
    errors,
    failpoints,
    pgoutput,
    postgres,
)
from cdc_worker.activities import Activity, Batch, Line, Person, Position, Prepared
from cdc_worker.changes import MARKER_PREFIX, Assembler, Change, Transaction
from cdc_worker.config import Settings
from cdc_worker.decoders import Decoder
from cdc_worker.log import Logger
from cdc_worker.lookups import Found, Lookups
from cdc_worker.lsn import LSN
from cdc_worker.partitions import Partitions
from cdc_worker.protocol import PrimaryKeepalive
from cdc_worker.recorder import Recorder
from cdc_worker.replication import Replication
from cdc_worker.sink import Sink, Writing, Written
from cdc_worker.skips import Skips
from cdc_worker.stop import Stop, Stopped
from cdc_worker.tracing import Trace
from cdc_worker.transform import Outcome, Transformer
from cdc_worker.vitals import REMEMBERED, SIZE, Remembered, Vitals
from cdc_worker.watch import INTERVAL as WATCH_INTERVAL
from cdc_worker.watch import MOVED, Watch
from cdc_worker.watchdog import Debtor, Watchdog

GRACE: Final = 0.8
"""So long a batch in hand may take to be written after a shutdown was requested; we exit in the rest of a second."""

# In seconds, as all that follows.
STATUS_INTERVAL: Final = 10.0
STATUS_INTERVAL_BEHIND: Final = 0.5
CONFIRMING_INTERVAL: Final = 0.05
PROGRESS_INTERVAL: Final = 10.0
WRITING_INTERVAL: Final = 0.002
WRITING_USUAL: Final = 0.1
"""A batch that takes longer to write is held up, by a lock perhaps: there is no haste to read on."""

ASKING_INTERVAL: Final = 1.0
"""So long, at most, the application's commits wait for us where somebody makes us a synchronous standby."""

SILENCE: Final = 60.0
"""So long nobody is silent without being asked after, or wal_sender_timeout if that is less: see the watchdog."""

_SILENCES: Final[dict[Debtor, str]] = {
    "stream": "nothing was heard from the server",
    "changes": "nothing more of a commit was heard",
    "writing": "a batch was being written",
    "lookup": "a row was being looked up",
}

TURN: Final = 64
"""So many messages, at most, are read before they are transformed and the writing connection gets a look."""

TURN_SIZE: Final = 1 << 19
"""Of about so many bytes, for all of them are in memory then."""


class Stream:
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
        vitals: Vitals,
        trace: Trace | None,
        stop: Stop,
        log: Logger,
        watch: Watch,
        look: Callable[[postgres.Connection], None],
        partitions: Partitions,
        on_unknown: Callable[[Change], None],
        on_missing: Callable[[str, str, str], None],
        wal_sender_timeout: float,
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
        self._held_back: tuple[list[Prepared], list[Person]] | None = None  # what has come of it
        self._fetching: Writing[Found] | None = None
        self._fetch_wants = Wait.R
        self._settings = settings
        self._vitals = vitals
        self._trace = trace
        self._stop = stop
        self._log = log
        self._watch = watch
        silence = min(SILENCE, wal_sender_timeout or SILENCE)
        self._status_interval = min(STATUS_INTERVAL, silence / 4)
        self._watchdog = Watchdog(silence / 2)
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
        self._transactions: deque[Transaction] = deque()  # to be transformed
        self._unfinished: Transaction | None = None
        self._untrusted = False  # it was said that messages are not to be trusted: once is enough
        self._marked = False  # a cut-over may have changed what is ours: to write is to find out
        self._writing: Writing[Written] | None = None
        self._written: Batch = self._batch
        self._wants = Wait.R
        self._wal_end = self._told = self._confirmed = sink.position.lsn
        now = time.monotonic()
        self._heard_at = self._status_at = self._advanced_at = self._began_at = self._asked_at = now
        self._opened_at = self._moved_at = self._kept_alive_at = self._stepped_at = self._fetched_at = now
        self._requested_at: float | None = None  # since when we wait for a keepalive
        self._looked_at = now - WATCH_INTERVAL
        self._looked_until, self._looked_after = sink.position.lsn, vitals.batches
        self._examined_at, self._examined_until = now, sink.position.lsn
        self._progress_at = now
        self._progress_from = vitals.activities.total()

    def run(self) -> None:
        """Read, transform, write, confirm."""
        stopping_until = float("inf")
        while True:
            self._stop.turned()
            began = self._vitals.turned_at = time.monotonic()
            drained = self._receive() if not self._batch.full else self._writing is not None
            now = time.monotonic()
            self._vitals.decode_seconds += now - began
            if self._writing is None and (self._batch.full or (drained and not self._lingers(now))):
                self._ask(now)
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
        return not (self._assembler.open or self._transactions or self._unfinished or self._owed or self._writing)

    @property
    def _owed(self) -> bool:
        """Whether there is something to write, if only that a commit is done of which a part was written."""
        batch = self._batch
        done = bool(self._sink.position.commit_lsn) and not batch.end.commit_lsn
        return not batch.empty or self._marked or done

    def _lingers(self, now: float) -> bool:
        """Whether more is to come together before the next batch, because the last one began just now."""
        in_haste = self._stop.is_set() or self._stop.reload_requested or self._until is not None
        return now < self._began_at + self._settings.linger and self._owed and not in_haste

    @property
    def _reloading(self) -> bool:
        """Whether nothing more is to be read before the profile has been."""
        open_ = self._assembler.open or self._transactions or self._unfinished or self._batch.end.commit_lsn
        return self._stop.reload_requested and not open_

    @property
    def _complete(self) -> bool:
        return self._until is not None and self._idle and self._received >= self._until

    def _receive(self) -> bool:
        """Take up to TURN messages. Returns whether that was all that has arrived."""
        batch = self._batch
        if self._stop.is_set() or self._reloading:
            return True
        while self._unfinished is not None:
            if batch.full:
                return False
            if self._transformer.wanted and not self._fetched(None):
                return True
            self._take(self._unfinished, self._transformer.rest())
        # One kind of work after the other: it takes less time where the processor has just done the same.
        drained = not self._transactions and self._assemble()
        while self._transactions:
            transaction = self._transactions.popleft()
            self._unrecorded = transaction
            self._take(transaction, self._transformer.feed(transaction))
            failpoints.reach("received" if transaction.last else "within_transaction")
            if batch.full or self._unfinished is not None:
                return False
        return drained

    def _assemble(self) -> bool:
        """Put up to TURN messages together into transactions. Returns whether that was all that has arrived."""
        replication, assembler, batch = self._replication, self._assembler, self._batch
        receive, decode, feed = replication.receive, self._decoder.decode, assembler.feed
        most = batch.size + TURN_SIZE
        for _ in range(TURN):
            message = receive()
            if message is None:
                replication.read()
                message = receive()
                if message is None:
                    return True
            if isinstance(message, PrimaryKeepalive):
                self._kept_alive_at = self._heard_at
                self._wal_end = max(self._wal_end, message.wal_end)
                if message.reply_requested:
                    # Without a flush position: the slot stays, and a server that shuts down need not wait for us.
                    replication.send_status(written=message.wal_end)
                continue
            batch.size += len(message)
            try:
                decoded = decode(message)
                transaction = None if decoded is None else feed(decoded, message)
            except errors.MessageUnreadableError as error:
                transaction = self._skips.pass_over(assembler, message, replication.position, error)
            if transaction is not None:
                self._transactions.append(transaction)
                if self._stop.reload_requested:
                    return False
            if batch.size >= most:
                return False
        return False

    def _take(self, transaction: Transaction, outcomes: list[Outcome]) -> None:
        self._moved_at = self._heard_at
        transformer = self._transformer
        if transformer.refused:
            self._log.warning("context_refused", asked=sorted(transformer.refused), xid=transaction.xid)
        if transformer.untrusted and not self._untrusted:
            self._untrusted = True
            self._log.warning("context_untrusted", xid=transaction.xid)
        done, more = transformer.done, transformer.ready or bool(transformer.wanted)
        if transaction.commit_lsn == self._resumed.commit_lsn:
            # A part of this commit was written before we came. It is read again for its messages and facts.
            outcomes = [outcome for outcome in outcomes if outcome.index >= self._resumed.changes]
            done = max(done, self._resumed.changes)
        if transaction.messages and any(message.prefix == MARKER_PREFIX for _, message in transaction.messages):
            self._marked = True
        lines = [self._line(o, transaction) if isinstance(o, Activity) else o for o in outcomes]
        given = transformer.given
        if self._held_back is not None:
            lines, given = self._held_back[0] + lines, self._held_back[1] + given
        # What was looked up is recorded with the whole slice: of what was written before, nobody else would know it.
        if self._recorder is None or not transformer.wanted:
            self._batch.add(lines, transaction, done=done, complete=transaction.last and not more, given=given)
            self._held_back = None
        else:
            self._held_back = lines, given
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
        self._fetched_at = time.monotonic()
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

    def _ask(self, now: float) -> None:
        """Ask, before our own commit could wait for itself, whether commits have come to wait for us.

        Where nothing moves, nobody waits.
        """
        if self._stop.is_set() or now < self._asking_due:
            return
        self._examined_at, self._examined_until = now, self._received
        with self._stop.interrupting():
            standbys = self._sink.synchronous_standby_names()
        if postgres.matches_standby(standbys, postgres.application_name(self._settings.worker)):
            self._look_around()

    @property
    def _asking_due(self) -> float:
        return self._examined_at + ASKING_INTERVAL if self._received > self._examined_until else float("inf")

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
            failpoints.reach("idle_advance")
        else:
            if batch.full:
                batch.size = 0  # much was read, and none of it meant anything
                if self._recorder is not None:
                    self._recorder.flush()
            return
        if self._recorder is not None:
            # First: whatever the checkpoint has passed is durable in the recording.
            self._recorder.write(batch.end.lsn)
            failpoints.reach("recorded")
        self._written, self._began_at = batch, now
        self._writing = self._sink.write(batch)
        self._step(None)

    def _step(self, ready: Ready | None) -> None:
        """Go on writing, now that the socket is `ready`."""
        assert self._writing is not None
        self._stepped_at = time.monotonic()
        try:
            self._wants = self._writing.send(ready)  # type: ignore[arg-type]  # None starts it
        except StopIteration as stop:
            self._writing = None
            self._confirm(stop.value)
        except psycopg.Error:
            if self._sink.position > self._resumed:
                self._vitals.batches += 1  # a part of it was written: that is progress
            raise

    def _confirm(self, written: Written) -> None:
        batch, vitals, now = self._written, self._vitals, time.monotonic()
        failpoints.reach("idle_advanced" if batch.empty else "committed")
        if now >= self._status_at + CONFIRMING_INTERVAL:
            self._send_status()
            failpoints.reach("confirmed")
        refused = {letter.change_key for letter in written.dead_letters}
        vitals.wrote(now - self._began_at)
        vitals.transactions += batch.transactions
        vitals.dead_letters.update(letter.kind for letter in written.dead_letters)
        vitals.activities.update(
            outcome.type for outcome in batch.outcomes if type(outcome) is Line and outcome.change_key not in refused
        )
        if self._settings.http_port is not None:
            vitals.last.extend(
                Remembered(outcome.committed_at, outcome.type, self._sink.fields, outcome.text)
                for outcome in batch.outcomes[-REMEMBERED:]
                if type(outcome) is Line and outcome.change_key not in refused and len(outcome.text) < SIZE
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
        told: dict[str, str | int] = {
            "transactions": batch.transactions,
            "activities": written.activities,
            "dead_letters": len(refused),
            "already_there": written.already_there,
            "unlinked": written.unlinked,
            "lsn": str(self._sink.position),
        }
        self._log.debug("batch_written", **told, seconds=round(now - self._began_at, 4))
        if self._trace is not None:
            self._trace(now - self._began_at, told)

    def _send_status(self, *, reply_requested: bool = False) -> None:
        flushed = self._sink.position.lsn
        self._replication.send_status(
            written=self._received,
            flushed=flushed,
            applied=self._received if self._idle else flushed,
            reply_requested=reply_requested,
        )
        self._told, self._confirmed = self._received, flushed
        self._status_at = time.monotonic()

    @property
    def _status_due(self) -> float:
        if self._confirmed < self._sink.position.lsn:
            return self._status_at + CONFIRMING_INTERVAL
        # The position of our own last commit, which comes back empty, need not wait: without it there seems to be lag.
        behind = self._told < self._received
        return self._status_at + (
            min(STATUS_INTERVAL_BEHIND, self._status_interval) if behind else self._status_interval
        )

    def _tick(self, now: float) -> None:
        if now >= self._status_due:
            self._attend(now)
            if silent := self._reads and now - self._heard_at > self._status_interval:
                self._requested_at = self._requested_at or now
            self._send_status(reply_requested=silent)
        if self._recorder is not None:
            self._recorder.tend()
        if self._to_look_at and now >= self._look_due:
            self._look_around()
            if overlooked := self._partitions.overlooked:
                names = sorted(map(".".join, overlooked))
                self._log.error("partitions_overlooked", partitions=names, lsn=str(self._sink.position))
                raise psycopg.OperationalError(
                    f"{', '.join(names)} became partitions of captured tables, and were not asked for: "
                    f"what was written to them before {self._sink.position} may be lost"
                )
        if now >= self._progress_at + PROGRESS_INTERVAL:
            activities = self._vitals.activities.total()
            if activities > self._progress_from:
                rate = (activities - self._progress_from) / (now - self._progress_at)
                self._log.info("progress", **self._vitals.summary, per_second=round(rate), lsn=str(self._sink.position))
            self._progress_at, self._progress_from = now, activities

    def _look_around(self) -> None:
        self._looked_until, self._looked_after = self._received, self._vitals.batches
        try:
            with suppress(Stopped), self._stop.interrupting():
                self._watch.look(held_up=self._held_up, also=self._look)
        except errors.SynchronousStandbyError:
            self._sink.cancel()  # a commit that waits for us is done, and no longer holds its locks
            raise
        self._looked_at = time.monotonic()

    @property
    def _look_due(self) -> float:
        """When to look next: soon where a batch is held up, since its commit may wait for ourselves."""
        held_up = self._began_at + ASKING_INTERVAL
        if self._writing is not None and self._looked_at < held_up:
            return min(held_up, self._looked_at + WATCH_INTERVAL)
        return self._looked_at + WATCH_INTERVAL

    @property
    def _reads(self) -> bool:
        """Whether what the server sends is wanted now."""
        return not (self._batch.full or self._unfinished is not None or self._stop.is_set() or self._reloading)

    def _hear(self, now: float) -> None:
        """Note that bytes have come, or that none are waited for."""
        self._heard_at, self._requested_at = now, None

    def _owed_since(self, now: float) -> dict[Debtor, float]:
        """Since when who owes us a sign of life."""
        owed: dict[Debtor, float] = {}
        if not self._reads:
            self._hear(now)
        elif self._requested_at is not None:
            owed["stream"] = self._requested_at
        if self._heard_at > self._kept_alive_at or not self._assembler.open:
            self._moved_at = self._heard_at  # it was more than a keepalive, if only a piece of a message
        elif self._reads:
            owed["changes"] = self._moved_at
        if self._writing is not None:
            owed["writing"] = self._stepped_at
        if self._fetching is not None:
            owed["lookup"] = self._fetched_at
        return owed

    def _attend(self, now: float) -> None:
        """Ask after who is silent for too long. Raises psycopg.OperationalError where nothing more will come."""
        owed = self._owed_since(now)
        for debtor, silent in self._watchdog.to_ask_after(owed, now).items():
            socket, wants = self._debtor(debtor)
            reason: str | None = "is asked after no more"
            with suppress(Stopped), self._stop.interrupting():
                reason = postgres.at_work(self._settings.dsn.get_secret_value(), self._settings.worker, socket.pid)
            if any(select.select([socket], [socket] if wants & Wait.W else [], [], 0)):
                continue  # it isn't the server that has not listened
            said = f"{_SILENCES[debtor]} for {silent:.0f} s"
            self._watch.unhealthy(f"{said}: the server's process {socket.pid} {reason or 'has nothing more to say'}")
            if reason is None:
                raise psycopg.OperationalError(f"{said}, and the server has nothing more to say")
        if now > self._opened_at + self._watchdog.patience and not self._watchdog.late(owed, now):
            self._watch.healthy()

    def _debtor(self, of: Debtor) -> tuple[Replication | Sink | Lookups, Wait]:
        """Through what it is to be heard, and what we wait for there."""
        if of == "writing":
            return self._sink, self._wants
        if of == "lookup":
            assert self._lookups is not None
            return self._lookups, self._fetch_wants
        return self._replication, Wait.R

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
            self._vitals.batches > self._looked_after
            or self._received - self._looked_until > moved
            or self._writing is not None
            or self._fetching is not None
            or self._watch.pending
        )

    def _next_tick(self, now: float) -> float:
        due = [self._status_due, self._advanced_at + self._settings.idle_advance_interval]
        if self._to_look_at:
            due.append(self._look_due)
        if self._writing is None:
            due.append(self._asking_due)
            due.append(self._began_at + self._settings.linger)
        return min(at for at in (*due, now + STATUS_INTERVAL) if at > now)

    def _wait(self, timeout: float) -> None:
        """Wait for one of the sockets, and let the sink use its own."""
        reading: list[Stop | Sink | Replication | Lookups] = [self._stop]
        writing: list[Sink | Lookups] = []
        if self._writing is not None and time.monotonic() < self._began_at + WRITING_USUAL:
            # What arrives now can't be written yet: let it come together, instead of waking up for each row of it.
            timeout = min(timeout, WRITING_INTERVAL)
        elif self._reads and self._fetching is None and not self._lingers(time.monotonic()):
            reading.append(self._replication)
        if self._fetching is not None and self._lookups is not None:
            reading.append(self._lookups)
            writing += [self._lookups] if self._fetch_wants & Wait.W else []
        if self._writing is None or self._wants & Wait.R:
            reading.append(self._sink)
        if self._writing is not None and self._wants & Wait.W:
            writing.append(self._sink)
        readable, writable, _ = select.select(reading, writing, [], max(timeout, 0))
        if self._replication in readable:
            self._hear(time.monotonic())
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
