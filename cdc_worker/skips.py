"""What to do where the stream can't go on: a message that can't be read must not hold WAL for ever.

Someone allows the worker to pass over the message at a position. That is a permission and no deed: the worker itself
passes it over when it comes there, in order, and only if it still can't be read. What it was is kept as a dead letter,
in the same database transaction as the checkpoint that passes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import Final

from cdc_worker import errors, postgres, recording, slot
from cdc_worker.changes import STREAM, Assembler, Begin, Change, Commit, Part, Payload, RootOf, Transaction, Unread
from cdc_worker.checkpoint import Checkpoint
from cdc_worker.config import Settings
from cdc_worker.decoders import Decoder
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.log import Logger
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Connection
from cdc_worker.rules import Rules

_NEEDED: Final = {"cdc_worker.checkpoint": ["SELECT"], "cdc_worker.skip": ["SELECT", "INSERT"]}

_ALLOW: Final = """
INSERT INTO cdc_worker.skip (worker, system_identifier, lsn) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING
RETURNING true
"""

_IS_ALLOWED: Final = (
    "SELECT count(*) > 0 FROM cdc_worker.skip WHERE worker = %s AND system_identifier = %s AND lsn = %s"
)

_ALLOWED: Final = "SELECT lsn FROM cdc_worker.skip WHERE worker = %s AND system_identifier = %s"


def skip(settings: Settings, position: LSN, *, dry_run: bool = False) -> Iterator[str]:
    """Allow the worker to pass over the message at this position, if it can't be read; yields what is to be told.

    Raises SettingsError for a position at which nothing can come any more, or can't have come yet.
    """
    worker = settings.worker
    with closing(postgres.connect(settings.dsn.get_secret_value(), worker)) as connection:
        found, at = slot.check_checkpoint(connection, worker, settings.slot)
        postgres.check_rights(connection, _NEEDED, partly=(), whole=())
        _check_position(position, at, slot.committed_so_far(connection))
        key = worker, found.system_identifier, str(position)
        if dry_run:
            (known,) = postgres.fetch_one(connection, _IS_ALLOWED, *key)
        else:
            known = connection.execute(_ALLOW, key).fetchone() is None
    told = "was allowed already" if known else "would be allowed" if dry_run else "is allowed"
    yield f'the worker "{worker}" {told} to pass over the message at {position}, if it can\'t be read'
    yield "what it was is kept in cdc_worker.dead_letter; what rows miss of it is found by: cdc-worker verify"
    if at.held_by_worker:
        yield "one runs by now, and knows of it when it is started anew; until then it ends at that message as before"
    else:
        yield "next: cdc-worker run"


def _check_position(position: LSN, at: slot.Slot, end: LSN) -> None:
    """Raise unless a message of the slot may lie there.

    Changes of a transaction that is yet to come may lie before the checkpoint, so that says nothing.
    """
    begin = LSN(at.wal_end - at.retained)
    if position < begin:
        raise errors.SettingsError(
            f'nothing at {position} can come any more: the slot "{at.name}" keeps the WAL from {begin} on',
            hint='give the position that `run` has printed: "the message at …"',
        )
    if position > end:
        raise errors.SettingsError(
            f"nothing is at {position} yet: the server's WAL ends at {end}",
            hint='give the position that `run` has printed: "the message at …"',
        )


def allowed(connection: Connection, found: Checkpoint) -> frozenset[LSN]:
    """The positions of messages that the worker may pass over."""
    rows = connection.execute(_ALLOWED, (found.worker, found.system_identifier)).fetchall()
    return frozenset(LSN.parse(lsn) for (lsn,) in rows)


class Skips:
    """What may be passed over, and what is made of it."""

    def __init__(
        self,
        allowed: Collection[LSN],
        rules: Rules,
        root_of: RootOf | None,
        begins: Mapping[LSN, bytes],
        decoder: Decoder,
        *,
        raw: bool,
        log: Logger,
    ) -> None:
        """`begins` are commits, by the positions of their begins that couldn't be read.

        With `raw` messages go into recordings as they are, else only those in which no value can be that is masked.
        """
        self._allowed = allowed
        self._rules = rules
        self._root_of = root_of
        self._begins = begins
        self._decoder = decoder
        self._raw = raw
        self._log = log

    def pass_over(
        self, assembler: Assembler, payload: Payload, position: LSN, error: MessageUnreadableError
    ) -> Transaction | None:
        """Go on without the message that caused this error, as with one that could be read.

        Raises MessageUnreadableError, with all that is known of the message, where that is not allowed.
        """
        part = self._part(payload, position, assembler)
        if assembler.dealt_with:
            return assembler.feed(Commit(position), payload) if part == "commit" else None
        begun = assembler.begun
        table, partition = self._table(payload, begun)
        if self._is_readable(payload):  # it can't stand where it does
            raise MessageUnreadableError(
                _described(error, position, table, assembler), hint="this is no fault of one message: report it"
            ) from error
        if position not in self._allowed:
            raise MessageUnreadableError(
                _described(error, position, table, assembler),
                hint=f"report it; to keep it as a dead letter and go on: cdc-worker recover --skip {position}",
            ) from error
        self._log.warning(
            "message_passed_over", lsn=str(position), bytes=len(payload), table=None if table is None else table[1]
        )
        if not assembler.open and self._decoder.is_message(payload):
            return None  # it is of no transaction
        unread = Unread(
            *("unreadable", *(table or STREAM), None, None),
            partition=partition,
            of=part,
            position=position,
            reason=str(error),
            met_at=datetime.now(UTC),
            raw=self._decoder.raw(payload),
        )
        if unread.of == "begin" and (commit := self._begins.get(position)) is not None:
            line = self._decoder.begin_told(commit)
            begin = self._decoder.decode(line)
            assert isinstance(begin, Begin)
            assembler.feed(begin, line)
        tables = self._rules.values() if table is None else [self._rules[table]]
        return assembler.pass_over(
            unread, recording.unread(unread, raw=self._raw or not any(of.masks for of in tables))
        )

    def _table(self, payload: Payload, begun: Begin | None) -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
        """The captured table that a change is of, if its line begins so, and the partition if it is one."""
        name = self._decoder.table_of(payload)
        if name is None or begun is None:
            return None, None
        root: tuple[str, str] | None = name
        if self._root_of is not None:
            root = self._root_of(Change("unreadable", *name, None, None), begun.commit_lsn)
        if root is None or root not in self._rules:
            return None, None
        return root, None if root == name else name

    def _part(self, payload: Payload, position: LSN, assembler: Assembler) -> Part:
        """Which part of a transaction a message is. A commit lies where its transaction ends."""
        if not assembler.open:
            return "begin"
        begun = assembler.begun
        ends = self._decoder.is_commit(payload) if begun is None else position > begun.commit_lsn
        return "commit" if ends else "change"

    def _is_readable(self, payload: Payload) -> bool:
        try:
            self._decoder.decode(payload)
        except MessageUnreadableError:
            return False
        return True


def _described(
    error: MessageUnreadableError, position: LSN, table: tuple[str, str] | None, assembler: Assembler
) -> str:
    what = "" if table is None else f", a change of {'.'.join(table)}"
    where = ", outside of any transaction"
    if assembler.begun is not None:
        begun, count = assembler.begun, assembler.count
        changes = f"{count} change{'' if count == 1 else 's'}"
        where = f", after {changes} of transaction {begun.xid}, whose commit is at {begun.commit_lsn}"
    elif assembler.open:
        where = ", in a transaction whose begin can't be read either"
    return f"{error}; this is the message at {position}{what}{where}"
