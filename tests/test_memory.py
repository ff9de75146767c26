"""The memory of a worker does not depend on what is committed at once."""

from __future__ import annotations

from typing import LiteralString

import pytest
from support import Crm, eventually


@pytest.mark.parametrize(
    ("plugin", "rows", "change"),
    [
        ("wal2json", 40_000, "status = '3. negotiation'"),
        ("pgoutput", 40_000, "status = '3. negotiation'"),
        pytest.param("wal2json", 400_000, "status = '3. negotiation'", marks=pytest.mark.chaos),
        pytest.param("pgoutput", 400_000, "status = '3. negotiation'", marks=pytest.mark.chaos),
        # Each waits for its contact for 10,000 changes.
        ("wal2json", 30_000, "is_converted = true"),
        pytest.param("pgoutput", 30_000, "is_converted = true", marks=pytest.mark.chaos),
    ],
)
def test_a_large_transaction_is_consumed_in_little_memory(bare_crm: Crm, rows: int, change: LiteralString) -> None:
    """At most 40 MB beyond what the idle process has."""
    crm = bare_crm
    crm.add_leads(rows)
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("UPDATE lead SET status = '2. proposal' WHERE lead_id = 1")
        eventually(lambda: crm.value("SELECT count(*) FROM activity") == 1)
        idle = worker.memory()
        crm.execute("UPDATE lead SET " + change)
        eventually(lambda: crm.value("SELECT count(*) FROM activity") == rows + 1, patience=300)
        assert worker.memory() - idle < 40 << 20
