"""Batches of few rows: how they are written, and how many there are."""

from __future__ import annotations

import time

import psycopg
import pytest
from support import Crm, eventually

from cdc_worker import postgres
from cdc_worker.errors import FencedError
from cdc_worker.sink import MAX_AT_ONCE

LAST = """
SELECT string_agg(query, '') FROM pg_stat_activity
WHERE datname = current_database() AND application_name = %s AND backend_type = 'client backend'
"""

DROP_VIEWS = """
DO $$ DECLARE view regclass; BEGIN
    FOR view IN SELECT oid FROM pg_class WHERE relkind = 'v' AND relnamespace = 'public'::regnamespace LOOP
        EXECUTE format('DROP VIEW IF EXISTS %s CASCADE', view);
    END LOOP;
END $$
"""


def last_statements(crm: Crm) -> str:
    """What the worker's sessions did last."""
    return str(crm.value(LAST, postgres.application_name(crm.slot)))


def recorded(crm: Crm, count: int) -> None:
    eventually(lambda: crm.value("SELECT count(*) FROM activity") == count)


def test_few_rows_are_inserted_by_prepared_statements_and_many_are_copied(crm: Crm) -> None:
    with crm.worker() as worker:
        crm.add_leads(1)
        recorded(crm, 1)
        eventually(lambda: "COMMIT" in last_statements(crm) and "COPY" not in last_statements(crm))
        crm.add_leads(MAX_AT_ONCE + 1)
        recorded(crm, MAX_AT_ONCE + 2)
        eventually(lambda: "COPY" in last_statements(crm))
        assert worker.terminate() == 0


def test_no_value_of_a_row_stands_in_a_statement(crm: Crm) -> None:
    with crm.worker() as worker:
        crm.add_leads(1)
        recorded(crm, 1)
        assert "Lead" not in last_statements(crm)
        assert worker.terminate() == 0


def test_a_column_that_gets_another_type_between_two_batches_takes_what_it_can_hold(crm: Crm) -> None:
    with crm.worker() as worker:
        crm.add_leads(1)
        recorded(crm, 1)
        crm.connection.execute(DROP_VIEWS)
        crm.execute("ALTER TABLE activity DROP COLUMN manual_lead_id CASCADE")
        crm.execute("ALTER TABLE activity ALTER COLUMN lead_id TYPE bigint, ALTER COLUMN created_by DROP DEFAULT")
        # Of what a parameter was prepared for there is no way to this one.
        crm.execute("ALTER TABLE activity ALTER COLUMN created_by TYPE tsvector USING created_by::tsvector")
        crm.execute("ALTER TABLE lead ALTER COLUMN lead_id TYPE bigint")
        crm.execute("ALTER SEQUENCE lead_lead_id_seq AS bigint RESTART 5000000000")
        crm.add_leads(1)
        recorded(crm, 2)
        crm.add_leads(1)
        recorded(crm, 3)
        assert crm.value("SELECT array_agg(lead_id ORDER BY lead_id) FROM activity") == [1, 5000000000, 5000000001]
        assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0
        assert worker.terminate() == 0


def test_a_row_that_is_refused_among_few_is_a_dead_letter_and_the_others_are_written(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CONSTRAINT no_second CHECK (position('Lead 2' IN description) = 0)")
    crm.add_leads(3)
    with crm.worker() as worker:
        recorded(crm, 2)
        crm.add_leads(1)  # prepared anew
        recorded(crm, 3)
        assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 1
        assert worker.terminate() == 0
    crm.record()
    recorded(crm, 3)


def test_who_is_no_longer_the_owner_writes_none_of_few_rows(crm: Crm) -> None:
    with crm.worker() as worker:
        crm.add_leads(1)
        recorded(crm, 1)
        crm.execute("UPDATE cdc_worker.checkpoint SET owner = gen_random_uuid()")
        crm.add_leads(1)
        assert worker.wait() == FencedError.exit_code
    recorded(crm, 1)
    crm.record()
    recorded(crm, 2)


def test_rules_of_the_target_apply_to_none_of_few_rows_as_they_apply_to_none_of_many(crm: Crm) -> None:
    crm.execute("CREATE RULE elsewhere AS ON INSERT TO activity DO INSTEAD NOTHING")
    crm.add_leads(1)
    crm.record()
    crm.add_leads(MAX_AT_ONCE + 1)
    crm.record()
    recorded(crm, MAX_AT_ONCE + 2)


@pytest.mark.parametrize("lingers", [False, True])
def test_batches_that_linger_are_as_many_as_their_time_has_room_for(crm: Crm, *, lingers: bool) -> None:
    linger = 0.5 if lingers else 0.0
    commits = 60
    with crm.worker(linger=str(linger), log_level="debug") as worker:
        crm.add_leads(1)
        recorded(crm, 1)
        began = time.monotonic()
        with psycopg.connect(crm.dsn, autocommit=True) as application:
            for number in range(commits):
                application.execute("UPDATE lead SET status = %s", (f"status {number}",))
        recorded(crm, commits + 1)
        took = time.monotonic() - began
        assert worker.terminate() == 0
        batches = len(worker.events("batch_written")) - 1
    if lingers:
        assert batches <= took / linger + 1
    assert 1 <= batches <= commits


def test_a_worker_that_lingers_writes_what_it_has_before_it_ends(crm: Crm) -> None:
    with crm.worker(linger="1") as worker:
        crm.add_leads(1)
        recorded(crm, 1)
        crm.add_leads(2)
        assert worker.terminate() == 0
    crm.record(linger="1")
    recorded(crm, 3)
