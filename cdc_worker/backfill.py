"""Backfill: activities for rows that existed before the worker, made up from the rows as they are now.

A row is created once in the log, whoever tells of it. To know whether the stream has told, or will tell, of a row:

    L       up to where all that is committed is seen by who reads now: a position a moment ago, at which all
            transactions that were in progress are over
    rows    a short read, by the index of their key
    F       where the WAL is after it: whatever the read has seen was committed by then
    wait    until the checkpoint has passed F
    events  what the target has recorded of these rows up to F

Now all is recorded that ever will be of what we have seen, and a row whose creation isn't among it since the key was
last deleted was there before. The verdict depends on the row and on what was recorded up to F alone, so it is the same
whoever comes to it; and so is the key under which it is written, which says from which deletion on the row has had its
own key (or from which change of key on, back to where it was first). Two backfills at once write one activity.

What was recorded between L and F the read may have seen, or not: such a row is read again, after all transactions are
over that are in progress by then, unless there is nothing to tell of it anyway.

A row may get a key behind us that had one ahead of us before: in the end, rows of which a change of key was recorded
since we began are read once more. And a creation may be recorded after all, where it was a dead letter: who records it
lets what was made up give way, in the same transaction (`replacement`).

Activities, and how far we have come, are one transaction, as the stream's are. It touches nothing if another process
has got further meanwhile, or if a person was erased: both begin anew from what is now so.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import psycopg
from psycopg import sql
from pydantic import BaseModel, Field

from cdc_worker import catalog, checkpoint, errors, failpoints, postgres, profile, rows
from cdc_worker.activities import Activity, Batch, Clusters, DeadLetter, Key, Line, Place, Position, Scope, own_key
from cdc_worker.catalog import TargetTable
from cdc_worker.changes import Change, Row, Transaction
from cdc_worker.config import Settings
from cdc_worker.fence import Fence
from cdc_worker.history import EVERYTHING, Event, backfill_key, dated, recorded, standing
from cdc_worker.journal import Journal
from cdc_worker.log import Logger
from cdc_worker.lookups import Lookups
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Connection, Statement
from cdc_worker.profile import Profile, Target
from cdc_worker.progress import shown
from cdc_worker.rows import Read, RowKey, Rows
from cdc_worker.rules import qualified, subject
from cdc_worker.sink import Sink, finished
from cdc_worker.transform import ERASED, Transformer, Wanted, settled

CHUNK: Final = 1_000
"""Rows that are read and written at once, if nothing else is asked for."""

ROUNDS: Final = 100
"""So often a row that changes all the time is read again, at most."""

SAMPLES: Final = 3
"""So many activities of each type a dry run shows."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """Which rows, and how fast. Keys are texts, one for each column of the index that the rows are read by.

    `since` and `until` are about the dates of activities, in the target's zone if they have none. The row with the key
    `from_key` is not meant, nor is what happened at `until`.
    """

    since: datetime | None = None
    until: datetime | None = None
    from_key: RowKey = ()
    to_key: RowKey = ()
    chunk_size: int = CHUNK
    rate: float | None = None

    @property
    def part(self) -> str:
        """Which rows, in words; the speed doesn't matter."""
        said = [
            ("since", None if self.since is None else self.since.isoformat()),
            ("until", None if self.until is None else self.until.isoformat()),
            ("from", subject(self.from_key) if self.from_key else None),
            ("to", subject(self.to_key) if self.to_key else None),
        ]
        return " ".join(f"{name} {shlex.quote(value)}" for name, value in said if value is not None)


_PLAIN: Final = Wishes()


class Sample(BaseModel):
    """An activity that would be written."""

    type: str = Field(description="its type")
    subject: str = Field(description="key of its row")
    occurred_at: str = Field(description="how it would be dated")
    description: str = Field(description="its text")


class Backfilled(BaseModel):
    """What was done about a table, or would be. These are the fields of `backfill --json`, one object a table."""

    table: str = Field(description="schema and table")
    part: str = Field(description="which of its rows, as it was asked; empty for all")
    resumed: bool = Field(
        default=False, description="an earlier run had not come to the end: this one has gone on from there"
    )
    rows: int = Field(default=0, description="rows that were read")
    activities: dict[str, int] = Field(
        default={}, description="activities written, by type; with --dry-run, that would be"
    )
    already_there: int = Field(
        default=0, description="of those, activities that another backfill wrote at the same time"
    )
    dead_letters: int = Field(default=0, description="activities that the target refused, or a rule failed to make")
    undecided: int = Field(default=0, description="rows left out for now, because transactions of others go on and on")
    dry_run: bool = Field(default=False, description="whether nothing was written")
    samples: list[Sample] = Field(default=[], description="some of the activities; only with --dry-run")


