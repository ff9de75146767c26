"""The publication: setup makes it of what is captured, nothing else stays in it, and the application isn't harmed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
import structlog
from doctoring import ailing, cure, findings, healthy, mend
from psycopg import sql
from psycopg.conninfo import make_conninfo
from servers import plugins
from support import Crm, WorkerProcess, crm_on, eventually, role

from cdc_worker import config, errors, postgres, publication
from cdc_worker.cluster import Cluster
from cdc_worker.process import Process
from cdc_worker.profile import load
from cdc_worker.vitals import Vitals
from cdc_worker.watch import Watch

TARGET = """
name = "published"
[target]
table = "activity"
columns = { activity_type = "type", description = "description", change_key = "change_key" }
"""

INSERTS = """
[[tables.{0}.rules]]
on = "insert"
type = "created"
description = "{0} {{new.id}}"
"""

UPDATES = """
[[tables.{0}.rules]]
on = "update"
changed = "*"
type = "updated"
description = "{0} {{new.id}}: {{old.note}} -> {{new.note}}"
"""

TABLES: LiteralString = """
CREATE TABLE whole (id int PRIMARY KEY, note text);
CREATE TABLE plain (id int PRIMARY KEY, note text);
CREATE TABLE keyless (id int, note text);
CREATE TABLE lax (id int PRIMARY KEY DEFERRABLE, note text);
CREATE TABLE hidden (id int PRIMARY KEY, note text);
ALTER TABLE hidden REPLICA IDENTITY NOTHING;
CREATE TABLE "In, dexed" (id int NOT NULL UNIQUE, note text);
ALTER TABLE "In, dexed" REPLICA IDENTITY USING INDEX "In, dexed_id_key";
CREATE TABLE rooted (id int PRIMARY KEY, note text) PARTITION BY RANGE (id);
CREATE TABLE rooted_1 PARTITION OF rooted FOR VALUES FROM (0) TO (10);
CREATE TABLE rooted_2 PARTITION OF rooted FOR VALUES FROM (10) TO (20);
ALTER TABLE rooted_2 REPLICA IDENTITY NOTHING;
CREATE TABLE loose (id int, note text) PARTITION BY RANGE (id);
CREATE TABLE loose_1 PARTITION OF loose FOR VALUES FROM (0) TO (10);
CREATE TABLE loose_2 PARTITION OF loose FOR VALUES FROM (10) TO (20) PARTITION BY RANGE (id);
CREATE TABLE loose_2_1 PARTITION OF loose_2 FOR VALUES FROM (10) TO (15);
CREATE TABLE heir () INHERITS (plain);
CREATE TABLE alone (id int, note text);
"""

CAPTURED = ("whole", "plain", "keyless", "lax", "hidden", "'In, dexed'", "rooted", "loose")


def make(crm: Crm, plugin: str, *tables: str, ddl: LiteralString = TABLES) -> Crm:
    """Make tables, and have some captured; of `whole` the updates, too. The next setup takes this plugin."""
    crm.settings |= {"profile": str(profile(crm, *tables)), "plugin": plugin}
    crm.connection.execute(ddl)
    return crm


def profile(crm: Crm, *tables: str) -> Path:
    """A profile of these tables."""
    path = crm.directory / "published.toml"
    rules = [INSERTS.format(name) + UPDATES.format(name) * (name == "whole") for name in tables]
    path.write_text(TARGET + "".join(rules))
    return path


def published(crm: Crm) -> list[str]:
    """What stands in the worker's publication."""
    query = """
        SELECT prrelid::regclass::text FROM pg_publication_rel JOIN pg_publication p ON p.oid = prpubid
        WHERE pubname = %s ORDER BY 1
    """
    return [name for (name,) in crm.execute(query, crm.slot)]


