"""A target that gets no column for change keys, and whose foreign keys are deferred: Sales Cookbook's."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from doctoring import findings, healthy, mend
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support import Crm, eventually, storm

from cdc_worker.sink import MAX_LOCKING

TABLES = (Path(__file__).parent / "sales_cookbook.sql").read_bytes()

PROFILE = """
name = "cookbook"

[target]
table = "core_interactionlog"

[target.columns]
type = "type"
summary = "description"
timestamp = "occurred_at"
user_id = "user"
lead_id = "lead"
organization_id = "organization"

[tables.core_lead]
identity = { lead_id = "{row.id}" }
fields = { user = "{row.assigned_to_id}", lead = "{row.id}", organization = "{row.organization_id}" }

[[tables.core_lead.rules]]
name = "created"
on = "insert"
type = "note"
description = "created {new.name}"

[[tables.core_lead.rules]]
name = "status"
on = "update"
changed = "status"
type = "note"
description = "{new.name} is {new.status}"

[[tables.core_lead.rules]]
name = "deleted"
on = "delete"
type = "note"
description = "deleted {old.name}"
"""


def use(crm: Crm, *statements: LiteralString, profile: str = PROFILE) -> Crm:
    """Let the worker write to Sales Cookbook's log as these statements leave it."""
    crm.connection.execute(TABLES)
    crm.execute("INSERT INTO core_organization (id, name, created_at) VALUES (1, 'Cooks', now())")
    crm.execute(
        "INSERT INTO core_user (id, password, is_superuser, username, first_name, last_name, email, is_staff,"
        " is_active, date_joined, organization_id) SELECT n, '', false, 'user' || n, '', '', '', false, true, now(), 1"
        " FROM generate_series(1, 3) n"
    )
    for statement in statements:
        crm.execute(statement)
    path = crm.directory / "cookbook.toml"
    path.write_text(profile, "utf-8")
    crm.settings["profile"] = str(path)
    crm.setup()
    return crm


@pytest.fixture
def cookbook(bare_crm: Crm) -> Crm:
    return use(bare_crm)


def add_leads(crm: Crm, count: int, *, user: int = 1) -> None:
    """Insert leads in one statement."""
    crm.execute(
        "INSERT INTO core_lead (name, email, phone, company, status, source, created_at, updated_at, assigned_to_id,"
        " organization_id) SELECT 'Lead ' || n, '', '', '', 'new', 'web', now(), now(), %s, 1"
        " FROM generate_series(1, %s) n",
        user,
        count,
    )


def logged(crm: Crm) -> list[tuple[str, int, int | None]]:
    """Of each row that is there its summary and links, in order."""
    rows = crm.execute("SELECT summary, user_id, lead_id FROM core_interactionlog ORDER BY id")
    return [(summary, user, lead) for summary, user, lead in rows]


def unkeyed(crm: Crm) -> int:
    """Rows without a key and keys without a row."""
    return int(
        crm.value(
            "SELECT count(*) FROM core_interactionlog l FULL JOIN cdc_worker.written_key k"
            " ON row_id = id AND table_name = 'public.core_interactionlog' WHERE id IS NULL OR change_key IS NULL"
        )
    )


def keep_place(crm: Crm) -> None:
    """Note where checkpoint and slot are."""
    crm.execute("CREATE TABLE kept AS SELECT lsn, commit_lsn, changes FROM cdc_worker.checkpoint")
    crm.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", crm.slot, f"{crm.slot}_kept")


def go_back(crm: Crm) -> None:
    """Set checkpoint and slot to where they were, as a restore of both would."""
    crm.execute("SELECT pg_drop_replication_slot(%s)", crm.slot)
    crm.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", f"{crm.slot}_kept", crm.slot)
    crm.execute("UPDATE cdc_worker.checkpoint SET (lsn, commit_lsn, changes) = (SELECT kept.* FROM kept)")


# Exactly once


