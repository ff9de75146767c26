"""Activities that come later than the stream would have brought them: written beside it, and once.

What the target has is left as it is. The rest is written as the stream writes it, and in the same transaction gives way
what stood in for it: what a backfill or a repair has made up, and dead letters.

A key that the target hasn't may still be told by something that was made up. Whoever makes anything up, and whoever
erases a person, gives the row of this command in cdc_worker.replay a new nonce: then nothing is written any more before
that is looked at again, and it is begun anew, which writes what is missing by then.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import partial
from itertools import chain, groupby
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self

import msgspec
import psycopg
from psycopg import sql
from psycopg.types.json import set_json_loads

from cdc_worker import backfill, catalog, checkpoint, errors, failpoints, gap, kept, postgres, rows
from cdc_worker.activities import (
    Activity,
    Batch,
    DeadLetter,
    Key,
    Kind,
    Line,
    Person,
    Place,
    Position,
    Prepared,
    Scope,
    Skipped,
    Stretch,
    own_key,
    parsed_key,
)
from cdc_worker.changes import Change, Row, Transaction
from cdc_worker.config import Settings
from cdc_worker.history import Event, Recorded, made_up, recorded, standing
from cdc_worker.journal import Journal
from cdc_worker.log import Logger
from cdc_worker.lookups import Lookups
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.postgres import Connection, fetch_one
from cdc_worker.profile import Profile
from cdc_worker.rows import RowKey, Rows
from cdc_worker.rules import qualified
from cdc_worker.sink import Sink, finished
from cdc_worker.templates import text
from cdc_worker.transform import Outcome, Wanted
from cdc_worker.truth import Break, Log, Teller

Command = Literal["replay", "rewrite", "retry", "repair"]

MAX_TRANSACTIONS: Final = 1_000
"""So many transactions are written at once, at most."""

MADE_UP: Final[Sequence[Kind]] = ("backfill", "repair")
"""Kinds of keys."""

FOREVER: Final = LSN(2**64 - 1)

_START: Final = Position(INVALID)


@dataclass(slots=True)
class Counts:
    """What was done so far.

    `already_there` are activities whose keys the target had, `discarded` those whose dead letters were, `known` dead
    letters that were there; `replaced` is what was made up and gave way, `resolved` are dead letters that did.
    """

    activities: Counter[str] = field(default_factory=Counter)
    already_there: int = 0
    dead_letters: int = 0
    known: int = 0
    discarded: int = 0
    unlinked: int = 0
    replaced: int = 0
    resolved: int = 0


@dataclass(slots=True)
class Progress:
    """A command's row in cdc_worker.replay: the sink's `Progress`."""

    worker: str
    command: Command
    replay: str
    nonce: str
    position: Position = _START

    def advance(
        self,
        before: Position,
        after: Position,
        committed_at: datetime | None = None,
        *,
        activities: int = 0,
        dead_letters: int = 0,
    ) -> str:
        """The statement that moves it, unless it is to look again."""
        query = sql.SQL(
            "UPDATE cdc_worker.replay SET lsn = {}, activities = activities + {}, dead_letters = dead_letters + {},"
            " written_at = now() WHERE replay = {} AND nonce = {}"
        )
        return query.format(str(after.lsn), activities, dead_letters, self.replay, self.nonce).as_string()

    def fenced(self) -> errors.FencedError:
        """It is to look again."""
        return errors.FencedError(
            f'what the worker "{self.worker}" leaves out, or has made up, has changed meanwhile', hint="run it again"
        )


class _Pending(NamedTuple):
    """What came of a slice of a commit, and is not written yet."""

    outcomes: Sequence[Outcome]
    transaction: Transaction
    done: int
    complete: bool
    given: Sequence[Person]


def _register(connection: Connection, worker: str, command: Command) -> tuple[str, str]:
    """Take a place among the commands that write late; returns its number, and its nonce.

    What a repair finds missing may come back at the same moment, and would be told twice. So each of them first says
    that it is there, and then looks who else is. Raises BusyError.
    """
    connection.execute(_BURY, (worker,))
    replay, nonce = fetch_one(connection, _BEGIN, worker, command)
    failpoints.reach("late_registered")
    (others,) = fetch_one(connection, _OTHERS, worker, command)
    if others:
        connection.execute(_END, (replay,))
        names = " and ".join("verify --repair" if other == "repair" else other for other in others)
        raise errors.BusyError(
            f'for the worker "{worker}" there runs: {names}; what one finds missing the other may be writing',
            hint="wait until that has ended",
        )
    return replay, nonce


@contextmanager
def repairing(connection: Connection, worker: str) -> Iterator[None]:
    """Let nothing come late meanwhile. Raises BusyError where something does."""
    replay, _ = _register(connection, worker, "repair")
    try:
        yield
    finally:
        with suppress(psycopg.Error):
            connection.execute(_END, (replay,))


class Late:
    """Writes what comes late, through connections of its own. Use it as a context manager; `flush` in the end.

    After a FencedError, which any call may raise, `begin` anew: with the scope as it is then, and from the start.
    Raises TargetUnusableError without the rights that it takes, which are the owner's: with `changes` also to change
    the worker's activities. In a `dry_run` nothing is written: what would be is counted, and `tell` hears of it.
    """

    def __init__(
        self,
        settings: Settings,
        given: Profile,
        *,
        command: Command,
        log: Logger,
        changes: bool = False,
        dry_run: bool = False,
        tell: Callable[[Activity | DeadLetter], object] = lambda outcome: None,
    ) -> None:
        self.counts = Counts()
        self.profile, self.log = given, log
        self.rules = settings.rules(given)
        self._settings, self._command, self._changes = settings, command, changes
        self._dry_run, self._tell = dry_run, tell
        self._worker = settings.worker
        self._stack = ExitStack()
        self._pending: list[_Pending] = []
        self._size = self._bytes = 0
        self._letters: dict[str, bool] = {}
        self._late: dict[str, list[tuple[Place, list[Key]]]] = {}
        self._substitutes: _Substitutes | None = None
        self._cluster = ""
        self._sink: Sink | None = None
        self._lookups: Lookups | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt and self._sink is not None:
            self._sink.cancel()  # a session that waits for a lock would go on waiting without us
        if not self._dry_run:
            with suppress(psycopg.Error):
                self.control.execute(_END, (self.progress.replay,))
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        dsn, worker = self._settings.dsn.get_secret_value(), self._worker

        def opened(connection: Connection) -> Connection:
            return stack.enter_context(closing(connection))

        self.control = opened(postgres.connect(dsn, worker))
        set_json_loads(partial(json.loads, parse_float=Decimal), self.control)  # a float would lose digits
        self.checkpoint = checkpoint.read(self.control, worker)
        server = postgres.server(self.control)
        postgres.check_primary(server)
        postgres.check_writable(server)
        self.database = server.database
        self.time_zone = self._settings.zone(self.profile, server.time_zone)
        self.target = catalog.check(self.control, self.profile, self.rules)
        self._check_rights()
        self.writing = opened(postgres.connect(dsn, worker))
        self.writing.execute("SET cdc_worker.protect = off")
        self.reading = opened(rows.connect(self._settings))
        self._looking = opened(postgres.connect_reading(dsn, worker))
        self._row_key = catalog.row_key(self.profile.target, self.target)
        self.progress = Progress(worker, self._command, "", "")
        if not self._dry_run:
            self.progress = Progress(worker, self._command, *_register(self.writing, worker, self._command))
        self.begin()

    def _check_rights(self) -> None:
        target = sql.Identifier(*qualified(self.profile.target.table)).as_string()
        needed = {
            target: ["SELECT", "INSERT", "DELETE", *(["UPDATE"] if self._changes else [])],
            "cdc_worker.checkpoint": ["SELECT", "UPDATE"],
            "cdc_worker.replay": ["SELECT", "INSERT", "UPDATE", "DELETE"],
            "cdc_worker.dead_letter": ["SELECT", "INSERT", "UPDATE", "DELETE"],
            "cdc_worker.backfill": ["SELECT", "UPDATE"],
            "cdc_worker.skipped": ["SELECT", "INSERT"],
            "cdc_worker.excluded": ["SELECT"],
            "cdc_worker.erased": ["SELECT", "UPDATE"],
            "cdc_worker.written_key": ["SELECT", "INSERT", "DELETE"],
        }
        if self._dry_run:
            needed = {name: ["SELECT"] for name in needed}
        postgres.check_rights(self.control, needed, partly=["cdc_worker.erased"], whole=[target])

    def begin(self) -> None:
        """See what is so by now. What was not written yet is forgotten: it comes again."""
        counts = self.counts
        counts.already_there, counts.known = -counts.activities.total(), -counts.dead_letters
        counts.discarded = 0
        self._pending, self._size, self._bytes = [], 0, 0
        self.writing.rollback()
        if not self._dry_run:
            (self.progress.nonce,) = fetch_one(self.control, _NONCE, self.progress.replay)
        self.checkpoint = checkpoint.read(self.control, self._worker)
        self._substitutes = None
        if not self._dry_run and self._row_key is not None and self._anything_made_up():
            self._substitutes = _Substitutes(self)
        self._of_cluster(self._cluster or self.checkpoint.system_identifier)

    def _anything_made_up(self) -> bool:
        assert self._row_key is not None
        query = _MADE_UP.format(table=sql.Identifier(*qualified(self.profile.target.table)), key=self._row_key)
        prefix = f"{self._worker}/{self.checkpoint.system_identifier}"
        parameters = {"worker": self._worker, "backfill": f"{prefix}/backfill/", "repair": f"{prefix}/repair/"}
        return self.control.execute(postgres.with_parameters(query), parameters).fetchone() == (True,)

    def some_repaired(self) -> bool:
        """Whether the target has any repair."""
        assert self._row_key is not None
        query = _REPAIRED.format(table=sql.Identifier(*qualified(self.profile.target.table)), key=self._row_key)
        prefix = f"{self._worker}/{self.checkpoint.system_identifier}/repair/"
        return self.control.execute(postgres.with_parameters(query), {"repair": prefix}).fetchone() == (True,)

    def _of_cluster(self, cluster: str) -> None:
        """Go on with what was recorded on this cluster."""
        if self._sink is not None:
            self.progress.position = self._sink.position
        self._cluster = cluster
        self._sink = Sink(
            self.writing,
            self.profile.target,
            table=self.target,
            time_zone=self.time_zone,
            progress=self.progress,
            decode=lambda change: change,
            cluster=cluster,
            also=self._also,
        )

    def is_home(self, cluster: str, database: str | None) -> bool:
        """Whether something was recorded where the worker records now, whose stream tells the rest."""
        return cluster == self.checkpoint.system_identifier and database in (None, self.database)

    def scope(self, cluster: str, database: str | None, *, placed: bool = True) -> Scope:
        """What there are no activities of, of what was recorded on a cluster in a database (None: in this one).

        Before the slot was there nobody else can have told what was recorded, unless triggers did. Of the time before
        a restore, whoever was erased since is forgotten altogether. Of what isn't `placed`, so that nobody knows what
        was before it, are left out the tables that triggers have recorded at any time, and whoever was ever erased.
        """
        if not placed:
            told = self.control.execute(_EXCLUDED, (self._worker, cluster))
            tables = {qualified(name) for name, _, _, marked, triggers in told if triggers or marked}
            persons = {(name, key) for _, name, key, _, _ in self.control.execute(_ERASED, (self._worker,))}
            return Scope(dict.fromkeys(tables, ((INVALID, None),)), dict.fromkeys(persons, ((FOREVER, None),)))
        excluded: dict[tuple[str, str], list[Stretch]] = {}
        marked: dict[tuple[str, str], list[Stretch]] = {}
        erased: dict[Person, list[Stretch]] = {}
        current = cluster == self.checkpoint.system_identifier
        if database in (None, self.database):
            begun = self.checkpoint.slot_created_at if current else INVALID
            seen = set()
            for name, since, until, is_marked, triggers in self.control.execute(_EXCLUDED, (self._worker, cluster)):
                table, end = qualified(name), None if until is None else LSN.parse(until)
                seen.add(table)
                begin = LSN.parse(since) if triggers else max(begun, LSN.parse(since))
                if end is None or begin < end:
                    (marked if is_marked else excluded).setdefault(table, []).append((begin, end))
            captured = {table.name for table in self.rules.values() if any(table.rules.values())}
            if current:
                excluded |= {table: [(begun, None)] for table in captured - seen}
        for of, name, key, at, until in self.control.execute(_ERASED, (self._worker,)):
            stretch: Stretch = FOREVER, None
            if of == cluster:
                stretch = LSN.parse(at), None if until is None else LSN.parse(until)
            elif current:
                if until is not None:
                    continue
                stretch = INVALID, None
            erased.setdefault((name, key), []).append(stretch)
        return Scope(excluded, erased, marked)

    def look_up(self, wanted: Collection[Wanted]) -> Mapping[Wanted, Row | None]:
        """Rows of other tables as they are now."""
        if self._lookups is None:
            self._lookups = Lookups(self._looking, self.rules)
        return finished(self._lookups.fetch(wanted), self._lookups.connection)

    def add(
        self,
        outcomes: Sequence[Outcome],
        transaction: Transaction,
        *,
        cluster: str,
        done: int,
        complete: bool,
        given: Sequence[Person] = (),
    ) -> None:
        """Take what came of a slice of a commit on a cluster, as `Batch.add` does; some of it is written at once."""
        if cluster != self._cluster:
            self.flush()
            self._of_cluster(cluster)
        if outcomes or given:
            commit = msgspec.structs.replace(transaction, changes=[], messages=[], payloads=[], received=(), answers={})
            self._pending.append(_Pending(outcomes, commit, done, complete, given))
            self._size += len(outcomes)
            self._bytes += sum(len(of) for of in transaction.payloads if not isinstance(of, Change))
        full = self._size >= Batch.MAX_OUTCOMES or self._bytes >= Batch.MAX_SIZE
        if full or len(self._pending) >= MAX_TRANSACTIONS:
            self.flush()

    def flush(self) -> None:
        """Write what was taken, as far as it is missing."""
        pending, self._pending, self._size, self._bytes = self._pending, [], 0, 0
        sink = self._sink
        assert sink is not None
        if not pending:
            return
        told = [of for slice_ in pending for of in slice_.outcomes if not isinstance(of, Skipped)]
        keys = [of.change_key for of in told]
        existing = self.existing(keys)
        asked = [*keys, *dict.fromkeys(map(_of_change, keys))]
        self._letters = dict(self.control.execute(_LETTERS, (self._worker, asked)).fetchall() if keys else [])
        stale = existing & self._letters.keys()
        self.counts.resolved += len(stale)
        if self._dry_run:
            self._count([of for of in told if self._is_missing(of, existing)])
            return
        if stale:
            self.control.execute(_RESOLVE.format(self._worker, sorted(stale)))
        self._tried(of for of in told if isinstance(of, DeadLetter) and of.change_key not in existing)
        batch = Batch(sink.position)
        activities: list[Activity] = []
        for outcomes, transaction, done, complete, given in pending:
            missing = [of for of in outcomes if isinstance(of, Skipped) or self._is_missing(of, existing)]
            activities += (of for of in missing if isinstance(of, Activity))
            lines = [sink.line(of, of.change) if isinstance(of, Activity) else of for of in missing]
            batch.add(lines, transaction, done=done, complete=complete, given=given)
        if batch.empty:
            return
        self._late = self._substitutes.of(activities) if self._substitutes is not None else {}
        self._write(sink, batch)

    def existing(self, keys: Collection[str]) -> set[str]:
        """Those of these change keys that the target has."""
        assert self._sink is not None
        return finished(self._sink.existing(keys), self._sink.connection) if keys else set()

    def _tried(self, letters: Iterable[DeadLetter]) -> None:
        """Note of dead letters that wait how they have failed once more, unless another command has written them."""
        again = [letter for letter in letters if self._letters.get(letter.change_key) is False]
        if not again:
            return
        written = self.existing([letter.change_key for letter in again])
        if written:
            self.control.execute(_RESOLVE.format(self._worker, sorted(written)))
        rest = kept.encoded(self._worker, (letter for letter in again if letter.change_key not in written))
        self.control.execute(_TRIED, (rest.decode(),))

    def _resolved(self, keys: Iterable[str]) -> set[str]:
        """The dead letters that go when activities with these keys are written."""
        return {of for key in keys for of in (key, _of_change(key))} & self._letters.keys()

    def _count(self, outcomes: Collection[Activity | DeadLetter]) -> None:
        """Count what would be written."""
        self.counts.resolved += len(self._resolved(of.change_key for of in outcomes if isinstance(of, Activity)))
        for outcome in outcomes:
            if isinstance(outcome, Activity):
                self.counts.activities[outcome.fields["type"]] += 1
            else:
                self.counts.dead_letters += 1
            self._tell(outcome)

    def _is_missing(self, outcome: Activity | DeadLetter, existing: set[str]) -> bool:
        key, counts = outcome.change_key, self.counts
        if key in existing:
            counts.already_there += 1
        elif isinstance(outcome, DeadLetter) and key in self._letters:
            counts.known += 1
        elif self._letters.get(key) or self._letters.get(_of_change(key)):
            counts.discarded += 1
        else:
            return True
        return False

    def _write(self, sink: Sink, batch: Batch) -> None:
        counts = self.counts
        try:
            written = finished(sink.write(batch), sink.connection)
        except KeyboardInterrupt:
            sink.cancel()
            raise
        except psycopg.errors.DeadlockDetected as error:  # with another command, which writes the same in another order
            raise self.progress.fenced() from error
        failpoints.reach("late_written")
        self._tried(written.dead_letters)
        refused = {letter.change_key for letter in written.dead_letters}
        known = sum(letter in self._letters for letter in refused)
        not_ours = refused | written.existing
        ours = [of for of in batch.outcomes if isinstance(of, Line) and of.change_key not in not_ours]
        counts.activities.update(of.type for of in ours)
        counts.resolved += len(self._resolved(of.change_key for of in ours))
        counts.already_there += written.already_there
        counts.dead_letters += len(refused) - known
        counts.known += known
        counts.unlinked += written.unlinked
        counts.replaced += written.deleted
        if self._substitutes is not None:
            self._substitutes.heed(batch.outcomes)
        self.log.debug(
            "batch_written",
            transactions=batch.transactions,
            activities=written.activities,
            dead_letters=len(refused),
            already_there=written.already_there,
            replaced=written.deleted,
            lsn=str(sink.position),
        )

    def _also(self, lines: Sequence[Line]) -> str:
        """What gives way to rows, in the transaction in which they were written."""
        statements: list[str] = []
        resolved = [*self._resolved(line.change_key for line in lines)]
        late: dict[Place, list[Key]] = {}
        for line in lines:
            for place, keys in self._late.get(line.change_key, ()):
                late.setdefault(place, []).extend(keys)
        if self._substitutes is not None:
            worker, clusters = self._worker, self._substitutes.clusters
            statements.append(backfill.replacement(self.profile.target, self.target, worker, clusters, late))
            # What could not be made up must not be tried again.
            resolved += {own_key(worker, clusters, key) for keys in late.values() for key in keys}
        if resolved:
            statements.append(_RESOLVE.format(self._worker, resolved).as_string())
        return "".join(f"{statement}; " for statement in statements)

    @contextmanager
    def transaction(self, at: Position, *, activities: int = 0, dead_letters: int = 0) -> Iterator[Connection]:
        """A transaction in which its user writes by itself, unless it is to look again. Flush before it."""
        with self.writing.transaction():
            advance = self.progress.advance(at, at, activities=activities, dead_letters=dead_letters)
            if self.writing.execute(advance.encode()).rowcount == 0:
                raise self.progress.fenced()
            yield self.writing


class _Table(NamedTuple):
    """What is recorded of a captured table, and how its rows are found."""

    recorded: Recorded
    rows: Rows
    journal: Journal
    teller: Teller
    told: frozenset[str]
    """The rules that a backfill may have told."""


class _Told(NamedTuple):
    """An activity that comes late, what its key says, and the key of the row; and the one that it had before it."""

    activity: Activity
    key: Key
    row: RowKey
    before: RowKey


class _Line(NamedTuple):
    """Rows by all keys that they have had: what is recorded of them, when they got others, and which are one row's."""

    events: dict[str, list[Event]]
    left: dict[str, list[Place]]
    pairs: list[tuple[str, str]]