def check(crm: Crm) -> None:
    """What the worker asks at its start, without waiting for a lock."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    with postgres.connect(crm.dsn, crm.slot) as connection:
        connection.execute("SET lock_timeout = '100ms'")
        publication.check(connection, settings.publication_name, settings.rules(load(settings.profile)))


def write(crm: Crm, *tables: str, ids: str = "VALUES (1)") -> None:
    """Do with tables what an application does: none of it may fail."""
    for name in tables:
        table = sql.Identifier(name.strip("'"))
        for statement in (
            f"INSERT INTO {{}} (id) {ids}",
            "UPDATE {} SET note = 'x'",
            "UPDATE {} SET id = id + 1 WHERE id % 10 = 1",
            "DELETE FROM {} WHERE id % 10 = 2",
        ):
            crm.connection.execute(sql.SQL(statement).format(table))


# What is in it


def test_setup_publishes_what_is_captured_and_nothing_else(bare_crm: Crm) -> None:
    bare_crm.setup()
    assert published(bare_crm) == ["contact", "customer", "lead"]
    found = bare_crm.execute("SELECT pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot FROM pg_publication")
    assert found == [(True, True, True, True, False)]
    assert healthy(bare_crm, "publication")
    check(bare_crm)


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
def test_the_application_can_update_and_delete_all_that_is_published(new_crm: Crm, plugin: str) -> None:
    """Tables without a key, with one that may be violated for a while, partitioned ones, and partitions to come."""
    crm = make(new_crm, plugin, *CAPTURED)
    write(crm, *CAPTURED)
    crm.setup()
    assert published(crm) == [
        *('"In, dexed"', "hidden", "keyless", "lax", "loose_1", "loose_2_1", "plain", "rooted", "whole"),
    ]
    identities: LiteralString = """
        SELECT relname FROM pg_class WHERE relreplident = 'f' AND relname NOT IN ('lead', 'customer') ORDER BY 1
    """
    full = ["hidden", "keyless", "lax", "loose_1", "loose_2_1", "rooted_2", "whole"]
    assert [name for (name,) in crm.execute(identities)] == full
    write(crm, *CAPTURED, "heir", "alone")
    write(crm, "rooted", "loose", ids="VALUES (11)")
    crm.execute("CREATE TABLE rooted_3 PARTITION OF rooted FOR VALUES FROM (20) TO (30)")
    write(crm, "rooted", ids="VALUES (21)")
    crm.record()
    told = [activity["description"] for activity in crm.activities() if activity["activity_type"] == "created"]
    assert sorted(told) == sorted([*(f"{name} 1" for name in CAPTURED), "loose 11", "rooted 11", "rooted 21"])
    crm.succeed("teardown", "--all", "--yes")
    assert published(crm) == []
    write(crm, *CAPTURED)
    assert crm.execute(identities) == []


def test_setup_again_changes_nothing_of_it(crm: Crm) -> None:
    rows = "SELECT p.xmin::text, r.xmin::text FROM pg_publication p JOIN pg_publication_rel r ON prpubid = p.oid"
    before = crm.execute(rows)
    crm.setup()
    assert crm.execute(rows) == before


def test_a_worker_that_runs_goes_on_while_tables_come_to_the_profile_and_go(new_crm: Crm) -> None:
    """On a quiet server, where it learns of nothing but by looking."""
    crm = make(new_crm, "pgoutput", "whole", "plain")
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        profile(crm, "whole", "rooted")
        crm.setup()
        crm.execute("INSERT INTO rooted VALUES (1)")
        eventually(crm.activities)
        profile(crm, "rooted")
        crm.setup()
        eventually(lambda: len(worker.events("profile_reloaded")) == 2)
        crm.connection.execute(f"ALTER PUBLICATION {crm.slot} DROP TABLE rooted".encode())
        assert worker.wait() == errors.PublicationError.exit_code
    assert [activity["description"] for activity in crm.activities()] == ["rooted 1"]


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
def test_a_table_is_published_when_it_comes_to_the_profile_and_no_longer_when_it_has_gone(
    new_crm: Crm, plugin: str
) -> None:
    crm = make(new_crm, plugin, "whole")
    crm.setup()
    profile(crm, "whole", "keyless", "rooted")
    crm.execute("INSERT INTO keyless VALUES (1)")
    crm.setup()
    assert published(crm) == ["keyless", "rooted", "whole"]
    write(crm, "keyless", "rooted", ids="VALUES (5)")
    crm.record()
    told = [activity["description"] for activity in crm.activities()]
    # wal2json sends what was committed before as well.
    assert told == ["keyless 1"] * (plugin == "wal2json") + ["keyless 5", "rooted 5"]
    profile(crm, "whole", "rooted")
    assert "public.keyless is no longer published" in crm.succeed("setup").splitlines()
    assert published(crm) == ["rooted", "whole"]
    check(crm)


def test_of_a_transaction_that_is_under_way_nothing_is_recorded_in_part(new_crm: Crm) -> None:
    """pgoutput would send what it wrote after the table was published."""
    crm = make(new_crm, "pgoutput", "whole")
    crm.setup()
    profile(crm, "whole", "plain")
    with psycopg.connect(crm.dsn) as other:
        other.execute("INSERT INTO plain VALUES (1)")
        with WorkerProcess(["setup"], crm.environment(), crm.directory / "setup.log") as process:
            waiting = process.wait_for("waiting_for_lock")
            assert waiting["held_by"] == [f"process {other.info.backend_pid} (client backend)"]
            other.execute("INSERT INTO plain VALUES (2)")
            other.commit()
            assert process.wait() == 0
    crm.execute("INSERT INTO plain VALUES (3)")
    crm.record()
    assert [activity["description"] for activity in crm.activities()] == ["plain 3"]


def test_nobody_waits_for_long_while_a_table_is_published(new_crm: Crm) -> None:
    """What may not be changed meanwhile is held by a vacuum, say; the application's writes go on."""
    crm = make(new_crm, "pgoutput", "plain")
    with psycopg.connect(crm.dsn) as other:
        other.execute("LOCK TABLE plain IN SHARE UPDATE EXCLUSIVE MODE")
        with WorkerProcess(["setup"], crm.environment(), crm.directory / "setup.log") as process:
            waiting = process.wait_for("waiting_for_lock")
            assert waiting["held_by"] == [f"process {other.info.backend_pid} (client backend)"]
            write(crm, "plain")
            other.commit()
            assert process.wait() == 0
    assert published(crm) == ["plain"]


