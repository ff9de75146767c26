"""A backfill holds a chunk of rows at a time, however many there are and however long their texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest
from support import Crm, WorkerProcess

from cdc_worker import config, profile
from cdc_worker.rows import LONG, RowKey, Rows, connect

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


@pytest.mark.parametrize("leads", [12_000, pytest.param(1_000_000, marks=pytest.mark.chaos)])
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


@pytest.mark.chaos
def test_long_texts_take_little_memory(bare_crm: Crm, tmp_path: Path) -> None:
    """Forty kilobytes a row, which don't compress, are in the activity as well."""
    crm = bare_crm
    add_leads(crm, 1_000)
    tell_texts(crm, tmp_path)
    crm.execute(
        "UPDATE lead SET background = told, notes = reverse(told) FROM"
        " (SELECT n, string_agg(encode(sha512((n || '.' || k)::bytea), 'hex'), '') AS told"
        "  FROM generate_series(1, 1000) n, generate_series(1, 160) k GROUP BY n) AS texts WHERE lead_id = n"
    )
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        idle = peak(crm, "--to-key", "0")
        assert peak(crm) - idle < BOUND
        worker.terminate()
    assert crm.value("SELECT sum(length(metadata -> 'values' ->> 'notes')) FROM activity") == 1_000 * 20_480


def test_long_texts_behind_short_ones_take_little_memory(bare_crm: Crm, tmp_path: Path) -> None:
    """Two hundred kilobytes a row, which the server keeps in a few, whether rows are read in order or by their keys."""
    crm = bare_crm
    crm.add_leads(1_000)
    tell_texts(crm, tmp_path)
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        idle = peak(crm, "--to-key", "0")
        crm.execute("UPDATE lead SET notes = repeat(md5(lead_id::text), 6000) WHERE lead_id > 630")
        assert peak(crm) - idle < BOUND
        worker.terminate()
    assert crm.value("SELECT sum(length(metadata -> 'values' ->> 'notes')) FROM activity") == 370 * 192_000
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot, **crm.settings})
    with closing(connect(settings)) as connection:
        rows = Rows(connection, settings.backfill_rules(profile.load(settings.profile))["public", "lead"])
        keys: Sequence[RowKey] = [(str(number),) for number in range(1_002, 0, -1)]
        lengths: dict[RowKey, int] = {}
        while keys:
            read, keys = rows.first(keys, 1_001)
            found = {key: len(str(row["notes"] or "")) for key, row in read.rows.items()}
            assert sum(found.values()) < LONG + 192_000
            lengths |= found
    assert sum(lengths.values()) == 370 * 192_000
    assert len(lengths) == 1_000


def tell_texts(crm: Crm, tmp_path: Path) -> None:
    """Let what is told of a lead have its long texts."""
    shipped = (Path(profile.__file__).parent / "profiles" / "leadfi.toml").read_text()
    crm.settings["profile"] = str(tmp_path / "crm.toml")
    told = "description = 'Lead \"{row.full_name}\" created'\nmetadata = {"
    assert told in shipped
    (tmp_path / "crm.toml").write_text(
        shipped.replace(told, f'{told} background = "{{row.background}}", notes = "{{row.notes}}",')
    )
    crm.execute("ALTER TABLE lead ADD COLUMN notes text")
