"""What is aimed at, what was measured of it, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from bench.figures import Spread, ratio, spread

Parts = Mapping[str, Any]
"""Results by part."""

Outcome = Literal["met, and the aim", "met", "missed", "not measured"]

LIKE_DEFAULTS = ("pg_recvlogical-defaults", "pg_recvlogical-format-2")
"""What a large transaction is held against: the second where it is too large for the first."""


@dataclass(frozen=True, slots=True)
class Aim:
    """A bound and, beyond it, what is aimed at. `measured` raises LookupError where that part wasn't measured."""

    key: str
    title: str
    bound: float
    measured: Callable[[Parts], Spread]
    at_most: bool = False
    aim: float | None = None

    def found(self, parts: Parts) -> Spread | None:
        """What was measured of it."""
        try:
            return self.measured(parts)
        except LookupError:
            return None

    def outcome(self, parts: Parts) -> Outcome:
        """Judged by the median."""
        found = self.found(parts)
        if found is None:
            return "not measured"
        if not self._holds(found["median"], self.bound):
            return "missed"
        return "met, and the aim" if self.aim is not None and self._holds(found["median"], self.aim) else "met"

    def _holds(self, value: float, bound: float) -> bool:
        return value <= bound if self.at_most else value >= bound


def _client(parts: Parts, scenario: str, client: str) -> Any:
    return parts["drain"]["scenarios"][scenario]["clients"][client]


def _drained(scenario: str, ours: str, *theirs: str, measure: str = "rate") -> Callable[[Parts], Spread]:
    """Ratio of a measure to that of the first of the others that is there."""

    def measured(parts: Parts) -> Spread:
        there = parts["drain"]["scenarios"][scenario]["clients"]
        other = next((name for name in theirs if name in there), theirs[0])
        return ratio(there[ours][measure], there[other][measure])

    return measured


def _changes_per_cpu_second(parts: Parts) -> Spread:
    spent = [_client(parts, "single", name)["cpu_seconds"] for name in ("debezium", "worker")]
    return ratio(*spent)


def _memory(parts: Parts, *, beyond_idle: bool) -> Spread:
    of = parts["drain"]["scenarios"]["large"]
    idle = of["idle_peak_mb"]["worker"] if beyond_idle else 0
    return spread([most - idle for most in of["clients"]["worker"]["peak_mb"]["rounds"]])


def _durable_early(parts: Parts) -> Spread:
    return spread([float(parts["drain"]["scenarios"]["large"]["first_activity"]["worker"]["before_the_end"])])


def _latency(rate: int, percentile: str) -> Callable[[Parts], Spread]:
    def measured(parts: Parts) -> Spread:
        found: Spread = parts["latency"]["plugins"]["wal2json"][str(rate)][f"{percentile}_rounds"]
        return found

    return measured


def _application(load: str, measure: str) -> Callable[[Parts], Spread]:
    """Ratio of what it is with the worker to what it is with the triggers."""

    def measured(parts: Parts) -> Spread:
        of = parts["application"]["loads"][load]
        return ratio(of["worker"][measure], of["triggers"][measure])

    return measured


AIMS: Final = (
    Aim(
        "drain_ratio_same_options",
        "(a) single-row transactions: changes a second, to pg_recvlogical with the same options",
        0.9,
        _drained("single", "worker", "pg_recvlogical"),
        aim=1.1,
    ),
    Aim(
        "drain_ratio_batches",
        "(b) transactions of 1,000 rows: to pg_recvlogical with the same options",
        0.8,
        _drained("batches", "worker", "pg_recvlogical"),
        aim=0.95,
    ),
    Aim(
        "drain_ratio_defaults",
        "(a) to pg_recvlogical with wal2json's defaults",
        1.2,
        _drained("single", "worker", "pg_recvlogical-defaults"),
    ),
    Aim(
        "drain_ratio_large_defaults",
        "(c) one large transaction: to pg_recvlogical with wal2json's defaults (format 2 if one document is too small)",
        0.95,
        _drained("large", "worker", *LIKE_DEFAULTS),
    ),
    Aim(
        "memory_growth_mb_large_transaction",
        "(c) MB beyond the idle process, at most",
        30,
        lambda parts: _memory(parts, beyond_idle=True),
        at_most=True,
    ),
    Aim(
        "memory_mb_large_transaction",
        "(c) MB in all, at most",
        100,
        lambda parts: _memory(parts, beyond_idle=False),
        at_most=True,
    ),
    Aim(
        "large_transaction_durable_early",
        "(c) first activities durable before the transaction has been read to its end (1 if so in each round)",
        1,
        _durable_early,
    ),
    Aim(
        "pgoutput_ratio",
        "(a) the worker with pgoutput, to itself with wal2json",
        0.7,
        _drained("single", "worker-pgoutput", "worker"),
    ),
    Aim(
        "debezium_ratio",
        "(a) changes a second, to Debezium's engine",
        2.5,
        _drained("single", "worker", "debezium"),
        aim=4,
    ),
    Aim(
        "debezium_ratio_batches",
        "(b) changes a second, to Debezium's engine",
        2.5,
        _drained("batches", "worker", "debezium"),
        aim=4,
    ),
    Aim(
        "debezium_cpu_ratio",
        "(a) changes a second of the client's processor, to Debezium's engine",
        5,
        _changes_per_cpu_second,
    ),
    Aim(
        "debezium_memory_ratio",
        "(a) peak memory, to Debezium's engine, at most",
        0.125,
        _drained("single", "worker", "debezium", measure="peak_mb"),
        at_most=True,
    ),
    Aim("latency_p50_ms", "ms at 500 a second, p50, at most", 3, _latency(500, "p50"), at_most=True),
    Aim("latency_p99_ms", "ms at 500 a second, p99, at most", 10, _latency(500, "p99"), at_most=True),
    Aim("latency_p50_ms_2000", "ms at 2,000 a second, p50, at most", 3, _latency(2_000, "p50"), at_most=True),
    Aim("latency_p99_ms_2000", "ms at 2,000 a second, p99, at most", 10, _latency(2_000, "p99"), at_most=True),
    Aim(
        "application_latency_ratio",
        "median latency of the application's updates at 2,000 a second, to that with the triggers, at most",
        1,
        _application("fixed", "p50_ms"),
        at_most=True,
    ),
    Aim(
        "application_throughput_ratio",
        "the application's throughput on saturated cores, to what triggers leave",
        0.9,
        _application("saturated", "throughput"),
        aim=1,
    ),
)


def judged(parts: Parts) -> dict[str, dict[str, Any]]:
    """By key: each aim with all that was measured of it, and what came of it."""
    return {
        aim.key: {"bound": aim.bound, "at_most": aim.at_most, "aim": aim.aim, "outcome": aim.outcome(parts)}
        | (aim.found(parts) or {})
        for aim in AIMS
    }


def headline(parts: Parts) -> dict[str, float]:
    """By key: the medians of all that was measured."""
    found = {aim.key: aim.found(parts) for aim in AIMS}
    return {key: measured["median"] for key, measured in found.items() if measured is not None}
