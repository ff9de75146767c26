"""The sink: writes activities, dead letters, what was skipped and the checkpoint in one database transaction.

Nothing here waits. `write` is a generator that yields what it waits for on its socket, as psycopg's own do, so that
the stream can be read meanwhile; `finished` runs it to its end for those who have nothing else to do.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from zoneinfo import ZoneInfo

import msgspec
import psycopg
from psycopg import pq, sql
from psycopg.pq.abc import PGresult
from psycopg.waiting import Ready, Wait

from cdc_worker import catalog, errors, failpoints, kept, postgres
from cdc_worker.activities import Activity, Batch, DeadLetter, Line, Position, Prepared, Skipped
from cdc_worker.catalog import TargetTable
from cdc_worker.changes import Change, Payload
from cdc_worker.lines import copied, encoder, escaped, parsed, unlinked
from cdc_worker.postgres import Connection, Statement, is_about_the_row, is_transient
from cdc_worker.profile import Target
from cdc_worker.rules import qualified

T = TypeVar("T")
Writing = Generator[Wait, Ready, T]


def finished(writing: Writing[T], connection: Connection) -> T:
    """What it comes to. May be interrupted."""
    return postgres.finished(writing, connection)  # type: ignore[arg-type]  # it may send plain numbers


MAX_SAVEPOINTS: Final = 50
"""Savepoints in one transaction: beyond 64 subtransactions every snapshot in the server becomes slower."""

MAX_SEGMENT: Final = 128
"""So many rows are sent again, at most, because one of them was refused."""

MAX_LOCKING: Final = 25
"""So many rows go into one transaction where each of them locks rows of the application."""

MAX_HURRIES: Final = 100
"""So often a batch is tried that gives up what is locked, before all is begun anew: it may be another command's row."""

MAX_AT_ONCE: Final = 16
"""So many rows are inserted one by one: from there on a COPY is cheaper, though its answer is waited for twice."""

MAX_REFUSALS: Final = 1_000
"""So many rows in a row refused with one SQLSTATE are no longer about the rows."""

_NO_NUMBERS: Final[Mapping[str, str]] = {}
_NO_NUMBER: Final = "\\N"

_json = msgspec.json.Encoder(decimal_format="number")


class RefusedError(Exception):
    """The server refused a statement. `line` is the row of a COPY, from 1, where the server names it.

    `by_policy` says that row security did: a missing grant has the same SQLSTATE.
    """

    def __init__(self, sqlstate: str, *, constraint: str | None, line: int | None, by_policy: bool) -> None:
        super().__init__(sqlstate)
        self.sqlstate = sqlstate
        self.constraint = constraint
        self.line = line
        self.by_policy = by_policy

    @property
    def described(self) -> str:
        """SQLSTATE and constraint; never the server's message, which holds values of the row."""
        return f"(SQLSTATE {self.sqlstate}{f', constraint {self.constraint}' if self.constraint else ''})"


@dataclass(slots=True)
class Written:
    """What a batch came to.

    `existing` are the keys of activities that the target had; `unlinked` counts those written with a NULL link
    because their subject is gone, `deleted` the rows that went in the same transactions.
    """

    activities: int = 0
    dead_letters: list[DeadLetter] = field(default_factory=list)
    existing: set[str] = field(default_factory=set)
    unlinked: int = 0
    deleted: int = 0

    @property
    def already_there(self) -> int:
        """How many of them there were."""
        return len(self.existing)


def _nothing_else(rows: Sequence[Line]) -> str:
    return ""


class Progress(Protocol):
    """How far a source has been written: a row that moves in the same transactions, if nobody else has moved it."""

    @property
    def worker(self) -> str:
        """Whose dead letters there may be."""

    @property
    def position(self) -> Position:
        """What is durable to begin with."""

    def advance(
        self,
        before: Position,
        after: Position,
        committed_at: datetime | None = None,
        *,
        activities: int = 0,
        dead_letters: int = 0,
    ) -> Statement:
        """The statement that moves it; one that finds no row to update means that we may not write."""

    def fenced(self) -> errors.CdcWorkerError:
        """What that comes to."""


