"""Backfill of odd tables, into odd targets, beside odd histories: each row is told of once, and by its own date."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb
from support import Crm, WorkerProcess, eventually
from test_backfill import add_leads, fill, waiting_for_locks
from test_backfill import told as told_of
from test_backfill_cli import begun
from test_backfill_harmless import READ, SESSIONS

from cdc_worker import backfill as module
from cdc_worker import errors, journal, postgres
from cdc_worker.backfill import Backfilled

LOG: LiteralString = """
CREATE TABLE log (
    id bigserial PRIMARY KEY, kind text NOT NULL, what text, at timestamptz, details jsonb, change_key text UNIQUE
)
"""

TARGET = {"kind": "type", "what": "description", "at": "occurred_at", "details": "metadata", "change_key": "change_key"}

RULES = """
[[tables.{0}.rules]]
on = "insert"
type = "created"
description = "{{new.name}} came"
backfill = {{ at = "{{row.made_at}}", description = "{{row.name}} was there", metadata = {{ name = "{{row.name}}" }} }}

[[tables.{0}.rules]]
on = "update"
changed = "unclaimed"
type = "changed"
description = "{{new.name}} changed"
metadata = {{ changes = "{{changes}}" }}

[[tables.{0}.rules]]
on = "delete"
type = "gone"
description = "{{old.name}} left"

[[tables.{0}.rules]]
on = "truncate"
name = "emptied"
type = "gone"
description = "all left"
"""


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def section(name: str, links: Mapping[str, str], *, rules: str = RULES, more: str = "") -> str:
    """A table of a profile, whose key's columns link by these columns of the target."""
    fields = ", ".join(f'{link} = "{{row.{column}}}"' for column, link in links.items())
    return f"[tables.{quoted(name)}]\nkey = {json.dumps([*links])}\nfields = {{ {fields} }}\n{more}\n" + rules.format(
        quoted(name)
    )


def use(crm: Crm, *sections: str, links: Sequence[str] = ("link",), target: Mapping[str, str] = TARGET) -> None:
    """Let the worker record these tables in the table log; what is there now was there before."""
    columns = {**target, **{link: link for link in links}}
    lines = ['name = "odd"', "[target]", 'table = "log"', "[target.columns]"]
    lines += [f'{column} = "{field}"' for column, field in columns.items()]
    path = crm.directory / "odd.toml"
    path.write_text("\n".join([*lines, *sections]), "utf-8")
    crm.settings["profile"] = str(path)
    crm.setup()


@contextmanager
def unrecorded(crm: Crm) -> Iterator[None]:
    """Let nobody record what is written meanwhile."""
    crm.record()
    yield
    crm.execute("UPDATE cdc_worker.excluded SET until_lsn = pg_current_wal_insert_lsn()")


@contextmanager
def running(crm: Crm) -> Iterator[WorkerProcess]:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        yield worker
        assert worker.terminate() == 0, worker.said


def told(crm: Crm, link: str = "link", kind: str = "created") -> list[tuple[Any, bool]]:
    """Of each activity of this kind its link, and whether it was made up; in order."""
    query = sql.SQL(
        "SELECT {}::text, coalesce((details ->> 'backfilled')::bool, false) FROM log WHERE kind = {} ORDER BY 1, id"
    )
    return crm.connection.execute(query.format(sql.Identifier(link), kind)).fetchall()


@contextmanager
def interrupted_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> Iterator[None]:
    """Ctrl-C after so many chunks of a table."""
    chunk, done = module._Work._chunk, [0]

    def interrupting(work: Any, *arguments: Any) -> int:
        if done[0] == chunks:
            raise KeyboardInterrupt
        done[0] += 1
        return chunk(work, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module._Work, "_chunk", interrupting)
        with pytest.raises(KeyboardInterrupt):
            yield


# Keys

ODD = ["a/b", "a%2Fb", "100%", "x,y", "it's", 'say "hi"', "Ärger", "日本", "", " ", "a\\b", "NULL", "{x}", "a\nb", "a "]
LETTERS = ["a", "A", "b", "ä", "Z", "_", "-a"]

