"""`cdc-worker recover`: what it says and does, with which rights, and whose slots it leaves alone."""

from __future__ import annotations

import re
from contextlib import closing

import psycopg
import pytest
from doctoring import ailing, healthy
from storms import Faults, killed
from support import Crm, eventually, role, stranger
from test_bad_input import add, one_error
from test_docs import shown, varying
from test_slot_faults import drop, gaps, make_anew, names, position, recovered, true_and_goes_on
from test_status import seen
from test_verify import missing, running

from cdc_worker import checkpoint, errors, gap
from cdc_worker.activities import Clusters
from cdc_worker.cluster import Cluster


def test_where_nothing_is_wrong_nothing_is_done(crm: Crm) -> None:
    add(crm, "Ann")
    crm.record()
    before = crm.execute("SELECT * FROM cdc_worker.checkpoint")
    for arguments in ((), ("--dry-run",)):
        assert crm.succeed("recover", *arguments).startswith(f"nothing to do: the worker is at {position(crm)}, and ")
    assert crm.execute("SELECT * FROM cdc_worker.checkpoint") == before
    assert gaps(crm) == []


def test_it_says_what_it_would_do_and_does_it_once(crm: Crm) -> None:
    add(crm, "Ann")
    crm.record()
    crm.execute("UPDATE lead SET status = 'x'")
    drop(crm)
    add(crm, "Bob")
    at = position(crm)
    before = crm.execute("SELECT * FROM cdc_worker.checkpoint")
    wrong, noted, made, goes_on, verified = crm.succeed("recover", "--dry-run").splitlines()
    assert wrong.startswith(f'wrong: slot "{crm.slot}" does not exist: changes from {at} (')
    assert noted.startswith(f"it would be noted that changes from {at} (")
    assert (made, goes_on) == (
        f'slot "{crm.slot}" would be made',
        f'worker "{crm.slot}" would go on where that begins',
    )
    assert verified == "beside a worker all tables would be verified, and what is missing made up for"
    assert (crm.execute("SELECT * FROM cdc_worker.checkpoint"), gaps(crm), crm.types()) == (
        before,
        [],
        ["lead_created"],
    )
    recovered(crm)
    assert sorted(crm.types()) == ["lead_created", "lead_created", "status_changed"]
    ((code, since, until, reconciled),) = gaps(crm)
    assert (code, since, reconciled) == (errors.SlotMissingError.exit_code, at, True)
    assert crm.value("SELECT slot_created_at <= %s FROM cdc_worker.checkpoint", until)
    true_and_goes_on(crm)


def test_until_it_is_reconciled_status_and_doctor_say_so(crm: Crm, faults: Faults) -> None:
    """The worker runs meanwhile: all that is committed now is recorded."""
    add(crm, "Ann")
    crm.record()
    make_anew(crm)
    killed(crm, faults, "checkpoint_made", 1, "recover")
    with running(crm):
        add(crm, "Bob")
        eventually(lambda: names(crm) == ["Ann", "Bob"])
        ((_, since, until, _),) = gaps(crm)
        gap = re.compile(rf"gap from {since} \(20[-\d :]+ UTC\) to {until} \(20[-\d :]+ UTC\): ")
        assert gap.match(seen(crm).late or "")
        assert "\ngap:          not reconciled: from " in crm.succeed("status")
        found = ailing(crm, "checkpoint")
        assert gap.match(found.message)
        assert (found.outcome, found.fix) == ("failed", "as the owner: cdc-worker recover")
        assert "\nreconciled, by 0 activities; " in crm.succeed("recover")
        assert healthy(crm, "checkpoint")
        assert seen(crm).gaps == []


