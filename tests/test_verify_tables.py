"""Verify tables with keys of all kinds, odd columns and odd targets."""

from __future__ import annotations

from typing import LiteralString

import pytest
from psycopg import sql
from support import Crm
from test_backfill_tables import KEYS, LOG, RULES, TYPES, Keyed, section, use
from test_key_table import TABLES
from test_unprepared_target import KEYS as KEYS_OF_LEAD
from test_unprepared_target import LEAD_KEY
from test_unprepared_target import TARGET as UNPREPARED
from test_unprepared_target import use as unprepared
from test_verify import caught_up, missing, running, verified

from cdc_worker.rules import subject


def test_keys_of_all_kinds(bare_crm: Crm) -> None:
    crm = bare_crm
    for statement in (LOG, *TYPES):
        crm.execute(statement)
    database = sql.Identifier(crm.connection.info.dbname)
    crm.connection.execute(sql.SQL("ALTER DATABASE {} SET timezone = 'Asia/Tokyo'").format(database))
    tables = [Keyed(crm, name, number) for number, name in enumerate(KEYS)]
    use(crm, *(table.section for table in tables), links=[link for table in tables for link in table.links])
    with running(crm):
        for table in tables:
            table.insert(*table.keys)
            table.change("UPDATE {} SET name = 'Grace'", table.keys[0])
            table.change("UPDATE {} SET name = 'Hedy'", table.keys[0])
            table.change("DELETE FROM {}", table.keys[1])
        caught_up(crm)
        found, done = verified(crm, chunk_size=2)
        assert found == []
        assert {name: of.subjects for name, of in done.items()} == {table.name: len(table.keys) for table in tables}
        # One deletion, and one creation.
        crm.execute("DELETE FROM log WHERE kind = 'gone'")
        crm.execute(
            "DELETE FROM log WHERE kind = 'created' AND id IN (SELECT max(id) FROM log WHERE kind = 'created'"
            " GROUP BY substring(change_key FROM '/public\\.([^/]*)/'))"
        )
        found, _ = verified(crm, chunk_size=3, repair=True)
        expected = {(f"public.{name}", what) for name in KEYS for what in ("deletion", "creation")}
        assert {(of.table, of.missing) for of in found} == expected
        assert {of.repaired for of in found} == {"yes"}
        subjects = {of.subject for of in found if of.table == "public.text"}
        assert subjects == {subject([key]) for (key,) in (KEYS["text"][2][1], KEYS["text"][2][-1])}
        assert missing(crm) == []


def test_values_that_are_masked_cut_or_of_odd_types(bare_crm: Crm) -> None:
    crm = bare_crm
    crm.execute(LOG)
    crm.execute("ALTER TABLE log ADD link integer")
    crm.execute(
        "CREATE TABLE odd (id int PRIMARY KEY, name text, made_at timestamptz, secret text, hashed text, long text,"
        " price numeric(30,10), real float4, double float8, big bigint, raw bytea, list int[], doc jsonb, day date,"
        " fixed char(5), flag boolean, took interval, seen timestamp)"
    )
    more = 'masked = { secret = "hidden", hashed = "hash" }\nignored = "seen"'
    crm.settings["mask_key"] = "a key of sixteen characters"
    use(crm, section("odd", {"id": "link"}, rules=RULES, more=more))
    update = (
        "UPDATE odd SET name = %s, secret = %s, hashed = %s, long = repeat(%s, 500), fixed = %s,"
        " price = 12345678901234567890.1234567891, real = 0.1, double = 1e300,"
        " big = 9007199254740993, raw = '\\x00ff', list = '{1,2}', doc = '{\"a\": 1.50}',"
        " day = '0044-03-15 BC', flag = true, took = '1 day', seen = now()"
    )
    with running(crm):
        crm.execute("INSERT INTO odd (id, name) VALUES (1, 'x'), (2, 'x')")
        crm.execute(update, "y", "s", "h", "l", "f")
        crm.execute("UPDATE odd SET secret = 't', flag = NULL, double = 'NaN', real = 1e-30, seen = NULL")
        caught_up(crm)
        assert missing(crm) == []
        crm.execute("DELETE FROM log WHERE link = 1 AND id = (SELECT max(id) FROM log WHERE link = 1)")
        # That the secret is another one, nobody can tell.
        assert missing(crm, repair=True) == [("1", "change", ["double", "flag", "real"])]
        assert missing(crm) == []
        assert crm.value("SELECT count(*) FROM log WHERE details::text LIKE '%%\"s\"%%'") == 0
        crm.execute("UPDATE odd SET hashed = 'g', long = repeat('l', 499) || 'm' WHERE id = 2")
        caught_up(crm)
        assert missing(crm) == []
        crm.execute("DELETE FROM log WHERE link = 2 AND id = (SELECT max(id) FROM log WHERE link = 2)")
        assert missing(crm, repair=True) == [("2", "change", ["hashed"])]
        assert missing(crm) == []


