"""After a profile has changed, what was recorded becomes what the profile says now, and nothing else is touched."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
import zstandard
from application import Application, statuses
from factories import assembled, inserted, leadfi, rules, said
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql
from support import Crm, WorkerProcess, crm_on, eventually
from test_erasure import unprotected
from test_partitions import DEALS, set_up
from test_partitions import PROFILE as DEALS_PROFILE
from test_replay import Workload, replayed, written
from test_sales_cookbook import add, change, use

from cdc_worker import config, log, profile
from cdc_worker.activities import Activity, key_prefix
from cdc_worker.cluster import Cluster
from cdc_worker.errors import RecordingUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.replay import Wishes
from cdc_worker.rewrite import Places, Rewritten, rewrite
from cdc_worker.transform import Transformer, settled

SHIPPED = profile.read("leadfi")

HASHED = "hmac:" + hmac.new(b"k" * 16, b"Ada", hashlib.sha256).hexdigest()[:32]

RENAMED = ('[[tables.lead.rules]]\non = "insert"', '[[tables.lead.rules]]\nname = "new"\non = "insert"')

NEW_RULE = """
[[tables.customer.rules]]
name = "customer_opened"
on = "insert"
type = "customer_opened"
description = "Account of {new.name} opened"
"""


@pytest.fixture
def recording(crm: Crm, tmp_path: Path) -> Path:
    """Where the worker of `crm` keeps what it consumes."""
    directory = tmp_path / "recording"
    directory.mkdir()
    crm.settings["recording_directory"] = str(directory)
    return directory


@pytest.fixture
def fresh(server: Cluster, crm: Crm, tmp_path: Path) -> Iterator[Crm]:
    """Another database, of a worker of the same name, in which nothing happens."""
    with crm_on(server, tmp_path, prepared=True, begun=False) as other:
        other.settings["name"] = crm.slot
        other.setup()
        yield other


def say(crm: Crm, *changes: tuple[str, str], of: str = SHIPPED, more: str = "") -> None:
    """Let the profile say something else from now on: texts of the one it was, each with what replaces it."""
    text = of
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = crm.directory / "changed.toml"
    path.write_text(text + more, "utf-8")
    crm.settings["profile"] = str(path)


def rewritten(crm: Crm, *paths: Path | str, **wishes: Any) -> Rewritten:
    """`cdc-worker replay --rewrite`, in this process."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    return rewrite(settings, profile.load(settings.profile), paths, Wishes(**wishes), log=log.get())


def nothing_left(crm: Crm, *paths: Path | str) -> bool:
    """Whether to rewrite again finds nothing to do, and a dry run says so."""
    before = crm.activities()
    for dry_run in (True, False):
        done = rewritten(crm, *paths, dry_run=dry_run)
        assert (done.activities, done.changed, done.removed, done.resolved, done.missing) == ({}, {}, {}, 0, [])
    return crm.activities() == before


def told_anew(crm: Crm, fresh: Crm, directory: Path) -> bool:
    """Whether the log is what an empty database gets of the recording by the new profile."""
    fresh.settings["profile"] = crm.settings["profile"]
    replayed(fresh, directory)
    assert written(fresh)
    return written(fresh) == written(crm)


def test_a_changed_description_is_changed_in_place(crm: Crm, recording: Path) -> None:
    crm.add_leads(3)
    crm.execute("UPDATE lead SET status = '7. lost' WHERE lead_id = 2")
    crm.record()
    crm.execute("UPDATE activity SET is_visible_to_bd = false WHERE lead_id = 1")
    before = crm.activities()
    say(crm, ('Lead "{new.full_name}" created by {new.bd_in_charge}', "New: {new.full_name}"))
    done = rewritten(crm)
    assert (done.activities, done.changed, done.removed) == ({}, {"lead_created": 3}, {})
    assert done.fields == {"lead_created": {"description": 3}}
    assert crm.activities() == [
        activity | {"description": f"New: Lead {activity['lead_id']}"}
        if activity["activity_type"] == "lead_created"
        else activity
        for activity in before
    ]
    assert [activity["is_visible_to_bd"] for activity in crm.activities()] == [False, True, True, True]
    assert nothing_left(crm)


