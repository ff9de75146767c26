"""Whether a log is true: what activities tell of columns, a row's history told from them, and where that breaks off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Final, Literal, NamedTuple

from cdc_worker import profile as profiles
from cdc_worker.activities import Clusters, Place
from cdc_worker.changes import Row
from cdc_worker.history import Event
from cdc_worker.lsn import LSN
from cdc_worker.profile import Match, Matcher, Profile
from cdc_worker.templates import Expression, number, parse, text
from cdc_worker.values import INFINITE, Value

AFTER_ALL: Final = 1 << 62
"""In place of an ordinal: after all changes of a commit."""

_OURS: Final = frozenset(
    {
        *("changed_by", "context_source", "context_trusted", "unlinked", "untruncated", "erased"),
        *("backfilled", "reconciled", "values", "as_of", "as_of_lsn", "not_before"),
    }
)
"""Names in metadata under which the worker itself tells something, whatever a rule has there."""


class Of(NamedTuple):
    """A column of a captured table, or what a profile has `mapped` it to under a name of its own."""

    column: str
    mapped: str = ""

    def __str__(self) -> str:
        return self.mapped or self.column


class Told(NamedTuple):
    """A value as an activity tells it; of a `cut` text ending with an ellipsis that is only how it begins."""

    value: Any
    cut: bool = False

    def agrees(self, other: Told) -> bool:
        """Whether both can be the same value, which is told as JSON here and a column's there."""
        ours, theirs = self.value, other.value
        if type(ours) is type(theirs) and ours == theirs:  # as nearly all are
            return True
        if ours is None or theirs is None:
            # To a wal2json before 2.6 what is no finite number is null.
            return ours is theirs or ours in INFINITE or theirs in INFINITE
        if isinstance(ours, bool) or isinstance(theirs, bool):
            return text(ours) == text(theirs)
        if not (isinstance(ours, str) and isinstance(theirs, str)) and (one := number(ours)) is not None:
            return one == number(theirs)
        ours, theirs = text(ours), text(theirs)
        return ours == theirs or self._begins(theirs) or other._begins(ours)

    def _begins(self, whole: str) -> bool:
        return self.cut and isinstance(self.value, str) and self.value[-1:] == "…" and whole.startswith(self.value[:-1])


Known = dict[Of, Told]


@dataclass(frozen=True, slots=True)
class Telling:
    """What activities by a rule tell: names in their metadata, by the columns whose old or new values they have.

    Under the names `changes` each changed column has both. `was_constant` and `is_constant` are values without which
    the rule doesn't apply. `read` are names within `values`, for rows that were there before. Its updates are `about`
    some columns, or any if that is None. Rows of which it is made up have the values `read_constant`.
    """

    old: Mapping[Of, str] = field(default_factory=dict)
    new: Mapping[Of, str] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    was_constant: Mapping[Of, Value] = field(default_factory=dict)
    is_constant: Mapping[Of, Value] = field(default_factory=dict)
    read: Mapping[Of, str] = field(default_factory=dict)
    read_constant: Mapping[Of, Value] = field(default_factory=dict)
    identity: Mapping[Of, str] = field(default_factory=dict)
    about: frozenset[str] | None = None

    def tells(self, of: Of) -> bool:
        """Whether it tells the new value of a column that its rule is about."""
        return of in self.new or of in self.is_constant or (bool(self.changes) and not of.mapped)


class Said(NamedTuple):
    """What one change's activities tell: old and new values, and of which columns the value may be another now.

    `changed` is None if that may be any column. Of those that are `untold` an activity lacks the value that it has
    by its rule: it was written by another one of that name.
    """

    old: Known
    new: Known
    changed: frozenset[str] | None
    untold: frozenset[Of] = frozenset()


_NOTHING: Final = Telling()


