"""A sales day at LeadFi, as its application would have it, and beside each scene the activities that it must become."""

# ruff: noqa: S608 (what is put into the SQL here stands here)

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple


class Entry(NamedTuple):
    """A row of `activity`: about which lead or customer, and by whom."""

    type: str
    subject: str
    description: str
    created_by: str
    category: str = "system"


@dataclass(frozen=True, slots=True)
class Scene:
    """A transaction: what is told of it, who does it (None: the application doesn't say), and what it must become."""

    story: str
    by: str | None
    sql: str
    becomes: Sequence[Entry] = ()
    copy: Sequence[tuple[str, ...]] = ()
    """Rows for the COPY that `sql` is."""
    rolled_back: bool = False


def _manual(kind: str, lead: str, description: str, by: str) -> str:
    """What the application does for a call, an email or a meeting."""
    lead, description = lead.replace("'", "''"), description.replace("'", "''")
    return f"""
        INSERT INTO activity (lead_id, activity_type, description, bd_in_charge, created_by)
        SELECT lead_id, '{kind}', '{description}', '{by}', '{by}' FROM lead WHERE full_name = '{lead}';
    """


IMPORTED: Final = [f"Visitor {number:03}" for number in range(1, 201)]

NOTES: Final = 'Said: "100 % {sure}", 日本 next 🚀\n' + "and much more, " * 300

MORNING: Final = [
    Scene(
        "jane meets Ada Lind of Kestrel Exchange",
        "jane",
        """
        INSERT INTO lead (full_name, company_name, source, status, bd_in_charge, type)
        VALUES ('Ada Lind', 'Kestrel Exchange', 'conference', '1. lead generated', 'jane', 'exchange')
        """,
        [Entry("lead_created", "Ada Lind", 'Lead "Ada Lind" created by jane', "jane")],
    ),
    Scene(
        "jane calls her: the application's own entry, which the worker leaves alone",
        "jane",
        _manual("call", "Ada Lind", "Wants to see fees in writing", "jane"),
        [Entry("call", "Ada Lind", "Wants to see fees in writing", "jane", "manual")],
    ),
    Scene(
        "a proposal goes out, by email, and her status with it",
        "jane",
        _manual("email", "Ada Lind", "Proposal sent", "jane")
        + "UPDATE lead SET status = '2. proposal' WHERE full_name = 'Ada Lind'",
        [
            Entry("email", "Ada Lind", "Proposal sent", "jane", "manual"),
            Entry(
                "status_changed",
                "Ada Lind",
                'Lead status changed from "1. lead generated" to "2. proposal"',
                "jane",
            ),
        ],
    ),
    Scene(
        "the web form brings Nora O'Neil, without a status, and doesn't say who it is",
        None,
        """
        INSERT INTO lead (full_name, company_name, source, bd_in_charge, type)
        VALUES ('Nora O''Neil', 'Harbour OTC', 'web', 'bob', 'otc')
        """,
        [Entry("lead_created", "Nora O'Neil", 'Lead "Nora O\'Neil" created by bob', "system")],
    ),
    Scene(
        "bob gives her a first status, which triggers with != never saw",
        "bob",
        "UPDATE lead SET status = '1. lead generated' WHERE full_name = 'Nora O''Neil'",
        [Entry("status_changed", "Nora O'Neil", 'Lead status changed from "" to "1. lead generated"', "bob")],
    ),
    Scene(
        "one UPDATE hands her to mia, moves her on and adds a phone number: three activities",
        "bob",
        """
        UPDATE lead SET status = '3. negotiation', bd_in_charge = 'mia', phone_number = '+353 1 555 0100'
        WHERE full_name = 'Nora O''Neil'
        """,
        [
            Entry(
                "status_changed",
                "Nora O'Neil",
                'Lead status changed from "1. lead generated" to "3. negotiation"',
                "bob",
            ),
            Entry("assignment_changed", "Nora O'Neil", 'Lead assignment changed from "bob" to "mia"', "bob"),
            Entry("lead_updated", "Nora O'Neil", 'Lead "Nora O\'Neil" updated: phone_number', "bob"),
        ],
    ),
    Scene(
        "mia meets her, and keeps long notes",
        "mia",
        _manual("meeting", "Nora O'Neil", "Lunch at the harbour", "mia")
        + f"UPDATE lead SET background = '{NOTES}' WHERE full_name = 'Nora O''Neil'",
        [
            Entry("meeting", "Nora O'Neil", "Lunch at the harbour", "mia", "manual"),
            Entry("lead_updated", "Nora O'Neil", 'Lead "Nora O\'Neil" updated: background', "mia"),
        ],
    ),
    Scene(
        "someone saves a form in which nothing was changed: nothing to tell",
        "mia",
        "UPDATE lead SET country = country, status = status WHERE full_name = 'Nora O''Neil'",
    ),
    Scene(
        "bob marks every lead as lost, sees it, and rolls back: it never happened",
        "bob",
        "UPDATE lead SET status = '7. lost'",
        rolled_back=True,
    ),
    Scene(
        "mia rolls back to a savepoint: only the second thought counts",
        "mia",
        """
        SAVEPOINT thought;
        UPDATE lead SET status = '7. lost' WHERE full_name = 'Nora O''Neil';
        ROLLBACK TO thought;
        UPDATE lead SET status = '4. registration' WHERE full_name = 'Nora O''Neil'
        """,
        [
            Entry(
                "status_changed",
                "Nora O'Neil",
                'Lead status changed from "3. negotiation" to "4. registration"',
                "mia",
            )
        ],
    ),
    Scene(
        "mia imports the 200 visitors of the stand, in one COPY",
        "mia",
        "COPY lead (full_name, company_name, source, status, bd_in_charge, type) FROM STDIN",
        [Entry("lead_created", name, f'Lead "{name}" created by mia', "mia") for name in IMPORTED],
        copy=[(name, "Stand 12", "import", "1. lead generated", "mia", "otc") for name in IMPORTED],
    ),
    Scene(
        "and gives the first 50 to bob, in one UPDATE",
        "mia",
        "UPDATE lead SET bd_in_charge = 'bob' WHERE full_name BETWEEN 'Visitor 001' AND 'Visitor 050'",
        [
            Entry("assignment_changed", name, 'Lead assignment changed from "mia" to "bob"', "mia")
            for name in IMPORTED[:50]
        ],
    ),
]


