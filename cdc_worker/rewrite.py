"""Rewrite: after a profile has changed, what was recorded becomes what the profile says now.

Some changes of a recording at a time, the worker's rows that are about them are held against what the rules make of
them now:

    places    of which changes all is known that the rules make of them: the beginnings of their keys
    there     the rows, and the dead letters, whose keys begin like that
    wanted    what the rules make of these changes

What is wanted and isn't there is written like anything that comes late, and only then the rest is done: what is there
in another way is changed in place, what nobody wants is removed. So whoever interrupts it finds an activity twice at
worst, never none, and to run it again leads to the same end. A row goes only if its very change was read: what a
recording doesn't hold, be it that it has a gap, that it is damaged, or that it was made of fewer tables, says nothing.

Others' rows are neither read nor locked, and ours only where nobody else has them locked: who has is waited for with
nothing in hand.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec
import psycopg
from pydantic import BaseModel, Field

from cdc_worker import errors, failpoints, postgres, replay
from cdc_worker.activities import Activity, Clusters, DeadLetter, Person, Position, Skipped, key_prefix, parsed_key
from cdc_worker.changes import Transaction, Unread
from cdc_worker.config import Settings
from cdc_worker.context import PREFIX as CONTEXT_PREFIX
from cdc_worker.late import Late
from cdc_worker.log import Logger
from cdc_worker.lsn import LSN
from cdc_worker.ours import Edit, Ours, There, Values, Was
from cdc_worker.profile import Profile, Table
from cdc_worker.replay import SAMPLES, Loop, Portion, Replayed, Wishes, show
from cdc_worker.rules import Rules, compile_rules, qualified
from cdc_worker.sink import MAX_LOCKING, MAX_REFUSALS, hurry
from cdc_worker.transform import ERASED, Outcome, told

PORTION: Final = 1_000
"""So many changes, or activities, are held against the target at once."""

PATIENCE: Final = 1.0
"""Seconds, at most, between two looks whether rows are free that others have locked."""

Fate = Literal["changed", "removed"]


class Difference(BaseModel):
    """An activity that isn't what the profile says now."""

    fate: Fate = Field(description="what would be done about it")
    type: str = Field(description="its type; if that would change, the new one")
    change_key: str = Field(description="which it is")
    description: str = Field(description="its text; if that would change, the new one")
    fields: dict[str, Was] = Field(default={}, description="what would change, by column and within metadata by name")


class Rewritten(Replayed):
    """What was done about activities, or would be. These are the fields of `replay --rewrite --json`."""

    changed: dict[str, int] = Field(default={}, description="activities that were changed in place, by type")
    fields: dict[str, dict[str, int]] = Field(
        default={}, description="of these, by type: in how many each column was changed, or name in the metadata"
    )
    removed: dict[str, int] = Field(default={}, description="activities that no rule makes any more, by type")
    refused: int = Field(
        default=0, description="activities that the target refused to change or to give up: they are as they were"
    )
    failed: int = Field(default=0, description="activities that a rule fails to make now: they are as they were")
    differences: list[Difference] = Field(
        default=[], description="some of what would be changed or removed; only with --dry-run"
    )

    @property
    def whole(self) -> bool:
        """Whether all was done that was asked for, as far as that can be known."""
        return super().whole and not self.refused


SHOWN: Final = 100
"""So many characters of a value are printed."""


def lines(done: Rewritten) -> Iterator[str]:
    """What was done as a person reads it."""
    yield from replay.lines(done)
    would = "would be " if done.dry_run else ""
    for fate, counts in (("changed", done.changed), ("removed", done.removed)):
        what = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items())) or "none"
        yield f"{sum(counts.values()):,} activities {would}{fate}: {what}"
        for kind, fields in sorted(done.fields.items()) if fate == "changed" else ():
            yield f"  {kind}: {', '.join(f'{name} in {count:,}' for name, count in sorted(fields.items()))}"
        for difference in done.differences:
            if difference.fate == fate:
                yield f"  {difference.type}  {difference.description}"
                for name, of in difference.fields.items():
                    yield f"    {name}: {_shown(of.was)} -> {_shown(of.now)}"
    if done.failed:
        yield f"{done.failed:,} activities are as they were: a rule fails to make them"
    if done.refused:
        yield f"{done.refused:,} activities are as they were: the target refused what would be done, as the log tells"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def place_of(key: str) -> str:
    """The change that a key is of: all of it but the rule."""
    return key.rpartition("/")[0]


def is_summary(key: str) -> bool:
    """Whether it is the key of what is told in place of several changes, of whatever tables."""
    return place_of(key).rpartition("/")[0].endswith("/cdc_worker.context")


