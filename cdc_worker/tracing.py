"""A span for each batch, for OpenTelemetry: exported only where its own variables name where to."""

from __future__ import annotations

import atexit
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from cdc_worker import __version__, errors, log

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Of these one has to be set. The others of OpenTelemetry's specification work as it says."""

FLUSH: Final = 0.5
"""Seconds that the export of the last spans may hold up an exit."""

_WANTED: Final = (
    (ENDPOINTS, r"https?://.+", "a URL such as http://collector:4318"),
    (("OTEL_TRACES_EXPORTER",), "otlp", "otlp, or none to trace nothing"),
    (("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"), "http/protobuf", "http/protobuf"),
    (
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION"),
        "none|gzip|deflate",
        "none, gzip or deflate",
    ),
    (
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"),
        r"(?=.*[1-9])\d*\.?\d*",
        "a number above zero",
    ),
    (
        ("OTEL_BSP_SCHEDULE_DELAY", "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
        r"0*[1-9]\d*",
        "a whole number above zero",
    ),
    (("OTEL_BSP_EXPORT_TIMEOUT",), r"\d+", "a whole number"),
    (
        ("OTEL_TRACES_SAMPLER",),
        "(parentbased_)?(always_on|always_off|traceidratio)",
        "always_on, always_off or traceidratio, or one of them after parentbased_",
    ),
    (("OTEL_TRACES_SAMPLER_ARG",), r"0?\.\d+|[01](\.0*)?|[1-9](\.\d+)?e-\d+", "a number from 0 to 1"),
)
"""What values of its variables look like that can be used."""

Trace = Callable[[float, Mapping[str, str | int]], None]
"""Takes how many seconds a batch that has just become durable took, and what is to be told of it."""


def tracer(worker: str) -> Trace | None:
    """What traces batches, if that is wanted. Raises SettingsError without the packages for it, or for wrong values."""
    wanted = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    off = _value("OTEL_SDK_DISABLED").lower() == "true" or _value("OTEL_TRACES_EXPORTER").lower() == "none"
    if wanted is None or off:
        return None
    _check()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  # optional
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415  # likewise
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415  # likewise
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415  # likewise
    except ImportError as error:
        raise errors.SettingsError(
            f"{wanted} asks for traces, and {error.name} isn't installed",
            hint="pip install 'cdc-worker[otel]', or unset it",
        ) from error
    _log_failures()
    given = OTELResourceDetector().detect().attributes
    service = {"service.name": "cdc-worker", "service.version": __version__, "service.instance.id": worker}
    resource = Resource.create({name: value for name, value in service.items() if name not in given})
    try:
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except (ValueError, OSError) as error:
        raise errors.SettingsError(
            f"OpenTelemetry refuses its settings: {error}", hint="mend the variables OTEL_*, or unset them"
        ) from error
    _flush_at_exit(provider.shutdown)
    tracing = provider.get_tracer("cdc_worker", __version__)

    def trace(seconds: float, told: Mapping[str, str | int]) -> None:
        end = time.time_ns()
        attributes = {f"cdc_worker.{name}": value for name, value in told.items()}
        span = tracing.start_span("batch", start_time=end - int(seconds * 1e9), attributes=attributes)
        span.end(end)

    return trace


def _flush_at_exit(shutdown: Callable[[], None]) -> None:
    """Export what is left when the process ends, but never wait for a collector that is gone."""
    ending = threading.Event()

    def flush() -> None:
        ending.wait()
        shutdown()

    # It is there before, for at the end no thread can be started any more.
    thread = threading.Thread(target=flush, name="spans", daemon=True)
    thread.start()

    def end() -> None:
        ending.set()
        thread.join(FLUSH)

    atexit.register(end)


class _Failures(logging.Handler):
    """Logs what OpenTelemetry says, once each: its words, and not the values in them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        said = str(record.msg)
        if said not in self._said:
            self._said.add(said)
            log.get().warning("tracing_failed", reason=said)


def _log_failures() -> None:
    logger = logging.getLogger("opentelemetry")
    if not logger.handlers:
        logger.addHandler(_Failures())
        logger.propagate = False


def _check() -> None:
    """Raise SettingsError for what the SDK would fail on with a traceback, or pass over for something else."""
    for names, pattern, wanted in _WANTED:
        for name in names:
            value = _value(name)
            if value and not re.fullmatch(pattern, value, re.IGNORECASE):
                shown = "" if "@" in value else f' "{value}"'  # it may have a password before it
                raise errors.SettingsError(f"{name}{shown} can't be used", hint=f"give it {wanted}, or unset it")


def _value(name: str) -> str:
    return os.environ.get(name, "").strip()