def test_the_worker_asks_though_a_table_is_locked(new_crm: Crm) -> None:
    """As it is while its structure is changed: a worker that waited then could not write what it has."""
    crm = make(new_crm, "pgoutput", "rooted", "plain")
    crm.setup()
    with psycopg.connect(crm.dsn) as other:
        other.execute("LOCK TABLE rooted, plain")
        check(crm)


# What others do to it

LOSSES: dict[LiteralString, str] = {
    "DROP PUBLICATION {}": 'the publication "{}" does not exist: changes are lost',
    "ALTER PUBLICATION {} DROP TABLE lead": 'the publication "{}" lacks public.lead: changes of it are lost',
    "ALTER PUBLICATION {} SET (publish = 'insert')": (
        'the publication "{}" leaves out UPDATE, DELETE, TRUNCATE: changes are lost'
    ),
    "ALTER PUBLICATION {} SET (publish_via_partition_root)": (
        'the publication "{}" leaves out the names of partitions: changes are lost'
    ),
    "ALTER PUBLICATION {} SET TABLE lead, customer, contact WHERE (contact_id > 0)": (
        'the publication "{}" leaves out rows or columns of public.contact: changes are lost'
    ),
    "ALTER PUBLICATION {} SET TABLE lead, customer, contact (contact_id)": (
        'the publication "{}" leaves out rows or columns of public.contact: changes are lost'
    ),
}


@pytest.fixture(scope="module")
def pgoutput_crm(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crm]:
    """A worker that pgoutput reads for, and what it has lost is set up again."""
    with crm_on(server, tmp_path_factory.mktemp("pgoutput"), prepared=True, plugin="pgoutput") as crm:
        yield crm


@pytest.mark.parametrize("statement", LOSSES)
def test_what_would_be_lost_is_found_and_mended(pgoutput_crm: Crm, statement: LiteralString) -> None:
    crm = pgoutput_crm
    crm.connection.execute(sql.SQL(statement).format(sql.Identifier(crm.slot)))
    with pytest.raises(errors.PublicationError) as caught:
        check(crm)
    assert str(caught.value) == LOSSES[statement].format(crm.slot)
    found = cure(crm, "publication")
    assert (found.outcome, found.message, found.fix) == ("failed", str(caught.value), caught.value.hint)
    check(crm)


def test_the_worker_ends_where_changes_would_be_lost_and_has_not_confirmed_them(pgoutput_crm: Crm) -> None:
    crm = pgoutput_crm
    crm.add_leads(1)
    crm.connection.execute(f"ALTER PUBLICATION {crm.slot} DROP TABLE contact".encode())
    done = crm.command("run", "--once")
    assert done.returncode == errors.PublicationError.exit_code
    assert f'error: the publication "{crm.slot}" lacks public.contact: changes of it are lost' in done.stderr
    assert "hint: run: cdc-worker setup" in done.stderr
    crm.setup()
    crm.record()
    assert crm.types() == ["lead_created"]


