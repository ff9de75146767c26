"""Poison: whatever a target can say against one row, that row is a dead letter and nothing else is.

The oracle is the ledger of the triggers, without the poison. How often rows were sent is counted, as a loop would be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import psycopg
import pytest
from support import Crm, either_plugin

from cdc_worker import shadow
from cdc_worker.sink import MAX_SEGMENT

CODES = sorted(
    kind.sqlstate
    for kind in vars(psycopg.errors).values()
    if isinstance(kind, type)
    and issubclass(kind, psycopg.Error)
    and kind.sqlstate is not None
    and (kind.sqlstate[:2] in ("22", "23", "54") or kind.sqlstate == "P0001")
)
"""Those of the manual's classes 22 and 23, with limits that a row may reach, and what triggers raise without a code."""

BY_TRIGGER = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'refused' USING ERRCODE = split_part(NEW.metadata ->> 'lead_name', ' ', 2);
END $$;
-- Of one the server names the line of the COPY, of the other it doesn't: it is found by halves.
CREATE TRIGGER refuse_before BEFORE INSERT ON activity FOR EACH ROW
    WHEN (NEW.metadata ->> 'lead_name' LIKE 'poison % before') EXECUTE FUNCTION refuse();
CREATE TRIGGER refuse_after AFTER INSERT ON activity FOR EACH ROW
    WHEN (NEW.metadata ->> 'lead_name' LIKE 'poison % after') EXECUTE FUNCTION refuse();
"""

COUNTED = """
CREATE SEQUENCE attempt;
CREATE FUNCTION count_attempt() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM nextval('attempt'); RETURN NULL; END $$;
CREATE TRIGGER count_attempt BEFORE INSERT ON activity EXECUTE FUNCTION count_attempt();
"""
"""Every attempt to write rows, those that come to nothing as well: no rollback takes back a sequence."""

MISSING = "SELECT missing, metadata ->> 'lead_name' FROM shadow.difference ORDER BY 2"

BACKWARDS = """
SELECT count(*) FROM (SELECT lead_id < lag(lead_id) OVER (ORDER BY activity_id) FROM activity) a (back) WHERE back
"""

LETTERS = "SELECT change -> 'new' ->> 'full_name', sqlstate, kind FROM cdc_worker.dead_letter ORDER BY 1"


def counting(crm: Crm) -> None:
    """Let the ledger be kept, and attempts be counted."""
    shadow.install(crm.connection)
    crm.connection.execute(COUNTED.encode())


def add(crm: Crm, rows: int, poison: dict[int, str], *, value: str = "") -> None:
    """Insert leads, in one statement, of which some have the name of a poison, by their numbers from 1."""
    names = [poison.get(number, f"Lead {number}") for number in range(1, rows + 1)]
    crm.execute(
        "INSERT INTO lead (full_name, source, bd_in_charge, type, company_name)"
        " SELECT name, 's', 'jane', 't', %s FROM unnest(%s::text[]) name",
        value,
        names,
    )


def recorded_but_for(crm: Crm, poison: Iterable[str], *, batches: int) -> None:
    """Assert that all is written but these, which are dead letters with their codes, and that it took few attempts."""
    names = sorted(poison)
    assert crm.execute(MISSING) == [(1, name) for name in names]
    assert crm.execute(LETTERS) == [(name, name.split()[1], "refused") for name in names]
    assert crm.value(BACKWARDS) == 0
    # A batch as a whole, then its segments, of which those with poison are halved until a row is alone.
    halved = 2 * MAX_SEGMENT.bit_length()
    assert crm.value("SELECT last_value FROM attempt") <= batches * (1 + 1000 // MAX_SEGMENT + 1) + len(names) * halved


def retried(crm: Crm, *, without: str) -> None:
    """Assert that what the target doesn't refuse any more becomes just what was missing."""
    crm.connection.execute(without.encode())
    crm.succeed("dead-letters", "retry", "--all")
    assert shadow.faults(crm.connection) == []
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