def test_a_rewritten_log_is_what_the_new_profile_would_have_told(
    crm: Crm, fresh: Crm, recording: Path, seed: int
) -> None:
    workload = Workload(crm, seed)
    workload.run(60)
    crm.record()
    crm.add_leads(2_500)  # slices
    workload.run(20)
    # Of what the rules tell otherwise there is some, whatever the dice said.
    crm.execute("UPDATE lead SET bd_in_charge = 'jim' WHERE lead_id = (SELECT max(lead_id) FROM lead)")
    crm.execute("DELETE FROM lead WHERE lead_id = (SELECT max(lead_id) FROM lead)")
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1000000, 'Acme')")
    crm.record()
    activity_ids = {activity["change_key"]: activity["activity_id"] for activity in crm.activities()}
    say(
        crm,
        ("description = 'Lead \"{new.full_name}\" created by {new.bd_in_charge}'", 'description = "{new.full_name}"'),
        ('type = "assignment_changed"', 'name = "assigned"\ntype = "assignment_changed"'),
        ("old_status = ", "before = "),
        ('owner = "bd_in_charge"', 'owner = "source"\nmasked = ["phone_number"]'),
        ('[[tables.lead.rules]]\non = "delete"', '[[tables.lead.rules]]\nname = "gone"\non = "delete"'),
        more=NEW_RULE,
    )
    foreseen = rewritten(crm, dry_run=True)
    done = rewritten(crm)
    for name in ("activities", "changed", "fields", "removed", "refused", "resolved"):
        assert getattr(done, name) == getattr(foreseen, name), name
    assert done.activities["assignment_changed"] == done.removed["assignment_changed"] > 0
    assert done.activities.keys() == {"assignment_changed", "customer_opened", "lead_deleted"}
    assert done.refused == 0
    assert told_anew(crm, fresh, recording)
    for activity in crm.activities():
        key = activity["change_key"]
        assert activity["activity_id"] == activity_ids.get(key, activity["activity_id"])
    assert nothing_left(crm)


def test_a_table_that_is_in_the_profile_no_more_leaves_nothing(crm: Crm, recording: Path) -> None:
    crm.add_leads(2)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme'), (2, 'Engines')")
    crm.execute("UPDATE customer SET name = 'Acme Ltd' WHERE customer_uid = 1")
    crm.record()
    customers = SHIPPED[SHIPPED.index("[tables.customer]") : SHIPPED.index("# Captured for what it tells")]
    say(crm, (customers, ""))
    done = rewritten(crm)
    assert (done.activities, done.changed) == ({}, {})
    assert done.removed == {"customer_created": 2, "customer_updated": 1}
    assert crm.types() == ["lead_created", "lead_created"]
    assert nothing_left(crm)


def test_nothing_that_is_others_is_touched(crm: Crm, recording: Path) -> None:
    """Rows of the application, of other workers, and what a backfill has made up."""
    crm.add_leads(2)
    crm.record()
    worker, cluster, rest = crm.activities()[0]["change_key"].split("/", 2)
    for key in (None, f"{worker}x/{cluster}/{rest}", f"{worker}/1/{rest}", f"{worker}/{cluster}/backfill/{rest}"):
        crm.execute(
            "INSERT INTO activity (activity_type, activity_category, description, lead_id, change_key)"
            " VALUES ('lead_created', 'system', 'a canary', 1, %s)",
            key,
        )
    canaries = "SELECT a.xmin, a.* FROM activity AS a WHERE description = 'a canary' ORDER BY activity_id"
    before = crm.execute(canaries)
    say(crm, RENAMED)
    done = rewritten(crm)
    assert (done.activities, done.removed) == ({"lead_created": 2}, {"lead_created": 2})
    assert crm.execute(canaries) == before


def test_of_a_rule_that_is_gone_nothing_is_left(crm: Crm, recording: Path) -> None:
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    crm.execute("UPDATE customer SET name = 'Acme Ltd', is_closed = true")
    crm.record()
    start = SHIPPED.index('[[tables.customer.rules]]\non = "update"\nchanged = "*"')
    say(crm, (SHIPPED[start : SHIPPED.index("[[tables.customer.rules]]", start + 1)], ""))
    assert rewritten(crm).removed == {"customer_updated": 1}
    assert crm.types() == ["customer_created", "status_changed"]


def edit(recording: Path, frame: Callable[[int, bytes], bytes]) -> None:
    """Make something else of each frame of a recording, by its number and its lines; of nothing nothing."""
    compress, number = zstandard.ZstdCompressor(write_checksum=True).compress, 0
    for file in sorted(recording.iterdir()):
        data, edited = file.read_bytes(), b""
        while data:
            one = zstandard.ZstdDecompressor().decompressobj()
            lines = frame(number, one.decompress(data))
            data, number = one.unused_data, number + 1
            edited += compress(lines) if lines else b""
        file.write_bytes(edited)


