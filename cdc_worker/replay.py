"""Replay: recordings, told again by the loop that tells the stream.

    for slice in recordings:
        outcomes = transform(slice)    # with the rows that were looked up at the time
        late.add(outcomes)             # what the target hasn't is written, with the keys that the stream gives

Where the worker's own stream is what was recorded, it tells all that ends after the checkpoint by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final, Literal, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
from pydantic import BaseModel, Field

from cdc_worker import catalog, errors, lookups, partitions, postgres, unplaced
from cdc_worker.activities import BY_TIME, Activity, DeadLetter, Person, Scope
from cdc_worker.catalog import TargetTable
from cdc_worker.changes import Change, Row
from cdc_worker.config import Settings, known_time_zone
from cdc_worker.context import Policy
from cdc_worker.history import dated
from cdc_worker.late import Counts, Late
from cdc_worker.lines import encoder, parsed
from cdc_worker.log import Logger
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile
from cdc_worker.progress import Advance, shown
from cdc_worker.rules import Lookup, Rules, qualified
from cdc_worker.segments import STDIN, SUFFIXES, Bound, Missing, Recorded, Source
from cdc_worker.sink import finished
from cdc_worker.transform import Fetch, Outcome, Transformer, Wanted

SAMPLES: Final = 3
"""So many activities of each type a dry run shows."""

LOOKED: Final = 1_000
"""So many rows that were looked up at the time are remembered, of the last changes."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is told again, and where it goes.

    `since` and `until` are about commits; dates without a zone are in the target's. `output` is a file, or - for
    stdout. `system_identifier` is the cluster of recordings that don't name theirs.
    """

    since: Bound | None = None
    until: Bound | None = None
    tables: Sequence[str] = ()
    types: Sequence[str] = ()
    dry_run: bool = False
    output: str | None = None
    strict: bool = False
    system_identifier: str | None = None


_PLAIN: Final = Wishes()


class Sample(BaseModel):
    """An activity that would be written."""

    type: str = Field(description="its type")
    occurred_at: str = Field(description="when it was")
    description: str = Field(description="its text")


class Replayed(BaseModel):
    """What was done, or would be. These are the fields of `replay --json`."""

    transactions: int = Field(default=0, description="transactions that were read, wholly or in part")
    repeated: int = Field(default=0, description="transactions that were found again, and read once")
    activities: dict[str, int] = Field(
        default={}, description="activities written, by type; with --dry-run, that would be; with --output, to the file"
    )
    already_there: int = Field(default=0, description="activities that the target has already")
    dead_letters: int = Field(default=0, description="changes that became dead letters")
    known_dead_letters: int = Field(default=0, description="changes that were dead letters already, and still are")
    discarded: int = Field(default=0, description="activities left out, because their dead letters were discarded")
    unlinked: int = Field(default=0, description="activities written without a link that the target refused")
    replaced: int = Field(default=0, description="activities that were made up by a backfill or repair, and gave way")
    resolved: int = Field(default=0, description="dead letters that became activities")
    left_to_the_stream: int = Field(default=0, description="transactions after the checkpoint: the worker records them")
    looked_up_now: int = Field(default=0, description="rows looked up as they are now, for want of what was found then")
    others: list[str] = Field(default=[], description="files of other workers, which were left out")
    missing: list[Missing] = Field(default=[], description="what is not whole in the recordings, or not there")
    dry_run: bool = Field(default=False, description="whether nothing was written")
    samples: list[Sample] = Field(default=[], description="some of the activities; only with --dry-run")

    @property
    def whole(self) -> bool:
        """Whether all was done that was asked for, as far as that can be known."""
        return not self.missing


def lines(done: Replayed) -> Iterator[str]:
    """What was done as a person reads it."""
    total = sum(done.activities.values())
    told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(done.activities.items())) or "none"
    verb = "would be written" if done.dry_run else "written"
    yield f"{done.transactions:,} transactions read, {total:,} activities {verb}: {told}"
    for sample in done.samples:
        yield f"  {sample.occurred_at}  {sample.type}  {sample.description}"
    for count, what in (
        (done.already_there, "activities were there already"),
        (done.replaced, "that were made up gave way"),
        (done.resolved, "dead letters were resolved"),
        (done.unlinked, "were written without a link that the target refused"),
        (done.dead_letters, "became dead letters: cdc-worker dead-letters list"),
        (done.known_dead_letters, "are dead letters still"),
        (done.discarded, "were left out: their dead letters were discarded"),
        (done.left_to_the_stream, "transactions come after the checkpoint: the worker records them"),
        (done.repeated, "transactions were found again, and read once"),
        (len(done.others), "files are of other workers, and were left out"),
        (done.looked_up_now, "rows were looked up as they are now: the recording doesn't have them"),
    ):
        if count:
            yield f"  {count:,} {what}"


def damages(missing: Iterable[Missing]) -> Iterator[str]:
    """What is not whole, a line each."""
    for of in missing:
        yield f"missing: {of}"


class Portion(NamedTuple):
    """What came of a slice of a commit, as far as it is meant.

    All outcomes of the first `done` changes of the commit are out, and the commit with this is if it is `complete`.
    """

    recorded: Recorded
    outcomes: list[Outcome]
    done: int
    complete: bool
    given: list[Person]
    scope: Scope


Deal = Callable[[Portion | None], object]
"""Deals with one portion after another, and after the last one is given None."""


class Teller:
    """Tells what was recorded, by a profile's rules. Counts what it had to look up as it is `now`."""

    def __init__(
        self,
        rules: Rules,
        *,
        worker: str,
        policy: Policy,
        scope: Callable[[str, str | None, bool], Scope],
        now: Fetch | None,
        meant: Callable[[Outcome], bool],
        log: Logger,
    ) -> None:
        self.looked_up_now = 0
        self._rules, self._worker, self._policy = rules, worker, policy
        self._scope, self._now, self._meant, self._log = scope, now, meant, log
        self._transformers: dict[tuple[str, str | None, bool], tuple[Transformer, Scope]] = {}
        self._places = unplaced.Places()
        self._looked: dict[tuple[tuple[str, str], frozenset[tuple[str, Any]]], Row | None] = {}
        self._unverifiable = False

    def told(self, recorded: Iterable[Recorded]) -> Iterator[Portion]:
        """What came of it, slice by slice."""
        for one in recorded:
            placed = self._places.placed(one)
            of, transaction = placed.recorded, placed.recorded.transaction
            transformer, scope = self._transformer(of, placed=placed.kind != BY_TIME)
            if transaction.first:
                self._looked.clear()
            for looked in of.looked:
                self._looked[looked.table, frozenset(looked.where.items())] = looked.row
            outcomes, given = transformer.feed(transaction), [*transformer.given]
            while transformer.wanted or transformer.ready:
                if transformer.wanted:
                    transformer.tell(self._found(transformer.wanted))
                outcomes += transformer.rest()
                given += transformer.given
            if transformer.untrusted and not transaction.xid and not self._unverifiable:
                self._unverifiable = True
                self._log.warning("signatures_unverifiable", reason="the recording doesn't number its transactions")
            kept = [unplaced.named(outcome, placed) for outcome in outcomes if self._meant(outcome)]
            yield Portion(of, kept, transformer.done, transaction.last, given, scope)

    def _transformer(self, of: Recorded, *, placed: bool) -> tuple[Transformer, Scope]:
        key = of.system_identifier, of.database, placed
        if key not in self._transformers:
            scope = self._scope(*key)
            transformer = Transformer(
                self._rules, worker=self._worker, system_identifier=key[0], scope=scope, policy=self._policy
            )
            self._transformers[key] = transformer, scope
        return self._transformers[key]

    def _found(self, wanted: Collection[Wanted]) -> Mapping[Wanted, Row | None]:
        """Rows as they were looked up at the time, perhaps under other names, or else as they are now."""
        found: dict[Wanted, Row | None] = {}
        for lookup, values in wanted:
            key = lookup.table, frozenset(zip(lookup.theirs, values, strict=True))
            if key in self._looked and (row := _kept(lookup, self._looked[key])) is not _UNKNOWN:
                found[lookup, values] = row
        if rest := [of for of in wanted if of not in found]:
            self.looked_up_now += len(rest)
            found |= self._now(rest) if self._now is not None else dict.fromkeys(rest)
        return found