def _of_the_rush(by: str, lead: str, successor: str) -> list[Scene]:
    """One lead from its first call to the desk of `successor`."""
    return [
        Scene(
            "",
            by,
            f"""
            INSERT INTO lead (full_name, source, status, bd_in_charge, type)
            VALUES ('{lead}', 'phone', '1. lead generated', '{by}', 'exchange')
            """,
            [Entry("lead_created", lead, f'Lead "{lead}" created by {by}', by)],
        ),
        Scene(
            "",
            by,
            _manual("call", lead, "Asked for a proposal", by)
            + f"UPDATE lead SET status = '2. proposal' WHERE full_name = '{lead}'",
            [
                Entry("call", lead, "Asked for a proposal", by, "manual"),
                Entry(
                    "status_changed",
                    lead,
                    'Lead status changed from "1. lead generated" to "2. proposal"',
                    by,
                ),
            ],
        ),
        Scene(
            "",
            by,
            f"""
            UPDATE lead SET status = '3. negotiation', bd_in_charge = '{successor}' WHERE full_name = '{lead}'
            """,
            [
                Entry("status_changed", lead, 'Lead status changed from "2. proposal" to "3. negotiation"', by),
                Entry("assignment_changed", lead, f'Lead assignment changed from "{by}" to "{successor}"', by),
            ],
        ),
    ]


# One list a session, all at once. Nobody has a lead of somebody else's, so that the order of each lead is known.
RUSH_HOUR: Final = [
    [
        *_of_the_rush("jane", "Omar Haddad", "bob"),
        *_of_the_rush("jane", "Lucie Martin", "tom"),
        *_of_the_rush("jane", "Emre Kaya", "mia"),
    ],
    [
        *_of_the_rush("bob", "Li Wei", "mia"),
        *_of_the_rush("bob", "Tomás Vega", "jane"),
        *_of_the_rush("bob", "Ama Boateng", "tom"),
    ],
    [
        *_of_the_rush("mia", "Sven Dahl", "tom"),
        *_of_the_rush("mia", "Ruth Amari", "bob"),
        *_of_the_rush("mia", "Paul Weber", "jane"),
    ],
    [
        Scene(
            "",
            "tom",
            """
            INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Zoe Park', 'phone', 'tom', 'otc');
            SELECT pg_sleep(3);
            UPDATE lead SET country = 'Korea' WHERE full_name = 'Zoe Park'
            """,
            [
                Entry("lead_created", "Zoe Park", 'Lead "Zoe Park" created by tom', "tom"),
                Entry("lead_updated", "Zoe Park", 'Lead "Zoe Park" updated: country', "tom"),
            ],
        ),
        *_of_the_rush("tom", "Ivan Petrov", "jane"),
    ],
]