def test_a_gap_never_reads_as_removed(crm: Crm, recording: Path) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        for _ in range(5):
            count = len(crm.types())
            crm.add_leads(1)
            eventually(lambda count=count: len(crm.types()) > count)  # type: ignore[misc]
        worker.terminate()
    say(crm, RENAMED)
    edit(recording, lambda number, text: text if b"Lead 1" in text and number % 2 else b"")
    before = written(crm)
    done = rewritten(crm)
    assert done.missing
    assert not done.whole
    count = done.removed["lead_created"]
    assert 0 < count < 5
    assert done.activities == done.removed
    gone = before.keys() - written(crm).keys()
    assert len(gone) == count
    assert {key.replace("/lead_created", "/new") for key in gone} == written(crm).keys() - before.keys()


def test_a_damaged_transaction_never_reads_as_removed(crm: Crm, recording: Path) -> None:
    crm.add_leads(3)
    crm.record()
    (file,) = recording.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    say(crm, RENAMED)
    done = rewritten(crm)
    assert (done.activities, done.changed, done.removed) == ({}, {}, {})
    assert done.missing
    assert crm.types() == ["lead_created"] * 3


def test_a_recording_that_breaks_off_within_what_is_told_as_one_takes_nothing_away(crm: Crm, recording: Path) -> None:
    with crm.connection.transaction():
        crm.execute("""SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{"collapse": true}')""")
        crm.add_leads(2_500)
    crm.record()
    edit(recording, lambda number, text: b"".join(text.splitlines(keepends=True)[:-1]))
    crm.settings["unsigned_control"] = "true"
    done = rewritten(crm)
    assert (done.activities, done.changed, done.removed) == ({}, {}, {})
    assert crm.types() == ["lead_created"] * 2_500


PEEKED = """
SELECT data FROM pg_logical_slot_peek_changes(%s, NULL, NULL, 'format-version', '2', 'include-lsn', 'true',
    'include-timestamp', 'true', 'include-xids', 'true', 'add-tables', %s)
"""


def recorded_elsewhere(crm: Crm, tables: str) -> Path:
    """What pg_recvlogical would have recorded of some tables."""
    file = crm.directory / "elsewhere.jsonl"
    rows = crm.execute(PEEKED, f"{crm.slot}_other", tables)
    file.write_text("".join(f"{line}\n" for (line,) in rows), "utf-8")
    return file


def test_a_recording_of_fewer_tables_takes_nothing_away(crm: Crm) -> None:
    """Not even what the others told of a change: here which customer a lead has become."""
    crm.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", f"{crm.slot}_other")
    crm.add_leads(2)
    with crm.connection.transaction():
        crm.execute("INSERT INTO customer (customer_uid, name) VALUES (42, 'Acme')")
        crm.execute("UPDATE lead SET is_converted = true WHERE lead_id = 1")
        crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (42, 1)")
    crm.record()
    before = crm.activities()
    assert [activity["customer_uid"] for activity in before] == [None, None, 42, 42]
    for tables in ("public.lead", "public.customer"):
        assert rewritten(crm, recorded_elsewhere(crm, tables)).whole
        assert crm.activities() == before
    say(crm, ("converted to customer'", "became a customer'"))
    assert rewritten(crm, recorded_elsewhere(crm, "public.lead")).changed == {}
    done = rewritten(crm, recorded_elsewhere(crm, "public.lead,public.contact"))
    assert done.fields == {"lead_converted": {"description": 1}}


def test_a_recording_that_does_not_say_where_its_commits_were_is_refused(crm: Crm, tmp_path: Path) -> None:
    crm.add_leads(1)
    crm.record()
    begin = {"action": "B", "timestamp": "2020-01-01 00:00:00+00"}
    delete = {"action": "D", "schema": "public", "table": "lead", "identity": []}
    file = tmp_path / "lines.jsonl"
    file.write_text(
        "".join(json.dumps(of, separators=(",", ":")) + "\n" for of in (begin, delete, {"action": "C"})), "utf-8"
    )
    with pytest.raises(RecordingUnreadableError, match="doesn't say where its commits were"):
        rewritten(crm, file)


def test_who_was_erased_stays_erased(crm: Crm, recording: Path) -> None:
    crm.add_leads(2)
    crm.execute("UPDATE lead SET status = '7. lost'")
    crm.record()
    crm.succeed("forget", "--lead", "1", "--yes")
    blank = [activity for activity in crm.activities() if activity["lead_id"] == 1]
    say(
        crm,
        ("old_status = ", "before = "),
        RENAMED,
    )
    done = rewritten(crm)
    assert (done.activities, done.removed) == ({"lead_created": 1}, {"lead_created": 1})
    assert done.changed == {"status_changed": 1}
    assert [activity for activity in crm.activities() if activity["lead_id"] == 1] == blank
    assert nothing_left(crm)