_UNKNOWN: Final[Row] = {}


def _kept(lookup: Lookup, row: Row | None) -> Row | None:
    """The columns that a lookup keeps of a row; _UNKNOWN if they were not recorded, or it may not be the row."""
    if row is None:
        return _UNKNOWN if lookup.where else None
    if not row.keys() >= {*lookup.columns} or any(row.get(column, _UNKNOWN) != value for column, value in lookup.where):
        return _UNKNOWN
    return {column: row[column] for column in lookup.columns}


class Columns:
    """What would be sent of an activity to each column of a target, known from a database or without one."""

    def __init__(self, settings: Settings, given: Profile, connection: Connection | None) -> None:
        target, zone = given.target, "UTC"
        table = TargetTable({}, target.lengths, {}, deferrable=False, row_security=False, deadlock_timeout=1, shape="")
        self.names = (*target.columns, *target.constants)
        if connection is not None:
            zone = postgres.server(connection).time_zone
            table = catalog.target_table(connection, target)
        table.columns.update({column: "text" for column in self.names if column not in table.columns})
        try:
            self.zone = ZoneInfo(known_time_zone(settings.time_zone or target.time_zone or zone))
        except ValueError as error:
            raise errors.ProfileError(f"the target's time zone: {error}") from error
        self._dates = [column for column, field in target.columns.items() if field == "occurred_at"]
        self._encode = encoder(target, table, self.zone)

    def of(self, activity: Activity, *, timed: bool = True) -> dict[str, str | None]:
        """Its columns; without its date where that isn't known."""
        found = dict(zip(self.names, parsed(self._encode(activity)), strict=True))
        return found if timed else {**found, **dict.fromkeys(self._dates)}


