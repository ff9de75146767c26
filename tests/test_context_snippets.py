"""What the page about contexts tells applications to do, done as written, with the real libraries."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
import sqlalchemy
from psycopg.rows import TupleRow
from sqlalchemy import orm
from support import Crm

PAGE = (Path(__file__).parent.parent / "docs" / "context.md").read_text("utf-8")
KEY = "a key of sixteen or more"


def snippets(heading: str) -> list[str]:
    """The Python under a heading of the page, in order."""
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "docs/context.md", "exec"), names)
    return names


def recorded(crm: Crm, **settings: str) -> list[tuple[str, str, str]]:
    """What the worker wrote: type, by whom, and how that is known."""
    crm.record(**settings)
    return [(a["activity_type"], a["created_by"], a["metadata"].get("context_source")) for a in crm.activities()]


@pytest.fixture
def crm_with_a_lead(crm: Crm) -> Crm:
    """The lead 7, which the page is about."""
    crm.execute("SELECT setval('lead_lead_id_seq', 6)")
    crm.add_leads(1)
    crm.record()
    crm.execute("TRUNCATE activity")
    return crm


@pytest.fixture
def connection(crm_with_a_lead: Crm) -> Iterator[psycopg.Connection[TupleRow]]:
    with psycopg.connect(crm_with_a_lead.dsn, autocommit=True) as connection:
        yield connection


def test_psycopg(crm_with_a_lead: Crm, connection: psycopg.Connection[TupleRow]) -> None:
    crm = crm_with_a_lead
    snippet, use = snippets("psycopg")
    names = run(snippet, {})
    run(use, names | {"connection": connection})
    connection.execute("UPDATE lead SET title = 'Dr' WHERE lead_id = 7")
    assert recorded(crm) == [("status_changed", "jane_doe", "message"), ("lead_updated", "system", "default")]


def test_psycopg_with_signed_messages(crm_with_a_lead: Crm, connection: psycopg.Connection[TupleRow]) -> None:
    crm = crm_with_a_lead
    snippet, use = snippets("Signed messages")
    names = run(snippets("psycopg")[0], {}) | {"connection": connection, "KEY": KEY}
    names = run(snippet, names)
    run(use, names)
    run(use.replace("status = '3. negotiation'", "status = '7. lost'"), names | {"KEY": "a key of somebody else"})
    run(snippets("psycopg")[1].replace("status", "source"), names)
    assert recorded(crm, context_key=KEY) == [
        ("status_changed", "jane_doe", "message"),
        ("status_changed", "system", "default"),
        ("lead_updated", "system", "default"),
    ]
    signed, *others = (activity["metadata"] for activity in crm.activities())
    assert (signed["changed_by"], "context_trusted" in signed) == ("jane_doe", False)
    for metadata in others:
        assert "changed_by" not in metadata
        assert (metadata["context_trusted"], metadata["context_claimed"]["changed_by"]) == (False, "jane_doe")


def test_sqlalchemy(crm: Crm) -> None:
    (snippet,) = snippets("SQLAlchemy")
    names = run(snippet, {})
    user = names["user"]
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(crm.dsn), pool_size=1, max_overflow=0
    )
    add = sqlalchemy.text(
        "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES (:name, 'web', 'jane', 'otc')"
    )
    try:
        with orm.Session(engine) as session:
            token = user.set("jane_doe")
            session.execute(add, {"name": "jane's first"})
            with session.begin_nested() as savepoint:
                session.execute(add, {"name": "never"})
                savepoint.rollback()
            session.execute(add, {"name": "jane's second"})
            session.commit()
            session.execute(add, {"name": "never"})
            session.rollback()
            session.execute(add, {"name": "jane's third"})
            session.commit()
            user.reset(token)
            session.execute(add, {"name": "nobody's"})  # on the same connection: there is no other
            session.commit()
    finally:
        sqlalchemy.event.remove(orm.Session, "after_begin", names["say_who"])
        engine.dispose()
    assert recorded(crm) == [
        *[("lead_created", "jane_doe", "message")] * 3,
        ("lead_created", "system", "default"),
    ]


Visit = Callable[[dict[str, object]], None]


@pytest.fixture(scope="module")
def visit() -> Visit:
    """Visit a Django application that has the page's middleware."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "django_crm.settings"
    middleware = ModuleType("django_crm.changed_by")
    sys.modules[middleware.__name__] = middleware
    (snippet,) = snippets("Django")
    run(snippet, vars(middleware))
    import_module("django").setup()
    found: Visit = import_module("django_crm.visits").visit
    return found


@pytest.mark.parametrize("atomic_requests", [False, True])
def test_django(crm: Crm, visit: Visit, atomic_requests: bool) -> None:
    info = crm.connection.info
    visit(
        {
            "NAME": info.dbname,
            "HOST": info.host,
            "PORT": str(info.port),
            "USER": info.user,
            "ATOMIC_REQUESTS": atomic_requests,
        }
    )
    found = recorded(crm)
    jane = [
        *("lead_created", "lead_updated"),
        *("lead_updated", "lead_deleted"),
        *("lead_created", "lead_created"),
        *("lead_created", "lead_created"),
        *["lead_updated"] * 4,
        *("lead_created", "lead_updated"),
    ]
    assert found[:-2] == [(kind, "jane_doe", "message") for kind in jane]
    assert found[-2:] == [("lead_created", "system", "default")] * 2