@pytest.mark.parametrize("then", ["false", "true"])
def test_what_messages_may_ask_for_by_now(crm: Crm, fresh: Crm, recording: Path, then: str) -> None:
    """Skipped or told one by one, collapsed or not: all of it as the settings have it now."""
    for wish in ({"skip": True}, {"collapse": {"description": "An import"}}, {"changed_by": "ann"}):
        with crm.connection.transaction():
            crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', %s)", json.dumps(wish))
            crm.add_leads(600)
            crm.execute("UPDATE lead SET status = '2. proposal' WHERE status LIKE '1%%'")
    crm.record(unsigned_control="true" if then == "false" else "false")
    for of in (crm, fresh):
        of.settings |= {"unsigned_control": then, "profile": "leadfi"}
    done = rewritten(crm)
    told = {"lead_created": 1_200, "status_changed": 1_200}
    if then == "false":
        assert (done.activities, done.removed) == (told, {"changes_collapsed": 1})
    else:
        assert (done.activities, done.removed) == ({"changes_collapsed": 1}, told)
    assert told_anew(crm, fresh, recording)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.succeed("verify")
        worker.terminate()
    assert nothing_left(crm)


def test_the_log_is_true_afterwards(crm: Crm, recording: Path, seed: int) -> None:
    Workload(crm, seed).run(40)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        say(crm, ('name = "leads_truncated"', 'name = "none_left"'), ("old_bd = ", "before = "), more=NEW_RULE)
        worker.terminate()
    crm.record()
    rewritten(crm)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.succeed("verify")
        worker.terminate()
    assert nothing_left(crm)


@pytest.mark.parametrize("wishes", [{"tables": ["lead"]}, {"types": ["lead_created"]}])
def test_with_a_filter_nothing_is_lost_of_what_is_told_as_one(
    crm: Crm, recording: Path, wishes: dict[str, list[str]]
) -> None:
    """It is told of more than is asked for: it comes with what goes, and stays where some of that can't come back."""
    with crm.connection.transaction():
        crm.execute("""SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{"collapse": true}')""")
        crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
        crm.add_leads(2)
    crm.record()
    crm.settings["unsigned_control"] = "true"
    done = rewritten(crm, **wishes)
    assert (done.activities, done.removed) == ({"changes_collapsed": 1}, {"lead_created": 2})
    crm.settings["unsigned_control"] = "false"
    done = rewritten(crm, **wishes)
    assert (done.activities, done.removed) == ({"lead_created": 2}, {})
    assert rewritten(crm).removed == {"changes_collapsed": 1}


def test_activities_of_another_cluster_are_known_by_its_recording(crm: Crm, recording: Path) -> None:
    """As after a dump was restored here."""
    crm.add_leads(2)
    crm.record()
    before = crm.activities()
    cluster = before[0]["change_key"].split("/")[1]
    unprotected(crm)
    crm.execute("UPDATE activity SET change_key = replace(change_key, %s, '17')", cluster)
    edit(recording, lambda number, text: text.replace(cluster.encode(), b"17"))
    say(crm, RENAMED)
    done = rewritten(crm)
    assert (done.activities, done.removed) == ({"lead_created": 2}, {"lead_created": 2})
    assert [of["change_key"] for of in crm.activities()] == [
        of["change_key"].replace(cluster, "17").replace("/lead_created", "/new") for of in before
    ]
    assert nothing_left(crm)


# Targets of other shapes


LOGGED = """
SELECT change_key, to_jsonb(log) - 'id' AS row FROM core_interactionlog AS log
JOIN cdc_worker.written_key ON row_id = id ORDER BY change_key
"""

KEYS = "SELECT change_key, row_id FROM cdc_worker.written_key"

FOREIGN_KEYS = """
SELECT conrelid::regclass::text, conname FROM pg_constraint
WHERE contype = 'f' AND conrelid = 'core_interactionlog'::regclass
"""


