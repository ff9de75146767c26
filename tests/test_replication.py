"""The replication connection on a real server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest
from support import Crm, eventually

from cdc_worker import postgres, wal2json
from cdc_worker.changes import Begin, Change, Commit, Message
from cdc_worker.lsn import LSN
from cdc_worker.protocol import PrimaryKeepalive
from cdc_worker.replication import Replication

OPTIONS = wal2json.options([("public", "lead")])


@pytest.fixture
def replication(crm: Crm) -> Iterator[Replication]:
    with Replication(postgres.connect_replication(crm.dsn, crm.slot)) as replication:
        yield replication


def messages(replication: Replication) -> Iterator[Begin | Change | Message | Commit | PrimaryKeepalive]:
    """What arrives, for as long as one asks."""
    while True:
        message = replication.receive()
        if message is None:
            replication.read()
        elif isinstance(message, PrimaryKeepalive):
            yield message
        else:
            yield wal2json.decode(message)


def test_changes_arrive_between_the_begin_and_the_commit_of_their_transaction(
    crm: Crm, replication: Replication
) -> None:
    replication.start(crm.slot, LSN(0), OPTIONS, encoding="UTF8", optional=wal2json.OPTIONAL)
    crm.add_leads(1)
    stream = (message for message in messages(replication) if not isinstance(message, PrimaryKeepalive))
    begin, change = next((a, b) for a, b in pairwise(stream) if isinstance(b, Change))  # those before are empty
    assert isinstance(begin, Begin)
    assert begin.commit_lsn < begin.end_lsn
    assert (change.operation, change.table) == ("insert", "lead")
    assert next(stream) == Commit()


def test_what_is_confirmed_is_confirmed_and_what_is_only_written_is_not(crm: Crm, replication: Replication) -> None:
    """Written without flushed releases a server that shuts down, and must not move the slot."""
    confirmed = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
    before = crm.value(confirmed, crm.slot)
    crm.add_leads(1)
    end = LSN.parse(crm.value("SELECT pg_current_wal_flush_lsn()::text"))
    replication.start(crm.slot, LSN(0), OPTIONS, encoding="UTF8", optional=wal2json.OPTIONAL)
    written = "SELECT write_lsn >= %s::pg_lsn FROM pg_stat_replication WHERE application_name LIKE %s"
    replication.send_status(written=end)
    eventually(lambda: crm.value(written, str(end), f"%{crm.slot}"))
    assert crm.value(confirmed, crm.slot) == before
    replication.send_status(written=end, flushed=end)
    eventually(lambda: crm.value(confirmed, crm.slot) == str(end))


def test_an_option_that_the_plugin_does_not_know_is_left_out_if_it_is_optional(
    crm: Crm, replication: Replication
) -> None:
    options = {**OPTIONS, "no-such-option": "1"}
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        replication.start(crm.slot, LSN(0), options, encoding="UTF8")
    optional = ("no-such-option", *wal2json.OPTIONAL)
    refused = replication.start(crm.slot, LSN(0), options, encoding="UTF8", optional=optional)
    assert {"no-such-option"} <= {*refused} <= {"no-such-option", "numeric-data-types-as-string"}


def test_without_the_optional_options_the_stream_can_be_read(crm: Crm, replication: Replication) -> None:
    options = {name: value for name, value in OPTIONS.items() if name not in wal2json.OPTIONAL}
    replication.start(crm.slot, LSN(0), options, encoding="UTF8")
    crm.add_leads(1)
    assert isinstance(next(m for m in messages(replication) if isinstance(m, Change)), Change)


def test_a_stream_that_the_server_ends_is_an_error_that_may_heal(crm: Crm, replication: Replication) -> None:
    replication.start(crm.slot, LSN(0), OPTIONS, encoding="UTF8", optional=wal2json.OPTIONAL)
    crm.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", crm.slot)
    with pytest.raises(psycopg.Error) as caught:
        next(m for m in messages(replication) if isinstance(m, Change))
    assert postgres.is_transient(caught.value.sqlstate)


def test_the_example_of_the_readme_prints_changes(crm: Crm) -> None:
    class Enough(Exception):  # noqa: N818
        pass

    def show(message: object) -> None:
        if isinstance(message, Change):
            raise Enough(message.table)

    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    crm.add_leads(1)
    with pytest.raises(Enough, match="lead"):
        exec(example, {"dsn": crm.dsn, "slot": crm.slot, "print": show})
