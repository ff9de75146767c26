"""The output of wal2json, format version 1: one JSON document for each transaction. It is read from files only.

Nothing in it says where a transaction was committed; `include-lsn` adds where it ended. A TRUNCATE isn't in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, Literal

import msgspec

from cdc_worker.changes import Change, Message, Row, update
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.wal2json import Column, Said, document_of, row_of, said

Table = tuple[str, str]


class _Document(msgspec.Struct):
    change: list[msgspec.Raw]


class _Keys(msgspec.Struct):
    keynames: list[str]
    keyvalues: list[Any]
    keytypes: list[str] = []
    keytypeoids: list[int] = []


class _Change(msgspec.Struct):
    kind: Literal["insert", "update", "delete", "message"]
    schema: str = ""
    table: str = ""
    columnnames: list[str] = []
    columntypes: list[str] = []
    columntypeoids: list[int] = []
    columnvalues: list[Any] = []
    oldkeys: _Keys = msgspec.field(default_factory=lambda: _Keys([], []))
    transactional: bool = True
    prefix: str = ""
    content: str = ""


_AT_ONCE: Final = re.compile(rb'\{\s*"change":\s*\[\s*,')
"""A message outside of transactions comes in a document that is no JSON."""

_decode = msgspec.json.Decoder(_Document).decode


class Documents:
    """Reads documents of one recording, in order.

    Of an old row, columns that are NULL are left out, and so are those that the table's replica identity leaves out.
    One that isn't told is NULL only where that identity has proved to be the whole row: any other consists of the same
    columns always, none of which is ever NULL. Before that it is unknown.
    """

    def __init__(self) -> None:
        self._columns: dict[Table, dict[str, None]] = {}
        self._identity: dict[Table, frozenset[str]] = {}
        self._nullable: dict[Table, set[str]] = {}
        self._whole: set[Table] = set()

    def read(self, document: bytes) -> tuple[Said, list[bytes]]:
        """What a document says of its transaction, and its changes and messages. Raises MessageUnreadableError."""
        if _AT_ONCE.match(document):
            return Said(0, None, None, None), []
        try:
            return said(document), [bytes(raw) for raw in _decode(document).change]
        except ValueError as error:
            raise MessageUnreadableError(f"it is no document of wal2json's format 1: {error}") from error

    def message(self, raw: bytes) -> Change | Message:
        """Read one of them. Raises MessageUnreadableError."""
        try:
            change = msgspec.convert(document_of(raw), _Change)
            if change.kind == "message":
                return Message(change.prefix, change.content, change.transactional)
            return self._change(change)
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise MessageUnreadableError(f"a change in it can't be read: {error}") from error

    def _change(self, change: _Change) -> Change:
        table = change.schema, change.table
        new = row_of(_columns(change.columnnames, change.columnvalues, change.columntypes, change.columntypeoids))
        self._columns.setdefault(table, {}).update(dict.fromkeys(new))
        self._nullable.setdefault(table, set()).update(name for name, value in new.items() if value is None)
        if change.kind == "insert":
            return Change("insert", *table, None, new)
        keys = change.oldkeys
        old = self._old(table, row_of(_columns(keys.keynames, keys.keyvalues, keys.keytypes, keys.keytypeoids)))
        return Change("delete", *table, old, None) if change.kind == "delete" else update(*table, old, new)

    def _old(self, table: Table, told: Row) -> Row:
        names = frozenset(told)
        if names and (self._identity.setdefault(table, names) != names or names & self._nullable[table]):
            self._whole.add(table)
        return {**dict.fromkeys(self._columns[table]), **told} if table in self._whole else told


def _columns(names: list[str], values: list[Any], types: list[str], typeoids: list[int]) -> Iterator[Column]:
    if len(names) != len(values):
        raise ValueError("as many names as values are expected")
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        yield Column(
            name,
            value,
            typeoids[place] if place < len(typeoids) else 0,
            types[place] if place < len(types) else "",
        )