class _Substitutes:
    """What was made up in place of activities that come late."""

    def __init__(self, late: Late) -> None:
        self._worker, self.clusters = late.checkpoint.worker, gap.clusters(late.control, late.checkpoint)
        self._until = late.checkpoint.position.lsn
        self._tables: dict[tuple[str, str], _Table] = {}
        self._unmended: dict[tuple[str, str], list[Event]] = {}
        prefix = f"{self._worker}/{self.clusters.current}/"
        for name, table in late.profile.tables.items():
            meant = recorded(late.profile, name)
            if not table.rules or not table.key or not meant.links.keys() >= {*table.key}:
                continue  # nobody finds what is recorded of its rows, so nothing was made up of them
            found = Rows(late.reading, late.rules[qualified(name)])
            journal = Journal(
                late.control,
                late.profile.target,
                table=late.target,
                recorded=meant,
                rows=found,
                checkpoint=late.checkpoint,
            )
            teller = Teller(Log(late.profile, name), worker=self._worker, clusters=self.clusters, named=found.subject)
            told = frozenset(rule.label for rule in table.rules if rule.backfill is not None)
            self._tables[qualified(name)] = _Table(meant, found, journal, teller, told)
        column = next((column for column, of in late.profile.target.columns.items() if of == "metadata"), None)
        for name, metadata in late.control.execute(
            _UNMENDED, (column, self._worker, *(f"{prefix}{kind}/" for kind in MADE_UP))
        ):
            key = self._parsed(name)
            if key is not None and (of := self._tables.get(qualified(key.table))) is not None:
                what = of.recorded.what(key.rule)
                event = Event(key.subject, key.rule, what, key.place, key.kind, change_key=name, metadata=metadata)
                self._unmended.setdefault((key.table, key.subject), []).append(event)
        self._mended = bool(self._unmended) or late.some_repaired()

    def _parsed(self, change_key: str) -> Key | None:
        return parsed_key(self._worker, self.clusters, change_key)

    def of(self, activities: Iterable[Activity]) -> dict[str, list[tuple[Place, list[Key]]]]:
        """The keys that may have been made up for activities, by theirs, with their places."""
        by_table: dict[tuple[str, str], list[_Told]] = {}
        for activity in activities:
            change = activity.change
            table = self._tables.get((change.schema, change.table))
            key = self._parsed(activity.change_key)
            if table is None or key is None:
                continue
            old, new = (_row_key(row, table.rows.key) for row in (change.old, change.new))
            moved = bool(old and new) and old != new and bool(table.recorded.changes.get(key.rule))
            if row := new or old:
                told = _Told(activity, key, row, old if moved else ())
                by_table.setdefault((change.schema, change.table), []).append(told)
        found: dict[str, list[tuple[Place, list[Key]]]] = {}
        for name, concerned in by_table.items():
            for told, keys in self._of_table(self._tables[name], concerned):
                if not keys:
                    continue
                found.setdefault(told.activity.change_key, []).append((told.key.place, keys))
        return found

    def _of_table(self, table: _Table, concerned: Sequence[_Told]) -> Iterator[tuple[_Told, list[Key]]]:
        until, meant = self._until, table.recorded
        names = {row: table.rows.subject(row) for told in concerned for row in (told.row, told.before) if row}
        events = table.journal.of(names, until=until, since=until)
        emptied = table.journal.emptied(until)
        unmended = {subject: self._unmended.get((meant.table, subject), []) for subject in names.values()}
        mended = {
            row
            for row, subject in names.items()
            if unmended[subject] or any(of.kind == "repair" for of in events[subject])
        }
        whole = table.journal.of(mended, until=until) if mended else {}
        for told in concerned:
            event = self._event(table, told)
            events[event.subject].append(event)
        for told in concerned:
            key, subject = told.key, names[told.row]
            if key.rule in table.told:
                for of, known in self._followed(table, subject, key.place, events):
                    event = Event(of, key.rule, meant.what(key.rule), key.place)
                    yield told, made_up(meant, event, known, emptied)
            if told.before:  # what is told of it by that key was made up again by this one
                for rule in table.told & self._rules_before(table, told, events, emptied):
                    event = Event(subject, rule, meant.what(rule), key.place)
                    yield told, made_up(meant, event, events[subject], emptied)
            if told.row in mended:
                yield told, self._filled(table, told, whole[subject], unmended[subject])
        if self._mended or any(told.before for told in concerned):
            yield from self._contradicted(table, concerned, emptied)

    def _contradicted(
        self, table: _Table, concerned: Sequence[_Told], emptied: Sequence[Place]
    ) -> Iterator[tuple[_Told, list[Key]]]:
        """What was made up of rows, by whichever key, and can't be so any more.

        With what comes late the log breaks off at it, and hasn't before. Of what happened after it was read it says
        nothing.
        """
        line = self._line(table, concerned)
        for group in _joined(line.pairs):
            late = sorted(
                (of for of in concerned if of.key.kind == "stream" and table.rows.subject(of.row) in group),
                key=lambda of: of.key.place,
            )
            events = {subject: [*line.events.get(subject, ())] for subject in group}
            left = {subject: [*line.left.get(subject, ())] for subject in group}
            for subject in group:
                events[subject] += self._unmended.get((table.recorded.table, subject), ())
            before = _breaks(table.teller, events, emptied, left)
            for place, of_change in groupby(late, key=lambda of: of.key.place):
                if not any(map(_is_made_up, chain.from_iterable(events.values()))):
                    break
                told = [*of_change]
                for of in told:
                    event = self._event(table, of)
                    events[event.subject].append(event)
                    if of.before:
                        left[table.rows.subject(of.before)].append(place)
                gone: list[Key] = []
                while True:
                    now = _breaks(table.teller, events, emptied, left)
                    false = {
                        event.change_key
                        for of in now.keys() - before.keys()
                        for event in (now[of].before, now[of].after)
                        if event is not None and _is_made_up(event) and (table.teller.read_at(event) or place) >= place
                    }
                    if not false:
                        break
                    gone += filter(None, (self._parsed(key) for key in false if key is not None))
                    events = {
                        name: [of for of in found if of.change_key not in false] for name, found in events.items()
                    }
                before = now
                yield from ((of, gone) for of in told)
        for of in concerned:
            if of.before:
                table.journal.add_move(self._event(table, of))

    def _line(self, table: _Table, concerned: Sequence[_Told]) -> _Line:
        """All that is recorded of rows by now, whatever keys they had before and have got since."""
        line = _Line({}, {}, [])
        named = table.rows.subject
        more = {key for told in concerned for key in (told.row, told.before) if key}
        line.pairs.extend((named(told.row), named(told.before or told.row)) for told in concerned)
        known = set[RowKey]()
        while more:
            known |= more
            moves = table.journal.moves(more, until=self._until)
            line.left.update({subject: [of.place for of in found] for subject, found in moves.items()})
            ends = {of.key for found in moves.values() for of in found}
            for subject, found in table.journal.of(more, until=self._until).items():
                line.events.setdefault(subject, []).extend(found)
                ends |= {of.before for of in found if of.before}
                line.pairs.extend((subject, named(of.key)) for of in found if of.key)
            line.pairs.extend((of.subject, named(of.before)) for found in moves.values() for of in found)
            more = ends - known
        line.pairs.extend((of.subject, named(of.before)) for found in line.events.values() for of in found if of.before)
        return line

    def _event(self, table: _Table, told: _Told) -> Event:
        """What comes late, as an event of its row."""
        return Event(
            table.rows.subject(told.row),
            told.key.rule,
            "moved" if told.before else table.recorded.what(told.key.rule),
            told.key.place,
            told.key.kind,
            before=told.before,
            key=told.row,
            change_key=told.activity.change_key,
            metadata=told.activity.fields.get("metadata"),
        )

    def _rules_before(
        self, table: _Table, told: _Told, events: Mapping[str, Sequence[Event]], emptied: Sequence[Place]
    ) -> set[str]:
        """The rules that have told of a row before it got another key, by any that it had."""
        known, rules = dict(events), set[str]()
        place, row = told.key.place, told.before
        while row:
            subject = table.rows.subject(row)
            if subject not in known:
                known |= table.journal.of([row], until=self._until, since=self._until)
            earlier = [event for event in known[subject] if event.place < place]
            found = standing(subject, earlier, [of for of in emptied if of < place])
            rules |= found.rules
            place, row = found.after, found.before
        return rules

    def _followed(
        self, table: _Table, subject: str, place: Place, events: Mapping[str, Sequence[Event]]
    ) -> Iterator[tuple[str, Sequence[Event]]]:
        """A row's keys up to a place, back to its first one, each with what is recorded there."""
        seen: set[str] = set()
        known = dict(events)
        while subject not in seen:
            seen.add(subject)
            yield subject, known[subject]
            turns = [of for of in known[subject] if of.what != "told" and of.place <= place]
            last = max(turns, key=lambda of: of.place, default=None)
            if last is None or not last.before:
                return
            place, subject = last.place, table.rows.subject(last.before)
            if subject not in known:
                known |= table.journal.of([last.before], until=self._until, since=self._until)

    def _filled(self, table: _Table, told: _Told, events: Sequence[Event], unmended: Sequence[Event]) -> list[Key]:
        """The repairs that stand in the hole which is filled, also those that could not be written.

        A repair stands before what has shown that something is missing, which may be long after it was lost. Between
        the two nothing was recorded of the same columns, and the row has neither come to be nor gone.
        """
        names = table.recorded.changes.get(told.key.rule, ())
        columns = _columns(told.activity.fields["metadata"], names)
        repairs = []
        for of in (*events, *unmended):
            if of.kind == "repair" and (key := self._parsed(of.change_key or "")) is not None:
                repairs.append((key, columns if of in unmended else _columns(of.metadata, names)))
        found = []
        for key, theirs in repairs:
            first, last = sorted((key.place, told.key.place))
            between = [of for of in events if of.kind == "stream" and first < of.place < last]
            left = columns & theirs
            for of in between:
                left -= _columns(of.metadata, names) if of.rule == key.rule else frozenset()
            if key.rule == told.key.rule and left and all(of.what == "told" for of in between):
                found.append(key)
        return found

    def heed(self, outcomes: Sequence[Prepared]) -> None:
        """Look again for what is remembered, where that is about what was written now."""
        written = {of.change_key.rpartition("/")[2] for of in outcomes if isinstance(of, Line)}
        for table in self._tables.values():
            if not written.isdisjoint(table.recorded.emptied):
                table.journal.forget()


