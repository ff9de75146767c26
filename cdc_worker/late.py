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
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self

import msgspec
import psycopg
from psycopg import sql
from psycopg.types.json import set_json_loads

from cdc_worker import backfill, catalog, checkpoint, errors, failpoints, kept, postgres, rows
from cdc_worker.activities import (
    Activity,
    Batch,
    DeadLetter,
    Key,
    Line,
    Person,
    Place,
    Position,
    Scope,
    Skipped,
    Stretch,
    own_key,
)
from cdc_worker.changes import Change, Row, Transaction
from cdc_worker.config import Settings
from cdc_worker.log import Logger
from cdc_worker.lookups import Lookups
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.postgres import Connection, Statement, fetch_one
from cdc_worker.profile import Profile
from cdc_worker.rules import qualified
from cdc_worker.sink import Sink, finished
from cdc_worker.substitutes import Substitutes, any_made_up
from cdc_worker.transform import Outcome, Wanted

Command = Literal["replay", "rewrite", "retry", "repair"]

MAX_TRANSACTIONS: Final = 1_000
"""So many transactions are written at once, at most."""

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
    ) -> Statement:
        """The statement that moves it, unless it is to look again."""
        query = (
            "UPDATE cdc_worker.replay SET lsn = {}, activities = activities + {}, dead_letters = dead_letters + {},"
            " written_at = now() WHERE replay = {} AND nonce = {}"
        )
        return Statement(query, (str(after.lsn), activities, dead_letters, self.replay, self.nonce))

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
        self._substitutes: Substitutes | None = None
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
        target = self.profile.target
        if not self._dry_run and any_made_up(self.control, target, self.target, self.checkpoint):
            self._substitutes = Substitutes(
                self.control,
                self.profile,
                self.rules,
                table=self.target,
                checkpoint=self.checkpoint,
                reading=self.reading,
            )
        self._of_cluster(self._cluster or self.checkpoint.system_identifier)

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
            advance = self.progress.advance(at, at, activities=activities, dead_letters=dead_letters).literal
            if self.writing.execute(advance.encode()).rowcount == 0:
                raise self.progress.fenced()
            yield self.writing


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

# A query, because it is to be told from what was made up.
_RESOLVE: Final = sql.SQL(
    "WITH resolved AS (DELETE FROM cdc_worker.dead_letter WHERE worker = {} AND change_key = ANY ({}) RETURNING 1)"
    " SELECT FROM resolved"
)

_EXCLUDED: Final = """
SELECT table_name, from_lsn::text, until_lsn::text, marked, triggers FROM cdc_worker.excluded
WHERE worker = %s AND system_identifier = %s
"""

_ERASED: Final = """
SELECT system_identifier, field, key, erased_lsn::text, until_lsn::text FROM cdc_worker.erased WHERE worker = %s
"""