KEYS: dict[str, tuple[list[str], list[str], list[tuple[str, ...]]]] = {
    "whole": (["bigint"], ["bigint"], [("-5",), ("0",), ("7",), ("4611686018427387905",)]),
    "small": (["integer"], ["bigint"], [("3",), ("20",), ("100",), ("2147483647",)]),
    "serial as text": (["integer"], ["text"], [("3",), ("20",), ("100",), ("2147483647",)]),
    "uuid": (["uuid"], ["uuid"], [(f"{n:08x}-0000-4000-8000-000000000000",) for n in (1, 2, 0xABCDEF, 0xFFFFFFFF)]),
    "uuid as text": (["uuid"], ["text"], [(f"{n:08x}-0000-4000-8000-000000000000",) for n in (1, 2, 0xABCD, 5)]),
    "numeric": (["numeric"], ["numeric"], [("-1.10",), ("0.00",), ("1.1",), ("12345678901234567890.5",)]),
    "text": (["text"], ["text"], [(key,) for key in ODD]),
    "linguistic": (['text COLLATE "en-x-icu"'], ["text"], [(key,) for key in (*ODD, *LETTERS)]),
    "caseless": (["text COLLATE caseless"], ["text"], [("a",), ("B",), ("c",), ("D/",)]),
    "padded": (["char(4)"], ["char(4)"], [("a",), ("b",), ("b c",), ("dddd",)]),
    "padded as text": (["char(4)"], ["text"], [("a   ",), ("b   ",), ("b c ",), ("dddd",)]),
    "moment": (["timestamptz"], ["timestamptz"], [(f"2020-03-{day} 01:30:00+00",) for day in (28, 29, 30, 31)]),
    "day": (["date"], ["date"], [("2020-01-01",), ("2020-01-31",), ("2021-01-01",), ("0044-03-15 BC",)]),
    "mood": (["feeling"], ["feeling"], [("sad",), ("ok",), ("happy/",), ("a,b",)]),
    "domain": (["positive"], ["integer"], [("1",), ("2",), ("10",), ("3",)]),
    "pair": (
        ["integer", "text"],
        ["integer", "text"],
        [("1", "x/y"), ("1", "z"), ("2", ""), ("10", "x"), ("2", "a,b"), ("2", "a%2Cb")],
    ),
    "triple": (
        ["date", "uuid", "boolean"],
        ["date", "uuid", "boolean"],
        [(day, "00000000-0000-4000-8000-000000000001", yes) for day in ("2020-01-02", "2020-01-03") for yes in "tf"],
    ),
}
"""By a table's name: the types of its key, those of the columns that link to it, and keys."""

TYPES: tuple[LiteralString, ...] = (
    "CREATE COLLATION caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
    "CREATE TYPE feeling AS ENUM ('sad', 'ok', 'happy/', 'a,b')",
    "CREATE DOMAIN positive AS integer CHECK (VALUE > 0)",
)


class Keyed:
    """A table with a key of some kind."""

    def __init__(self, crm: Crm, name: str, number: int) -> None:
        self.crm, self.name = crm, name
        types, links, self.keys = KEYS[name]
        self.columns = [f"k{place}" for place in range(len(types))]
        self.links = [f"l{number}_{place}" for place in range(len(types))]
        # In the index they stand the other way round.
        columns = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(column), sql.SQL(of))
            for column, of in zip(self.columns, types, strict=True)
        )
        crm.connection.execute(
            sql.SQL("CREATE TABLE {} ({}, name text, made_at timestamptz, PRIMARY KEY ({}))").format(
                sql.Identifier(name), columns, sql.SQL(", ").join(map(sql.Identifier, reversed(self.columns)))
            )
        )
        for link, of in zip(self.links, links, strict=True):
            crm.connection.execute(sql.SQL("ALTER TABLE log ADD {} {}").format(sql.Identifier(link), sql.SQL(of)))

    @property
    def section(self) -> str:
        return section(self.name, dict(zip(self.columns, self.links, strict=True)))

    def insert(self, *keys: tuple[str, ...]) -> None:
        values = sql.SQL(", ").join(sql.SQL("%s") for _ in self.columns)
        query = sql.SQL("INSERT INTO {} VALUES ({}, 'Ada', '2020-02-03 04:05:06Z')")
        for key in keys:
            self.crm.connection.execute(query.format(sql.Identifier(self.name), values), key)

    def change(self, what: LiteralString, key: tuple[str, ...]) -> None:
        same = sql.SQL(" AND ").join(sql.SQL("{} = %s").format(sql.Identifier(column)) for column in self.columns)
        self.crm.connection.execute(sql.SQL(what).format(sql.Identifier(self.name)) + sql.SQL(" WHERE ") + same, key)

    def created(self) -> list[tuple[Any, ...]]:
        """Of each creation the key that it links to, and whether it was made up."""
        links = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(link)) for link in self.links)
        first = sql.Identifier(self.links[0])
        query = sql.SQL(
            "SELECT {}, coalesce((details ->> 'backfilled')::bool, false) FROM log"
            " WHERE {} IS NOT NULL AND kind = 'created' ORDER BY id"
        )
        return self.crm.connection.execute(query.format(links, first)).fetchall()

    def printed(self, key: tuple[str, ...]) -> tuple[Any, ...]:
        """A key as its links print it."""
        links = sql.SQL(", ").join(sql.SQL("%s::{}::text").format(sql.SQL(of)) for of in KEYS[self.name][1])
        (found,) = self.crm.connection.execute(sql.SQL("SELECT ") + links, key).fetchall()
        return found

    @property
    def in_order(self) -> list[tuple[str, ...]]:
        """The keys as its index has them."""
        columns = sql.SQL(", ").join(sql.Identifier(column) for column in self.columns)
        order = sql.SQL(", ").join(sql.Identifier(column) for column in reversed(self.columns))
        query = sql.SQL("SELECT {} FROM {} ORDER BY {}").format(columns, sql.Identifier(self.name), order)
        texts = sql.SQL("SELECT {} FROM ({}) AS ordered").format(
            sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(column)) for column in self.columns), query
        )
        return self.crm.connection.execute(texts).fetchall()


