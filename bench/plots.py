"""Plots of what was measured, as SVG: text stays text, and the same results make the same file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cdc-worker",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

Part = Mapping[str, Any]


def draw(parts: Mapping[str, Part], directory: Path) -> list[Path]:
    """Draw those of the parts that are there; returns the files."""
    written = []
    with mpl.rc_context(STYLE):
        for name, plot in PLOTS.items():
            if name in parts:
                figure = plot(parts[name])
                path = directory / f"{name}.svg"
                figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
                written.append(path)
    return written


def bars(axes: Axes, spreads: Mapping[str, Any], label: str) -> None:
    """Medians, with what is from the least to the greatest."""
    names, found = [*spreads], [*spreads.values()]
    medians = [each["median"] for each in found]
    errors = [
        [max(0, each["median"] - each["min"]) for each in found],
        [max(0, each["max"] - each["median"]) for each in found],
    ]
    colours = ["tab:orange" if "worker" in name else "tab:gray" for name in names]
    axes.barh(names, medians, xerr=errors, color=colours, error_kw={"linewidth": 1})
    axes.invert_yaxis()
    axes.set_xlabel(label)


def drain(part: Part) -> Figure:
    scenarios = part["scenarios"]
    figure = Figure(figsize=(8, 2.6 * len(scenarios)), layout="constrained")
    titles = {"single": "(a) single-row", "batches": "(b) of 1,000 rows", "large": "(c) one transaction"}
    for axes, (name, scenario) in zip(
        figure.subplots(len(scenarios), squeeze=False)[:, 0], scenarios.items(), strict=True
    ):
        bars(axes, {client: found["rate"] for client, found in scenario["clients"].items()}, "changes a second")
        axes.set_title(titles[name])
    return figure


def latency(part: Part) -> Figure:
    rates = part["plugins"].get("wal2json") or next(iter(part["plugins"].values()))
    figure = Figure(figsize=(8, 2.2 * len(rates)), layout="constrained")
    for axes, (rate, found) in zip(figure.subplots(len(rates), squeeze=False)[:, 0], rates.items(), strict=True):
        at, medians, most = zip(*found["over_time"], strict=True)
        axes.plot(at, most, color="tab:gray", linewidth=0.8, label="maximum")
        axes.plot(at, medians, color="tab:orange", linewidth=1.2, label="median")
        axes.set_yscale("log")
        axes.set_title(f"{int(rate):,} transactions a second")
        axes.set_ylabel("ms")
    axes.set_xlabel("seconds, all rounds one after another")
    axes.legend()
    return figure


def application(part: Part) -> Figure:
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    first, second = figure.subplots(2)
    loads = part["loads"]
    bars(
        first, {name: found["throughput"] for name, found in loads["saturated"].items()}, "updates a second, saturated"
    )
    label = f"ms, median of an update at {part['rate']:,} a second"
    bars(second, {name: found["p50_ms"] for name, found in loads["fixed"].items()}, label)
    return figure


def catch_up(part: Part) -> Figure:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    away = [row["away_seconds"] for row in part["away"]]
    line(axes, away, [row["seconds"] for row in part["away"]], "worker", "tab:orange")
    axes.set_xlabel("seconds away")
    axes.set_ylabel("seconds to zero lag")
    return figure


def growth(part: Part) -> Figure:
    kinds = part["kinds"]
    titles = {
        "width": "columns",
        "tables": "captured tables",
        "activity": "rows of activity",
        "backlog": "transactions",
    }
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(2, 2).flat, kinds.items(), strict=True):
        sizes = [row["size"] for row in found["rows"]]
        for client, colour in (("worker", "tab:orange"), ("pg_recvlogical", "tab:gray")):
            label = f"{client}: {found['fit'][client]['growth']}"
            line(axes, sizes, [row[client] for row in found["rows"]], label, colour)
        axes.set_xlabel(titles[name])
        axes.set_ylabel("µs a change")
        axes.legend(fontsize="small")
    return figure


def line(axes: Axes, sizes: list[float], spreads: list[Any], label: str, colour: str) -> None:
    """Medians, with what is from the least to the greatest, from zero on."""
    axes.plot(sizes, [each["median"] for each in spreads], marker="o", markersize=3, color=colour, label=label)
    least, most = [each["min"] for each in spreads], [each["max"] for each in spreads]
    axes.fill_between(sizes, least, most, color=colour, alpha=0.2, linewidth=0)
    axes.set_ylim(bottom=0)


PLOTS: dict[str, Callable[[Part], Figure]] = {
    "drain": drain,
    "latency": latency,
    "application": application,
    "catch-up": catch_up,
    "growth": growth,
}
