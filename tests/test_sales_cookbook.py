"""Sales Cookbook as its users have it: every line of what the profile records, on Django's own tables.

`sales_cookbook_signals.sql` is a second witness: triggers that do what Django's signals did.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from application import Application
from doctoring import report
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support import Crm, crm_on, eventually, storm

from cdc_worker.cluster import Cluster

TABLES = (Path(__file__).parent / "sales_cookbook.sql").read_bytes()
SIGNALS = (Path(__file__).parent / "sales_cookbook_signals.sql").read_bytes()

# What Django's forms leave as it is.
BLANK: dict[str, dict[str, Any]] = {
    "core_organization": {"created_at": "now", "name": ""},
    "core_user": {
        **dict.fromkeys(("password", "first_name", "last_name", "email"), ""),
        **{"is_superuser": False, "is_staff": False, "is_active": True, "date_joined": "now"},
    },
    "core_account": {"name": ""},
    "core_contact": {"name": "", "email": "", "phone": ""},
    "core_lead": {
        **dict.fromkeys(("email", "phone", "company", "source"), ""),
        **{"name": "Ada", "status": "new", "created_at": "now", "updated_at": "now"},
    },
    "core_opportunity": {
        **{"name": "Looms", "amount": 5000, "stage": "qualification", "account_id": 1},
        **{"created_at": "now", "close_date": "2030-01-01"},
    },
    "core_quote": {"title": "Ten looms", "total_price": "1234567.5", "created_at": "now", "notes": ""},
    "core_task": {"title": "", "type": "call", "due_date": "now", "status": "pending", "notes": ""},
}

Connection = psycopg.Connection[Any]


def add(connection: Connection, table: str, **columns: Any) -> int:
    """Insert a row, and return its id."""
    row = {**BLANK[table], **columns}
    query = sql.SQL("INSERT INTO {} ({}) VALUES ({}) RETURNING id").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, row)),
        sql.SQL(", ").join(sql.Placeholder() * len(row)),
    )
    ((number,),) = connection.execute(query, [*row.values()])
    return int(number)


def change(connection: Connection, table: str, number: int, **columns: Any) -> None:
    """Save a row with these columns, as Django does: with a new `updated_at` where there is one."""
    row = {**columns, **({"updated_at": "now"} if table == "core_lead" else {})}
    assignments = [sql.SQL("{} = %s").format(sql.Identifier(column)) for column in row]
    query = sql.SQL("UPDATE {} SET {} WHERE id = %s").format(sql.Identifier(table), sql.SQL(", ").join(assignments))
    connection.execute(query, [*row.values(), number])


def use(crm: Crm, *arguments: str) -> Crm:
    """Let the worker record Sales Cookbook. User and organization 1 are there, user 2 is of no organization."""
    crm.connection.execute(TABLES)
    for name in ("Cooks", "Others"):
        add(crm.connection, "core_organization", name=name)
    add(crm.connection, "core_user", username="sally", organization_id=1)
    add(crm.connection, "core_user", username="otto")
    add(crm.connection, "core_account")
    crm.settings["profile"] = "sales_cookbook"
    if arguments:
        crm.succeed(*arguments)
    else:
        crm.setup()
    return crm


@pytest.fixture
def cookbook(bare_crm: Crm) -> Crm:
    return use(bare_crm)


LOGGED = """
SELECT type, summary, user_id, lead_id, contact_id, opportunity_id, organization_id
FROM core_interactionlog ORDER BY id
"""


def logged(crm: Crm) -> list[Any]:
    """The rows of the log, in order: type, summary, user, lead, contact, opportunity, organization."""
    return crm.execute(LOGGED)


def has_logged(crm: Crm, count: int) -> bool:
    """Whether there are so many rows."""
    return len(logged(crm)) >= count


def summaries(crm: Crm) -> list[str]:
    return [summary for _, summary, *_ in logged(crm)]


def not_logged(crm: Crm) -> int:
    """How many dead letters there are."""
    return int(crm.value("SELECT count(*) FROM cdc_worker.dead_letter"))


# Every line of the table


@dataclass
class Line:
    """What happens in a line's own corner of the tables, in which every id is `number`, and what is logged of it.

    Its user is of organization 1, its lead of `number` + 1000, its opportunity of `number` + 2000.
    """

    happens: Callable[[Connection, int], None]
    type: str = "note"
    summaries: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    organization: int | None = 1

    def rows(self, number: int) -> list[tuple[Any, ...]]:
        linked = [number if link in self.links else None for link in ("lead", "contact", "opportunity")]
        organization = self.organization if self.organization in (None, 1) else number + self.organization
        return [(self.type, summary, number, *linked, organization) for summary in self.summaries]


def created(table: str, **columns: Any) -> Callable[[Connection, int], None]:
    def happens(connection: Connection, number: int) -> None:
        links: dict[str, dict[str, Any]] = {
            "core_lead": {"assigned_to_id": number},
            "core_opportunity": {"owner_id": number, "contact_id": number},
            "core_quote": {"created_by_id": number, "opportunity_id": number},
            "core_task": {"owner_id": number, "related_lead_id": number},
        }
        if table in ("core_quote", "core_task"):
            add(connection, "core_lead", id=number, organization_id=number + 1000)
            deal = {"contact_id": number, "organization_id": number + 2000}
            add(connection, "core_opportunity", id=number, **deal)
        add(connection, table, **{"id": number, **links[table], **columns})

    return happens


def saved(table: str, before: dict[str, Any] | None = None, **columns: Any) -> Callable[[Connection, int], None]:
    """One that was there is saved with these columns, twice; nobody's before, so that only that is logged."""
    owner = {"core_lead": "assigned_to_id", "core_opportunity": "owner_id"}.get(table)

    def happens(connection: Connection, number: int) -> None:
        created(table, **{**({owner: None} if owner else {}), **(before or {})})(connection, number)
        if owner and (before or {}).get(owner, number) is not None:
            change(connection, table, number, **{owner: number})
        for _ in range(2):
            change(connection, table, number, **columns)

    return happens