class Sink:
    """Writes batches through one connection, as long as its progress is its own. `position` is what is durable."""

    def __init__(
        self,
        connection: Connection,
        target: Target,
        *,
        table: TargetTable,
        time_zone: str,
        progress: Progress,
        decode: Callable[[Payload], Any],
        cluster: str | None = None,
        also: Callable[[Sequence[Line]], str] = _nothing_else,
    ) -> None:
        """`table` is the target as the catalog has it; `decode` makes a change of what was received.

        `progress` of the stream is the checkpoint that this process took over. What is written is of the checkpoint's
        cluster, unless another is named. `also` has the statements, each of them ended, that are to run in the same
        transaction after these rows were written.
        """
        self.position = progress.position
        self._progress = progress
        self._cluster, self._also = cluster, also
        self._decode = decode
        self.connection = connection
        self._pgconn = connection.pgconn
        self._pgconn.nonblocking = 1
        self._encode = encoder(target, table, ZoneInfo(time_zone))
        self._columns = (*target.columns, *target.constants)
        self.fields = tuple(target.columns.values())
        """Which field is in each column of a line, but for the last ones, whose values are always the same."""
        self._metadata = next((column for column, field in target.columns.items() if field == "metadata"), None)
        self._catalog = table
        name = qualified(target.table)
        key = catalog.key_column(target)
        self._table = target.table
        self._shape = catalog.shape(target).as_string()
        self._draw = ""
        self._into_keys: _Into | None = None
        if key is not None:
            self._into = _into(name, self._columns)
            self._existing = _existing(name, key)
        else:
            numbered = []
            if table.numbered is not None:
                column, sequence = table.numbered
                numbered = [column]
                self._draw = sql.SQL("; SELECT nextval({}) FROM generate_series(1, ").format(sequence).as_string()
            self._into = _into(name, (*numbered, *self._columns), numbered=bool(numbered))
            self._into_keys = _into(_KEYS, ("change_key", "table_name", "row_id"))
            self._existing = _existing(_KEYS, "change_key")
            self._key_text = f"\t{escaped('.'.join(name))}\t"
        # A target that somebody has locked is waited for before there is anything that would hold up vacuum: neither a
        # snapshot nor a number of a transaction.
        lock = sql.SQL("LOCK TABLE ONLY {} IN ROW EXCLUSIVE MODE").format(sql.Identifier(*name)).as_string()
        begin = ["BEGIN", lock]
        self._begin_divided = "; ".join([*begin, _IMMEDIATE])
        self._begin_whole = [*begin, _IMMEDIATE] if table.deferrable else begin
        self._begin = "; ".join(self._begin_whole)
        self._hurry = ""
        if table.referred:
            self._hurry = f"; {hurry(table)}"
            self._begin_whole.append(hurry(table))
        self._names: dict[str, bytes] = {}  # of statements that are prepared for `_write_at_once`
        self._prepared: set[bytes] = set()
        connection.prepare_threshold = None  # all that is prepared here is ours
        # What is drawn, done besides or refused to a COPY takes steps that depend on each other.
        step_by_step = self._draw or self._into_keys or table.row_security or also is not _nothing_else
        self._at_once = not (step_by_step or table.rules)
        self._free = [_FREE.format(sql.Identifier(*of)).as_string() for of in table.referred]
        self._refused_in_a_row = 0
        self._refused_with = ""

    def fileno(self) -> int:
        """The socket, for select."""
        return self._pgconn.socket

    @property
    def pid(self) -> int:
        """The process of the server that serves us."""
        return self.connection.info.backend_pid

    def read(self) -> None:
        """Take what the server says unasked. Raises psycopg.OperationalError when it has ended the connection."""
        self._pgconn.consume_input()
        if self._pgconn.status == pq.ConnStatus.BAD:
            raise psycopg.OperationalError("the server ended the writing connection")

    def synchronous_standby_names(self) -> str:
        """The setting as it is now. To be asked between two batches."""
        with postgres.waiting_for_nothing(self.connection):
            cursor = self.connection.execute("SHOW synchronous_standby_names", prepare=False)
            return str((cursor.fetchone() or ("",))[0])

    def line(self, activity: Activity, change: Change | Payload) -> Line:
        """An activity ready to be written, with its change in the form in which it is kept."""
        fields = activity.fields
        text = self._encode(activity)
        return Line(
            activity.change_key,
            fields["type"],
            text,
            change,
            activity.index,
            fields["occurred_at"],
            activity.origin,
            activity.found,
        )

    def cancel(self) -> None:
        """Roll back what is being written. Best effort and brief: a successor makes sure of it in any case."""
        with suppress(psycopg.Error):
            self.connection.cancel_safe(timeout=0.1)

    def write(self, batch: Batch) -> Writing[Written]:
        """Write a batch and move the progress to its end, which is durable when this returns.

        Usually that is one transaction. A batch with refused rows, or for a target with foreign keys of its own, may
        take several, each of which leaves the progress at what has been written. Raises FencedError when another
        process has become the owner, TargetUnusableError and TooManyRefusalsError when it is not about single rows, and
        psycopg.OperationalError for what may heal.
        """
        written = Written()
        divided = bool(self._catalog.foreign_keys and batch.outcomes)
        failpoints.reach("before_write")
        try:
            if not divided:
                try:
                    yield from self._hurrying(partial(self._write_whole, batch, written))
                except RefusedError as refusal:
                    self._must_be_about_a_row(refusal)
                    failpoints.reach("refused")
                    yield from self._run("ROLLBACK")
                    written = Written()
                    divided = True
            place = 0
            while divided and place < len(batch.outcomes):
                place = yield from self._hurrying(partial(self._write_divided, batch, place, written))
                if place < len(batch.outcomes):
                    failpoints.reach("part_written")
        except RefusedError as refusal:
            raise self._failure(refusal) from refusal
        return written

    def _hurrying(self, write: Callable[[], Writing[T]]) -> Writing[T]:
        """Write what gives up where a table that the target refers to is locked, again once it is free.

        Who locks that one and then the target would otherwise wait for us, who wait for him.
        """
        left = 1 if self._catalog.foreign_keys else MAX_HURRIES  # it may be a row: then all is begun anew, ever later
        while True:
            try:
                return (yield from write())
            except (RefusedError, psycopg.errors.LockNotAvailable) as error:
                if error.sqlstate != _LOCKED or not self._free:
                    raise
                yield from self._run("ROLLBACK")
                yield from self._until_free()
                left -= 1
                if not left:
                    raise

    def _until_free(self) -> Writing[None]:
        """Wait, with nothing held, until nobody has tables locked that the target refers to, one after the other."""
        for statement in self._free:
            self._pgconn.send_prepare(b"", statement.encode())
            try:
                yield from self._results()
            except RefusedError as error:
                if is_transient(error.sqlstate):
                    raise
                # It is gone, or in a schema that is none of our business.

    def _write_whole(self, batch: Batch, written: Written) -> Writing[None]:
        rows = [outcome for outcome in batch.outcomes if type(outcome) is Line]
        written.activities = len(rows)
        written.dead_letters = [outcome for outcome in batch.outcomes if type(outcome) is DeadLetter]
        skipped = [outcome for outcome in batch.outcomes if type(outcome) is Skipped]
        counts = len(rows), len(written.dead_letters)
        few = 0 < len(rows) <= MAX_AT_ONCE and self._at_once
        if few and not (written.dead_letters or skipped or batch.given):
            try:
                yield from self._write_at_once(self._moved(batch.end, batch, *counts), rows)
                self.position, self._refused_in_a_row = batch.end, 0
                return
            except RefusedError as refusal:
                if is_transient(refusal.sqlstate):
                    raise
                yield from self._forget_prepared()
        advance = self._advance(batch.end, batch, *counts)
        if written.dead_letters or skipped or (rows and (self._catalog.row_security or self._draw)):
            # By itself: only a COPY can be given up halfway.
            numbers = yield from self._begin_with(f"{self._begin}; {advance}{self._hurry}", rows)
            yield from self._insert(written.dead_letters)
            yield from self._note(skipped)
            yield from self._write_rows("", rows, f"{self._also(rows)}COMMIT", numbers, written)
        elif rows:
            yield from self._write_rows(
                f"{self._begin}; {advance}{self._hurry}; ", rows, f"{self._also(rows)}COMMIT", written=written
            )
        else:
            yield from self._run(advance)
        self.position = batch.end
        if rows:
            self._refused_in_a_row = 0

    def _write_at_once(self, advance: Statement, rows: Sequence[Line]) -> Writing[None]:
        """Write few rows without waiting for an answer in between, which for so few takes longer than all the rest.

        Since nothing can be given up halfway, a progress that is another's is an error as well. What an error means is
        told by writing them step by step: a prepared statement also fails where a column has got another type.
        """
        pgconn = self._pgconn
        sent: list[bytes] = []  # of each command the name of the statement that it prepares

        def send(statement: str, parameters: Sequence[str | None] = ()) -> None:
            name = self._names.setdefault(statement, f"at_once_{len(self._names)}".encode())
            # Only now: to prepare it would otherwise wait for what is locked, with a snapshot.
            if name not in self._prepared and name not in sent:
                pgconn.send_prepare(name, statement.encode())
                sent.append(name)
            pgconn.send_query_prepared(name, [of if of is None else of.encode() for of in parameters])
            sent.append(b"")

        pgconn.enter_pipeline_mode()
        for statement in self._begin_whole:
            send(statement)
        send(_MOVED.format(advance.prepared), advance.parameters)
        for row in rows:
            send(self._into.one, parsed(row.text))
        failpoints.reach("before_commit")
        send("COMMIT")
        pgconn.pipeline_sync()
        yield from self._flush()
        refusal: RefusedError | None = None
        ended = None
        commands = iter(sent)
        command = next(commands)
        while True:
            while pgconn.is_busy():
                yield Wait.R
                pgconn.consume_input()
            result = pgconn.get_result()
            if result is None:
                if ended is None:
                    raise psycopg.OperationalError("the server ended the writing connection")
                command, ended = next(commands, b""), None
                continue
            ended = result.status
            if ended == pq.ExecStatus.PIPELINE_SYNC:
                break
            if ended == pq.ExecStatus.FATAL_ERROR:
                refusal = refusal or _refused_error(result)
            elif command and ended == pq.ExecStatus.COMMAND_OK:
                self._prepared.add(command)
        pgconn.exit_pipeline_mode()
        if refusal is not None:
            raise refusal

    def _forget_prepared(self) -> Writing[None]:
        """Roll back, and let all be prepared anew."""
        self._prepared.clear()
        yield from self._run("ROLLBACK; DEALLOCATE ALL")

    def _write_divided(self, batch: Batch, start: int, written: Written) -> Writing[int]:
        """Write in one transaction what the target accepts of the outcomes from `start` on; returns where it stopped.

        What it refuses because its subject is gone is written without the link, and anything else becomes a dead
        letter. It stops early, at a place where the progress can be, when it has made enough savepoints, or locked
        enough rows of the application.
        """
        outcomes, place = batch.outcomes, start
        dead_letters: list[DeadLetter] = []
        done: list[Line] = []
        existing: set[str] = set()
        unlinked: dict[str, Line] = {}
        savepoints = without_link = refused = 0
        until = self._until(batch, start)
        begin = f"{self._begin_divided}; {self._advance(self.position)}{self._hurry}"
        numbers = yield from self._begin_with(begin, [o for o in outcomes[start:until] if type(o) is Line])
        segments = deque((at, min(at + MAX_SEGMENT, until)) for at in range(start, until, MAX_SEGMENT))
        while segments:
            place, end = segments.popleft()
            if savepoints >= MAX_SAVEPOINTS:
                if batch.position_before(place) is not None:
                    break
                if end - place > 1:  # on to the next place where a batch can be divided
                    segments.appendleft((place + 1, end))
                    end = place + 1
            concerned = outcomes[place:end]
            rows = [
                unlinked.get(o.change_key, o) for o in concerned if type(o) is Line and o.change_key not in existing
            ]
            savepoints += 1
            try:
                if rows:
                    yield from self._write_rows("SAVEPOINT segment; ", rows, "RELEASE segment", numbers)
            except RefusedError as refusal:
                self._must_be_about_a_row(refusal)
                yield from self._run("ROLLBACK TO segment; RELEASE segment")
                failpoints.reach("rolled_back")
                if refusal.sqlstate == "23505":
                    found = yield from self.existing([row.change_key for row in rows])
                    if found:
                        existing |= found
                        segments.appendleft((place, end))
                        continue
                if len(rows) > 1:
                    segments.extendleft(reversed(_divided(place, end, concerned, rows, refusal.line)))
                    continue
                (row,) = rows
                if (free := self._without_link(row, refusal)) is not None:
                    unlinked[row.change_key] = free
                    segments.appendleft((place, end))
                    continue
                if not refused:
                    yield from self._must_be_unchanged()
                refused += 1
                dead_letters += [o for o in concerned if type(o) is DeadLetter]
                dead_letters.append(self._refused(row, refusal))
            else:
                dead_letters += [o for o in concerned if type(o) is DeadLetter]
                done += rows
                without_link += sum(row.change_key in unlinked for row in rows)
                if rows:
                    self._refused_in_a_row = 0
            place = end
        yield from self._insert(dead_letters)
        yield from self._note([outcome for outcome in outcomes[start:place] if type(outcome) is Skipped])
        position = batch.end if place == len(outcomes) else batch.position_before(place)
        assert position is not None
        counts = len(done), len(dead_letters)
        failpoints.reach("before_commit")
        results = yield from self._run(f"{self._advance(position, batch, *counts)}; {self._also(done)}COMMIT")
        self.position = position
        written.deleted += _deleted(results)
        written.activities += len(done)
        written.dead_letters += dead_letters
        written.existing |= existing
        written.unlinked += without_link
        return place

    def _until(self, batch: Batch, start: int) -> int:
        """Up to which place one transaction may go that begins at `start`."""
        end = len(batch.outcomes)
        if not self._catalog.foreign_keys:
            return end
        places = range(start + MAX_LOCKING, end)
        return next((place for place in places if batch.position_before(place) is not None), end)

    def _without_link(self, line: Line, refusal: RefusedError) -> Line | None:
        """The line as it is without the link that was refused, which its metadata tells instead; None if it has none.

        Only what was known at start to be a foreign key is one: where a constraint was added since, nothing is.
        """
        if refusal.sqlstate != "23503" or refusal.constraint not in self._catalog.foreign_keys:
            return None
        values = dict(zip(self._columns, parsed(line.text), strict=True))
        columns = self._catalog.foreign_keys[refusal.constraint]
        if all(values.get(column) is None for column in columns):
            return None  # a trigger of the target has made one
        values = unlinked(values, columns, metadata=self._metadata, types=self._catalog.columns)
        return msgspec.structs.replace(line, text=copied(values.values()))

    def _refused(self, line: Line, refusal: RefusedError) -> DeadLetter:
        self._refused_in_a_row = self._refused_in_a_row + 1 if refusal.sqlstate == self._refused_with else 1
        self._refused_with = refusal.sqlstate
        if self._refused_in_a_row >= MAX_REFUSALS:
            raise errors.TooManyRefusalsError(
                f"the target {self._table} refused {MAX_REFUSALS} rows in a row, the last {refusal.described}",
                hint="see what the rows have in common: cdc-worker dead-letters list",
            )
        return DeadLetter(
            line.change_key,
            "refused",
            f"the target refused the row {refusal.described}",
            line.change if isinstance(line.change, Change) else self._decode(line.change),
            line.index,
            line.committed_at,
            refusal.sqlstate,
            refusal.constraint,
            dict(zip(self._columns, parsed(line.text), strict=True)),
            line.origin,
            line.found,
        )

    def _must_be_about_a_row(self, refusal: RefusedError) -> None:
        if not refusal.by_policy and (is_transient(refusal.sqlstate) or not is_about_the_row(refusal.sqlstate)):
            raise self._failure(refusal) from refusal

    def _must_be_unchanged(self) -> Writing[None]:
        """Raise what lets it be opened anew if the target has got other columns since: that is not about rows."""
        (result,) = yield from self._run(self._shape)
        if (result.get_value(0, 0) or b"").decode() != self._catalog.shape:
            raise psycopg.OperationalError(f"the columns of the target {self._table} were altered: look at them anew")

    def _failure(self, refusal: RefusedError) -> psycopg.Error | errors.TargetUnusableError:
        """What it means that something other than a row was refused."""
        if is_transient(refusal.sqlstate):
            return postgres.error(refusal.sqlstate, "writing failed")
        return errors.TargetUnusableError(
            f"the target {self._table}, or a table of cdc_worker, can't be written {refusal.described}",
            hint="mend its grants or columns; what was not written comes again",
        )

    def _moved(self, after: Position, batch: Batch | None, activities: int, dead_letters: int) -> Statement:
        committed_at = batch.committed_at if batch else None
        before = self.position
        return self._progress.advance(before, after, committed_at, activities=activities, dead_letters=dead_letters)

    def _advance(self, after: Position, batch: Batch | None = None, activities: int = 0, dead_letters: int = 0) -> str:
        # Also for commits of the batch that come after `after`: theirs are true already.
        given = [
            _GIVEN.format(self._progress.worker, *person, at=str(lsn)).as_string()
            for person, lsn in (batch.given if batch else ())
        ]
        return "; ".join([self._moved(after, batch, activities, dead_letters).literal, *given])

    def _insert(self, dead_letters: Sequence[DeadLetter]) -> Writing[None]:
        if not dead_letters:
            return
        rows = kept.encoded(self._progress.worker, dead_letters)
        self._pgconn.send_query_params(_INSERT_DEAD_LETTERS, [rows])
        yield from self._results()
        failpoints.reach("letters_inserted")

    def _note(self, skipped: Sequence[Skipped]) -> Writing[None]:
        if not skipped:
            return
        rows = [
            {
                "worker": self._progress.worker,
                "table_name": ".".join(of.table),
                "system_identifier": self._cluster,
                "commit_lsn": str(of.commit_lsn),
                "number": of.number,
                "operation": of.operation,
                "collapsed": of.collapsed,
                "subjects": of.subjects,
            }
            for of in skipped
        ]
        self._pgconn.send_query_params(_INSERT_SKIPPED, [_json.encode(rows)])
        yield from self._results()

    def existing(self, keys: Collection[str]) -> Writing[set[str]]:
        """Those of these change keys that have been written already."""
        self._pgconn.send_query_params(self._existing.encode(), [postgres.array(keys).encode()])
        (result,) = yield from self._results()
        return {(result.get_value(row, 0) or b"").decode() for row in range(result.ntuples)}

    def _begin_with(self, statements: str, rows: Sequence[Line]) -> Writing[Mapping[str, str]]:
        """Run what a transaction begins with; returns numbers for the rows to come, by key, where they are drawn."""
        if not (self._draw and rows):
            yield from self._run(statements)
            return {}
        drawn = (yield from self._run(f"{statements}{self._draw}{len(rows)})"))[-1]
        numbers = ((drawn.get_value(place, 0) or b"").decode() for place in range(drawn.ntuples))
        return {row.change_key: number for row, number in zip(rows, numbers, strict=True)}

    def _write_rows(
        self,
        before: str,
        rows: Sequence[Line],
        after: str,
        numbers: Mapping[str, str] = _NO_NUMBERS,
        written: Written | None = None,
    ) -> Writing[None]:
        """Write rows, between other statements; first their keys, where these are in a table of their own.

        Row security refuses every COPY, and takes the same as an INSERT.
        """
        lines = [row.text for row in rows]
        writes = [(self._into, lines)]
        if self._into_keys is not None:
            ends = (f"{self._key_text}{numbers.get(row.change_key, _NO_NUMBER)}\n" for row in rows)
            keys = [f"{escaped(row.change_key)}{end}".encode() for row, end in zip(rows, ends, strict=True)]
            if numbers:
                lines[:] = [b"%b\t%b" % (numbers[row.change_key].encode(), row.text) for row in rows]
            writes.insert(0, (self._into_keys, keys))
        if not self._catalog.row_security:
            copies = "".join(f"{into.copy}; " for into, _ in writes)
            results = yield from self._run(f"{before}{copies}{after}", *(lines for _, lines in writes))
        elif rows:
            inserts = "".join(f"{into.values}{', '.join(map(self._literals, lines))}; " for into, lines in writes)
            results = yield from self._run(f"{before}{inserts}{after}")
        else:
            results = yield from self._run(f"{before}{after}")
        if written is not None:
            written.deleted += _deleted(results)

    def _literals(self, line: bytes) -> str:
        escape = pq.Escaping(self._pgconn).escape_literal
        values = ("NULL" if v is None else bytes(escape(v.encode())).decode() for v in parsed(line))
        return f"({', '.join(values)})"

    # What psycopg does between its calls of libpq, for statements that have a COPY among them.

    def _run(self, statements: str, *lines: Sequence[bytes]) -> Writing[list[PGresult]]:
        """Run statements, and give each COPY among them its lines."""
        self._pgconn.send_query(statements.encode())
        return (yield from self._results(*lines))

    def _results(self, *lines: Sequence[bytes]) -> Writing[list[PGresult]]:
        copies = iter(lines)
        results: list[PGresult] = []
        refusal: RefusedError | None = None
        fenced = False
        yield from self._flush()
        while True:
            while self._pgconn.is_busy():
                yield Wait.R
                self._pgconn.consume_input()
            result = self._pgconn.get_result()
            if result is None:
                break
            if result.status == pq.ExecStatus.COPY_IN:
                yield from self._send(next(copies), b"another process goes on with this" if fenced else None)
            elif result.status == pq.ExecStatus.FATAL_ERROR:
                refusal = refusal or _refused_error(result)
            else:
                results.append(result)
                fenced = fenced or result.command_status == b"UPDATE 0"
        if fenced:
            raise self._progress.fenced()
        if refusal is not None:
            raise refusal
        return results

    def _send(self, lines: Sequence[bytes], error: bytes | None) -> Writing[None]:
        if error is None:
            for start in range(0, len(lines), 256):
                self._pgconn.put_copy_data(b"".join(lines[start : start + 256]))
                yield from self._flush()
            failpoints.reach("before_commit")
        self._pgconn.put_copy_end(error)
        yield from self._flush()

    def _flush(self) -> Writing[None]:
        while self._pgconn.flush():
            if (yield Wait.RW) & Ready.R:
                self._pgconn.consume_input()


