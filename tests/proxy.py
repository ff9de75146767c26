"""A network between a worker and its server that a test can spoil: cut, stalled, slow, in pieces, half-open.

    with Proxy(server.port) as proxy, crm.worker(dsn=proxy.dsn(crm.dsn)) as worker:
        proxy.cut("replication")
        with proxy.stalled(to_server=False): ...

What is done is done to the links that there are by then, of one kind or of all; what is set holds from then on.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, Self, TypeVar, get_args

from psycopg.conninfo import make_conninfo

T = TypeVar("T")

Kind = Literal["replication", "writing", "reading", "brief", "cancel"]
"""What a link is for: the slot, activities, rows that rules look up, a look now and then, an end to a statement."""

KINDS: tuple[Kind, ...] = get_args(Kind)

# SO_LINGER for no time: to close is to reset, and what was not sent is thrown away.
_RESET = struct.pack("ii", 1, 0)

# Manual: "Message Formats". Lengths come first, then these.
_CANCEL, _SSL, _GSS = 80877102, 80877103, 80877104


def _kind(startup: bytes) -> Kind:
    """What a connection is for, by its first packet."""
    (code,) = struct.unpack_from("!i", startup, 4)
    if code == _CANCEL:
        return "cancel"
    words = startup[8:].split(b"\0")
    said = dict(zip(words[::2], words[1::2], strict=False))
    options = said.get(b"options", b"")
    if b"replication" in said:
        return "replication"
    if b"statement_timeout=1s" in options:
        return "brief"
    return "reading" if b"default_transaction_read_only=on" in options else "writing"


class _Link:
    """A connection of a client, and the one to the server that belongs to it."""

    def __init__(self, kind: Kind, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.kind = kind
        self.ends = (client, server)
        self.half_open = False
        # While one is not set, nothing passes in that direction, neither bytes nor the end.
        self.to_server, self.to_client = asyncio.Event(), asyncio.Event()
        self.pumps: list[asyncio.Task[None]] = []

    def pass_on(self, *, to_server: bool, to_client: bool) -> None:
        for gate, is_open in ((self.to_server, to_server), (self.to_client, to_client)):
            gate.set() if is_open else gate.clear()

    def close(self, *, reset: bool) -> None:
        for pump in self.pumps:
            pump.cancel()
        for end in self.ends:
            if reset:
                with suppress(OSError):
                    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.transport.abort()
            else:
                end.close()


class Proxy:
    """Passes on what comes to a port of this machine to a server's, in a thread of its own."""

    def __init__(self, server_port: int) -> None:
        self.port = 0
        self.accepted = 0
        """How many connections there were."""
        self.delay = 0.0
        """By so many seconds each piece is late, both ways."""
        self.piece = 1 << 16
        """So many bytes are passed on at once, at most."""
        self.breaking: dict[Kind, int] = {}
        """New links of these kinds are half-open as soon as the client has had so many bytes."""
        self._server_port = server_port
        self._stalled = False, False  # of new links: to the server, to the client
        self._links: list[_Link] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._listener: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self.accept()
        return self

    def __exit__(self, *error: object) -> None:
        self.refuse()
        self.cut()
        asyncio.run_coroutine_threadsafe(_others_ended(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def dsn(self, dsn: str) -> str:
        """A connection string by which a client comes through here."""
        return make_conninfo(dsn, host="127.0.0.1", port=self.port)

    def links(self, kind: Kind | None = None) -> int:
        """How many links there are that pass on what is sent, or will again."""
        return self._each(kind, lambda link: None)

    def accept(self) -> None:
        """Accept connections, on the same port as before."""

        async def listen() -> None:
            self._listener = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result()

    def refuse(self) -> None:
        """Refuse new connections, as a machine does on which no server runs."""

        def close() -> None:
            if self._listener is not None:
                self._listener.close()
                self._listener = None

        self._do(close)

    def cut(self, kind: Kind | None = None, *, reset: bool = True) -> int:
        """Cut links, by RST or else by FIN; returns how many. Those that are half-open end as well, unheard."""

        def close() -> int:
            cut = [link for link in self._links if kind in (None, link.kind)]
            for link in cut:
                link.close(reset=reset)
                self._links.remove(link)
            return sum(not link.half_open for link in cut)

        return self._do(close)

    def stall(self, kind: Kind | None = None, *, to_server: bool = True, to_client: bool = True) -> int:
        """Hold back what is sent in these directions, until `heal`; returns on how many links.

        Whoever sends hears nothing of it: it is taken from him, until there is no more room.
        """
        return self._each(kind, lambda link: link.pass_on(to_server=not to_server, to_client=not to_client))

    def heal(self, kind: Kind | None = None) -> None:
        """Pass on what was held back, and what follows."""
        self._each(kind, lambda link: link.pass_on(to_server=True, to_client=True))

    def half_open(self, kind: Kind | None = None) -> int:
        """Forget links, as a router does: neither side hears of the other any more, not even of its end.

        Returns how many.
        """

        def forget(link: _Link) -> None:
            link.pass_on(to_server=False, to_client=False)
            link.half_open = True

        return self._each(kind, forget)

    @contextmanager
    def stalled(self, *, to_server: bool = True, to_client: bool = True) -> Iterator[None]:
        """Hold back all that is sent meanwhile, on new links as well."""
        self._stalled = to_server, to_client
        self.stall(to_server=to_server, to_client=to_client)
        try:
            yield
        finally:
            self._stalled = False, False
            self.heal()

    def _do(self, action: Callable[[], T]) -> T:
        """Do something in the proxy's own thread."""

        async def done() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result()

    def _each(self, kind: Kind | None, action: Callable[[_Link], object]) -> int:
        def act() -> int:
            links = [link for link in self._links if kind in (None, link.kind) and not link.half_open]
            for link in links:
                action(link)
            return len(links)

        return self._do(act)

    async def _accepted(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            startup = await _startup(from_client, client)
            from_server, server = await asyncio.open_connection("127.0.0.1", self._server_port)
        except (OSError, asyncio.IncompleteReadError):
            client.transport.abort()
            return
        server.write(startup)
        link = _Link(_kind(startup), client, server)
        to_server, to_client = self._stalled
        link.pass_on(to_server=not to_server, to_client=not to_client)
        self._links.append(link)
        link.pumps = [
            asyncio.create_task(self._pump(link, from_client, server, link.to_server, None)),
            asyncio.create_task(self._pump(link, from_server, client, link.to_client, self.breaking.get(link.kind))),
        ]
        await asyncio.wait(link.pumps)
        if link in self._links:
            self._links.remove(link)
        link.close(reset=False)

    async def _pump(
        self,
        link: _Link,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        gate: asyncio.Event,
        breaks_after: int | None,
    ) -> None:
        """Pass on what comes, and its end; one side that is reset resets the other."""
        passed = 0
        try:
            while data := await source.read(1 << 16):
                size = self.piece  # it may be set anew meanwhile
                for start in range(0, len(data), size):
                    if breaks_after is not None and passed >= breaks_after:
                        link.pass_on(to_server=False, to_client=False)
                        link.half_open = True
                    if self.delay:
                        await asyncio.sleep(self.delay)
                    await gate.wait()
                    sink.write(piece := data[start : start + size])
                    await sink.drain()
                    passed += len(piece)
            await gate.wait()
            sink.write_eof()
        except OSError:
            await gate.wait()
            link.close(reset=True)


async def _others_ended() -> None:
    """Once all other tasks have come to their ends."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _startup(client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> bytes:
    """The packet that says what a client wants; those that ask for encryption are answered with no."""
    while True:
        head = await client.readexactly(8)
        length, code = struct.unpack("!ii", head)
        if code not in (_SSL, _GSS):
            return head + await client.readexactly(length - 8)
        answers.write(b"N")