@pytest.mark.parametrize("sample", [None, 100])
def test_links_of_the_applications_own_may_be_no_keys(bare_crm: Crm, sample: int | None) -> None:
    crm = bare_crm
    crm.execute(LOG)
    crm.execute("ALTER TABLE log ADD link text")
    crm.execute("CREATE TABLE odd (id int PRIMARY KEY, name text, made_at timestamptz)")
    use(crm, section("odd", {"id": "link"}, rules=RULES))
    with running(crm):
        crm.execute("INSERT INTO odd (id, name) VALUES (1, 'x'), (2, 'x')")
        crm.execute("DELETE FROM odd WHERE id = 2")
        crm.execute("INSERT INTO log (kind, what, link) SELECT 'manual', '', unnest(ARRAY['n/a', '99999999999', '1'])")
        caught_up(crm)
        assert missing(crm, sample=sample) == []
        crm.execute("DELETE FROM log WHERE kind = 'gone'")
        assert missing(crm, sample=sample) == [("2", "deletion", [])]


def test_a_log_without_metadata_is_verified_as_far_as_it_goes(bare_crm: Crm) -> None:
    """Sales Cookbook's, whose rules all have conditions: nothing it has could disagree, nor does."""
    crm = bare_crm
    crm.connection.execute(TABLES)
    crm.settings["profile"] = "sales_cookbook"
    crm.setup()
    with running(crm):
        crm.execute("INSERT INTO core_organization (id, name, created_at) VALUES (1, 'Cooks', now())")
        found, done = verified(crm)
        assert found == []
        assert {*done} >= {"core_lead", "core_opportunity"}


def test_a_target_without_a_column_for_keys(bare_crm: Crm) -> None:
    crm = bare_crm
    crm.execute(
        "CREATE TABLE log (id bigserial PRIMARY KEY, kind text, what text, at timestamp, details json, link int)"
    )
    crm.execute("CREATE TABLE thing (id int PRIMARY KEY, name text, made_at timestamptz)")
    target = {"kind": "type", "what": "description", "at": "occurred_at", "details": "metadata"}
    use(crm, section("thing", {"id": "link"}), target=target)
    with running(crm):
        crm.execute("INSERT INTO thing VALUES (1, 'a', now()), (2, 'a', now()), (3, 'a', now())")
        for name in "bcd":
            crm.execute("UPDATE thing SET name = %s", name)
        crm.execute("UPDATE thing SET id = 9 WHERE id = 3")
        caught_up(crm)
        assert missing(crm) == []
        crm.execute("DELETE FROM log WHERE link = 1 AND kind = 'created'")
        crm.execute("DELETE FROM log WHERE link = 2 AND details #>> '{changes,name,new}' = 'c'")
        assert missing(crm, repair=True) == [("1", "creation", []), ("2", "change", ["name"])]
        assert missing(crm) == []


@pytest.mark.parametrize("key", KEYS_OF_LEAD, ids=lambda key: key or "NO ACTION")
def test_a_target_whose_links_are_refused_or_taken_away(bare_crm: Crm, key: LiteralString) -> None:
    crm = unprepared(bare_crm, UNPREPARED, LEAD_KEY + key)
    crm.add_leads(12)
    crm.execute("UPDATE lead SET status = '2'")
    crm.execute("DELETE FROM lead WHERE lead_id < 4")  # of which nothing is written as yet
    with running(crm):
        caught_up(crm)
        assert missing(crm, "lead") == []
        crm.execute("UPDATE lead SET bd_in_charge = 'joe' WHERE lead_id < 10")
        if "CASCADE" in key or "SET NULL" in key:
            crm.execute("DELETE FROM lead WHERE lead_id = 6")
        caught_up(crm)
        assert missing(crm, "lead") == []
        crm.execute("DELETE FROM activity WHERE lead_id = 7 AND metadata ->> 'new_status' = '2'")
        assert missing(crm, "lead", repair=True) == [("7", "change", ["status"])]
        assert missing(crm, "lead") == []