def test_a_target_without_a_column_for_keys(server: Cluster, bare_crm: Crm, tmp_path: Path) -> None:
    """And rows of other tables are those that were looked up at the time."""
    cookbook, directory = use(bare_crm), tmp_path / "recording"
    directory.mkdir()
    cookbook.settings["recording_directory"] = str(directory)
    connection = cookbook.connection
    cookbook.execute(
        "INSERT INTO core_interactionlog (type, summary, timestamp, user_id) VALUES ('call', 'ours', now(), 1)"
    )
    for number in range(1, 4):
        lead = add(connection, "core_lead", name=f"Ada {number}", assigned_to_id=1)
        opportunity = add(connection, "core_opportunity", owner_id=1)
        with connection.transaction():
            task = add(connection, "core_task", owner_id=1, related_lead_id=lead)
            add(connection, "core_quote", opportunity_id=opportunity, created_by_id=1)
            change(connection, "core_lead", lead, status="qualified")
        change(connection, "core_task", task, status="completed")
    cookbook.record()
    connection.execute("UPDATE core_user SET organization_id = 2")
    connection.execute("DELETE FROM core_interactionlog WHERE summary = 'New lead created: Ada 3 from Unknown Company'")
    ids = set(cookbook.execute(KEYS))
    text = profile.read("sales_cookbook")
    say(
        cookbook,
        ("New lead created:", "Lead:"),
        ('name = "lead_status_changed"', 'name = "status"'),
        ("qualified as a potential customer", "promising"),
        of=text,
    )
    done = rewritten(cookbook)
    assert (done.activities, done.removed, done.changed) == ({"note": 3}, {"note": 3}, {"note": 2})
    assert (done.fields, done.looked_up_now) == ({"note": {"summary": 2}}, 0)
    with crm_on(server, tmp_path) as other:
        other.settings["name"] = cookbook.slot
        use(other)
        for table, name in other.execute(FOREIGN_KEYS):  # of rows that aren't there
            drop = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}")
            other.connection.execute(drop.format(sql.Identifier(table), sql.Identifier(name)))
        other.settings["profile"] = cookbook.settings["profile"]
        replayed(other, directory)
        told = other.execute(LOGGED)
    assert [row for row in told if row[1]["summary"] != "Lead: Ada 3 from Unknown Company"] == cookbook.execute(LOGGED)
    assert len(set(cookbook.execute(KEYS)) - ids) == 3
    assert cookbook.execute("SELECT summary FROM core_interactionlog WHERE summary = 'ours'") == [("ours",)]
    again = rewritten(cookbook)
    assert (again.activities, again.changed, again.removed) == ({}, {}, {})


def test_links_that_the_target_refuses(crm: Crm, recording: Path) -> None:
    """As they were refused before, and where the profile has others now."""
    crm.execute("ALTER TABLE activity ADD CONSTRAINT lead_key FOREIGN KEY (lead_id) REFERENCES lead ON DELETE SET NULL")
    crm.execute("ALTER TABLE activity ADD CONSTRAINT customer_key FOREIGN KEY (customer_uid) REFERENCES customer")
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (42, 'Acme')")
    crm.add_leads(4)
    crm.execute("UPDATE lead SET phone_number = 40 + lead_id")
    crm.execute("DELETE FROM lead WHERE lead_id = 1")
    crm.record()
    unprotected(crm)
    crm.execute("DELETE FROM lead WHERE lead_id = 3")
    say(crm, ('Lead "{new.full_name}" updated: {columns}\'', 'Updated\'\nfields = { customer = "{new.phone_number}" }'))
    done = rewritten(crm)
    assert (done.changed, done.refused) == ({"lead_updated": 4, "lead_created": 1}, 0)
    updates = [activity for activity in crm.activities() if activity["activity_type"] == "lead_updated"]
    assert [
        (of["description"], of["lead_id"], of["customer_uid"], of["metadata"].get("unlinked")) for of in updates
    ] == [
        ("Updated", None, None, {"lead_id": 1, "customer_uid": 41}),
        ("Updated", 2, 42, None),
        ("Updated", None, None, {"lead_id": 3, "customer_uid": 43}),
        ("Updated", 4, None, {"customer_uid": 44}),
    ]
    assert nothing_left(crm)


def test_changes_of_partitions(crm: Crm, recording: Path) -> None:
    set_up(crm, DEALS)
    crm.execute(
        "INSERT INTO deal SELECT n, (ARRAY['north', 'south', 'east', 'west'])[1 + n %% 4] FROM generate_series(1, 8) n"
    )
    crm.execute("UPDATE deal SET region = 'south' WHERE region <> 'west'")
    crm.execute("DELETE FROM deal WHERE id < 4")
    crm.record()
    crm.execute("DROP TABLE deal_north")
    say(
        crm,
        ("{new.id} created:", "{new.id}:"),
        ('type = "deal_updated"', 'name = "moved"\ntype = "deal_moved"'),
        of=DEALS_PROFILE,
    )
    done = rewritten(crm)
    assert (done.activities, done.removed) == ({"deal_moved": 4}, {"deal_updated": 4})
    assert done.changed == {"deal_created": 8}
    assert nothing_left(crm)
    others = '[tables.other]\nrules = [{ on = "insert", type = "remarked", description = "{new.remark}" }]'
    say(crm, (DEALS_PROFILE[DEALS_PROFILE.index("[tables.deal]") :], others), of=DEALS_PROFILE)
    assert rewritten(crm).removed == {"deal_created": 8, "deal_moved": 4, "deal_deleted": 3}