class _Run(msgspec.Struct):
    """Changes of a table that follow each other: from which ordinal on, and if rules count them, at which number."""

    table: tuple[str, str]
    ordinal: int
    index: int
    counts: bool
    length: int = 0


class Places:
    """Tells of which changes of a commit all is known: slices are taken in order."""

    def __init__(self, rules: Rules, worker: str, cluster: str, tables: Collection[tuple[str, str]] = ()) -> None:
        """With `tables` only their changes count."""
        self._rules, self._worker, self._cluster, self._tables = rules, worker, cluster, tables
        self._prefix = ""
        self._ordinals: dict[tuple[str, str], int] = {}
        self._open: deque[_Run] = deque()  # of changes that are told as one there may be very many
        self._index = self._messages = 0

    def take(self, transaction: Transaction, done: int, excluded: Collection[tuple[str, str]] = ()) -> Iterator[str]:
        """The changes of which all is known by now: `done` are so many of those that rules are about.

        What became of tables that are `excluded` is nobody's to say.
        """
        if transaction.first:
            self._prefix = key_prefix(self._worker, self._cluster, transaction.commit_lsn)
            self._ordinals, self._index, self._messages = {}, 0, 0
            self._open.clear()
        for change in transaction.changes:
            table = (change.schema, change.table)
            ordinal, counts = self._ordinals.get(table, 0), table in self._rules or type(change) is Unread
            self._ordinals[table] = ordinal + 1
            if table not in excluded and (not self._tables or table in self._tables):
                run = self._open[-1] if self._open else None
                follows = run is not None and run.index + run.length * run.counts == self._index
                if run is None or run.table != table or not follows:
                    self._open.append(run := _Run(table, ordinal, self._index, counts))
                run.length += 1
            self._index += counts
        self._messages += sum(message.prefix == CONTEXT_PREFIX for _, message in transaction.messages)
        while self._open:
            run = self._open[0]
            if transaction.last or (not run.counts and run.index < done):
                count = run.length
            else:
                count = max(0, min(run.length, done - run.index)) if run.counts else 0
            for ordinal in range(run.ordinal, run.ordinal + count):
                yield f"{self._prefix}{'.'.join(run.table)}/{ordinal}"
            run.ordinal, run.index, run.length = run.ordinal + count, run.index + count, run.length - count
            if run.length:
                return
            self._open.popleft()
        if transaction.last:  # until then there may come what is told in place of changes, of whatever tables
            for number in range(self._messages):
                yield f"{self._prefix}cdc_worker.context/{number}"


class Slice(NamedTuple):
    """What came of a slice of a commit, all filters but that of types applied.

    Of the tables that its recording `holds` all changes of the commit have been read.
    """

    outcomes: Sequence[Outcome]
    transaction: Transaction
    done: int
    complete: bool
    given: Sequence[Person]
    holds: Set[tuple[str, str]]


