"""After a profile has changed, what was recorded becomes what the profile says now, and nothing else is touched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from factories import assembled, inserted, rules
from support import Crm, crm_on, eventually
from test_replay import Workload, replayed, written

from cdc_worker import config, log, profile
from cdc_worker.activities import Activity
from cdc_worker.cluster import Cluster
from cdc_worker.replay import Wishes
from cdc_worker.rewrite import Rewritten, rewrite
from cdc_worker.transform import Transformer, settled

SHIPPED = profile.read("leadfi")

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


def say(crm: Crm, *changes: tuple[str, str], more: str = "", table: str = "") -> None:
    """Let the profile say something else from now on: texts of the shipped one, each with what replaces it."""
    text = SHIPPED
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
    say(crm, ('[[tables.lead.rules]]\non = "insert"', '[[tables.lead.rules]]\nname = "new"\non = "insert"'))
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


def without_frames(recording: Path, but: Callable[[int, bytes], bool]) -> None:
    """Leave only some frames of a recording: by their number, and what is in them."""
    decompress, number = zstandard.ZstdDecompressor(), 0
    for file in sorted(recording.iterdir()):
        data, kept = file.read_bytes(), b""
        while data:
            one = decompress.decompressobj()
            text = one.decompress(data)
            frame, data = data[: len(data) - len(one.unused_data)], one.unused_data
            kept += frame if but(number, text) else b""
            number += 1
        file.write_bytes(kept)


def test_a_gap_never_reads_as_removed(crm: Crm, recording: Path) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        for _ in range(5):
            count = len(crm.types())
            crm.add_leads(1)
            eventually(lambda count=count: len(crm.types()) > count)  # type: ignore[misc]
        worker.terminate()
    say(crm, ('[[tables.lead.rules]]\non = "insert"', '[[tables.lead.rules]]\nname = "new"\non = "insert"'))
    without_frames(recording, lambda number, text: b"Lead 1" in text and number % 2 == 1)
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
    say(crm, ('[[tables.lead.rules]]\non = "insert"', '[[tables.lead.rules]]\nname = "new"\non = "insert"'))
    done = rewritten(crm)
    assert (done.activities, done.changed, done.removed) == ({}, {}, {})
    assert done.missing
    assert crm.types() == ["lead_created"] * 3


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


def test_who_was_erased_stays_erased(crm: Crm, recording: Path) -> None:
    crm.add_leads(2)
    crm.execute("UPDATE lead SET status = '7. lost'")
    crm.record()
    crm.succeed("forget", "--lead", "1", "--yes")
    blank = [activity for activity in crm.activities() if activity["lead_id"] == 1]
    say(
        crm,
        ("old_status = ", "before = "),
        ('[[tables.lead.rules]]\non = "insert"', '[[tables.lead.rules]]\nname = "new"\non = "insert"'),
    )
    done = rewritten(crm)
    assert (done.activities, done.removed) == ({"lead_created": 1}, {"lead_created": 1})
    assert done.changed == {"status_changed": 1}
    assert [activity for activity in crm.activities() if activity["lead_id"] == 1] == blank
    assert nothing_left(crm)


@pytest.mark.parametrize("then", ["false", "true"])
def test_what_messages_may_ask_for_by_now(crm: Crm, fresh: Crm, recording: Path, then: str) -> None:
    """Skipped or told one by one, collapsed or not: all of it as the settings have it now."""
    for said in ({"skip": True}, {"collapse": {"description": "An import"}}, {"changed_by": "ann"}):
        with crm.connection.transaction():
            crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', %s)", json.dumps(said))
            crm.add_leads(2)
            crm.execute("UPDATE lead SET status = '2. proposal' WHERE status LIKE '1%%'")
    crm.record(unsigned_control="true" if then == "false" else "false")
    for of in (crm, fresh):
        of.settings |= {"unsigned_control": then, "profile": "leadfi"}
    done = rewritten(crm)
    told = {"lead_created": 4, "status_changed": 4}
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
