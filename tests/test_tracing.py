"""Traces: a span for each batch where OpenTelemetry's variables ask for them, and nothing of it otherwise."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
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
    with crm.worker(log_format="json") as worker:
        worker.wait_for("replication_started")
        crm.add_leads(3)
        eventually(lambda: len(crm.types()) == 3)
        worker.wait_for("tracing_failed")
        began = time.monotonic()
        assert worker.terminate() == 0
        assert time.monotonic() - began < 5
    for line in worker.said.splitlines():
        json.loads(line)


def test_a_collector_that_never_answers_holds_no_exit_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        code = (
            "import time; from cdc_worker import tracing; trace = tracing.tracer('w'); trace(0.1, {});"
            " print(time.time(), flush=True)"
        )
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert time.time() - float(done.stdout) < 5  # as far as the machine's load lets it be half a second
    assert done.stderr == ""


def test_the_last_spans_are_exported_at_the_end(
    crm: Crm, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.add_leads(3)
        eventually(lambda: len(crm.types()) == 3)
        assert worker.terminate() == 0
    assert collector.spans


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_BSP_SCHEDULE_DELAY", "-1"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5"),
    ],
)
def test_a_value_that_it_can_not_use_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f'{name} "{value}" can\'t be used') as caught:
        tracing.tracer("w")
    assert (caught.value.hint or "").endswith(", or unset it")


def test_sizes_that_do_not_go_together_are_an_error_and_no_traceback(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    done = crm.command("run")
    assert done.returncode == 2
    assert done.stderr == (
        "error: OpenTelemetry refuses its settings: max_export_batch_size must be less than or equal to"
        " max_queue_size.\n"
        "hint: mend the variables OTEL_*, or unset them\n"
    )


def test_what_is_said_of_the_resource_wins(crm: Crm, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=crm,service.instance.id=one,team=sales")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.add_leads(1)
        eventually(lambda: collector.requests)
    resource = {of.key: of.value.string_value for of in collector.requests[0].resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["service.instance.id"], resource["team"]) == ("crm", "one", "sales")


def test_none_as_its_exporter_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert tracing.tracer("w") is None


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
