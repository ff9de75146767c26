"""What both decoders make of one WAL: scripts that are run once, and read through a slot of each plugin.

A script is a file in tests/parity. Each of its paragraphs is sent as one query, and so is a transaction unless it says
otherwise. Those before `-- slots` are run before there are slots, and make tables. All that a script makes is in a
schema of its name. `-- from 15` needs that PostgreSQL, and `-- database LATIN1` a database in that encoding.
"""

from __future__ import annotations

import hashlib
import json
import re
import select
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc_worker import decoders, partitions, pgoutput, postgres, wal2json
from cdc_worker.changes import Assembler, Begin, Change, Commit, Decoded, Message, Payload, Row, Transaction
from cdc_worker.cluster import Cluster
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.protocol import PrimaryKeepalive
from cdc_worker.replication import Replication
from cdc_worker.values import Value

PARITY: Final = Path(__file__).parent / "parity"

PUBLICATION: Final = "parity"

MARK: Final = "parity"
"""Prefix of the messages that tell where a script begins."""

PREFIXES: Final = (MARK, "asked")

Table = tuple[str, str]


@dataclass(frozen=True)
class Script:
    """One file."""

    name: str
    text: str

    @classmethod
    def read(cls, path: Path) -> Script:
        """Of this path."""
        return cls(path.stem, path.read_text())

    def _said(self, word: str, otherwise: str) -> str:
        found = re.search(rf"^-- {word} (\w+)$", self.text, re.MULTILINE)
        return otherwise if found is None else found[1]

    @property
    def since(self) -> int:
        """The first PostgreSQL on which it runs."""
        return int(self._said("from", "14"))

    @property
    def encoding(self) -> str:
        """That of its database."""
        return self._said("database", "UTF8")

    @cached_property
    def _halves(self) -> tuple[list[str], list[str]]:
        before, _, after = self.text.partition("\n-- slots\n")
        return _paragraphs(before), _paragraphs(after)

    def prepare(self, connection: psycopg.Connection[Any]) -> None:
        """Make its schema, and in it what is there before the slots."""
        name = sql.Identifier(self.name)
        connection.execute(sql.SQL("CREATE SCHEMA {}; SET search_path = {}").format(name, name))
        for paragraph in self._halves[0]:
            connection.execute(paragraph.encode())

    def run(self, dsn: str) -> None:
        """Run what is to be streamed."""
        with psycopg.connect(dsn, autocommit=True, client_encoding="UTF8") as connection:
            connection.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(self.name)))
            connection.execute("SELECT pg_logical_emit_message(true, %s, %s)", (MARK, self.name))
            for paragraph in self._halves[1]:
                statement, newline, data = paragraph.partition(" FROM stdin;\n")
                if newline and statement.startswith("COPY "):
                    with connection.cursor().copy(f"{statement} FROM stdin".encode()) as copy:
                        copy.write(data + "\n")
                else:
                    connection.execute(paragraph.encode())


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


SCRIPTS: Final = [Script.read(path) for path in sorted(PARITY.glob("*.sql"))]


@dataclass
class Commits:
    """A transaction, put together again from its slices."""

    xid: int
    commit_lsn: LSN
    end_lsn: LSN
    committed_at: datetime
    changes: list[str] = field(default_factory=list)
    messages: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Told:
    """What was told of a script: message by message, and put together."""

    lines: list[str] = field(default_factory=list)
    commits: list[Commits] = field(default_factory=list)
    recorded: list[str] = field(default_factory=list)
    """What a recording of the lines says."""

    @property
    def report(self) -> list[str]:
        """All of it but positions; put together only where partitions became tables."""
        together = [line for commit in self.commits for line in ("begin", *commit.changes, "commit")]
        if set(together) <= set(self.lines):
            return _shortened(self.lines)
        return _shortened([*self.lines, TOGETHER, *together])


TOGETHER: Final = "put together"


def shown(value: Value) -> Any:
    """A value as JSON, with its type where JSON has none for it."""
    match value:
        case Decimal():
            return {"numeric": _short(str(value))}
        case float():
            return {"float": repr(value)}
        case str():
            return _short(value)
        case int() if abs(value) > 1 << 64:
            return {"int": _short(str(value))}
        case _:
            return value


def _short(text: str) -> str:
    if len(text) <= 200:
        return text
    return f"{text[:40]}… {len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _row(row: Row | None) -> dict[str, Any] | None:
    return None if row is None else {name: shown(value) for name, value in row.items()}