def _is_made_up(event: Event) -> bool:
    return event.kind in MADE_UP


def _breaks(
    teller: Teller, events: Mapping[str, Sequence[Event]], emptied: Sequence[Place], left: Mapping[str, Sequence[Place]]
) -> dict[tuple[str, str, str], Break]:
    """Where the histories of rows break off."""
    stories = teller.stories(events, emptied=emptied, left=left)
    return {
        (gap.what, _key_of(gap.before), _key_of(gap.after)): gap for story in stories.values() for gap in story.breaks
    }


def _key_of(event: Event | None) -> str:
    return "" if event is None else event.change_key or ""


def _joined(pairs: Iterable[tuple[str, str]]) -> Collection[frozenset[str]]:
    """What belongs together, if that is so of each of these pairs."""
    groups: dict[str, set[str]] = {}
    for one, other in pairs:
        both = groups.get(one, {one}) | groups.get(other, {other})
        groups |= dict.fromkeys(both, both)
    return {frozenset(group) for group in groups.values()}


def _columns(metadata: Mapping[str, Any] | None, names: Sequence[str]) -> frozenset[str]:
    """The columns of which an activity tells that they changed; one that always tells the same has none to name."""
    found = [metadata[name] for name in names if metadata and isinstance(metadata.get(name), dict)]
    return frozenset(column for of in found for column in of) if found else frozenset("*")


