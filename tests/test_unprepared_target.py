"""A target that was not prepared for the worker: whatever it asks of a row, nothing is lost."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import TupleRow
from support import Crm, eventually, grant, storm

from cdc_worker import shadow
from cdc_worker.sink import MAX_AT_ONCE, MAX_LOCKING, MAX_REFUSALS

COLUMNS = {
    "activity_type": "type",
    "description": "description",
    "metadata": "metadata",
    "date_created": "occurred_at",
    "bd": "owner",
    "created_by": "created_by",
    "lead_id": "lead",
    "customer_uid": "customer",
    "change_key": "change_key",
}

TARGET = """
CREATE TABLE activity (
    activity_id serial PRIMARY KEY,
    lead_id integer,
    customer_uid integer,
    activity_type varchar(50) NOT NULL,
    description text,
    metadata jsonb,
    date_created timestamp NOT NULL,
    bd varchar(20),
    created_by varchar(50),
    change_key text CONSTRAINT activity_key UNIQUE
)
"""

LEAD_KEY = "ALTER TABLE activity ADD CONSTRAINT of_lead FOREIGN KEY (lead_id) REFERENCES lead "

KEYS: list[LiteralString] = [
    "",
    "ON DELETE CASCADE",
    "ON DELETE SET NULL",
    "DEFERRABLE INITIALLY DEFERRED",
]

POISON = "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('poison', 's', 'jane', 't')"

BACKEND = "SELECT {} FROM pg_stat_activity WHERE application_name = %s AND backend_type = 'client backend'"


def without_backfill(rules: str) -> str:
    """Rules for a target without links, by which is found what was recorded of a row."""
    return re.sub(r"\[\S+\.backfill\]\n(?:[^\[\n].*\n)*", "", rules)


def use(crm: Crm, *statements: LiteralString, table: str = "activity", columns: dict[str, str] = COLUMNS) -> Crm:
    """Let the worker write to a table as these statements leave it, by LeadFi's rules."""
    for statement in statements:
        crm.execute(statement)
    rules = (resources.files("cdc_worker") / "profiles" / "leadfi.toml").read_text("utf-8")
    if not {"lead", "customer"} <= {*columns.values()}:
        rules = without_backfill(rules)
    lines = ['name = "theirs"', "[target]", f'table = "{table}"', "[target.columns]"]
    lines += [f'"{column}" = "{field}"' for column, field in columns.items()]
    profile = crm.directory / "theirs.toml"
    profile.write_text("\n".join([*lines, rules[rules.index("[tables.lead]") :]]), "utf-8")
    crm.settings["profile"] = str(profile)
    crm.setup()
    return crm


def dead_letters(crm: Crm) -> list[TupleRow]:
    return crm.execute("SELECT kind, sqlstate, constraint_name FROM cdc_worker.dead_letter ORDER BY dead_letter_id")


def told(crm: Crm) -> list[tuple[str, int | None, Any, Any]]:
    """Of each activity its type, its link, the lead that it is about, and what was not linked."""
    return [
        (a["activity_type"], a["lead_id"], a["metadata"]["lead_id"], a["metadata"].get("unlinked"))
        for a in crm.activities()
    ]


def add_lead_as(crm: Crm, name: str) -> None:
    """Add a lead in the name of somebody."""
    with crm.connection.transaction():
        shadow.act_as(crm.connection, name)
        crm.add_leads(1)


# Subjects that are gone


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key or "NO ACTION")
def test_activities_whose_subject_is_gone_are_kept_without_the_link(bare_crm: Crm, key: LiteralString) -> None:
    crm = use(bare_crm, TARGET, LEAD_KEY + key)
    crm.add_leads(60)
    crm.execute("UPDATE lead SET status = '7. lost'")
    crm.execute("DELETE FROM lead WHERE mod(lead_id, 3) = 0")
    with crm.worker("--once", log_level="debug") as worker:
        assert worker.wait() == 0

    def row(kind: str, lead: int) -> tuple[str, int | None, int, Any]:
        return (kind, lead, lead, None) if lead % 3 else (kind, None, lead, {"lead_id": lead})

    assert told(crm) == [
        *(row("lead_created", lead) for lead in range(1, 61)),
        *(row("status_changed", lead) for lead in range(1, 61)),
        *(row("lead_deleted", lead) for lead in range(3, 61, 3)),
    ]
    assert dead_letters(crm) == []
    assert sum(event["unlinked"] for event in worker.events("batch_written")) == 60
    assert sum(event["activities"] for event in worker.events("batch_written")) == 140