def lines(done: Backfilled) -> Iterator[str]:
    """What was done about a table as a person reads it."""
    what = f"{done.table}{f' ({done.part})' if done.part else ''}"
    total = sum(done.activities.values())
    told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(done.activities.items())) or "none"
    verb = "would be written" if done.dry_run else "written"
    yield f"{what}: {done.rows:,} rows read, {total:,} activities {verb}: {told}"
    for sample in done.samples:
        yield f"  {sample.occurred_at}  {sample.type}  {sample.description}"
    if done.dead_letters:
        yield f"  {done.dead_letters:,} became dead letters: cdc-worker dead-letters list"
    if done.undecided:
        yield f"  {done.undecided:,} rows are left out for now: transactions go on that may be about them; run it again"


def tables(given: Profile, names: Collection[str]) -> list[str]:
    """The tables of a profile that are meant, as it names them: those with these names, or all that can be done.

    Raises SettingsError for one that isn't there, or of which nothing is told.
    """
    can = [name for name, table in given.tables.items() if any(rule.backfill for rule in table.rules)]
    known = {qualified(name): name for name in given.tables}
    found = []
    for name in names:
        if qualified(name) not in known:
            raise errors.SettingsError(
                f'the profile "{given.name}" has no table "{name}"', hint=f"those it has: {', '.join(given.tables)}"
            )
        found.append(known[qualified(name)])
    if lacking := [name for name in found or [*given.tables][:1] if name not in can and (found or not can)]:
        what = f"the table {lacking[0]} has" if found else "there is"
        raise errors.SettingsError(
            f'nothing to backfill: {what} no rule with "backfill" in the profile "{given.name}"',
            hint=f"those that have: {', '.join(can)}" if can else 'say in a rule\'s "backfill" when it happened',
        )
    return list(dict.fromkeys(found or can))


def backfill(
    settings: Settings,
    given: Profile,
    names: Collection[str] = (),
    wishes: Wishes = _PLAIN,
    *,
    log: Logger,
    dry_run: bool = False,
) -> Iterator[Backfilled]:
    """Write what is missing of tables, one after another. May be interrupted anywhere, and goes on from there.

    Raises SettingsError for wishes that mean nothing, and NotRunningError where no worker runs beside it.
    """
    meant = tables(given, names)
    if (wishes.from_key or wishes.to_key) and len(meant) > 1:
        raise errors.SettingsError("keys are of one table", hint=f"name one of: {', '.join(meant)}")
    with ExitStack() as stack:
        edges = _Edges(stack, settings, given, log)
        edges.check_rights(meant, dry_run=dry_run)
        works = [edges.work(name, wishes) for name in meant]
        if not dry_run:
            edges.fence.check()
        for work in works:
            yield work.try_out() if dry_run else work.run()


class _Edges:
    """The connections, and what is the same for all tables."""

    def __init__(self, stack: ExitStack, settings: Settings, given: Profile, log: Logger) -> None:
        dsn, worker = settings.dsn.get_secret_value(), settings.worker

        def opened(connection: Connection) -> Connection:
            return stack.enter_context(closing(connection))

        self.settings, self.profile, self.log = settings, given, log
        settings.rules(given)  # which has all that is wrong with it
        self.rules = settings.backfill_rules(given)
        self.control = opened(postgres.connect(dsn, worker))
        self.checkpoint = checkpoint.read(self.control, worker)
        read = profile.backfilled(given)
        self.target = catalog.check(self.control, read, self.rules)
        self.reading = opened(rows.connect(settings))
        self.writing = opened(postgres.connect(dsn, worker))
        self.fence = Fence(opened(postgres.connect(dsn, worker)), settings, log)
        self._lookups = Lookups(opened(postgres.connect_reading(dsn, worker)), self.rules)
        self.time_zone = settings.zone(given, postgres.server(self.control).time_zone)

    def check_rights(self, names: Collection[str], *, dry_run: bool) -> None:
        """Raise TargetUnusableError unless our role may read, and if it is to, write what it takes."""
        target = _relation(self.profile.target.table)
        read = [*map(_relation, names)]
        looked_up = [sql.Identifier(*name).as_string() for name, table in self.rules.items() if table.looked_up]
        needed = {relation: ["SELECT"] for relation in (*read, *looked_up, target, "cdc_worker.skipped")}
        if not dry_run:
            needed[target] = ["SELECT", "INSERT"]
            needed["cdc_worker.backfill"] = ["SELECT", "INSERT", "UPDATE"]
            needed["cdc_worker.replay"] = ["SELECT", "UPDATE"]
        postgres.check_rights(self.control, needed, partly=[*read, *looked_up], whole=[*read, target])

    def look_up(self, wanted: Collection[Wanted]) -> Mapping[Wanted, Row | None]:
        """Rows of other tables as they are now."""
        return finished(self._lookups.fetch(wanted), self._lookups.connection)

    def work(self, name: str, wishes: Wishes) -> _Work:
        """What there is to do about a table."""
        found = Rows(self.reading, self.rules[qualified(name)])
        for key in filter(None, (wishes.from_key, wishes.to_key)):
            _check_key(found, key)
        return _Work(self, name, found, wishes)