class Rewriting:
    """Makes what there is of changes what the rules make of them. `flush` in the end.

    Any call may raise FencedError, as those of `late` do: then another one is to begin anew, from the start.
    """

    def __init__(
        self,
        late: Late,
        cluster: str,
        done: Rewritten,
        *,
        types: Collection[str] = (),
        filtered: bool = False,
        anyone_erased: bool = False,
    ) -> None:
        """With `types` it is about activities that are of one of them, or would be; `filtered` may also be changes."""
        self._late, self._cluster, self._done, self._types = late, cluster, done, types
        self._filtered = filtered
        self._worker = late.checkpoint.worker
        self._rows = Ours(
            late.control,
            late.profile.target,
            table=late.target,
            worker=self._worker,
            cluster=cluster,
            time_zone=late.time_zone,
            anyone_erased=anyone_erased,
        )
        self._size = MAX_LOCKING if late.target.foreign_keys else PORTION
        self._slices: list[Slice] = []
        self._holds: Set[tuple[str, str]] = frozenset()
        self._tables = {".".join(name): table for name, table in late.rules.items()}
        self._counted = {name for name, table in late.rules.items() if any(table.rules.values())}
        self._places: list[str] = []
        self._count = 0
        self._summaries: set[str] = set()  # those of the commit that is read: their places come in the end
        self._made: set[str] = set()  # what came of a slice some of whose places are still to come
        self._at = Position(LSN(0))
        self._refused_in_a_row = 0

    def add(self, slice_: Slice, places: Iterable[str]) -> None:
        """Take what came of a slice of a commit, and the changes of which all is known; some of it is done at once."""
        if slice_.holds != self._holds:
            self.flush()
            self._holds = slice_.holds
        if slice_.transaction.first and not self._slices:
            self._summaries.clear()
        self._slices.append(slice_)
        self._count += len(slice_.outcomes)
        for place in places:
            if len(self._places) >= PORTION:
                self.flush()
                self._slices.append(slice_._replace(outcomes=(), given=()))
                self._made = {outcome.change_key for outcome in told(slice_.outcomes)}
            self._places.append(place)
        if max(self._count, len(self._places), len(self._slices)) >= PORTION:
            self.flush()

    def flush(self) -> None:
        """Do what was taken."""
        slices, places = self._slices, self._places
        self._slices, self._places, self._count = [], [], 0
        if not slices:
            return
        self._at = Position(slices[-1].transaction.end_lsn)
        wanted = {of.change_key: of for slice_ in slices for of in told(slice_.outcomes)}
        self._summaries |= {key for key in wanted if is_summary(key)}
        commits = [slice_.transaction.commit_lsn for slice_ in slices]
        concerned = dict.fromkeys([*places, *map(place_of, wanted)])
        there, letters = self._rows.recorded(concerned, min(commits), max(commits))
        # Of a change that can't be read, nobody knows what the rules would make of it.
        held = {*places} - {place_of(key) for key in wanted if key.endswith(_UNKNOWN)}
        known = wanted.keys() | self._summaries | self._made

        missing = {key for key, of in wanted.items() if key not in there and self._is_missing(of, letters)}
        edits = self._rows.compared(
            {
                key: (of.fields["type"], self._values(of, at))
                for key, of in wanted.items()
                if isinstance(of, Activity) and (at := there.get(key)) is not None and self._is_meant(of, at)
            }
        )
        edits += (
            Edit(key, at.type, description=at.description)
            for key, at in there.items()
            if key not in known and place_of(key) in held and self._is_unwanted(key, at)
        )
        gone = [
            key
            for key, stays in letters.items()
            if key not in known and place_of(key) in held and not stays and not self._types
        ]
        self._done.failed += sum(isinstance(of, DeadLetter) and key in there for key, of in wanted.items())
        self._write(slices, missing)
        if self._done.dry_run:
            for edit in edits:
                self._show(edit, self._told(edit))
            self._late.counts.resolved += len(gone)
        else:
            for start in range(0, len(edits), self._size):
                self._apply(edits[start : start + self._size])
            self._resolve(gone)
        self._made = set()

    def _is_type(self, key: str, *names: str) -> bool:
        # Without what is told in place of activities that go, there would be nothing of them.
        return not self._types or is_summary(key) or any(name in self._types for name in names)

    def _is_missing(self, outcome: Activity | DeadLetter, letters: Mapping[str, bool]) -> bool:
        """Whether what isn't there is to be added."""
        if letters.get(outcome.change_key):
            return False
        if isinstance(outcome, DeadLetter):
            return outcome.reason != ERASED and not self._types
        return not _is_blank(outcome) and self._is_type(outcome.change_key, outcome.fields["type"])

    def _is_meant(self, outcome: Activity, at: There) -> bool:
        """Whether what is there is to be compared."""
        key = outcome.change_key
        if at.erased or _is_blank(outcome) or not self._is_type(key, at.type, outcome.fields["type"]):
            return False
        missing = {name for name, row in outcome.found.items() if row is None}
        return not missing or self._is_certain(key, missing)

    def _is_unwanted(self, key: str, at: There) -> bool:
        """Whether what is there, and no rule has made, is to be removed."""
        if at.erased or at.gone or not self._is_type(key, at.type):
            return False
        return self._is_certain(key) and not (self._filtered and is_summary(key))

    def _is_certain(self, key: str, missing: Collection[str] | None = None) -> bool:
        """Whether the recording has all that a rule knows a change by: facts that were `missing`, or any.

        A recording of fewer tables may lack them.
        """
        parsed = parsed_key(self._worker, Clusters(self._cluster), key)
        table = None if parsed is None else self._tables.get(parsed.table)
        if table is None or parsed is None:
            return not is_summary(key) or self._counted <= self._holds
        names = {name for of in table.rules.values() for rule in of if rule.name == parsed.rule for name in rule.facts}
        return all(table.facts[name].table in self._holds for name in names if missing is None or name in missing)

    def _values(self, outcome: Activity, at: There) -> Values:
        """An activity as it is sent: if it is there without its links, without them."""
        values = self._rows.values(outcome)
        same = [column for column, value in at.unlinked.items() if str(value) == values.get(column)]
        return self._rows.without(values, same) if same else values

    def _show(self, edit: Edit, fields: Mapping[str, Was]) -> None:
        """Have an edit among the samples, if there aren't enough of its fate and type."""
        fate: Fate = "removed" if edit.wanted is None else "changed"
        shown = self._done.differences
        if sum((of.fate, of.type) == (fate, edit.type) for of in shown) < SAMPLES:
            description = edit.description if edit.wanted is None else self._rows.description(edit.wanted)
            shown.append(
                Difference(fate=fate, type=edit.type, change_key=edit.key, description=description, fields={**fields})
            )

    def _told(self, edit: Edit) -> dict[str, Was]:
        """Count an edit; returns the fields that it is about."""
        if edit.wanted is None:
            _count(self._done.removed, edit.type)
            return {}
        _count(self._done.changed, edit.type)
        fields = self._rows.fields(edit)
        for name in fields:
            _count(self._done.fields.setdefault(edit.type, {}), name)
        return fields

    def _write(self, slices: Sequence[Slice], missing: Collection[str]) -> None:
        """Write what is missing, as what comes late is."""
        late = self._late
        for slice_ in slices:
            outcomes = [of for of in slice_.outcomes if isinstance(of, Skipped) or of.change_key in missing]
            late.add(
                outcomes,
                slice_.transaction,
                cluster=self._cluster,
                done=slice_.done,
                complete=slice_.complete,
                given=slice_.given,
            )
        late.flush()

    def _apply(self, edits: list[Edit]) -> None:
        """Change rows in a transaction, those that the target refuses aside, as soon as nobody has them locked."""
        pause = PATIENCE / 64
        while edits:
            try:
                done, left = self._changed(edits)
            except psycopg.Error as error:
                if error.sqlstate in _LOCKED:
                    done, left = [], edits
                elif not postgres.is_about_the_row(error.sqlstate or ""):
                    raise
                elif len(edits) > 1:
                    middle = len(edits) // 2
                    self._apply(edits[:middle])
                    edits = edits[middle:]
                    continue
                else:
                    edits = self._instead(edits[0], error)
                    continue
            for edit in done:
                self._told(edit)
            if done:
                self._refused_in_a_row = 0
            edits = left
            if edits:
                if pause == PATIENCE / 2:
                    self._late.log.info("rows_locked", rows=len(edits))
                time.sleep(pause)
                pause = min(PATIENCE, 2 * pause)

    def _changed(self, edits: Sequence[Edit]) -> tuple[list[Edit], list[Edit]]:
        """Change rows in one transaction; returns those edits, and those of rows that somebody else has locked."""
        with self._late.transaction(self._at) as connection:
            if self._late.target.deferrable:
                connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            connection.execute(hurry(self._late.target).encode())
            locked, others = self._rows.lock(connection, [edit.key for edit in edits])
            done = [edit for edit in edits if edit.key in locked]
            self._rows.change(connection, [edit for edit in done if edit.wanted is not None])
            self._rows.remove(connection, [edit.key for edit in done if edit.wanted is None])
            failpoints.reach("rows_changed")
        failpoints.reach("rows_rewritten")
        return done, [edit for edit in edits if edit.key in others]

    def _instead(self, edit: Edit, error: psycopg.Error) -> list[Edit]:
        """What is to be done in place of what the target refused: a link that it refuses stays as it is, or away."""
        columns = self._late.target.foreign_keys.get(error.diag.constraint_name or "", ())
        if edit.wanted is not None and error.sqlstate == "23503" and columns:
            kept = {column: edit.was.get(column) for column in columns}
            values = {**edit.wanted, **kept}
            if not any(kept.values()):
                values = self._rows.without(edit.wanted, columns)
            if values != edit.wanted:
                return self._rows.compared({edit.key: (edit.type, values)})
        self._done.refused += 1
        self._refused_in_a_row += 1
        self._late.log.warning(
            "rewrite_refused",
            change_key=edit.key,
            sqlstate=error.sqlstate,
            constraint=error.diag.constraint_name,
            removed=edit.wanted is None,
        )
        if self._refused_in_a_row >= MAX_REFUSALS:
            raise errors.TooManyRefusalsError(
                f"the target {self._late.profile.target.table} refused {MAX_REFUSALS} changes in a row, the last with"
                f" SQLSTATE {error.sqlstate}",
                hint="mend the profile or the target, and run it again",
            )
        return []

    def _resolve(self, gone: Sequence[str]) -> None:
        """Take dead letters away that nothing speaks of any more."""
        if gone:
            with self._late.transaction(self._at) as connection:
                found = connection.execute(_RESOLVE, (self._worker, [*gone]))
                self._late.counts.resolved += found.rowcount


