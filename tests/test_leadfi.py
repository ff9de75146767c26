"""Every line of what the LeadFi profile records, on its own tables: what stands in `activity` afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, LiteralString, NamedTuple

import pytest
from support import crm_on

from cdc_worker.cluster import Cluster


class Row(NamedTuple):
    """A row of `activity`; its metadata without the identity of whom it is of."""

    type: str
    description: str
    metadata: dict[str, Any]
    lead_id: int | None = None
    customer_uid: int | None = None
    bd: str | None = None
    created_by: str = "system"


class Line(NamedTuple):
    """What happens to lead and customer %(n)s, as they are or as what came `before` has left them, and what it leaves.

    A lead is Ada of Engines, of jane; a customer is Engines.
    """

    happens: LiteralString
    told: Callable[[int], list[Row]]
    before: LiteralString = "SELECT"


def status(old: str | None, new: str | None, **columns: Any) -> Callable[[int], list[Row]]:
    text = f'Lead status changed from "{old or ""}" to "{new or ""}"'
    metadata = {"old_status": old, "new_status": new}
    return lambda n: [Row("status_changed", text, metadata, lead_id=n, **{"bd": "jane", **columns})]


def converted(n: int, customer: int | None = None) -> Row:
    told = {} if customer is None else {"customer_uid": customer}
    metadata = {"final_status": "2. proposal", **told}
    return Row("lead_converted", 'Lead "Ada" converted to customer', metadata, n, customer, "jane")


def updated(**columns: tuple[Any, Any]) -> Callable[[int], list[Row]]:
    changes = {column: {"old": old, "new": new} for column, (old, new) in columns.items()}
    text = f'Lead "Ada" updated: {", ".join(columns)}'
    return lambda n: [Row("lead_updated", text, {"changes": changes}, lead_id=n, bd="jane")]


def customer_status(n: int, old: str, new: str) -> Row:
    text = f'Customer status changed from "{old}" to "{new}"'
    return Row("status_changed", text, {"old_status": old, "new_status": new}, customer_uid=n)


def customer_updated(n: int, **columns: tuple[Any, Any]) -> Row:
    closed = columns.get("is_closed", (False, False))
    _, name = columns.get("name", ("", "Engines"))
    metadata = {
        "old_name": "Engines",
        "new_name": name,
        "old_closed": closed[0],
        "new_closed": closed[1],
        "changes": {column: {"old": old, "new": new} for column, (old, new) in columns.items()},
    }
    return Row("customer_updated", f'Customer "{name}" updated', metadata, customer_uid=n)


MOVED = 1000
"""What a new primary key is greater by."""

LINES = {
    "lead I": Line(
        "INSERT INTO lead (lead_id, full_name, company_name, source, type, status, bd_in_charge)"
        " VALUES (%(n)s, 'Ada', 'Engines', 'web', 'otc', '2. proposal', 'jane')",
        lambda n: [
            Row(
                "lead_created",
                'Lead "Ada" created by jane',
                {"source": "web", "type": "otc", "status": "2. proposal", "bd_in_charge": "jane"},
                lead_id=n,
                bd="jane",
            )
        ],
        before="DELETE FROM lead WHERE lead_id = %(n)s",
    ),
    "lead U, status": Line(
        "UPDATE lead SET status = '7. lost' WHERE lead_id = %(n)s", status("2. proposal", "7. lost")
    ),
    "lead U, status from NULL": Line(
        "UPDATE lead SET status = '7. lost' WHERE lead_id = %(n)s",
        status(None, "7. lost"),
        before="UPDATE lead SET status = NULL WHERE lead_id = %(n)s",
    ),
    "lead U, status to NULL": Line("UPDATE lead SET status = NULL WHERE lead_id = %(n)s", status("2. proposal", None)),
    "lead U, status, by somebody": Line(
        "SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{\"changed_by\": \"joe\"}');"
        " UPDATE lead SET status = '7. lost' WHERE lead_id = %(n)s",
        status("2. proposal", "7. lost", created_by="joe"),
    ),
    "lead U, bd_in_charge": Line(
        "UPDATE lead SET bd_in_charge = 'joe' WHERE lead_id = %(n)s",
        lambda n: [
            Row(
                "assignment_changed",
                'Lead assignment changed from "jane" to "joe"',
                {"old_bd": "jane", "new_bd": "joe"},
                lead_id=n,
                bd="joe",
            )
        ],
    ),
    "lead U, is_converted": Line("UPDATE lead SET is_converted = true WHERE lead_id = %(n)s", lambda n: [converted(n)]),
    "lead U, is_converted from NULL": Line(
        "UPDATE lead SET is_converted = true WHERE lead_id = %(n)s",
        lambda n: [converted(n)],
        before="UPDATE lead SET is_converted = NULL WHERE lead_id = %(n)s",
    ),
    "lead U, is_converted, with the contact row of the same transaction": Line(
        "UPDATE lead SET is_converted = true WHERE lead_id = %(n)s;"
        " INSERT INTO contact (customer_uid, lead_id) VALUES (%(n)s, %(n)s)",
        lambda n: [converted(n, n)],
    ),
    "lead U, is_converted to false": Line(
        "UPDATE lead SET is_converted = false WHERE lead_id = %(n)s",
        updated(is_converted=(True, False)),
        before="UPDATE lead SET is_converted = true WHERE lead_id = %(n)s",
    ),
    "lead U, any other column": Line(
        "UPDATE lead SET country = 'MT', background = repeat('x', 201) WHERE lead_id = %(n)s",
        updated(country=(None, "MT"), background=(None, f"{'x' * 200}…")),
    ),
    "lead U, a new primary key": Line(
        "UPDATE lead SET lead_id = %(n)s + 1000 WHERE lead_id = %(n)s",
        lambda n: updated(lead_id=(n, n + MOVED))(n + MOVED),
    ),
    "lead U, all at once": Line(
        "UPDATE lead SET country = 'MT', is_converted = true, bd_in_charge = 'jane ', status = '7. lost'"
        " WHERE lead_id = %(n)s",
        lambda n: [
            *status("2. proposal", "7. lost", bd="jane ")(n),
            Row(
                "assignment_changed",
                'Lead assignment changed from "jane" to "jane "',
                {"old_bd": "jane", "new_bd": "jane "},
                lead_id=n,
                bd="jane ",
            ),
            converted(n)._replace(bd="jane ", metadata={"final_status": "7. lost"}),
            updated(country=(None, "MT"))(n)[0]._replace(bd="jane "),
        ],
    ),
    "lead U, as it is": Line("UPDATE lead SET status = status, title = title WHERE lead_id = %(n)s", lambda n: []),
    "lead D": Line(
        "DELETE FROM lead WHERE lead_id = %(n)s",
        lambda n: [
            Row(
                "lead_deleted",
                'Lead "Ada" deleted',
                {"status": "2. proposal", "bd_in_charge": "jane", "source": "web", "type": "otc"},
                lead_id=n,
                bd="jane",
            )
        ],
    ),
    "customer I": Line(
        "INSERT INTO customer (customer_uid, name, type) VALUES (%(n)s, 'Engines', 'otc')",
        lambda n: [Row("customer_created", f'Customer "Engines" created (ID: {n})', {"type": "otc"}, customer_uid=n)],
        before="DELETE FROM customer WHERE customer_uid = %(n)s",
    ),
    "customer U, is_closed": Line(
        "UPDATE customer SET is_closed = true WHERE customer_uid = %(n)s",
        lambda n: [customer_status(n, "open", "closed"), customer_updated(n, is_closed=(False, True))],
    ),
    "customer U, is_closed to NULL": Line(
        "UPDATE customer SET is_closed = NULL WHERE customer_uid = %(n)s",
        lambda n: [customer_status(n, "closed", "open"), customer_updated(n, is_closed=(True, None))],
        before="UPDATE customer SET is_closed = true WHERE customer_uid = %(n)s",
    ),
    "customer U, is_closed as before": Line(
        "UPDATE customer SET is_closed = NULL WHERE customer_uid = %(n)s",
        lambda n: [customer_updated(n, is_closed=(False, None))],
    ),
    "customer U, name": Line(
        "UPDATE customer SET name = 'Looms' WHERE customer_uid = %(n)s",
        lambda n: [customer_updated(n, name=("Engines", "Looms"))],
    ),
    "customer U, type": Line(
        "UPDATE customer SET type = NULL WHERE customer_uid = %(n)s",
        lambda n: [customer_updated(n, type=("otc", None))],
    ),
    "customer U, any other column": Line(
        "UPDATE customer SET country = 'MT' WHERE customer_uid = %(n)s",
        lambda n: [customer_updated(n, country=(None, "MT"))],
    ),
    "customer U, a new primary key": Line(
        "UPDATE customer SET customer_uid = %(n)s + 1000 WHERE customer_uid = %(n)s",
        lambda n: [customer_updated(n + MOVED, customer_uid=(n, n + MOVED))],
    ),
    "customer U, as it is": Line("UPDATE customer SET name = name WHERE customer_uid = %(n)s", lambda n: []),
    "customer D": Line(
        "DELETE FROM customer WHERE customer_uid = %(n)s",
        lambda n: [
            Row(
                "customer_deleted",
                f'Customer "Engines" deleted (ID: {n})',
                {"type": "otc", "is_closed": False},
                customer_uid=n,
            )
        ],
    ),
}

IDENTITY = ("lead_id", "lead_name", "company_name", "customer_uid", "customer_name")
CONTEXT = ("changed_by", "context_source")


@pytest.fixture(scope="module")
def activities(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What the worker writes when all lines have happened, and then both tables are emptied with a TRUNCATE."""
    with crm_on(server, tmp_path_factory.mktemp("lines")) as crm:
        for n, line in enumerate(LINES.values(), 100):
            crm.execute(
                "INSERT INTO lead (lead_id, full_name, company_name, source, type, status, bd_in_charge)"
                " VALUES (%s, 'Ada', 'Engines', 'web', 'otc', '2. proposal', 'jane')",
                n,
            )
            crm.execute("INSERT INTO customer (customer_uid, name, type) VALUES (%s, 'Engines', 'otc')", n)
            crm.connection.execute(line.before, {"n": n})
        crm.setup()
        for n, line in enumerate(LINES.values(), 100):
            with crm.connection.transaction():
                for statement in line.happens.split("; "):
                    crm.connection.execute(statement, {"n": n})
        crm.record()
        found = crm.activities()
        crm.execute("TRUNCATE lead, customer, contact, activity")
        crm.record()
        assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0
        yield found + crm.activities()


