"""Both decoders tell the same of one WAL, and so do all servers.

What is expected of a script stands in tests/parity/expected, and the few differences beside it: what a decoder of which
that is known tells instead. `CDC_TEST_PARITY=write` writes what isn't there yet; docs/decoders.md has the list.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Final

import psycopg
import pytest
import servers
from decoding import PARITY, SCRIPTS, TOGETHER, Script, Server
from psycopg import sql

pytestmark = pytest.mark.each_server

SETTINGS: Final = {"max_prepared_transactions": "4", "logical_decoding_work_mem": "64kB"}


@pytest.fixture(scope="module", params=servers.EACH)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server on which all scripts have been run. It spills what is large to disk."""
    with servers.a_server(request.param, settings=SETTINGS) as cluster:
        yield Server(cluster, servers.plugins(cluster))


def _before_2_6(server: Server, plugin: str) -> bool:
    return plugin == "wal2json" and "numeric-data-types-as-string" in server.refused(plugin)


def _pgoutput(_: Server, plugin: str) -> bool:
    return plugin == "pgoutput"


def _before(major: int) -> Callable[[Server, str], bool]:
    return lambda server, plugin: plugin == "pgoutput" and server.major < major


DIFFERENCES: Final[dict[str, tuple[str, Callable[[Server, str], bool]]]] = {
    "not_a_number": ("wal2json before 2.6", _before_2_6),
    "stored_generated": ("pgoutput before 18", _before(18)),
    "schema_renamed": ("pgoutput before 16", _before(16)),
    "partitions_emptied": ("pgoutput", _pgoutput),
    "virtual_generated": ("pgoutput", _pgoutput),
}
"""The scripts of which not everybody tells the same, and who doesn't."""


def expected(server: Server, script: Script, plugin: str) -> str:
    """The name of the file with what a plugin of this server tells."""
    who, differs = DIFFERENCES.get(script.name, ("", lambda *_: False))
    return f"{script.name}, {who}.jsonl" if differs(server, plugin) else f"{script.name}.jsonl"


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_each_decoder_tells_what_is_expected_and_both_the_same(server: Server, script: Script) -> None:
    if script.since > server.major:
        pytest.skip(f"PostgreSQL {server.major} doesn't know what the script does")
    told = {plugin: server.told(script, plugin) for plugin in server.plugins}
    for plugin, found in told.items():
        path = PARITY / "expected" / expected(server, script, plugin)
        if os.environ.get("CDC_TEST_PARITY") == "write" and not path.exists():
            path.write_text("".join(f"{line}\n" for line in found.report))
        assert found.report == path.read_text().splitlines(), plugin
    if len(told) > 1 and script.name not in DIFFERENCES:
        assert told["pgoutput"] == told["wal2json"]


def test_what_is_recorded_of_a_script_says_what_was_told(server: Server) -> None:
    """Lines of wal2json's format, whoever told it."""
    for script in server.scripts:
        for plugin in server.plugins:
            told = server.told(script, plugin)
            readable = [line for line in told.lines if line.startswith("[") and not line.startswith('["unreadable"')]
            assert sorted(told.recorded) == sorted(readable), script.name


def test_what_is_emptied_by_its_partitions_is_emptied_alike() -> None:
    """But for what a dead letter says of where it was: a subtree, or the first of its partitions."""
    who, _ = DIFFERENCES["partitions_emptied"]
    texts = [(PARITY / "expected" / f"partitions_emptied{name}.jsonl").read_text() for name in ("", f", {who}")]
    one, other = (sorted(text.partition(f"{TOGETHER}\n")[2].splitlines()) for text in texts)
    assert one == sorted(re.sub('(truncate.*sale_2)a"', r'\1"', line) for line in other)


HOSTILE: Final = {
    "array_nulls": "off",
    "bytea_output": "escape",
    "client_encoding": "LATIN1",
    "datestyle": "SQL, DMY",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "extra_float_digits": "-15",
    "intervalstyle": "iso_8601",
    "quote_all_identifiers": "on",
    "search_path": "",
    "standard_conforming_strings": "off",
    "statement_timeout": "1ms",
    "timezone": "Asia/Kolkata",
}


def test_the_settings_of_a_role_change_nothing_of_what_it_is_told(server: Server) -> None:
    with psycopg.connect(server.cluster.dsn(), autocommit=True) as connection:
        connection.execute("CREATE ROLE hostile LOGIN REPLICATION")
        for name, value in HOSTILE.items():
            connection.execute(sql.SQL("ALTER ROLE hostile SET {} = {}").format(sql.Identifier(name), value))
    for script in server.scripts:
        for plugin in server.plugins:
            assert server.told(script, plugin, user="hostile") == server.told(script, plugin)


def test_what_becomes_of_rows_without_identity_is_left_out_by_wal2json_and_refused_once_published(
    server: Server,
) -> None:
    with psycopg.connect(server.cluster.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE unidentified")
    warned: list[str | None] = []
    with psycopg.connect(server.cluster.dsn("unidentified"), autocommit=True) as connection:
        connection.add_notice_handler(lambda diagnostic: warned.append(diagnostic.message_primary))
        connection.execute("CREATE TABLE lead (id int); INSERT INTO lead VALUES (1), (2)")
        if "wal2json" in server.plugins:
            connection.execute("SELECT pg_create_logical_replication_slot('without', 'wal2json', temporary => true)")
            connection.execute("UPDATE lead SET id = 3 WHERE id = 1; DELETE FROM lead WHERE id = 3")
            lines = connection.execute(
                "SELECT data FROM pg_logical_slot_get_changes('without', NULL, NULL, 'format-version', '2')"
            )
            assert [json.loads(line)["action"] for (line,) in lines] == ["B", "C"]
            assert warned == [
                f'no tuple identifier for {what} in table "public"."lead"' for what in ("UPDATE", "DELETE")
            ]
        connection.execute("CREATE PUBLICATION lead FOR TABLE lead")
        for statement in ("UPDATE lead SET id = 4", "DELETE FROM lead"):
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                connection.execute(statement)