def _row_key(row: Row | None, columns: Sequence[str]) -> RowKey:
    """A row's key, or nothing if it isn't known."""
    values = [None if row is None else row.get(column) for column in columns]
    return () if None in values else tuple(text(value) for value in values)


_BURY: Final = """
DELETE FROM cdc_worker.replay
WHERE worker = %s AND NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.pid = replay.backend_pid
                                  AND coalesce(a.backend_start, replay.backend_start) = replay.backend_start)
"""

_BEGIN: Final = """
INSERT INTO cdc_worker.replay (worker, command, backend_start)
SELECT %s, %s, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()
RETURNING replay::text, nonce::text
"""

_OTHERS: Final = """
SELECT coalesce(array_agg(DISTINCT command ORDER BY command), '{}') FROM cdc_worker.replay
WHERE worker = %s AND (command = 'repair') <> (%s = 'repair')
"""

_NONCE: Final = "SELECT nonce::text FROM cdc_worker.replay WHERE replay = %s"

_END: Final = "DELETE FROM cdc_worker.replay WHERE replay = %s"


def _of_change(key: str) -> str:
    """The key of a dead letter that stands for all that its change would have been told as."""
    return f"{key.rpartition('/')[0]}/*"


_LETTERS: Final = """
SELECT change_key, discarded_at IS NOT NULL FROM cdc_worker.dead_letter WHERE worker = %s AND change_key = ANY (%s)
"""