class Filter:
    """Which outcomes are meant. Raises SettingsError for tables that the profile hasn't."""

    def __init__(self, given: Profile, wishes: Wishes) -> None:
        known = {qualified(name): name for name in given.tables}
        self._tables = {qualified(name) for name in wishes.tables}
        for name in wishes.tables:
            if qualified(name) not in known:
                raise errors.SettingsError(
                    f'the profile "{given.name}" has no table "{name}"',
                    hint=f"those it has: {', '.join(given.tables)}",
                )
        self._types = {*wishes.types}
        self._rules = {  # which may make one of these types
            (qualified(name), rule.label)
            for name, table in given.tables.items()
            for rule in table.rules
            if not isinstance(rule.type, str) or "{" in rule.type or rule.type in self._types
        }

    def __call__(self, outcome: Outcome) -> bool:
        """Whether it is meant. Of what was passed over or refused only the table is known, and perhaps the rule."""
        if isinstance(outcome, Activity | DeadLetter):
            table = outcome.change.schema, outcome.change.table
        else:
            table = outcome.table
        if self._tables and table not in self._tables:
            return False
        if not self._types:
            return True
        if isinstance(outcome, Activity):
            return outcome.fields["type"] in self._types
        rule = outcome.change_key.rpartition("/")[2] if isinstance(outcome, DeadLetter) else "*"
        return rule == "*" or (table, rule) in self._rules


class Line(BaseModel):
    """An activity, or a dead letter. These are the fields of the lines of `replay --output`."""

    outcome: Literal["activity", "dead_letter"] = Field(description="what the change became")
    change_key: str | None = Field(description="its identity; null where the recording doesn't have what it takes")
    table: str = Field(description="captured table")
    operation: str = Field(description="what happened to its row")
    commit_lsn: str | None = Field(description="where that was committed")
    committed_at: str | None = Field(description="when that was committed")
    type: str | None = Field(default=None, description="type of the activity")
    columns: dict[str, str | None] | None = Field(
        default=None, description="columns of the target, as they would be sent"
    )
    reason: str | None = Field(default=None, description="why it is a dead letter")


