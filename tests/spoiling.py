"""A wire between server and worker on which single messages of the stream arrive spoilt."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

Spoil = Callable[[bytes], bytes]
"""What becomes of a message of the output plugin: as many bytes."""

_HEADER: Final = struct.Struct(">cI")
_XLOG_DATA: Final = 25


class Wire:
    """Listens on a port and passes all on to the server and back; `spoil` sees each message of the output plugin."""

    def __init__(self, dsn: str, spoil: Spoil) -> None:
        self.spoil = spoil
        to = conninfo_to_dict(dsn)
        self._server = str(to["host"]), int(str(to["port"]))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        port = self._listening.getsockname()[1]
        # Encrypted it couldn't be told what is a message.
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable")

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for end in (self._listening, *self._sockets):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for target in (self._up, self._down):
                    threading.Thread(target=target, args=(client, server), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
        _end(client, server)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError), server.makefile("rb") as stream:
            while len(header := stream.read(_HEADER.size)) == _HEADER.size:
                kind, length = _HEADER.unpack(header)
                body = stream.read(length - 4)
                if kind == b"d" and body[:1] == b"w":
                    spoilt = self.spoil(body[_XLOG_DATA:])
                    assert len(spoilt) == len(body) - _XLOG_DATA
                    body = body[:_XLOG_DATA] + spoilt
                client.sendall(header + body)
        _end(client, server)


def _end(*sockets: socket.socket) -> None:
    for end in sockets:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def tail(*found: bytes) -> Spoil:
    """Spoil messages that have one of these in them behind their beginning, which can be read."""

    def spoil(payload: bytes) -> bytes:
        if not any(part in payload for part in found):
            return payload
        # Of pgoutput how many values there are in the first tuple.
        return payload[:-1] + b"\x01" if payload.startswith(b"{") else payload[:6] + b"\xff\xff" + payload[8:]

    return spoil


def head(*found: bytes) -> Spoil:
    """Spoil the beginning of messages that have one of these in them."""
    return lambda payload: b"!" + payload[1:] if any(part in payload for part in found) else payload


def ends(actions: bytes, xid: int) -> Spoil:
    """Spoil the beginning of a transaction's begin (B), of its commit (C), or of both."""
    lines = tuple(b'{"action":"%c","xid":%d,' % (action, xid) for action in actions)
    commits: set[bytes] = set()  # of pgoutput the position tells which commit it is

    def spoil(payload: bytes) -> bytes:
        if payload[:1] == b"B" and payload[-4:] == xid.to_bytes(4):
            commits.add(payload[1:9])
        ours = payload[1:9] if payload[:1] == b"B" else payload[2:10] if payload[:1] == b"C" else b""
        found = payload.startswith(lines) or (ours in commits and payload[:1] in actions)
        return b"!" + payload[1:] if found else payload

    return spoil
