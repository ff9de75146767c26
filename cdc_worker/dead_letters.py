"""Dead letters, seen to: listed, shown, tried again, discarded, exported.

To try one again is to take its change up by itself, with all that was kept with it, by the profile as it is now: what
its rule makes of it has the key and the date that it would have had. It is written as what comes late is, and the dead
letter goes in the same transaction. What is discarded stays, so that who compares the rows with their log, or replays a
recording, knows that it is meant to be left untold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, get_args

import msgspec
from psycopg.rows import class_row
from pydantic import BaseModel, Field

from cdc_worker import checkpoint, context, decoders, errors, failpoints, postgres
from cdc_worker.activities import (
    BY_TIME,
    Activity,
    Clusters,
    DeadLetter,
    DeadLetterKind,
    Key,
    change_key,
    key_prefix,
    parsed_key,
)
from cdc_worker.changes import Change, Transaction
from cdc_worker.config import Settings
from cdc_worker.console import one_line
from cdc_worker.kept import Kept, read
from cdc_worker.late import Late
from cdc_worker.log import Logger
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile
from cdc_worker.rules import qualified
from cdc_worker.transform import ERASED, Told, Transformer, completed

PAGE: Final = 100
"""So many are read at once, and tried again together."""

KINDS: Final[tuple[str, ...]] = get_args(DeadLetterKind)

_SQLSTATE: Final = re.compile(r"[0-9A-Z]{2}(?:[0-9A-Z]{3})?")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters: those with these `ids`, or of those that wait, or were `discarded`, some or all.

    `error` is a kind, a SQLSTATE or the two digits of a class of them; `table` has its schema if that isn't public.
    """

    ids: tuple[int, ...] = ()
    table: str | None = None
    error: str | None = None
    discarded: bool = False

    def check(self) -> None:
        """Raise SettingsError where nothing can be meant."""
        if self.error is not None and self.error not in KINDS and not _SQLSTATE.fullmatch(self.error):
            raise errors.SettingsError(
                f'"{self.error}" is no error that dead letters have',
                hint=f"name a kind ({', '.join(KINDS)}), a SQLSTATE such as 23514, or a class of them such as 23",
            )

    def parameters(self, worker: str) -> dict[str, Any]:
        """Those of _WHERE."""
        return {
            "worker": worker,
            "ids": [*self.ids] or None,
            "table": None if self.table is None else ".".join(qualified(self.table)),
            "error": self.error,
            "discarded": self.discarded,
        }


_WHERE: Final = """
WHERE worker = %(worker)s AND CASE WHEN %(ids)s::bigint[] IS NOT NULL THEN dead_letter_id = ANY (%(ids)s)
    ELSE (discarded_at IS NOT NULL) = %(discarded)s
        AND (%(table)s::text IS NULL OR %(table)s = (change ->> 'schema') || '.' || (change ->> 'table'))
        AND (%(error)s::text IS NULL OR %(error)s IN (kind, sqlstate, left(sqlstate, 2))) END
"""


class Listed(BaseModel):
    """A dead letter, without the values of its row. These are the fields of `list --json`, one object a line."""

    id: int = Field(description="its number, by which it is named")
    kind: str = Field(description="`old_values_unknown`, `rule_failed`, `refused` or `unreadable`")
    table: str = Field(description="schema and table of the change")
    operation: str = Field(
        description="what happened: `insert`, `update`, `delete`, `truncate`; `unreadable` if that isn't known"
    )
    rule: str = Field(description="the rule by which it would have become an activity; `*` if it was none of them")
    sqlstate: str | None = Field(description="what the target refused it with")
    constraint: str | None = Field(description="the constraint that refused it, where it was one")
    reason: str = Field(description="why it could not become one")
    attempts: int = Field(description="how often it was tried")
    committed_at: datetime = Field(description="when the change was committed")
    recorded_at: datetime = Field(description="when it became a dead letter")
    tried_at: datetime | None = Field(description="when it was tried last, if that was later")
    discarded_at: datetime | None = Field(description="when it was discarded; null if it waits")
    change_key: str = Field(description="what the key of the activity would be")


