"""A backfill holds a chunk of rows at a time, however many there are and however long their texts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from support import Crm, WorkerProcess

from cdc_worker import profile

BOUND = 40 << 20
"""So much more than with nothing to do it may take."""


def peak(crm: Crm, *arguments: str) -> int:
    """The most memory that `cdc-worker backfill` has, in bytes."""
    most = 0
    with WorkerProcess(["backfill", "lead", *arguments], crm.environment(), crm.directory / "backfill.log") as process:
        while process.process.poll() is None:
            with suppress(OSError, IndexError):  # it may have ended meanwhile
                most = process.memory()
            with suppress(TimeoutError):
                process.process.wait(0.02)
        assert process.process.returncode == 0, process.said
    return most


def add_leads(crm: Crm, count: int) -> None:
    """One in ten is converted, and has a contact."""
    crm.add_leads(count)
    crm.execute("UPDATE lead SET is_converted = true WHERE lead_id %% 10 = 0")
    crm.execute("INSERT INTO customer (customer_uid, name) SELECT lead_id, 'Acme' FROM lead WHERE is_converted")
    crm.execute("INSERT INTO contact (customer_uid, lead_id) SELECT customer_uid, customer_uid FROM customer")


@pytest.mark.parametrize("leads", [40_000, pytest.param(1_000_000, marks=pytest.mark.chaos)])
def test_many_rows_take_little_memory(bare_crm: Crm, leads: int) -> None:
    crm = bare_crm
    add_leads(crm, leads)
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        idle = peak(crm, "--to-key", "0")
        assert peak(crm) - idle < BOUND
        worker.terminate()
    assert crm.value("SELECT count(*) FROM activity WHERE metadata ? 'backfilled'") == leads + leads // 10


def test_long_texts_take_little_memory(bare_crm: Crm, tmp_path: Path) -> None:
    """Forty kilobytes a row, which don't compress, are in the activity as well."""
    crm = bare_crm
    shipped = (Path(profile.__file__).parent / "profiles" / "leadfi.toml").read_text()
    crm.settings["profile"] = str(tmp_path / "crm.toml")
    told = "description = 'Lead \"{row.full_name}\" created'\nmetadata = {"
    assert told in shipped
    (tmp_path / "crm.toml").write_text(
        shipped.replace(told, f'{told} background = "{{row.background}}", notes = "{{row.notes}}",')
    )
    crm.execute("ALTER TABLE lead ADD COLUMN notes text")
    add_leads(crm, 1_000)
    crm.execute(
        "UPDATE lead SET background = told, notes = reverse(told) FROM"
        " (SELECT n, string_agg(md5(n || '.' || k), '') AS told"
        "  FROM generate_series(1, 1000) n, generate_series(1, 640) k GROUP BY n) AS texts WHERE lead_id = n"
    )
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        idle = peak(crm, "--to-key", "0")
        assert peak(crm) - idle < BOUND
        worker.terminate()
    assert crm.value("SELECT sum(length(metadata -> 'values' ->> 'notes')) FROM activity") == 1_000 * 20_480