_json = msgspec.json.Encoder(decimal_format="number")


_NO_RULES: Final[Rules] = {}


class Loop:
    """The loop that recordings go through: what `portions` yields is to be dealt with, then comes the next.

    With `late` it is what that may write, and what the worker's stream will tell is left out.
    """

    def __init__(
        self,
        stack: ExitStack,
        settings: Settings,
        given: Profile,
        paths: Sequence[Path | str],
        wishes: Wishes = _PLAIN,
        *,
        log: Logger,
        late: Late | None = None,
        others: Rules = _NO_RULES,
    ) -> None:
        """Of the tables in `others` changes are read as well, though no rule is about them."""
        self.paths = _meant(settings, paths)
        self.left_to_the_stream = self.looked_up_now = 0
        self.source: Source | None = None
        self.settings, self.profile, self.wishes, self.log, self.late = settings, given, wishes, log, late
        self.rules = settings.rules(given)
        self._read: Rules = {**others, **self.rules}
        self._filter = Filter(given, wishes)
        dsn = settings.dsn.get_secret_value()
        self.connection = late.control if late is not None else None
        self._now: Fetch | None = late.look_up if late is not None else None
        if late is None and dsn:
            self.connection = stack.enter_context(closing(postgres.connect_reading(dsn, settings.worker)))
            reading = lookups.Lookups(self.connection, self.rules)
            self._now = lambda wanted: finished(reading.fetch(wanted), reading.connection)
        self.columns = Columns(settings, given, self.connection)

    @property
    def once(self) -> bool:
        """Whether it can't be gone through again."""
        return STDIN in self.paths

    def go(self, begin: Callable[[], Deal], done: Replayed) -> None:
        """Go through it, and again from the start where what is left out has changed meanwhile; tell what was done.

        What `begin` returns deals with the portions of one time; after the last one it is given None.
        """
        late = self.late
        while True:
            try:
                deal = begin()
                for portion in self.portions():
                    deal(portion)
                deal(None)
                break
            except errors.FencedError as error:
                if self.once or late is None:
                    raise errors.FencedError(
                        f"{error}, and standard input can't be read again", hint="run it again with the same input"
                    ) from error
                late.begin()
        if late is not None:
            _count(done, late.counts)
        source = self.source
        assert source is not None
        done.transactions, done.repeated, done.others = source.transactions, source.repeated, source.others
        done.left_to_the_stream, done.looked_up_now = self.left_to_the_stream, self.looked_up_now
        done.missing = source.missing

    def portions(self) -> Iterator[Portion]:
        """What recordings come to, from their beginning. What is missing in them is known afterwards."""
        self.left_to_the_stream = self.looked_up_now = 0
        teller = Teller(
            self.rules,
            worker=self.settings.worker,
            policy=self.settings.policy(self.profile),
            scope=self._scope,
            now=self._now,
            meant=self._filter,
            log=self.log,
        )
        done = 0

        def read(count: int, /) -> None:
            nonlocal done
            done += count

        source = self.source = self._source(read)
        with shown(self.log, "replay", unit="B", total=source.total) as advance:
            for portion in teller.told(self._ours(source)):
                self.looked_up_now = teller.looked_up_now
                yield portion
                done, more = 0, done
                advance(more)
            advance(done)

    def _scope(self, cluster: str, database: str | None, placed: bool) -> Scope:
        return Scope() if self.late is None else self.late.scope(cluster, database, placed=placed)

    def _source(self, advance: Advance) -> Source:
        late, wishes = self.late, self.wishes
        return Source(
            self.paths,
            worker=self.settings.worker,
            cluster=wishes.system_identifier or (late.checkpoint.system_identifier if late is not None else "0"),
            database=late.database if late is not None else None,
            rules=self._read,
            roots=self._roots(),
            keys=None if self.connection is None else partitions.keys(self.connection, self._read),
            checkpoint=late.checkpoint.position.lsn if late is not None else None,
            strict=wishes.strict,
            since=self._bound(wishes.since),
            until=self._bound(wishes.until),
            advance=advance,
        )

    def _ours(self, source: Iterable[Recorded]) -> Iterator[Recorded]:
        """What is not the stream's to tell."""
        late, checked = self.late, False
        for recorded in source:
            transaction = recorded.transaction
            if late is not None and not (recorded.exact or checked):
                self._check_unplaced(late)
                checked = True
            if (
                late is not None
                and late.is_home(recorded.system_identifier, recorded.database)
                and transaction.end_lsn > late.checkpoint.position.lsn
            ):
                self.left_to_the_stream += transaction.last
            else:
                yield recorded

    def _check_unplaced(self, late: Late) -> None:
        """Raise RecordingUnreadableError unless transactions may be told that don't say where they were committed."""
        if self.once:
            raise errors.RecordingUnreadableError(
                "standard input has transactions that don't say where they were committed, and would be read twice",
                hint="put it into a file; or write activities to a file with --output",
            )
        unplaced.check(late, self._source(lambda count, /: None), self.columns.zone)

    def _bound(self, bound: Bound | None) -> Bound | None:
        return dated(bound, self.columns.zone) if isinstance(bound, datetime) else bound

    def _roots(self) -> Callable[[Change, LSN], tuple[str, str] | None]:
        """Whose the changes of partitions are, where the recording doesn't tell: as the database knows them."""
        known = {name: name for name in self._read}
        if self.connection is not None:
            worker = self.settings.worker
            kept = partitions.kept(self.connection, worker) if self.late is not None else {}
            known = {**kept, **partitions.roots(self.connection, self._read), **known}
        return lambda change, _: known.get((change.schema, change.table))