def _deleted(results: Sequence[PGresult]) -> int:
    """How many rows statements have deleted."""
    return sum(of.command_tuples or 0 for of in results if (of.command_status or b"").startswith(b"DELETE"))


class _Into(NamedTuple):
    """What puts rows into a table: as the lines of a COPY, as VALUES that follow, or as the parameters of one row."""

    copy: str
    values: str
    one: str


def _into(table: tuple[str, str], columns: Sequence[str], *, numbered: bool = False) -> _Into:
    name, names = sql.Identifier(*table), sql.SQL(", ").join(map(sql.Identifier, columns))
    copy = sql.SQL("COPY {} ({}) FROM STDIN")
    # A COPY gives an identity its value also where it is GENERATED ALWAYS.
    insert = sql.SQL("INSERT INTO {} ({}) {}VALUES ")
    overriding = sql.SQL("OVERRIDING SYSTEM VALUE " if numbered else "")
    values = insert.format(name, names, overriding).as_string()
    parameters = ", ".join(f"${place}" for place in range(1, len(columns) + 1))
    return _Into(copy.format(name, names).as_string(), values, f"{values}({parameters})")


def _existing(table: tuple[str, str], key: str) -> str:
    query = sql.SQL("SELECT {key} FROM {name} WHERE {key} = ANY ($1::text[])")
    return query.format(key=sql.Identifier(key), name=sql.Identifier(*table)).as_string()