class Waiting(BaseModel):
    """Dead letters that wait for the same reason."""

    table: str = Field(description="schema and table of the changes")
    kind: str = Field(description="as of each of them, as below")
    sqlstate: str | None
    constraint: str | None
    reason: str = Field(description="of the last")
    count: int = Field(description="how many there are")
    latest: datetime = Field(description="when the last became one")


class Tried(BaseModel):
    """What became of a dead letter that was tried again. These are the fields of `retry --json`, one object a line."""

    id: int = Field(description="its number")
    change_key: str = Field(description="the key of the activity")
    outcome: Literal["written", "already there", "failed again", "left"] = Field(
        description="`written`; `already there`, be it by another command; `failed again`; `left`, because it can't be"
        " tried"
    )
    reason: str | None = Field(default=None, description="why, of those that are left or have failed")


class _Stored(NamedTuple):
    """A row of cdc_worker.dead_letter."""

    id: int
    attempts: int
    recorded_at: datetime
    tried_at: datetime | None
    discarded_at: datetime | None
    kept: Kept


_STORED: Final = f"""
SELECT dead_letter_id, attempts, recorded_at, tried_at, discarded_at, change_key, kind, reason, sqlstate,
       constraint_name, committed_at, change::text, fields::text, xid, commit_lsn::text, end_lsn::text, context::text,
       found::text, masked, raw
FROM cdc_worker.dead_letter {_WHERE} AND dead_letter_id > %(after)s ORDER BY dead_letter_id LIMIT %(page)s
"""  # noqa: S608  # of constants


def _pages(connection: Connection, worker: str, selection: Selection) -> Iterator[list[_Stored]]:
    """The dead letters that are meant, in the order in which they arrived."""
    after = 0
    parameters = selection.parameters(worker) | {"page": PAGE}
    while found := checkpoint.fetched(connection, _STORED, parameters | {"after": after}):
        page = [
            _Stored(number, attempts, recorded_at, tried_at, discarded_at, Kept(*rest))
            for number, attempts, recorded_at, tried_at, discarded_at, *rest in found
        ]
        yield page
        after = page[-1].id


_KNOWN: Final = "SELECT dead_letter_id FROM cdc_worker.dead_letter WHERE worker = %s AND dead_letter_id = ANY (%s)"


def _check_ids(connection: Connection, worker: str, selection: Selection) -> None:
    known = {number for (number,) in checkpoint.fetched(connection, _KNOWN, (worker, [*selection.ids]))}
    if unknown := [number for number in selection.ids if number not in known]:
        raise errors.SettingsError(
            f'the worker "{worker}" has no dead letter {", ".join(map(str, unknown))}',
            hint="it may have been written meanwhile; see those that wait: cdc-worker dead-letters list",
        )


@contextmanager
def _reading(settings: Settings, selection: Selection) -> Iterator[Connection]:
    selection.check()
    with postgres.connect(settings.dsn.get_secret_value(), settings.worker) as connection:
        _check_ids(connection, settings.worker, selection)
        yield connection


def listed(settings: Settings, selection: Selection) -> Iterator[Listed]:
    """What dead letters there are."""
    with _reading(settings, selection) as connection:
        for page in _pages(connection, settings.worker, selection):
            yield from map(_listed, page)


_WAITING: Final = """
SELECT concat_ws('.', change ->> 'schema', change ->> 'table') AS table, kind, sqlstate, constraint_name AS constraint,
       (array_agg(reason ORDER BY dead_letter_id DESC))[1] AS reason, count(*) AS count, max(recorded_at) AS latest
FROM cdc_worker.dead_letter WHERE worker = %s AND discarded_at IS NULL
GROUP BY 1, 2, 3, 4 ORDER BY latest DESC LIMIT 20
"""


