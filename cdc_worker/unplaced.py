"""Recordings that don't say where transactions were committed: which keys their changes have, and who may tell them.

Without its commit LSN a change has not the key that the stream gives it. It has one of a kind of its own, by where its
commit ended or else by when it was, and so it is told only to a target that has nothing of that time: nobody could see
that it is told twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
from psycopg import sql

from cdc_worker import catalog, errors, postgres
from cdc_worker.activities import BY_END, BY_TIME, Skipped
from cdc_worker.late import Late
from cdc_worker.lsn import LSN
from cdc_worker.profile import Target
from cdc_worker.reading import Recorded
from cdc_worker.rules import qualified
from cdc_worker.transform import Outcome

AT_ONCE: Final = 64
"""So many transactions may have been committed at one time."""

TIMES: Final = 100_000
"""Of so many times it is remembered how many were committed then."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class Placed(NamedTuple):
    """A transaction with a place of its own, and what is inserted for that into its keys."""

    recorded: Recorded
    kind: str


class Places:
    """Gives transactions places, in the order in which they come. They are the same whenever they are read."""

    def __init__(self) -> None:
        self._counts: dict[datetime, int] = {}
        self._number = 0

    def placed(self, recorded: Recorded) -> Placed:
        """It as a commit at a place of its own, unless it has one."""
        if recorded.has_lsn:
            return Placed(recorded, "")
        transaction = recorded.transaction
        if recorded.ended is not None:
            # Before its end, as any commit is: what begins there is not about it.
            commit, end, kind = LSN(recorded.ended - 1), recorded.ended, BY_END
        else:
            at = transaction.committed_at
            if transaction.first:
                self._number = self._counts.pop(at, -1) + 1
                self._counts[at] = self._number
                if len(self._counts) > TIMES:
                    del self._counts[next(iter(self._counts))]
                if self._number >= AT_ONCE:
                    raise errors.RecordingUnreadableError(
                        f"{recorded.file} has more than {AT_ONCE} transactions of one time", hint=_PROPERLY
                    )
            commit = LSN((at - _EPOCH) // _MICROSECOND * AT_ONCE + self._number)
            end, kind = LSN(commit + 1), BY_TIME
        transaction = msgspec.structs.replace(transaction, commit_lsn=commit, end_lsn=end)
        return Placed(recorded._replace(transaction=transaction), kind)


def named(outcome: Outcome, placed: Placed) -> Outcome:
    """An outcome with the key of its kind."""
    if not placed.kind or isinstance(outcome, Skipped):
        return outcome
    commit = placed.recorded.transaction.commit_lsn
    at = placed.recorded.ended if placed.recorded.ended is not None else commit
    key = outcome.change_key.replace(f"/{commit:016X}/", f"/{placed.kind}{at:016X}/", 1)
    return msgspec.structs.replace(outcome, change_key=key)


_PROPERLY: Final = (
    "record with: pg_recvlogical -o format-version=2 -o include-lsn=1 -o include-timestamp=1 -o include-xids=1"
    " (docs/recordings.md), or write activities to a file with --output"
)


class _Range(NamedTuple):
    """What transactions span of which it isn't known where they were committed."""

    cluster: str
    database: str | None
    first: datetime
    last: datetime
    ended: LSN | None
    """Where the last one ended, if that is known of all."""


def check(late: Late, recorded: Iterable[Recorded], zone: ZoneInfo) -> None:
    """Raise RecordingUnreadableError if some of it may be told already, or may be told by the stream."""
    ranges: dict[tuple[str, str | None], _Range] = {}
    for of in recorded:
        if not of.has_time:
            raise errors.RecordingUnreadableError(
                f"{of.file} doesn't say when its transactions were committed, which activities have to tell",
                hint=_PROPERLY,
            )
        if of.has_lsn:
            continue
        key, at, ended = (of.system_identifier, of.database), of.transaction.committed_at, of.ended
        known = ranges.get(key, _Range(*key, at, at, LSN(0)))
        ranges[key] = known._replace(
            first=min(known.first, at),
            last=max(known.last, at),
            ended=None if known.ended is None or ended is None else max(known.ended, ended),
        )
    for span in ranges.values():
        _check_span(late, span, zone)


def _check_span(late: Late, span: _Range, zone: ZoneInfo) -> None:
    what = "transactions are recorded that don't say where they were committed"
    if late.is_home(span.cluster, span.database):
        position, at = late.checkpoint.position.lsn, late.checkpoint.committed_at
        told = span.ended <= position if span.ended is not None else at is not None and span.last < at
        if not told:
            raise errors.RecordingUnreadableError(
                f"{what}, up to {span.ended or span.last.isoformat()}: the worker, which is at {position}, may still"
                " tell them",
                hint=f"run it again when the worker has recorded something later, or {_PROPERLY}",
            )
    if _has_told(late, span, zone):
        raise errors.RecordingUnreadableError(
            f"{what}, and the worker has recorded something of that time, from {span.first.isoformat()} to"
            f" {span.last.isoformat()}: nobody could see what would be told twice",
            hint=_PROPERLY,
        )


def _has_told(late: Late, span: _Range, zone: ZoneInfo) -> bool:
    """Whether the target has anything of the stream in a span of time; without positions also if it has before that.

    What is only known by its time comes before all that has a position.
    """
    target = late.profile.target
    date, key = _column(target, "occurred_at"), catalog.row_key(target, late.target)
    if date is None or key is None:
        raise errors.RecordingUnreadableError(
            "transactions are recorded that don't say where they were committed, and whether they are told already"
            f" can't be seen in {target.table}",
            hint=_PROPERLY,
        )

    def there(at: datetime) -> datetime:
        return at if catalog.zoned(target, late.target) else at.astimezone(zone).replace(tzinfo=None)

    query = _TOLD.format(table=sql.Identifier(*qualified(target.table)), key=key, date=sql.Identifier(date))
    first = sql.SQL(" AND {} >= %(first)s").format(sql.Identifier(date)) if span.ended is not None else sql.SQL("")
    parameters = {
        "prefix": f"{late.checkpoint.worker}/",
        "first": there(span.first),
        "last": there(span.last),
    }
    found = late.control.execute(postgres.with_parameters(query + first + _END), parameters).fetchone()
    return found == (True,)


def _column(target: Target, field: str) -> str | None:
    return next((column for column, of in target.columns.items() if of == field), None)


_TOLD: Final = sql.SQL("""
SELECT EXISTS (SELECT FROM {table} WHERE starts_with({key}, %(prefix)s) AND split_part({key}, '/', 3) ~ '^[0-9A-F]+$'
               AND {date} <= %(last)s""")

_END: Final = sql.SQL(")")