def _relation(name: str) -> str:
    return sql.Identifier(*qualified(name)).as_string()


def _check_key(found: Rows, key: RowKey) -> None:
    name, columns = ".".join(found.table.name), ", ".join(found.key)
    if len(key) != len(found.key):
        raise errors.SettingsError(
            f"{' '.join(key)} can't be a key of {name}, which is {columns}", hint="give a value for each column"
        )
    try:
        found.of([key])
    except psycopg.DataError:
        types = ", ".join(found.columns[column].declared for column in found.key)
        raise errors.SettingsError(
            f"{' '.join(key)} can't be a key of {name}: {columns} is of the type {types}", hint="name a key of a row"
        ) from None


_START: Final = Position(LSN(0))


@dataclass(slots=True)
class Mark:
    """How far a backfill of a table has come, in its row of cdc_worker.backfill: the sink's `Progress`.

    To the sink a chunk is a commit, whose changes are rows: up to `last_key` they were dealt with before the chunk
    that has `keys`, which begins at `position`.
    """

    worker: str
    table: str
    part: str
    nonce: str
    last_key: RowKey | None
    rows: int
    since: LSN
    position: Position = _START
    keys: Sequence[RowKey] = ()

    def begin(self, keys: Sequence[RowKey], position: Position) -> Batch:
        """Begin the next chunk where the last one has ended; returns its batch. Without keys the mark stays."""
        self.last_key, self.position, self.keys = self.next_key, position, keys
        return Batch(position)

    def chunk(self, at: datetime) -> Transaction:
        """The chunk as a commit of rows that were read then."""
        lsn = self.position.lsn
        return Transaction(0, LSN(lsn + 1), LSN(lsn + 2), at, [], [], [], 0, True, True)

    @property
    def next_key(self) -> RowKey | None:
        """After which key the next chunk begins."""
        return self.keys[-1] if self.keys else self.last_key

    def _done(self, at: Position) -> int:
        if at.commit_lsn:
            return min(at.changes, len(self.keys))
        return len(self.keys) if at.lsn > self.position.lsn else 0

    def _key(self, at: Position) -> list[str] | None:
        done = self._done(at)
        key = self.keys[done - 1] if done else self.last_key
        return None if key is None else list(key)

    def advance(
        self,
        before: Position,
        after: Position,
        committed_at: datetime | None = None,
        *,
        activities: int = 0,
        dead_letters: int = 0,
    ) -> Statement:
        """The statement that moves it from one position to another, if nobody else has, and nobody was erased."""
        query = (
            "UPDATE cdc_worker.backfill SET last_key = {}::text[], rows = rows + {}, activities = activities + {},"
            " dead_letters = dead_letters + {}, written_at = now() WHERE worker = {} AND table_name = {} AND part = {}"
            " AND nonce = {} AND finished_at IS NULL AND last_key IS NOT DISTINCT FROM {}::text[]"
        )
        values = (
            self._key(after),
            self._done(after) - self._done(before),
            activities,
            dead_letters,
            self.worker,
            self.table,
            self.part,
            self.nonce,
            self._key(before),
        )
        return Statement(query, values)

    def fenced(self) -> errors.FencedError:
        """Another process has moved it, or a person was erased."""
        return errors.FencedError(f"another backfill of {self.table} is at it")


