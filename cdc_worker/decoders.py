"""The output plugins that are read, which are two, and what they have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from cdc_worker import pgoutput, wal2json
from cdc_worker.changes import Change, Decoded, Payload
from cdc_worker.errors import SlotMismatchError

PLUGINS = (wal2json.PLUGIN, pgoutput.PLUGIN)
"""By name; the first is preferred."""


class Decoder(Protocol):
    """Reads the messages of one connection, in order.

    What is decoded `by_itself` can be decoded later again, without what came before it.
    """

    @property
    def plugin(self) -> str: ...
    @property
    def by_itself(self) -> bool: ...

    def decode(self, payload: Payload) -> Decoded | None:
        """Read a message; None for one of which there is nothing to tell. Raises MessageUnreadableError."""

    def line(self, message: Decoded, payload: Payload) -> Payload:
        """What a recording has of it: a line of wal2json's format 2."""

    def table_of(self, payload: Payload) -> tuple[str, str] | None:
        """The table of a change, also where the rest of it can't be read."""

    def is_commit(self, payload: Payload) -> bool:
        """Whether it begins as a commit."""

    def is_message(self, payload: Payload) -> bool:
        """Whether it begins as a logical message."""

    def begin_told(self, commit: bytes) -> bytes:
        """The begin of a transaction, from its commit."""

    def raw(self, payload: Payload) -> bytes:
        """All that it takes to read it later: see `read_again`."""


def options(
    plugin: str,
    tables: Iterable[tuple[str, str]],
    prefixes: Iterable[str],
    *,
    publication: str,
    without: Iterable[tuple[str, str]] | None = None,
) -> tuple[dict[str, str], Collection[str]]:
    """Options of START_REPLICATION, and those of them without which the plugin can be read as well.

    Of wal2json the tables are asked for, or all but some; of pgoutput what is in the publication.
    """
    if plugin == pgoutput.PLUGIN:
        return pgoutput.options(publication), ()
    return wal2json.options(tables, prefixes, without=without), wal2json.OPTIONAL


def decoder(
    plugin: str, tables: Collection[tuple[str, str]] | None, prefixes: Collection[str], *, encoding: str
) -> Decoder:
    """For one connection; None stands for all tables. `encoding` is Python's name of the server's."""
    if plugin == pgoutput.PLUGIN:
        return pgoutput.Decoder(tables, prefixes, encoding=encoding)
    if plugin == wal2json.PLUGIN:
        return wal2json.Decoder()
    raise SlotMismatchError(f'the output plugin "{plugin}" is none of {", ".join(PLUGINS)}')


def read_again(unread: Change, raw: bytes) -> Change | None:
    """The change in whose place one stands that couldn't be read, if its message can be read by now.

    One of which it wasn't known that it was a change of that table can't: nothing in its commit was counted with it.
    """
    change = wal2json.read_again(raw) if raw.startswith(b"{") else pgoutput.read_again(raw)
    name = unread.schema, unread.table
    if change is None or (change.schema, change.table) != (unread.partition or name):
        return None
    return Change(change.operation, *name, change.old, change.new, change.changed, unread.partition)