# Beside others


def test_rows_that_others_have_locked_are_waited_for_with_nothing_in_hand(crm: Crm, recording: Path) -> None:
    crm.add_leads(3)
    crm.record()
    say(crm, ('Lead "{new.full_name}" created by', "By"))
    hide = "UPDATE activity SET is_visible_to_bd = false WHERE lead_id = %s"
    with ThreadPoolExecutor() as pool, psycopg.connect(crm.dsn) as application:
        application.execute(hide, (2,))
        going = pool.submit(rewritten, crm)
        eventually(lambda: crm.value("SELECT count(*) FROM activity WHERE description LIKE 'By%%'") == 2)
        for lead in (1, 3, 2):
            application.execute(hide, (lead,))
        assert not going.done()
        application.commit()
        assert going.result().changed == {"lead_created": 3}
    assert [(of["description"], of["is_visible_to_bd"]) for of in crm.activities()] == [("By jane", False)] * 3
    assert nothing_left(crm)


def test_who_is_forgotten_meanwhile_is_told_of_no_more(crm: Crm, recording: Path) -> None:
    crm.add_leads(3)
    crm.record()
    say(crm, ('Lead "{new.full_name}" created by', "By"), more=NEW_RULE)
    with ThreadPoolExecutor() as pool, psycopg.connect(crm.dsn) as application:
        application.execute("UPDATE activity SET is_visible_to_bd = false WHERE lead_id = 2")
        going = pool.submit(rewritten, crm)
        eventually(lambda: crm.value("SELECT count(*) FROM activity WHERE description LIKE 'By%%'") == 2)
        crm.succeed("forget", "--lead", "1", "--yes")
        application.commit()
        done = going.result()
    assert (done.changed, done.already_there, done.refused) == ({"lead_created": 3}, 0, 0)
    assert [of["description"] for of in crm.activities()] == ["", "By jane", "By jane"]
    assert nothing_left(crm)


def test_one_that_is_killed_and_run_again_comes_to_the_same_end(crm: Crm, fresh: Crm, recording: Path) -> None:
    crm.add_leads(3_000)
    crm.record()
    say(crm, RENAMED, ('{ source = "{new.source}", type', "{ type"))
    command = ["replay", "--rewrite"]
    with WorkerProcess(command, crm.environment(), crm.directory / "rewrite.log") as process:
        eventually(lambda: crm.value("SELECT count(*) FROM activity WHERE change_key LIKE '%%/new'"))
        process.kill()
    assert set(crm.types()) == {"lead_created"}
    assert crm.value("SELECT count(DISTINCT lead_id) FROM activity") == 3_000
    done = rewritten(crm)
    assert 0 < done.activities["lead_created"] < 3_000
    assert told_anew(crm, fresh, recording)
    assert nothing_left(crm)


def test_it_goes_on_beside_the_worker_and_the_application(crm: Crm, fresh: Crm, recording: Path) -> None:
    crm.add_leads(300)
    crm.record()
    say(crm, RENAMED, ("old_status = ", "before = "))
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        with Application(crm, statuses) as application:
            application.go_on(3)
            done = rewritten(crm)
            application.go_on(3)
        crm.succeed("forget", "--lead", "7", "--yes")
        worker.terminate()
    assert done.removed == {"lead_created": 300}
    crm.record()
    rewritten(crm)
    assert len({activity["change_key"] for activity in crm.activities()}) == len(crm.activities())
    assert told_anew(crm, fresh, recording) is False  # who was forgotten is told there
    assert nothing_left(crm)


def test_what_the_target_refuses_stays_as_it_was(crm: Crm, recording: Path) -> None:
    crm.add_leads(40)
    crm.execute("UPDATE lead SET status = '7. lost' WHERE lead_id <= 3")
    crm.record()
    crm.execute("CREATE TABLE remark (activity_id int REFERENCES activity, remark text)")
    crm.execute("INSERT INTO remark SELECT activity_id FROM activity WHERE activity_type = 'status_changed' LIMIT 1")
    crm.execute("ALTER TABLE activity ADD CHECK (description NOT IN ('By jane: Lead 5', 'By jane: Lead 17')) NOT VALID")
    kept = crm.activities()
    status = SHIPPED[SHIPPED.index('[[tables.lead.rules]]\non = "update"\nchanged = "status"') :]
    say(
        crm,
        ('Lead "{new.full_name}" created by {new.bd_in_charge}', "By {new.bd_in_charge}: {new.full_name}"),
        (status[: status.index("[[", 2)], ""),
    )
    done = rewritten(crm)
    assert (done.refused, done.changed, done.removed) == (3, {"lead_created": 38}, {"status_changed": 2})
    assert not done.whole
    left = [activity for activity in kept if activity in crm.activities()]
    assert [(of["activity_type"], of["lead_id"]) for of in left] == [
        ("lead_created", 5),
        ("lead_created", 17),
        ("status_changed", 1),
    ]