def test_a_row_and_its_key_are_written_together(cookbook: Crm) -> None:
    cookbook.execute(
        "INSERT INTO core_interactionlog (type, summary, timestamp, user_id) VALUES ('call', 'x', now(), 1)"
    )
    add_leads(cookbook, 2)
    cookbook.execute("UPDATE core_lead SET status = 'contacted' WHERE id = 2")
    cookbook.record()
    assert logged(cookbook) == [
        ("x", 1, None),
        ("created Lead 1", 1, 1),
        ("created Lead 2", 1, 2),
        ("Lead 2 is contacted", 1, 2),
    ]
    keys = cookbook.execute("SELECT change_key, table_name, row_id FROM cdc_worker.written_key ORDER BY row_id")
    assert [(key.split("/", 3)[3], table, row) for key, table, row in keys] == [
        ("public.core_lead/0/created", "public.core_interactionlog", 2),
        ("public.core_lead/1/created", "public.core_interactionlog", 3),
        ("public.core_lead/0/status", "public.core_interactionlog", 4),
    ]


@pytest.mark.parametrize(
    "change",
    [
        "SELECT",
        "ALTER TABLE core_interactionlog DROP CONSTRAINT {0}, DROP CONSTRAINT {1}, DROP CONSTRAINT {2}",
        "ALTER TABLE core_interactionlog ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        "ALTER TABLE core_interactionlog DROP id, ADD id uuid PRIMARY KEY DEFAULT gen_random_uuid()",
        "ALTER TABLE core_interactionlog ALTER id SET GENERATED ALWAYS",
        "ALTER TABLE core_interactionlog DROP id, ADD id serial PRIMARY KEY",
        "ALTER TABLE core_interactionlog DROP id, ADD id serial PRIMARY KEY; CREATE SEQUENCE theirs;"
        " ALTER TABLE core_interactionlog ALTER id SET DEFAULT nextval('theirs') * 10 /* numbers of their own */",
    ],
    ids=[
        *("as it is", "without foreign keys", "with row security", "without numbers"),
        *("GENERATED ALWAYS", "serial", "other numbers"),
    ],
)
def test_what_is_read_again_from_an_earlier_position_is_known(bare_crm: Crm, change: str) -> None:
    crm = use(bare_crm)
    keys = [f"core_interactionlog_{name}_id_fkey" for name in ("user", "lead", "organization")]
    crm.connection.execute(change.format(*keys).encode())
    if "ROW LEVEL" in change:
        crm.execute("CREATE POLICY everything ON core_interactionlog USING (true)")
        crm.execute("CREATE ROLE django LOGIN REPLICATION IN ROLE pg_read_all_data, pg_write_all_data")
        crm.execute("GRANT USAGE ON SCHEMA cdc_worker TO django")
        crm.execute("GRANT USAGE ON SEQUENCE core_interactionlog_id_seq TO django")
        crm.settings["dsn"] = make_conninfo(crm.dsn, user="django")
    try:
        add_leads(crm, 40)
        keep_place(crm)
        crm.record()
        written = crm.execute("SELECT summary FROM core_interactionlog")
        assert len(written) == 40
        crm.execute("UPDATE core_lead SET status = 'lost' WHERE id = 7")
        go_back(crm)
        with crm.worker("--once", log_level="debug") as worker:
            assert worker.wait() == 0
        assert sum(event["already_there"] for event in worker.events("batch_written")) == 40
        now = crm.execute("SELECT summary FROM core_interactionlog")
        assert sorted(now) == sorted([*written, ("Lead 7 is lost",)])
        assert crm.value("SELECT count(*) FROM cdc_worker.written_key") == 41
        assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0
        numbered = crm.value("SELECT count(row_id) FROM cdc_worker.written_key")
        assert numbered == (0 if "uuid" in change or "their own" in change else 41)
    finally:
        if crm.settings.pop("dsn", None):
            crm.execute("DROP OWNED BY django CASCADE")
            crm.execute("DROP ROLE django")