def _line(*parts: Any) -> str:
    return json.dumps(parts, ensure_ascii=False)


def line_of(message: Change | Message) -> str:
    """A change or a message, on a line."""
    if isinstance(message, Message):
        return _line("message", message.prefix, _short(message.content), message.transactional)
    place = [".".join(message.partition)] if message.partition else []
    name = f"{message.schema}.{message.table}"
    return _line(message.operation, name, _row(message.old), _row(message.new), message.changed, *place)


def _shortened(lines: Sequence[str]) -> list[str]:
    """Lines, of which many in one transaction are some, and what they all are."""
    found, run = list[str](), list[str]()
    for line in [*lines, ""]:
        if line.startswith("["):
            run.append(line)
            continue
        rest = run[40:]
        found += run[:40]
        if rest:
            found.append(f"and {len(rest)} more: {hashlib.sha256(chr(10).join(rest).encode()).hexdigest()[:16]}")
        run = []
        if line:
            found.append(line)
    return found


class _Listener:
    """Takes down what a decoder tells."""

    def __init__(self, decoder: decoders.Decoder, database: _Database, connection: psycopg.Connection[Any]) -> None:
        self.told: dict[str, Told] = {}
        self.ended = False
        self._decoder = decoder
        self._lines: list[str] = []
        self._open: list[str] | None = None
        self._commits: Commits | None = None
        self._name = ""

        def root_of(change: Change, commit_lsn: LSN) -> Table:
            return database.roots.get((change.schema, change.table), (change.schema, change.table))

        self._assembler = Assembler(
            root_of=root_of,
            stored_in=lambda root, xid: partitions.leaves(connection, root, xid),
            keys=database.keys,
            by_itself=decoder.by_itself,
        )

    @property
    def _here(self) -> Told:
        return self.told.setdefault(self._name, Told())

    def hear(self, payload: Payload) -> None:
        try:
            message = self._decoder.decode(payload)
        except MessageUnreadableError:
            assert self._open is not None
            self._open.append(_line("unreadable", *(self._decoder.table_of(payload) or ())))
            return
        if message is None:
            return
        self._follow(message, payload)
        if (transaction := self._assembler.feed(message, payload)) is not None:
            self._assemble(transaction)

    def _follow(self, message: Decoded, payload: Payload) -> None:
        match message:
            case Begin():
                self._open = []
            case Commit():
                assert self._open is not None
                if self._open:
                    self._here.lines += ["begin", *self._open, "commit"]
                self._open = None
            case Message(prefix=prefix, content=content) if prefix == MARK:
                self._name = content
                self.ended = content == "end"
            case _:
                for one in message if isinstance(message, tuple) else [message]:
                    assert self._open is not None or (isinstance(one, Message) and not one.transactional)
                    (self._here.lines if self._open is None else self._open).append(line_of(one))
                    again = wal2json.decode(self._decoder.line(one, payload))
                    assert isinstance(again, Change | Message)
                    self._here.recorded.append(line_of(again))

    def _assemble(self, transaction: Transaction) -> None:
        if transaction.first:
            self._commits = Commits(
                transaction.xid, transaction.commit_lsn, transaction.end_lsn, transaction.committed_at
            )
        commits = self._commits
        assert commits is not None
        assert (commits.xid, commits.commit_lsn) == (transaction.xid, transaction.commit_lsn)
        assert len(commits.changes) == transaction.index
        messages = [(transaction.index + place, line_of(message)) for place, message in transaction.messages]
        commits.messages += messages
        commits.changes += map(line_of, transaction.changes)
        commits.end_lsn = transaction.end_lsn
        if transaction.last:
            self._here.commits.append(commits)


class Server:
    """A server on which all scripts that it can run have been run."""

    def __init__(self, cluster: Cluster, plugins: Sequence[str]) -> None:
        self.cluster = cluster
        self.plugins = plugins
        with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
            self.major = connection.info.server_version // 10000
        self.scripts = [script for script in SCRIPTS if script.since <= self.major]
        self.databases = {
            encoding: _Database(self, encoding) for encoding in {script.encoding: None for script in self.scripts}
        }

    def refused(self, plugin: str) -> list[str]:
        """The options that a plugin doesn't know. After `told`."""
        return self.databases["UTF8"].refused[plugin]

    def told(self, script: Script, plugin: str, *, user: str = "postgres") -> Told:
        """What a plugin tells of a script to a role."""
        return self.databases[script.encoding].told(plugin, user).get(script.name, Told())


