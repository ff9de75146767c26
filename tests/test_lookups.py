"""Rows of other tables that rules look up: from the stream where it has told them, from the database else."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import LiteralString
from unittest import mock

import psycopg
import pytest
from doctoring import ailing, mend
from support import Crm, WorkerProcess, eventually, having, role

from cdc_worker.cluster import Cluster
from cdc_worker.config import load
from cdc_worker.lookups import fetch, visible
from cdc_worker.postgres import connect_reading
from cdc_worker.profile import load as load_profile
from cdc_worker.profile import parse
from cdc_worker.rules import Lookup, compile_rules
from cdc_worker.stop import Stop
from cdc_worker.worker import Worker

PROFILE = """
name = "test"

[target]
table = "activity"
columns.activity_type = "type"
columns.description = "description"
columns.metadata = "metadata"
columns.date_created = "occurred_at"
columns.change_key = "change_key"
constants = { activity_category = "system" }

[tables.task]
key = "task_id"
lookups.person = { table = "person", match = { person_id = "person_id" } }
lookups.team = { table = "team", match = { team_id = "lookup.person.team_id" } }
lookups.head = { table = "person", match = { team_id = "lookup.person.team_id" }, where = { is_head = true } }

[[tables.task.rules]]
on = ["insert", "delete"]
type = "task"
description = [
    "{row.title} for {lookup.person.name or 'nobody'} of {lookup.team.name or 'no team'}",
    " under {lookup.head.name or 'no head'}",
]
metadata = { team = "{lookup.team.team_id}", rate = "{lookup.person.rate}" }

[tables.person]
key = "person_id"
"""

TABLES: LiteralString = """
CREATE TABLE team (team_id bigint PRIMARY KEY, name text NOT NULL);
CREATE TABLE person (
    person_id integer PRIMARY KEY, name text NOT NULL, team_id bigint, is_head boolean NOT NULL DEFAULT false,
    rate numeric(10,2), since timestamptz DEFAULT '2001-02-03 04:05:06+09');
CREATE TABLE task (
    task_id serial PRIMARY KEY, title text NOT NULL,
    person_id integer REFERENCES person DEFERRABLE INITIALLY DEFERRED);
ALTER TABLE task REPLICA IDENTITY FULL;
ALTER TABLE person REPLICA IDENTITY FULL;
INSERT INTO team VALUES (1, 'sales'), (2, 'support');
INSERT INTO person VALUES (1, 'jane', 1, true, 10.50), (2, 'joe', 1, false, NULL), (3, 'ann', 2, true, NULL),
    (4, 'bob', NULL, false, NULL);
