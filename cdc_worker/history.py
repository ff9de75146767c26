"""What is recorded of a row of a captured table: the events of its history, in order, and what they say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import Any, Final, Literal, NamedTuple

import msgspec

from cdc_worker import profile as profiles
from cdc_worker.activities import Key, Kind, Place
from cdc_worker.changes import Happening
from cdc_worker.profile import Profile
from cdc_worker.rules import qualified
from cdc_worker.templates import Expression, parse

What = Literal["created", "deleted", "moved", "told"]
"""What an event means for its row: it came to be, or ceased to, or came here from another key; or something else."""

EVERYTHING = "*"
"""In place of a rule's name: all rules that could have applied, but for a context message."""


class Event(msgspec.Struct, frozen=True):
    """What was recorded of one row. `subject` is the key that it had then, and `before`, if it has moved, until then.

    The latter has the values in the order of the table's index, as has the `key` that an activity links to, which may
    be a later one. `at` is when it happened, as the target prints it. The row's activities that are not the worker's
    have neither change key nor kind; those of a `skipped` change aren't there.
    """

    subject: str
    rule: str
    what: What
    place: Place
    kind: Kind | None = None
    skipped: bool = False
    before: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    change_key: str | None = None
    metadata: Mapping[str, Any] | None = None
    at: str = ""

    @property
    def foreign(self) -> bool:
        """Whether it is an activity that is not the worker's."""
        return self.kind is None and not self.skipped and bool(self.rule)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a profile records of a table's rows, by the names of its rules.

    `links` are the columns of its key, each with the column of the target that links to it. `types` are of rules that
    can be made up for rows that were there before, by the types of their activities. `changes` are paths within
    metadata under which it is told which columns changed, by rule.
    """

    table: str
    links: Mapping[str, str]
    operations: Mapping[str, Sequence[Happening]]
    types: Mapping[str, str]
    changes: Mapping[str, tuple[str, ...]]

    def what(self, rule: str) -> What:
        """What an activity by this rule means for its row; what can mean several things says nothing for certain."""
        meant: dict[tuple[Happening, ...], What] = {("insert",): "created", ("delete",): "deleted"}
        return meant.get((*self.operations.get(rule, ()),), "told")

    @property
    def emptied(self) -> frozenset[str]:
        """The rules that tell that all rows are gone."""
        return frozenset(rule for rule, on in self.operations.items() if [*on] == ["truncate"])


def recorded(profile: Profile, name: str) -> Recorded:
    """What a profile records of the table that it has by this name."""
    table = profile.tables[name]
    return Recorded(
        table=".".join(qualified(name)),
        links=profiles.links(table, profile.target),
        operations={rule.label: rule.on for rule in table.rules},
        types={
            rule.type: rule.label
            for rule in table.rules
            if rule.backfill is not None and isinstance(rule.type, str) and "{" not in rule.type
        },
        changes={rule.label: tuple(_changes(rule)) for rule in table.rules if "update" in rule.on},
    )


def _changes(rule: profiles.Rule) -> Iterable[str]:
    """Names in a rule's metadata that hold the changed columns, each with its old and its new value."""
    for name, value in rule.metadata.items():
        if isinstance(value, str) and parse(value) == [Expression(("changes",))]:
            yield name


class Standing(NamedTuple):
    """What is recorded of the row that has a key now: the rules that have told of it.

    It has had the key since `after`. If it came from another key, `before`, what was recorded of it there counts too.
    Of what others wrote it is only known when: in doubt it is about this row.
    """

    rules: frozenset[str]
    after: Place
    before: tuple[str, ...] = ()


def standing(
    subject: str, events: Sequence[Event], emptied: Sequence[Place] = (), *, links_follow: bool = False
) -> Standing:
    """What is recorded of the row that has the key at the end of these events; `emptied` is when all rows went.

    Where `links_follow` changes of keys, what was recorded of a row under its other keys is among them.
    """
    rules: set[str] = set()
    after, since, before = Place(), "", tuple[str, ...]()
    gone = [Event(subject, "", "deleted", place) for place in emptied]
    own = [event for event in [*events, *gone] if event.subject == subject]
    for event in sorted(own, key=lambda event: event.place):
        if event.foreign:
            continue
        if event.what == "deleted":
            rules, after, since, before = set(), event.place, event.at, ()
        elif event.what == "moved":
            rules = {*(rules if links_follow else ()), event.rule}
            after, since, before = event.place, event.at, event.before
        elif not event.skipped or event.what == "created":
            rules.add(event.rule)
    rules |= {event.rule for event in own if event.foreign and not (event.at and since and event.at <= since)}
    return Standing(frozenset(rules), after, before)


STEP: Final = 1_000
"""Between two that were made up for at a place there is room for those that are lost, and made up for again."""


def backfill_key(recorded: Recorded, subject: str, rule: str, after: Place) -> Key:
    """The key of what is made up, by a rule, of a row that has had its key since `after`."""
    if after.rank == 2:  # a deletion that was found to be missing: what comes after it is numbered as it is
        return Key("repair", recorded.table, rule, after._replace(number=after.number + STEP), subject)
    return Key("backfill", recorded.table, rule, after._replace(rank=1, number=0), subject)


def made_up(recorded: Recorded, event: Event, events: Iterable[Event], emptied: Iterable[Place]) -> list[Key]:
    """The keys under which a backfill may have told what this event tells, while it was not recorded."""
    since = [Place(), *emptied, *(of.place for of in events if of.what in ("deleted", "moved"))]
    return [backfill_key(recorded, event.subject, event.rule, place) for place in since if place < event.place]


def dated(value: Any, zone: tzinfo | None) -> datetime | None:
    """The moment that a value names, if it is a date, with a zone of its own or in the one that is given."""
    try:
        found = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:  # infinity, or before the year 1, or no date at all
        return None
    if found.tzinfo is not None:
        return found
    if zone is None:
        return None
    # As Postgres has them: what clocks showed twice is in standard time, and what they didn't show as well.
    return min((found.replace(tzinfo=zone, fold=fold) for fold in (0, 1)), key=lambda at: at.utcoffset() or timedelta())
