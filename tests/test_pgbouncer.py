"""Applications may come through pgbouncer in transaction mode: a message belongs to its transaction alone."""

from __future__ import annotations

from contextlib import ExitStack

import psycopg
from pgbouncer import pgbouncer
from support import Crm


def test_nobody_gets_the_name_of_who_had_the_connection_before(crm: Crm) -> None:
    add = "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES (%s, 'web', 'bob', 'otc')"
    say = "SELECT cdc_worker.set_context(jsonb_build_object('changed_by', %s::text))"
    with ExitStack() as stack:
        dsn = stack.enter_context(pgbouncer(crm.dsn))
        jane, joe, nobody = (
            stack.enter_context(psycopg.connect(dsn, autocommit=True, prepare_threshold=None)) for _ in range(3)
        )
        backends = set()
        for turn in range(3):
            for connection, name in ((jane, "jane"), (nobody, None), (joe, "joe"), (nobody, None)):
                with connection.transaction():
                    if name:
                        connection.execute(say, [name])
                    connection.execute(add, [f"{name} {turn}"])
                    backends |= {pid for (pid,) in connection.execute("SELECT pg_backend_pid()")}
            with jane.transaction(force_rollback=True):
                jane.execute(say, ["jane"])
        assert len(backends) == 1
    crm.record()
    found = [activity["created_by"] for activity in crm.activities()]
    assert found == ["jane", "system", "joe", "system"] * 3