"""


def looking_crm(crm: Crm, tmp_path: Path) -> Crm:
    """A database whose profile looks rows up."""
    crm.execute(TABLES)
    path = tmp_path / "profile.toml"
    path.write_text(PROFILE, "utf-8")
    crm.settings["profile"] = str(path)
    crm.setup()
    return crm


@pytest.fixture
def looking(crm: Crm, tmp_path: Path) -> Crm:
    return looking_crm(crm, tmp_path)


def told(crm: Crm) -> list[str]:
    """What the activities say."""
    return [activity["description"] for activity in crm.activities()]


def add(crm: Crm, title: str, person: int | None) -> None:
    crm.execute("INSERT INTO task (title, person_id) VALUES (%s, %s)", title, person)


def test_a_lookup_follows_keys_through_tables(looking: Crm) -> None:
    for title, person in (("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", None)):
        add(looking, title, person)
    looking.record()
    assert told(looking) == [
        "a for jane of sales under jane",
        "b for joe of sales under jane",
        "c for ann of support under ann",
        "d for bob of no team under no head",
        "e for nobody of no team under no head",
    ]
    assert [a["metadata"].get("team") for a in looking.activities()] == [1, 1, 2, None, None]
    assert looking.value("SELECT metadata ->> 'rate' FROM activity WHERE description LIKE 'a for%%'") == "10.50"


def test_what_is_remembered_is_kept_true_by_the_stream(looking: Crm) -> None:
    with looking.worker() as worker:
        add(looking, "a", 2)
        eventually(lambda: len(told(looking)) == 1)
        looking.execute("UPDATE person SET name = 'jo' WHERE person_id = 2")
        looking.execute("UPDATE person SET is_head = person_id = 2 WHERE team_id = 1")
        add(looking, "b", 2)
        eventually(lambda: len(told(looking)) == 2)
        looking.execute("UPDATE person SET team_id = 2, is_head = false WHERE person_id = 2")
        add(looking, "c", 2)
        eventually(lambda: len(told(looking)) == 3)
        looking.execute("UPDATE team SET name = 'help' WHERE team_id = 2")
        add(looking, "d", 2)
        eventually(lambda: len(told(looking)) == 4)
        assert worker.terminate() == 0
    assert told(looking) == [
        "a for joe of sales under jane",
        "b for jo of sales under jo",
        "c for jo of support under ann",
        "d for jo of help under ann",
    ]


def test_a_row_of_the_same_transaction_is_found_before_and_after_the_change(looking: Crm) -> None:
    with looking.connection.transaction():
        add(looking, "before", 5)
        looking.execute("INSERT INTO person (person_id, name, team_id) VALUES (5, 'eve', 2)")
        add(looking, "after", 5)
    looking.record()
    assert told(looking) == ["before for eve of support under ann", "after for eve of support under ann"]


def test_a_commit_that_the_stream_has_and_the_database_does_not_show_is_waited_for(
    own_server: Cluster, own_crm: Crm, tmp_path: Path
) -> None:
    """It waits for a standby, and so does the worker: what it looks up would else be as it was before."""
    crm = looking_crm(own_crm, tmp_path)
    with crm.worker() as worker, psycopg.connect(crm.dsn) as other:
        add(crm, "a", 1)
        eventually(lambda: len(told(crm)) == 1)
        with having(own_server, synchronous_standby_names="nobody"):
            commit = threading.Thread(
                target=lambda: other.execute(
                    "UPDATE person SET name = 'mary' WHERE person_id = 3;"
                    " INSERT INTO task (title, person_id) VALUES ('b', 3); COMMIT"
                )
            )
            commit.start()
            slow = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND query LIKE '%%pg_sleep%%'"
            eventually(lambda: crm.value(slow, f"cdc-worker {crm.slot}") == 1, what="it waits to see it")
            assert len(told(crm)) == 1
        commit.join()
        eventually(lambda: len(told(crm)) == 2)
        assert worker.terminate() == 0
    assert told(crm)[1] == "b for mary of support under mary"


def test_a_row_that_is_gone_is_found_if_the_stream_has_told_it(looking: Crm) -> None:
    with looking.connection.transaction():
        looking.execute("INSERT INTO person (person_id, name, team_id) VALUES (5, 'eve', 2)")
        add(looking, "a", 5)
    looking.execute("DELETE FROM task")
    looking.execute("DELETE FROM person WHERE person_id IN (4, 5)")
    looking.record()
    assert told(looking) == ["a for eve of support under ann", "a for eve of support under ann"]


def test_a_truncate_forgets_what_is_remembered(looking: Crm) -> None:
    with looking.worker() as worker:
        add(looking, "a", 1)
        eventually(lambda: len(told(looking)) == 1)
        looking.execute("TRUNCATE person, task; INSERT INTO person VALUES (1, 'mary', 2)")
        add(looking, "b", 1)
        eventually(lambda: len(told(looking)) == 2)
        assert worker.terminate() == 0
    assert told(looking)[1] == "b for mary of support under no head"


def test_keepalives_are_answered_while_a_table_is_locked_that_is_looked_into(looking: Crm) -> None:
    with looking.worker() as worker, psycopg.connect(looking.dsn) as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE team")
        add(looking, "a", 1)
        name = f"cdc-worker {looking.slot}"
        waits = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'"
        eventually(lambda: looking.value(waits, name) == 1)
        sent = "SELECT reply_time FROM pg_stat_replication WHERE application_name = %s"
        before = looking.value(sent, name)
        eventually(lambda: looking.value(sent, name) != before, what="it goes on telling where it is")
        assert told(looking) == []
        other.rollback()
        eventually(lambda: len(told(looking)) == 1)
        assert worker.terminate() == 0


def test_what_keeps_a_row_from_being_found_is_told_and_not_taken_for_silence(
    looking: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read meanwhile, and the server keeps its WAL."""
    for name, value in {"SILENCE": 0.3, "STATUS_INTERVAL": 0.1, "WATCH_INTERVAL": 0.3}.items():
        monkeypatch.setattr(f"cdc_worker.stream.{name}", value)
    monkeypatch.setattr("cdc_worker.worker.gc", mock.Mock())
    settings = load(
        flags={"dsn": looking.dsn, "slot": looking.slot, "retained_alarm_bytes": "1048576", **looking.settings}
    )
    log, stop = mock.Mock(), Stop()
    worker = Worker(settings, load_profile(settings.profile), stop=stop, log=log)
    running = threading.Thread(target=worker.run)

    def warned() -> set[str]:
        return {call.args[0] for call in log.warning.mock_calls}

    with psycopg.connect(looking.dsn) as other:
        other.execute("LOCK TABLE team")
        add(looking, "a", 1)
        running.start()
        looking.execute("SELECT pg_logical_emit_message(false, 'traffic', repeat('x', 1 << 20)), pg_switch_wal()")
        waits = (
            "SELECT min(query_start) < now() - interval '1 s' FROM pg_stat_activity"
            " WHERE application_name = %s AND wait_event_type = 'Lock'"
        )
        eventually(lambda: looking.value(waits, f"cdc-worker {looking.slot}"))
        eventually(lambda: warned() >= {"write_held_up", "wal_retained"}, what="somebody is told")
        other.rollback()
    eventually(lambda: len(told(looking)) == 1)
    stop.request()
    running.join()
    assert "connection_lost" not in warned()


