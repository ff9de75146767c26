"""Verify: whether the log is true, row by row, beside a worker and an application that go on.

What a row has, and what the log says of it, are compared as of one position. A chunk of rows is read, a position F is
taken, the worker is waited for until it has passed F, and the histories of the rows up to F are told. Most rows agree
then. Of the others something may have been recorded that the read was too early to see, or, where a commit is in the
WAL and not visible to others yet, too early by much. They are read again, by their keys:

    L   where the WAL is
    wait until all transactions are over that are in progress now
    rows    which so have all that was committed at or before L
    F   where the WAL is; wait until the checkpoint has passed it
    the histories up to F

Where nothing was recorded of a row between L and F, the row is as it was at L, at F and in the log: it agrees, or the
log is not true. Where something was, it is read once more. Neither takes a long transaction, nor a slot.

Two passes find all subjects: over the rows of the table, in the order of their keys, and over the keys that activities
link to, for those without a row.

What is missing is made up for, if wished, by activities that a change from what the log says to what is so has by the
same rules (`reconcile`). They stand, in the row's history, right after what was recorded before the gap, and so have
the same keys whoever writes them. A creation is written as a backfill would write it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from functools import partial
from itertools import islice
from typing import Any, Final, Literal, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
from psycopg.types.json import set_json_loads
from pydantic import BaseModel, Field

from cdc_worker import catalog, checkpoint, errors, failpoints, postgres, reconcile, rows, slot
from cdc_worker.activities import Activity, Batch, Clusters, DeadLetter, Place, Position, Scope, parsed_key
from cdc_worker.changes import STREAM, Row, Transaction
from cdc_worker.config import Settings
from cdc_worker.fence import PATIENCE, Fence
from cdc_worker.history import EVERYTHING, Event, Recorded, What, dated, recorded
from cdc_worker.journal import Journal
from cdc_worker.late import repairing
from cdc_worker.log import Logger
from cdc_worker.lookups import Lookups
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.postgres import Connection, Statement
from cdc_worker.profile import Profile
from cdc_worker.progress import shown
from cdc_worker.reconcile import Moment
from cdc_worker.rows import Read, RowKey, Rows
from cdc_worker.rules import Rules, qualified
from cdc_worker.sink import Sink, finished
from cdc_worker.transform import Fetch, Transformer, settled
from cdc_worker.truth import Break, Log, Silence, Story, Teller

CHUNK: Final = 1_000
"""So many rows are read at once, if nothing else is asked for."""

EVENTS: Final = 10_000
"""About so many activities are read at once, however many each row has."""

FIRST: Final = 50
"""So many rows are begun with, of which nobody knows how many activities they have."""

SUSPECTS: Final = 250
"""When so many rows disagree they are read again."""

SHOWN: Final = 20
"""Of so many rows that disagree a person is told, of each table."""

ENDLESS: Final = LSN(2**64 - 1)

_START: Final = Position(INVALID)

Explanation = Literal["erased", "dead letter", "skipped", "left to triggers"]


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a log is verified. A `sample` is so many rows, and as many keys that activities link to.

    `patience` is for how many seconds the transactions of others are waited for, and rows that change all the time.
    """

    repair: bool = False
    sample: int | None = None
    chunk_size: int = CHUNK
    values: bool = False
    patience: float = PATIENCE


_PLAIN: Final = Wishes()


class Difference(BaseModel):
    """What a column has, with `--values`."""

    log: Any = Field(description="what the log says")
    found: Any = Field(description="what the next activity says, or the row")


class Disagreement(BaseModel):
    """A row whose log is not true. These are the fields of the lines of `verify --json` with that record."""

    record: Literal["disagreement"] = Field(default="disagreement", description="`disagreement`")
    table: str = Field(description="schema and table")
    subject: str = Field(description="key of the row")
    missing: Literal["creation", "deletion", "change"] | None = Field(
        default=None, description="what the log doesn't tell; null where it isn't certain that anything is missing"
    )
    columns: list[str] = Field(default=[], description="which columns changed, of a change")
    values: dict[str, Difference] | None = Field(default=None, description="(with `--values`) of a change, by column")
    after: str | None = Field(
        default=None, description="change key of the activity after which it is missing; null if none is"
    )
    before: str | None = Field(
        default=None, description="change key of the one before which; null if the row itself tells it"
    )
    explained: str | None = Field(
        default=None,
        description="why that is no fault: `erased`, `dead letter`, `skipped`, `left to triggers`; else null",
    )
    undecided: str | None = Field(default=None, description="why it isn't certain that anything is missing; else null")
    repaired: str | None = Field(
        default=None, description="(with `--repair`) `yes`, or why not; null where nothing was tried"
    )