@pytest.mark.parametrize("rows", [100, pytest.param(1000, marks=pytest.mark.chaos)])
def test_one_bad_row_is_one_dead_letter_whatever_code_it_is_refused_with(crm: Crm, rows: int) -> None:
    """It is the first of its transaction, the last, in the middle, and alone between two that are good."""
    counting(crm)
    crm.connection.execute(BY_TRIGGER.encode())
    poison = [f"poison {code} {('before', 'after')[number % 2]}" for number, code in enumerate(CODES)]
    for number, name in enumerate(poison):
        match number // 2 % 4:
            case 0:
                add(crm, rows, {1: name})
            case 1:
                add(crm, rows, {rows: name})
            case 2:
                add(crm, rows, {rows // 2: name})
            case 3:
                add(crm, rows - 1, {})
                add(crm, 1, {1: name})
    crm.record()
    recorded_but_for(crm, poison, batches=1 + rows * len(CODES) // 1000)
    retried(crm, without="DROP TRIGGER refuse_before ON activity; DROP TRIGGER refuse_after ON activity")


def test_of_a_thousand_rows_one_is_refused_and_999_are_written_in_few_attempts(crm: Crm) -> None:
    """The batch as a whole, its segments, and the halves of one of them: it is no loop."""
    counting(crm)
    crm.connection.execute(BY_TRIGGER.encode())
    add(crm, 1000, {617: "poison 22012 after"})
    crm.record()
    recorded_but_for(crm, ["poison 22012 after"], batches=1)
    assert crm.value("SELECT count(*) FROM activity") == 999
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 1


REFUSING = {
    "22003": ("v::smallint", "99999"),
    "22004": ("array_fill(v, NULL::int[])", "x"),
    "22007": ("v::date", "one day"),
    "22008": ("v::date", "2026-02-30"),
    "22009": ("v::timestamptz", "2026-01-01 00:00+99"),
    "2200C": ("substring(v SIMILAR v ESCAPE '#')", '#"a#"b#"c#"'),
    "2200N": ("xmlparse(CONTENT v)", "<"),
    "22011": ("substring(v FROM 1 FOR -1)", "x"),
    "22012": ("1 / v::int", "0"),
    "2201B": ("v ~ v", "("),
    "2201E": ("ln(v::numeric)", "0"),
    "2201F": ("power(v::numeric, 0.5)", "-1"),
    "2201G": ("width_bucket(1, 0, 0, v::int)", "1"),
    "22021": ("convert_from(decode(v, 'hex'), 'UTF8')", "ff"),
    "22023": ("decode(v, v)", "x"),
    "22025": ("'x' LIKE v", "\\"),
    "2202E": ("v::int[]", "[2:1]={1}"),
    "22031": ("jsonb_path_query_array(v::jsonb, '$.datetime()')", '"x"'),
    "22033": ("jsonb_path_query_array(v::jsonb, 'strict $[5]')", "[1]"),
    "22036": ("jsonb_path_query_array(v::jsonb, '$.double()')", '"x"'),
    "22038": ("jsonb_path_query_array(v::jsonb, '$[*] + 1')", "[1, 2]"),
    "22039": ("jsonb_path_query_array(v::jsonb, 'strict $[*]')", "{}"),
    "2203A": ("jsonb_path_query_array(v::jsonb, 'strict $.a')", "{}"),
    "22P02": ("v::uuid", "x"),
    "22P05": ("v::jsonb", '"\\u0000"'),
    "2200H": ("nextval('spent')", "x"),
}
"""Expressions of a CHECK that fail with the code for a value `v`: no type, no function and no cast takes it."""

VALUE = re.compile(r"\bv\b")
TOLD = "(metadata ->> 'company_name')"

BY_NATURE = """
CREATE SEQUENCE spent MAXVALUE 2 START 2;
SELECT nextval('spent');
CREATE FUNCTION one(metadata jsonb, code text) RETURNS text LANGUAGE sql IMMUTABLE AS
    $$ SELECT CASE WHEN metadata ->> 'lead_name' = 'poison ' || code THEN metadata ->> 'company_name' END $$;
CREATE FUNCTION long(metadata jsonb) RETURNS text LANGUAGE sql IMMUTABLE AS
    $$ SELECT string_agg(md5(n::text), '') FROM generate_series(1, 300) n WHERE one(metadata, '54000') IS NOT NULL $$;
CREATE INDEX ON activity (long(metadata));
CREATE DOMAIN positive AS integer CHECK (VALUE > 0);
ALTER TABLE activity
    ADD string varchar(3) GENERATED ALWAYS AS (one(metadata, '22001')) STORED,
    ADD bits bit(3) GENERATED ALWAYS AS (one(metadata, '22026')::varbit) STORED,
    ADD given text NOT NULL GENERATED ALWAYS AS (nullif(coalesce(one(metadata, '23502'), ''), 'x')) STORED,
    ADD single text GENERATED ALWAYS AS (one(metadata, '23505')) STORED UNIQUE,
    ADD number positive GENERATED ALWAYS AS (one(metadata, '23514')::integer) STORED,
    ADD place text GENERATED ALWAYS AS (one(metadata, '23P01')) STORED,
    ADD EXCLUDE USING btree (place WITH =),
    ADD CHECK (CASE metadata ->> 'lead_name' {checks} ELSE true END);
INSERT INTO activity (activity_type, metadata)
SELECT 'by hand', jsonb_build_object('lead_name', 'poison ' || code, 'company_name', 'x')
FROM unnest('{{23505,23P01}}'::text[]) code;
"""


def test_what_types_and_constraints_of_a_target_refuse_is_one_dead_letter_each(crm: Crm) -> None:
    """But for a foreign key, which test_dead_letters has."""
    values = {code: value for code, (_, value) in REFUSING.items()}
    values |= {"22001": "long", "22026": "10", "23502": "x", "23505": "x", "23514": "-1", "23P01": "x", "54000": "x"}
    checks = " ".join(
        f"WHEN 'poison {code}' THEN ({VALUE.sub(TOLD, expression)}) IS NOT NULL"
        for code, (expression, _) in REFUSING.items()
    )
    crm.connection.execute(BY_NATURE.format(checks=checks).encode())
    counting(crm)
    for code, value in values.items():
        add(crm, 50, {25: f"poison {code}"}, value=value)
    crm.record()
    recorded_but_for(crm, [f"poison {code}" for code in values], batches=1 + 50 * len(values) // 1000)


SEVERAL = {
    1: "poison 22P02 before",
    2: "poison 23514 after",
    3: "poison 23514 before",
    500: "poison P0001 after",
    501: "poison 54000 before",
    750: "poison 22021 after",
    1000: "poison 23505 after",
}


def test_neighbours_that_are_refused_for_different_reasons_in_one_batch(crm: Crm) -> None:
    """One of them with the code that keys have which are there already."""
    counting(crm)
    crm.connection.execute(BY_TRIGGER.encode())
    with crm.connection.transaction():
        add(crm, 1000, SEVERAL)
    crm.record()
    recorded_but_for(crm, SEVERAL.values(), batches=1)
    retried(crm, without="DROP TRIGGER refuse_before ON activity; DROP TRIGGER refuse_after ON activity")


@either_plugin
def test_poison_in_the_middle_of_a_huge_transaction(crm: Crm) -> None:
    """Of one batch of many, all of them inside one commit."""
    rows = 8_000
    counting(crm)
    crm.connection.execute(BY_TRIGGER.encode())
    poison = {rows // 2 + place: name for place, name in SEVERAL.items()}
    add(crm, rows, poison)
    crm.record()
    recorded_but_for(crm, poison.values(), batches=1 + rows // 1000)
