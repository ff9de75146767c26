"""Verify beside a server in trouble, after a lost slot, and given what it can't do anything with."""

from __future__ import annotations

import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psycopg
import pytest
from psycopg import sql
from support import PATIENCE, Crm, eventually, having, role
from test_backfill import called
from test_docs import assert_has, fields_table, shown
from test_verify import caught_up, insert, lose, missing, running, verified

from cdc_worker import errors, profile
from cdc_worker.cluster import Cluster
from cdc_worker.fence import Fence
from cdc_worker.verify import Difference, Disagreement, Unread, Verified


def test_a_commit_that_others_do_not_see_yet_is_no_fault(
    own_server: Cluster, own_crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a synchronous stand-by: it is in the WAL, and recorded."""
    crm = own_crm
    with running(crm), ThreadPoolExecutor() as pool, closing(psycopg.connect(crm.dsn, autocommit=True)) as other:
        insert(crm, 1, 2, 3)
        caught_up(crm)
        before = crm.value("SELECT count(*) FROM activity")
        doubts = called(monkeypatch, Fence, "settle")
        pid = other.info.backend_pid
        statement = (
            "WITH gone AS (DELETE FROM lead WHERE lead_id = 1),"
            " changed AS (UPDATE lead SET status = 'x' WHERE lead_id = 2)"
            " INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type) VALUES (4, 'Ada', 'web', 'jane', 't')"
        )
        with having(own_server, synchronous_standby_names="nobody"):
            written = pool.submit(other.execute, statement)
            eventually(lambda: crm.value("SELECT wait_event FROM pg_stat_activity WHERE pid = %s", pid) == "SyncRep")
            os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: crm.value("SELECT count(*) FROM activity") == before + 3)
            assert crm.execute("SELECT lead_id, status FROM lead ORDER BY 1") == [(1, "1"), (2, "1"), (3, "1")]
            found = pool.submit(verified, crm, "lead")
            assert doubts.wait(PATIENCE)
        finally:
            os.kill(pid, signal.SIGCONT)
        written.result(PATIENCE)
        disagreements, done = found.result(PATIENCE)
        assert disagreements == []
        assert done["lead"].subjects == 4


def test_after_a_lost_slot_a_repair_leads_back_to_a_true_log(crm: Crm) -> None:
    insert(crm, *range(1, 21))
    crm.execute("UPDATE lead SET status = '2', email = 'a@x'")
    crm.execute("INSERT INTO customer (customer_uid, name, type) VALUES (1, 'A', 't'), (2, 'B', 't'), (3, 'C', 't')")
    crm.record()
    crm.execute("SELECT pg_drop_replication_slot(%s)", crm.slot)
    # What nobody hears of.
    crm.execute("UPDATE lead SET status = '3' WHERE lead_id BETWEEN 1 AND 4")
    crm.execute("UPDATE lead SET bd_in_charge = 'joe', email = 'b@x', full_name = full_name || '!' WHERE lead_id = 4")
    crm.execute("DELETE FROM lead WHERE lead_id IN (5, 6, 7)")
    insert(crm, 6, 21)
    crm.execute("UPDATE lead SET lead_id = 108 WHERE lead_id = 8")
    crm.execute("UPDATE lead SET is_converted = true WHERE lead_id = 9")
    crm.execute("UPDATE customer SET is_closed = true, name = 'AA' WHERE customer_uid = 1")
    crm.execute("DELETE FROM customer WHERE customer_uid = 2")
    crm.execute("DELETE FROM cdc_worker.checkpoint")
    crm.setup()
    with running(crm):
        # And what it hears of again, before anything is made up for.
        crm.execute("UPDATE lead SET status = '4' WHERE lead_id IN (2, 4, 21)")
        crm.execute("DELETE FROM lead WHERE lead_id IN (3, 108)")
        insert(crm, 5)
        crm.execute("UPDATE lead SET lead_id = 110 WHERE lead_id = 10")
        caught_up(crm)
        found, done = verified(crm, repair=True)
        assert {of.repaired for of in found} == {"yes"}
        assert done["lead"].disagree == done["lead"].repaired > 8
        assert done["customer"].disagree == 2
        assert missing(crm) == []
        written = crm.value("SELECT count(*) FROM activity")
        assert missing(crm, repair=True) == []
        assert crm.value("SELECT count(*) FROM activity") == written
        crm.execute("UPDATE lead SET status = '5'")
        crm.execute("UPDATE customer SET is_closed = NOT is_closed")
        crm.execute("DELETE FROM lead WHERE mod(lead_id, 2) = 0")
        caught_up(crm)
        assert missing(crm) == []


def test_a_repair_that_the_target_refused_is_no_excuse_for_itself(crm: Crm) -> None:
    refuse = "ALTER TABLE activity ADD CONSTRAINT no_poison CHECK (metadata ->> 'new_status' <> 'poison') NOT VALID"
    crm.execute(refuse)
    with running(crm):
        insert(crm, 1)
        crm.execute("UPDATE lead SET status = 'poison'")
        caught_up(crm)
        assert [of.explained for of in verified(crm, repair=True)[0]] == ["dead letter"]
        crm.execute("DELETE FROM cdc_worker.dead_letter")
        for _ in range(2):
            (of,), done = verified(crm, "lead", repair=True)
            assert (of.explained, of.repaired) == (None, "the target refused it: see cdc-worker dead-letters list")
            assert not done["lead"].true
        assert "/repair/" in crm.value("SELECT change_key FROM cdc_worker.dead_letter")
        crm.execute("ALTER TABLE activity DROP CONSTRAINT no_poison")
        assert missing(crm, repair=True) == [("1", "change", ["status"])]
        assert missing(crm) == []


def test_it_prints_what_disagrees_and_ends_with_1(crm: Crm) -> None:
    with running(crm):
        insert(crm, *range(1, 31))
        crm.execute("UPDATE lead SET status = 'secret'")
        caught_up(crm)
        assert crm.succeed("verify", "lead") == "public.lead: 30 rows, 30 agree, 0 disagree\n"
        crm.execute("DELETE FROM activity WHERE activity_type = 'status_changed' AND lead_id > 4")
        done = crm.command("verify", "lead")
        assert done.returncode == 1
        first, *lines, last = done.stdout.splitlines()
        key = crm.value("SELECT change_key FROM activity WHERE lead_id = 5")
        assert first == "public.lead: 30 rows, 4 agree, 26 disagree"
        assert lines[0] == f"  5: the log lacks its change of status, after {key}"
        assert (len(lines), last) == (20, "  and 6 more: --json tells of all")
        assert "secret" not in done.stdout + done.stderr
        told = crm.command("verify", "lead", "--values")
        assert 'status: "1" in the log, then "secret"' in told.stdout
        as_json = crm.command("verify", "--json")
        records = [json.loads(line) for line in as_json.stdout.splitlines()]
        assert [of["record"] for of in records] == ["disagreement"] * 26 + ["summary"] * 2
        assert "secret" not in as_json.stdout
        mended = crm.command("verify", "lead", "--repair")
        assert mended.returncode == 0
        assert mended.stdout.splitlines()[:2] == [
            "public.lead: 30 rows, 4 agree, 26 disagree, 26 repaired by 26 activities",
            f"  5: the log lacks its change of status, after {key}; repaired",
        ]


# What it can do nothing with


def refused(crm: Crm, *tables: str) -> str:
    with pytest.raises(errors.CdcWorkerError) as raised:
        verified(crm, *tables)
    return f"{raised.value} / {raised.value.hint}"


def test_tables_that_it_can_not_verify_are_named_with_the_reason(crm: Crm) -> None:
    assert refused(crm, "leads") == (
        'the profile "leadfi" has no table "leads" / those it has: lead, customer, contact'
    )
    assert refused(crm, "contact") == (
        "contact can't be verified: it has no rules, so nothing is recorded of it / those that can: lead, customer"
    )
    assert refused(crm).startswith(f'nobody reads the slot "{crm.slot}"')
    done = crm.command("verify", "leads")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    crm.execute("ALTER TABLE lead DROP CONSTRAINT lead_pkey CASCADE")
    assert refused(crm, "lead") == (
        'public.lead has no primary key on its "key" in the profile (lead_id), by which its rows could be read'
        ' / as its owner: ALTER TABLE "public"."lead" ADD PRIMARY KEY ("lead_id")'
    )


def test_without_setup_it_says_so(bare_crm: Crm) -> None:
    assert "cdc-worker setup" in refused(bare_crm)


def test_a_key_that_no_column_links_to_is_a_reason(crm: Crm) -> None:
    path = crm.directory / "unlinked.toml"
    backfill = re.compile(r"\[tables.customer.rules.backfill\]\n.*?\n\n", re.DOTALL)
    text = backfill.sub("", profile.read("leadfi"))
    path.write_text(text.replace('key = "customer_uid"', 'key = ["customer_uid", "name"]'), "utf-8")
    crm.settings["profile"] = str(path)
    assert refused(crm, "customer") == (
        "customer can't be verified: no column of activity links to its name, by which its log is found"
        " / those that can: lead"
    )


def test_a_table_that_triggers_record_can_not_be_verified(crm: Crm) -> None:
    crm.execute("UPDATE cdc_worker.excluded SET until_lsn = NULL, triggers = true WHERE table_name = 'public.customer'")
    with running(crm):
        assert refused(crm, "customer") == (
            "public.customer can't be verified: it is left to triggers, and the worker doesn't record all of it"
            " / run: cdc-worker cutover"
        )
        assert missing(crm, "lead") == []


def test_a_role_that_may_not_read_is_told_so(crm: Crm) -> None:
    with role(crm), running(crm):
        done = crm.command("verify", "lead")
        assert done.returncode == 1
        assert "permission denied for table" in done.stderr
        assert "Traceback" not in done.stderr
        cdc = sql.Identifier("cdc")
        for grant in ("SELECT ON lead, customer, activity, cdc_worker.skipped TO {}",):
            crm.connection.execute(sql.SQL("GRANT " + grant).format(cdc))
        insert(crm, 1)
        assert crm.succeed("verify", "lead") == "public.lead: 1 rows, 1 agree, 0 disagree\n"
        lose(crm, "lead_created", 1)
        refused = crm.command("verify", "lead", "--repair")
        assert (refused.returncode, refused.stderr.splitlines()[-1]) == (
            1,
            'hint: as the owner: GRANT SELECT, INSERT, DELETE ON cdc_worker.replay TO "cdc"',
        )
        crm.connection.execute(sql.SQL("GRANT SELECT, INSERT, DELETE ON cdc_worker.replay TO {}").format(cdc))
        mended = crm.command("verify", "lead", "--repair")
        assert mended.returncode == 0, mended.stderr


# What its page says


def test_its_page_lists_the_fields_that_it_prints() -> None:
    assert_has("docs/verify.md", fields_table(Disagreement, Difference))
    assert_has("docs/verify.md", fields_table(Verified))
    assert_has("docs/verify.md", fields_table(Unread))


def test_it_prints_what_its_page_shows(crm: Crm) -> None:
    with running(crm):
        insert(crm, *range(1, 7))
        crm.execute("UPDATE lead SET status = '2' WHERE lead_id = 2")
        crm.execute("DELETE FROM lead WHERE lead_id = 6")
        caught_up(crm)
        lose(crm, "status_changed", 2)
        lose(crm, "lead_created", 3)
        lose(crm, "lead_deleted", 6)
        printed = crm.command("verify", "lead").stdout
    (page,) = shown("docs/verify.md", "public.lead: 6 rows")
    alike = re.compile(r"\S+/\d+/[0-9A-F]{16}/")
    assert alike.sub("#/", page) == alike.sub("#/", printed)