class _Database:
    """A database in one encoding, its scripts, and what was told of them."""

    def __init__(self, server: Server, encoding: str) -> None:
        self.encoding = encoding
        self.name = f"parity_{encoding.lower()}"
        self.dsn = server.cluster.dsn(self.name)
        self.refused: dict[str, list[str]] = {}
        self._told: dict[tuple[str, str], dict[str, Told]] = {}
        scripts = [script for script in server.scripts if script.encoding == encoding]
        with psycopg.connect(server.cluster.dsn(), autocommit=True) as connection:
            create = sql.SQL("CREATE DATABASE {} ENCODING {} LOCALE 'C' TEMPLATE template0")
            connection.execute(create.format(sql.Identifier(self.name), encoding))
        with psycopg.connect(self.dsn, autocommit=True, client_encoding="UTF8") as connection:
            for script in scripts:
                script.prepare(connection)
            self.tables = _tables(connection)
            publish = sql.SQL("CREATE PUBLICATION {} FOR TABLE {} {}").format(
                sql.Identifier(PUBLICATION),
                sql.SQL(", ").join(sql.Identifier(*table) for table in self.tables),
                sql.SQL("WITH (publish_generated_columns = stored)" if server.major >= 18 else ""),
            )
            connection.execute(publish)
            self.unheard = [
                (schema, name)
                for schema, name in connection.execute(
                    "SELECT nspname::text, relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
                    " WHERE relkind = 'r' AND relname LIKE 'unheard%'"
                )
            ]
            for plugin in server.plugins:
                connection.execute("SELECT pg_create_logical_replication_slot(%s, %s)", (self._slot(plugin), plugin))
            self.roots = partitions.roots(connection, self.tables)
            for script in scripts:
                script.run(self.dsn)
            self.roots |= partitions.roots(connection, self.tables)
            self.keys = dict.fromkeys(self.roots.values(), ("id",))
            connection.execute("SELECT pg_logical_emit_message(true, %s, 'end')", (MARK,))

    def _slot(self, plugin: str) -> str:
        return f"{self.name}_{plugin}"

    def told(self, plugin: str, user: str) -> dict[str, Told]:
        """What a plugin tells of everything to a role, by script."""
        if (plugin, user) not in self._told:
            self._told[plugin, user] = self._listen(plugin, user)
        return self._told[plugin, user]

    def _listen(self, plugin: str, user: str) -> dict[str, Told]:
        # Where tables may become partitions the worker asks wal2json for all but some, and otherwise for some.
        without = self.unheard if self.roots else None
        options, optional = decoders.options(plugin, self.tables, PREFIXES, publication=PUBLICATION, without=without)
        dsn = make_conninfo(self.dsn, user=user)
        with (
            postgres.connect_reading(dsn, "parity") as connection,
            Replication(postgres.connect_replication(dsn, "parity")) as replication,
        ):
            self.refused[plugin] = replication.start(
                self._slot(plugin),
                LSN(0),
                options,
                encoding=self.encoding,
                optional=optional,
                text=plugin != pgoutput.PLUGIN,
            )
            decoder = decoders.decoder(plugin, None, PREFIXES, encoding=replication.encoding)
            listener = _Listener(decoder, self, connection)
            for payload in _payloads(replication):
                listener.hear(payload)
                if listener.ended:
                    return listener.told
        raise AssertionError("it never ended")


def _payloads(replication: Replication) -> Iterator[Payload]:
    while True:
        message = replication.receive()
        if message is None:
            assert select.select([replication], [], [], 60)[0], "the server fell silent"
            replication.read()
        elif not isinstance(message, PrimaryKeepalive):
            yield message


def _tables(connection: psycopg.Connection[Any]) -> list[Table]:
    return [
        (schema, name)
        for schema, name in connection.execute(
            "SELECT nspname::text, relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
            " WHERE relkind IN ('r', 'p') AND NOT relispartition AND relpersistence = 'p'"
            " AND nspname NOT IN ('pg_catalog', 'information_schema') AND relname NOT LIKE 'unheard%'"
            " ORDER BY 1, 2"
        )
    ]
