"""Streaming replication over COPY BOTH, for a logical slot."""

from __future__ import annotations

import re
import select
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

import psycopg
from psycopg import pq, sql

from cdc_worker import protocol
from cdc_worker.changes import Payload
from cdc_worker.errors import PublicationError
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.postgres import Connection, error, fetch_one
from cdc_worker.protocol import PrimaryKeepalive

# Names are in quotes there, and quotes within them as they are.
_DROPPED: Final = re.compile(r'no tuple identifier for (UPDATE|DELETE) in table "(.*?)"\."(.*)"')


def offer(
    options: Mapping[str, str], optional: Collection[str], begin: Callable[[Mapping[str, str]], object]
) -> list[str]:
    """Begin, without those of the `optional` options that the plugin doesn't know; returns these."""
    accepted, refused = dict(options), list[str]()
    while True:
        try:
            begin(accepted)
            return refused
        except psycopg.errors.InvalidParameterValue as error:
            named = re.search(r'option "([^"]+)"', error.diag.message_primary or "")
            if named is None or named[1] not in optional or named[1] not in accepted:
                raise
            refused.append(named[1])
            del accepted[named[1]]


class Replication:
    """A replication connection. Nothing here blocks once it has started: wait for `fileno` with select."""

    def __init__(self, connection: Connection, *, on_dropped: Callable[[str, str, str], None] | None = None) -> None:
        """`on_dropped(operation, schema, table)` is told when the plugin leaves out a change for want of a replica
        identity.
        """
        self._connection = connection
        self._pgconn = connection.pgconn
        self._get_copy_data = connection.pgconn.get_copy_data
        self._on_dropped = on_dropped
        self._recode: str | None = None
        self.encoding = "utf-8"
        self._data = memoryview(b"")
        self._left_out = False
        connection.add_notice_handler(self._notice)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        # From PostgreSQL 18 on it goes on without, where before it was an error.
        if diagnostic.source_function == "LoadPublications":
            self._left_out = True
        if self._on_dropped and (match := _DROPPED.search(diagnostic.message_primary or "")):
            self._on_dropped(match[1], match[2], match[3])

    def system_identifier(self) -> str:
        """IDENTIFY_SYSTEM: which cluster this is."""
        return str(fetch_one(self._connection, "IDENTIFY_SYSTEM")[0])

    def wal_sender_timeout(self) -> float:
        """After so many seconds without a word from us the server hangs up; 0 for never."""
        # Of pg_settings the server would make all rows.
        query = "SELECT extract(epoch FROM current_setting('wal_sender_timeout')::interval)::float"
        return float(fetch_one(self._connection, query)[0])

    def start(
        self,
        slot: str,
        position: LSN,
        options: Mapping[str, str],
        *,
        encoding: str,
        optional: Collection[str] = (),
        text: bool = True,
    ) -> list[str]:
        """START_REPLICATION, without those of the `optional` options that the plugin doesn't know; returns these.

        `encoding` is the server's, whose name in Python is then in `self.encoding`. The plugin's output is in it, and
        if that is `text` it is received in UTF-8. The server isn't let to convert it: what it can't ends a stream.
        """
        if encoding != "UTF8":
            set_encoding = sql.SQL("SET client_encoding = {}")
            self._connection.execute(set_encoding.format(sql.Literal(encoding)))
            self.encoding = self._connection.info.encoding
            self._recode = self.encoding if text else None

        def begin(accepted: Mapping[str, str]) -> None:
            pairs = sql.SQL(", ").join(
                sql.SQL("{} {}").format(sql.Identifier(name), _literal(value)) for name, value in accepted.items()
            )
            command = sql.SQL("START_REPLICATION SLOT {} LOGICAL {} ({})").format(
                sql.Identifier(slot), sql.SQL(str(position)), pairs
            )
            # Where anything goes, names beyond ASCII are most likely in UTF-8.
            self._connection.execute(command.as_string().encode("utf-8" if encoding == "SQL_ASCII" else self.encoding))

        refused = offer(options, optional, begin)
        self._pgconn.nonblocking = 1
        return refused

    @property
    def pid(self) -> int:
        """The process of the server that serves us."""
        return self._connection.info.backend_pid

    def fileno(self) -> int:
        """The socket, for select."""
        return self._pgconn.socket

    def receive(self) -> Payload | PrimaryKeepalive | None:
        """The next message that has already arrived, or None. Of XLogData it is the payload, in UTF-8 if it is text.

        Raises PublicationError where the server has left changes out, as it has warned.
        """
        size, data = self._get_copy_data(1)
        if self._left_out:
            raise _publication_missing()
        if size > 0:
            if size < protocol.HEADER or data[0] != protocol.XLOG_DATA:
                return protocol.keepalive(data)
            self._data = data
            payload = data[protocol.HEADER :]
            if self._recode is None:
                return payload
            # Bytes that mean nothing in the server's encoding stay as they are: the decoder knows what they spoil.
            return bytes(payload).decode(self._recode, "surrogateescape").encode("utf-8", "surrogateescape")
        if size == 0:
            return None
        result = self._pgconn.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            sqlstate = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
            if sqlstate == "42704":
                raise _publication_missing()
            raise error(sqlstate, "the server ended the stream")
        raise psycopg.OperationalError("the server ended the stream")

    def check(self) -> None:
        """Raise what has ended the stream, if anything has. What came before that is lost."""
        self.read()
        while self.receive() is not None:
            pass

    @property
    def position(self) -> LSN:
        """Where the record lies of which the last payload told."""
        message = protocol.parse(self._data)
        assert isinstance(message, protocol.XLogData)
        return message.wal_start

    def read(self) -> None:
        """Take what has arrived from the socket. Raises psycopg.OperationalError when the connection is gone."""
        self._pgconn.consume_input()

    def send_status(
        self, *, written: LSN, flushed: LSN = INVALID, applied: LSN = INVALID, reply_requested: bool = False
    ) -> None:
        """Send a standby status update; see protocol.standby_status_update."""
        update = protocol.standby_status_update(
            written=written,
            flushed=flushed,
            applied=applied,
            at=datetime.now(UTC),
            reply_requested=reply_requested,
        )
        self._pgconn.put_copy_data(update)
        self._pgconn.flush()

    def flush(self, timeout: float) -> None:
        """Wait until the server's socket has taken all that was sent, at most so long."""
        while self._pgconn.flush():
            if not select.select([], [self], [], timeout)[1]:
                return

    def close(self) -> None:
        """Hang up. The server reads what was sent before it notices."""
        self._connection.close()


def _publication_missing() -> PublicationError:
    return PublicationError(
        "at a point of the WAL that is to be read the publication does not exist: pgoutput can't tell what was changed",
        hint="if it was dropped or made anew, what was committed meanwhile can be read with wal2json only: "
        "cdc-worker switch-plugin --to wal2json; without it, begin anew (cdc-worker teardown, then cdc-worker setup): "
        "what is missing then is found by cdc-worker verify",
    )


def _literal(value: str) -> sql.SQL:
    """A string for a replication command, whose grammar doesn't know E'' (src/backend/replication/repl_scanner.l)."""
    return sql.SQL("'" + value.replace("'", "''") + "'")