_KEYS: Final = ("cdc_worker", "written_key")
"""The table of the change keys of targets that have no column for them."""

# A query, because an UPDATE that finds nothing to do would look as if the progress were another's.
_GIVEN: Final = sql.SQL(
    "WITH given AS (UPDATE cdc_worker.erased SET until_lsn = {at}"
    " WHERE worker = {} AND field = {} AND key = {} AND until_lsn IS NULL AND erased_lsn < {at} RETURNING 1)"
    " SELECT FROM given"
)

# To prepare it takes the lock that the check of a foreign key takes, and no right to read or to lock the table.
_FREE: Final = sql.SQL("SELECT FROM {} FOR KEY SHARE")

# No row is an error.
_MOVED: Final = "WITH moved AS ({} RETURNING 1) SELECT 1 / count(*) FROM moved"

_LOCKED: Final = "55P03"

_IMMEDIATE: Final = "SET CONSTRAINTS ALL IMMEDIATE"

_INSERT_DEAD_LETTERS: Final = b"""
INSERT INTO cdc_worker.dead_letter
    (worker, change_key, kind, reason, sqlstate, constraint_name, committed_at, change, fields, xid, commit_lsn,
     end_lsn, context, found, masked, raw)
SELECT worker, change_key, kind, reason, sqlstate, constraint_name, committed_at, change, fields, xid, commit_lsn,
    end_lsn, context, found, masked, decode(raw, 'hex')
FROM jsonb_to_recordset($1) AS letter (worker text, change_key text, kind text, reason text, sqlstate text,
    constraint_name text, committed_at timestamptz, change jsonb, fields jsonb, xid bigint, commit_lsn pg_lsn,
    end_lsn pg_lsn, context jsonb, found jsonb, masked text[], raw text)
ON CONFLICT (change_key) DO NOTHING
"""