class Verified(BaseModel):
    """What a table came to. These are the fields of the lines of `verify --json` with the record `summary`."""

    record: Literal["summary"] = Field(default="summary", description="`summary`")
    table: str = Field(description="schema and table")
    subjects: int = Field(default=0, description="rows, and keys of rows that are gone, that were looked at")
    sample: bool = Field(default=False, description="whether those are not all")
    disagree: int = Field(default=0, description="rows whose log is not true")
    explained: int = Field(default=0, description="rows of which something is missing that is known to be")
    undecided: int = Field(default=0, description="rows of which it couldn't be told")
    repaired: int = Field(default=0, description="of the rows that disagree, those of which all could be made up for")
    activities: int = Field(default=0, description="reconciling activities written")

    @property
    def true(self) -> bool:
        """Whether the log is, by now."""
        return self.repaired == self.disagree and not self.undecided


class Unread(BaseModel):
    """A commit that the worker couldn't read whole. These are the fields of the lines with the record `unread`."""

    record: Literal["unread"] = Field(default="unread", description="`unread`")
    commit_lsn: str = Field(description="where it was committed")
    table: str | None = Field(description="schema and table; null if it isn't known of which the messages told")
    dead_letters: list[int] = Field(description="the messages, by the numbers of their dead letters")


Finding = Disagreement | Verified | Unread
"""What is found, as it is found."""


def lines(found: Iterable[Finding]) -> Iterator[str]:
    """What was found as a person reads it: of each table what it came to, then some of those that disagree."""
    shown: list[str] = []
    more = untold = 0
    for of in found:
        if isinstance(of, Unread):
            yield _marked(of)
            continue
        if isinstance(of, Disagreement):
            more += len(shown) >= SHOWN
            shown += [_described(of)] if len(shown) < SHOWN else []
            untold += of.missing == "creation" and of.after is None and of.repaired is None and of.explained is None
            continue
        yield _summarised(of)
        yield from shown
        if more:
            yield f"  and {more:,} more: --json tells of all"
        if untold:
            yield f"  of {untold:,} nothing says that they came to be: were they there before, run cdc-worker backfill"
        shown, more, untold = [], 0, 0


def _described(of: Disagreement) -> str:
    """A disagreement in a line."""
    what = of.undecided or ""
    if of.missing is not None:
        changed = f" of {', '.join(of.columns)}" if of.columns else ""
        what = f"the log lacks its {of.missing}{changed}"
        where = [f"{word} {key}" for word, key in (("after", of.after), ("before", of.before)) if key]
        what += f", {' and '.join(where)}" if where else ""
    for column, values in (of.values or {}).items():
        what += f"; {column}: {_shown(values.log)} in the log, then {_shown(values.found)}"
    if of.explained:
        what += f" ({of.explained})"
    if of.repaired:
        what += "; repaired" if of.repaired == "yes" else f"; not repaired: {of.repaired}"
    return f"  {of.subject}: {what}"


def _marked(of: Unread) -> str:
    """A commit that was not read whole, in a line."""
    letters = of.dead_letters
    kept = f"dead letter{'s' if len(letters) > 1 else ''} {', '.join(map(str, letters))}"
    count = f"{len(letters)} message{'s' if len(letters) > 1 else ''}"
    about = "" if of.table is None else f" of {of.table}"
    return f"not all of the commit at {of.commit_lsn} could be read: {count}{about}, kept as {kept}"


def _shown(value: Any) -> str:
    return "NULL" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _summarised(of: Verified) -> str:
    """What a table came to in a line."""
    agree = of.subjects - of.disagree - of.explained - of.undecided
    counts = [f"{of.subjects:,} rows{' of a sample' if of.sample else ''}", f"{agree:,} agree"]
    counts += [f"{of.disagree:,} disagree"]
    counts += [f"{of.explained:,} are explained"] if of.explained else []
    counts += [f"{of.undecided:,} are undecided"] if of.undecided else []
    if of.activities or of.repaired:
        counts.append(f"{of.repaired:,} repaired by {of.activities:,} activities")
    return f"{of.table}: {', '.join(counts)}"


