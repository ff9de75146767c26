"""Traces: a span for each batch where OpenTelemetry's variables ask for them, and nothing of it otherwise."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from support import Crm, eventually

from cdc_worker import tracing
from cdc_worker.errors import SettingsError


class Collector(HTTPServer):
    """Takes what is exported."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[ExportTraceServiceRequest] = []

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as it is called there
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_each_batch_is_a_span(crm: Crm, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with crm.worker(log_level="debug") as worker:
        worker.wait_for("replication_started")
        crm.add_leads(3)
        worker.wait_for("batch_written")
        (span,) = eventually(lambda: collector.spans)
        crm.add_leads(40)
        eventually(lambda: len(collector.spans) == len(worker.events("batch_written")) > 1)
        assert worker.terminate() == 0
    (told, *_) = worker.events("batch_written")
    found = {of.key: of.value.string_value or of.value.int_value for of in span.attributes}
    assert span.name == "batch"
    assert found == {
        f"cdc_worker.{name}": told[name]
        for name in ("transactions", "activities", "dead_letters", "already_there", "unlinked", "lsn")
    }
    assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(told["seconds"], abs=0.001)
    resource = {of.key: of.value.string_value for of in collector.requests[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "cdc-worker"
    assert resource["service.instance.id"] == crm.slot


def test_a_collector_that_is_gone_holds_nothing_up(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.add_leads(3)
        eventually(lambda: len(crm.types()) == 3)
        assert worker.terminate() == 0


def test_without_its_variables_nothing_of_it_is_loaded() -> None:
    code = (
        "import sys, cdc_worker.cli as c; c.tracing.tracer('w');"
        " print([name for name in sys.modules if 'opentelemetry' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_its_packages_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, and opentelemetry") as caught:
        tracing.tracer("w")
    assert caught.value.hint == "pip install 'cdc-worker[otel]', or unset it"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing.tracer("w") is None