def test_identity_stays_beside_the_link_that_is_missing(bare_crm: Crm) -> None:
    crm = use(bare_crm, TARGET, LEAD_KEY)
    crm.add_leads(1)
    crm.execute("DELETE FROM lead")
    crm.record()
    assert crm.activities()[1]["metadata"] == {
        "lead_id": 1,
        "lead_name": "Lead 1",
        "company_name": "Company c4n4ry 1",
        "source": "website",
        "type": "exchange",
        "status": "1. lead generated",
        "bd_in_charge": "jane",
        "unlinked": {"lead_id": 1},
        "context_source": "default",
    }


def test_only_the_links_that_are_refused_are_left_out(bare_crm: Crm) -> None:
    crm = use(bare_crm, TARGET, LEAD_KEY, "ALTER TABLE activity ADD FOREIGN KEY (customer_uid) REFERENCES customer")
    crm.add_leads(3)
    for lead, customer in ((1, 71), (2, 72), (3, 73)):
        with crm.connection.transaction():
            crm.execute("INSERT INTO customer (customer_uid, name) VALUES (%s, 'Acme')", customer)
            crm.execute("UPDATE lead SET is_converted = true WHERE lead_id = %s", lead)
            crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (%s, %s)", customer, lead)
    crm.execute("DELETE FROM lead WHERE lead_id IN (1, 3)")
    crm.execute("DELETE FROM customer WHERE customer_uid IN (2, 73)")
    crm.record()
    assert [
        (a["lead_id"], a["customer_uid"], a["metadata"].get("unlinked"))
        for a in crm.activities()
        if a["activity_type"] == "lead_converted"
    ] == [(None, 71, {"lead_id": 1}), (2, 72, None), (None, None, {"lead_id": 3, "customer_uid": 73})]
    assert dead_letters(crm) == []


def test_all_columns_of_a_refused_key_are_left_out(bare_crm: Crm) -> None:
    crm = use(
        bare_crm,
        TARGET,
        "ALTER TABLE lead ADD UNIQUE (lead_id, bd_in_charge)",
        "ALTER TABLE activity ADD FOREIGN KEY (bd, lead_id) REFERENCES lead (bd_in_charge, lead_id)",
    )
    crm.add_leads(2)
    crm.execute("UPDATE lead SET bd_in_charge = 'bob' WHERE lead_id = 2")
    crm.record()
    assert [(a["lead_id"], a["bd"], a["metadata"].get("unlinked")) for a in crm.activities()] == [
        (1, "jane", None),
        (None, None, {"lead_id": 2, "bd": "jane"}),
        (2, "bob", None),
    ]


def test_a_link_is_left_out_also_where_there_is_no_metadata(bare_crm: Crm) -> None:
    without = {column: field for column, field in COLUMNS.items() if field != "metadata"}
    crm = use(bare_crm, TARGET, LEAD_KEY, "ALTER TABLE activity DROP COLUMN metadata", columns=without)
    crm.add_leads(2)
    crm.execute("DELETE FROM lead WHERE lead_id = 1")
    crm.record()
    assert [a["lead_id"] for a in crm.activities()] == [None, 2, None]
    assert crm.activities()[2]["description"] == 'Lead "Lead 1" deleted'
    assert dead_letters(crm) == []


@pytest.mark.parametrize(
    ("demand", "refusal"),
    [
        ("ALTER TABLE activity ALTER lead_id SET NOT NULL", ("refused", "23502", None)),
        (
            "ALTER TABLE activity ADD CONSTRAINT linked CHECK (num_nonnulls(lead_id, customer_uid) > 0)",
            ("refused", "23514", "linked"),
        ),
    ],
    ids=["NOT NULL", "CHECK"],
)
def test_a_row_that_must_have_a_link_and_lost_it_is_a_dead_letter(
    bare_crm: Crm, demand: LiteralString, refusal: tuple[str, str, str | None]
) -> None:
    crm = use(bare_crm, TARGET, LEAD_KEY, demand)
    crm.add_leads(100)
    crm.execute("DELETE FROM lead WHERE lead_id = 50")
    crm.add_leads(1)
    crm.record()
    assert [a["lead_id"] for a in crm.activities()] == [n for n in range(1, 102) if n != 50]
    assert dead_letters(crm) == [refusal] * 2
    assert crm.execute(
        "SELECT fields ->> 'activity_type', change -> 'old' ->> 'full_name' FROM cdc_worker.dead_letter"
    ) == [
        ("lead_created", None),
        ("lead_deleted", "Lead 50"),
    ]


