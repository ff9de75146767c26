"""`make bench`: how fast, how late, at what price for whom, side by side on this machine, and a page of it.

Each part is measured on private servers of its own and told on the terminal; its results take the place of those that
were in `results.json`, and the page and the plots are made of all that is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bench import report
from bench.aims import headline, judged
from bench.clients import CLIENTS, DESCRIBED
from bench.figures import merged
from bench.machine import machine, versions
from bench.server import opener
from bench.sizes import Sizes, sized
from cdc_worker.binaries import Binaries, find_binaries

PARTS = {
    "drain": "drain",
    "latency": "latency",
    "application": "application",
    "catch-up": "catchup",
    "growth": "growth",
    "idle": "idle",
    "decode": "decode",
    "replay": "replay",
    "backfill": "backfill",
    "shutdown": "shutdown",
}
"""With the module that measures it."""

DEFAULTS = Sizes()


@click.command()
@click.option(
    "--part", "parts", type=click.Choice([*PARTS]), multiple=True, default=[*PARTS], help="Only this; all if not given."
)
@click.option("--rounds", default=DEFAULTS.rounds, show_default=True, help="Rounds of what is measured in turn.")
@click.option("--scale", default=1.0, show_default=True, help="Factor of all sizes that are not given.")
@click.option("--count", type=int, help=f"Transactions in a backlog; {DEFAULTS.count:,} if not given.")
@click.option("--large", type=int, help=f"Rows of one large transaction; {DEFAULTS.large:,} if not given.")
@click.option("--seconds", type=int, help=f"Of each stretch under load; {DEFAULTS.seconds} if not given.")
@click.option("--rate", type=int, help=f"Transactions a second of latency and backfill; {DEFAULTS.rate} if not given.")
@click.option("--leads", type=int, help=f"Leads that a backfill is about; {DEFAULTS.leads:,} if not given.")
@click.option("--backfill-rate", type=int, help=f"Leads a second of the slow one; {DEFAULTS.backfill_rate:,}.")
@click.option("--minutes", type=float, help=f"Idle, with and without a worker each; {DEFAULTS.minutes:g}.")
@click.option("--without", type=click.Choice([*CLIENTS]), multiple=True, help="Leave this client out of the drain.")
@click.option("--socket", is_flag=True, help="Connect by Unix socket.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("docs", "benchmarks"),
    show_default=True,
    help="Directory of results, page and plots.",
)
def main(
    *,
    parts: Sequence[str],
    rounds: int,
    scale: float,
    without: Sequence[str],
    socket: bool,
    output: Path,
    **given: float | None,
) -> None:
    """Measure on private servers, side by side, and write a page of it.

    Example: make bench BENCH_ARGS="--part drain --scale 0.01 --rounds 1 --output /tmp/smoke"
    """
    binaries = find_binaries()
    click.echo(binaries.origin)
    sizes = sized(scale, rounds, without, **given)
    for part, module in PARTS.items():
        if part in parts:
            began = time.monotonic()
            found = importlib.import_module(f"bench.{module}").measure(opener(binaries, socket=socket), sizes)
            told = {"date": today(), "rounds": rounds, "scale": scale, "socket": socket}
            keep(output, binaries, part, told | {"took": round(time.monotonic() - began)} | found)
            click.echo(f"\n{part} took {time.monotonic() - began:.0f} s")


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def keep(output: Path, binaries: Binaries, part: str, found: dict[str, Any]) -> None:
    """Write a part's results among those that are there, and the page and the plots of all of them."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    results = merged({"parts": known.get("parts", {})}, {"parts": {part: found}})
    about = {"machine": machine(), "versions": versions(binaries), "date": today()}
    results = {**headline(results["parts"]), **about, "aims": judged(results["parts"]), **results}
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        importlib.import_module("bench.plots").draw(results["parts"], output)
    else:
        click.echo("without plots: the package matplotlib is not installed")
    (output / "README.md").write_text(report.page(results, DESCRIBED, plots=drawn))


main()
