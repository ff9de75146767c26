"""After a profile has changed, what was recorded becomes what the profile says now, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from factories import assembled, inserted, rules
from support import Crm, crm_on
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