def test_where_the_publication_was_made_anew_the_worker_ends_and_has_not_confirmed_what_came_before(
    each_server: Cluster, tmp_path: Path
) -> None:
    """From PostgreSQL 18 on the server warns and goes on without; before, it ends the stream at once."""
    with crm_on(each_server, tmp_path, prepared=True, plugin="pgoutput") as crm:
        confirmed: LiteralString = """
            SELECT lsn, confirmed_flush_lsn <= lsn
            FROM cdc_worker.checkpoint JOIN pg_replication_slots ON slot = slot_name
        """
        ((begun, _),) = crm.execute(confirmed)
        crm.connection.execute(f"DROP PUBLICATION {crm.slot}".encode())
        crm.add_leads(1)
        crm.setup()
        crm.add_leads(1)
        done = crm.command("run", "--once")
        assert "error: at a point of the WAL that is to be read the publication does not exist" in done.stderr
        assert done.returncode == errors.PublicationError.exit_code
        assert crm.execute(confirmed) == [(begun, True)]
        crm.succeed("teardown", "--yes")
        crm.setup()
        crm.add_leads(1)
        crm.record()
        assert crm.types() == ["lead_created"]


def test_a_worker_that_runs_notices_as_well(pgoutput_crm: Crm) -> None:
    crm = pgoutput_crm
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    watch = Watch(settings, Process(crm.slot), structlog.get_logger(), Vitals())
    rules = settings.rules(load(settings.profile))

    def look(connection: postgres.Connection) -> None:
        publication.check(connection, settings.publication_name, rules)

    watch.look(also=look)
    crm.connection.execute(f"ALTER PUBLICATION {crm.slot} DROP TABLE contact".encode())
    with pytest.raises(errors.PublicationError):
        watch.look(also=look)
    crm.setup()


AND_BACK: dict[LiteralString, LiteralString] = {
    "ALTER PUBLICATION {} DROP TABLE lead": "ALTER PUBLICATION {} ADD TABLE lead",
    "ALTER PUBLICATION {} SET (publish = 'update')": (
        "ALTER PUBLICATION {} SET (publish = 'insert, update, delete, truncate')"
    ),
}


@pytest.mark.parametrize("statement", AND_BACK)
def test_what_others_took_out_for_a_while_is_not_lost_without_a_word(new_crm: Crm, statement: LiteralString) -> None:
    """Of what was written meanwhile pgoutput tells nothing. wal2json does, from the same position."""
    crm = new_crm
    crm.settings |= {"plugin": "pgoutput", "publication": crm.slot}
    crm.setup()
    crm.add_leads(1)
    crm.record()
    for change in (statement, AND_BACK[statement]):
        crm.connection.execute(sql.SQL(change).format(sql.Identifier(crm.slot)))
        crm.add_leads(1)
    found = ailing(crm, "publication")
    assert found.outcome == "failed"
    assert found.message.startswith(
        f'the publication "{crm.slot}" was changed by others: what was meanwhile written to '
    )
    done = crm.command("run", "--once")
    assert done.returncode == errors.PublicationError.exit_code
    assert f"error: {found.message}\nhint: {found.fix}\n" in done.stderr
    del crm.settings["plugin"]
    noted = crm.succeed("setup")
    assert f'note: the publication "{crm.slot}" was changed by others: what was meanwhile written to public.' in noted
    assert "note: " not in crm.succeed("setup")
    assert healthy(crm, "publication")
    crm.succeed("switch-plugin", "--to", "wal2json")
    crm.record()
    assert crm.types() == ["lead_created"] * 3


def test_settings_that_name_another_publication(pgoutput_crm: Crm) -> None:
    """As with the slot's name after a switch. If it were made now, it would lack all that is still to be read."""
    crm = pgoutput_crm
    for command in (["run", "--once"], ["setup"]):
        done = crm.command(*command, publication=f"{crm.slot}_pgoutput")
        assert done.stderr.endswith(
            f'error: the worker reads by the publication "{crm.slot}", not "{crm.slot}_pgoutput"\n'
            f"hint: name {crm.slot} in CDC_WORKER_PUBLICATION\n"
        )
    crm.record()