# All that is known of it by now: columns may be masked that were not, and older ones were kept with less.
_TRIED: Final = """
UPDATE cdc_worker.dead_letter AS letter
SET attempts = attempts + 1, tried_at = now(), kind = again.kind, reason = again.reason, sqlstate = again.sqlstate,
    constraint_name = again.constraint_name, change = again.change, fields = again.fields,
    xid = coalesce(again.xid, letter.xid), commit_lsn = coalesce(again.commit_lsn, letter.commit_lsn),
    end_lsn = coalesce(again.end_lsn, letter.end_lsn), context = coalesce(again.context, letter.context),
    found = coalesce(again.found, letter.found), masked = again.masked
FROM jsonb_to_recordset(%s) AS again (worker text, change_key text, kind text, reason text, sqlstate text,
    constraint_name text, change jsonb, fields jsonb, xid bigint, commit_lsn pg_lsn, end_lsn pg_lsn, context jsonb,
    found jsonb, masked text[])
WHERE letter.worker = again.worker AND letter.change_key = again.change_key
"""

_UNMENDED: Final = """
SELECT change_key, (fields ->> %s)::jsonb FROM cdc_worker.dead_letter
WHERE worker = %s AND (starts_with(change_key, %s) OR starts_with(change_key, %s))
"""