# Dead letters, filters, and the command


def test_dead_letters(crm: Crm, recording: Path) -> None:
    """Those that succeed now are resolved, as are those that no rule speaks of; others have the reason of now."""
    crm.execute(
        "ALTER TABLE activity ADD CHECK (activity_type NOT IN ('status_changed', 'assignment_changed', 'deleted'))"
    )
    crm.add_leads(3)
    crm.execute("UPDATE lead SET status = '7. lost', bd_in_charge = 'joe'")
    crm.execute("DELETE FROM lead WHERE lead_id = 3")
    crm.record()
    letters = "SELECT change_key, attempts, reason FROM cdc_worker.dead_letter ORDER BY dead_letter_id"
    assert len(crm.execute(letters)) == 6
    crm.execute("UPDATE cdc_worker.dead_letter SET discarded_at = now() WHERE change_key LIKE '%%/0/status_changed'")
    assignment = SHIPPED[SHIPPED.index('[[tables.lead.rules]]\non = "update"\nchanged = "bd_in_charge"') :]
    say(
        crm,
        (
            'changed = "status"\ntype = "status_changed"\ndescription = \'Lead',
            'changed = "status"\nname = "status_changed"\ntype = "status"\ndescription = \'Lead',
        ),
        (assignment[: assignment.index("[[", 2)], ""),
        ('changed = "unclaimed"', 'changed = "unclaimed"\nskip_unless = "new.phone_number"'),
    )
    foreseen, done = rewritten(crm, dry_run=True), rewritten(crm)
    assert (done.activities, done.resolved, done.discarded) == ({"status": 2}, 5, 0)
    assert (foreseen.activities, foreseen.resolved) == (done.activities, done.resolved)
    assert [(key.rpartition("/")[2], attempts) for key, attempts, _ in crm.execute(letters)] == [("status_changed", 1)]
    assert nothing_left(crm)


def test_only_some_types_or_tables(crm: Crm, recording: Path) -> None:
    crm.add_leads(2)
    crm.execute("UPDATE lead SET status = '7. lost' WHERE lead_id = 1")
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    crm.record()
    say(
        crm,
        RENAMED,
        (
            'type = "status_changed"\ndescription = \'Lead',
            'type = "stage_changed"\nname = "status_changed"\ndescription = \'Lead',
        ),
        ("(ID: {new.customer_uid})", ""),
        more=NEW_RULE,
    )
    done = rewritten(crm, types=["customer_opened"])
    assert (done.activities, done.changed, done.removed) == ({"customer_opened": 1}, {}, {})
    done = rewritten(crm, types=["status_changed"])
    assert (done.activities, done.changed, done.removed) == ({}, {"stage_changed": 1}, {})
    done = rewritten(crm, tables=["customer"])
    assert (done.activities, done.changed, done.removed) == ({}, {"customer_created": 1}, {})
    done = rewritten(crm, since=datetime(2999, 1, 1, tzinfo=UTC))
    assert (done.activities, done.changed, done.removed) == ({}, {}, {})
    done = rewritten(crm)
    assert (done.activities, done.changed, done.removed) == ({"lead_created": 2}, {}, {"lead_created": 2})


def test_the_command_tells_what_it_would_do_and_what_it_did(crm: Crm, recording: Path) -> None:
    crm.add_leads(5)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    crm.record()
    before = crm.activities()
    start = SHIPPED.index("[[tables.customer.rules]]")
    say(
        crm,
        ("by {new.bd_in_charge}'", "for {new.bd_in_charge}'"),
        ('{ source = "{new.source}", type', "{ type"),
        (SHIPPED[start : SHIPPED.index("[[tables.customer.rules]]", start + 1)], ""),
    )
    told = crm.succeed("replay", "--rewrite", "--dry-run").splitlines()
    assert told[1:] == [
        "5 activities would be changed: 5 lead_created",
        "  lead_created: description in 5, metadata.source in 5",
        *(
            line
            for number in (1, 2, 3)
            for line in (
                f'  lead_created  Lead "Lead {number}" created for jane',
                rf'    description: "Lead \"Lead {number}\" created by jane"'
                rf' -> "Lead \"Lead {number}\" created for jane"',
                '    metadata.source: "website" -> null',
            )
        ),
        "1 activities would be removed: 1 customer_created",
        '  customer_created  Customer "Acme" created (ID: 1)',
    ]
    assert crm.activities() == before
    done = Rewritten.model_validate_json(crm.succeed("replay", "--rewrite", "--json"))
    assert (done.changed, done.removed) == ({"lead_created": 5}, {"customer_created": 1})
    crm.execute("ALTER TABLE activity ADD CHECK (description NOT LIKE '%%by jane') NOT VALID")
    refused = crm.command("replay", "--rewrite", profile="leadfi")
    assert refused.returncode == 1
    assert "5 activities are as they were" in refused.stdout
    assert crm.command("replay", "--rewrite", "--output", "-").returncode == 2