@storm(2, chaos=30)
def test_kills_lose_and_double_nothing(cookbook: Crm, seed: int, rounds: int) -> None:
    stop = threading.Event()
    failures: list[Exception] = []
    done = [0, 0, 0]

    def act(session: int) -> None:
        try:
            with psycopg.connect(cookbook.dsn, autocommit=True) as connection:
                while not stop.is_set():
                    with connection.transaction():
                        ((lead,),) = connection.execute(
                            "INSERT INTO core_lead (name, email, phone, company, status, source, created_at,"
                            " updated_at, assigned_to_id) VALUES (%s, '', '', '', 'new', '', now(), now(), %s)"
                            " RETURNING id",
                            (f"{session}.{done[session]}", session + 1),
                        )
                        connection.execute("UPDATE core_lead SET status = 'won' WHERE id = %s", (lead,))
                    connection.execute("UPDATE core_lead SET status = 'lost' WHERE id = %s", (lead,))
                    done[session] += 1
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=act, args=(session,)) for session in range(3)]
    for thread in threads:
        thread.start()
    dice = random.Random(seed)
    for _ in range(rounds):
        with cookbook.worker() as worker:
            worker.wait_for("replication_started")
            threading.Event().wait(dice.random() * 0.5)
            worker.kill()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    cookbook.record()
    names = [f"{session}.{turn}" for session in range(3) for turn in range(done[session])]
    told = sorted(summary for summary, _, _ in logged(cookbook))
    assert told == sorted(text for name in names for text in (f"created {name}", f"{name} is won", f"{name} is lost"))
    assert len(told) > 100
    assert unkeyed(cookbook) == 0


def test_a_row_that_is_refused_leaves_no_key(cookbook: Crm) -> None:
    cookbook.execute("ALTER TABLE core_interactionlog ADD CHECK (summary NOT LIKE '%%3%%')")
    add_leads(cookbook, 5)
    cookbook.record()
    assert [summary for summary, _, _ in logged(cookbook)] == [f"created Lead {n}" for n in (1, 2, 4, 5)]
    assert unkeyed(cookbook) == 0
    assert cookbook.execute("SELECT kind, sqlstate FROM cdc_worker.dead_letter") == [("refused", "23514")]


def test_keys_are_found_again_whatever_a_table_is_called(bare_crm: Crm) -> None:
    crm = use(
        bare_crm,
        """CREATE TABLE "a ""quoted"" \\lead" (LIKE core_lead INCLUDING ALL)""",
        profile=PROFILE.replace("tables.core_lead", "tables.'a \"quoted\" \\lead'"),
    )
    insert = """
        INSERT INTO "a ""quoted"" \\lead"
            (name, email, phone, company, status, source, created_at, updated_at, assigned_to_id)
        VALUES ('Ada', '', '', '', '', '', now(), now(), 1)"""
    crm.execute(insert)
    keep_place(crm)
    crm.record()
    go_back(crm)
    crm.record()
    assert [summary for summary, _, _ in logged(crm)] == ["created Ada"]
    assert unkeyed(crm) == 0


# Foreign keys that are deferred


def test_a_link_whose_row_is_gone_is_left_out(cookbook: Crm) -> None:
    add_leads(cookbook, 3)
    cookbook.execute("DELETE FROM core_lead WHERE id = 2")
    cookbook.execute("UPDATE core_lead SET organization_id = NULL")
    cookbook.execute("UPDATE core_user SET organization_id = NULL")
    cookbook.execute("DELETE FROM core_organization")
    cookbook.record()
    assert logged(cookbook) == [
        ("created Lead 1", 1, 1),
        ("created Lead 2", 1, None),
        ("created Lead 3", 1, 3),
        ("deleted Lead 2", 1, None),
    ]
    assert cookbook.value("SELECT count(organization_id) FROM core_interactionlog") == 0
    assert cookbook.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0
    assert unkeyed(cookbook) == 0


def test_a_row_whose_user_is_gone_is_a_dead_letter_for_it_must_have_one(cookbook: Crm) -> None:
    add_leads(cookbook, 1, user=1)
    add_leads(cookbook, 1, user=2)
    cookbook.execute("UPDATE core_lead SET assigned_to_id = NULL WHERE assigned_to_id = 2")
    cookbook.execute("DELETE FROM core_user WHERE id = 2")
    cookbook.record()
    assert logged(cookbook) == [("created Lead 1", 1, 1)]
    assert cookbook.execute("SELECT kind, sqlstate FROM cdc_worker.dead_letter") == [("refused", "23502")]


