"""With either plugin a worker records the same: two workers of one database, with a slot of each plugin."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any, LiteralString

import psycopg
import pytest
import servers
from support import Crm
from test_leadfi import LINES
from test_partitions import DEALS, PROFILE
from test_replay import Workload, added, replayed
from test_sales_cookbook import add, business, use

from cdc_worker import sales_day, shadow
from cdc_worker.cluster import Cluster

Pair = tuple[Crm, Crm]


@pytest.fixture
def pair(server: Cluster, new_crm: Crm) -> Iterator[Pair]:
    """Two workers of LeadFi's database which aren't set up, and keep what they read."""
    if "wal2json" not in servers.plugins(server):
        pytest.skip("the server has no wal2json")
    other = Crm(new_crm.dsn, f"{new_crm.slot}_other", new_crm.directory)
    for crm, plugin in ((new_crm, "wal2json"), (other, "pgoutput")):
        directory = crm.directory / plugin
        directory.mkdir()
        crm.settings |= {"plugin": plugin, "publication": crm.slot, "recording_directory": str(directory)}
    try:
        yield new_crm, other
    finally:
        other.close()


ACTIVITIES: LiteralString = """
SELECT change_key, to_jsonb(activity) - 'activity_id' - 'change_key' FROM activity
WHERE starts_with(change_key, %s)
"""

UNDATED: LiteralString = """
SELECT change_key, description, metadata FROM activity WHERE starts_with(change_key, %s)
"""

LOGGED: LiteralString = """
SELECT change_key, to_jsonb(log) - 'id' FROM core_interactionlog AS log JOIN cdc_worker.written_key ON row_id = id
WHERE starts_with(change_key, %s)
"""

LETTERS: LiteralString = """
SELECT change_key, kind, reason, change, context, commit_lsn, end_lsn, xid, committed_at FROM cdc_worker.dead_letter
WHERE starts_with(change_key, %s)
"""

LOSE: LiteralString = "SET LOCAL cdc_worker.protect = off; DELETE FROM activity WHERE starts_with(change_key, {0})"

LOSE_LOGGED: LiteralString = """
WITH lost AS (DELETE FROM cdc_worker.written_key WHERE starts_with(change_key, {0}) RETURNING row_id)
DELETE FROM core_interactionlog USING lost WHERE id = row_id
"""


def told(crm: Crm, query: LiteralString) -> list[tuple[Any, ...]]:
    """What a worker has written, by keys without its name."""
    own = f"{crm.slot}/"
    return sorted([(key.removeprefix(own), *columns) for key, *columns in crm.execute(query, own)], key=itemgetter(0))


def assert_alike(pair: Pair, query: LiteralString = ACTIVITIES, lose: LiteralString = LOSE, *, at_least: int) -> None:
    """Let both record, and hold against each other what they have written, and what pgoutput's recording says."""
    for crm in pair:
        crm.record()
    one, other = pair
    found = told(other, query)
    assert found == told(one, query)
    assert len(found) >= at_least
    assert told(other, LETTERS) == told(one, LETTERS)
    with psycopg.connect(other.dsn) as connection:
        connection.execute(psycopg.sql.SQL(lose).format(f"{other.slot}/"))
    assert added(replayed(other)) == len(found)
    assert told(other, query) == found


def test_a_day_at_leadfi(pair: Pair) -> None:
    for crm in pair:
        crm.setup()
    one, _ = pair
    scenes = [
        *sales_day.MORNING,
        *(scene for session in sales_day.RUSH_HOUR for scene in session),
        *sales_day.AFTERNOON,
    ]
    for scene in scenes:
        with one.connection.transaction(force_rollback=scene.rolled_back):
            if scene.by is not None:
                shadow.act_as(one.connection, scene.by)
            if scene.copy:
                with one.connection.cursor().copy(scene.sql.encode()) as copy:
                    for row in scene.copy:
                        copy.write_row(row)
            else:
                one.connection.execute(scene.sql.encode())
    assert_alike(pair, at_least=len([entry for entry in sales_day.BY_HAND if entry.category == "system"]))


