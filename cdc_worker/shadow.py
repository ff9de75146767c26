"""A second witness: triggers keep a ledger, of which SQL tells the activities that LeadFi's profile owes.

For the demo, the tests and chaos. `setup` never makes it, and the worker doesn't see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, LiteralString

import psycopg

from cdc_worker.ddl import schema

_DIFFERENCE: Final = """
SELECT missing, activity_type, description, lead_id, customer_uid, bd_in_charge, created_by, metadata
FROM shadow.difference ORDER BY lead_id, customer_uid, activity_type LIMIT %s
"""

_DISORDER: Final = """
SELECT DISTINCT ON (subject) subject, position, expected, recorded FROM shadow.disorder
ORDER BY subject, position LIMIT %s
"""

_COUNTS: Final = "SELECT (SELECT count(*) FROM shadow.expected), (SELECT count(*) FROM shadow.recorded)"


def install(connection: psycopg.Connection[Any]) -> None:
    """Make ledger, triggers and views in a database that has LeadFi's tables and has been set up."""
    with connection.transaction():
        connection.execute(schema("shadow.sql").encode())


def act_as(connection: psycopg.Connection[Any], name: str) -> None:
    """Say, as an application would, who does the rest of the open transaction; the ledger is told it as well."""
    connection.execute(
        "SELECT pg_logical_emit_message(true, 'cdc_worker.context', jsonb_build_object('changed_by', %s::text)::text),"
        " set_config('shadow.changed_by', %s, true)",
        (name, name),
    )


def counts(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """How many activities are owed, and how many the worker wrote."""
    ((expected, recorded),) = _rows(connection, _COUNTS)
    return expected, recorded


def faults(connection: psycopg.Connection[Any], *, limit: int = 20) -> list[str]:
    """What is wrong with the worker's rows of `activity`, a line each: missing, too many, altered, or out of order.

    Altered is missing as it should be and too many as it is. Empty when all is right.
    """
    with connection.transaction():
        return [*_faults(connection, limit)]


def _faults(connection: psycopg.Connection[Any], limit: int) -> Iterator[str]:
    difference = _rows(connection, _DIFFERENCE, limit)
    for missing, kind, description, lead, customer, bd, by, metadata in difference:
        what = f"missing {missing}" if missing > 0 else f"too many {-missing}"
        yield f"{what}: {kind} {description!r}, lead {lead}, customer {customer}, bd {bd}, by {by}, {metadata}"
    if not difference:  # one activity too few would shift all that follow
        for subject, position, expected, recorded in _rows(connection, _DISORDER, limit):
            yield f"out of order: {subject}, place {position}: {recorded!r} instead of {expected!r}"


def _rows(connection: psycopg.Connection[Any], query: LiteralString, *parameters: Any) -> list[tuple[Any, ...]]:
    return connection.execute(query, parameters).fetchall()
