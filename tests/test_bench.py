"""What `make bench` makes of what it has measured: arithmetic and the page. Nothing is timed here."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from bench import report
from bench.aims import headline, judged
from bench.figures import fit, merged, percentile, ratio, spread, tail
from bench.sizes import sized
from bench.usage import cpu_seconds, peak, tree_cpu_seconds


def client(*rates: float, cpu: float = 2, peak: float = 80) -> dict[str, Any]:
    each = [0.0] * len(rates)
    return {
        "rate": spread(rates),
        "cpu_seconds": spread([cpu] * len(rates)),
        "peak_mb": spread([peak] * len(rates)),
        **{name: spread(each) for name in ("walsender_cpu_seconds", "backend_cpu_seconds", "process_seconds")},
    }


def drained(**clients: dict[str, Any]) -> dict[str, Any]:
    return {"changes": 1000, "clients": clients, "left_out": {"debezium": "there is no Java"}}


def part(**found: Any) -> dict[str, Any]:
    return {"date": "2026-01-01", "rounds": 2, "scale": 1.0, "took": 60, **found}


@pytest.fixture
def results() -> dict[str, Any]:
    early = {"worker": {"seconds": spread([0.1, 0.2]), "before_the_end": True}}
    peers = {"pg_recvlogical": client(20_000, 10_000), "pg_recvlogical-defaults": client(10_000, 10_000)}
    large = drained(**{"worker": client(9_000, 9_000, peak=85), "pg_recvlogical-format-2": client(10_000, 9_000)}) | {
        "idle_peak_mb": {"worker": 60},
        "first_activity": early,
    }
    drain = {"single": drained(worker=client(19_000, 11_000), **peers), "large": large}
    tails = tail([1.0, 2.0, 3.0])
    rate = {"activities": 3, **tails, "p50_rounds": spread([2, 4]), "p99_rounds": spread([9, 11]), "over_time": []}
    pays = {
        name: {"throughput": spread([of, of]), **{key: spread([1.0, 1.2]) for key in ("p50_ms", "p95_ms", "p99_ms")}}
        for name, of in (("worker", 950), ("triggers", 1000))
    }
    parts = {
        "drain": part(scenarios=drain),
        "latency": part(plugins={"wal2json": {"500": rate}}),
        "application": part(rate=2000, loads={"saturated": pays, "fixed": pays}),
        "catch-up": part(rate=1000, away=[{"away_seconds": 5, "seconds": spread([2, 3])}]),
    }
    about = {"machine": {"cores": "2"}, "versions": {"PostgreSQL": "15.18"}, "date": "2026-01-01"}
    return {**about, "parts": parts}


def test_a_percentile_lies_between_two_values() -> None:
    assert [percentile([4, 1, 3, 2], percent) for percent in (0, 50, 100)] == [1, 2.5, 4]
    assert tail([float(n) for n in range(1001)]) == {"p50": 500, "p95": 950, "p99": 990, "p99.9": 999, "max": 1000}
    with pytest.raises(ValueError, match="nothing was measured"):
        percentile([], 50)


def test_a_ratio_is_of_what_was_measured_in_the_same_round() -> None:
    """On a machine that became slower the ratio of medians would be another one."""
    ours, theirs = spread([100, 50, 10]), spread([100, 25, 20])
    assert ratio(ours, theirs) == {"median": 1, "min": 0.5, "max": 2, "rounds": [1, 2, 0.5]}


@pytest.mark.parametrize(
    ("costs", "growth"),
    [
        ([10, 10, 10], "flat"),
        ([10, 10.5, 11], "flat"),
        ([10, 20, 30], "linear"),
        ([30, 20, 10], "falling"),
        ([10, 40, 20], "uneven"),
    ],
)
def test_a_cost_is_flat_or_linear_by_a_straight_line(costs: list[float], growth: str) -> None:
    assert fit([1, 2, 3], costs)["growth"] == growth


def test_a_part_takes_the_place_of_what_was_measured_of_it_before() -> None:
    known = {"date": "old", "parts": {"drain": {"rate": 1, "gone": 2}, "idle": {"cpu": 3}}}
    found = {"date": "new", "parts": {"drain": {"rate": 4}}}
    assert merged(known, found) == {"date": "new", "parts": {"drain": {"rate": 4}, "idle": {"cpu": 3}}}


def test_a_scale_leaves_what_is_given() -> None:
    sizes = sized(0.1, 1, (), count=4000, leads=None, rate=None)
    assert (sizes.count, sizes.leads, sizes.rate, sizes.scaled(50)) == (4000, 100_000, 500, 5)


def test_the_processor_time_of_a_process_is_what_it_is_to_itself() -> None:
    before = time.process_time()
    asked = cpu_seconds(os.getpid())
    assert before <= asked <= time.process_time()
    assert tree_cpu_seconds(os.getpid()) >= asked
    assert peak(os.getpid()) > 1 << 20


def test_results_begin_with_the_medians_of_what_was_measured(results: dict[str, Any]) -> None:
    assert headline(results["parts"]) == {
        "drain_ratio_same_options": 1.025,
        "drain_ratio_defaults": 1.5,
        "drain_ratio_large_defaults": 0.95,
        "memory_growth_mb_large_transaction": 25,
        "memory_mb_large_transaction": 85,
        "large_transaction_durable_early": 1,
        "latency_p50_ms": 3,
        "latency_p99_ms": 10,
        "application_latency_ratio": 1,
        "application_throughput_ratio": 0.95,
    }


def test_an_aim_is_judged_by_its_median(results: dict[str, Any]) -> None:
    told = judged(results["parts"])
    assert told["drain_ratio_same_options"] == {
        **{"bound": 0.9, "at_most": False, "aim": 1.1, "outcome": "met"},
        **{"median": 1.025, "min": 0.95, "max": 1.1, "rounds": [0.95, 1.1]},
    }
    assert told["latency_p99_ms"]["outcome"] == "met"
    assert told["debezium_ratio"] == {"bound": 2.5, "at_most": False, "aim": 4, "outcome": "not measured"}
    slow = client(1_000, 1_000)
    results["parts"]["drain"]["scenarios"]["single"]["clients"]["worker"] = slow
    assert judged(results["parts"])["drain_ratio_same_options"]["outcome"] == "missed"


def test_the_page_tells_what_was_measured_and_names_what_was_left_out(results: dict[str, Any]) -> None:
    page = report.page(results, {"worker": "cdc-worker"}, plots=True)
    assert "| cdc-worker | 15,000 (11,000–19,000) | 1.00 (1.00–1.00) |" in page
    assert "Without debezium: there is no Java.\n" in page
    assert "| 0.9 | 1.1 | 1.02 (0.95–1.10) | met |" in page
    assert "![drain](drain.svg)" in page
    assert "## Idle" not in page
    assert "no measurement" not in page
    results["parts"]["drain"]["scale"] = 0.01
    assert "at 0.01 of the full size" in report.page(results, {}, plots=False)
    assert "svg" not in report.page(results, {}, plots=False)