# A query, because it is to be told from what was made up.
_RESOLVE: Final = sql.SQL(
    "WITH resolved AS (DELETE FROM cdc_worker.dead_letter WHERE worker = {} AND change_key = ANY ({}) RETURNING 1)"
    " SELECT FROM resolved"
)

# A repair may be the only one who has made anything up, and it leaves no other trace.
_MADE_UP: Final = sql.SQL("""
SELECT EXISTS (SELECT FROM cdc_worker.backfill WHERE worker = %(worker)s)
    OR EXISTS (SELECT FROM cdc_worker.dead_letter WHERE worker = %(worker)s AND starts_with(change_key, %(repair)s))
    OR EXISTS (SELECT FROM {table} WHERE starts_with({key}, %(backfill)s) OR starts_with({key}, %(repair)s))
""")

_REPAIRED: Final = sql.SQL("SELECT EXISTS (SELECT FROM {table} WHERE starts_with({key}, %(repair)s))")

_EXCLUDED: Final = """
SELECT table_name, from_lsn::text, until_lsn::text, marked, triggers FROM cdc_worker.excluded
WHERE worker = %s AND system_identifier = %s
"""

_ERASED: Final = """
SELECT system_identifier, field, key, erased_lsn::text, until_lsn::text FROM cdc_worker.erased WHERE worker = %s
"""