def amount(old: str, new: str, told: str | None) -> Line:
    text = () if told is None else (f"Opportunity value {told}",)
    return Line(
        saved("core_opportunity", {"amount": old}, amount=new), summaries=text, links=("contact", "opportunity")
    )


def status(new: str, told: str) -> Line:
    old = {"status": "new" if new != "new" else "contacted"}
    return Line(saved("core_lead", old, status=new), summaries=(f"Lead Ada {told}",), links=("lead",))


def stage(new: str, told: str) -> Line:
    old = {"stage": "lost" if new != "lost" else "won"}
    text = (f"Opportunity Looms {told}",)
    return Line(saved("core_opportunity", old, stage=new), summaries=text, links=("contact", "opportunity"))


def task(told: str, type_: str, links: tuple[str, ...] = ("lead",), organization: int | None = 1, **of: Any) -> Line:
    return Line(saved("core_task", of, status="completed"), type_, (f"Task completed: {told}",), links, organization)


TO_OPPORTUNITY = ("contact", "opportunity")
LONG = random.Random(1).randbytes(10_000).hex()

LINES = {
    "lead created": Line(
        created("core_lead", company="Engines"), summaries=("New lead created: Ada from Engines",), links=("lead",)
    ),
    "lead created without a company": Line(
        created("core_lead"), summaries=("New lead created: Ada from Unknown Company",), links=("lead",)
    ),
    "lead created without a user": Line(created("core_lead", assigned_to_id=None)),
    "lead.status new": status("new", "marked as new"),
    "lead.status contacted": status("contacted", "contacted for the first time"),
    "lead.status qualified": status("qualified", "qualified as a potential customer"),
    "lead.status converted": status("converted", "successfully converted to opportunity"),
    "lead.status disqualified": status("disqualified", "disqualified from sales process"),
    "lead.status else": status("asleep", "status changed to asleep"),
    "lead.status without a user": Line(saved("core_lead", {"assigned_to_id": None}, status="contacted")),
    "lead saved as it is": Line(saved("core_lead", status="new")),
    "opportunity created": Line(
        created("core_opportunity", amount="1234567.89"),
        summaries=("New opportunity created: Looms worth $1,234,567.89",),
        links=TO_OPPORTUNITY,
    ),
    "opportunity created without a user": Line(created("core_opportunity", owner_id=None)),
    "opportunity.stage qualification": stage("qualification", "moved to qualification stage"),
    "opportunity.stage proposal": stage("proposal", "moved to proposal stage - preparing quote"),
    "opportunity.stage negotiation": stage("negotiation", "entered negotiation phase"),
    "opportunity.stage won": stage("won", "WON! 🎉 Deal closed successfully"),
    "opportunity.stage lost": stage("lost", "marked as lost - opportunity closed"),
    "opportunity.stage else": stage("asleep", "stage changed to asleep"),
    "opportunity.stage without a user": Line(saved("core_opportunity", {"owner_id": None}, stage="won")),
    "opportunity.amount increased": amount("10000", "12000", "increased from $10,000.00 to $12,000.00"),
    "opportunity.amount decreased": amount("12000", "10000", "decreased from $12,000.00 to $10,000.00"),
    "opportunity.amount by exactly 10 %": amount("10000", "11000", None),
    "opportunity.amount by more than 10 %": amount("10000", "11000.01", "increased from $10,000.00 to $11,000.01"),
    "opportunity.amount by exactly 1000": amount("5000", "6000", "increased from $5,000.00 to $6,000.00"),
    "opportunity.amount by less than 1000": amount("5000", "5999.99", None),
    "opportunity.amount from zero": amount("0", "9000", None),
    "opportunity.amount to zero": amount("9000", "0", None),
    "opportunity.amount without a user": Line(saved("core_opportunity", {"owner_id": None}, amount="99999")),
    "opportunity.stage before opportunity.amount": Line(
        saved("core_opportunity", amount="7500", stage="won"),
        summaries=(
            "Opportunity Looms WON! 🎉 Deal closed successfully",
            "Opportunity value increased from $5,000.00 to $7,500.00",
        ),
        links=TO_OPPORTUNITY,
    ),
    "quote created": Line(
        created("core_quote"), summaries=("Quote created: Ten looms for $1,234,567.50",), links=TO_OPPORTUNITY
    ),
    "quote created without a user": Line(created("core_quote", created_by_id=None)),
    "task completed: call": task("completed call with Ada", "call", type="call"),
    "task completed: email": task("sent email to Ada", "email", type="email"),
    "task completed: meeting": task("held meeting with Ada", "meeting", type="meeting"),
    "task completed: demo": task("conducted demo for Ada", "note", type="demo"),
    "task completed: else": task("completed visit task for Ada", "visit", type="visit"),
    "task not completed": Line(saved("core_task", status="overdue")),
    "task completed already": Line(saved("core_task", {"status": "completed"}, notes="x")),
    "task completed with notes of 100 characters": task(
        f"completed call with Ada - Notes: {'é' * 100}", "call", notes="é" * 100
    ),
    "task completed with notes of 101 characters": task(
        f"completed call with Ada - Notes: {'é' * 100}...", "call", notes="é" * 101
    ),
    "task completed with notes that are stored apart from their row": task(
        f"completed call with Ada - Notes: {LONG[:100]}...", "call", notes=LONG
    ),
}