# What is collapsed comes again where its commit is resumed. To name the key it takes a right to read it.
_INSERT_SKIPPED: Final = b"""
INSERT INTO cdc_worker.skipped
    (worker, table_name, system_identifier, commit_lsn, number, operation, collapsed, subjects)
SELECT worker, table_name, coalesce(skipped.system_identifier, checkpoint.system_identifier), skipped.commit_lsn,
    number, operation, collapsed, subjects
FROM jsonb_to_recordset($1) AS skipped (worker text, table_name text, system_identifier text, commit_lsn pg_lsn,
    number bigint, operation text, collapsed boolean, subjects text[])
JOIN cdc_worker.checkpoint USING (worker)
ON CONFLICT DO NOTHING
"""


def _refused_error(result: PGresult) -> RefusedError:
    def said(diagnostic: pq.DiagnosticField) -> str | None:
        value = result.error_field(diagnostic)
        return value.decode(errors="replace") if value else None

    sqlstate = said(pq.DiagnosticField.SQLSTATE) or ""
    line = re.match(r"COPY [^,]*, line (\d+)", said(pq.DiagnosticField.CONTEXT) or "")
    return RefusedError(
        sqlstate,
        constraint=said(pq.DiagnosticField.CONSTRAINT_NAME),
        line=int(line[1]) if line else None,
        # Nothing else tells a policy from a grant: the words are in the server's language.
        by_policy=said(pq.DiagnosticField.SOURCE_FUNCTION) == "ExecWithCheckOptions" and sqlstate == "42501",
    )


def _divided(
    start: int, end: int, outcomes: Sequence[Prepared], rows: Sequence[Line], line: int | None
) -> list[tuple[int, int]]:
    """Smaller segments of a refused one: around the row that the server named, or its halves."""
    if line is not None and 1 <= line <= len(rows):
        named = start + next(place for place, outcome in enumerate(outcomes) if outcome is rows[line - 1])
        return [(a, b) for a, b in ((start, named), (named, named + 1), (named + 1, end)) if a < b]
    middle = (start + end) // 2
    return [(start, middle), (middle, end)]


def hurry(table: TargetTable) -> str:
    """The statement after which a transaction of MAX_LOCKING rows waits for locks of the application, and not long."""
    # All its waits together are to take less than half of deadlock_timeout: in a deadlock the application, which may
    # have waited for as long as we have locked, must not be the one that is ended. Where whole tables alone may be
    # locked, the first wait that is too long is the last: the briefer it is, the less likely does the server look for
    # deadlocks just then, even if the batch has been held up before.
    waits = MAX_LOCKING * max(1, len(table.foreign_keys))
    return f"SET LOCAL lock_timeout = {max(1, int(table.deadlock_timeout * 1000 / 2 / waits))}"
