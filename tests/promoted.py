"""A physical standby that keeps the primary's failover slots, to be promoted: what a failover leaves a worker with.

with servers.a_server("17-wal2json") as primary, Standby(primary) as standby:
    crm = make_crm(primary, tmp_path)
    crm.succeed("setup", "--failover")
    crm.dsn = of_both(primary, standby, crm.connection.info.dbname)
    standby.keep(crm.slot)
    primary.crash()
    standby.promote()
    crm.reconnect()
"""

from __future__ import annotations

import subprocess

import psycopg
from psycopg.conninfo import make_conninfo
from support import eventually

from cdc_worker.cluster import Cluster

NAME = "standby"
"""Of the standby's slot on its primary, and of its walreceiver."""


class Standby(Cluster):
    """A copy of a primary that follows it. Needs PostgreSQL 17, from which on failover slots are kept there."""

    def __init__(self, primary: Cluster, *, synchronous: bool = True) -> None:
        """`synchronous` has every commit wait until it is here as well, those of the worker included."""
        super().__init__(primary.binaries)
        self.primary = primary
        self._synchronous = synchronous

    def _make_data(self) -> None:
        primary = self.primary
        with psycopg.connect(primary.dsn(), autocommit=True) as connection:
            connection.execute("SELECT pg_create_physical_replication_slot(%s, true)", (NAME,))
        primary.stop()
        subprocess.run(["cp", "-a", str(primary.data), str(self.data)], check=True)
        for slot in (self.data / "pg_replslot").iterdir():
            subprocess.run(["rm", "-r", str(slot)], check=True)
        (self.data / "standby.signal").touch()
        names = {"synchronous_standby_names": NAME} if self._synchronous else {}
        primary.set(synchronized_standby_slots=NAME, **names)
        primary.start()
        self.set(
            primary_conninfo=make_conninfo(primary.dsn(), application_name=NAME),
            primary_slot_name=NAME,
            hot_standby_feedback="on",
            sync_replication_slots="on",
            wal_receiver_status_interval="1s",
            wal_retrieve_retry_interval="100ms",
        )

    def keep(self, slot: str) -> None:
        """Wait until the standby has a slot that will be there once it is promoted."""
        with (
            psycopg.connect(self.primary.dsn(), autocommit=True) as primary,
            psycopg.connect(self.dsn(), autocommit=True) as standby,
        ):

            def kept() -> bool:
                primary.execute("SELECT pg_log_standby_snapshot()")
                query = "SELECT FROM pg_replication_slots WHERE slot_name = %s AND synced AND NOT temporary"
                return standby.execute(query, (slot,)).fetchone() is not None

            eventually(kept, what="the standby has the slot")

    def promote(self) -> None:
        """Let it be the primary. The old one must be down."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")


def of_both(primary: Cluster, standby: Cluster, dbname: str) -> str:
    """The connection string for whichever of the two can be written."""
    return make_conninfo(
        "",
        host="127.0.0.1,127.0.0.1",
        port=f"{primary.port},{standby.port}",
        user="postgres",
        dbname=dbname,
        target_session_attrs="read-write",
    )