class Log:
    """What the rules of a table put on record, as far as a row can be held against it."""

    def __init__(self, profile: Profile, name: str) -> None:
        table = profile.tables[name]
        self._table = table
        self._tracked: dict[Of, bool] = {}
        own = _OURS | {*profile.context}
        self.tellings: dict[str, Telling] = {rule.label: _telling(table, rule, own) for rule in table.rules}
        self._living = frozenset(rule.label for rule in table.rules if rule.on == ["update"])
        self.creation = any(rule.on == ["insert"] and rule.certain for rule in table.rules)
        self.deletion = any(rule.on == ["delete"] and rule.certain for rule in table.rules)
        self.mapped = {Of(mapped.column, of): mapped for of, mapped in table.mapped.items()}

    def values(self, row: Row) -> Known:
        """What a row, masked as the log has it, has in its columns and in those that are mapped."""
        found = {Of(column): Told(value) for column, value in row.items()}
        mapped = {
            of: Told(to.map.get(text(row[of.column]), to.default)) for of, to in self.mapped.items() if of.column in row
        }
        return {**found, **mapped}

    def unmapped(self, of: Of, value: Any, like: Value) -> Told | None:
        """A value of the real column, of the type of another, that is mapped to this one."""
        mapped = self.mapped[of]
        if value == mapped.default:
            return Told(None)
        for key, mapped_to in mapped.map.items():
            if mapped_to == value:
                if isinstance(like, bool) or (like is None and key in ("true", "false")):
                    return Told(key == "true")
                return Told(int(key) if isinstance(like, int) else key)
        return None

    def tracks(self, of: Of) -> bool:
        """Whether every change of a column is told with its new value, so that the log knows it."""
        if of not in self._tracked:
            self._tracked[of] = of.column not in self._table.ignored and self._tells_always(of)
        return self._tracked[of]

    def _tells_always(self, of: Of) -> bool:
        claimed_without = False  # a rule may have claimed it and not told it
        for rule in self._table.rules:
            if rule.on != ["update"]:
                continue
            telling = self.tellings[rule.label]
            about = (
                rule.changed == ["*"] or of.column in rule.changed or (of.mapped != "" and of.mapped in rule.changed)
            )
            if rule.changed == ["unclaimed"]:
                about = not of.mapped and not claimed_without
            if about and telling.tells(of) and rule.certain:
                return True
            claims = telling.about is None or of.column in telling.about
            sure = telling.tells(of) and not rule.skip_unless and rule.rule is None
            claimed_without = claimed_without or (claims and not sure)
        return False

    def said(self, events: Sequence[Event]) -> Said:
        """What the activities of one change tell together."""
        old: Known = {}
        new: Known = {}
        changed: set[str] | None = set()
        untold: set[Of] = set()
        for event in events:
            telling = self.tellings.get(event.rule)
            metadata = event.metadata or {}
            if telling is None or not isinstance(metadata, Mapping) or "erased" in metadata:
                changed = None
                continue
            if self.is_read(event):
                continue  # it tells of another time than its place
            old |= {of: Told(metadata[name]) for of, name in telling.old.items() if name in metadata}
            new |= {of: Told(metadata[name]) for of, name in telling.new.items() if name in metadata}
            untold |= {of for of, name in telling.new.items() if name not in metadata}
            old |= {of: Told(value) for of, value in telling.was_constant.items()}
            new |= {of: Told(value) for of, value in telling.is_constant.items()}
            found = _changes(metadata, telling.changes)
            for column, values in found.items():
                for side, name in ((old, "old"), (new, "new")):
                    if name in values:
                        side.setdefault(Of(column), Told(values[name], cut=True))
            if found:
                about: frozenset[str] | None = frozenset(found)
            else:
                about = None if telling.changes else telling.about
            if event.what in ("told", "moved"):
                changed = None if changed is None or about is None else changed | about
        return Said(old, new, None if changed is None else frozenset(changed), frozenset(untold - new.keys()))

    def is_read(self, event: Event) -> bool:
        """Whether it was made of a row that was there already."""
        made_up = isinstance(event.metadata, Mapping) and event.metadata.get("backfilled") is True
        return event.kind == "backfill" or (event.kind == "repair" and (made_up or event.what == "created"))

    def lives(self, event: Event) -> bool:
        """Whether its row was there afterwards, although it says nothing of how it came to be."""
        return event.rule in self._living or event.kind == "backfill"

    def meant(self, event: Event) -> Known:
        """What is so of a row by that such an activity is made of it."""
        return {of: Told(value) for of, value in self.tellings.get(event.rule, _NOTHING).read_constant.items()}

    def read(self, event: Event) -> Known:
        """What is told of a row as it was when it was read."""
        telling, metadata = self.tellings.get(event.rule, _NOTHING), event.metadata
        if not isinstance(metadata, Mapping):
            return {}
        values = metadata.get("values")
        found = {of: Told(metadata[name]) for of, name in telling.identity.items() if name in metadata}
        if isinstance(values, Mapping):
            found |= {of: Told(values[name]) for of, name in telling.read.items() if name in values}
        return found