def tables(given: Profile, names: Collection[str]) -> list[str]:
    """The tables of a profile that are meant, as it names them: those with these names, or all that can be verified.

    Raises SettingsError for one that isn't there, or can't be.
    """
    known = {qualified(name): name for name in given.tables}
    can = [name for name in given.tables if not _unverifiable(given, name)]
    found = []
    for name in names:
        if qualified(name) not in known:
            raise errors.SettingsError(
                f'the profile "{given.name}" has no table "{name}"', hint=f"those it has: {', '.join(given.tables)}"
            )
        found.append(known[qualified(name)])
        if why := _unverifiable(given, found[-1]):
            raise errors.SettingsError(
                f"{found[-1]} can't be verified: {why}", hint=f"those that can: {', '.join(can) or 'none'}"
            )
    if not found and not can:
        (name, *_) = given.tables
        raise errors.SettingsError(
            f'no table of the profile "{given.name}" can be verified: of {name}, {_unverifiable(given, name)}',
            hint='give the table its "key", and a field that is its column to each of the key\'s',
        )
    return list(dict.fromkeys(found or can))


def _unverifiable(given: Profile, name: str) -> str:
    table, links = given.tables[name], recorded(given, name).links
    if not table.rules:
        return "it has no rules, so nothing is recorded of it"
    if not table.key:
        return 'the profile has no "key" of it'
    if lacking := [column for column in table.key if column not in links]:
        return f"no column of {given.target.table} links to its {' and '.join(lacking)}, by which its log is found"
    return ""


def verify(
    settings: Settings, given: Profile, names: Collection[str] = (), wishes: Wishes = _PLAIN, *, log: Logger
) -> Iterator[Finding]:
    """Hold the rows of tables against the log, one table after another; of each comes a summary in the end.

    First come the commits that couldn't be read whole: what rows miss of them is found as anything else is. Raises
    SettingsError for tables that can't be, NotRunningError where no worker runs beside it, and BusyError where a
    repair would meet what comes late.
    """
    with ExitStack() as stack:
        edges = _Edges(stack, settings, given, log)
        if wishes.repair:
            postgres.check_rights(edges.control, REPAIR, partly=(), whole=())
            stack.enter_context(repairing(edges.writing(), edges.worker))
        works = [_Work(edges, name, wishes) for name in tables(given, names)]
        edges.fence.check()
        yield from edges.unread({work.table for work in works})
        for work in works:
            yield from work.run()


REPAIR: Final = {"cdc_worker.replay": ["SELECT", "INSERT", "DELETE"]}
"""What a repair writes, beside what the worker does."""


class _Edges:
    """The connections, and what is the same for all tables."""

    def __init__(self, stack: ExitStack, settings: Settings, given: Profile, log: Logger) -> None:
        self._stack, self._dsn, self.worker = stack, settings.dsn.get_secret_value(), settings.worker
        self.settings, self.log = settings, log
        self.rules = settings.rules(given)
        # To it values print as they do in the stream; and a float would lose digits.
        self.control = self.opened(postgres.connect_reading(self._dsn, self.worker))
        set_json_loads(partial(json.loads, parse_float=Decimal), self.control)
        self.checkpoint = checkpoint.read(self.control, self.worker)
        self.cluster = self.checkpoint.system_identifier
        self.target = catalog.check(self.control, given, self.rules)
        read = slot.read(self.control, self.checkpoint.slot)
        self.profile = catalog.as_told(self.control, given, self.rules, None if read is None else read.plugin)
        self.reading = self.opened(rows.connect(settings))
        self.fence = Fence(self.opened(postgres.connect(self._dsn, self.worker)), settings, log)
        self.time_zone = settings.zone(given, postgres.server(self.control).time_zone)

    def opened(self, connection: Connection) -> Connection:
        """A connection that is closed in the end."""
        return self._stack.enter_context(closing(connection))

    def writing(self) -> Connection:
        """A connection to write with."""
        return self.opened(postgres.connect(self._dsn, self.worker))

    def unread(self, tables: Collection[str]) -> Iterator[Unread]:
        """Commits that were not read whole, as far as that may be about these tables."""
        parameters = {"worker": self.worker, "cluster": self.cluster, "stream": ".".join(STREAM)}
        for commit_lsn, table, letters in self.control.execute(_UNREAD, parameters).fetchall():
            if table is None or table in tables:
                yield Unread(commit_lsn=commit_lsn, table=table, dead_letters=letters)

    def look_up(self, rules: Rules) -> Fetch:
        """Rows of other tables as they are now, for these rules."""
        lookups = Lookups(self.opened(postgres.connect_reading(self._dsn, self.worker)), rules)
        return lambda wanted: finished(lookups.fetch(wanted), lookups.connection)


