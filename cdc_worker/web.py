"""What a worker tells over HTTP: a status page, metrics, and whether it is alive and ready. Nothing can be changed."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib import resources
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final
from urllib.parse import urlsplit

from cdc_worker import __version__, errors, log
from cdc_worker.config import Settings
from cdc_worker.lines import parsed
from cdc_worker.metrics import Exposition
from cdc_worker.observer import Observer
from cdc_worker.stop import HANG
from cdc_worker.vitals import Remembered, Vitals

CONNECTIONS: Final = 32
"""So many requests are answered at a time; others are closed."""

PATIENCE: Final = 10.0
"""Seconds in which a request has to be there, and its answer taken, however much of it has come or gone."""

PRIVATE: Final = (".svc", ".local", ".internal")
"""Ends of names that nobody can have in the public DNS."""

JSON: Final = "application/json"

Answer = tuple[HTTPStatus, str, bytes]


def serve(settings: Settings, vitals: Vitals) -> None:
    """Serve until the process ends, if the settings name a port. Raises SettingsError where that can't be."""
    if settings.http_port is None:
        return
    observer = Observer(settings, vitals)
    site = Site(settings, vitals, observer)
    try:
        server = _Server(settings.http_host, settings.http_port, site)
    except (OSError, UnicodeError) as error:  # a name may be none
        raise errors.SettingsError(
            f"nothing can be served on {settings.http_host}, port {settings.http_port}:"
            f" {getattr(error, 'strerror', error)}",
            hint="name a port of its own for each process in CDC_WORKER_HTTP_PORT, and an address of this machine in"
            " CDC_WORKER_HTTP_HOST",
        ) from error
    observer.start()
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()


class Site:
    """What there is to be asked for."""

    def __init__(self, settings: Settings, vitals: Vitals, observer: Observer) -> None:
        self._settings, self._vitals, self._observer = settings, vitals, observer
        self._metrics = Exposition(vitals, observer, worker=settings.worker)
        self._page = resources.files("cdc_worker").joinpath("page.html").read_bytes()
        self.policy = _policy(self._page.decode())
        self.names = {"localhost", *map(_plain, (settings.http_host, socket.gethostname()))}
        """What a request may call us wherever it is served."""
        self.paths: dict[str, Callable[[str], Answer]] = {
            "/": lambda accept: (HTTPStatus.OK, "text/html; charset=utf-8", self._page),
            "/status.json": lambda accept: (HTTPStatus.OK, JSON, _json(self._state())),
            "/metrics": lambda accept: (HTTPStatus.OK, *self._metrics.text(accept)),
            "/healthz": lambda accept: self._told(self._unwell()),
            "/readyz": lambda accept: self._told(self._unready()),
        }

    def _told(self, reasons: list[str]) -> Answer:
        told = {"ok": not reasons, "role": self._vitals.role, "reasons": reasons}
        return HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK, JSON, _json(told)

    def _unwell(self) -> list[str]:
        """Why another process would be better off: what only the world can mend is no reason."""
        still = self._vitals.still
        return [f"the loop hangs for {still:.0f} s"] if still > HANG else []

    def _unready(self) -> list[str]:
        vitals = self._vitals
        reasons = [*vitals.problems.values()]
        return reasons or (["connecting"] if not vitals.ready else [])

    def _state(self) -> dict[str, Any]:
        """All that the page shows."""
        vitals, seen, observer = self._vitals, self._observer.seen, self._observer
        observer.watched()
        now, clock = time.time(), time.monotonic()
        samples = [asdict(sample) for sample in list(observer.samples)]
        return {
            "now": now,
            "process": {
                "role": vitals.role,
                "version": __version__,
                "host": socket.gethostname(),
                "uptime": time.monotonic() - vitals.began_at,
                "reasons": self._unready(),
                "reconnects": max(0, vitals.streams - 1),
                "activities": observer.activities,
                "dead_letters": dict(vitals.dead_letters),
            },
            "looked_at": seen.at,
            "looked_ago": seen.age,
            "status": seen.found.model_dump(mode="json"),
            "dead_letters": [of.model_dump(mode="json") for of in seen.waiting],
            "doctor": None if seen.report is None else seen.report.model_dump(mode="json"),
            "examined_ago": None if seen.report is None else clock - observer.examined_at,
            "samples": [{**sample, "at": now - (clock - sample["at"])} for sample in samples],
            "activities": [self._activity(of) for of in reversed(list(vitals.last))],
        }

    def _activity(self, of: Remembered) -> dict[str, Any]:
        told = dict(zip(of.fields, parsed(of.text), strict=False))
        links = {field: told[field] for field in self._observer.links if told.get(field) is not None}
        found: dict[str, Any] = {"at": of.at.isoformat(), "type": self._observer.named(of.type), "links": links}
        if self._settings.http_values:
            found["description"] = told.get("description")
        return found


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _policy(page: str) -> str:
    """What a browser may do on the page: run and paint what is in it, ask where it comes from, and nothing else."""

    def hashes(element: str) -> str:
        texts = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(of.encode()).digest()).decode()}'" for of in texts)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Server(ThreadingMixIn, TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS

    def __init__(self, host: str, port: int, site: Site) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, type("Handler", (_Handler,), {"site": site}))  # type: ignore[arg-type]  # IPv6 has more
        self._names, bound = site.names, _address(str(self.server_address[0]))
        self._this_machine = bound is not None and bound.is_loopback

    def is_called(self, host: str) -> bool:
        """Whether a request may call us so: a page from elsewhere, under a public name that leads here, may not."""
        if host in self._names:
            return True
        address = _address(host)
        if self._this_machine:
            return address is not None and address.is_loopback
        return address is not None or (bool(host) and "." not in host) or host.endswith(PRIVATE)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # there can be no more threads
            self._free.release()
            raise

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer, or be cut off: a timeout of the socket would begin anew with each byte."""
        deadline = threading.Timer(PATIENCE, _cut_off, (request,))
        deadline.daemon = True
        deadline.start()
        try:
            super().finish_request(request, client_address)
        finally:
            deadline.cancel()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who goes away before the answer is there has no need of it; all else is a fault of ours."""
        error = sys.exception()
        if not isinstance(error, OSError):
            log.get().error("request_failed", error=type(error).__name__)


def _cut_off(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    site: Site
    server: _Server

    def version_string(self) -> str:
        """What serves: its version is nobody's business."""
        return "cdc-worker"

    def do_GET(self) -> None:
        self._answer(*self._found())

    def do_HEAD(self) -> None:
        self._answer(*self._found())

    def _found(self) -> Answer:
        host = self.headers.get("Host")
        if host is not None and not self.server.is_called(_host(host)):  # browsers always say whom they ask
            return HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"this is not served by that name\n"
        try:
            path = urlsplit(self.path).path
        except ValueError:
            return HTTPStatus.BAD_REQUEST, "text/plain", b"this is no address\n"
        answer = self.site.paths.get(path)
        if answer is None:
            known = " ".join(self.site.paths)
            return HTTPStatus.NOT_FOUND, "text/plain", f"there is nothing here: {known}\n".encode()
        return answer(self.headers.get("Accept", ""))

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Security-Policy", self.site.policy)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # as it is called there
        """Who looks is no event."""


def _host(header: str) -> str:
    try:
        return _plain(urlsplit(f"//{header}").hostname or "")
    except ValueError:
        return ""


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a host is, if it is one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
