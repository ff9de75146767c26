"""Debezium's engine in this process, with a handler that counts the events and does nothing with them."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pydbzengine import BasePythonChangeHandler, ChangeEvent, DebeziumJsonEngine


class Handler(BasePythonChangeHandler):
    """Ends the process once so many events have come: closing the engine takes seconds that are no throughput."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.wanted = task["changes"]
        self.result = Path(task["result"])
        self.changes = 0

    def handleJsonBatch(self, records: list[ChangeEvent]) -> None:  # noqa: N802  # its name there
        self.changes += len(records)
        if self.changes >= self.wanted:
            self.result.write_text(json.dumps({"changes": self.changes, "last": time.monotonic()}))
            os._exit(0)


def main(task: dict[str, Any]) -> None:
    """Read the slot; all that is not named here is as it comes."""
    properties = {
        "name": "bench",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "plugin.name": "pgoutput",
        "database.hostname": "127.0.0.1",
        "database.port": task["port"],
        "database.user": "postgres",
        "database.password": "postgres",
        "database.dbname": "postgres",
        "topic.prefix": "bench",
        "slot.name": task["slot"],
        "slot.drop.on.stop": "false",
        "publication.name": task["publication"],
        "publication.autocreate.mode": "disabled",
        "snapshot.mode": "no_data",
        "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
        "key.converter.schemas.enable": "false",
        "value.converter.schemas.enable": "false",
    }
    DebeziumJsonEngine(properties=properties, handler=Handler(task)).run()


main(json.loads(sys.argv[1]))