# A begin or a commit that couldn't be read leaves nothing out.
_UNREAD: Final = """
SELECT commit_lsn::text, nullif(concat_ws('.', change ->> 'schema', change ->> 'table'), %(stream)s) AS about,
       array_agg(dead_letter_id ORDER BY dead_letter_id)
FROM cdc_worker.dead_letter
WHERE worker = %(worker)s AND kind = 'unreadable' AND discarded_at IS NULL
  AND starts_with(change_key, %(worker)s || '/' || %(cluster)s || '/') AND split_part(change_key, '/', -1) = '*'
GROUP BY dead_letter.commit_lsn, about ORDER BY dead_letter.commit_lsn, about
"""


class _Seen(NamedTuple):
    """Rows, and their histories up to a position, as told from events; where they have `left` their keys."""

    rows: Mapping[str, Row]
    keys: Mapping[str, RowKey]
    at: datetime
    until: LSN
    emptied: Sequence[Place]
    events: Mapping[str, Sequence[Event]]
    stories: Mapping[str, Story]
    left: Mapping[str, Sequence[Place]]


class _Work:
    """One table, held against its log."""

    def __init__(self, edges: _Edges, name: str, wishes: Wishes) -> None:
        self._edges, self._wishes = edges, wishes
        self._rows = Rows(edges.reading, edges.rules[qualified(name)], whole=True)
        self._recorded = recorded(edges.profile, name)
        self._log = Log(edges.profile, name)
        self._journal = Journal(
            edges.control,
            edges.profile.target,
            table=edges.target,
            recorded=self._recorded,
            rows=self._rows,
            checkpoint=edges.checkpoint,
        )
        self._clusters = self._journal.clusters
        self._teller = Teller(self._log, worker=edges.worker, clusters=self._clusters, named=self._rows.subject)
        self.table = self._recorded.table
        self._done = Verified(table=self.table, sample=wishes.sample is not None)
        stretches = self._stretches()
        # What was there before it was set up is no matter of explanation.
        self._begun = Silence(stretches=[stretch for stretch in stretches if not stretch[0]])
        self._given_back = Silence(stretches=[stretch for stretch in stretches if stretch[0]])
        self._suspects: dict[str, RowKey] = {}
        self._at_once = FIRST
        self._repairs = (
            _Repairs(edges, self._log, self._recorded, self._rows, self._clusters) if wishes.repair else None
        )

    def _scopes(self) -> list[tuple[int, Scope]]:
        """What was left out on each cluster, by its generation."""
        clusters, known = self._clusters, self._edges.checkpoint
        return [
            (generation, checkpoint.scope(self._edges.control, replace(known, system_identifier=of)))
            for generation, of in enumerate((*clusters.former, clusters.current), start=1)
        ]

    def _stretches(self) -> list[tuple[LSN, Place]]:
        """In which the worker didn't record the table, on this cluster and on former ones."""
        table = self._rows.table.name
        *former, (here, scope) = self._scopes()
        return [
            (begin, Place(generation, ENDLESS if end is None else end))
            for generation, of in former
            for begin, end in (*of.excluded.get(table, ()), *of.marked.get(table, ()))
        ] + [(begin, Place(here, end)) for begin, end in _stretches(scope, table)]

    def run(self) -> Iterator[Disagreement | Verified]:
        """All rows, and all keys without one, that are recorded; or some of them."""
        edges, done = self._edges, self._done
        total = self._rows.count() if self._wishes.sample is None else None
        with shown(edges.log, done.table, unit="rows", total=total) as advance:
            for keys, read in self._chunks():
                self._look(keys, read)
                advance(len(keys))
                while len(self._suspects) >= SUSPECTS:
                    yield from self._settled()
            while self._suspects:
                yield from self._settled()
        yield done

    def _chunks(self) -> Iterator[tuple[Sequence[RowKey], Read | None]]:
        """Rows as they are read, and then the keys that activities link to and that have no row."""
        size, sample = self._wishes.chunk_size, self._wishes.sample
        if sample is None:
            key: RowKey | None = None
            while (read := self._rows.after(key, size)).rows:
                yield [*read.rows], read
                key = next(reversed(read.rows))
        else:
            keys: Sequence[RowKey] = self._rows.sample(sample)
            while keys:
                read, left = self._rows.first(keys, size)
                yield keys[: len(keys) - len(left)], read
                keys = left
        for linked in self._journal.keys(size) if sample is None else _batched(self._journal.sample(sample), size):
            there = self._rows.there(linked)
            yield [key for key in linked if key not in there], None

    def _look(self, keys: Sequence[RowKey], read: Read | None) -> None:
        """Note whose history doesn't fit."""
        self._done.subjects += len(keys)
        while keys:
            part, keys = keys[: self._at_once], keys[self._at_once :]
            rows = {key: row for key in part if read is not None and (row := read.rows.get(key)) is not None}
            seen = self._tell(part, self._rows.of(part) if read is None else read._replace(rows=rows))
            self._suspects |= {subject: key for key in part if self._breaks(seen, subject := self._rows.subject(key))}
            count = max(1, sum(map(len, seen.events.values())))
            self._at_once = max(1, min(self._wishes.chunk_size, 4 * self._at_once, EVENTS * len(part) // count))

    def _tell(self, keys: Sequence[RowKey], read: Read, *, again: bool = False) -> _Seen:
        """Tell the histories of rows that were read by now."""
        fence = self._edges.fence
        until = fence.here()
        fence.wait_for(until)
        events: dict[str, list[Event]] = {}
        more, known = [*keys], dict[str, RowKey]()
        while more:  # and of the keys that they had before
            known |= {self._rows.subject(key): key for key in more}
            for subject, found in self._journal.of(more, until=until).items():
                events.setdefault(subject, []).extend(found)
            befores = dict.fromkeys(event.before for found in events.values() for event in found if event.before)
            more = [key for key in befores if self._rows.subject(key) not in known]
        rows = {self._rows.subject(key): self._masked(row) for key, row in read.rows.items()}
        left: Mapping[str, Sequence[Place]] = {}
        if again or (self._wishes.sample is None and self._journal.remembers):  # else it takes too long
            left = self._journal.left([*known.values()], until=until)
        seen = _Seen(rows, known, read.at, until, self._journal.emptied(until), events, {}, left)
        return seen._replace(stories=self._stories(seen, self._begun))

    def _masked(self, row: Row) -> Row:
        masked = self._rows.table.masked(row)
        assert masked is not None
        return masked

    def _stories(self, seen: _Seen, silence: Silence) -> Mapping[str, Story]:
        return self._teller.stories(seen.events, emptied=seen.emptied, left=seen.left, silence=silence)

    def _breaks(self, seen: _Seen, subject: str) -> list[Break]:
        row = seen.rows.get(subject)
        return self._teller.breaks(subject, seen.stories[subject], None if row is None else self._log.values(row))

    def _settled(self) -> Iterator[Disagreement]:
        """Look again at those whose history doesn't fit, until it is certain that it doesn't."""
        fence, deadline = self._edges.fence, time.monotonic() + self._wishes.patience
        suspects = dict(islice(self._suspects.items(), min(SUSPECTS, self._at_once)))
        self._suspects = {subject: key for subject, key in self._suspects.items() if subject not in suspects}
        while suspects:
            here = fence.here()
            if not fence.settle(self._wishes.patience):
                yield from self._undecided(suspects, f"transactions go on: {_holders(self._edges.control)}")
                return
            keys = [*suspects.values()]
            seen = self._tell(keys, self._rows.of(keys), again=True)
            broken = {subject: gaps for subject in suspects if (gaps := self._breaks(seen, subject))}
            again = {
                subject: suspects[subject]
                for subject, gaps in broken.items()
                if any(gap.after is None for gap in gaps) and self._is_changing(seen, subject, here)
            }
            yield from self._judged(seen, {of: gaps for of, gaps in broken.items() if of not in again})
            if again and time.monotonic() > deadline:
                yield from self._undecided(again, "it is changed all the time")
                return
            suspects = again

    def _is_changing(self, seen: _Seen, subject: str, here: LSN) -> bool:
        """Whether something was recorded of a row after a position: it may have been read before or after that."""
        own = seen.events[subject]
        places = [*(event.place for event in own), *seen.emptied, *seen.left.get(subject, ())]
        reads = (self._teller.read_at(event) for event in own if self._log.is_read(event))
        late, unseen = self._clusters.after(here), self._clusters.after(seen.until)
        return any(place > late for place in places) or any(at is not None and at > unseen for at in reads)

    def _judged(self, seen: _Seen, broken: Mapping[str, list[Break]]) -> Iterator[Disagreement]:
        """What is to be said of rows whose log is certain not to be true."""
        left: dict[str, list[Break]] = {}
        for subject, (gaps, why) in self._explained(seen, broken).items():
            if why is None:
                left[subject] = gaps
                continue
            self._done.explained += 1
            for gap in gaps:
                yield self._said(subject, gap, explained=why)
        outcomes = {} if self._repairs is None else self._repairs.write(seen, left, self._done)
        for subject, gaps in left.items():
            self._done.disagree += 1
            said = outcomes.get(subject, [None] * len(gaps))
            self._done.repaired += all(outcome == "yes" for outcome in said)
            for gap, outcome in zip(gaps, said, strict=True):
                yield self._said(subject, gap, repaired=outcome)

    def _said(
        self, subject: str, gap: Break, *, explained: str | None = None, repaired: str | None = None
    ) -> Disagreement:
        values = None
        if self._wishes.values and gap.differences:
            values = {str(d.of): Difference(log=d.known.value, found=d.found.value) for d in gap.differences}
        return Disagreement(
            table=self._done.table,
            subject=subject,
            missing=gap.what,
            columns=[str(difference.of) for difference in gap.differences],
            values=values,
            after=None if gap.before is None else gap.before.change_key,
            before=None if gap.after is None else gap.after.change_key,
            explained=explained,
            repaired=repaired,
        )

    def _undecided(self, subjects: Collection[str], why: str) -> Iterator[Disagreement]:
        for subject in subjects:
            self._done.undecided += 1
            yield Disagreement(table=self._done.table, subject=subject, undecided=why)

    def _explained(self, seen: _Seen, broken: Mapping[str, list[Break]]) -> dict[str, tuple[list[Break], str | None]]:
        """What is missing that isn't known to be; or, where all of it is, that and why."""
        if not broken:
            return {}
        skipped = {of: [event for event in seen.events[of] if event.skipped] for of in broken}
        known: dict[Explanation, Silence] = {
            "erased": Silence(blank=self._erased(seen, broken)),
            "dead letter": Silence(events=self._dead_letters(seen, broken)),
            "skipped": Silence(events=skipped),
            "left to triggers": self._given_back,
        }
        together = self._begun
        for silence in known.values():
            together = together.with_(silence)
        alone = {why: self._stories(seen, self._begun.with_(silence)) for why, silence in known.items()}
        all_ = self._stories(seen, together)
        found: dict[str, tuple[list[Break], str | None]] = {}
        for subject, gaps in broken.items():
            reasons = [why for why in known if not self._breaks(seen._replace(stories=alone[why]), subject)]
            rest = self._breaks(seen._replace(stories=all_), subject)
            concerned = [why for why, of in known.items() if of.about(subject)]
            found[subject] = (rest, None) if rest else (gaps, reasons[0] if reasons else " and ".join(concerned))
        return found

    def _erased(self, seen: _Seen, subjects: Collection[str]) -> dict[str, Place]:
        """Until where nothing may be told of rows that are persons."""
        scopes = self._scopes()
        fields = [field for field, column in self._rows.table.persons.items() if (column,) == self._rows.key]
        found: dict[str, Place] = {}
        for subject in subjects:
            ends = [
                Place(generation, ENDLESS if end is None else end)
                for generation, scope in scopes
                for field in fields
                for _, end in scope.erased.get((field, seen.keys[subject][0]), ())
            ]
            if ends:
                found[subject] = max(ends)
        return found

    def _dead_letters(self, seen: _Seen, subjects: Collection[str]) -> dict[str, list[Event]]:
        """What wasn't recorded because it couldn't be."""
        schema, name = self._rows.table.name
        parameters = {
            "worker": self._edges.worker,
            "schema": schema,
            "table": name,
            "column": self._rows.key[0],
            "keys": [seen.keys[subject][0] for subject in subjects],
        }
        found: dict[str, list[Event]] = {}
        for change_key, operation, old, new in self._edges.control.execute(_DEAD_LETTERS, parameters).fetchall():
            parsed = parsed_key(self._edges.worker, self._clusters, change_key)
            # Repairs, or backfills, that failed are no excuse for what they were to make up for.
            if parsed is None or parsed.kind != "stream" or not parsed.place.generation:
                continue
            before, after = self._rows.table.subject(old), self._rows.table.subject(new)
            meant: list[tuple[str | None, What]] = [(before, "deleted")] if before not in (None, after) else []
            meant += [(after, "created" if operation == "insert" else "told")] if after is not None else []
            if operation == "truncate":  # of a part of the table
                meant = [(subject, what) for subject in subjects for what in UNCLEAR]
            for subject, what in meant:
                if subject is not None and subject in subjects:
                    found.setdefault(subject, []).append(Event(subject, EVERYTHING, what, parsed.place, skipped=True))
        return found


UNCLEAR: Final[tuple[What, ...]] = ("deleted", "created")
"""What may have become of a row of which it isn't known."""

_DEAD_LETTERS: Final = """
SELECT change_key, change ->> 'operation', nullif(change -> 'old', 'null'), nullif(change -> 'new', 'null')
FROM cdc_worker.dead_letter
WHERE worker = %(worker)s AND change ->> 'schema' = %(schema)s AND change ->> 'table' = %(table)s
  AND (change ->> 'operation' = 'truncate' OR change -> 'old' ->> %(column)s = ANY (%(keys)s)
       OR change -> 'new' ->> %(column)s = ANY (%(keys)s))
"""

# Whoever has a number holds a lock on it, which everybody may see.
_HOLDERS: Final = """
SELECT coalesce('the prepared transaction ' || quote_literal(gid), format('process %s (%s)', pid,
           concat_ws(', ', coalesce(nullif(application_name, ''), 'no name'), state,
                     'for ' || date_trunc('second', clock_timestamp() - xact_start))))
FROM pg_locks LEFT JOIN pg_stat_activity USING (pid) LEFT JOIN pg_prepared_xacts ON transaction = transactionid
WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted AND pid IS DISTINCT FROM pg_backend_pid()
ORDER BY age(transactionid) DESC LIMIT 3
"""


def _holders(connection: Connection) -> str:
    """Whose transactions have been going on for longest."""
    return ", ".join(who for (who,) in connection.execute(_HOLDERS)) or "they are over by now"


def _stretches(scope: Scope, table: tuple[str, str]) -> list[tuple[LSN, LSN]]:
    """In which the worker didn't record a table. Raises NotSetUpError where that is still so."""
    name = ".".join(table)
    found: list[tuple[LSN, LSN]] = []
    if not (scope.excluded.get(table) or scope.marked.get(table)):
        raise errors.NotSetUpError(f"{name} can't be verified: it is not set up", hint="run: cdc-worker setup")
    for of, who in ((scope.excluded, "triggers"), (scope.marked, "the application's old code")):
        for begin, end in of.get(table, ()):
            if end is None:
                raise errors.NotSetUpError(
                    f"{name} can't be verified: it is left to {who}, and the worker doesn't record all of it",
                    hint="run: cdc-worker cutover",
                )
            found.append((begin, end))
    return found


# What is missing, made up for.


@dataclass(slots=True)
class _Unerased:
    """The sink's `Progress` of repairs: there is none to make, but they are only written if nobody was erased since."""

    worker: str
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
        """The statement that makes sure of that until the end of its transaction."""
        query = "UPDATE cdc_worker.checkpoint SET nonce = nonce WHERE worker = {} AND nonce = {}"
        return Statement(query, (self.worker, self.nonce))

    def fenced(self) -> errors.FencedError:
        """A person was erased, or a table cut over."""
        return errors.FencedError(f'what the worker "{self.worker}" leaves out has changed')


class _Made(NamedTuple):
    """What is to be written for a break, or why nothing is."""

    activities: list[Activity]
    reason: str | None = None


class _Repairs:
    """Writes what is missing in the log of a table."""

    def __init__(self, edges: _Edges, log: Log, recorded: Recorded, rows: Rows, clusters: Clusters) -> None:
        self._edges, self._log, self._recorded, self._rows = edges, log, recorded, rows
        self._clusters = clusters
        reading = reconcile.unmasked(edges.settings.backfill_rules(edges.profile), rows.table.name)
        changing = reconcile.unmasked(edges.settings.rules(reconcile.of_nobody(edges.profile)), rows.table.name)
        self._reading, self._changing = ((rules, edges.look_up(rules)) for rules in (reading, changing))
        self._zone = ZoneInfo(edges.time_zone)
        self._zoned = catalog.zoned(edges.profile.target, edges.target)
        self._connection = edges.writing()

    def write(self, seen: _Seen, broken: Mapping[str, list[Break]], done: Verified) -> dict[str, list[str | None]]:
        """Make up for what is missing; returns for each break `yes`, or why not."""
        while broken:
            known = checkpoint.read(self._edges.control, self._edges.worker)
            scope = Scope(erased=checkpoint.scope(self._edges.control, known).erased)
            made = {
                subject: [self._made(seen, subject, gap, scope) for gap in gaps] for subject, gaps in broken.items()
            }
            try:
                refused = self._write(made, _Unerased(known.worker, str(known.nonce)), seen.at, done)
            except errors.FencedError:
                self._connection.rollback()
                continue
            return {
                subject: [
                    of.reason or (_REFUSED if any(a.change_key in refused for a in of.activities) else "yes")
                    for of in ofs
                ]
                for subject, ofs in made.items()
            }
        return {}

    def _made(self, seen: _Seen, subject: str, gap: Break, scope: Scope) -> _Made:
        """The activities that make up for what is missing."""
        key: Row = {
            column: catalog.value(value.encode(), self._rows.columns[column])
            for column, value in zip(self._rows.key, seen.keys[gap.subject], strict=True)
        }
        row = seen.rows.get(subject)
        mend = reconcile.mend(self._log, self._recorded, gap, key=key, columns=[*self._rows.columns], row=row)
        number = reconcile.number(gap)
        if mend is None or number is None:
            return _Made(
                [], "no value of the column is known that is mapped so" if mend is None else "no place is left"
            )
        when = self._moment(seen, gap, there=mend.there)
        at = when.lsn
        rules, look_up = self._reading if mend.change.operation == "read" else self._changing
        transformer = Transformer(rules, worker=self._edges.worker, system_identifier=self._edges.cluster, scope=scope)
        commit = Transaction(0, at, at, when.date, [mend.change], [], [mend.change], 0, True, True)
        found: dict[str, Activity] = {}
        for outcome in settled(transformer, commit, look_up):
            rule = outcome.change_key.rpartition("/")[2]
            if not reconcile.meant(self._log, self._recorded, gap, rule):
                continue
            if isinstance(outcome, DeadLetter):
                return _Made([], f"the rule {rule} failed: {outcome.reason}")
            if outcome.fields["metadata"].get("erased") is True:
                return _Made([], "a person was erased of whom it would tell")
            found[rule] = reconcile.finished(
                self._log,
                self._recorded,
                mend,
                outcome,
                rule=rule,
                worker=self._edges.worker,
                clusters=self._clusters,
                moment=replace(when, date=self._date(outcome, when)),
                number=number,
            )
        if not reconcile.covered(self._log, gap, [*found]):
            return _Made([], _NO_RULE[gap.what])
        return _Made([*found.values()])

    def _moment(self, seen: _Seen, gap: Break, *, there: bool) -> Moment:
        """When it can have been at the latest, and since when; and as of when it is told, for a row that is there."""
        not_before = None if gap.before is None else self._dated(gap.before)
        before = "" if not_before is None else not_before.isoformat()
        if gap.before is not None and self._log.is_read(gap.before):
            before = str((gap.before.metadata or {}).get("as_of", ""))
        date = None if gap.after is None else self._dated(gap.after)
        if there or gap.after is None or date is None:
            return Moment(seen.at.isoformat(), seen.until, date or seen.at, before)
        at, lsn = gap.after.place, gap.after.place.lsn or seen.until
        if 0 < at.generation < self._clusters.here:
            lsn = INVALID  # which is before all that was committed on this cluster
        return Moment(date.isoformat(), lsn, date, before)

    def _dated(self, event: Event) -> datetime | None:
        return dated(event.at, self._zone) if event.at else None

    def _date(self, outcome: Activity, when: Moment) -> Any:
        """How an activity is dated: of a row that came to be by what the row says, as a backfill does it."""
        given = outcome.fields["occurred_at"]
        date = None if given is None else dated(given, self._zone)
        if date is None:
            return when.date
        return given if not self._zoned and dated(given, None) is None else date

    def _write(
        self, made: Mapping[str, Sequence[_Made]], progress: _Unerased, at: datetime, done: Verified
    ) -> set[str]:
        """Write activities; returns the keys of those that the target refused."""
        edges = self._edges
        sink = Sink(
            self._connection,
            edges.profile.target,
            table=edges.target,
            time_zone=edges.time_zone,
            progress=progress,
            decode=lambda change: change,
        )
        groups = [of.activities for ofs in made.values() for of in ofs if of.activities]
        lines = [
            msgspec.structs.replace(sink.line(activity, activity.change), index=index, committed_at=at)
            for index, group in enumerate(groups)
            for activity in group
        ]
        if not lines:
            return set()
        batch = Batch(progress.position)
        batch.add(lines, Transaction(0, LSN(1), LSN(2), at, [], [], [], 0, True, True), done=len(groups), complete=True)
        written = finished(sink.write(batch), sink.connection)
        failpoints.reach("repaired")
        done.activities += written.activities
        return {letter.change_key for letter in written.dead_letters}


_REFUSED: Final = "the target refused it: see cdc-worker dead-letters list"

_NO_RULE: Final = {
    "creation": 'no rule on inserts has a "backfill", or none that applies to it',
    "deletion": "no rule tells it",
    "change": "no rule tells it",
}


def _batched(keys: Sequence[RowKey], size: int) -> Iterator[Sequence[RowKey]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))