_BEGIN: Final = """
INSERT INTO cdc_worker.backfill (worker, table_name, part, key_columns, expected, last_key)
VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (worker, table_name, part) DO UPDATE SET expected = EXCLUDED.expected, last_key = EXCLUDED.last_key,
    rows = 0, activities = 0, dead_letters = 0, started_at = now(), written_at = now(), finished_at = NULL,
    started_lsn = EXCLUDED.started_lsn, nonce = EXCLUDED.nonce, key_columns = EXCLUDED.key_columns,
    system_identifier = EXCLUDED.system_identifier
WHERE backfill.finished_at IS NOT NULL OR backfill.system_identifier <> EXCLUDED.system_identifier
    OR backfill.key_columns IS DISTINCT FROM EXCLUDED.key_columns
"""

_LOOK_AGAIN: Final = "UPDATE cdc_worker.replay SET nonce = gen_random_uuid() WHERE worker = %s"

_MARK: Final = """
SELECT nonce::text, last_key, rows, started_lsn::text, finished_at IS NOT NULL, key_columns FROM cdc_worker.backfill
WHERE worker = %s AND table_name = %s AND part = %s
"""

_FINISH: Final = """
UPDATE cdc_worker.backfill SET finished_at = now(), written_at = now()
WHERE worker = %s AND table_name = %s AND part = %s AND finished_at IS NULL
  AND last_key IS NOT DISTINCT FROM %s::text[]
"""

Outcome = Activity | DeadLetter


class _Pass(NamedTuple):
    """A backfill that nobody has disturbed yet."""

    mark: Mark
    sink: Sink
    scope: Scope


class _Verdict(NamedTuple):
    """What is recorded of a row, by its rules; and the key that it had first, since when."""

    rules: frozenset[str]
    subject: str
    after: Place