def test_a_shutdown_does_not_wait_for_a_lookup(looking: Crm) -> None:
    with looking.worker() as worker, psycopg.connect(looking.dsn) as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE team")
        add(looking, "a", 1)
        waits = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'"
        eventually(lambda: looking.value(waits, f"cdc-worker {looking.slot}") == 1)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert looking.value(waits, f"cdc-worker {looking.slot}") == 0, "nor does its connection, for the lock"
        other.rollback()
    looking.record()
    assert told(looking) == ["a for jane of sales under jane"]


def test_a_connection_that_looks_up_and_is_ended_is_made_anew(looking: Crm) -> None:
    with looking.worker() as worker:
        add(looking, "a", 1)
        eventually(lambda: len(told(looking)) == 1)
        looking.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = %s AND query LIKE '%%asked.number%%'",
            f"cdc-worker {looking.slot}",
        )
        add(looking, "b", 3)
        eventually(lambda: len(told(looking)) == 2)
        assert worker.terminate() == 0
    assert told(looking)[1] == "b for ann of support under ann"


def test_many_lookups_of_one_transaction_are_all_answered(looking: Crm) -> None:
    looking.execute("INSERT INTO person SELECT n, 'p' || n, n %% 2 + 1 FROM generate_series(100, 2999) n")
    looking.execute("INSERT INTO task (title, person_id) SELECT 't' || n, n FROM generate_series(100, 2999) n")
    looking.record()
    team = ("sales under jane", "support under ann")
    assert told(looking) == [f"t{n} for p{n} of {team[n % 2]}" for n in range(100, 3000)]