def test_where_wal2json_is_read_it_matters_once_the_slot_is_switched(crm: Crm) -> None:
    crm.connection.execute(f"ALTER PUBLICATION {crm.slot} DROP TABLE lead".encode())
    found = cure(crm, "publication")
    assert (found.outcome, found.message) == (
        "warning",
        f'switched to pgoutput, the worker would stop: the publication "{crm.slot}" lacks public.lead:'
        " changes of it are lost",
    )
    assert published(crm) == ["contact", "customer", "lead"]


@pytest.mark.parametrize("members", ["TABLE alone", "TABLES IN SCHEMA public"])
def test_what_nobody_captures_is_found_and_taken_out(crm: Crm, members: str) -> None:
    crm.execute("CREATE TABLE alone (id int PRIMARY KEY)")
    crm.connection.execute(f"ALTER PUBLICATION {crm.slot} ADD {members}".encode())
    found = cure(crm, "publication")
    assert found.outcome == "warning"
    what = "public.alone" if members == "TABLE alone" else "all tables of public"
    assert found.message == f'the publication "{crm.slot}" has what nobody captures: {what}'


@pytest.mark.parametrize(
    "harm",
    [
        "ALTER TABLE contact DROP CONSTRAINT contact_pkey",
        "ALTER TABLE contact REPLICA IDENTITY NOTHING",
        "ALTER TABLE contact DROP CONSTRAINT contact_pkey, ADD PRIMARY KEY (contact_id) DEFERRABLE",
    ],
)
def test_a_table_that_the_application_can_no_longer_update(crm: Crm, harm: LiteralString) -> None:
    crm.execute("INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type) VALUES (1, 'Ann', 's', 'b', 't')")
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Ann')")
    crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (1, 1)")
    crm.execute(harm)
    with pytest.raises((psycopg.errors.ObjectNotInPrerequisiteState, psycopg.errors.InvalidTableDefinition)):
        crm.execute("UPDATE contact SET is_primary_contact = false")
    found = cure(crm, "publication")
    assert (found.outcome, found.message) == (
        "failed",
        f'the application can\'t update public.contact, which is in the publication "{crm.slot}" without a replica'
        " identity",
    )
    crm.execute("UPDATE contact SET is_primary_contact = false")


def test_a_table_that_somebody_else_has_put_in_and_the_application_can_not_update(crm: Crm) -> None:
    crm.execute("CREATE TABLE alone (id int)")
    crm.connection.execute(f"ALTER PUBLICATION {crm.slot} ADD TABLE alone".encode())
    alien, harmful = findings(crm, "publication")
    assert alien.outcome == "warning"
    assert harmful.message.startswith("the application can't update public.alone, which is in the publication ")
    mend(crm, harmful.fix or "")
    assert healthy(crm, "publication")


def test_a_partition_that_came_later_is_asked_for(new_crm: Crm) -> None:
    """The table has no key that its partitions would get: published with it, they could not be updated."""
    crm = make(new_crm, "pgoutput", "loose")
    crm.setup()
    crm.execute("CREATE TABLE loose_3 PARTITION OF loose FOR VALUES FROM (20) TO (30)")
    write(crm, "loose", ids="VALUES (21)")
    found = cure(crm, "publication")
    assert found.message == f'the publication "{crm.slot}" lacks public.loose_3: changes of it are lost'
    write(crm, "loose", ids="VALUES (25)")
    crm.record()
    assert [activity["description"] for activity in crm.activities()] == ["loose 25"]


def test_a_partitioned_table_that_loses_its_key_or_gets_one_is_published_as_it_was(new_crm: Crm) -> None:
    """With its key it is published itself, without by its partitions: nothing is lost before setup has seen to it."""
    crm = make(new_crm, "pgoutput", "rooted", "loose")
    crm.setup()
    for statement in (
        "ALTER TABLE rooted DROP CONSTRAINT rooted_pkey",
        "CREATE TABLE rooted_3 PARTITION OF rooted FOR VALUES FROM (20) TO (30)",
        "ALTER TABLE loose ADD PRIMARY KEY (id)",
    ):
        crm.connection.execute(statement.encode())
        crm.execute("INSERT INTO rooted VALUES (1), (11)")
        crm.execute("INSERT INTO loose VALUES (1), (11)")
        check(crm)
        crm.record()
        assert sorted(a["description"] for a in crm.activities()) == ["loose 1", "loose 11", "rooted 1", "rooted 11"]
        crm.execute("TRUNCATE rooted, loose, activity")
    for change, lacks in (("DROP", "public.loose"), ("ADD", "")):
        crm.connection.execute(f"ALTER PUBLICATION {crm.slot} {change} TABLE loose_1".encode())
        with pytest.raises(errors.PublicationError, match=f"lacks {lacks}: ") if lacks else nullcontext():
            check(crm)
    crm.setup()
    assert published(crm) == ["loose", "rooted_1", "rooted_2", "rooted_3"]
    write(crm, "rooted", "loose")
    crm.record()
    assert healthy(crm, "publication")