def test_what_leadfi_records_and_a_random_application(pair: Pair, seed: int) -> None:
    for crm in pair:
        crm.setup()
    one, _ = pair
    for n, line in enumerate(LINES.values(), 100):
        one.execute(
            "INSERT INTO lead (lead_id, full_name, company_name, source, type, status, bd_in_charge)"
            " VALUES (%s, 'Ada', 'Engines', 'web', 'otc', '2. proposal', 'jane')",
            n,
        )
        one.execute("INSERT INTO customer (customer_uid, name, type) VALUES (%s, 'Engines', 'otc')", n)
        one.connection.execute(line.before, {"n": n})
        with one.connection.transaction():
            for statement in line.happens.split("; "):
                one.connection.execute(statement, {"n": n})
    one.execute("TRUNCATE lead, customer, contact, activity RESTART IDENTITY")
    Workload(one, seed).run(60, many=1)
    assert_alike(pair, at_least=1_600)


def test_sales_cookbook(pair: Pair, seed: int) -> None:
    one, other = pair
    use(one)
    other.settings["profile"] = one.settings["profile"]
    other.setup()
    for _ in range(2):
        add(one.connection, "core_contact")
    work = business(one, seed)
    for turn in range(30):
        work(one.connection, turn % 3, turn)
    assert_alike(pair, LOGGED, LOSE_LOGGED, at_least=50)


def test_partitions(pair: Pair) -> None:
    one, _ = pair
    one.connection.execute(DEALS)
    profile = one.directory / "deals.toml"
    profile.write_text(PROFILE)
    for crm in pair:
        crm.settings["profile"] = str(profile)
        crm.setup()
    statements: tuple[LiteralString, ...] = (
        "INSERT INTO deal (id, region) VALUES (1, 'north'), (2, 'south'), (3, 'east'), (4, 'moon')",
        "UPDATE deal SET amount = id",
        "UPDATE deal SET region = 'south', note = 'moved' WHERE id = 1",
        "CREATE TABLE deal_west PARTITION OF deal FOR VALUES IN ('west')",
        "INSERT INTO deal VALUES (5, 'west', 5)",
        "UPDATE deal SET amount = 6 WHERE id = 5",
        "UPDATE deal SET region = 'east' WHERE id = 5",
        "DELETE FROM deal WHERE id = 5",
        "TRUNCATE deal_north",
        "TRUNCATE deal",
        "INSERT INTO deal VALUES (6, 'north'); TRUNCATE other, deal; TRUNCATE deal; DELETE FROM other",
    )
    for statement in statements:
        one.connection.execute(statement)
    assert_alike(pair, UNDATED, at_least=14)


def test_what_pgoutput_does_not_tell_is_not_missed_in_the_log(server: Cluster, new_crm: Crm) -> None:
    """Before PostgreSQL 18 that is a generated column, of which wal2json has told."""
    if "wal2json" not in servers.plugins(server):
        pytest.skip("the server has no wal2json")
    new_crm.execute("ALTER TABLE lead ADD COLUMN letters int GENERATED ALWAYS AS (length(full_name)) STORED")
    new_crm.settings["plugin"] = "wal2json"
    new_crm.setup()
    new_crm.add_leads(1)
    new_crm.execute("UPDATE lead SET full_name = 'Ann'")
    new_crm.record()
    assert new_crm.activities()[-1]["description"] == 'Lead "Ann" updated: full_name, letters'
    new_crm.settings["plugin"] = "auto"
    new_crm.succeed("switch-plugin")
    new_crm.execute("UPDATE lead SET full_name = 'Beatrice'")
    with new_crm.worker() as worker:
        worker.wait_for("replication_started")
        assert "1 rows, 1 agree, 0 disagree" in new_crm.succeed("verify", "lead")
