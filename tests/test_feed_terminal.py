"""The activity feed on terminals of any width and encoding: all is there, however long names and texts are."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import date, timedelta
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType
from support import Crm
from test_schema_views import write

from cdc_worker.cli import main
from cdc_worker.config import Settings
from cdc_worker.console import console, one_line, printed
from cdc_worker.feed import Count, Entry
from cdc_worker.feed_listing import history, line, tables

EMAIL = "maximiliane.von-hohenstein@sales.example.com"


def entry(**given: Any) -> Entry:
    nothing = dict.fromkeys(Entry.model_fields)
    return Entry(**{**nothing, "links": {}, "at": "2026-11-21T10:02:13.5", "category": "system", **given})


def terminal(width: int) -> Console:
    return Console(width=width, file=io.StringIO(), force_terminal=True, highlight=False, markup=False, emoji=False)


def seen(parts: Iterable[RenderableType], screen: Console) -> list[str]:
    """The lines of these, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed(screen, parts))
    return [line.rstrip() for line in plain.splitlines()]


def timeline(width: int, *entries: Entry) -> list[str]:
    screen = terminal(width)
    return seen(history(entries, screen), screen)


def letters(texts: Iterable[str]) -> Counter[str]:
    return Counter("".join("".join(texts).split()))


# Timelines


some = st.text(st.characters(codec="utf-8") | st.sampled_from("ab -山🎉\u0301"), max_size=70)
words = some.filter(lambda text: not text or cell_len(one_line(text)) > 0)  # accents alone take no place on any line
moments = st.sampled_from([None, "infinity", "2026-11-21T10:02:13", "2026-11-22T10:02:13.5+01:00"])


@given(st.lists(st.tuples(moments, words, words, words), max_size=4), st.integers(20, 130))
def test_no_letter_of_a_timeline_is_lost_and_no_line_too_wide(
    rows: list[tuple[str | None, str, str, str]], width: int
) -> None:
    lines = timeline(width, *(entry(at=at, type=of, created_by=by, description=text) for at, of, by, text in rows))
    assert max(map(cell_len, lines), default=0) <= width
    days: list[str] = []
    told: list[str] = []
    for at, *texts in rows:
        day = {None: "without a date", "infinity": "infinity"}.get(at, (at or "")[:10])
        days += [day] if days[-1:] != [day] else []
        told += [(at or "")[11:19], *map(one_line, texts)]
    assert letters(lines) == letters([*days, *told])


def test_a_long_name_leaves_the_type_whole() -> None:
    changed = entry(type="assignment_changed", created_by=EMAIL, description="Lead assigned to bob")
    assert timeline(80, changed) == [
        "2026-11-21",
        f"  10:02:13  assignment_changed  {EMAIL}",
        "    Lead assigned to bob",
    ]
    assert timeline(100, changed) == [
        "2026-11-21",
        f"  10:02:13  assignment_changed  {EMAIL[:25]}  Lead assigned to bob",
        f"                                {EMAIL[25:]}",
    ]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_row_of_long_words_leaves_those_of_its_day_readable(width: int) -> None:
    long = entry(type="t" * 50, created_by="n" * 50, description="It rang")
    lines = timeline(width, long, entry(type="call", created_by="jane", description="Hello there"))
    assert any("Hello there" in line for line in lines)
    assert sum("10:02:13" in line for line in lines) == 2


def test_names_are_as_wide_as_the_terminal_shows_them() -> None:
    lines = timeline(
        80,
        entry(type="call", created_by="山田太郎", description="Hello"),
        entry(type="call", created_by="jane", description="Hello"),
    )
    assert lines[1:] == ["  10:02:13  call  山田太郎  Hello", "  10:02:13  call  jane      Hello"]
    followed = [line(entry(type="call", created_by=by, description="Hello"), terminal(120)) for by in ("山田", "ab")]
    assert len({cell_len(text.plain) for text in followed}) == 1


def test_what_is_folded_stays_indented() -> None:
    long = entry(type="assignment_changed", created_by=EMAIL, description="Lead assigned to " + "Bob " * 12)
    assert timeline(60, long) == [
        "2026-11-21",
        "  10:02:13  assignment_changed",
        f"            {EMAIL}",
        "    Lead assigned to Bob Bob Bob Bob Bob Bob Bob Bob Bob Bob",
        "    Bob Bob",
    ]


def test_an_activity_without_a_text_takes_no_line_for_it() -> None:
    assert timeline(40, entry(type="call")) == ["2026-11-21", "  10:02:13  call"]


# Statistics


def counts(*types: str, activities: int = 1_234, by: str | None = "jane") -> Iterator[Count]:
    some: dict[str, Any] = {"activities": activities, "last_7_days": 77, "latest": "2026-11-22T08:00:37.123"}
    yield Count(statistic="total", activity_category="automated", **some)
    for ago in range(7):
        for category in ("manual", "system", "automated"):
            day = date(2026, 11, 23) - timedelta(days=ago)
            yield Count(statistic="trend", activity_category=category, day=day, **some)
    for of in types:
        yield Count(statistic="bd", activity_category="manual", activity_type=of, bd_in_charge=by, **some)
    for of in types:
        yield Count(statistic="system_event", activity_category="system", activity_type=of, **some)


