"""What was made up in place of activities that come late: what a backfill or a repair has written, which gives way."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, Final, NamedTuple

from psycopg import sql

from cdc_worker import catalog, gap, postgres
from cdc_worker.activities import Activity, Key, Kind, Line, Place, Prepared, parsed_key
from cdc_worker.catalog import TargetTable
from cdc_worker.changes import Row
from cdc_worker.checkpoint import Checkpoint
from cdc_worker.history import Event, Recorded, made_up, recorded, standing
from cdc_worker.journal import Journal
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile, Target
from cdc_worker.rows import RowKey, Rows
from cdc_worker.rules import Rules, qualified
from cdc_worker.templates import text
from cdc_worker.truth import Break, Log, Teller

MADE_UP: Final[Sequence[Kind]] = ("backfill", "repair")
"""Kinds of keys."""


def any_made_up(connection: Connection, target: Target, table: TargetTable, checkpoint: Checkpoint) -> bool:
    """Whether there is, or may soon be, anything that was made up. `table` is the target as the catalog has it."""
    return _any(connection, _MADE_UP, target, table, checkpoint)


def _any(connection: Connection, query: sql.SQL, target: Target, table: TargetTable, checkpoint: Checkpoint) -> bool:
    key = catalog.row_key(target, table)
    if key is None:
        return False
    found = postgres.with_parameters(query.format(table=sql.Identifier(*qualified(target.table)), key=key))
    parameters = {"worker": checkpoint.worker}
    for kind in MADE_UP:
        parameters[kind] = f"{checkpoint.worker}/{checkpoint.system_identifier}/{kind}/"
    return connection.execute(found, parameters).fetchone() == (True,)


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


class Substitutes:
    """What was made up in place of activities that come late."""

    def __init__(
        self,
        connection: Connection,
        profile: Profile,
        rules: Rules,
        *,
        table: TargetTable,
        checkpoint: Checkpoint,
        reading: Connection,
    ) -> None:
        """`table` is the target as the catalog has it; the captured tables are looked at through `reading`."""
        self._worker, self.clusters = checkpoint.worker, gap.clusters(connection, checkpoint)
        self._until = checkpoint.position.lsn
        self._tables: dict[tuple[str, str], _Table] = {}
        self._unmended: dict[tuple[str, str], list[Event]] = {}
        target = profile.target
        for name, spec in profile.tables.items():
            meant = recorded(profile, name)
            if not spec.rules or not spec.key or not meant.links.keys() >= {*spec.key}:
                continue  # nobody finds what is recorded of its rows, so nothing was made up of them
            found = Rows(reading, rules[qualified(name)])
            journal = Journal(connection, target, table=table, recorded=meant, rows=found, checkpoint=checkpoint)
            teller = Teller(Log(profile, name), worker=self._worker, clusters=self.clusters, named=found.subject)
            told = frozenset(rule.label for rule in spec.rules if rule.backfill is not None)
            self._tables[qualified(name)] = _Table(meant, found, journal, teller, told)
        column = next((column for column, of in target.columns.items() if of == "metadata"), None)
        prefixes = [f"{self._worker}/{self.clusters.current}/{kind}/" for kind in MADE_UP]
        for name, metadata in connection.execute(_UNMENDED, (column, self._worker, *prefixes)):
            key = self._parsed(name)
            if key is not None and (of := self._tables.get(qualified(key.table))) is not None:
                what = of.recorded.what(key.rule)
                event = Event(key.subject, key.rule, what, key.place, key.kind, change_key=name, metadata=metadata)
                self._unmended.setdefault((key.table, key.subject), []).append(event)
        self._mended = bool(self._unmended) or _any(connection, _REPAIRED, target, table, checkpoint)

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
            events = {
                of: [*line.events.get(of, ()), *self._unmended.get((table.recorded.table, of), ())] for of in group
            }
            history = _History(table, events, {of: [*line.left.get(of, ())] for of in group}, emptied)
            late = [of for of in concerned if of.key.kind == "stream" and table.rows.subject(of.row) in group]
            late.sort(key=lambda of: of.key.place)
            for place, of_change in groupby(late, key=lambda of: of.key.place):
                told = [*of_change]
                gone = history.contradicted_by([self._event(table, of) for of in told], place)
                keys = [key for key in map(self._parsed, gone) if key is not None]
                yield from ((of, keys) for of in told)
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


class _History:
    """What is recorded of one row, by whichever key: what comes late is added to it in its order."""

    def __init__(
        self,
        table: _Table,
        events: Mapping[str, Sequence[Event]],
        left: Mapping[str, list[Place]],
        emptied: Sequence[Place],
    ) -> None:
        """`left` has where the row lost a key, `emptied` where the table was."""
        self._teller, self._subject = table.teller, table.rows.subject
        self._events, self._left, self._emptied = events, left, emptied
        self._broken = self._breaks()

    def contradicted_by(self, late: Sequence[Event], place: Place) -> list[str]:
        """Add what comes late at a place; returns the keys of what was made up that can't be so with it."""
        added: dict[str, list[Event]] = {}
        for event in late:
            added.setdefault(event.subject, []).append(event)
            if event.before:
                self._left[self._subject(event.before)].append(place)
        self._events = {subject: [*of, *added.get(subject, ())] for subject, of in self._events.items()}
        gone = list[str]()
        while any(map(_is_made_up, chain.from_iterable(self._events.values()))):
            now = self._breaks()
            beside = [event for of in now.keys() - self._broken.keys() for event in (now[of].before, now[of].after)]
            false = {
                of.change_key
                for of in beside
                if of is not None and _is_made_up(of) and (self._teller.read_at(of) or place) >= place
            }
            if not false:
                self._broken = now
                break
            gone += filter(None, false)
            self._events = {
                name: [of for of in events if of.change_key not in false] for name, events in self._events.items()
            }
        return gone

    def _breaks(self) -> dict[tuple[str, str, str], Break]:
        """Where its history breaks off."""
        stories = self._teller.stories(self._events, emptied=self._emptied, left=self._left)
        return {
            (gap.what, _key_of(gap.before), _key_of(gap.after)): gap
            for story in stories.values()
            for gap in story.breaks
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


_UNMENDED: Final = """
SELECT change_key, (fields ->> %s)::jsonb FROM cdc_worker.dead_letter
WHERE worker = %s AND (starts_with(change_key, %s) OR starts_with(change_key, %s))
"""

# A repair may be the only one who has made anything up, and it leaves no other trace.
_MADE_UP: Final = sql.SQL("""
SELECT EXISTS (SELECT FROM cdc_worker.backfill WHERE worker = %(worker)s)
    OR EXISTS (SELECT FROM cdc_worker.dead_letter WHERE worker = %(worker)s AND starts_with(change_key, %(repair)s))
    OR EXISTS (SELECT FROM {table} WHERE starts_with({key}, %(backfill)s) OR starts_with({key}, %(repair)s))
""")

_REPAIRED: Final = sql.SQL("SELECT EXISTS (SELECT FROM {table} WHERE starts_with({key}, %(repair)s))")