class _Work:
    """The backfill of one table."""

    def __init__(self, edges: _Edges, name: str, found: Rows, wishes: Wishes) -> None:
        self._edges, self._rows, self._wishes = edges, found, wishes
        self._worker, self._cluster = edges.checkpoint.worker, edges.checkpoint.system_identifier
        self._recorded = recorded(edges.profile, name)
        self._values = {
            rule.label: rule.backfill.metadata.keys()
            for rule in edges.profile.tables[name].rules
            if rule.backfill is not None
        }
        target = edges.profile.target
        self._journal = Journal(
            edges.control,
            target,
            table=edges.target,
            recorded=self._recorded,
            rows=found,
            checkpoint=edges.checkpoint,
        )
        self._zone = ZoneInfo(edges.time_zone)
        self._since, self._until = (at and dated(at, self._zone) for at in (wishes.since, wishes.until))
        self._zoned = catalog.zoned(target, edges.target)
        self._done = Backfilled(table=self._recorded.table, part=wishes.part)

    def run(self) -> Backfilled:
        """Write what is missing, from where an earlier run was."""
        edges, done, wishes = self._edges, self._done, self._wishes
        expected = None if wishes.from_key or wishes.to_key else self._rows.count()
        key = list(wishes.from_key) or None
        edges.control.execute(_BEGIN, (*self._job, [*self._rows.key], expected, key))
        # Who writes late, and has found nothing made up, is to look again: what it has in hand is over after this.
        failpoints.reach("backfill_begun")
        edges.control.execute(_LOOK_AGAIN, (self._worker,))
        mark = self._mark()
        done.resumed = mark is not None and mark.rows > 0
        with shown(edges.log, done.table, unit="rows", total=expected, done=mark.rows if mark else 0) as advance:
            while mark is not None:
                going = _Pass(mark, self._sink(mark), self._scope())
                try:
                    while (count := self._chunk(going)) > 0:
                        advance(count)
                    self._moved(going)
                except errors.FencedError:
                    edges.writing.rollback()
                    self._journal.forget()
                    mark = self._mark()  # which another process may have moved
                else:
                    failpoints.reach("backfill_told")
                    last = mark.next_key and list(mark.next_key)
                    edges.control.execute(_FINISH, (*self._job, last))
                    break
        return done

    @property
    def _job(self) -> tuple[str, str, str]:
        return self._worker, self._done.table, self._done.part

    def _mark(self) -> Mark | None:
        """How far it has come; None if it has come to the end."""
        found = self._edges.control.execute(_MARK, self._job).fetchone()
        if found is None:
            return None
        nonce, key, count, since, ended, columns = found
        if columns != [*self._rows.key]:
            raise errors.FencedError(
                f"another backfill of {self._done.table} is at it, by the key {', '.join(columns or [])}",
                hint="give both the same profile",
            )
        if ended:
            return None
        return Mark(*self._job, nonce, None if key is None else tuple(key), count, LSN.parse(since))

    def _scope(self) -> Scope:
        """Who was erased: read it after the mark, whose nonce it goes with."""
        return Scope(erased=checkpoint.scope(self._edges.control, self._edges.checkpoint).erased)

    def _sink(self, mark: Mark) -> Sink:
        edges = self._edges
        return Sink(
            edges.writing,
            edges.profile.target,
            table=edges.target,
            time_zone=edges.time_zone,
            progress=mark,
            decode=lambda change: change,
        )

    def _chunk(self, going: _Pass) -> int:
        """Deal with the next rows; returns how many there were."""
        seen = self._edges.fence.horizon()
        read = self._rows.after(going.mark.next_key, self._size, self._wishes.to_key or None)
        if read.rows:
            self._deal(going, seen, read, going.mark.begin([*read.rows], going.sink.position))
        return len(read.rows)

    def _moved(self, going: _Pass) -> None:
        """Deal with rows that may have got a key behind us since we began, and had one ahead of us before."""
        fence, since, wishes = self._edges.fence, going.mark.since, self._wishes
        if wishes.from_key or wishes.to_key:
            return
        while True:
            until = fence.here()
            fence.wait_for(until)
            keys: Sequence[RowKey] = self._journal.moved(since=since, until=until)
            if not keys:
                return
            while keys:
                seen = fence.horizon()
                read, keys = self._rows.first(keys, self._size)
                self._deal(going, seen, read, going.mark.begin((), going.sink.position))
            since = until

    def _deal(self, going: _Pass, seen: LSN, read: Read, batch: Batch) -> None:
        """Write what is missing of rows that were read by who has `seen` all up to a position."""
        done, began = self._done, time.monotonic()
        mark, sink, scope = going
        outcomes, undecided = self._certain(seen, read, scope)
        lines = [self._line(sink, outcome, read.at) for outcome in outcomes]
        batch.add(lines, mark.chunk(read.at), done=len(read.rows), complete=True)
        failpoints.reach("chunk_read")
        try:
            written = finished(sink.write(batch), sink.connection)
        except KeyboardInterrupt:
            sink.cancel()  # a session that waits for a lock would go on waiting without us
            raise
        failpoints.reach("chunk_written")
        refused = {letter.change_key for letter in written.dead_letters}
        for line in lines:
            if isinstance(line, Line) and line.change_key not in refused:
                done.activities[line.type] = done.activities.get(line.type, 0) + 1
        done.rows += len(read.rows)
        done.dead_letters += len(refused)
        done.already_there += written.already_there
        done.undecided += undecided
        self._pace(began, len(read.rows))

    def _pace(self, began: float, count: int) -> None:
        """Sleep for what is left of the time that so many rows are to take."""
        if (rate := self._wishes.rate) is not None:
            time.sleep(max(0.0, began + count / rate - time.monotonic()))

    @property
    def _size(self) -> int:
        rate, size = self._wishes.rate, self._wishes.chunk_size
        return size if rate is None else max(1, min(size, int(rate)))

    def _line(self, sink: Sink, outcome: Outcome, at: datetime) -> Line | DeadLetter:
        if isinstance(outcome, DeadLetter):
            return outcome
        return msgspec.structs.replace(sink.line(outcome, outcome.change), committed_at=at)

    def try_out(self) -> Backfilled:
        """Count what would be written by what is recorded now, and show some of it."""
        done, key, scope = self._done, self._wishes.from_key or None, self._scope()
        done.dry_run, began = True, time.monotonic()
        with shown(self._edges.log, done.table, unit="rows", total=self._rows.count()) as advance:
            while (read := self._rows.after(key, self._size, self._wishes.to_key or None)).rows:
                here = self._edges.fence.here()
                outcomes, _ = self._judged(read, self._transformed(read, here, scope), here, here)
                for outcome in outcomes:
                    self._count(outcome)
                key = next(reversed(read.rows))
                done.rows += len(read.rows)
                advance(len(read.rows))
                self._pace(began, len(read.rows))
                began = time.monotonic()
        return done

    def _count(self, outcome: Outcome) -> None:
        done = self._done
        if isinstance(outcome, DeadLetter):
            done.dead_letters += 1
            return
        fields = outcome.fields
        kind = fields["type"]
        done.activities[kind] = count = done.activities.get(kind, 0) + 1
        if count <= SAMPLES:
            done.samples.append(
                Sample(
                    type=kind,
                    subject=self._rows.table.subject(outcome.change.new) or "",
                    occurred_at=str(fields["occurred_at"]),
                    description=fields["description"],
                )
            )

    def _certain(self, seen: LSN, read: Read, scope: Scope) -> tuple[list[Outcome], int]:
        """What is to be written of rows, in order, and of how many it isn't certain.

        They were read by somebody who has `seen` all that was committed up to there.
        """
        fence = self._edges.fence
        places = {key: place for place, key in enumerate(read.rows)}
        found: list[Outcome] = []
        again: list[RowKey] = []
        for _ in range(ROUNDS):
            outcomes = self._transformed(read, seen, scope)
            until = fence.here()
            fence.wait_for(until)
            judged, again = self._judged(read, outcomes, seen, until)
            keys = [*read.rows]
            found += (msgspec.structs.replace(outcome, index=places[keys[outcome.index]]) for outcome in judged)
            if not again or not fence.settle():
                break
            seen = fence.horizon()
            read = self._rows.of(again)
        return sorted(found, key=lambda outcome: outcome.index), len(again)

    def _transformed(self, read: Read, here: LSN, scope: Scope) -> list[Outcome]:
        """What the rules make of rows, whose places are the indexes of what they make."""
        transformer = Transformer(self._edges.rules, worker=self._worker, system_identifier=self._cluster, scope=scope)
        name = self._rows.table.name
        changes = [Change("read", *name, None, row) for row in read.rows.values()]
        transaction = Transaction(0, here, here, read.at, changes, [], [*changes], 0, True, True)
        outcomes = settled(transformer, transaction, self._edges.look_up)
        return [done for outcome in outcomes if (done := self._dated(outcome)) is not None]

    def _dated(self, outcome: Outcome) -> Outcome | None:
        """An outcome with its own date; None if it has none, or isn't meant, or is of a person who was erased."""
        if isinstance(outcome, DeadLetter):
            return None if outcome.reason == ERASED else outcome
        at = outcome.fields["occurred_at"]
        if at is None or outcome.fields["metadata"].get("erased") is True:
            return None
        moment = dated(at, self._zone)
        if self._since is not None and (moment is None or moment < self._since):
            return None
        if self._until is not None and (moment is None or moment >= self._until):
            return None
        # What has no zone is in the zone of the target's own dates, and as it is.
        if moment is None or (not self._zoned and dated(at, None) is None):
            return outcome
        return msgspec.structs.replace(outcome, fields={**outcome.fields, "occurred_at": moment})

    def _judged(
        self, read: Read, outcomes: Sequence[Outcome], seen: LSN, until: LSN
    ) -> tuple[list[Outcome], list[RowKey]]:
        """What is to be written, and the rows that are to be read again: something was recorded of them meanwhile.

        All is recorded up to `until`, and what was committed up to `seen` was to be seen by the read.
        """
        keys = [*read.rows]
        rules: dict[RowKey, set[str]] = {}
        for outcome in outcomes:
            rules.setdefault(keys[outcome.index], set()).add(_rule(outcome))
        events = self._journal.of(rules, until=until, since=seen)
        emptied = self._journal.emptied(until)
        later = self._journal.clusters.after(seen)
        before = {subject: [e for e in of if e.place < later] for subject, of in events.items()}
        emptied_before = [place for place in emptied if place < later]
        verdicts: dict[RowKey, _Verdict] = {}
        again: list[RowKey] = []
        for key, of in rules.items():
            subject = self._rows.subject(key)
            verdict = verdicts[key] = self._verdict(subject, before, emptied_before, seen)
            # What stood recorded when the row was read is about it, whatever came later.
            late = len(before[subject]) < len(events[subject]) or len(emptied_before) < len(emptied)
            if late and not all(self._told(rule, verdict) for rule in of):
                again.append(key)
                del verdicts[key]
        found = [
            self._finished(outcome, known, read.at, until)
            for outcome in outcomes
            if (known := verdicts.get(keys[outcome.index])) is not None and not self._told(_rule(outcome), known)
        ]
        return found, again

    def _verdict(
        self, subject: str, events: Mapping[str, Sequence[Event]], emptied: Sequence[Place], until: LSN
    ) -> _Verdict:
        """What is recorded of a row, also by the keys that it had before."""
        known = dict(events)
        follow = self._journal.links_follow
        found = standing(subject, events[subject], emptied, links_follow=follow)
        rules = set(found.rules)
        while found.before:
            at, subject = found.after, self._rows.subject(found.before)
            for name, of in self._journal.of([found.before], until=until, since=until).items():
                known[name] = [*known.get(name, ()), *of]  # what is made up goes by the first key, and links to a later
            earlier = [event for event in known[subject] if event.place < at]
            found = standing(subject, earlier, [place for place in emptied if place < at], links_follow=follow)
            rules |= found.rules
        return _Verdict(frozenset(rules), subject, found.after)

    def _told(self, rule: str, verdict: _Verdict) -> bool:
        """Whether what a rule would tell is recorded, or was kept from being recorded."""
        return rule in verdict.rules or (EVERYTHING in verdict.rules and self._recorded.what(rule) == "created")

    def _finished(self, outcome: Outcome, verdict: _Verdict, at: datetime, until: LSN) -> Outcome:
        """An outcome with the key of its kind, and marked as what it is."""
        rule = _rule(outcome)
        of = backfill_key(self._recorded, verdict.subject, rule, verdict.after)
        key = own_key(self._worker, self._journal.clusters, of)
        if isinstance(outcome, DeadLetter):
            return msgspec.structs.replace(outcome, change_key=key)
        told = outcome.fields["metadata"]
        metadata = {name: value for name, value in told.items() if name not in self._values[rule]}
        metadata |= {
            "backfilled": True,
            "as_of": at.isoformat(),
            "as_of_lsn": str(until),
            "values": {name: value for name, value in told.items() if name in self._values[rule]},
        }
        return msgspec.structs.replace(outcome, change_key=key, fields={**outcome.fields, "metadata": metadata})