def test_generated_columns_do_not_keep_the_application_from_updating(each_server: Cluster, tmp_path: Path) -> None:
    """Stored ones are published where the server can. Of virtual ones a published old row would have to be without."""
    with crm_on(each_server, tmp_path, prepared=True, begun=False) as crm:
        make(crm, "pgoutput", "whole")
        crm.execute("ALTER TABLE whole ADD double int GENERATED ALWAYS AS (id * 2) STORED")
        crm.setup()
        write(crm, "whole")
        if crm.connection.info.server_version < 180000:
            return
        crm.execute("ALTER TABLE whole ADD triple int GENERATED ALWAYS AS (id * 3) VIRTUAL")
        with pytest.raises(psycopg.errors.InvalidColumnReference):
            write(crm, "whole", ids="VALUES (11)")
        lacking, harmful = findings(crm, "publication")
        assert lacking.message == (
            f'the publication "{crm.slot}" lacks public.whole (whose virtual generated columns would make UPDATE and'
            " DELETE fail): changes of it are lost"
        )
        assert harmful.message.endswith("with generated columns that are not")
        done = crm.command("setup")
        assert done.stderr == f"error: {lacking.message}\nhint: {lacking.fix}\n"
        write(crm, "whole", ids="VALUES (21)")
        crm.execute("ALTER TABLE whole DROP triple")
        crm.setup()
        write(crm, "whole", ids="VALUES (31)")
        assert healthy(crm, "publication")


def test_rules_on_generated_columns_that_do_not_come_are_refused(each_server: Cluster, tmp_path: Path) -> None:
    with crm_on(each_server, tmp_path, prepared=True, begun=False) as crm:
        make(
            crm, "pgoutput", ddl="CREATE TABLE sum (id int PRIMARY KEY, double int GENERATED ALWAYS AS (id * 2) STORED)"
        )
        path = crm.directory / "published.toml"
        path.write_text(TARGET + INSERTS.format("sum").replace("{new.id}", "{new.double}"))
        newer = crm.connection.info.server_version >= 180000
        refused = "captured table public.sum has double as a generated column, which pgoutput doesn't send before"
        checked = crm.command("profile", "check", str(path), plugin="auto")
        assert (checked.returncode, refused in checked.stdout) == ((0, False) if newer else (1, True))
        if not newer:
            with pytest.raises(errors.CatalogMismatchError, match=refused):
                crm.setup()
            if "wal2json" not in plugins(each_server):
                return
            crm.settings["plugin"] = "wal2json"
        crm.setup()
        crm.execute("INSERT INTO sum VALUES (4)")
        crm.record()
        assert [activity["description"] for activity in crm.activities()] == ["sum 8"]
        if newer:
            crm.execute("ALTER TABLE sum DROP double, ADD double int GENERATED ALWAYS AS (id * 2) VIRTUAL")
            with pytest.raises(
                errors.CatalogMismatchError, match="as a virtual generated column, which no plugin sends"
            ):
                crm.setup()


# Whose it is


@pytest.mark.parametrize("others", ["FOR TABLE lead", "FOR ALL TABLES", ""])
def test_a_publication_of_that_name_that_is_somebody_elses_is_left_as_it_is(bare_crm: Crm, others: str) -> None:
    bare_crm.connection.execute(f"CREATE PUBLICATION {bare_crm.slot} {others}".encode())
    before = bare_crm.execute("SELECT xmin::text, pubname FROM pg_publication"), published(bare_crm)
    note = f'note: the slot can\'t be switched to pgoutput: the publication "{bare_crm.slot}" is not of this worker'
    assert note in bare_crm.succeed("setup")
    found = ailing(bare_crm, "publication")
    assert found.outcome == "warning"
    bare_crm.succeed("teardown", "--all", "--yes")
    assert (bare_crm.execute("SELECT xmin::text, pubname FROM pg_publication"), published(bare_crm)) == before
    done = bare_crm.command("setup", plugin="pgoutput")
    said = f'the publication "{bare_crm.slot}" was not made for the worker "{bare_crm.slot}"'
    assert done.stderr.startswith(f"error: {said}\nhint: name another in CDC_WORKER_PUBLICATION; or, ")
    bare_crm.settings |= {"plugin": "pgoutput", "publication": "Another, one"}
    bare_crm.setup()
    bare_crm.add_leads(1)
    bare_crm.record()
    assert bare_crm.types() == ["lead_created"]


