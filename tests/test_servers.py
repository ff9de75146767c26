from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest
import servers
from support import crm_on

from cdc_worker.cluster import Cluster
from cdc_worker.decoders import PLUGINS


def test_each_server_is_the_one_that_was_found_and_loads_its_plugins(each_server: Cluster) -> None:
    with psycopg.connect(each_server.dsn()) as connection:
        (version,) = connection.execute("SHOW server_version").fetchone() or ("",)
    assert re.search(rf"(PostgreSQL |:){version.partition('.')[0]}\b", each_server.origin)
    assert f" with {servers.plugins(each_server)[0]}" in each_server.origin


def test_what_the_machine_lacks_is_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(servers._ARCHIVES, "9", ("9.6", ""))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(servers.Missing, match=r"npm|Linux"):
        servers.find("9")
    assert [*servers.servers(("9",))] == []


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_worker_set_up_on_each_server_records_what_happens(each_server: Cluster, tmp_path: Path, plugin: str) -> None:
    with crm_on(each_server, tmp_path, prepared=True, plugin=plugin) as crm:
        crm.add_leads(2)
        crm.execute("UPDATE lead SET status = NULL, background = repeat('ü', 3000), bd_in_charge = 'bob'")
        crm.execute("INSERT INTO customer (customer_uid, name) VALUES (7, 'Kestrel')")
        crm.execute("DELETE FROM lead WHERE full_name = 'Lead 1'")
        crm.record()
        assert crm.value("SELECT plugin FROM pg_replication_slots WHERE slot_name = %s", crm.slot) == plugin
        assert crm.types() == [
            *("lead_created", "lead_created"),
            *("status_changed", "assignment_changed", "lead_updated") * 2,
            *("customer_created", "lead_deleted"),
        ]