def test_kills_lose_and_double_nothing_where_rows_are_looked_up(looking: Crm, seed: int) -> None:
    count = 0
    for _ in range(4):
        with looking.worker() as worker:
            worker.wait_for("replication_started")
            looking.execute(
                "INSERT INTO task (title, person_id) SELECT 't' || n, n %% 4 + 1 FROM generate_series(1, 300) n"
            )
            count += 300
            threading.Event().wait(0.05)
            worker.kill()
    looking.record()
    assert len(told(looking)) == count
    assert len({a["change_key"] for a in looking.activities()}) == count


def test_a_table_that_changes_while_it_is_looked_into_ends_nothing(looking: Crm) -> None:
    with looking.worker() as worker:
        add(looking, "a", 1)
        eventually(lambda: len(told(looking)) == 1)
        looking.execute("ALTER TABLE team RENAME name TO title")
        add(looking, "b", 3)
        eventually(lambda: len(told(looking)) == 2)
        assert worker.wait_for("lookup_failed")["table"] == '"public"."team"'
        assert worker.terminate() == 0
    assert told(looking)[1] == "b for ann of no team under ann"


def test_the_role_needs_to_read_what_is_looked_up_and_no_more(looking: Crm) -> None:
    with role(looking):
        refused = looking.command("run", "--once")
        assert refused.returncode == 21
        assert "lacks SELECT" in refused.stderr
        hint = refused.stderr.rpartition("hint: as the owner: ")[2].strip()
        looking.connection.execute(hint.encode())
        add(looking, "a", 1)
        looking.record()
    assert told(looking) == ["a for jane of sales under jane"]


def hang_up(crm: Crm, worker: WorkerProcess, profile: str) -> None:
    Path(crm.settings["profile"]).write_text(profile, "utf-8")
    worker.process.send_signal(signal.SIGHUP)


def test_a_profile_whose_lookups_lack_grants_changes_nothing(looking: Crm) -> None:
    before = PROFILE.replace("lookups.team =", "# lookups.team =").replace(" of {lookup.team.name or 'no team'}", "")
    before = before.replace("{lookup.team.team_id}", "{lookup.person.team_id}")
    Path(looking.settings["profile"]).write_text(before, "utf-8")
    with role(looking):
        looking.execute("GRANT SELECT ON person TO cdc")
        with looking.worker() as worker:
            worker.wait_for("replication_started")
            hang_up(looking, worker, PROFILE)
            assert 'lacks SELECT ON "public"."team"' in worker.wait_for("profile_refused")["reason"]
            add(looking, "a", 1)
            eventually(lambda: told(looking) == ["a for jane under jane"])
            looking.execute("GRANT SELECT ON team TO cdc")
            hang_up(looking, worker, PROFILE)
            worker.wait_for("profile_reloaded")
            add(looking, "b", 1)
            eventually(lambda: told(looking)[1:] == ["b for jane of sales under jane"])
            assert worker.terminate() == 0


def test_what_could_not_be_looked_up_is_once_it_can_be(looking: Crm) -> None:
    with looking.worker() as worker:
        worker.wait_for("replication_started")
        looking.execute("ALTER TABLE team RENAME TO teams")
        add(looking, "a", 1)
        eventually(lambda: told(looking) == ["a for jane of no team under jane"])
        looking.execute("ALTER TABLE teams RENAME TO team")
        add(looking, "b", 1)
        eventually(lambda: told(looking)[1:] == ["b for jane of sales under jane"])
        looking.execute("ALTER TABLE team ALTER team_id TYPE text; ALTER TABLE person ALTER team_id TYPE text")
        looking.execute("INSERT INTO team VALUES ('x', 'new'); INSERT INTO person VALUES (6, 'pat', 'x')")
        looking.execute("UPDATE person SET name = 'ann' WHERE person_id = 3")
        add(looking, "c", 6)
        add(looking, "d", 3)
        eventually(lambda: told(looking)[2:] == ["c for pat of new under no head", "d for ann of support under ann"])
        assert [event["table"] for event in worker.events("lookup_failed")] == ['"public"."team"']
        assert worker.terminate() == 0