def _changes(metadata: Mapping[str, Any], names: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """The changed columns with their values, as far as there are any."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        of = metadata.get(name)
        if isinstance(of, Mapping):
            found |= {column: values for column, values in of.items() if isinstance(values, Mapping)}
    return found


def _telling(table: profiles.Table, rule: profiles.Rule, own: frozenset[str]) -> Telling:
    if rule.rule is not None:  # what a function returns stands in place of all this
        return _NOTHING
    (on,) = rule.on if len(rule.on) == 1 else ("",)
    row = {"delete": "old", "insert": "new", "update": "new"}.get(on, "")
    sides: dict[str, dict[Of, str]] = {"old": {}, "new": {}, "": {}}
    changes = []
    identity = {} if on == "truncate" else table.identity
    for name, source in {**identity, **rule.metadata}.items():
        path = _path(source)
        if path is None or name in own:
            continue
        if path == "changes":
            changes.append(name)
            continue
        side, _, column = path.partition(".")
        side = row if side == "row" else side
        if side in ("old", "new"):
            sides[side].setdefault(_of(table, column), name)
    about: set[str] | None = None
    if not {"*", "unclaimed"} & {*rule.changed}:
        about = {_of(table, column).column for column in rule.changed}
    backfill = rule.backfill.metadata if rule.backfill is not None else {}
    return Telling(
        old=sides["old"],
        new=sides["new"],
        changes=tuple(changes),
        was_constant=dict(_constants(table, rule.from_)),
        is_constant=dict(_constants(table, rule.to)),
        read=_columns(table, backfill),
        read_constant=dict(_of_reads(table, rule)),
        identity={of: name for of, name in _columns(table, table.identity).items() if name not in own},
        about=None if about is None else frozenset(about),
    )


def _path(source: profiles.Value) -> str | None:
    """What a value is, if it is nothing but that."""
    if not isinstance(source, str):
        return None
    match parse(source):
        case [Expression(paths=(path,), default=None, spec="")]:
            return path
    return None


def _of(table: profiles.Table, column: str) -> Of:
    return Of(table.mapped[column].column, column) if column in table.mapped else Of(column)


def _columns(table: profiles.Table, values: Mapping[str, profiles.Value]) -> dict[Of, str]:
    """The columns of the row that are told, each with the name under which."""
    found: dict[Of, str] = {}
    for name, source in values.items():
        side, _, column = (_path(source) or "").partition(".")
        if side in ("row", "new"):
            found.setdefault(_of(table, column), name)
    return found


def _of_reads(table: profiles.Table, rule: profiles.Rule) -> Iterator[tuple[Of, Value]]:
    """Values without which a rule that changes tell of is not made up of a row."""
    if rule.backfill is not None and rule.backfill.when is not None and rule.on == ["update"]:
        when = rule.backfill.when
        yield from _constants(table, {**when.row, **when.new})


def _constants(table: profiles.Table, matchers: Mapping[str, Matcher]) -> Iterator[tuple[Of, Value]]:
    for column, matcher in matchers.items():
        if isinstance(matcher, Match):
            if matcher == Match(null=True):
                yield _of(table, column), None
        elif not isinstance(matcher, list):
            yield _of(table, column), matcher


# Rows' histories.

What = Literal["creation", "deletion", "change"]
"""What is missing where a history breaks off."""


class Difference(NamedTuple):
    """What the log knows of a column, and what the next activity, or the row, says."""

    of: Of
    known: Told
    found: Told


class Break(NamedTuple):
    """What is missing in a log: between two activities, or after the last where `after` is None.

    `subject` is the key that the row had `before`. `known` is what is known there, or, of a row of which nothing says
    that it came to be, what is known thereafter.
    """

    what: What
    subject: str
    before: Event | None
    after: Event | None
    known: Known
    differences: tuple[Difference, ...] = ()


@dataclass(slots=True, eq=False)
class _Life:
    """A row, and the history that goes on about it."""

    story: Story | None = None


@dataclass(slots=True)
class Story:
    """What a log says of a row in the end; `exists` is None where it says nothing.

    `last` is what was recorded last. A row of which something is told before anything says that it came to be was
    there before all, or its creation is missing: `untold` is what was told first. `rows` counts those that had the key
    before; `life` is that of the row, whatever key it has.
    """

    exists: bool | None = False
    known: Known = field(default_factory=dict)
    last: Event | None = None
    untold: Event | None = None
    rows: int = 0
    life: _Life = field(default_factory=_Life)
    breaks: list[Break] = field(default_factory=list)

    def end(self) -> None:
        """The row is gone."""
        self.exists, self.known, self.untold = False, {}, None
        self.rows += 1
        self.live(_Life())

    def live(self, life: _Life) -> None:
        """The row is this one."""
        self.life, life.story = life, self

    def forget(self) -> None:
        """From here on nothing is certain."""
        self.exists, self.known, self.untold = None, {}, None


@dataclass(frozen=True, slots=True)
class Silence:
    """What is known to be missing: by subject, what left no activities, and until where all was blanked.

    `stretches` are those in which something else recorded the table's changes, each with its begin, on the cluster of
    its end.
    """

    events: Mapping[str, Sequence[Event]] = field(default_factory=dict)
    stretches: Sequence[tuple[LSN, Place]] = ()
    blank: Mapping[str, Place] = field(default_factory=dict)

    def about(self, subject: str) -> bool:
        """Whether it is about a row."""
        return bool(self.events.get(subject) or self.stretches) or subject in self.blank

    def with_(self, other: Silence) -> Silence:
        """What is missing for the one or the other reason."""
        events = {
            subject: [*self.events.get(subject, ()), *other.events.get(subject, ())]
            for subject in self.events.keys() | other.events.keys()
        }
        return Silence(events, [*self.stretches, *other.stretches], {**self.blank, **other.blank})


_SILENCE: Final = Silence()

_NOBODY: Final[Mapping[str, Sequence[Place]]] = {}

_Step = tuple[Place, int, Callable[[], None]]


class Teller:
    """Tells histories from the events of rows.

    Positions mean something where they are of this worker on these `clusters`. `named` is the subject that a key of an
    index is.
    """

    def __init__(self, log: Log, *, worker: str, clusters: Clusters, named: Callable[[tuple[str, ...]], str]) -> None:
        self.log = log
        self.named = named
        self._prefix = f"{worker}/"
        self._clusters = clusters

    def stories(
        self,
        events: Mapping[str, Sequence[Event]],
        *,
        emptied: Sequence[Place] = (),
        left: Mapping[str, Sequence[Place]] = _NOBODY,
        silence: Silence = _SILENCE,
    ) -> dict[str, Story]:
        """The histories of rows, by subject, and of the keys that they had before as far as these are among them.

        All rows of the table went when it was `emptied`; where they have `left`, rows have got another key.
        """
        told = _Stories(self, {subject: Story() for subject in events})
        return told.tell(events, emptied, left, silence)

    def ours(self, event: Event) -> bool:
        """Whether its place is one on these clusters, or before all that is known there."""
        return self._generation(event) > 0

    def _generation(self, event: Event) -> int:
        """Of the cluster on which it was written."""
        if event.change_key is None or not event.change_key.startswith(self._prefix):
            return 0
        cluster, _, _ = event.change_key[len(self._prefix) :].partition("/")
        return self._clusters.generation(cluster)

    def read_at(self, event: Event) -> Place | None:
        """The place at which a row was as it is told of it, if that is told."""
        at = as_of(event)
        return None if at is None else Place(self._generation(event), at, AFTER_ALL)

    def breaks(self, subject: str, story: Story, row: Known | None) -> list[Break]:
        """Where a history breaks off, with what is missing for the row as it is, or because there is none."""
        log, found = self.log, list(story.breaks)
        if row is None:
            if story.exists and log.deletion:
                found.append(Break("deletion", subject, story.last, None, story.known))
            return found
        if story.exists is False:
            if log.creation:
                found.append(Break("creation", subject, story.last, None, {}))
            return found
        if story.untold is not None and log.creation:
            first = story.untold  # by the key that it had then
            had = self.named(first.before) if first.what == "moved" else first.subject
            found.append(Break("creation", had, None, first, {}))
        differences = _differences(
            Difference(of, told, row[of])
            for of, told in story.known.items()
            if of in row and not told.agrees(row[of]) and log.tracks(of)
        )
        if differences:
            found.append(Break("change", subject, story.last, None, story.known, differences))
        return found


class _Stories:
    """Histories while they are told, all at once: a row may go from one to another."""

    def __init__(self, teller: Teller, stories: dict[str, Story]) -> None:
        self._teller, self._log, self._stories = teller, teller.log, stories

    def tell(
        self,
        events: Mapping[str, Sequence[Event]],
        emptied: Sequence[Place],
        left: Mapping[str, Sequence[Place]],
        silence: Silence,
    ) -> dict[str, Story]:
        steps: list[_Step] = []
        for subject, story in self._stories.items():
            story.live(story.life)
            own = [event for event in events[subject] if not event.skipped]
            ours = [event for event in own if self._teller.ours(event)]
            if len(ours) < len(own):
                story.exists = None  # recorded elsewhere, or by others, who may not have told all
            gone = [Event(subject, "", "deleted", place) for place in {*emptied, *left.get(subject, ())}]
            steps += self._changes(story, ours, 0)
            steps += self._changes(story, gone, 1)
            steps += self._reads(story, ours)
            steps += self._silences(story, subject, silence, ours)
        for _, _, tell in sorted(steps, key=lambda step: step[:2]):
            tell()
        return self._stories

    def _changes(self, story: Story, events: Sequence[Event], order: int) -> Iterator[_Step]:
        by_place = sorted(events, key=lambda event: event.place)
        for place, group in groupby(by_place, key=lambda event: event.place):
            yield place, order, partial(self._change, story, [*group])

    def _change(self, story: Story, events: Sequence[Event]) -> None:
        """Take the activities of one change."""
        said = self._log.said(events)
        event = next((event for event in events if event.what != "told"), events[0])
        thereafter = {**_unchanged(said), **said.old}
        match event.what:
            case "deleted":
                if event.rule and story.exists is False and story.rows:
                    self._missing("creation", story, event, thereafter)
                self._compare(story, story, event, said.old)
                story.end()
            case "created":
                if story.exists:
                    self._missing("deletion", story, event, dict(story.known))
                story.exists, story.known, story.untold = True, said.new, None
            case "moved":
                if story.exists:
                    self._missing("deletion", story, event, dict(story.known))
                story.exists, story.known, story.untold = True, {}, None
                origin = self._stories.get(self._teller.named(event.before))
                if origin is not None:
                    if origin.exists is False and origin.rows and self._log.creation:
                        subject = self._teller.named(event.before)
                        story.breaks.append(Break("creation", subject, origin.last, event, thereafter))
                    elif origin.exists is False:
                        origin.untold = event
                    story.untold = origin.untold
                    story.known = origin.known
                    self._compare(story, origin, event, thereafter)
                    story.live(origin.life)
                    origin.end()
                    origin.last = event
                self._learn(story, said)
            case _ if all(map(self._log.is_read, events)):
                return  # they tell of another time than their place
            case _ if any(map(self._log.lives, events)):
                if story.exists is False and story.rows:
                    self._missing("creation", story, event, thereafter)
                elif story.exists is False:
                    story.untold = event
                story.exists = True
                self._compare(story, story, event, thereafter)
                self._learn(story, said)
            case _:
                story.forget()  # it may tell that the row is gone
        story.last = event

    def _missing(self, what: Literal["creation", "deletion"], story: Story, event: Event, known: Known) -> None:
        if self._log.creation if what == "creation" else self._log.deletion:
            story.breaks.append(Break(what, event.subject, story.last, event, known))

    def _compare(self, story: Story, before: Story, event: Event, told: Known) -> None:
        """See whether what is told of a row before an event is what is known of it, maybe by another key."""
        differences = _differences(
            Difference(of, before.known[of], found)
            for of, found in told.items()
            if of in before.known and not before.known[of].agrees(found) and self._log.tracks(of)
        )
        if differences:
            subject = event.subject if before is story else self._teller.named(event.before)
            story.breaks.append(Break("change", subject, before.last, event, dict(before.known), differences))

    def _learn(self, story: Story, said: Said) -> None:
        """Take what is told, and forget what may be so no longer. What is always told, and isn't, hasn't changed."""
        changed, tracks = said.changed, self._log.tracks
        left: Known = {}
        if changed is not None:
            left = {
                of: told
                for of, told in story.known.items()
                if of not in said.untold and (of.column not in changed or tracks(of))
            }
        story.known = left | said.new

    def _reads(self, story: Story, events: Sequence[Event]) -> Iterator[_Step]:
        """What is known of rows that were read, from then on."""
        for event in filter(self._log.is_read, events):
            at = self._teller.read_at(event)
            found = self._log.read(event)
            if at is not None and found:
                of: list[_Life] = []
                yield event.place, 2, partial(_note, of, story)
                yield at, 0, partial(_take, of, found, self._log.meant(event))

    def _silences(self, story: Story, subject: str, silence: Silence, ours: Sequence[Event]) -> Iterator[_Step]:
        """What is known to be missing: from there on nothing is certain."""
        commits = {_commit(event) for event in ours if event.place.generation}
        reads = (self._teller.read_at(event) for event in ours if self._log.is_read(event))
        known = commits | {at for at in reads if at is not None and at.lsn}
        events = sorted(silence.events.get(subject, ()), key=_commit)
        for commit, group in groupby(events, key=_commit):
            # Where in its commit it was isn't known.
            meant = {event.what for event in group}
            there = "deleted" not in meant
            certain = commit not in commits and (there or meant == {"deleted"})
            for ordinal in (-1, AFTER_ALL):
                yield commit._replace(ordinal=ordinal), 3, partial(_skip, story, there if certain else None)
        for begin, end in silence.stretches:
            # else nothing is, and what was made up for is of later
            if begin or any(at.generation == end.generation and at < end for at in known):
                yield end._replace(ordinal=-1), 0, partial(_pass_over, story, begin)
        if subject in silence.blank:
            yield silence.blank[subject]._replace(ordinal=-1), 0, partial(_pardon, story)


def _commit(event: Event) -> Place:
    return Place(event.place.generation, event.place.lsn)


def _differences(found: Iterable[Difference]) -> tuple[Difference, ...]:
    """In the order of their names."""
    return tuple(sorted(found, key=lambda difference: str(difference.of)))


def _unchanged(said: Said) -> Known:
    """What is told of columns that the change left as they were."""
    if said.changed is None:
        return {}
    return {of: told for of, told in said.new.items() if of.column not in said.changed}


def _note(of: list[_Life], story: Story) -> None:
    of.append(story.life)


def _take(of: Sequence[_Life], found: Known, meant: Known) -> None:
    # What the stream has told is exact, and what it has not told by now has not changed since it was begun, but for
    # what the activity itself means.
    for life in of:
        story = life.story
        if story is not None and story.exists is not False and story.life is life:
            story.exists, story.known = True, found | story.known | meant


def _skip(story: Story, exists: bool | None) -> None:
    if exists is False and story.exists is not False:
        story.end()
    story.forget()
    story.exists = exists


def _pass_over(story: Story, begin: LSN) -> None:
    exists = story.exists
    story.forget()
    if not begin and not exists:  # what is made up of rows that were there then is for a backfill
        story.exists = exists


def _pardon(story: Story) -> None:
    """What was blanked can't be held against anything."""
    story.forget()
    story.breaks.clear()


def as_of(event: Event) -> LSN | None:
    """The position at which a row was as it is told of it, if that is told."""
    told = event.metadata.get("as_of_lsn") if isinstance(event.metadata, Mapping) else None
    try:
        return LSN.parse(told) if isinstance(told, str) else None
    except ValueError:
        return None