def test_keys_of_all_kinds(bare_crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    crm = bare_crm
    for statement in (LOG, *TYPES):
        crm.execute(statement)
    database = sql.Identifier(crm.connection.info.dbname)
    crm.connection.execute(sql.SQL("ALTER DATABASE {} SET timezone = 'Asia/Tokyo'").format(database))
    tables = [Keyed(crm, name, number) for number, name in enumerate(KEYS)]
    for table in tables:
        table.insert(*table.keys[:-1])
    use(crm, *(table.section for table in tables), links=[link for table in tables for link in table.links])
    with running(crm):
        for table in tables:
            again, gone, changed, *_ = table.keys
            table.change("DELETE FROM {}", again)
            table.insert(again, table.keys[-1])
            table.change("DELETE FROM {}", gone)
            table.change("UPDATE {} SET name = 'Grace'", changed)
        with interrupted_after(monkeypatch, 1):
            fill(crm, "pair", chunk_size=2)
        for table in tables:
            if table.name != "pair":
                with interrupted_after(monkeypatch, 1):
                    fill(crm, table.name, chunk_size=1)
        done = fill(crm, chunk_size=2)
        repeated = fill(crm, chunk_size=1)
        parts = {
            table.name: fill(crm, table.name, from_key=first[::-1], to_key=last[::-1])[table.name].rows
            for table in tables
            for first, *_, last in [table.in_order]
        }
    assert {name for name, table in done.items() if not table.resumed} == set()
    assert {name: table.activities for name, table in repeated.items() if table.activities} == {}
    wrong = {}
    for table in tables:
        expected = [(*table.printed(table.keys[0]), False), (*table.printed(table.keys[-1]), False)]
        expected += [(*table.printed(key), True) for key in table.keys[2:-1]]
        found = table.created()
        if sorted(found) != sorted(expected):
            wrong[table.name] = found
    assert wrong == {}
    assert parts == {table.name: len(table.keys) - 2 for table in tables}
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def make(crm: Crm, name: str, *columns: LiteralString) -> sql.Composed:
    """Make a table whose rows have an id, a name and when they were made, and some columns more; returns its name."""
    table = sql.Identifier(*name.rpartition(".")[::2]) if "." in name else sql.Identifier(name)
    more = sql.SQL("").join(sql.SQL(f", {column}") for column in columns)
    crm.connection.execute(
        sql.SQL("CREATE TABLE {} (id int PRIMARY KEY, name text, made_at timestamptz{})").format(table, more)
    )
    return sql.Composed([table])


def add(crm: Crm, table: sql.Composable, *ids: int, made_at: str | None = "2020-02-03 04:05:06Z") -> None:
    query = sql.SQL("INSERT INTO {} (id, name, made_at) SELECT id, 'Thing ' || id, %s FROM unnest(%s::int[]) AS id")
    crm.connection.execute(postgres.with_parameters(query.format(table)), (made_at, [*ids]))


@pytest.fixture
def crm(bare_crm: Crm) -> Crm:
    """A database with a log, and nothing to record in it yet."""
    bare_crm.execute(LOG)
    bare_crm.execute("ALTER TABLE log ADD link integer")
    return bare_crm


def test_with_another_key_in_the_profile_it_begins_anew(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    """And who is still at it by the key before gives up."""
    add(crm, make(crm, "thing", "code text UNIQUE NOT NULL DEFAULT gen_random_uuid()"), 1, 2, 3, 4)
    crm.execute("ALTER TABLE log ADD code text")
    use(crm, section("thing", {"code": "code"}), links=["code"])
    with running(crm):
        with interrupted_after(monkeypatch, 1):
            fill(crm, chunk_size=2)
        use(crm, section("thing", {"id": "link"}))
        with interrupted_after(monkeypatch, 1):
            fill(crm, chunk_size=2)
        chunk, done = module._Work._chunk, list[Backfilled]()

        def disturbed(work: Any, *arguments: Any) -> int:
            monkeypatch.undo()
            use(crm, section("thing", {"code": "code"}), links=["code"])
            done.append(fill(crm)["thing"])
            return chunk(work, *arguments)

        monkeypatch.setattr(module._Work, "_chunk", disturbed)
        with pytest.raises(errors.FencedError, match="is at it, by the key code"):
            fill(crm)
    assert [(of.rows, of.resumed) for of in done] == [(4, False)]
    assert (len(told(crm, "code")), len(told(crm))) == (6, 6)  # by the one key and the other
    assert crm.execute("SELECT count(DISTINCT code), count(DISTINCT link) FROM log") == [(4, 2)]


def test_a_partitioned_table_is_read_as_one(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    crm.execute("CREATE TABLE part (id int, name text, made_at timestamptz, PRIMARY KEY (id)) PARTITION BY RANGE (id)")
    crm.execute("CREATE TABLE part_low PARTITION OF part FOR VALUES FROM (MINVALUE) TO (10)")
    crm.execute("CREATE TABLE part_high PARTITION OF part FOR VALUES FROM (10) TO (MAXVALUE) PARTITION BY RANGE (id)")
    crm.execute("CREATE TABLE part_highest PARTITION OF part_high FOR VALUES FROM (10) TO (MAXVALUE)")
    add(crm, sql.SQL("part"), *range(5, 15))
    crm.execute("ANALYZE")
    use(crm, section("part", {"id": "link"}))
    with running(crm):
        crm.execute("DELETE FROM part WHERE id = 12")
        add(crm, sql.SQL("part"), 12, 15)
        with interrupted_after(monkeypatch, 2):
            fill(crm, chunk_size=3)
        fill(crm, chunk_size=3)
        assert crm.value("SELECT expected FROM cdc_worker.backfill") == 10
    assert {int(link): made_up for link, made_up in told(crm)} == {n: n not in (12, 15) for n in range(5, 16)}


def test_names_that_have_to_be_quoted(crm: Crm) -> None:
    schema, name = 'Odd, %s "schema"', "it's a lead/100%"
    crm.connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    table = make(crm, f"{schema}.{name}")
    add(crm, table, 1, 2)
    use(crm, section(f"{schema}.{name}", {"id": "link"}))
    with running(crm):
        add(crm, table, 3)
        assert crm.succeed("backfill", f"{schema}.{name}", "--to-key", "1").splitlines() == [
            f"{schema}.{name} (to 1): 1 rows read, 1 activities written: 1 created"
        ]
        fill(crm)
    assert told(crm) == [("1", True), ("2", True), ("3", False)]


# Targets


def test_a_target_without_metadata(crm: Crm) -> None:
    table = make(crm, "thing")
    add(crm, table, 1, 2, 3)
    use(crm, section("thing", {"id": "link"}), target={k: v for k, v in TARGET.items() if v != "metadata"})
    with running(crm):
        crm.execute("DELETE FROM thing WHERE id = 2")
        add(crm, table, 2, 4)
        fill(crm)
        assert fill(crm)["thing"].activities == {}
        crm.execute("UPDATE thing SET id = 30 WHERE id = 3")
        assert fill(crm)["thing"].activities == {"created": 1}  # nothing tells that it was there before as another
    assert crm.execute("SELECT link, what FROM log WHERE kind = 'created' ORDER BY link") == [
        (1, "Thing 1 was there"),
        (2, "Thing 2 came"),
        (3, "Thing 3 was there"),
        (4, "Thing 4 came"),
        (30, "Thing 3 was there"),
    ]


def test_a_target_whose_keys_are_in_a_table_of_their_own(crm: Crm) -> None:
    table = make(crm, "thing")
    add(crm, table, *range(1, 6))
    crm.execute("ALTER TABLE log DROP change_key, ADD CHECK (link <> 5)")
    crm.execute("INSERT INTO log (kind, what, link) VALUES ('call', 'by hand', 1)")
    use(crm, section("thing", {"id": "link"}), target={k: v for k, v in TARGET.items() if v != "change_key"})
    with running(crm):
        crm.execute("DELETE FROM thing WHERE id = 2")
        add(crm, table, 2, 7)
        crm.execute("TRUNCATE thing")
        add(crm, table, 7)
        crm.execute("INSERT INTO thing SELECT 8, 'Thing 8', now()")
        crm.execute("UPDATE thing SET id = 9 WHERE id = 7")
        assert fill(crm)["thing"].activities == {}
        crm.execute("TRUNCATE thing")
    with unrecorded(crm):
        add(crm, table, 1, 5, 9)
    with running(crm):
        done = fill(crm)["thing"]
        assert (done.activities, done.dead_letters) == ({"created": 2}, 1)
        assert fill(crm)["thing"].activities == {}
    assert [pair for pair in told(crm) if pair[1]] == [("1", True), ("9", True)]
    made_up = "SELECT change_key FROM {} WHERE change_key LIKE '%%/backfill/%%' ORDER BY 1"
    keys, letters = (crm.execute(made_up.format(f"cdc_worker.{of}")) for of in ("written_key", "dead_letter"))
    assert [key.split("/")[4] for (key,) in keys] == ["1", "9"]
    assert [key.split("/")[4] for (key,) in letters] == ["5"]


def test_links_that_the_target_refused_are_known_by_its_metadata(crm: Crm) -> None:
    table = make(crm, "thing")
    add(crm, table, *range(1, 6))
    crm.execute("ALTER TABLE log ADD FOREIGN KEY (link) REFERENCES thing ON DELETE SET NULL")
    use(crm, section("thing", {"id": "link"}))
    crm.execute("DELETE FROM thing WHERE id = 2")  # recorded once it is gone
    add(crm, table, 6, 7)
    crm.execute("DELETE FROM thing WHERE id IN (3, 6)")
    crm.record()
    assert crm.value("SELECT count(*) FROM log WHERE details ? 'unlinked'") == 4
    add(crm, table, 6)
    with unrecorded(crm):
        add(crm, table, 3)
    with running(crm):
        fill(crm)
        assert fill(crm)["thing"].activities == {}
    made_up = [link for link, of in told(crm) if of]
    assert made_up == ["1", "3", "4", "5"]
    assert crm.value("SELECT count(*) FROM log WHERE change_key LIKE '%%/backfill/public.thing/3/created/0'") == 0


@pytest.mark.parametrize("kind", ["text", "json"])
def test_metadata_that_is_text_may_be_anything_in_rows_of_the_application(crm: Crm, kind: LiteralString) -> None:
    table = make(crm, "thing")
    add(crm, table, 1, 2, 3)
    crm.connection.execute(sql.SQL("ALTER TABLE log ALTER details TYPE {}").format(sql.SQL(kind)))
    crm.execute("ALTER TABLE log ADD FOREIGN KEY (link) REFERENCES thing")
    if kind == "text":
        crm.execute(
            "INSERT INTO log (kind, what, link, details) VALUES ('call', '', 1, 'not at home'), ('x', '', 2, '')"
        )
    use(crm, section("thing", {"id": "link"}))
    with running(crm):
        crm.execute("UPDATE thing SET id = 30 WHERE id = 3")
        fill(crm)
        assert fill(crm)["thing"].activities == {}
    assert crm.execute("SELECT link FROM log WHERE kind = 'created' ORDER BY 1") == [(1,), (2,), (30,)]


def test_a_link_of_several_columns_that_the_target_refused_in_part(crm: Crm) -> None:
    crm.execute("CREATE TABLE parent (id int PRIMARY KEY)")
    crm.execute("INSERT INTO parent SELECT generate_series(1, 3)")
    crm.execute("CREATE TABLE child (a int, b text, name text, made_at timestamptz DEFAULT now(), PRIMARY KEY (a, b))")
    crm.execute("INSERT INTO child VALUES (1, 'x'), (2, 'x')")
    crm.execute("ALTER TABLE log ADD other text, ADD FOREIGN KEY (link) REFERENCES parent")
    use(crm, section("child", {"a": "link", "b": "other"}), links=["link", "other"])
    crm.execute("INSERT INTO child VALUES (3, 'x'), (3, 'y')")
    crm.execute("DELETE FROM child WHERE a = 2")
    crm.execute("DELETE FROM parent WHERE id > 1")
    with running(crm):
        fill(crm)
    assert crm.execute("SELECT link, other, details ? 'backfilled' FROM log WHERE kind = 'created' ORDER BY id") == [
        (None, "x", False),
        (None, "y", False),
        (1, "x", True),
    ]


# Dates

DATES = [
    "2020-07-01 12:00:00.123456",
    "infinity",
    "-infinity",
    "0044-03-15 12:00:00 BC",
    "0001-01-01 00:00:00",
    "9999-12-31 23:59:59",
    "12345-06-07 08:09:10",
    "2021-03-28 02:30:00",  # which Berlin's clocks didn't show
    "2021-10-31 02:30:00",  # and which they showed twice
]


@pytest.mark.parametrize("target", ["timestamp", "timestamptz"])
def test_dates_are_as_the_database_would_have_them(crm: Crm, target: LiteralString) -> None:
    """In its zone, whether tables and target have one or not; but for dates of no such calendar as Python's."""
    database = sql.Identifier(crm.connection.info.dbname)
    crm.connection.execute(sql.SQL("ALTER DATABASE {} SET timezone = 'Europe/Berlin'").format(database))
    crm.execute("SET timezone = 'Europe/Berlin'")
    crm.connection.execute(sql.SQL("ALTER TABLE log ALTER at TYPE {}, ADD other integer").format(sql.SQL(target)))
    make(crm, "naive", "created_at timestamp")
    make(crm, "aware", "created_at timestamptz")
    for number, date in enumerate([*DATES, None]):
        crm.execute("INSERT INTO naive (id, name, created_at) VALUES (%s, '', %s)", number, date)
        crm.execute("INSERT INTO aware (id, name, created_at) VALUES (%s, '', %s)", number, date)
    rules = RULES.replace("row.made_at", "row.created_at")
    sections = (section(name, {"id": link}, rules=rules) for name, link in (("naive", "link"), ("aware", "other")))
    use(crm, *sections, links=["link", "other"])
    with running(crm):
        fill(crm)
    expected = [
        (name, number, crm.value(f"SELECT created_at::{target}::text FROM {name} WHERE id = %s", number))
        for name in ("naive", "aware")
        for number in range(len(DATES))
    ]
    for number in (3, 4, 6) if target == "timestamp" else ():  # they have a zone, and BC or five digits
        in_utc = crm.value("SELECT (created_at AT TIME ZONE 'UTC')::text FROM aware WHERE id = %s", number)
        expected[len(DATES) + number] = ("aware", number, in_utc)
    found = crm.execute(
        "SELECT CASE WHEN link IS NULL THEN 'aware' ELSE 'naive' END, coalesce(link, other), at::text FROM log"
    )
    assert sorted(found) == sorted(expected)


# What a target refuses, and what nobody may see


def test_what_the_target_refuses_becomes_a_dead_letter_and_the_rest_goes_on(crm: Crm) -> None:
    table = make(crm, "thing")
    add(crm, table, *range(1, 31))
    crm.execute("ALTER TABLE log ALTER what TYPE varchar(17), ADD CHECK (mod(link, 7) <> 0 AND link <> 30)")
    use(crm, section("thing", {"id": "link"}))
    with running(crm):
        done = fill(crm, chunk_size=8)["thing"]
        assert (done.activities, done.dead_letters) == ({"created": 25}, 5)
        assert fill(crm)["thing"].activities == {}  # nor are there more dead letters
        assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 5
    assert crm.execute("SELECT link, what, details -> 'untruncated' FROM log WHERE link IN (9, 29) ORDER BY 1") == [
        (9, "Thing 9 was there", None),
        (29, "Thing 29 was the…", {"what": "Thing 29 was there"}),
    ]
    letter = crm.execute(
        "SELECT change_key, kind, sqlstate, change ->> 'operation', change #>> '{new,id}' FROM cdc_worker.dead_letter"
        " ORDER BY dead_letter_id LIMIT 1"
    )
    cluster = crm.value("SELECT cdc_worker.cluster()")
    key = f"{crm.slot}/{cluster}/backfill/public.thing/7/created/0"
    assert letter == [(key, "refused", "23514", "read", "7")]


def test_a_target_that_refuses_row_after_row_ends_it_and_it_goes_on_when_that_is_mended(crm: Crm) -> None:
    table = make(crm, "thing")
    add(crm, table, *range(1, 1201))
    crm.execute("ALTER TABLE log ADD CONSTRAINT nothing CHECK (id < 0) NOT VALID")
    use(crm, section("thing", {"id": "link"}))
    with running(crm):
        with pytest.raises(errors.TooManyRefusalsError, match="refused 1000 rows in a row"):
            fill(crm)
        crm.execute("ALTER TABLE log DROP CONSTRAINT nothing")
        assert fill(crm)["thing"].resumed
        fill(crm)
    assert crm.value("SELECT count(DISTINCT link) FROM log") == crm.value("SELECT count(*) FROM log") == 1200


def test_what_is_masked_is_not_told(crm: Crm) -> None:
    table = make(crm, "thing", "salary int", "iban text")
    add(crm, table, 1)
    crm.execute("UPDATE thing SET salary = 12345, iban = 'DE89'")
    rules = RULES.replace('{{ name = "{{row.name}}" }}', '{{ salary = "{{row.salary}}", iban = "{{row.iban}}" }}')
    crm.settings["mask_key"] = "0123456789abcdef"
    use(crm, section("thing", {"id": "link"}, rules=rules, more='masked = { salary = "hidden", iban = "hash" }'))
    with running(crm):
        fill(crm)
    details = crm.value("SELECT details FROM log")
    assert details["values"]["salary"] == "***"
    assert details["values"]["iban"].startswith("hmac:")
    assert "12345" not in str(crm.execute("SELECT * FROM log"))
    assert "DE89" not in str(crm.execute("SELECT * FROM log"))


# Persons who were erased


def test_a_person_who_was_erased_is_not_told_of(new_crm: Crm) -> None:
    crm = new_crm
    add_leads(crm, *range(1, 4))
    with begun(crm):
        crm.succeed("forget", "--lead", "2", "--yes")
        fill(crm, "lead")
        assert [lead for _, lead, _ in told_of(crm)] == [1, 3]
        crm.succeed("forget", "--lead", "1", "--yes")
        crm.execute("UPDATE cdc_worker.backfill SET nonce = gen_random_uuid()")
        assert fill(crm, "lead")["lead"].activities == {}
        crm.execute("DELETE FROM lead WHERE lead_id = 2")
        add_leads(crm, 2)  # somebody else
        fill(crm, "lead")
        eventually(lambda: [lead for _, lead, _ in told_of(crm)].count(2) == 2)
    assert [(a["lead_id"], a["activity_type"], a["metadata"].get("erased")) for a in crm.activities()] == [
        (1, "lead_created", True),
        (3, "lead_created", None),
        (2, "lead_deleted", True),
        (2, "lead_created", None),
    ]


def test_a_person_who_is_erased_while_a_chunk_is_in_hand_is_not_told_of(new_crm: Crm) -> None:
    crm = new_crm
    add_leads(crm, *range(1, 7))
    with begun(crm), ThreadPoolExecutor() as pool, psycopg.connect(crm.dsn) as other:
        other.execute("LOCK TABLE activity IN SHARE MODE")
        filled = pool.submit(fill, crm, "lead", chunk_size=4)
        eventually(lambda: waiting_for_locks(crm) == 1, what="it has the first chunk in hand")
        forgotten = pool.submit(crm.succeed, "forget", "--lead", "2", "--yes")
        eventually(lambda: waiting_for_locks(crm) == 2 or forgotten.done(), what="forget waits for it, or is done")
        other.rollback()
        forgotten.result()
        filled.result()
        assert "2" not in {str(a["lead_id"]) for a in crm.activities() if not a["metadata"].get("erased")}
    assert crm.value("SELECT count(*) FROM activity WHERE description LIKE '%%Lead 2%%'") == 0
    assert len({lead for _, lead, _ in told_of(crm)} | {2}) == 6


# Histories


def say(crm: Crm, **wishes: Any) -> None:
    crm.execute("SELECT cdc_worker.set_context(%s)", Jsonb(wishes))


@pytest.mark.parametrize("wish", [{"skip": True}, {"collapse": "Imported"}], ids=["skip", "collapse"])
def test_what_was_not_to_be_told_by_itself_is_not_told_later(new_crm: Crm, wish: dict[str, Any]) -> None:
    crm = new_crm
    crm.settings["unsigned_control"] = "true"
    add_leads(crm, *range(1, 6))
    with begun(crm):
        with crm.connection.transaction():
            say(crm, **wish)
            add_leads(crm, 6, 7)
            crm.execute("UPDATE lead SET status = '7. lost'")  # by which the first five have not come to be
            crm.execute("DELETE FROM lead WHERE lead_id = 2")
            add_leads(crm, 2)
            crm.execute("UPDATE lead SET lead_id = 40 WHERE lead_id = 4")
        add_leads(crm, 4)
        crm.execute("DELETE FROM lead WHERE lead_id = 7")
        fill(crm, "lead")
        eventually(lambda: "lead_deleted" in crm.types())
    backfilled = [a["lead_id"] for a in crm.activities() if a["metadata"].get("backfilled")]
    assert sorted(backfilled) == [1, 3, 5]
    assert [a["lead_id"] for a in crm.activities() if a["activity_type"] == "lead_created"][-4:].count(4) == 1


NOTED = """
INSERT INTO cdc_worker.skipped (worker, table_name, commit_lsn, number, operation, collapsed, subjects)
SELECT %s, 'public.lead', '0/100', n * 1000, 'insert', false,
       (SELECT array_agg((n * 1000 + k)::text) FROM generate_series(0, 999) k)
FROM generate_series(1, 200) n
"""


def test_a_target_with_foreign_keys_is_read_once_and_then_what_is_about_its_rows(
    crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows come and go meanwhile; and if it has too many activities without a link, all is as true."""
    table, calls = make(crm, "thing"), 20_000
    add(crm, table, *range(1, 101))
    crm.execute("ALTER TABLE log ADD FOREIGN KEY (link) REFERENCES thing ON DELETE SET NULL")
    crm.execute("CREATE INDEX ON log (link)")
    crm.execute("INSERT INTO log (kind, link) SELECT 'call', 1 + n %% 100 FROM generate_series(1, %s) n", calls)
    use(crm, section("thing", {"id": "link"}))
    with running(crm):
        crm.execute("SELECT pg_stat_reset()")
        chunk, chunks = module._Work._chunk, [0]

        def and_another(work: Any, *arguments: Any) -> int:
            chunks[0] += 1
            if chunks[0] == 5:
                crm.execute("DELETE FROM thing WHERE id = 99")
                eventually(lambda: crm.value("SELECT details ? 'unlinked' FROM log ORDER BY id DESC LIMIT 1"))
                crm.execute("INSERT INTO thing VALUES (99, 'Another', now())")
            return chunk(work, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(module._Work, "_chunk", and_another)
            assert fill(crm, chunk_size=5)["thing"].activities == {"created": 99}
        assert chunks[0] > 20
    eventually(lambda: crm.value(SESSIONS) == 0, what="the server has counted")
    assert crm.value(READ, "log") < 4 * calls
    monkeypatch.setattr(journal, "UNLINKED", 0)
    with running(crm):
        assert fill(crm, chunk_size=50)["thing"].activities == {}
    assert told(crm).count(("99", False)) == 1


@pytest.mark.parametrize("analysed", [False, True])
def test_after_an_import_that_was_passed_over_only_what_is_about_its_rows_is_read(new_crm: Crm, analysed: bool) -> None:
    crm = new_crm
    crm.add_leads(100)
    crm.execute("UPDATE lead SET lead_id = 1000 + 5 * lead_id WHERE lead_id <= 10")
    crm.setup()
    crm.execute(NOTED, crm.slot)
    if analysed:
        crm.execute("ANALYZE cdc_worker.skipped")
    with running(crm):
        crm.execute("SELECT pg_stat_reset()")
        assert fill(crm, "lead", chunk_size=20)["lead"].activities == {"lead_created": 90}
    eventually(lambda: crm.value(SESSIONS) == 0, what="the server has counted")
    assert crm.value(READ, "skipped") == 10


def test_a_lead_whose_creation_is_a_dead_letter_is_told_of(new_crm: Crm) -> None:
    crm = new_crm
    with begun(crm):
        crm.execute("ALTER TABLE activity ADD CONSTRAINT no_seven CHECK (lead_id <> 7)")
        add_leads(crm, 6, 7)
        eventually(lambda: crm.value("SELECT count(*) FROM cdc_worker.dead_letter"))
        crm.execute("ALTER TABLE activity DROP CONSTRAINT no_seven")
        assert fill(crm, "lead")["lead"].activities == {"lead_created": 1}
    assert told_of(crm) == [("lead_created", 6, None), ("lead_created", 7, None)]


def test_what_triggers_wrote_before_is_not_told_again(new_crm: Crm) -> None:
    crm = new_crm
    add_leads(crm, 1, 2, 3)
    crm.execute(
        "INSERT INTO activity (lead_id, activity_type, activity_category, description, metadata) VALUES"
        " (1, 'lead_created', 'system', 'Lead created', '{}'), (2, 'lead_created', 'manual', 'I met her', '{}'),"
        " (3, 'call', 'system', 'by another', '{}')"
    )
    with begun(crm):
        fill(crm, "lead")
    assert told_of(crm) == [("lead_created", 2, None), ("lead_created", 3, None)]


def test_a_row_with_a_new_key_is_told_of_once_and_so_is_who_gets_the_old_one(new_crm: Crm) -> None:
    crm = new_crm
    add_leads(crm, 5, 6, 7)
    with begun(crm):
        crm.execute("UPDATE lead SET lead_id = 500 WHERE lead_id = 5")
        add_leads(crm, 5)
        fill(crm, "lead", to_key=("6",))
        crm.execute("UPDATE lead SET lead_id = 600 WHERE lead_id = 6")  # told of as 6
        add_leads(crm, 6)
        crm.execute("UPDATE lead SET lead_id = 5000 WHERE lead_id = 500")
        for _ in range(2):
            fill(crm, "lead")
    created = crm.execute(
        "SELECT lead_id, split_part(change_key, '/', 5), metadata ? 'backfilled' FROM activity"
        " WHERE activity_type = 'lead_created' ORDER BY 1, 3"
    )
    # The one that is 5000 now is known by its first key, and linked to by the one that it has.
    assert [(lead, made_up) for lead, _, made_up in created] == [
        (5, False),
        (6, False),
        (6, True),
        (7, True),
        (5000, True),
    ]
    assert [subject for _, subject, made_up in created if made_up] == ["6", "7", "5"]


def test_a_key_that_was_given_again_while_nobody_recorded_it_has_a_creation_of_its_own(new_crm: Crm) -> None:
    """If it is recorded that it was free; of a row that went unseen as well nobody can know that it is another one."""
    crm = new_crm
    add_leads(crm, 1, 2)
    with begun(crm):
        fill(crm, "lead")
        crm.execute("DELETE FROM lead WHERE lead_id = 1")
    with unrecorded(crm):
        add_leads(crm, 1)
        crm.execute("DELETE FROM lead WHERE lead_id = 2")
        add_leads(crm, 2)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        fill(crm, "lead")
        assert fill(crm, "lead")["lead"].activities == {}
    keys = crm.execute("SELECT change_key FROM activity WHERE metadata ? 'backfilled' ORDER BY activity_id")
    gone = crm.value("SELECT split_part(change_key, '/', 3) FROM activity WHERE activity_type = 'lead_deleted'")
    assert [key.split("/", 4)[4] for (key,) in keys] == [
        "1/lead_created/0",
        "2/lead_created/0",
        f"1/lead_created/{gone}-0",
    ]


def test_the_same_keys_after_a_truncate_are_other_rows(crm: Crm) -> None:
    table = make(crm, "thing")
    add(crm, table, 1, 2, 3)
    use(crm, section("thing", {"id": "link"}))
    with running(crm):
        fill(crm)
        crm.execute("TRUNCATE thing")
        add(crm, table, 1)
    with unrecorded(crm):
        add(crm, table, 2)
    with running(crm):
        fill(crm)
        assert fill(crm)["thing"].activities == {}
        crm.execute("TRUNCATE thing")
    with unrecorded(crm):
        add(crm, table, 2)
    with running(crm):
        fill(crm)
    assert told(crm) == [("1", True), ("1", False), ("2", True), ("2", True), ("2", True), ("3", True)]
    keys = crm.execute("SELECT change_key FROM log WHERE link = 2 ORDER BY id")
    assert len({key.rpartition("/")[2] for (key,) in keys}) == 3


def test_two_workers_in_one_database_tell_each_its_own(new_crm: Crm) -> None:
    crm = new_crm
    add_leads(crm, 1, 2)
    others = {"slot": f"{crm.slot}_2", "name": "another.one"}
    with begun(crm):
        crm.succeed("setup", **others)
        with crm.worker(**others) as other:
            other.wait_for("replication_started")
            fill(crm, "lead")
            assert crm.succeed("backfill", "lead", **others).splitlines() == [
                "public.lead: 2 rows read, 2 activities written: 2 lead_created"
            ]
            add_leads(crm, 3)
            eventually(lambda: len(crm.types()) == 6)
            assert crm.succeed("backfill", "lead", **others).splitlines() == [
                "public.lead: 3 rows read, 0 activities written: none"
            ]
            assert fill(crm, "lead")["lead"].activities == {}
    workers = crm.execute("SELECT worker, rows FROM cdc_worker.backfill ORDER BY worker")
    assert workers == [("another.one", 3), (crm.slot, 3)]