def test_a_foreign_key_that_was_added_later_makes_dead_letters(bare_crm: Crm) -> None:
    """What it is about is known from the catalog, which is read at start."""
    crm = use(bare_crm, TARGET)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute(LEAD_KEY)
        with crm.connection.transaction():
            crm.add_leads(1)
            crm.execute("DELETE FROM lead")
            crm.add_leads(1)
        eventually(lambda: crm.types() == ["lead_created"])
        assert worker.terminate() == 0
    assert dead_letters(crm) == [("refused", "23503", "of_lead")] * 2


def test_a_trigger_that_links_again_makes_a_dead_letter(bare_crm: Crm) -> None:
    crm = use(
        bare_crm,
        TARGET,
        LEAD_KEY,
        "CREATE FUNCTION link() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.lead_id := NEW.metadata ->> 'lead_id'; RETURN NEW; END $$",
        "CREATE TRIGGER link BEFORE INSERT ON activity FOR EACH ROW EXECUTE FUNCTION link()",
    )
    crm.add_leads(2)
    crm.execute("DELETE FROM lead WHERE lead_id = 1")
    crm.record()
    assert [a["lead_id"] for a in crm.activities()] == [2]
    assert dead_letters(crm) == [("refused", "23503", "of_lead")] * 2


def test_links_left_out_are_no_refusals_however_many_there_are(bare_crm: Crm) -> None:
    crm = use(bare_crm, TARGET, LEAD_KEY)
    many = MAX_REFUSALS // 2 + 50
    crm.add_leads(many)
    crm.execute("DELETE FROM lead")
    crm.record()
    assert crm.types() == ["lead_created"] * many + ["lead_deleted"] * many
    assert crm.value("SELECT count(lead_id) FROM activity") == 0
    assert dead_letters(crm) == []


@contextmanager
def application(crm: Crm, seed: int) -> Iterator[None]:
    """Sessions that make, change and delete leads; whatever they are refused fails the test."""
    stop = threading.Event()
    failures: list[Exception] = []

    def act(dice: random.Random, source: str) -> None:
        mine = "lead_id IN (SELECT lead_id FROM lead WHERE source = %s ORDER BY random() LIMIT %s)"
        try:
            with psycopg.connect(crm.dsn, autocommit=True) as connection:
                while not stop.is_set():
                    with connection.transaction():
                        connection.execute(
                            "INSERT INTO lead (full_name, source, bd_in_charge, type)"
                            " SELECT 'Lead', %s, 'jane', 't' FROM generate_series(1, %s)",
                            (source, dice.choice((1, 2, 10))),
                        )
                        connection.execute(
                            f"UPDATE lead SET status = %s WHERE {mine}".encode(),
                            (f"{dice.random()}", source, dice.choice((1, 2, 5))),
                        )
                        connection.execute(
                            f"DELETE FROM lead WHERE {mine}".encode(), (source, dice.choice((0, 0, 1, 6)))
                        )
                        stop.wait(dice.random() * 0.05)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=act, args=(random.Random(f"{seed}/{n}"), f"session {n}")) for n in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []


@storm(3, chaos=15)
def test_kills_lose_and_double_nothing_where_subjects_disappear(crm: Crm, seed: int, rounds: int) -> None:
    """Row by row it is what a second worker writes to a target that setup prepared."""
    crm.execute("CREATE TABLE theirs (LIKE activity)")
    crm.execute("ALTER TABLE theirs ADD id serial, ADD UNIQUE (change_key), ALTER activity_id DROP NOT NULL")
    crm.execute(
        "ALTER TABLE theirs ADD FOREIGN KEY (lead_id) REFERENCES lead ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED"
    )
    theirs = Crm(crm.dsn, f"{crm.slot}_theirs", crm.directory)
    columns = {"bd_in_charge" if column == "bd" else column: field for column, field in COLUMNS.items()}
    use(theirs, table="theirs", columns=columns)
    dice = random.Random(seed)
    for _ in range(rounds):
        with application(crm, dice.randrange(1 << 30)), theirs.worker() as worker:
            worker.wait_for("replication_started")
            threading.Event().wait(dice.random() * 0.5)
            worker.kill()
    crm.record()
    theirs.record()
    theirs.close()
    what = "substring(change_key FROM '/.*'), activity_type, description, date_created, created_by"
    rows = crm.execute(f"SELECT {what}, metadata - 'unlinked' FROM theirs ORDER BY id".encode())  # type: ignore[arg-type]
    assert rows == crm.execute(f"SELECT {what}, metadata FROM activity ORDER BY activity_id".encode())  # type: ignore[arg-type]
    assert len(rows) > 100
    assert crm.value("SELECT count(*) FROM theirs WHERE metadata ? 'unlinked'") > 0
    assert crm.value("SELECT count(*) FROM theirs WHERE lead_id <> (metadata ->> 'lead_id')::int") == 0
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