def without_create(crm: Crm) -> str:
    """Let the commands use a role that owns the tables, may replicate, and may make no publication."""
    owner, database = f"owner_{crm.slot}", sql.Identifier(crm.connection.info.dbname)
    crm.connection.execute(f"CREATE ROLE {owner} LOGIN REPLICATION".encode())
    crm.connection.execute(f"CREATE SCHEMA cdc_worker AUTHORIZATION {owner}".encode())
    crm.connection.execute(sql.SQL("REVOKE CREATE ON DATABASE {} FROM PUBLIC").format(database))
    for table in ("lead", "customer", "contact"):
        crm.connection.execute(f"ALTER TABLE {table} OWNER TO {owner}".encode())
    crm.connection.execute(f"GRANT CREATE, USAGE ON SCHEMA public TO {owner}".encode())
    crm.settings["dsn"] = make_conninfo(crm.dsn, user=owner)
    return owner


def test_who_may_make_none_is_told_so_and_needs_none_for_wal2json(bare_crm: Crm) -> None:
    owner = without_create(bare_crm)
    try:
        said = bare_crm.succeed("setup")
        assert f'note: the slot can\'t be switched to pgoutput without the publication "{bare_crm.slot}"; that' in said
        assert published(bare_crm) == []
        assert "CREATE PUBLICATION" in bare_crm.succeed("setup")
    finally:
        drop(bare_crm, owner)


def test_for_pgoutput_an_administrator_makes_it_first(bare_crm: Crm) -> None:
    """A slot that begins before its publication could not be read."""
    owner = without_create(bare_crm)
    bare_crm.settings["plugin"] = "pgoutput"
    try:
        done = bare_crm.command("setup")
        assert done.returncode == 1
        assert bare_crm.value("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", bare_crm.slot) == 0
        first, *lines, last = done.stderr.splitlines()
        assert first == "error: this needs more than the ownership of database and tables:"
        assert last == "hint: have an administrator do it, then the same again"
        bare_crm.connection.execute("\n".join(lines).encode())
        bare_crm.setup()
        bare_crm.add_leads(1)
        bare_crm.record()
        assert bare_crm.types() == ["lead_created"]
    finally:
        drop(bare_crm, owner)


def drop(crm: Crm, owner: str) -> None:
    for statement in ("REASSIGN OWNED BY {} TO postgres", "DROP OWNED BY {}", "DROP ROLE {}"):
        crm.connection.execute(sql.SQL(statement).format(sql.Identifier(owner)))


def test_a_worker_of_least_privilege_can_tell(pgoutput_crm: Crm) -> None:
    with role(pgoutput_crm):
        assert healthy(pgoutput_crm, "publication")
        assert healthy(pgoutput_crm, "plugin")


def test_a_setting_that_names_the_other_plugin_is_refused(pgoutput_crm: Crm) -> None:
    said = f'slot "{pgoutput_crm.slot}" is of the plugin pgoutput, and CDC_WORKER_PLUGIN is wal2json'
    pgoutput_crm.settings["plugin"] = "wal2json"
    try:
        for command, code in (("run", errors.SlotMismatchError.exit_code), ("setup", 1)):
            done = pgoutput_crm.command(command)
            assert f"error: {said}\nhint: run: cdc-worker switch-plugin\n" in done.stderr
            assert done.returncode == code
        assert ailing(pgoutput_crm, "checkpoint").message == said
    finally:
        pgoutput_crm.settings["plugin"] = "pgoutput"


def test_the_plan_has_the_publication_and_the_slot_with_its_plugin(bare_crm: Crm) -> None:
    bare_crm.settings["plugin"] = "pgoutput"
    planned = bare_crm.succeed("setup", "--dry-run")
    assert f'-- publication "{bare_crm.slot}" is made\n' in planned
    assert f'-- slot "{bare_crm.slot}" is made with pgoutput: CDC_WORKER_PLUGIN says so\n' in planned