def of(activities: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    return [a for a in activities if n in ((a["lead_id"] or 0) % MOVED, (a["customer_uid"] or 0) % MOVED)]


@pytest.mark.parametrize("name", LINES)
def test_line(activities: list[dict[str, Any]], name: str) -> None:
    n = [*LINES].index(name) + 100
    found = of(activities, n)
    assert [
        Row(
            a["activity_type"],
            a["description"],
            {
                key: value
                for key, value in a["metadata"].items()
                if key not in CONTEXT and (key not in IDENTITY or (key == "customer_uid" and a["lead_id"]))
            },
            a["lead_id"],
            a["customer_uid"],
            a["bd_in_charge"],
            a["created_by"],
        )
        for a in found
    ] == LINES[name].told(n)
    for activity in found:
        metadata = activity["metadata"]
        if activity["lead_id"]:
            expected: tuple[Any, ...] = (activity["lead_id"], "Ada", "Engines")
            assert (metadata["lead_id"], metadata["lead_name"], metadata["company_name"]) == expected
        else:
            name_now = metadata.get("new_name", "Engines")
            assert (metadata["customer_uid"], metadata["customer_name"]) == (activity["customer_uid"], name_now)


@pytest.mark.parametrize(
    ("type_", "description"),
    [("lead_deleted", "All leads removed (TRUNCATE)"), ("customer_deleted", "All customers removed (TRUNCATE)")],
)
def test_line_truncate(activities: list[dict[str, Any]], type_: str, description: str) -> None:
    (found,) = (a for a in activities if a["description"] == description)
    assert (found["activity_type"], found["metadata"]["truncated"]) == (type_, True)
    assert (found["lead_id"], found["customer_uid"], found["bd_in_charge"]) == (None, None, None)


def test_nothing_else_is_recorded(activities: list[dict[str, Any]]) -> None:
    assert len(activities) == sum(len(line.told(0)) for line in LINES.values()) + 2
    assert {(a["activity_category"], a["is_visible_to_bd"]) for a in activities} == {("system", True)}