# Beside an application that locks what it refers to


def test_what_the_application_deletes_and_has_not_committed_is_waited_for_with_nothing_locked(bare_crm: Crm) -> None:
    """Both ways: one lead is gone then, and the other stays."""
    crm = use(bare_crm, TARGET, LEAD_KEY)
    crm.add_leads(60)
    with crm.worker() as worker, psycopg.connect(crm.dsn) as one, psycopg.connect(crm.dsn) as other:
        one.execute("DELETE FROM lead WHERE lead_id = 59")
        other.execute("DELETE FROM lead WHERE lead_id = 60")
        eventually(lambda: len(worker.events("connection_lost")) > 1)
        one.execute("SELECT FROM lead WHERE lead_id < 59 FOR UPDATE")
        one.commit()
        other.rollback()
        eventually(lambda: len(crm.types()) == 61)
        assert worker.terminate() == 0
        assert {event["sqlstate"] for event in worker.events("connection_lost")} == {"55P03"}
    assert [a["lead_id"] for a in crm.activities()] == [*range(1, 59), None, 60, None]
    assert dead_letters(crm) == []


def test_in_a_deadlock_it_is_never_the_application_that_is_ended(bare_crm: Crm) -> None:
    """The worker has locked lead 1 when the application waits for it, and then wants lead 2, which the application has.

    It is the application's wait that is the first to be as long as deadlock_timeout.
    """
    crm = use(
        bare_crm,
        TARGET,
        LEAD_KEY,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.lead_id = 1 THEN PERFORM pg_sleep(1); END IF; RETURN NULL; END $$",
        "CREATE TRIGGER slow AFTER INSERT ON activity FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    database = sql.Identifier(crm.connection.info.dbname)
    crm.connection.execute(sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '3s'").format(database))
    crm.add_leads(2)
    with psycopg.connect(crm.dsn) as application, crm.worker() as worker:
        application.execute("SELECT FROM lead WHERE lead_id = 2 FOR UPDATE")
        asleep = BACKEND.format("wait_event = 'PgSleep'").encode()
        eventually(lambda: (True,) in crm.connection.execute(asleep, [f"cdc-worker {crm.slot}"]).fetchall())
        application.execute("SELECT FROM lead WHERE lead_id = 1 FOR UPDATE")
        application.commit()
        eventually(lambda: crm.types() == ["lead_created"] * 2)
        assert worker.terminate() == 0
    assert {event["sqlstate"] for event in worker.events("connection_lost")} == {"55P03"}
    assert [a["lead_id"] for a in crm.activities()] == [1, 2]


@storm(20, chaos=400)
def test_an_application_that_locks_many_leads_in_its_own_order_never_fails(
    bare_crm: Crm, seed: int, rounds: int
) -> None:
    """Its sessions lock rows from the last to the first, so that they are safe from each other; the worker doesn't."""
    crm = use(bare_crm, TARGET, LEAD_KEY + "ON DELETE SET NULL")
    crm.add_leads(100)
    failures: list[Exception] = []

    def act(dice: random.Random) -> None:
        try:
            with psycopg.connect(crm.dsn, autocommit=True) as connection:
                for _ in range(rounds):
                    with connection.transaction():
                        for lead in sorted(dice.sample(range(1, 101), 4), reverse=True):
                            connection.execute("SELECT FROM lead WHERE lead_id = %s FOR UPDATE", (lead,))
                            connection.execute(
                                "UPDATE lead SET status = %s WHERE lead_id = %s", (str(dice.random()), lead)
                            )
                        if dice.random() < 0.2:
                            connection.execute("DELETE FROM lead WHERE lead_id = %s", (lead,))
        except Exception as error:
            failures.append(error)

    dice = random.Random(seed)
    threads = [threading.Thread(target=act, args=(random.Random(dice.random()),)) for _ in range(4)]
    with crm.worker() as worker:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        crm.add_leads(1)
        eventually(lambda: crm.value("SELECT count(*) FROM activity WHERE lead_id > 100"))
        assert worker.terminate() == 0
    left = crm.value("SELECT count(*) FROM lead")
    assert crm.types().count("lead_created") == 101
    assert crm.types().count("lead_deleted") == 101 - left
    assert dead_letters(crm) == []


def test_batches_are_short_where_they_lock_rows_of_the_application(bare_crm: Crm) -> None:
    crm = use(bare_crm, TARGET, "ALTER TABLE activity ADD xact xid8 DEFAULT pg_current_xact_id()")
    count = "SELECT max(count) FROM (SELECT count(*) FROM activity GROUP BY xact) AS each"
    crm.add_leads(500)
    crm.record()
    assert crm.value(count) == 500
    crm.execute(LEAD_KEY)
    crm.add_leads(500)
    crm.execute("DELETE FROM activity")
    crm.record()
    assert crm.types() == ["lead_created"] * 500
    assert crm.value(count) == MAX_LOCKING


# Texts that are too long


def test_a_text_too_long_is_cut_with_the_whole_of_it_in_metadata(bare_crm: Crm) -> None:
    crm = use(
        bare_crm,
        TARGET,
        "CREATE DOMAIN brief AS varchar(20)",
        "CREATE DOMAIN briefer AS brief CHECK (VALUE <> '')",
        "ALTER TABLE activity ALTER activity_type TYPE char(8), ALTER description TYPE briefer,"
        " ALTER created_by TYPE varchar(5), ALTER bd TYPE varchar(1)",
    )
    add_lead_as(crm, "mária")
    crm.execute("UPDATE lead SET bd_in_charge = 'j'")
    add_lead_as(crm, "éva maria")
    crm.record()
    first, second, third = crm.activities()
    assert (first["activity_type"], first["description"], first["created_by"], first["bd"]) == (
        "lead_cr…",
        'Lead "Lead 1" creat…',
        "mária",
        "…",
    )
    assert first["metadata"]["untruncated"] == {
        "activity_type": "lead_created",
        "description": 'Lead "Lead 1" created by jane',
        "bd": "jane",
    }
    assert second["bd"] == "j"
    assert "bd" not in second["metadata"]["untruncated"]
    assert third["created_by"] == "éva …"
    assert third["metadata"]["untruncated"]["created_by"] == "éva maria"
    assert third["metadata"]["changed_by"] == "éva maria"
    assert dead_letters(crm) == []


def test_a_row_whose_texts_fit_says_nothing_of_it(bare_crm: Crm) -> None:
    crm = use(bare_crm, TARGET, "ALTER TABLE activity ALTER bd TYPE varchar(1)")
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")  # which has no bd
    crm.record()
    (activity,) = crm.activities()
    assert activity["bd"] is None
    assert activity["metadata"] == {
        "customer_uid": 1,
        "customer_name": "Acme",
        "type": None,
        "context_source": "default",
    }


def test_of_two_columns_with_one_text_only_the_short_one_is_cut(bare_crm: Crm) -> None:
    columns = {**COLUMNS, "subject": "description"}
    crm = use(bare_crm, TARGET, "ALTER TABLE activity ADD subject varchar(6)", columns=columns)
    crm.add_leads(1)
    crm.record()
    (activity,) = crm.activities()
    assert (activity["subject"], activity["description"]) == ("Lead …", 'Lead "Lead 1" created by jane')
    assert activity["metadata"]["untruncated"] == {"subject": 'Lead "Lead 1" created by jane'}


def test_a_text_too_long_for_a_prepared_target_is_cut_as_well(crm: Crm) -> None:
    add_lead_as(crm, "x" * 51)
    crm.record()
    (activity,) = crm.activities()
    assert activity["created_by"] == "x" * 49 + "…"
    assert activity["metadata"]["untruncated"] == {"created_by": "x" * 51}


def test_a_text_too_long_is_a_dead_letter_where_there_is_no_metadata_to_keep_it(bare_crm: Crm) -> None:
    without = {column: field for column, field in COLUMNS.items() if field != "metadata"}
    crm = use(bare_crm, TARGET, "ALTER TABLE activity ALTER created_by TYPE varchar(6)", columns=without)
    add_lead_as(crm, "mallory")
    crm.add_leads(1)
    crm.record()
    assert crm.types() == ["lead_created"]
    assert dead_letters(crm) == [("refused", "22001", None)]
    assert crm.value("SELECT fields ->> 'created_by' FROM cdc_worker.dead_letter") == "mallory"


def test_a_key_is_never_cut(bare_crm: Crm) -> None:
    """Two of them could become one."""
    crm = use(bare_crm, TARGET, "ALTER TABLE activity ALTER change_key TYPE varchar(20)")
    crm.add_leads(2)
    crm.record()
    assert crm.types() == []
    assert dead_letters(crm) == [("refused", "22001", None)] * 2


# Row security


def secure(crm: Crm, *statements: LiteralString) -> str:
    """Enable row security on the target, and let a role without rights of its own be the worker's."""
    role = f"cdc_{crm.slot}"
    name = sql.Identifier(role)
    grant(crm, role)
    for statement in ("ALTER TABLE activity ENABLE ROW LEVEL SECURITY", *statements):
        crm.connection.execute(sql.SQL(statement).format(role=name))
    # As old applications want it.
    crm.connection.execute(sql.SQL("ALTER ROLE {} SET standard_conforming_strings = off").format(name))
    return role


@pytest.fixture
def secured(crm: Crm) -> Iterator[Crm]:
    """A target with row security, and a role that may add and see rows."""
    role = secure(
        crm,
        "CREATE POLICY add ON activity FOR INSERT TO {role} WITH CHECK (metadata ->> 'lead_name' <> 'poison')",
        "CREATE POLICY see ON activity FOR SELECT TO {role} USING (true)",
    )
    yield crm
    crm.connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


def test_row_security_lets_rows_through_as_they_are(secured: Crm) -> None:
    name = 'O\'Neil \\ "x"\n\t\\N é'
    secured.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES (%s, 's', E'a\\\\''b', 't')", name)
    secured.add_leads(300)
    secured.record()
    first, *rest = secured.activities()
    assert first["description"] == f'Lead "{name}" created by a\\\'b'
    assert first["bd_in_charge"] == "a\\'b"
    assert first["metadata"]["lead_name"] == name
    assert first["metadata"]["status"] is None
    assert (first["customer_uid"], first["is_visible_to_bd"]) == (None, True)
    assert [a["lead_id"] for a in rest] == list(range(2, 302))
    assert dead_letters(secured) == []


def test_a_row_that_a_policy_refuses_is_a_dead_letter(secured: Crm) -> None:
    with secured.connection.transaction():
        secured.add_leads(200)
        secured.execute(POISON)
        secured.add_leads(99)
    secured.record()
    assert secured.types() == ["lead_created"] * 299
    assert dead_letters(secured) == [("refused", "42501", None)]
    assert (
        secured.value("SELECT fields ->> 'description' FROM cdc_worker.dead_letter") == 'Lead "poison" created by jane'
    )


def test_a_policy_that_refuses_every_row_stops_the_worker(secured: Crm) -> None:
    secured.execute("ALTER POLICY add ON activity WITH CHECK (false)")
    secured.add_leads(MAX_REFUSALS + 200)
    done = secured.command("run", "--once")
    assert done.returncode == 22
    assert "42501" in done.stderr


def test_a_grant_that_is_missing_is_not_about_a_row(secured: Crm) -> None:
    """It has the same SQLSTATE as a policy's refusal."""
    role = sql.Identifier(f"cdc_{secured.slot}")
    secured.add_leads(2)
    with secured.worker() as worker:
        eventually(lambda: len(secured.types()) == 2)
        secured.connection.execute(sql.SQL("REVOKE INSERT ON activity FROM {}").format(role))
        secured.add_leads(2)
        assert worker.wait() == 21
    assert dead_letters(secured) == []
    secured.connection.execute(sql.SQL("GRANT INSERT ON activity TO {}").format(role))
    secured.record()
    assert secured.types() == ["lead_created"] * 4


def test_dead_letters_of_rules_are_written_beside_inserted_rows(secured: Crm) -> None:
    secured.add_leads(2)
    secured.execute("ALTER TABLE lead REPLICA IDENTITY DEFAULT")
    secured.execute("UPDATE lead SET status = '7. lost' WHERE lead_id = 1")
    secured.execute("ALTER TABLE lead REPLICA IDENTITY FULL")
    secured.record()
    assert secured.types() == ["lead_created"] * 2
    assert dead_letters(secured) == [("old_values_unknown", None, None)]


def test_what_is_inserted_under_row_security_is_fenced(secured: Crm) -> None:
    with secured.worker() as worker:
        worker.wait_for("replication_started")
        secured.execute("UPDATE cdc_worker.checkpoint SET owner = gen_random_uuid()")
        secured.add_leads(1)
        assert worker.wait() == 18
    assert secured.types() == []
    secured.record()
    assert secured.types() == ["lead_created"]


def test_what_is_there_already_is_done_already_under_row_security(secured: Crm) -> None:
    secured.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", secured.slot, f"{secured.slot}_again")
    position = secured.value("SELECT lsn::text FROM cdc_worker.checkpoint")
    secured.add_leads(100)
    secured.record()
    secured.execute("UPDATE cdc_worker.checkpoint SET lsn = %s::pg_lsn, slot = slot || '_again'", position)
    secured.add_leads(1)
    secured.record(slot=f"{secured.slot}_again", name=secured.slot)
    assert [a["lead_id"] for a in secured.activities()] == list(range(1, 102))
    assert dead_letters(secured) == []


def test_row_security_that_is_forced_holds_for_the_owner_too(secured: Crm) -> None:
    role = sql.Identifier(f"cdc_{secured.slot}")
    secured.connection.execute(sql.SQL("ALTER TABLE activity OWNER TO {}").format(role))
    secured.execute(POISON)
    secured.record()
    assert secured.types() == ["lead_created"], "an owner is free of it"
    secured.execute("ALTER TABLE activity FORCE ROW LEVEL SECURITY")
    secured.execute(POISON)
    secured.add_leads(1)
    secured.record()
    assert secured.types() == ["lead_created"] * 2
    assert dead_letters(secured) == [("refused", "42501", None)]
    secured.execute("ALTER TABLE activity OWNER TO postgres")


def test_a_missing_subject_and_a_text_too_long_meet_row_security(secured: Crm) -> None:
    secured.execute("ALTER TABLE activity ADD FOREIGN KEY (lead_id) REFERENCES lead")
    with secured.connection.transaction():
        shadow.act_as(secured.connection, "x" * 51)
        secured.add_leads(30)
        secured.execute("DELETE FROM lead WHERE lead_id = 20")
        secured.execute(POISON)
    secured.record()
    assert [a["lead_id"] for a in secured.activities()] == [*range(1, 20), None, *range(21, 31), None]
    gone = secured.activities()[19]
    assert gone["created_by"] == "x" * 49 + "…"
    assert gone["metadata"]["unlinked"] == {"lead_id": 20}
    assert gone["metadata"]["untruncated"] == {"created_by": "x" * 51}
    assert dead_letters(secured) == [("refused", "42501", None)]


# Anything else


@pytest.mark.parametrize(
    ("demand", "sqlstate", "constraint"),
    [
        ("ALTER TABLE activity ADD hours integer NOT NULL", "23502", None),
        ("ALTER TABLE activity ADD CONSTRAINT kind CHECK (activity_type IN ('call', 'mail'))", "23514", "kind"),
        ("ALTER TABLE activity ADD CONSTRAINT once UNIQUE (bd)", "23505", "once"),
        ("ALTER TABLE activity ADD CONSTRAINT once UNIQUE (bd) DEFERRABLE INITIALLY DEFERRED", "23505", "once"),
        ("ALTER TABLE activity ADD CONSTRAINT once EXCLUDE (bd WITH =)", "23P01", "once"),
        (
            "ALTER TABLE activity ALTER activity_type TYPE \"char\" USING 'c', ALTER bd TYPE integer USING 0",
            "22P02",
            None,
        ),
    ],
    ids=["NOT NULL", "CHECK", "UNIQUE", "UNIQUE, deferred", "EXCLUDE", "type"],
)
def test_what_else_a_target_asks_makes_dead_letters_and_the_stream_goes_on(
    bare_crm: Crm, demand: LiteralString, sqlstate: str, constraint: str | None
) -> None:
    crm = use(bare_crm, TARGET, "INSERT INTO activity (activity_type, date_created, bd) VALUES ('call', now(), 'jane')")
    crm.execute("DELETE FROM activity" if "hours" in demand else "SELECT 1")
    crm.execute(demand)
    crm.add_leads(3)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    crm.record()
    refused = dead_letters(crm)
    assert refused[:3] == [("refused", sqlstate, constraint)] * 3
    assert len(refused) + len(crm.types()) == 4
    assert crm.value(
        "SELECT bool_and(fields ->> 'bd' = 'jane') FROM cdc_worker.dead_letter WHERE constraint_name = 'once'"
    ) in (True, None)
    crm.execute("DROP TABLE activity CASCADE")
    crm.execute(TARGET)
    crm.add_leads(1)
    crm.record()
    assert crm.types() == ["lead_created"]


def test_names_are_as_the_profile_has_them(bare_crm: Crm) -> None:
    columns = {f'{column} "of" Theirs': field for column, field in COLUMNS.items()}
    crm = bare_crm
    crm.execute(TARGET)
    crm.execute('CREATE SCHEMA "Their Sales"')
    crm.execute('ALTER TABLE activity SET SCHEMA "Their Sales"')
    crm.execute('ALTER TABLE "Their Sales".activity RENAME TO "Log, of Activities"')
    table = sql.Identifier("Their Sales", "Log, of Activities")
    for old, new in zip(COLUMNS, columns, strict=True):
        rename = sql.SQL("ALTER TABLE {} RENAME {} TO {}")
        crm.connection.execute(rename.format(table, sql.Identifier(old), sql.Identifier(new)))
    link = sql.Identifier('lead_id "of" Theirs')
    crm.connection.execute(sql.SQL("ALTER TABLE {} ADD FOREIGN KEY ({}) REFERENCES lead").format(table, link))
    escaped = {column.replace('"', '\\"'): field for column, field in columns.items()}
    use(crm, table="Their Sales.Log, of Activities", columns=escaped)
    crm.add_leads(2)
    crm.execute("DELETE FROM lead WHERE lead_id = 1")
    crm.record()
    metadata = sql.Identifier('metadata "of" Theirs')
    rows = crm.connection.execute(
        sql.SQL("SELECT {}, {} -> 'unlinked' FROM {}").format(link, metadata, table)
    ).fetchall()
    gone = {'lead_id "of" Theirs': 1}
    assert rows == [(None, gone), (2, None), (None, gone)]


# What a target costs that asks for nothing


def writing(crm: Crm) -> str:
    """What the worker sends for a batch, seen while a lock holds it up."""
    with crm.worker() as worker, psycopg.connect(crm.dsn) as locker:
        worker.wait_for("replication_started")
        locker.execute("LOCK TABLE activity")
        crm.add_leads(MAX_AT_ONCE + 1)
        name = [f"cdc-worker {crm.slot}"]
        held_up = BACKEND.format("wait_event_type = 'Lock'").encode()
        eventually(lambda: crm.connection.execute(held_up, name).fetchall() == [(True,)])
        # Asked only now: the server takes a session's query and its wait at two moments, so that a look at both
        # may find the wait beside the query before it.
        ((query,),) = crm.connection.execute(BACKEND.format("query").encode(), name).fetchall()
        locker.rollback()
        eventually(lambda: len(crm.types()) == MAX_AT_ONCE + 1)
        assert worker.terminate() == 0
    return str(query)


def test_a_prepared_target_is_written_with_one_message_and_only_its_patience_is_set(crm: Crm) -> None:
    assert re.fullmatch(
        r'BEGIN; LOCK TABLE ONLY "public"\."activity" IN ROW EXCLUSIVE MODE; UPDATE cdc_worker\.checkpoint SET [^;]+;'
        r' SET LOCAL lock_timeout = 20; COPY "public"\."activity" \([^;]+\) FROM STDIN; COMMIT',
        writing(crm),
    )


def test_deferrable_constraints_are_made_immediate(bare_crm: Crm) -> None:
    """So that the server names the row it refuses; it costs no round trip."""
    use(bare_crm, TARGET, "ALTER TABLE activity ADD UNIQUE (lead_id, activity_id) DEFERRABLE INITIALLY DEFERRED")
    begin = r"BEGIN; LOCK [^;]+; SET CONSTRAINTS ALL IMMEDIATE; UPDATE "
    assert re.match(rf"{begin}.*FROM STDIN; COMMIT$", writing(bare_crm))
