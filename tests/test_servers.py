from __future__ import annotations

import psycopg
import pytest
import servers

from cdc_worker.cluster import Cluster


def test_each_server_is_the_one_that_was_found_and_loads_its_plugins(each_server: Cluster) -> None:
    with psycopg.connect(each_server.dsn()) as connection:
        (version,) = connection.execute("SHOW server_version").fetchone() or ("",)
    assert version.startswith(each_server.binaries.version)
    assert servers.plugins(each_server)[0] == each_server.binaries.plugin


def test_what_the_machine_lacks_is_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(servers._ARCHIVES, "9", ("9.6", ""))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(servers.Missing, match=r"npm|Linux"):
        servers.find("9")
    assert [*servers.servers(("9",))] == []