def _meant(settings: Settings, paths: Sequence[Path | str]) -> list[Path | Literal["-"]]:
    """The recordings that are meant: those named, or the worker's own. Raises SettingsError if there is none."""
    if paths:
        return [STDIN if path == STDIN else Path(path) for path in paths]
    if settings.recording_directory is None:
        raise errors.SettingsError(
            "there is nothing to replay: no recording is named, and the worker keeps none",
            hint="name files or a directory; to have the worker record, set recording.directory",
        )
    return [settings.recording_directory]


def replay(
    settings: Settings, given: Profile, paths: Sequence[Path | str], wishes: Wishes = _PLAIN, *, log: Logger
) -> Replayed:
    """Tell recordings again, or the worker's own if none is named: what the target hasn't is written.

    May be interrupted, and run again. Raises SettingsError for wishes that mean nothing, RecordingError for what is no
    recording, and FencedError where standard input would have to be read again.
    """
    with ExitStack() as stack:
        return _Run(stack, settings, given, paths, wishes, log=log).run()


class _Run:
    """One run of it."""

    def __init__(
        self,
        stack: ExitStack,
        settings: Settings,
        given: Profile,
        paths: Sequence[Path | str],
        wishes: Wishes,
        *,
        log: Logger,
    ) -> None:
        self._wishes, self._done = wishes, Replayed(dry_run=wishes.dry_run)
        self._late: Late | None = None
        _meant(settings, paths)
        if settings.dsn.get_secret_value() and (wishes.dry_run or wishes.output is None):
            late = Late(
                settings, given, command="replay", log=log, dry_run=wishes.dry_run, tell=lambda of: self._tell(of, None)
            )
            self._late = stack.enter_context(late)
        elif not wishes.dry_run and wishes.output is None:
            raise errors.SettingsError(
                "there is no database to write to",
                hint="name it in CDC_WORKER_DSN; without one there are --dry-run and --output",
            )
        self._loop = Loop(stack, settings, given, paths, wishes, log=log, late=self._late)
        self._file: IO[str] | None = None
        if wishes.output is not None:
            self._file = (
                sys.stdout if wishes.output == STDIN else stack.enter_context(_opened(wishes.output, self._loop.paths))
            )

    def run(self) -> Replayed:
        """Go through it."""
        self._loop.go(lambda: self._take, self._done)
        return self._done

    def _take(self, portion: Portion | None) -> None:
        if portion is None:
            if self._late is not None:
                self._late.flush()
            return
        recorded = portion.recorded
        if self._late is None:
            for outcome in portion.outcomes:
                if isinstance(outcome, Activity):
                    kind = outcome.fields["type"]
                    self._done.activities[kind] = self._done.activities.get(kind, 0) + 1
                    self._tell(outcome, recorded)
                elif isinstance(outcome, DeadLetter):
                    self._done.dead_letters += 1
                    self._tell(outcome, recorded)
            return
        home = self._late.is_home(recorded.system_identifier, recorded.database)
        self._late.add(
            portion.outcomes,
            recorded.transaction,
            cluster=recorded.system_identifier,
            done=portion.done,
            complete=portion.complete,
            given=portion.given if home else (),
        )

    def _tell(self, outcome: Activity | DeadLetter, recorded: Recorded | None) -> None:
        """Show what would be written, or write it to the file."""
        if self._file is not None:
            self._file.write(_json.encode(_line(outcome, recorded, self._loop.columns).model_dump()).decode() + "\n")
        if self._wishes.dry_run and isinstance(outcome, Activity):
            show(self._done, outcome)


