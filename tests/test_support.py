"""What most tests begin with is what `setup` leaves; and what storms end with tells what went wrong."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from conftest import tell_faults
from psycopg import sql
from storms import DOUBLED, HELD, LOST, Faults, recorded_exactly
from support import Crm, crm_on

from cdc_worker import shadow
from cdc_worker.cluster import Cluster
from cdc_worker.slot import read

OF_ITS_TIME = re.compile(r".*_at|nonce|(.*_)?lsn|oid")

TABLES = "SELECT relname FROM pg_class WHERE relnamespace = 'cdc_worker'::regnamespace AND relkind = 'r'"

PUBLISHED = """
SELECT to_jsonb(p), obj_description(p.oid, 'pg_publication'),
       (SELECT jsonb_agg(to_jsonb(t) ORDER BY tablename) FROM pg_publication_tables t)
FROM pg_publication p
"""


def left(crm: Crm) -> dict[str, Any]:
    """What there is of a worker by its name, but for when and where in the WAL it was made."""
    query = sql.SQL("SELECT coalesce(jsonb_agg(to_jsonb(t) ORDER BY t::text), '[]') FROM cdc_worker.{} AS t")
    found: dict[str, Any] = {"slot": (of := read(crm.connection, crm.slot)) and of.plugin}
    for (name,) in crm.execute(TABLES):
        ((found[name],),) = crm.connection.execute(query.format(sql.Identifier(name))).fetchall()
    found["publications"] = [[of, about, captured] for of, about, captured in crm.execute(PUBLISHED)]

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(of) for key, of in value.items() if not OF_ITS_TIME.fullmatch(key)}
        if isinstance(value, list):
            return [timeless(of) for of in value]
        return value.replace(crm.slot, "…") if isinstance(value, str) else value

    return {name: timeless(of) for name, of in found.items()}


def test_a_copy_is_what_setup_makes(server: Cluster, bare_crm: Crm, tmp_path: Path) -> None:
    bare_crm.setup()
    with crm_on(server, tmp_path, prepared=True) as crm:
        assert left(crm) == left(bare_crm)
        before = crm.execute("SELECT lsn, slot_created_at, system_identifier FROM cdc_worker.checkpoint")
        crm.setup()
        assert crm.execute("SELECT lsn, slot_created_at, system_identifier FROM cdc_worker.checkpoint") == before
        assert left(crm) == left(bare_crm)


AGAIN = """
INSERT INTO activity (lead_id, activity_category, activity_type, description, metadata, bd_in_charge, created_by,
                      change_key)
SELECT lead_id, activity_category, activity_type, description, metadata, bd_in_charge, created_by, 'again'
FROM activity WHERE lead_id = 3
"""


def test_what_is_lost_and_doubled_is_counted_and_stands_in_the_table_of_faults(crm: Crm) -> None:
    """Also of a test that fails, and with what other tests counted."""
    shadow.install(crm.connection)
    crm.add_leads(5)
    counted = Faults()
    recorded_exactly(crm, counted)
    assert counted == {HELD: 5, LOST: 0, DOUBLED: 0}
    crm.execute("SET cdc_worker.protect = off")
    crm.execute(AGAIN)
    crm.execute("DELETE FROM activity WHERE lead_id < 3")
    with pytest.raises(AssertionError, match="missing 1: lead_created"):
        recorded_exactly(crm, counted)
    assert counted == {HELD: 10, LOST: 2, DOUBLED: 1}
    terminal = mock.Mock()
    one, other = ([("fault", [kind, times]) for kind, times in of.items()] for of in (counted, {"SIGKILL": 7, LOST: 1}))
    tell_faults(terminal, [SimpleNamespace(when="teardown", user_properties=of) for of in (one, other)])
    lines = [call.args[0] for call in terminal.line.mock_calls]
    assert lines[-5:] == [
        "| SIGKILL | 7 |",
        "| **SIGKILL in all** | **7** |",
        f"| **{HELD}** | **10** |",
        f"| **{LOST}** | **3** |",
        f"| **{DOUBLED}** | **1** |",
    ]