AFTERNOON: Final = [
    Scene(
        "Ada signs: customer, lead and contact in one transaction",
        "jane",
        """
        INSERT INTO customer (customer_uid, name, registered_email, type)
        VALUES (4711, 'Kestrel Exchange', 'ops@kestrel.example', 'exchange');
        UPDATE lead SET is_converted = true, status = '6. closed won' WHERE full_name = 'Ada Lind';
        INSERT INTO contact (customer_uid, lead_id) SELECT 4711, lead_id FROM lead WHERE full_name = 'Ada Lind'
        """,
        [
            Entry("customer_created", "Kestrel Exchange", 'Customer "Kestrel Exchange" created (ID: 4711)', "jane"),
            Entry("status_changed", "Ada Lind", 'Lead status changed from "2. proposal" to "6. closed won"', "jane"),
            Entry("lead_converted", "Ada Lind", 'Lead "Ada Lind" converted to customer', "jane"),
        ],
    ),
    Scene(
        "anna of the back office gives the customer its registered name",
        "anna",
        "UPDATE customer SET name = 'Kestrel Exchange Ltd' WHERE customer_uid = 4711",
        [Entry("customer_updated", "Kestrel Exchange Ltd", 'Customer "Kestrel Exchange Ltd" updated', "anna")],
    ),
    Scene(
        "a customer opened by mistake is closed, and deleted",
        "anna",
        "INSERT INTO customer (customer_uid, name, type) VALUES (4712, 'Kestral', 'exchange')",
        [Entry("customer_created", "Kestral", 'Customer "Kestral" created (ID: 4712)', "anna")],
    ),
    Scene(
        "",
        "anna",
        "UPDATE customer SET is_closed = true, date_closed = now() WHERE customer_uid = 4712",
        [
            Entry("status_changed", "Kestral", 'Customer status changed from "open" to "closed"', "anna"),
            Entry("customer_updated", "Kestral", 'Customer "Kestral" updated', "anna"),
        ],
    ),
    Scene(
        "",
        "anna",
        "DELETE FROM customer WHERE customer_uid = 4712",
        [Entry("customer_deleted", "Kestral", 'Customer "Kestral" deleted (ID: 4712)', "anna")],
    ),
    Scene(
        "bob finds a duplicate and deletes it: its history stays",
        "bob",
        "DELETE FROM lead WHERE full_name = 'Visitor 007'",
        [Entry("lead_deleted", "Visitor 007", 'Lead "Visitor 007" deleted', "bob")],
    ),
    Scene(
        "mia gives up on the last 20 visitors, and removes them",
        "mia",
        """
        UPDATE lead SET status = '7. lost' WHERE full_name >= 'Visitor 181' AND source = 'import';
        DELETE FROM lead WHERE status = '7. lost'
        """,
        [
            *(
                Entry("status_changed", name, 'Lead status changed from "1. lead generated" to "7. lost"', "mia")
                for name in IMPORTED[180:]
            ),
            *(Entry("lead_deleted", name, f'Lead "{name}" deleted', "mia") for name in IMPORTED[180:]),
        ],
    ),
    Scene(
        "mia goes home: Nora is integrating",
        "mia",
        "UPDATE lead SET status = '5. integration' WHERE full_name = 'Nora O''Neil'",
        [
            Entry(
                "status_changed",
                "Nora O'Neil",
                'Lead status changed from "4. registration" to "5. integration"',
                "mia",
            )
        ],
    ),
]

BY_HAND: Final[Sequence[Entry]] = [
    entry for scene in [*MORNING, *(s for session in RUSH_HOUR for s in session), *AFTERNOON] for entry in scene.becomes
]


def faults(expected: Sequence[Entry], recorded: Sequence[Entry]) -> list[str]:
    """What is wrong with the entries recorded, a line each: missing, too many, or out of their subject's order.

    Only the worker's own have an order: it may be late, when the application's are there at once.
    """
    owed, found = Counter(expected), Counter(recorded)
    different = [
        *(f"missing {count}: {' · '.join(entry)}" for entry, count in (owed - found).items()),
        *(f"too many {count}: {' · '.join(entry)}" for entry, count in (found - owed).items()),
    ]
    if different:
        return different
    orders = _by_subject(recorded)
    return [
        f"out of order: {subject}: {' · '.join(entry.type for entry in orders[subject])}"
        for subject, entries in _by_subject(expected).items()
        if entries != orders[subject]
    ]


def _by_subject(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    subjects = defaultdict(list)
    for entry in entries:
        if entry.category == "system":
            subjects[entry.subject].append(entry)
    return subjects
