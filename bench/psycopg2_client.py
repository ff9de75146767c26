"""psycopg2's replication cursor, as its documentation has it: each message is counted and confirmed, no more."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extras import LogicalReplicationConnection, ReplicationMessage, StopReplication

UPDATE = b'{"action":"U"'


def main(task: dict[str, Any]) -> None:
    """Read the slot until so many changes have come."""
    wanted, changes = task["changes"], 0

    def consume(message: ReplicationMessage) -> None:
        nonlocal changes
        if message.payload.startswith(UPDATE):
            changes += 1
        message.cursor.send_feedback(flush_lsn=message.data_start)
        if changes == wanted:
            raise StopReplication

    connection = psycopg2.connect(task["dsn"], connection_factory=LogicalReplicationConnection)
    cursor = connection.cursor()
    cursor.start_replication(slot_name=task["slot"], options=task["options"], decode=False)
    try:
        cursor.consume_stream(consume)
    except StopReplication:
        last = time.monotonic()
    connection.close()
    Path(task["result"]).write_text(json.dumps({"changes": changes, "last": last}))


main(json.loads(sys.argv[1]))
