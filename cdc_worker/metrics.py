"""Metrics, by the conventions of Prometheus: what a process has counted, and what was last seen of its state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Metric, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from cdc_worker import __version__
from cdc_worker.dead_letters import KINDS
from cdc_worker.observer import Observer, Seen
from cdc_worker.vitals import BUCKETS, Vitals

ROLES: Final = ("connecting", "active", "standby")


class Exposition:
    """What is told at /metrics."""

    def __init__(self, vitals: Vitals, observer: Observer, *, worker: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Worker(vitals, observer, worker))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def text(self, accept: str) -> tuple[str, bytes]:
        """The content type that was asked for, and the metrics in it; as plain text if nobody can tell what was."""
        try:
            encode, content_type = choose_encoder(accept)
            return content_type, encode(self._registry)
        except (TypeError, ValueError):  # of a version that is none
            encode, content_type = choose_encoder("")
            return content_type, encode(self._registry)


class _Worker(Collector):
    """Numbers as they are when they are asked for: the thread that answers does no more than to read them."""

    def __init__(self, vitals: Vitals, observer: Observer, worker: str) -> None:
        self._vitals, self._observer, self._worker = vitals, observer, worker

    def collect(self) -> Iterator[Metric]:
        """All metrics. What the database was asked for is left out while it doesn't answer."""
        yield from self._counted(self._vitals)
        yield from self._seen(self._observer.seen)

    def _counted(self, vitals: Vitals) -> Iterator[Metric]:
        about = {"version": __version__, "worker": self._worker}
        yield InfoMetricFamily("cdc_worker", "Version and name", about)
        yield _gauge("role", "What this process does", ((role, vitals.role == role) for role in ROLES), "role")
        yield _gauge("ready", "Whether it records, or stands by, and nothing is in its way", vitals.ready)
        # They are there from the beginning: of what appears with its first count no increase is seen.
        activities = dict.fromkeys(sorted(self._observer.types), 0) | self._observer.activities
        yield _counter("activities", "Activities written", activities.items(), "type")
        dead = "Changes that could not become activities"
        yield _counter("dead_letters", dead, (dict.fromkeys(KINDS, 0) | vitals.dead_letters).items(), "kind")
        yield _counter("transactions", "Transactions of which all is written", vitals.transactions)
        yield _counter("batches", "Batches written", vitals.batches)
        yield _counter("reconnects", "Times it has begun to read again", max(0, vitals.streams - 1))
        yield _counter(
            "decode_seconds", "Seconds in which changes were read, decoded and transformed", vitals.decode_seconds
        )
        counts = accumulate(vitals.writes)
        buckets = [(str(end), count) for end, count in zip((*BUCKETS, "+Inf"), counts, strict=True)]
        write = "Seconds from the beginning of a batch's transaction until it was durable"
        yield HistogramMetricFamily("cdc_worker_write_seconds", write, buckets, vitals.write_seconds)

    def _seen(self, seen: Seen) -> Iterator[Metric]:
        yield _gauge("database_up", "Whether there was a database to connect to when last looked at", seen.database_up)
        status = seen.status
        if status is None:
            return
        yield _gauge("lag_bytes", "WAL that has not been dealt with", status.lag_bytes)
        yield _gauge("lag_seconds", "Age of the first change that is not written, at most", status.lag_seconds)
        if status.retained_bytes is not None:
            yield _gauge("retained_wal_bytes", "WAL that the server keeps for the slot", status.retained_bytes)
        written = "When the checkpoint was last written, in Unix time"
        yield _gauge("checkpoint_timestamp_seconds", written, status.written_at.timestamp())
        waiting = "Changes that could not become activities, and wait to be seen to"
        yield _gauge("dead_letters_waiting", waiting, status.dead_letters_waiting)
        yield _gauge("gaps", "Gaps that nothing has made up for yet", len(status.gaps))
        yield _gauge("streaming", "Whether a worker reads the slot, be it another process", status.streaming)


Values = Iterable[tuple[str, float]]


def _gauge(name: str, said: str, value: float | Values, label: str | None = None) -> Metric:
    return _family(GaugeMetricFamily, name, said, value, label)


def _counter(name: str, said: str, value: float | Values, label: str | None = None) -> Metric:
    return _family(CounterMetricFamily, name, said, value, label)


def _family(
    kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, said: str, value: float | Values, label: str | None
) -> Metric:
    family = kind(f"cdc_worker_{name}", said, labels=[label] if label else None)
    if isinstance(value, int | float):
        family.add_metric([], value)
    else:
        for of, count in list(value):
            family.add_metric([of], count)
    return family