def stats(width: int, found: Iterable[Count]) -> list[str]:
    screen = terminal(width)
    return seen(tables([*found], screen), screen)


TYPES = ("linkedin_message", "assignment_changed")


def test_statistics_are_tables_where_these_fit() -> None:
    assert stats(80, counts(*TYPES))[-9:] == [
        "Manual activities by BD",
        "  BD    type                activities  last 7 days  latest",
        "  jane  linkedin_message         1,234           77  2026-11-22 08:00:37",
        "  jane  assignment_changed       1,234           77  2026-11-22 08:00:37",
        "",
        "System activities by type",
        "  type                activities  last 7 days  latest",
        "  linkedin_message         1,234           77  2026-11-22 08:00:37",
        "  assignment_changed       1,234           77  2026-11-22 08:00:37",
    ]


def test_of_statistics_the_latest_is_what_a_narrow_terminal_leaves_out() -> None:
    assert stats(60, counts(*TYPES))[-9:] == [
        "Manual activities by BD",
        "  BD    type                activities  last 7 days",
        "  jane  linkedin_message         1,234           77",
        "  jane  assignment_changed       1,234           77",
        "",
        "System activities by type",
        "  type                activities  last 7 days",
        "  linkedin_message         1,234           77",
        "  assignment_changed       1,234           77",
    ]


def test_on_a_very_narrow_terminal_statistics_stand_below_each_other() -> None:
    found = stats(40, counts(*TYPES))
    assert found[found.index("Manual activities by BD") :][:4] == [
        "Manual activities by BD",
        "  jane  linkedin_message",
        "    activities   1,234",
        "    last 7 days  77",
    ]


@given(
    st.integers(20, 130),
    st.integers(0, 10**9),
    st.lists(words, max_size=3),
    st.none() | words,
)
def test_of_statistics_no_number_date_or_head_is_folded(
    width: int, activities: int, types: list[str], by: str | None
) -> None:
    lines = stats(width, counts(*types, activities=activities, by=by))
    assert max(map(cell_len, lines)) <= width
    apart = Counter(" ".join(lines).split())
    assert apart[f"{activities:,}"] >= 1 + 7 * 3 + 2 * len(types)
    assert apart["77"] >= 1 + 2 * len(types)
    assert apart["activities"] >= 1
    assert all(apart[f"2026-11-{day}"] for day in range(17, 24))
    told = [*map(one_line, types), *map(one_line, types), *[one_line(by or "")] * len(types)]
    assert letters(told) <= letters(lines)


# Terminals


@pytest.mark.parametrize(("columns", "width"), [("0", 80), ("1", 80), ("19", 80), ("20", 20), ("200", 200)])
def test_what_says_that_it_has_hardly_any_columns_does_not_know(
    monkeypatch: pytest.MonkeyPatch, columns: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert console().width == width


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "koi8-r"])
def test_what_the_terminal_cannot_write_is_escaped(crm: Crm, encoding: str) -> None:
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (7, 'Acme')")
    write(crm, customer_uid=7, activity_type="günstig", description="Won 🎉", bd_in_charge="山田")
    environment = {**crm.environment(), "PYTHONIOENCODING": encoding}
    for arguments in (["tail", "--no-follow"], ["timeline", "--customer", "7"], ["stats"]):
        for options in ([], ["--json"]):
            done = subprocess.run(
                [sys.executable, "-m", "cdc_worker", *arguments, *options],
                env=environment,
                capture_output=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, b"")
            if options and encoding != "ascii":  # instead of which click writes UTF-8
                (*_, last) = done.stdout.decode(encoding).splitlines()
                found = json.loads(last)
                assert found.get("description", "Won 🎉") == "Won 🎉"


# What isn't text


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


def test_an_option_that_is_not_text_is_refused_by_every_command() -> None:
    """As of a terminal that writes Latin-1 where the locale says UTF-8. What may be a secret isn't told."""
    refused = 0
    for path, command in commands(main):
        for parameter in command.params:
            types = parameter.type.types if isinstance(parameter.type, click.Tuple) else [parameter.type]
            if click.STRING in types:
                words = ["M\udcfcller"] * (1 if parameter.nargs == -1 else parameter.nargs)
                given = [max(parameter.opts, key=len), *words] if isinstance(parameter, click.Option) else words
                done = CliRunner().invoke(main, [*path, *given, *missing(command, parameter)])
                assert done.exit_code == 2, (path, given)
                told = "it" if parameter.name in Settings.model_fields else r"'M\xfcller'"
                assert f": {told} is not text in UTF-8: " in done.output, (path, given)
                refused += 1
    assert refused > 100


def missing(command: click.Command, given: click.Parameter) -> list[str]:
    """Arguments that a command takes besides."""
    return ["7" for of in command.params if isinstance(of, click.Argument) and of.required and of is not given]


def test_it_is_told_what_is_not_text_and_what_to_do() -> None:
    command = [sys.executable, "-m", "cdc_worker", "timeline", "--lead", os.fsdecode(b"M\xfcller")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines()[-1] == (
        r"Error: Invalid value for '--lead': 'M\xfcller' is not text in UTF-8: let the terminal write UTF-8,"
        " or say in LC_ALL what it writes."
    )