def waiting(settings: Settings) -> list[Waiting]:
    """What dead letters wait, by their reasons. Raises what a connection can fail with."""
    with (
        closing(postgres.connect_briefly(settings.dsn.get_secret_value(), settings.worker)) as connection,
        connection.cursor(row_factory=class_row(Waiting)) as cursor,
    ):
        return cursor.execute(_WAITING, (settings.worker,)).fetchall()


def _listed(stored: _Stored) -> Listed:
    kept = stored.kept
    change = read(kept.change)
    return Listed(
        id=stored.id,
        kind=kept.kind,
        table=f"{change['schema']}.{change['table']}",
        operation=change["operation"],
        rule=kept.change_key.rpartition("/")[2] if (key := _key(kept)) is None else key.rule,
        sqlstate=kept.sqlstate,
        constraint=kept.constraint,
        reason=kept.reason,
        attempts=stored.attempts,
        committed_at=kept.committed_at,
        recorded_at=stored.recorded_at,
        tried_at=stored.tried_at,
        discarded_at=stored.discarded_at,
        change_key=kept.change_key,
    )


def _key(kept: Kept) -> Key | None:
    worker, cluster = _named(kept.change_key)
    return parsed_key(worker, Clusters(cluster), kept.change_key)


def _named(change_key: str) -> tuple[str, str]:
    """The worker and the cluster that a change key names."""
    worker, cluster, _ = change_key.split("/", 2)
    return worker, cluster


def listing(found: Iterator[Listed]) -> Iterator[str]:
    """Dead letters as a person reads them, a page at a time."""
    count = 0
    for of in found:
        if not count:
            yield f"{'id':>8}  {'committed':19}  {'attempts':>8}  {'rule':24}  reason"
        count += 1
        rule = f"{of.table.removeprefix('public.')}/{of.rule}"
        discarded = "discarded; " if of.discarded_at else ""
        yield f"{of.id:>8}  {_time(of.committed_at)}  {of.attempts:>8}  {rule:24}  {discarded}{one_line(of.reason)}"
    if not count:
        yield "none"


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}"


def shown(settings: Settings, number: int) -> Iterator[str]:
    """All that is kept of a dead letter, as a person reads it; with the values of its row."""
    with _reading(settings, Selection(ids=(number,))) as connection:
        ((stored,),) = _pages(connection, settings.worker, Selection(ids=(number,)))
    kept, of = stored.kept, _listed(stored)
    said: list[tuple[str, Any]] = [
        ("dead letter", stored.id),
        ("kind", kept.kind),
        ("reason", one_line(kept.reason)),
        ("sqlstate", kept.sqlstate),
        ("constraint", kept.constraint),
        ("change", f"{of.operation} of {of.table}, by the rule {of.rule}"),
        ("change key", kept.change_key),
        ("committed", f"{_time(kept.committed_at)} {kept.committed_at:%Z}"),
        ("transaction", f"{kept.xid or 'unknown'}, from {kept.commit_lsn} to {kept.end_lsn}" if kept.whole else None),
        ("attempts", stored.attempts),
        ("arrived", _time(stored.recorded_at)),
        ("tried", stored.tried_at and _time(stored.tried_at)),
        ("discarded", stored.discarded_at and _time(stored.discarded_at)),
        ("masked", ", ".join(kept.masked or ()) or None),
        ("message", None if kept.raw is None else _json(kept.raw.decode(errors="replace"))),
    ]
    yield from (f"{name + ':':13}{value}" for name, value in said if value is not None)
    yield from _section("context", {} if kept.context is None else _heard(read(kept.context)))
    yield from _section("row", _row(kept.letter().change))
    yield from _section("found", {} if kept.found is None else read(kept.found)["rows"])
    yield from _section("refused", {} if kept.fields is None else read(kept.fields))


