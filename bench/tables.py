"""Tables, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import click

from bench.figures import Spread

Row = Sequence[object]


def table(title: str, rows: Sequence[Row]) -> None:
    """Print rows in columns; the first has their names."""
    click.echo(f"\n{title}")
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  " + "  ".join(str(value).rjust(width) for value, width in zip(row, widths, strict=True)))


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a table whose first column is text and whose others are numbers."""
    names, *others = rows
    ruled = ["---", *["---:"] * (len(names) - 1)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (names, ruled, *others)) + "\n"


def number(value: float) -> str:
    """As it is read best: no decimals from a hundred on, two digits that count below."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def ranged(spread: Spread) -> str:
    """Median, and from the least to the most."""
    return f"{number(spread['median'])} ({number(spread['min'])}–{number(spread['max'])})"