@pytest.fixture(scope="module")
def told(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """What is logged when all lines have happened."""
    with crm_on(server, tmp_path_factory.mktemp("lines")) as crm:
        use(crm)
        for number, line in enumerate(LINES.values(), 100):
            for organization in (number + 1000, number + 2000):
                add(crm.connection, "core_organization", id=organization)
            add(crm.connection, "core_user", id=number, username=f"user {number}", organization_id=1)
            add(crm.connection, "core_contact", id=number)
            line.happens(crm.connection, number)
        crm.record()
        assert not_logged(crm) == 0
        yield logged(crm)


@pytest.mark.parametrize("name", LINES)
def test_line(told: list[Any], name: str) -> None:
    number = [*LINES].index(name) + 100
    assert [row for row in told if row[2] == number] == LINES[name].rows(number)


def test_nothing_else_is_logged(told: list[Any]) -> None:
    assert len(told) == sum(len(line.summaries) for line in LINES.values())


# Users, organizations and targets, which are looked up


def organizations(crm: Crm) -> list[int | None]:
    return [row[-1] for row in logged(crm)]


def test_the_organization_is_the_users_else_that_of_what_it_is_about(cookbook: Crm) -> None:
    """In the order of the table: a lead's own; an opportunity's; a quote's opportunity's, its own; a task's lead's …"""
    db = cookbook.connection
    for user in (1, 2):
        lead = add(db, "core_lead", assigned_to_id=user, organization_id=2)
        deal = add(db, "core_opportunity", owner_id=user, organization_id=2)
        bare = add(db, "core_opportunity")
        add(db, "core_quote", created_by_id=user, opportunity_id=deal)
        add(db, "core_quote", created_by_id=user, opportunity_id=bare, organization_id=2)
        for related in ({"related_lead_id": lead}, {"related_opportunity_id": deal}, {}):
            change(db, "core_task", add(db, "core_task", owner_id=user, **related), status="completed")
    cookbook.record()
    assert organizations(cookbook) == [1] * 7 + [2] * 6 + [None]


def test_a_task_of_an_opportunity_is_linked_to_that_and_its_contact(cookbook: Crm) -> None:
    db = cookbook.connection
    contact = add(db, "core_contact")
    deal = add(db, "core_opportunity", contact_id=contact)
    number = add(db, "core_task", owner_id=1, related_opportunity_id=deal)
    change(db, "core_task", number, status="completed")
    change(db, "core_task", add(db, "core_task", owner_id=1), status="completed")
    cookbook.record()
    assert logged(cookbook) == [
        ("call", "Task completed: completed call with Looms", 1, None, contact, deal, 1),
        ("call", "Task completed: completed call with unknown contact", 1, None, None, None, 1),
    ]


def test_who_is_written_after_what_refers_to_them_is_looked_up_all_the_same(cookbook: Crm) -> None:
    """Django's foreign keys are checked at the commit."""
    db = cookbook.connection
    with db.transaction():
        add(db, "core_lead", id=7, assigned_to_id=9, organization_id=1)
        add(db, "core_quote", created_by_id=9, opportunity_id=8)
        add(db, "core_opportunity", id=8, organization_id=1)
        add(db, "core_user", id=9, username="new", organization_id=3)
        add(db, "core_organization", id=3)
    cookbook.record()
    assert logged(cookbook) == [
        ("note", "New lead created: Ada from Unknown Company", 9, 7, None, None, 3),
        ("note", "Quote created: Ten looms for $1,234,567.50", 9, None, None, 8, 3),
    ]


def test_a_user_who_moves_takes_along_what_comes_then(cookbook: Crm) -> None:
    db = cookbook.connection
    with cookbook.worker() as worker:
        worker.wait_for("replication_started")
        add(db, "core_lead", assigned_to_id=1)
        eventually(lambda: len(logged(cookbook)) == 1)
        with db.transaction():
            add(db, "core_lead", assigned_to_id=1)
            change(db, "core_user", 1, organization_id=2)
            add(db, "core_lead", assigned_to_id=1)
        change(db, "core_user", 1, last_login="now")
        add(db, "core_lead", assigned_to_id=1)
        change(db, "core_user", 1, organization_id=None)
        add(db, "core_lead", assigned_to_id=1)
        eventually(lambda: len(logged(cookbook)) == 5)
        assert worker.terminate() == 0
    assert organizations(cookbook) == [1, 1, 2, 2, None]


def test_what_is_gone_by_the_time_it_is_told_of(cookbook: Crm) -> None:
    """Its links are left out; without its user a row can't be there at all, and is a dead letter."""
    db = cookbook.connection
    add(db, "core_user", id=3, username="gone", organization_id=2)
    add(db, "core_lead", assigned_to_id=3)
    lead = add(db, "core_lead", name="Bea", assigned_to_id=2, organization_id=2)
    number = add(db, "core_task", owner_id=2, related_lead_id=lead)
    change(db, "core_task", number, status="completed")
    db.execute("UPDATE core_lead SET assigned_to_id = NULL")
    for table, gone in (("core_task", number), ("core_lead", lead), ("core_user", 3)):
        db.execute(sql.SQL("DELETE FROM {} WHERE id = %s").format(sql.Identifier(table)), (gone,))
    cookbook.record()
    assert logged(cookbook) == [
        ("note", "New lead created: Bea from Unknown Company", 2, None, None, None, 2),
        ("call", "Task completed: completed call with Bea", 2, None, None, None, 2),
    ]
    assert not_logged(cookbook) == 1


# What signals missed, and what they did twice


def test_what_django_writes_without_signals_is_logged(cookbook: Crm) -> None:
    """`queryset.update`, `bulk_create` and direct SQL."""
    db = cookbook.connection
    names = ("{new.email}", "100 %s", "WON! 🎉", "it's\ta\\tab\n")
    for name in names:
        add(db, "core_lead", name=name, assigned_to_id=1)
    db.execute("UPDATE core_lead SET status = 'contacted'")
    db.execute("UPDATE core_lead SET status = 'contacted', updated_at = now()")
    with db.transaction(force_rollback=True):
        db.execute("UPDATE core_lead SET status = 'never saved'")
    cookbook.record()
    assert summaries(cookbook) == [
        *(f"New lead created: {name} from Unknown Company" for name in names),
        *(f"Lead {name} contacted for the first time" for name in names),
    ]


def test_a_lead_that_is_forgotten_is_forgotten_in_its_tasks(cookbook: Crm) -> None:
    db = cookbook.connection
    lead = add(db, "core_lead", assigned_to_id=1)
    for related in (lead, None):
        number = add(db, "core_task", owner_id=1, related_lead_id=related)
        change(db, "core_task", number, status="completed")
    cookbook.record()
    cookbook.succeed("forget", "--lead", str(lead), "--yes")
    change(db, "core_lead", lead, status="contacted")
    cookbook.record()
    assert summaries(cookbook) == ["", "", "Task completed: completed call with unknown contact", ""]


# Exactly once

NAMES = ("Ada", "{new.name}", "Bea 🎉", "%s", "O'Hara \\ Söhne")


def business(crm: Crm, seed: int) -> Callable[[Connection, int, int], None]:
    """A session's turns: anything that Sales Cookbook's users do."""
    dice = [random.Random(seed + session) for session in range(3)]

    def number(connection: Connection, table: str, dice: random.Random) -> int | None:
        query = sql.SQL("SELECT max(id) FROM {}").format(sql.Identifier(table))
        ((last,),) = connection.execute(query)
        return None if last is None else dice.randint(1, last)

    def work(connection: Connection, session: int, turn: int) -> None:
        roll = dice[session]
        user = roll.choice([1, 2, None])
        organization = roll.choice([1, 2, None])
        contact = roll.choice([1, 2, None])
        lead = add(
            connection,
            "core_lead",
            name=roll.choice(NAMES),
            company=roll.choice(["", "Engines"]),
            assigned_to_id=user,
            organization_id=organization,
        )
        change(connection, "core_lead", lead, status=roll.choice(["new", "contacted", "converted", "lost"]))
        price = Decimal(roll.choice([0, 500000, 1000000])) / 100
        deal = add(
            connection,
            "core_opportunity",
            name=roll.choice(NAMES),
            amount=price,
            owner_id=user,
            contact_id=contact,
            organization_id=organization,
        )
        by = Decimal(roll.choice([-100001, -100000, -50000, 0, 99999, 100000, 100001])) / 100
        change(connection, "core_opportunity", deal, amount=price + by, stage=roll.choice(["won", "qualification"]))
        add(connection, "core_quote", opportunity_id=deal, created_by_id=user, organization_id=organization)
        job = add(
            connection,
            "core_task",
            type=roll.choice(["call", "email", "meeting", "demo", "visit"]),
            owner_id=roll.choice([1, 2]),
            related_lead_id=roll.choice([lead, None]),
            related_opportunity_id=roll.choice([deal, None]),
            notes="n" * roll.choice([0, 1, 100, 101]),
        )
        change(connection, "core_task", job, status=roll.choice(["completed", "overdue"]))
        change(connection, "core_task", job, status="completed")

    return work


def as_signals_would(crm: Crm) -> int:
    """How many rows signals would have written, which are those that there are."""
    expected = Counter(crm.execute("SELECT * FROM signal"))
    found = Counter(logged(crm))
    assert (expected - found, found - expected) == (Counter(), Counter())
    assert not_logged(crm) == 0
    assert crm.value("SELECT count(*) FROM cdc_worker.written_key") == expected.total()
    return expected.total()


@storm(3, chaos=30)
def test_kills_under_business_leave_the_log_as_signals_would_have_written_it(
    cookbook: Crm, seed: int, rounds: int
) -> None:
    cookbook.connection.execute(SIGNALS)
    for _ in range(2):
        add(cookbook.connection, "core_contact")
    dice = random.Random(seed)
    with Application(cookbook, business(cookbook, seed)) as application:
        for _ in range(rounds):
            with cookbook.worker() as worker:
                worker.wait_for("replication_started")
                application.go_on(dice.randint(1, 30))
                worker.kill()
    cookbook.record()
    assert as_signals_would(cookbook) > 100


IN_ONE_TRANSACTION = [
    "INSERT INTO core_opportunity (name, amount, stage, close_date, created_at, account_id, owner_id, organization_id)"
    " SELECT n, n, 'won', now(), now(), 1, CASE WHEN n %% 3 > 0 THEN n %% 400 + 100 END, n %% 2 + 1"
    " FROM generate_series(1, 1200) n",
    "INSERT INTO core_quote (title, total_price, created_at, notes, created_by_id, opportunity_id)"
    " SELECT n, n, now(), '', n %% 400 + 100, 1201 - n FROM generate_series(1, 1200) n",
    "INSERT INTO core_task (title, type, due_date, status, notes, owner_id, related_opportunity_id)"
    " SELECT n, 'call', now(), 'pending', '', 2, n FROM generate_series(1, 1200) n",
    "UPDATE core_task SET status = 'completed'",
    "INSERT INTO core_user (id, password, is_superuser, username, first_name, last_name, email, is_staff, is_active,"
    " date_joined, organization_id) SELECT n, '', false, n, '', '', '', false, true, now(), NULL"
    " FROM generate_series(100, 499) n",
]


@storm(1, chaos=20)
def test_kills_within_one_large_transaction_that_looks_up_its_own_rows(cookbook: Crm, seed: int, rounds: int) -> None:
    cookbook.connection.execute(SIGNALS)
    with cookbook.connection.transaction():
        for statement in IN_ONE_TRANSACTION:
            cookbook.execute(statement)
    dice = random.Random(seed)
    for _ in range(rounds):
        with cookbook.worker() as worker:
            goal = min(len(logged(cookbook)) + dice.randint(1, 2000 // rounds), 800 + 1200 + 1200)
            eventually(partial(has_logged, cookbook, goal))
            worker.kill()
    cookbook.record()
    assert as_signals_would(cookbook) == 800 + 1200 + 1200


# The commands


STRUCTURE = """
SELECT attname::text, format_type(atttypid, atttypmod), attnotnull, attidentity::text, attisdropped,
       pg_get_expr(adbin, adrelid)
FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE attrelid = 'core_interactionlog'::regclass
UNION ALL SELECT tgname::text, pg_get_triggerdef(oid), NULL, NULL, NULL, NULL FROM pg_trigger
WHERE tgrelid = 'core_interactionlog'::regclass AND NOT tgisinternal
UNION ALL SELECT conname::text, pg_get_constraintdef(oid), NULL, NULL, NULL, NULL FROM pg_constraint
WHERE conrelid = 'core_interactionlog'::regclass
UNION ALL SELECT '', pg_get_indexdef(indexrelid), NULL, NULL, NULL, NULL FROM pg_index
WHERE indrelid = 'core_interactionlog'::regclass
UNION ALL SELECT relreplident::text, reloptions::text, relrowsecurity, NULL, NULL, NULL FROM pg_class
WHERE oid = 'core_interactionlog'::regclass
ORDER BY 1, 2
"""


def test_djangos_table_stays_as_django_made_it(bare_crm: Crm) -> None:
    bare_crm.connection.execute(TABLES)
    before = bare_crm.execute(STRUCTURE)
    bare_crm.execute("DROP TABLE core_interactionlog, core_task, core_quote, core_opportunity, core_lead CASCADE")
    bare_crm.execute("DROP TABLE core_contact, core_account, core_user, core_organization CASCADE")
    crm = use(bare_crm)
    assert crm.execute(STRUCTURE) == before
    assert [finding for finding in report(crm) if finding.outcome in ("failed", "unknown")] == []


def test_the_commands_know_the_profile_by_its_name(bare_crm: Crm) -> None:
    crm = use(bare_crm, "setup", "--role", "cookbook_worker", "--profile", "sales_cookbook")
    del crm.settings["profile"]
    profile = ("--profile", "sales_cookbook")
    try:
        crm.settings["dsn"] = make_conninfo(crm.dsn, user="cookbook_worker")
        add(crm.connection, "core_lead", assigned_to_id=1)
        crm.succeed("run", "--once", *profile)
        assert organizations(crm) == [1]
        assert ", 0 failed, " in crm.succeed("doctor", *profile)
        assert "activities:   1 in the last minute" in crm.command("status", *profile).stdout
        crm.succeed("profile", "check", "sales_cookbook")
    finally:
        del crm.settings["dsn"]
        crm.execute("DROP OWNED BY cookbook_worker CASCADE")
        crm.execute("DROP ROLE cookbook_worker")


def test_old_code_logs_by_itself_until_it_is_gone(bare_crm: Crm) -> None:
    """With `--marked` only what comes from new code, which says who it is, is the worker's."""
    crm = use(bare_crm, "setup", "--marked")
    db = crm.connection
    with db.transaction():
        add(db, "core_lead", name="old code's", assigned_to_id=1)
        db.execute(
            "INSERT INTO core_interactionlog (type, summary, timestamp, user_id) VALUES ('note', 'signal', now(), 1)"
        )
    with db.transaction():
        db.execute("""SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{"changed_by": "sally"}')""")
        add(db, "core_lead", name="new code's", assigned_to_id=1)
    crm.succeed("cutover")
    add(db, "core_lead", name="SQL's", assigned_to_id=1)
    crm.record()
    assert summaries(crm) == [
        "signal",
        "New lead created: new code's from Unknown Company",
        "New lead created: SQL's from Unknown Company",
    ]