def test_batches_are_short_for_each_row_locks_rows_of_the_application(bare_crm: Crm) -> None:
    crm = use(bare_crm, "ALTER TABLE core_interactionlog ADD xact xid8 DEFAULT pg_current_xact_id()")
    add_leads(crm, 100)
    crm.record()
    each = crm.execute("SELECT count(*) FROM core_interactionlog GROUP BY xact")
    assert max(count for (count,) in each) <= MAX_LOCKING


def test_in_a_deadlock_it_is_never_the_application_that_is_ended(bare_crm: Crm) -> None:
    """The worker has locked user 1 when the application waits for it, and then wants user 2, which that has."""
    crm = use(
        bare_crm,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.user_id = 1 THEN PERFORM pg_sleep(1); END IF; RETURN NULL; END $$",
        "CREATE TRIGGER slow AFTER INSERT ON core_interactionlog FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    database = sql.Identifier(crm.connection.info.dbname)
    crm.connection.execute(sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '3s'").format(database))
    add_leads(crm, 1, user=1)
    add_leads(crm, 1, user=2)
    with psycopg.connect(crm.dsn) as application, crm.worker() as worker:
        application.execute("SELECT FROM core_user WHERE id = 2 FOR UPDATE")
        asleep = "SELECT wait_event FROM pg_stat_activity WHERE application_name = %s AND wait_event = 'PgSleep'"
        eventually(lambda: crm.execute(asleep, f"cdc-worker {crm.slot}"))
        application.execute("SELECT FROM core_user WHERE id = 1 FOR UPDATE")
        application.commit()
        eventually(lambda: len(logged(crm)) == 2)
        assert worker.terminate() == 0
    assert {event["sqlstate"] for event in worker.events("connection_lost")} == {"55P03"}
    assert unkeyed(crm) == 0


# What else must know whose rows they are


def test_the_workers_role_needs_the_keys_and_the_numbers(cookbook: Crm) -> None:
    said = cookbook.succeed("setup", "--role", "cdc").splitlines()
    assert "the worker's role has its grants on the worker's own tables" in said
    try:
        cookbook.settings["dsn"] = make_conninfo(cookbook.dsn, user="cdc")
        add_leads(cookbook, 3)
        cookbook.record()
        assert unkeyed(cookbook) == 0
        cookbook.execute("REVOKE USAGE ON SEQUENCE core_interactionlog_id_seq FROM cdc")
        cookbook.execute("REVOKE INSERT ON cdc_worker.written_key FROM cdc")
        lacking = "SELECT, INSERT ON cdc_worker.written_key, USAGE ON SEQUENCE core_interactionlog_id_seq"
        assert f'role "cdc" lacks {lacking}\n' in cookbook.command("run", "--once").stderr
    finally:
        del cookbook.settings["dsn"]
        cookbook.execute("DROP OWNED BY cdc CASCADE")
        cookbook.execute("DROP ROLE cdc")


def test_without_the_table_of_keys_the_worker_does_not_begin(cookbook: Crm) -> None:
    cookbook.execute("DROP TABLE cdc_worker.written_key")
    said = cookbook.command("run", "--once").stderr
    assert "public.core_interactionlog has no column for change keys, and there is no table for them" in said


def test_the_doctor_asks_nothing_of_keys_that_have_a_table(cookbook: Crm) -> None:
    (found,) = findings(cookbook, "target_key")
    assert (found.outcome, found.message) == (
        "ok",
        "keys have a table of their own, and nothing that the worker writes has to be unique",
    )
    cookbook.execute("CREATE UNIQUE INDEX once ON core_interactionlog (lead_id)")
    (found,) = findings(cookbook, "target_key")
    assert (found.outcome, found.fix) == ("warning", "as its owner: DROP INDEX public.once")


def test_the_doctor_knows_the_workers_rows_by_their_keys(bare_crm: Crm) -> None:
    constants = '[target.constants]\nkind = "system"\n\n'
    profile = PROFILE.replace("[tables.core_lead]", f"{constants}[tables.core_lead]")
    crm = use(bare_crm, "ALTER TABLE core_interactionlog ADD kind text", profile=profile)
    add_leads(crm, 3)
    crm.record()
    assert healthy(crm, "other_writers")
    crm.execute(
        "INSERT INTO core_interactionlog (type, summary, timestamp, user_id, kind)"
        " VALUES ('note', 'x', now(), 1, 'system')"
    )
    (found,) = findings(crm, "other_writers")
    assert found.message.startswith("1 of the newest 10,000 rows of core_interactionlog look like the worker's, and")
    mend(crm, found.fix or "")
    assert len(logged(crm)) == 3
    assert healthy(crm, "other_writers")


def test_a_person_is_forgotten_in_the_workers_rows_alone(cookbook: Crm) -> None:
    add_leads(cookbook, 2)
    cookbook.execute(
        "INSERT INTO core_interactionlog (type, summary, timestamp, user_id, lead_id) VALUES ('call', 'x', now(), 1, 1)"
    )
    cookbook.record()
    said = cookbook.succeed("forget", "--lead", "1", "--yes").splitlines()
    assert said[1:3] == [
        "1 of their activities and 0 of their dead letters were blanked",
        "1 of their activities are the application's, and left to it",
    ]
    assert logged(cookbook) == [("x", 1, 1), ("", 1, 1), ("created Lead 2", 1, 2)]


def test_who_the_rows_belong_to_can_not_be_told_without_numbers(cookbook: Crm) -> None:
    cookbook.execute("ALTER TABLE core_interactionlog DROP id, ADD id uuid PRIMARY KEY DEFAULT gen_random_uuid()")
    done = cookbook.command("forget", "--lead", "1", "--yes")
    assert "which rows of core_interactionlog are the worker's can't be told" in done.stderr
    assert cookbook.value("SELECT count(*) FROM cdc_worker.erased") == 0


# What the profile says of columns


def test_texts_are_cut_at_the_length_that_the_profile_gives(bare_crm: Crm) -> None:
    profile = PROFILE.replace("[target.columns]", "lengths = { summary = 12 }\n\n[target.columns]")
    crm = use(bare_crm, "ALTER TABLE core_lead ALTER assigned_to_id SET NOT NULL", profile=profile)
    add_leads(crm, 1)
    crm.execute("UPDATE core_lead SET name = 'x', status = 'won'")
    crm.record()
    assert [summary for summary, _, _ in logged(crm)] == ["created Lea…", "x is won"]
    (found,) = findings(crm, "target")
    assert found.message.endswith("; texts too long for summary are cut")


def test_metadata_has_the_whole_of_what_is_cut(bare_crm: Crm) -> None:
    columns = 'lengths = { summary = 12 }\n\n[target.columns]\nmetadata = "metadata"'
    profile = PROFILE.replace("[target.columns]", columns)
    crm = use(bare_crm, "ALTER TABLE core_interactionlog ADD metadata jsonb", profile=profile)
    add_leads(crm, 1)
    crm.record()
    assert crm.value("SELECT metadata -> 'untruncated' FROM core_interactionlog") == {"summary": "created Lead 1"}


def test_timestamps_without_a_zone_are_in_the_profiles_unless_the_settings_name_another(bare_crm: Crm) -> None:
    profile = PROFILE.replace("[target.columns]", 'time_zone = "Asia/Tokyo"\n\n[target.columns]')
    crm = use(bare_crm, "ALTER TABLE core_interactionlog ALTER timestamp TYPE timestamp", profile=profile)
    add_leads(crm, 1)
    crm.record()
    add_leads(crm, 1)
    crm.record(time_zone="America/Lima")
    offsets = crm.execute(
        "SELECT round(extract(epoch FROM timestamp - now() AT TIME ZONE 'UTC') / 3600)::int"
        " FROM core_interactionlog ORDER BY id"
    )
    assert offsets == [(9,), (-5,)]


def test_a_time_zone_that_there_is_not_is_a_fault_of_the_profile(cookbook: Crm) -> None:
    path = cookbook.directory / "cookbook.toml"
    path.write_text(PROFILE.replace("[target.columns]", 'time_zone = "Mars"\n\n[target.columns]'), "utf-8")
    said = cookbook.command("run", "--once").stderr
    assert """the target's time zone: "Mars" is not the name of a time zone such as Europe/Berlin""" in said