# Of which changes all is known


@given(
    messages=st.lists(st.sampled_from(["lead", "customer", "other", "left out", "said"]), max_size=12),
    cuts=st.sets(st.integers(0, 11)),
    done=st.lists(st.integers(0, 12), min_size=13, max_size=13).map(sorted),
)
def test_places_are_those_of_changes_that_are_done(messages: list[str], cuts: set[int], done: list[int]) -> None:
    known = leadfi()
    prefix = key_prefix("w", "1", LSN(0x1000))
    places = Places(known, "w", "1")
    told: list[str] = []
    slices = assembled([said("{}") if of == "said" else inserted(of, {}) for of in messages], cuts=cuts)
    seen: list[tuple[str, str, int]] = []
    count = 0
    for number, transaction in enumerate(slices):
        for table in (of.table for of in transaction.changes):
            ordinal = sum(name == table for name, *_ in seen)
            seen.append((table, f"{prefix}public.{table}/{ordinal}", count))
            count += ("public", table) in known
        by_now = min(done[number], count)
        told += places.take(transaction, by_now, {("public", "left out")})
        meant = [of for of in seen if of[0] != "left out"]
        if not transaction.last:
            # None before its turn; those that rules are not about go with what is before them.
            assert told == [place for _, place, _ in meant[: len(told)]]
            assert all(index < by_now for _, _, index in meant[: len(told)])
            assert all(index >= by_now for _, _, index in meant[len(told) :])
    if slices:
        contexts = [f"{prefix}cdc_worker.context/{number}" for number in range(messages.count("said"))]
        assert told == [place for name, place, _ in seen if name != "left out"] + contexts
        assert [*places.take(assembled([inserted("lead", {})])[0], 1)] == [f"{prefix}public.lead/0"]


# What was looked up is told again, also by rules that leave tables out


def test_what_was_found_for_a_change_is_found_by_rules_of_fewer_tables() -> None:
    """Answers are numbered as the changes of the recording, which has more tables than the rules have by now."""
    fewer = rules("""
[tables.deal]
lookups.owner = { table = "person", match = { id = "owner_id" } }
rules = [{ on = "insert", type = "deal_created", description = "by {lookup.owner.name}" }]
[tables.person]
key = "id"
""")
    (transaction,) = assembled(
        [inserted("other", {"id": 1}), inserted("deal", {"id": 1, "owner_id": 7}), inserted("other", {"id": 2})]
    )
    transaction = msgspec.structs.replace(transaction, answers={(1, "owner"): {"name": "Ada"}})
    transformer = Transformer(fewer, worker="w", system_identifier="1")
    (told,) = settled(transformer, transaction, dict.fromkeys)
    assert isinstance(told, Activity)
    assert told.fields["description"] == "by Ada"


@pytest.mark.parametrize(("masked", "seen"), [('["name"]', "***"), ('{ name = "hash" }', HASHED)])
def test_what_was_found_for_a_change_is_masked_if_it_is_by_now_and_once(masked: str, seen: str) -> None:
    compiled = rules(
        f"""
[tables.deal]
lookups.owner = {{ table = "person", match = {{ id = "owner_id" }} }}
rules = [{{ on = "insert", type = "deal_created", description = "by {{lookup.owner.name}}" }}]
[tables.person]
key = "id"
masked = {masked}
""",
        mask_key="k" * 16,
    )
    (transaction,) = assembled([inserted("deal", {"id": 1, "owner_id": 7})])
    for found in ("Ada", seen):  # also in a recording all else of which isn't masked
        known = msgspec.structs.replace(transaction, answers={(0, "owner"): {"name": found}})
        (told,) = settled(Transformer(compiled, worker="w", system_identifier="1"), known, dict.fromkeys)
        assert isinstance(told, Activity)
        assert told.fields["description"] == f"by {seen}"