def replacement(
    target: Target, table: TargetTable, worker: str, clusters: Clusters, late: Mapping[Place, Collection[Key]]
) -> str:
    """The statements by which what was made up gives way to what is recorded after all, in the transaction that does.

    `late` are the keys that may have been made up, by the place of what is recorded. They run in the transaction of
    whoever records it. A backfill that is at it begins its chunk anew, and finds what is recorded.
    """
    into, key = sql.Identifier(*qualified(target.table)), catalog.key_column(target)
    metadata = next((column for column, of in target.columns.items() if of == "metadata"), None)
    statements = [_ANEW.format(worker)]
    for place, keys in late.items():
        names = [own_key(worker, clusters, of) for of in keys]
        known: sql.Composable = sql.SQL("true")
        # What was read before it happened is of somebody else.
        if metadata is not None and place.generation == clusters.here:
            known = _READ_SINCE.format(metadata=sql.Identifier(metadata), at=str(place.lsn))
        if key is not None:
            statements.append(_REPLACE.format(table=into, key=sql.Identifier(key), names=names, known=known))
        elif table.numbered is not None:
            row = sql.Identifier(table.numbered[0])
            statements.append(_REPLACE_NUMBERED.format(table=into, row=row, names=names, known=known))
    return sql.SQL("; ").join(statements).as_string()


# Queries, because an UPDATE that finds nothing to do would look as if the progress were another's.
_ANEW: Final = sql.SQL(
    "WITH anew AS (UPDATE cdc_worker.backfill SET nonce = gen_random_uuid() WHERE worker = {} RETURNING 1)"
    " SELECT FROM anew"
)

_READ_SINCE: Final = sql.SQL("({metadata}::jsonb ->> 'as_of_lsn')::pg_lsn >= {at}::pg_lsn")

_REPLACE: Final = sql.SQL("DELETE FROM {table} WHERE {key} = ANY ({names}) AND {known}")

_REPLACE_NUMBERED: Final = sql.SQL(
    "WITH gone AS (DELETE FROM {table} USING cdc_worker.written_key AS written"
    " WHERE change_key = ANY ({names}) AND row_id = {table}.{row} AND {known} RETURNING change_key)"
    " DELETE FROM cdc_worker.written_key USING gone WHERE written_key.change_key = gone.change_key"
)


def _rule(outcome: Outcome) -> str:
    return outcome.change_key.rpartition("/")[2]