_UNKNOWN: Final = "/*"

_LOCKED: Final = ("55P03", "40P01")
"""SQLSTATEs of who has waited for a lock: lock_not_available, deadlock_detected."""

_RESOLVE: Final = (
    "DELETE FROM cdc_worker.dead_letter WHERE worker = %s AND change_key = ANY (%s) AND discarded_at IS NULL"
)


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _is_blank(activity: Activity) -> bool:
    """Whether it tells of a person who was erased."""
    return activity.fields.get("metadata", {}).get("erased") is True


_PLAIN: Final = Wishes()


def rewrite(
    settings: Settings, given: Profile, paths: Sequence[Path | str], wishes: Wishes = _PLAIN, *, log: Logger
) -> Rewritten:
    """Make the worker's activities of recorded changes what a profile says now.

    May be interrupted, and run again. Raises what `replay` does, and RecordingUnreadableError for a recording that
    doesn't say which commits it is about.
    """
    done = Rewritten(dry_run=wishes.dry_run)

    def tell(outcome: Activity | DeadLetter) -> None:
        if isinstance(outcome, Activity):
            show(done, outcome)

    with ExitStack() as stack:
        late = Late(settings, given, command="rewrite", log=log, changes=True, dry_run=wishes.dry_run, tell=tell)
        stack.enter_context(late)
        others = _others(late)
        if unknown := [name for name in wishes.tables if qualified(name) not in {**late.rules, **others}]:
            raise errors.SettingsError(
                f'the profile "{given.name}" has no table "{unknown[0]}", nor has the worker captured it',
                hint=f"those it has: {', '.join(given.tables)}",
            )
        # What is filtered here may go by what is there.
        meant = replace(wishes, tables=(), types=())
        loop = Loop(stack, settings, given, paths, meant, log=log, late=late, others=others)
        loop.go(lambda: _Deal(late, done, wishes), done)
    done.already_there = 0  # that is what it is about
    return done


