"""Metrics: what a process has counted, for Prometheus to fetch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from cdc_worker import errors


class _Counts(Collector):
    """Numbers as they are when they are asked for: the thread that answers does no more than to read them."""

    def __init__(self, activities: Mapping[str, int], dead_letters: Mapping[str, int]) -> None:
        self._activities, self._dead_letters = activities, dead_letters

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Counters, each with one label."""
        for name, said, label, counts in (
            ("cdc_worker_activities", "Activities written", "type", self._activities),
            ("cdc_worker_dead_letters", "Changes that could not become activities", "kind", self._dead_letters),
        ):
            family = CounterMetricFamily(name, said, labels=[label])
            for value, count in dict(counts).items():
                family.add_metric([value], count)
            yield family


def serve(host: str, port: int, *, activities: Mapping[str, int], dead_letters: Mapping[str, int]) -> None:
    """Serve them at /metrics until the process ends. Raises SettingsError where that can't be."""
    registry = CollectorRegistry()
    registry.register(_Counts(activities, dead_letters))
    try:
        start_http_server(port, host, registry)
    except (OSError, UnicodeError) as error:  # a name may be none
        raise errors.SettingsError(
            f"metrics can't be served on {host}, port {port}: {getattr(error, 'strerror', error)}",
            hint="name a port of its own for each process in CDC_WORKER_METRICS_PORT, and an address of this machine in"
            " CDC_WORKER_METRICS_HOST",
        ) from error