def show(done: Replayed, activity: Activity) -> None:
    """Have it among the samples, if there aren't enough of its type."""
    fields = activity.fields
    if sum(of.type == fields["type"] for of in done.samples) < SAMPLES:
        done.samples.append(
            Sample(type=fields["type"], occurred_at=str(fields["occurred_at"]), description=fields["description"])
        )


def _count(done: Replayed, counts: Counts) -> None:
    done.activities = {kind: count for kind, count in counts.activities.items() if count}
    done.already_there, done.dead_letters = counts.already_there, counts.dead_letters
    done.known_dead_letters, done.discarded, done.unlinked = counts.known, counts.discarded, counts.unlinked
    done.replaced, done.resolved = counts.replaced, counts.resolved


def _opened(path: str, read: Iterable[Path | Literal["-"]]) -> IO[str]:
    """A file for what is told, which is not to overwrite what is `read`, nor to be read itself the next time."""
    file = Path(path)
    try:
        if any(_holds(of, file) for of in read if isinstance(of, Path)):
            raise errors.SettingsError(
                f'"{path}" would be a part of the recording that is read', hint="name another file in --output"
            )
        return file.open("w", encoding="utf-8")
    except OSError as error:
        raise errors.SettingsError(
            f'"{path}" can\'t be written: {error.strerror}', hint="name another file in --output"
        ) from error


def _holds(recording: Path, file: Path) -> bool:
    """Whether a file is a recording, or one of those in a directory."""
    if recording.is_dir():
        return file.name.endswith(SUFFIXES) and file.parent.samefile(recording)
    return file.exists() and recording.exists() and file.samefile(recording)


def _line(outcome: Activity | DeadLetter, recorded: Recorded | None, columns: Columns) -> Line:
    change, told = outcome.change, isinstance(outcome, Activity)
    timed = recorded is None or recorded.has_time
    at = outcome.fields["occurred_at"] if isinstance(outcome, Activity) else outcome.committed_at
    return Line(
        outcome="activity" if told else "dead_letter",
        change_key=outcome.change_key if recorded is None or recorded.has_lsn else None,
        table=f"{change.schema}.{change.table}",
        operation=change.operation,
        commit_lsn=str(outcome.origin.commit_lsn) if recorded is None or recorded.has_lsn else None,
        committed_at=(at.isoformat() if isinstance(at, datetime) else str(at)) if timed else None,
        type=outcome.fields["type"] if isinstance(outcome, Activity) else None,
        columns=columns.of(outcome, timed=timed) if isinstance(outcome, Activity) else None,
        reason=f"{outcome.kind}: {outcome.reason}" if isinstance(outcome, DeadLetter) else None,
    )