def test_what_is_looked_for_by_a_column_that_is_gone_is_a_dead_letter(looking: Crm) -> None:
    """Nobody is not who isn't known."""
    with looking.worker() as worker:
        add(looking, "a", 1)
        eventually(lambda: len(told(looking)) == 1)
        looking.execute("ALTER TABLE task RENAME person_id TO assignee_id")
        looking.execute("INSERT INTO task (title, assignee_id) VALUES ('b', 1)")
        eventually(lambda: looking.value("SELECT count(*) FROM cdc_worker.dead_letter") == 1)
        assert worker.terminate() == 0
    assert looking.execute("SELECT kind, change -> 'new' ->> 'title' FROM cdc_worker.dead_letter") == [
        ("rule_failed", "b")
    ]


def test_the_doctor_tells_of_row_security_that_hides_what_is_looked_up(looking: Crm, tmp_path: Path) -> None:
    path = Path(looking.settings["profile"])
    path.write_text(path.read_text("utf-8") + '\n[tables.team]\nkey = "team_id"\n', "utf-8")
    looking.record()  # what the stream tells of the teams is nobody's to hide
    with role(looking):
        looking.execute("GRANT SELECT ON team, person TO cdc; ALTER TABLE team ENABLE ROW LEVEL SECURITY")
        add(looking, "a", 1)
        looking.record()
        assert "row security is on for table public.team" in ailing(looking, "profile").message
        mend(looking, ailing(looking, "profile").fix or "")
        add(looking, "b", 1)
        looking.record()
    assert told(looking) == ["a for jane of no team under jane", "b for jane of sales under jane"]


def test_the_doctor_tells_of_a_table_that_is_looked_into_without_a_key(looking: Crm) -> None:
    found = ailing(looking, "profile")
    assert (found.outcome, found.fix) == ("warning", 'give [tables.team] of the profile its "key"')


def test_a_function_has_what_the_metadata_of_its_rule_looks_up(looking: Crm, tmp_path: Path) -> None:
    (tmp_path / "looking_rules.py").write_text(
        "def named(event):\n    return {'type': 'named', 'description': event.found['person']['name']}\n", "utf-8"
    )
    path = Path(looking.settings["profile"])
    rule = """
[[tables.task.rules]]
on = "insert"
name = "named"
rule = "looking_rules:named"
metadata = { person = "{lookup.person.name}" }
"""
    path.write_text(path.read_text("utf-8").replace("[tables.person]", f"{rule}\n[tables.person]"), "utf-8")
    add(looking, "a", 1)
    environment = looking.environment(rule_modules="looking_rules")
    path_of_modules = ":".join(filter(None, [str(tmp_path), environment.get("PYTHONPATH")]))
    run = [sys.executable, "-m", "cdc_worker", "run", "--once"]
    subprocess.run(run, env=environment | {"PYTHONPATH": path_of_modules}, check=True, capture_output=True)
    assert told(looking) == ["a for jane of sales under jane", "jane"]
    assert looking.activities()[1]["metadata"]["person"] == "jane"


SEEN: list[tuple[LiteralString, LiteralString, object]] = [
    ("boolean", "true", True),
    ("smallint", "-7", -7),
    ("bigint", str(2**63 - 1), 2**63 - 1),
    ("oid", "4294967295", 4294967295),
    ("numeric", "1.10", Decimal("1.10")),
    ("numeric", "'NaN'", "NaN"),
    ("double precision", "0.1", 0.1),
    ("double precision", "'Infinity'", "Infinity"),
    ("real", "1.5", 1.5),
    ("text", "'a\\b\"c{}'", 'a\\b"c{}'),
    ("bytea", "'\\x00ff'", "00ff"),
    ("timestamptz", "'2001-02-03 04:05:06+09'", "2001-02-02 19:05:06+00"),
    ("timestamp", "'infinity'", "infinity"),
    ("interval", "'1 day 2 hours'", "1 day 02:00:00"),
    ("jsonb", "'{\"a\": 1}'", '{"a": 1}'),
    ("integer[]", "'{1,NULL}'", "{1,NULL}"),
    ("char(4)", "'x'", "x   "),
    ("text", "NULL", None),
]


