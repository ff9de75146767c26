"""LeadFi's people at work, at random, for the demo of docker-compose.yml: `python traffic.py "host=… dbname=leadfi"`.

For a database that is there for it alone. It ends with the server, and is started again with it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import psycopg

RATE = float(os.environ.get("TRAFFIC_PER_SECOND") or 2)
"""Transactions a second, about, which come as people do: in no order."""

PEOPLE = ("jane", "bob", "mia", "tom")
FIRST = ("Ada", "Ken", "Zoe", "Omar", "Lucie", "Emre", "Wei", "Tomás", "Ama", "Sven", "Ruth", "Paul", "Nora", "Ivan")
LAST = ("Lind", "Abe", "Park", "Haddad", "Martin", "Kaya", "Li", "Vega", "Boateng", "Dahl", "Amari", "Weber", "O'Neil")
COMPANIES = ("Kestrel Exchange", "Harbour OTC", "North Fund", "Tidewater", "Blue Ledger", "Quay Capital", "Lantern")
STATUSES = (
    *("1. lead generated", "2. proposal", "3. negotiation", "4. registration", "5. integration", "6. closed won"),
)
CALLS = {
    "call": "Asked about fees, wants them in writing",
    "email": "Sent the proposal, with the terms",
    "meeting": "Met at their office; the lawyers are next",
    "follow_up": "Nobody answered, again on Monday",
    "demo": "Showed the desk and the reports",
}
KEEP = 400
"""So many leads are there at most; the oldest that came to nothing is deleted then."""

Connection = psycopg.Connection[Any]


def some_lead(connection: Connection, condition: str = "true") -> tuple[int, str, str | None] | None:
    """A lead that is there, at random: its key, name and status."""
    query = f"SELECT lead_id, full_name, status FROM lead WHERE {condition} ORDER BY random() LIMIT 1"
    return connection.execute(query.encode()).fetchone()


def create(connection: Connection, by: str) -> None:
    """A new lead."""
    name = f"{random.choice(FIRST)} {random.choice(LAST)}"
    connection.execute(
        "INSERT INTO lead (full_name, company_name, email, source, status, bd_in_charge, type, country)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
        (
            name,
            random.choice(COMPANIES),
            f"{name.partition(' ')[0].lower()}@{random.randrange(1000)}.example",
            random.choice(("web", "conference", "phone", "referral")),
            STATUSES[0],
            by,
            random.choice(("exchange", "otc", "fund")),
            random.choice(("Ireland", "Korea", "Chile", "Ghana")),
        ),
    )


def log(connection: Connection, by: str) -> None:
    """What a BD logs by hand."""
    if lead := some_lead(connection):
        kind = random.choice([*CALLS])
        connection.execute(
            "INSERT INTO activity (lead_id, activity_type, description, bd_in_charge, created_by)"
            " VALUES (%s, %s, %s, %s, %s)",
            (lead[0], kind, CALLS[kind], by, by),
        )


def move_on(connection: Connection, by: str) -> None:
    """A lead's next status, or its end."""
    if lead := some_lead(connection, "status NOT IN ('6. closed won', '7. lost')"):
        place = STATUSES.index(lead[2]) if lead[2] in STATUSES else 0
        status = "7. lost" if random.random() < 0.15 else STATUSES[min(place + 1, len(STATUSES) - 2)]
        connection.execute("UPDATE lead SET status = %s WHERE lead_id = %s", (status, lead[0]))


def assign(connection: Connection, by: str) -> None:
    """A lead that somebody else is to see to."""
    if lead := some_lead(connection):
        connection.execute("UPDATE lead SET bd_in_charge = %s WHERE lead_id = %s", (random.choice(PEOPLE), lead[0]))


def mend(connection: Connection, by: str) -> None:
    """Something else that is known better now."""
    if lead := some_lead(connection):
        phone = f"+353 1 555 {random.randrange(10_000):04}"
        connection.execute("UPDATE lead SET phone_number = %s WHERE lead_id = %s", (phone, lead[0]))


def convert(connection: Connection, by: str) -> None:
    """A lead that becomes a customer: all of it in one transaction."""
    if lead := some_lead(connection, "is_converted IS NOT TRUE AND status >= '3' AND status < '6'"):
        (uid,) = connection.execute("SELECT coalesce(max(customer_uid), 4710) + 1 FROM customer").fetchone() or (4711,)
        connection.execute(
            "INSERT INTO customer (customer_uid, name, type)"
            " SELECT %s, company_name, type FROM lead WHERE lead_id = %s",
            (uid, lead[0]),
        )
        connection.execute(
            "UPDATE lead SET is_converted = true, status = '6. closed won' WHERE lead_id = %s", (lead[0],)
        )
        connection.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (%s, %s)", (uid, lead[0]))


def close(connection: Connection, by: str) -> None:
    """A customer who is closed, or open again."""
    connection.execute(
        "UPDATE customer SET is_closed = is_closed IS NOT TRUE, date_closed = now()"
        " WHERE customer_uid = (SELECT customer_uid FROM customer ORDER BY random() LIMIT 1)"
    )


def tidy(connection: Connection, by: str) -> None:
    """Leads that came to nothing, when there are many. Their history stays; what was logged by hand goes with them."""
    doomed = (
        "SELECT lead_id FROM lead WHERE is_converted IS NOT TRUE"
        " ORDER BY lead_id LIMIT greatest(0, (SELECT count(*) FROM lead) - %s)"
    )
    connection.execute(
        f"DELETE FROM activity WHERE activity_category = 'manual' AND lead_id IN ({doomed})".encode(),
        (KEEP,),
    )
    connection.execute(f"DELETE FROM lead WHERE lead_id IN ({doomed})".encode(), (KEEP,))


ACTIONS: dict[Callable[[Connection, str], None], int] = {
    **{create: 20, log: 30, move_on: 25, assign: 8, mend: 10, convert: 3, close: 1, tidy: 3}
}
"""What they do, and how often."""


def main(dsn: str) -> None:
    """Work until the server goes away."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for count in itertools.count(1):
            by = random.choice(PEOPLE)
            (action,) = random.choices([*ACTIONS], [*ACTIONS.values()])
            with connection.transaction():
                # The application says who it is; sometimes it forgets to.
                if random.random() < 0.9:
                    told = json.dumps({"changed_by": by})
                    connection.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', %s)", (told,))
                action(connection, by)
            if count % 100 == 0:
                print(f"{count} transactions", flush=True)  # noqa: T201
            time.sleep(random.expovariate(RATE))


if __name__ == "__main__":
    main(*sys.argv[1:])