def _heard(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {**kept["said"], **{f"{name} (claimed)": value for name, value in kept["claimed"].items()}}


def _row(change: Change) -> dict[str, Any]:
    """The row's values, or of an update both of those that have changed."""
    old, new = change.old or {}, change.new or {}
    changed = {column: (old.get(column), new.get(column)) for column in change.changed}
    return {column: changed.get(column, value) for column, value in {**old, **new}.items()}


def _section(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    if values:
        yield f"{name}:"
    for key, value in values.items():
        said = " → ".join(map(_json, value)) if isinstance(value, tuple) else _json(value)
        yield f"  {key}: {said}"


_encode: Final = msgspec.json.Encoder(decimal_format="number").encode


def _json(value: Any) -> str:
    text = _encode(value).decode()
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def exported(settings: Settings, selection: Selection) -> Iterator[str]:
    """Dead letters with all that is kept of them, as JSON."""
    with _reading(settings, selection) as connection:
        for page in _pages(connection, settings.worker, selection):
            yield from map(_exported, page)


def _exported(stored: _Stored) -> str:
    kept = stored.kept
    raw = None if kept.raw is None else kept.raw.hex()
    whole = {name: _raw(getattr(kept, name)) for name in ("change", "fields", "context", "found")}
    rest = {"masked": kept.masked, "raw": raw}
    positions = {"xid": kept.xid, "commit_lsn": kept.commit_lsn, "end_lsn": kept.end_lsn}
    return _encode(_listed(stored).model_dump() | positions | whole | rest).decode()


def _raw(text: str | None) -> msgspec.Raw | None:
    return None if text is None else msgspec.Raw(text.encode())


_SELECTED: Final = f"SELECT count(*) FROM cdc_worker.dead_letter {_WHERE}"  # noqa: S608  # likewise

_DISCARD: Final = f"""
UPDATE cdc_worker.dead_letter SET discarded_at = now() {_WHERE} AND discarded_at IS NULL RETURNING dead_letter_id
"""  # noqa: S608  # likewise


def count(settings: Settings, selection: Selection) -> int:
    """How many dead letters are meant."""
    with _reading(settings, selection) as connection:
        ((count,),) = checkpoint.fetched(connection, _SELECTED, selection.parameters(settings.worker))
        return int(count)


def discard(settings: Settings, selection: Selection) -> list[int]:
    """Leave it at that with some dead letters; returns which. They are kept, and `retry` by number takes one up again.

    Raises TargetUnusableError without the right to.
    """
    with _reading(settings, selection) as connection:
        postgres.check_rights(connection, {"cdc_worker.dead_letter": ["SELECT", "UPDATE"]}, partly=(), whole=())
        found = checkpoint.fetched(connection, _DISCARD, selection.parameters(settings.worker))
    return sorted(number for (number,) in found)


# To try them again

_TAKE_UP: Final = """
UPDATE cdc_worker.dead_letter SET discarded_at = NULL WHERE worker = %s AND dead_letter_id = ANY (%s)
"""

_RESOLVE: Final = "DELETE FROM cdc_worker.dead_letter WHERE worker = %s AND dead_letter_id = ANY (%s)"


_ERASED: Final = "the person was erased, and nothing is told of them"

_MORE: Final = "it takes more of its transaction than was kept: cdc-worker replay, with a recording of it"


class _LeftError(Exception):
    """A dead letter can't be tried, for the reason that this is."""


def retry(settings: Settings, given: Profile, selection: Selection, *, log: Logger) -> Iterator[Tried]:
    """Try dead letters again, in the order in which they arrived; those that are named though they were discarded.

    Raises TargetUnusableError without the rights that it takes, and TooManyRefusalsError where the target refuses row
    after row.
    """
    selection.check()
    with Late(settings, given, command="retry", log=log) as late:
        _check_ids(late.control, settings.worker, selection)
        with checkpoint.as_set_up():
            late.control.execute(_TAKE_UP, (settings.worker, [*selection.ids]))
        failpoints.reach("letters_taken_up")
        for page in _pages(late.control, settings.worker, selection):
            yield from _Retry(settings, late).page([stored.id for stored in page])


class _Retry:
    """Dead letters that are tried together."""

    def __init__(self, settings: Settings, late: Late) -> None:
        self._settings, self._late = settings, late
        self._policy = settings.policy(late.profile)
        self._transformers: dict[tuple[str, bool], Transformer] = {}

    def page(self, ids: Sequence[int]) -> list[Tried]:
        """Try them; again if someone is erased meanwhile, or a table cut over."""
        while True:
            try:
                return self._tried(self._stored(ids))
            except errors.FencedError:
                self._late.begin()
                self._transformers.clear()

    def _stored(self, ids: Sequence[int]) -> list[_Stored]:
        return next(_pages(self._late.control, self._settings.worker, Selection(ids=tuple(ids))), [])

    def _tried(self, page: Sequence[_Stored]) -> list[Tried]:
        late, worker = self._late, self._settings.worker
        existing = late.existing([stored.kept.change_key for stored in page])
        left: dict[int, str] = {}
        done = [stored.id for stored in page if stored.kept.change_key in existing]
        for stored in page:
            if stored.id in done:
                continue
            try:
                outcomes, transaction = self._again(stored.kept)
            except _LeftError as reason:
                left[stored.id] = str(reason)
            else:
                cluster = _named(stored.kept.change_key)[1]
                late.add(outcomes, transaction, cluster=cluster, done=1, complete=True)
                if stored.kept.kind == "unreadable":
                    done.append(stored.id)
        late.flush()
        failpoints.reach("letters_retried")
        late.control.execute(_RESOLVE, (worker, done))
        now = {stored.id: stored for stored in self._stored([stored.id for stored in page])}
        return [self._outcome(stored, now.get(stored.id), existing, left.get(stored.id)) for stored in page]

    def _outcome(self, before: _Stored, now: _Stored | None, existing: Collection[str], left: str | None) -> Tried:
        key = before.kept.change_key
        if now is None:
            outcome: Literal["written", "already there"] = "already there" if key in existing else "written"
            return Tried(id=before.id, change_key=key, outcome=outcome)
        if now.attempts > before.attempts:
            return Tried(id=before.id, change_key=key, outcome="failed again", reason=now.kept.reason)
        return Tried(id=before.id, change_key=key, outcome="left", reason=left or "someone has discarded it meanwhile")

    def _again(self, kept: Kept) -> tuple[list[Told], Transaction]:
        """What is to be written of a dead letter now, and its transaction. Raises _LeftError."""
        letter, key = kept.letter(), _key(kept)
        if letter.reason == ERASED:
            raise _LeftError(_ERASED)
        if key is None:
            raise _LeftError("its key is none that this version makes")
        table = key.table.removeprefix("public.")
        if key.kind == "backfill":
            raise _LeftError(f"it is of a backfill, which reads the row anew: cdc-worker backfill {table}, then this")
        if key.kind == "repair":
            raise _LeftError(
                f"it is of a repair, which looks anew what is missing: cdc-worker verify {table} --repair, then this"
            )
        if letter.kind == "old_values_unknown":
            raise _LeftError("it is not known what the row was before, and never will be")
        origin = letter.origin
        transaction = Transaction(
            origin.xid,
            key.place.lsn,
            origin.end_lsn,
            letter.committed_at,
            [letter.change],
            [],
            [letter.change],
            0,
            first=True,
            last=True,
            answers={(0, name): row for name, row in letter.found.items()},
            masked=origin.masked,
        )
        if key.table == "cdc_worker.context" or (letter.fields is not None and not kept.whole):
            return [self._as_refused(letter)], transaction
        if letter.kind == "unreadable":
            return self._read_again(letter, key, transaction), transaction
        told = [of for of in self._told(letter, key, transaction) if of.change_key == letter.change_key]
        if not told:
            raise _LeftError(self._nothing(letter, key))
        return _unerased(told), transaction

    def _told(self, letter: DeadLetter, key: Key, transaction: Transaction) -> Iterator[Told]:
        """What the rules make of its change."""
        change, worker, cluster = letter.change, *_named(letter.change_key)
        name = change.schema, change.table
        prefix = key_prefix(worker, cluster, key.place.lsn)
        # That of a recording that doesn't say where its transactions were committed is of its own kind.
        kind = letter.change_key.removesuffix(change_key("", *name, key.place.ordinal, key.rule))
        transformer = self._transformer(cluster, placed=not kind.startswith(f"{worker}/{cluster}/{BY_TIME}"))
        heard = context.retold(letter.origin.context, self._policy)
        outcomes = transformer.take_up(transaction, heard=heard, ordinals={name: key.place.ordinal})
        for of in completed(transformer, outcomes, self._late.look_up):
            yield msgspec.structs.replace(of, change_key=kind + of.change_key.removeprefix(prefix))

    def _transformer(self, cluster: str, *, placed: bool) -> Transformer:
        if (cluster, placed) not in self._transformers:
            late = self._late
            self._transformers[cluster, placed] = Transformer(
                late.rules,
                worker=self._settings.worker,
                system_identifier=cluster,
                scope=late.scope(cluster, None, placed=placed),
                policy=self._policy,
            )
        return self._transformers[cluster, placed]

    def _nothing(self, letter: DeadLetter, key: Key) -> str:
        table = self._late.rules.get((letter.change.schema, letter.change.table))
        rules = {rule.name for rule in table.rules[letter.change.operation]} if table is not None else ()
        if key.rule in rules:
            return f'the rule "{key.rule}" of the profile tells nothing of it any more; to leave it at that, discard it'
        return f'the profile has no rule "{key.rule}" for it any more; to leave it at that, discard it'

    def _read_again(self, letter: DeadLetter, key: Key, transaction: Transaction) -> list[Told]:
        """What is told of a message that may be readable by now. Raises _LeftError if it isn't."""
        change = None if letter.raw is None else decoders.read_again(letter.change, letter.raw)
        table = self._late.rules.get((letter.change.schema, letter.change.table))
        if change is None or key.rule != "*":
            raise _LeftError("its message can't be read: report it")
        of = msgspec.structs.replace(letter, change=change)
        commit = msgspec.structs.replace(transaction, changes=[change], payloads=[change])
        told = [*self._told(of, key, commit)]
        place = letter.change_key.removesuffix("*")
        made = {outcome.change_key.removeprefix(place) for outcome in told}
        if table is None or any("/" in name for name in made):  # it is told with others, in place of them
            raise _LeftError(_MORE)
        if any(rule.facts for rule in table.rules[change.operation] if rule.name in made):
            raise _LeftError(_MORE)
        return _unerased(told)

    def _as_refused(self, letter: DeadLetter) -> Activity:
        """The activity as it was refused. Raises _LeftError if it wasn't, or if the target has other columns by now."""
        target, fields = self._late.profile.target, letter.fields or {}
        columns = [*target.columns, *target.constants]
        if fields.keys() != {*columns}:
            raise _LeftError(_MORE)
        values = {name: fields[column] for column, name in target.columns.items()}
        metadata = read(values.get("metadata") or "{}")
        told = {"type": "", "occurred_at": letter.committed_at, **values, "metadata": metadata}
        return Activity(letter.change_key, told, letter.change, 0, letter.origin, letter.found)


def _unerased(outcomes: list[Told]) -> list[Told]:
    """What is to be told. Raises _LeftError where that may not be."""
    for of in outcomes:
        if of.reason == ERASED if isinstance(of, DeadLetter) else of.fields["metadata"].get("erased") is True:
            raise _LeftError(_ERASED)
    return outcomes


def told(tried: Iterator[Tried]) -> Iterator[str]:
    """What became of them, as a person reads it."""
    counts: dict[str, int] = {}
    for of in tried:
        counts[of.outcome] = counts.get(of.outcome, 0) + 1
        yield f"{of.id}: {of.outcome}{f': {one_line(of.reason)}' if of.reason else ''}"
    yield f"{sum(counts.values()):,} tried: {', '.join(f'{n:,} {name}' for name, n in counts.items()) or 'none wait'}"
