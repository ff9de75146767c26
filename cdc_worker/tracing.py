"""A span for each batch, for OpenTelemetry: exported only where its own variables name where to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from cdc_worker import __version__, errors

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Of these one has to be set. The others of OpenTelemetry's specification work as it says."""

Trace = Callable[[float, Mapping[str, str | int]], None]
"""Takes how many seconds a batch that has just become durable took, and what is to be told of it."""


def tracer(worker: str) -> Trace | None:
    """What traces batches, if that is wanted. Raises SettingsError without the packages for it."""
    wanted = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if wanted is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  # optional
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415  # likewise
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415  # likewise
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415  # likewise
    except ImportError as error:
        raise errors.SettingsError(
            f"{wanted} asks for traces, and {error.name} isn't installed",
            hint="pip install 'cdc-worker[otel]', or unset it",
        ) from error
    service = {"service.version": __version__, "service.instance.id": worker}
    if not os.environ.get("OTEL_SERVICE_NAME"):
        service["service.name"] = "cdc-worker"
    provider = TracerProvider(resource=Resource.create(service))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracing = provider.get_tracer("cdc_worker", __version__)

    def trace(seconds: float, told: Mapping[str, str | int]) -> None:
        end = time.time_ns()
        attributes = {f"cdc_worker.{name}": value for name, value in told.items()}
        span = tracing.start_span("batch", start_time=end - int(seconds * 1e9), attributes=attributes)
        span.end(end)

    return trace
