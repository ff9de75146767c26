"""What is missing in a log made up for: changes that lead from what it says to what is so, and what is told of them.

They go through the same rules as the stream's, and say no more than is known: not who did it, not when exactly, and of
no column what it had if the log doesn't know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from cdc_worker.activities import Activity, Clusters, Key, Place, own_key
from cdc_worker.changes import Change, Row
from cdc_worker.history import STEP, Recorded, backfill_key
from cdc_worker.lsn import LSN
from cdc_worker.profile import Profile
from cdc_worker.rules import Table, qualified
from cdc_worker.truth import Break, Known, Log, Of, Telling


def of_nobody(profile: Profile) -> Profile:
    """A profile whose activities don't say who did it, or whose row it was."""
    tables = {name: table.model_copy(update={"owner": None, "actor": None}) for name, table in profile.tables.items()}
    return profile.model_copy(update={"tables": tables})


def unmasked(rules: Mapping[tuple[str, str], Table], name: tuple[str, str]) -> dict[tuple[str, str], Table]:
    """Rules for which the rows of a table are as they may be seen already."""
    return {**rules, name: replace(rules[name], masks={})}


@dataclass(frozen=True, slots=True)
class Moment:
    """When something was read, or recorded, and the position at which that was so; `date` is how it is dated."""

    at: str
    lsn: LSN
    date: Any
    not_before: str = ""


@dataclass(frozen=True, slots=True)
class Mend:
    """A change that makes up for what is missing. Of the `old` and the `new` row only these columns are known.

    A row that came to be may be `there` still.
    """

    gap: Break
    change: Change
    old: frozenset[Of]
    new: frozenset[Of]
    there: bool = False


def mend(log: Log, recorded: Recorded, gap: Break, *, key: Row, columns: Sequence[str], row: Row | None) -> Mend | None:
    """The change that is missing, or None where nobody can tell what it was.

    `key` are the values of the row's key as it had them then; `row` is how it is now, with the `columns` of its table.
    """
    nothing: Row = dict.fromkeys(columns)
    name = qualified(recorded.table)
    everything = frozenset(log.values(nothing))
    known = _real(log, gap.known) | {Of(column) for column in key}
    had: Row = {**nothing, **_plain(gap.known), **key}
    match gap.what:
        case "creation" if row is not None and (gap.before is None or gap.after is None):
            return Mend(gap, Change("read", *name, None, row), everything, everything, there=True)
        case "creation":
            return Mend(gap, Change("read", *name, None, had), known, known)
        case "deletion":
            return Mend(gap, Change("delete", *name, had, None), known, known)
    base = had if row is None or gap.after is not None else row
    old, new = dict(base), dict(base)
    for difference in gap.differences:
        of = difference.of
        if of.mapped and Of(of.column) in {other.of for other in gap.differences}:
            continue  # which is mapped to it
        for side, told in ((old, difference.known), (new, difference.found)):
            real = log.unmapped(of, told.value, base[of.column]) if of.mapped else told
            if real is None:
                return None
            side[of.column] = real.value
    changed = tuple(column for column in columns if old.get(column) != new.get(column))
    told_now = {difference.of for difference in gap.differences}
    return Mend(
        gap,
        Change("update", *name, old, new, changed),
        frozenset(known | told_now),
        everything if base is row else frozenset(known | told_now),
    )


def _plain(known: Known) -> Row:
    return {of.column: told.value for of, told in known.items() if not of.mapped}


def _real(log: Log, known: Known) -> frozenset[Of]:
    """What is known, and what is mapped from it."""
    return frozenset(known) | {of for of in log.mapped if Of(of.column) in known}


def meant(log: Log, recorded: Recorded, gap: Break, rule: str) -> bool:
    """Whether an activity by this rule tells what is missing."""
    if gap.what != "change":
        return recorded.what(rule) == {"creation": "created", "deletion": "deleted"}[gap.what]
    telling = log.tellings[rule]
    return any(telling.tells(difference.of) for difference in gap.differences)


def covered(log: Log, gap: Break, rules: Sequence[str]) -> bool:
    """Whether activities by these rules tell all that is missing."""
    if gap.what != "change":
        return bool(rules)
    return all(any(log.tellings[rule].tells(difference.of) for rule in rules) for difference in gap.differences)


def finished(
    log: Log,
    recorded: Recorded,
    made: Mend,
    activity: Activity,
    *,
    rule: str,
    worker: str,
    clusters: Clusters,
    moment: Moment,
    number: int,
) -> Activity:
    """An activity with a key of its own, and marked as what it is; it is the `number`th at its place."""
    gap, told = made.gap, activity.fields["metadata"]
    telling = log.tellings[rule]
    hidden = _unknown(telling, made)
    metadata = {name: value for name, value in told.items() if name not in hidden}
    metadata |= {"reconciled": True, "as_of": moment.at, "as_of_lsn": str(moment.lsn)}
    if moment.not_before:
        metadata["not_before"] = moment.not_before
    key = Key("repair", recorded.table, rule, _anchor(gap)._replace(rank=2, number=number), gap.subject)
    if made.change.operation == "read":
        metadata["values"] = {name: metadata.pop(name) for name in telling.read.values() if name in metadata}
        if made.there:  # as a backfill would write it, so that both write one
            key = backfill_key(recorded, gap.subject, rule, _anchor(gap))
            metadata["backfilled"] = True
    fields = {**activity.fields, "metadata": metadata, "created_by": "system", "occurred_at": moment.date}
    return msgspec.structs.replace(activity, change_key=own_key(worker, clusters, key), fields=fields)


def _unknown(telling: Telling, made: Mend) -> set[str]:
    """Names in the metadata under which a column would be told that isn't known."""
    sides = [(telling.new, made.new), (telling.old, made.old)]
    if made.change.operation == "read":
        sides = [(telling.read, made.new), (telling.identity, made.new)]
    return {name for names, known in sides for of, name in names.items() if of not in known}


def number(gap: Break) -> int | None:
    """Which number at its place is between what is before it and after it, the same for all; None if there is none."""
    before = _anchor(gap)._replace(rank=2)
    first = gap.before.place.number if gap.before is not None and gap.before.place.rank == before.rank else 0
    if gap.after is None or gap.after.place[:4] != before[:4]:
        return first + STEP
    middle = (first + gap.after.place.number) // 2
    return middle if first < middle else None


def _anchor(gap: Break) -> Place:
    """After which change it is missing."""
    return gap.before.place if gap.before is not None and gap.before.place.generation else Place()