@pytest.mark.chaos
def test_within_a_large_commit_it_is_made_up_for_from_there(crm: Crm, faults: Faults) -> None:
    crm.add_leads(12_000)
    with crm.worker() as worker:
        eventually(lambda: crm.value("SELECT changes FROM cdc_worker.checkpoint"))
        worker.kill()
        faults["SIGKILL at random"] += 1
    done = len(crm.types())
    assert 0 < done < 12_000
    make_anew(crm)
    said, _ = one_error(crm, ["run"], errors.SlotAheadError.exit_code)
    assert ", with a part of the commit at " in said
    assert "12,000 rows" in recovered(crm)
    assert crm.value("SELECT count(DISTINCT lead_id) FROM activity WHERE activity_type = 'lead_created'") == 12_000
    true_and_goes_on(crm)


# Whose slot it is


def test_a_slot_that_a_stranger_reads_is_left_to_it(server: Cluster, crm: Crm) -> None:
    crm.record()
    make_anew(crm)
    with stranger(server, crm) as (process, pid):
        said, _ = one_error(crm, ["recover"], 1)
        assert said == f'slot "{crm.slot}" is read by process {pid} (pg_recvlogical, 127.0.0.1)'
        assert gaps(crm) == []
        process.kill()
        process.wait()
    eventually(lambda: crm.reader() is None)
    recovered(crm)


def test_a_slot_of_another_plugin_is_left_alone_and_another_name_will_do(crm: Crm) -> None:
    add(crm, "Ann")
    crm.record()
    drop(crm)
    crm.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", crm.slot)
    add(crm, "Bob")
    said, hint = one_error(crm, ["recover"], 1)
    assert said.startswith(f'slot "{crm.slot}" is of the plugin "test_decoding"')
    assert hint.startswith(
        f"if nobody needs it: SELECT pg_drop_replication_slot('{crm.slot}'); or name another slot in "
    )
    crm.settings |= {"slot": f"{crm.slot}_b", "name": crm.slot}
    recovered(crm)
    assert names(crm) == ["Ann", "Bob"]
    assert crm.value("SELECT slot FROM cdc_worker.checkpoint") == f"{crm.slot}_b"
    assert crm.value("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", crm.slot) == 1


def test_settings_that_name_another_slot_are_no_gap(crm: Crm) -> None:
    said, _ = one_error(crm, ["recover"], 1, slot="another", name=crm.slot)
    assert said == f'the worker "{crm.slot}" reads the slot "{crm.slot}", not "another"'


def test_another_worker_of_the_database_is_left_alone(crm: Crm) -> None:
    other = {"slot": f"{crm.slot}_b", "name": "b"}
    crm.succeed("setup", **other)
    add(crm, "Ann")
    crm.record()
    drop(crm)
    before = crm.execute("SELECT * FROM cdc_worker.checkpoint WHERE worker = 'b'")
    add(crm, "Bob")
    recovered(crm)
    assert crm.execute("SELECT * FROM cdc_worker.checkpoint WHERE worker = 'b'") == before
    assert crm.succeed("recover", **other).startswith("nothing to do: ")
    crm.record(**other)
    assert sorted(names(crm)) == ["Ann", "Ann", "Bob", "Bob"]


# What it takes


def test_without_its_rights_nothing_is_done(crm: Crm) -> None:
    drop(crm)
    with role(crm):
        said, hint = one_error(crm, ["recover"], 1)
        assert said.startswith('role "cdc" lacks ')
        assert hint.startswith("as the owner: GRANT ")
    assert gaps(crm) == []


_OWNED = """
SELECT format('ALTER TABLE %%s OWNER TO landlord', oid::regclass) FROM pg_class
WHERE relnamespace = ANY (ARRAY['public'::regnamespace, 'cdc_worker'::regnamespace]) AND relkind IN ('r', 'v', 'S')
    AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype IN ('a', 'i') AND relkind = 'S')
UNION ALL
SELECT format('ALTER FUNCTION %%s OWNER TO landlord', oid::regprocedure) FROM pg_proc
WHERE pronamespace = 'cdc_worker'::regnamespace
UNION ALL
SELECT format('ALTER SCHEMA %%s OWNER TO landlord', oid::regnamespace) FROM pg_namespace
WHERE oid = ANY (ARRAY['public'::regnamespace, 'cdc_worker'::regnamespace])
UNION ALL
SELECT format('ALTER DATABASE %%I OWNER TO landlord', current_database())
UNION ALL
SELECT format('ALTER PUBLICATION %%I OWNER TO landlord', pubname) FROM pg_publication
"""