_CAPTURED: Final = "SELECT DISTINCT table_name FROM cdc_worker.excluded WHERE worker = %s"


def _others(late: Late) -> Rules:
    """Tables that the worker has captured, and that are in the profile no more."""
    names = [name for (name,) in late.control.execute(_CAPTURED, (late.checkpoint.worker,))]
    gone = {name: Table() for name in names if qualified(name) not in late.rules}
    return compile_rules(late.profile.model_copy(update={"tables": gone}))


class _Deal:
    """Deals with one portion of a recording after another."""

    def __init__(self, late: Late, done: Rewritten, wishes: Wishes) -> None:
        self._late, self._done = late, done
        self._types = frozenset(wishes.types)
        self._tables = {qualified(name) for name in wishes.tables}
        done.refused = done.failed = 0  # they are met again
        self._of: dict[tuple[str, str | None], tuple[Places, Rewriting]] = {}

    def __call__(self, portion: Portion | None) -> None:
        """Deal with it, or with what is left after the last one."""
        if portion is None:
            for _, rewriting in self._of.values():
                rewriting.flush()
            return
        recorded, late = portion.recorded, self._late
        transaction, cluster = recorded.transaction, recorded.system_identifier
        if not recorded.exact:
            raise errors.RecordingUnreadableError(
                f"{recorded.file} doesn't say where its commits were: nobody knows what is of them",
                hint="record with -o format-version=2 -o include-lsn=1 -o include-timestamp=1",
            )
        of = cluster, recorded.database
        if of not in self._of:
            for _, rewriting in self._of.values():
                rewriting.flush()
            self._of[of] = (
                Places(late.rules, late.checkpoint.worker, cluster, self._tables),
                Rewriting(
                    late,
                    cluster,
                    self._done,
                    types=self._types,
                    filtered=bool(self._types or self._tables),
                    anyone_erased=bool(portion.scope.erased),
                ),
            )
        places, rewriting = self._of[of]
        home = late.is_home(*of)
        rewriting.add(
            Slice(
                [outcome for outcome in portion.outcomes if self._is_meant(outcome)],
                transaction,
                portion.done,
                portion.complete,
                portion.given if home else (),
                recorded.holds,
            ),
            places.take(transaction, portion.done, portion.scope.excludes(transaction.commit_lsn)),
        )

    def _is_meant(self, outcome: Outcome) -> bool:
        if not self._tables:
            return True
        if isinstance(outcome, Skipped):
            return outcome.table in self._tables
        return (outcome.change.schema, outcome.change.table) in self._tables or is_summary(outcome.change_key)