def test_a_value_from_the_database_is_what_the_stream_would_have_told(looking: Crm) -> None:
    for number, (declared, value, _) in enumerate(SEEN):
        looking.connection.execute(f"ALTER TABLE person ADD COLUMN c{number} {declared}".encode())
        looking.connection.execute(f"UPDATE person SET c{number} = {value} WHERE person_id = 1".encode())
    names = tuple(f"c{number}" for number in range(len(SEEN)))
    lookup = Lookup(("public", "person"), ("person_id",), (), names, ("person_id",))
    settings = load(flags={"dsn": looking.dsn, **looking.settings})
    rules = settings.rules(load_profile(settings.profile))
    with connect_reading(looking.dsn, "w") as connection:
        found = fetch(connection, rules, [(lookup, (1,)), (lookup, (99,)), (lookup, (2**40,))])
    row = found.pop((lookup, (1,)))
    assert row is not None
    assert [(type(row[name]), row[name]) for name in names] == [(type(seen), seen) for _, _, seen in SEEN]
    assert found == {(lookup, (99,)): None, (lookup, (2**40,)): None}


def test_a_row_is_found_by_a_value_of_any_type_and_by_all_of_it(looking: Crm) -> None:
    looking.execute("CREATE DOMAIN code AS char(3)")
    keys = {"char(3)": "b  ", "code": "b  ", "bit(2)": "10", "varchar(3)": "b", "numeric(4,1)": "7", "enumerated": "b"}
    looking.execute("CREATE TYPE enumerated AS ENUM ('b')")
    profile, names = PROFILE, [f"kept_{number}" for number in range(len(keys))]
    for name, (declared, key) in zip(names, keys.items(), strict=True):
        looking.connection.execute(f"CREATE TABLE {name} (a {declared}, b {declared})".encode())
        looking.connection.execute(f"INSERT INTO {name} VALUES ('{key}', '{key}')".encode())
        profile += (
            f'[tables.task.lookups.{name}]\ntable = "{name}"\nmatch = {{ a = "title" }}\nwhere = {{ b = "{key}" }}\n'
        )
    rules = compile_rules(parse(profile, source="test"))
    of = rules["public", "task"].references
    wanted = [
        (of[name].lookup, (f"{key}{more}",))
        for name, key in zip(names, keys.values(), strict=True)
        for more in ("", "1")
    ]
    with connect_reading(looking.dsn, "w") as connection:
        found = fetch(connection, rules, wanted)
    assert [found[one] is not None for one in wanted] == [True, False] * len(keys)


def test_a_whole_number_is_found_whatever_its_scale(looking: Crm) -> None:
    looking.execute("ALTER TABLE task DROP CONSTRAINT task_person_id_fkey, ALTER person_id TYPE numeric(9,2)")
    add(looking, "a", 1)
    looking.record()
    assert told(looking) == ["a for jane of sales under jane"]


@pytest.mark.parametrize(
    ("snapshot", "xid", "seen"),
    [
        ("100:100:", 99, True),
        ("100:100:", 100, False),
        ("90:100:90,95", 95, False),
        ("90:100:90,95", 96, True),
        (f"{2**32 + 5}:{2**32 + 5}:", 4, True),
        (f"{2**32 + 5}:{2**32 + 5}:", 5, False),
        (f"{2**32 + 5}:{2**32 + 5}:", 2**32 - 3, True),
        (f"{2**32 - 3}:{2**32 - 3}:", 4, False),
        (f"{2**32 - 9}:{2**32 + 5}:{2**32 - 9},{2**32 + 1}", 1, False),
    ],
)
def test_a_transaction_is_seen_once_it_has_ended_before_the_snapshot(snapshot: str, xid: int, seen: bool) -> None:
    assert visible(snapshot, [xid]) is seen
