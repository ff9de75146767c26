"""The page that tells what was measured: of results, in Markdown. The plots beside it are drawn elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from bench.aims import AIMS
from bench.application import CONDITIONS
from bench.figures import ratio
from bench.tables import Row, markdown, number, ranged

Results = Mapping[str, Any]

HEAD: Final = """\
# Speed, measured

    make bench                                    # all of it, in two hours or so
    make bench BENCH_ARGS="--part drain"          # one part, whose results take the place of what was there
    make bench BENCH_ARGS="--scale 0.01 --rounds 1 --output /tmp/smoke"

This page, its plots and `results.json` are what that writes; nothing on it is typed. {limits} tells what bounds
an aim that is missed, and what was tried.

Everything runs on private servers on this machine, with fsync, and side by side: the clients or conditions that are
compared take turns in each round, in an order that each round begins at another place. A ratio is of what was measured
in the same round. Figures are medians over the rounds, with the least and the greatest in parentheses. Autovacuum and
timed checkpoints are off, and both are done between what is measured. pgbench and whoever looks share the cores with
what is measured, and connections are by TCP unless `--socket` is given.
"""

LIMITS: Final = "[Limits](limits.md)"

SCENARIOS: Final = {
    "single": "(a) single-row transactions",
    "batches": "(b) transactions of 1,000 rows",
    "large": "(c) one transaction",
}

DRAIN: Final = """\
A backlog waits before a slot; each client drains it from a copy of that slot. The rate is of the time from when the
client's walsender was first seen at work until the last change has arrived, which with the worker means that its
activity is visible to others. So neither the start of a JVM nor that of Python counts, while its warming up does; the
last column has the time of the whole process. What has arrived is counted for each client, and the rows of `activity`
are checked each time: how many there are, that each is of another change, and that those of a lead follow each other.
Processor time is of the client, its walsender and the server's other processes that work for it; peak memory is the
client's. The worker is stopped as soon as its last activity is visible, pg_recvlogical by `--endpos`, and the processes
of psycopg2 and Debezium end with their last change.
"""

LATENCY: Final = """\
From the commit's timestamp to the moment when the worker knows that the activity is durable, and everybody sees it. All
rounds are pooled here; the first second of each doesn't count.
"""

APPLICATION: Final = """\
pgbench updates the status of single leads: as fast as four clients can on cores that they share with the server and the
worker, and at a fixed rate, where the time is from when an update was to begin. The triggers are those that the worker
replaces, with their own `activity` and its indexes, in a database beside. With the worker its slot is new each time,
and what it has not written when pgbench ends is waited for before the next measurement.
"""

CATCH_UP: Final = """\
The worker is stopped while the application goes on at {rate:,} transactions a second, and started again after a while:
the seconds are from the start of its process until the newest activity is of a commit less than 100 ms ago.
"""

GROWTH: Final = """\
Microseconds a change, with pg_recvlogical and the same options beside it. A cost is called flat if a straight line
through the medians changes by less than 15 % from the smallest size to the largest, falling if it falls by more, linear
if that line explains nine tenths of their variance, and uneven otherwise.
"""

IDLE: Final = """\
Seconds of the processor and bytes of WAL in an hour in which nobody writes, extrapolated from {minutes:g} minutes of
each. The server's are those of all its processes.
"""

PLOTS: Final = {
    "drain": ["drain"],
    "latency": ["latency"],
    "application": ["application"],
    "catch-up": ["catch-up"],
    "growth": ["growth"],
}
"""Names of the plots of a part."""


def page(results: Results, described: Mapping[str, str], *, plots: bool) -> str:
    """The whole page; `described` says what the clients are."""
    parts = results["parts"]
    sections: dict[str, Callable[[Any], Iterator[str]]] = {
        "drain": lambda part: drain(part, described),
        "latency": latency,
        "application": application,
        "catch-up": catch_up,
        "growth": growth,
        "idle": idle,
        "decode": decode,
        "replay": replay,
        "backfill": backfill,
        "shutdown": shutdown,
    }
    told = [HEAD.format(limits=LIMITS), machine(results), "## Aims\n", aims(parts)]
    for name, section in sections.items():
        if name in parts:
            told += [f"## {name.capitalize()}\n", measured(parts[name]), *section(parts[name])]
            told += [f"![{plot}]({plot}.svg)\n" for plot in PLOTS.get(name, []) if plots]
    return "\n".join(told)


def machine(results: Results) -> str:
    """Where it was measured, and of what."""
    of, versions = results["machine"], results["versions"]
    rows: list[Row] = [("Measured on", ""), *((name, value) for name, value in of.items())]
    rows += [*((name, value) for name, value in versions.items()), ("date", results["date"])]
    return markdown(rows).replace("---:", "---")


def measured(part: Mapping[str, Any]) -> str:
    scale = "" if part["scale"] == 1 else f", at {part['scale']:g} of the full size, which is a try and no measurement"
    rounds = "one round" if part["rounds"] == 1 else f"{part['rounds']} rounds"
    return f"{part['date']}, {rounds}, {part['took']:.0f} s{scale}.\n"


def aims(parts: Mapping[str, Any]) -> str:
    rows: list[Row] = [("", "bound", "aim", "measured", "")]
    for aim in AIMS:
        found = aim.found(parts)
        outcome = aim.outcome(parts)
        told = f"[**missed**]({LIMITS[9:-1]})" if outcome == "missed" else outcome
        wanted = "" if aim.aim is None else f"{aim.aim:g}"
        rows.append((aim.title, f"{aim.bound:g}", wanted, "" if found is None else ranged(found), told))
    return markdown(rows)


def drain(part: Mapping[str, Any], described: Mapping[str, str]) -> Iterator[str]:
    yield DRAIN
    for name, scenario in part["scenarios"].items():
        yield f"### {SCENARIOS[name]}\n\n{scenario['changes']:,} changes.\n"
        rows: list[Row] = [
            ("", "changes /s", "to the first", "CPU s", "walsender's", "backend's", "peak MB", "whole process s")
        ]
        measures = ("cpu_seconds", "walsender_cpu_seconds", "backend_cpu_seconds", "peak_mb", "process_seconds")
        first = next(iter(scenario["clients"].values()))
        for client, found in scenario["clients"].items():
            rates = (ranged(found["rate"]), ranged(ratio(found["rate"], first["rate"])))
            rows.append((described.get(client, client), *rates, *(ranged(found[measure]) for measure in measures)))
        yield markdown(rows)
        for client, why in scenario["left_out"].items():
            yield f"Without {described.get(client, client)}: {why}.\n"
        for client, early in scenario.get("first_activity", {}).items():
            when = "before" if early["before_the_end"] else "**not** before"
            idle = scenario["idle_peak_mb"][client]
            yield (
                f"{described.get(client, client)}: the first activity was visible after {ranged(early['seconds'])} s,"
                f" {when} the server had sent the end of the transaction; an idle process has {number(idle)} MB.\n"
            )


def latency(part: Mapping[str, Any]) -> Iterator[str]:
    yield LATENCY
    rows: list[Row] = [("plugin, transactions a second", "activities", "p50 ms", "p95", "p99", "p99.9", "max")]
    for plugin, rates in part["plugins"].items():
        for rate, found in rates.items():
            tail = (number(found[name]) for name in ("p50", "p95", "p99", "p99.9", "max"))
            rows.append((f"{plugin}, {int(rate):,}", f"{found['activities']:,}", *tail))
    yield markdown(rows)
    yield "Of the rounds:\n"
    rows = [("plugin, transactions a second", "p50 ms", "p99 ms")]
    for plugin, rates in part["plugins"].items():
        for rate, found in rates.items():
            rows.append((f"{plugin}, {int(rate):,}", ranged(found["p50_rounds"]), ranged(found["p99_rounds"])))
    yield markdown(rows)


def application(part: Mapping[str, Any]) -> Iterator[str]:
    yield APPLICATION
    for load, title in (("saturated", "as fast as can be"), ("fixed", f"{part['rate']:,} a second")):
        rows: list[Row] = [(title, "updates /s", "p50 ms", "p95 ms", "p99 ms", "/s, to triggers", "p50, to triggers")]
        triggers = part["loads"][load]["triggers"]
        for condition, found in part["loads"][load].items():
            beside = (ranged(ratio(found[measure], triggers[measure])) for measure in ("throughput", "p50_ms"))
            rows.append((CONDITIONS[condition], *map(ranged, found.values()), *beside))
        yield markdown(rows)


def catch_up(part: Mapping[str, Any]) -> Iterator[str]:
    yield CATCH_UP.format(rate=part["rate"])
    rows: list[Row] = [("seconds away", "seconds to zero lag", "to the time away")]
    for row in part["away"]:
        share = f"{row['seconds']['median'] / row['away_seconds']:.2f}"
        rows.append((f"{row['away_seconds']:g}", ranged(row["seconds"]), share))
    yield markdown(rows)


def growth(part: Mapping[str, Any]) -> Iterator[str]:
    yield GROWTH
    titles = {
        "width": "columns of the row",
        "tables": "captured tables",
        "activity": "rows of `activity`",
        "backlog": "transactions in the backlog",
    }
    for name, found in part["kinds"].items():
        rows: list[Row] = [(titles[name], "worker µs", "pg_recvlogical µs", "worker to it", "worker's peak MB")]
        for row in [*found["rows"], *found.get("others", [])]:
            columns = (ranged(row[key]) for key in ("worker", "pg_recvlogical", "ratio", "peak_mb"))
            rows.append((row.get("name", f"{row['size']:,}"), *columns))
        yield markdown(rows)
        told = (
            f"{client} **{line['growth']}** ({100 * line['increase']:+.0f} % from the smallest to the largest)"
            for client, line in found["fit"].items()
        )
        yield f"By {titles[name]}: {', '.join(told)}.\n"


def idle(part: Mapping[str, Any]) -> Iterator[str]:
    yield IDLE.format(minutes=part["minutes"])
    measures = ("worker_cpu_seconds", "server_cpu_seconds", "wal_bytes")
    rows: list[Row] = [("worker", "its CPU s", "server CPU s", "WAL bytes")]
    for kind, found in part["kinds"].items():
        rows.append((kind, *(ranged(found[measure]) for measure in measures)))
        if "more" in found:
            rows.append((f"{kind}, beyond none", *(number(found["more"][measure]) for measure in measures)))
    yield markdown(rows)


def decode(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"Microseconds of the processor a change, of {part['changes']:,} updates with a full old row, by itself.\n"
    rows: list[Row] = [("columns, work", "wal2json", "pgoutput", "ratio")]
    for work in part["works"]:
        each = (ranged(work["microseconds"][plugin]) for plugin in ("wal2json", "pgoutput"))
        rows.append((f"{work['columns']}, {work['work']}", *each, ranged(work["ratio"])))
    yield markdown(rows)


def replay(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"The worker's recording of {part['changes']:,} changes, in {part['bytes'] / 1e6:.1f} MB, rows checked.\n"
    yield _of(part, {"rate": "changes /s, into an empty `activity`", "again_rate": "again /s", "peak_mb": "peak MB"})


def backfill(part: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{part['leads']:,} leads at {part['rate']:,.0f} a second, activities checked, in {number(part['peak_mb'])} MB"
        f" of memory; with nothing to do {number(part['idle_peak_mb'])} MB. The application's updates beside it:\n"
    )
    rows: list[Row] = [("backfill", "p50 ms", "p99 ms")]
    rows += [(name, ranged(found["p50_ms"]), ranged(found["p99_ms"])) for name, found in part["updates"].items()]
    yield markdown(rows)


def shutdown(part: Mapping[str, Any]) -> Iterator[str]:
    yield "Seconds of a fast shutdown of the server, which would wait for a walsender's client for ever.\n"
    yield markdown([[*part["seconds"]], [number(seconds) for seconds in part["seconds"].values()]])


def _of(part: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    rows: Sequence[Row] = [("", "measured"), *((title, ranged(part[name])) for name, title in titles.items())]
    return markdown(rows)