def own(crm: Crm, role: str) -> None:
    """Let another role own the database, and what is in it."""
    for (statement,) in crm.execute(_OWNED):
        crm.connection.execute(statement.replace("landlord", role).encode())


def test_an_owner_who_may_not_replicate_is_told_what_an_administrator_does(crm: Crm) -> None:
    add(crm, "Ann")
    crm.record()
    drop(crm)
    add(crm, "Bob")
    crm.execute("CREATE ROLE landlord LOGIN")
    own(crm, "landlord")
    crm.settings["dsn"] = psycopg.conninfo.make_conninfo(crm.dsn, user="landlord")
    try:
        done = crm.command("recover")
        assert done.returncode == 1
        create = f"SELECT lsn FROM pg_create_logical_replication_slot('{crm.slot}', 'wal2json')"
        assert f"\n  {create};\n" in done.stderr
        assert gaps(crm) == []
        crm.connection.execute(create.encode())
        add(crm, "Cid")
        crm.execute("ALTER ROLE landlord REPLICATION")  # without which it runs no worker either
        recovered(crm)
        assert sorted(names(crm)) == ["Ann", "Bob", "Cid"]
    finally:
        del crm.settings["dsn"]
        crm.execute("REASSIGN OWNED BY landlord TO postgres")
        crm.execute("DROP ROLE landlord")


# What its page says


def test_operating_shows_what_is_printed(bare_crm: Crm) -> None:
    crm = bare_crm
    crm.slot = crm.settings["slot"] = "cdc_worker"
    crm.setup()
    crm.add_leads(2)
    crm.record()
    drop(crm)
    crm.execute("UPDATE lead SET status = 'x' WHERE lead_id = 1")
    crm.execute("DELETE FROM lead WHERE lead_id = 2")
    crm.add_leads(1)
    (page,) = shown("docs/operating.md", 'error: slot "cdc_worker" does not exist')
    assert varying(page) == varying("error: " + crm.command("run").stderr.split("error: ")[1])
    (page,) = shown("docs/operating.md", 'wrong: slot "cdc_worker" does not exist')
    assert varying(page) == varying(crm.succeed("recover"))
    assert missing_nothing(crm)


def missing_nothing(crm: Crm) -> bool:
    with running(crm):
        return missing(crm) == []


# Which cluster came after which


def test_the_clusters_of_a_worker_are_those_that_it_was_led_on_from(crm: Crm) -> None:
    with closing(psycopg.connect(crm.dsn, autocommit=True)) as connection:
        known = checkpoint.read(connection, crm.slot)
        here = known.system_identifier

        def moved(before: str, after: str) -> Clusters:
            connection.execute(
                "INSERT INTO cdc_worker.gap (worker, exit_code, reason, system_identifier, from_lsn, from_time,"
                " until_system_identifier, until_lsn) VALUES (%s, 16, '', %s, '0/1', now(), %s, '0/1')",
                (crm.slot, before, after),
            )
            return gap.clusters(connection, known)

        assert gap.clusters(connection, known) == Clusters(here)
        assert moved("1", "2") == Clusters(here), "not known to lead here"
        assert moved("2", here) == Clusters(here, ("1", "2"))
        assert moved(here, here) == Clusters(here, ("1", "2")), "a slot was lost"
        assert moved(here, "3") == Clusters(here, ("1", "2")), "not come here from there"
        assert moved("3", here) == Clusters(here), "nobody knows what was first"
