"""What the worker wrote is read-only, and no application breaks on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import pytest
import sqlalchemy
from psycopg import sql
from psycopg.conninfo import make_conninfo
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from support import Crm

from cdc_worker import ddl, postgres

WARNING = "activity {} was written by cdc-worker and is read-only, but for is_visible_to_bd"


def apply(crm: Crm, name: str = "050_leadfi_protection.sql") -> list[str]:
    """Run a file of `schema/`; returns what its queries generated."""
    with postgres.connect(crm.dsn, "test") as connection:
        connection.execute("SET search_path = public")
        return [
            statement
            for step in ddl.steps(ddl.schema(name))
            for statement in ddl.perform(connection, step)
            if step.generates
        ]


@pytest.fixture
def protected(crm: Crm) -> Crm:
    """Protection, a lead of which the worker and others have written, and nobody else's rights."""
    apply(crm)
    crm.add_leads(1)
    write(crm, change_key="w/1", activity_category="system", description="Lead created")
    return crm


def write(crm: Crm, **columns: Any) -> int:
    """An activity of lead 1; returns its id."""
    row = {"lead_id": 1, "activity_type": "call"} | columns
    insert = sql.SQL("INSERT INTO activity ({}) VALUES ({}) RETURNING activity_id").format(
        sql.SQL(", ").join(map(sql.Identifier, row)), sql.SQL(", ").join([sql.Placeholder()] * len(row))
    )
    found = crm.connection.execute(insert, list(row.values())).fetchone()
    assert found is not None
    return int(found[0])


def rows(crm: Crm) -> list[tuple[Any, ...]]:
    return crm.execute("SELECT * FROM activity ORDER BY activity_id")


def execute(connection: psycopg.Connection[Any], statement: LiteralString) -> tuple[int, list[str | None]]:
    """How many rows a statement found, and its warnings."""
    said: list[str | None] = []

    def hear(notice: psycopg.errors.Diagnostic) -> None:
        assert notice.severity == "WARNING"
        said.append(notice.message_primary)

    connection.add_notice_handler(hear)
    try:
        return connection.execute(statement).rowcount, said
    finally:
        connection.remove_notice_handler(hear)


@contextmanager
def role(crm: Crm, *grants: LiteralString) -> Iterator[psycopg.Connection[Any]]:
    """A connection as a role that has the application's rights and these."""
    name = sql.Identifier(f"app_{crm.slot}")
    for statement in ("CREATE ROLE {} LOGIN", "GRANT ALL ON activity, lead TO {}", *grants):
        crm.connection.execute(sql.SQL(statement).format(name))
    crm.connection.execute(sql.SQL("GRANT USAGE ON SEQUENCE activity_activity_id_seq TO {}").format(name))
    try:
        with psycopg.connect(make_conninfo(crm.dsn, user=f"app_{crm.slot}"), autocommit=True) as connection:
            yield connection
    finally:
        crm.connection.execute(sql.SQL("DROP OWNED BY {0}").format(name))
        crm.connection.execute(sql.SQL("DROP ROLE {}").format(name))


# Read-only


@pytest.mark.parametrize(
    "assignments",
    [
        "description = 'changed'",
        "lead_id = NULL",
        "activity_id = 99",
        "change_key = NULL",
        "activity_category = 'manual'",
        "metadata = '{}', date_created = '2001-01-01', created_by = 'eve'",
    ],
)
def test_an_update_finds_the_row_and_changes_nothing(protected: Crm, assignments: LiteralString) -> None:
    before = rows(protected)
    assert execute(protected.connection, f"UPDATE activity SET {assignments}") == (1, [WARNING.format(1)])
    assert rows(protected) == before


def test_a_delete_leaves_the_row(protected: Crm) -> None:
    before = rows(protected)
    assert execute(protected.connection, "DELETE FROM activity") == (0, [WARNING.format(1)])
    assert rows(protected) == before


def test_the_warning_has_the_way_out_for_administrators(protected: Crm) -> None:
    hints: list[str | None] = []
    protected.connection.add_notice_handler(lambda notice: hints.append(notice.message_hint))
    protected.execute("DELETE FROM activity")
    assert hints == ["Administrators may: SET cdc_worker.protect = off"]


def test_visibility_can_be_changed_without_a_warning(protected: Crm) -> None:
    assert execute(protected.connection, "UPDATE activity SET is_visible_to_bd = false") == (1, [])
    assert protected.value("SELECT is_visible_to_bd FROM activity") is False


def test_of_an_update_that_changes_more_visibility_is_what_remains(protected: Crm) -> None:
    found = execute(protected.connection, "UPDATE activity SET is_visible_to_bd = false, description = 'changed'")
    assert found == (1, [WARNING.format(1)])
    assert protected.execute("SELECT is_visible_to_bd, description FROM activity") == [(False, "Lead created")]


def test_an_update_that_changes_nothing_is_no_offence(protected: Crm) -> None:
    """ORMs write all columns of a row back."""
    assert execute(protected.connection, "UPDATE activity SET description = description") == (1, [])


def test_generated_columns_are_no_change(protected: Crm) -> None:
    protected.execute("ALTER TABLE activity ADD COLUMN words integer GENERATED ALWAYS AS (length(description)) STORED")
    assert execute(protected.connection, "UPDATE activity SET is_visible_to_bd = false") == (1, [])
    assert execute(protected.connection, "UPDATE activity SET description = 'x'") == (1, [WARNING.format(1)])
    assert protected.value("SELECT words FROM activity") == len("Lead created")


def test_a_column_without_equality_is_no_obstacle(protected: Crm) -> None:
    protected.execute("ALTER TABLE activity ADD COLUMN note json")
    assert execute(protected.connection, "UPDATE activity SET note = '[1]'") == (1, [WARNING.format(1)])
    assert execute(protected.connection, "UPDATE activity SET is_visible_to_bd = NULL") == (1, [])


def test_what_the_applications_own_triggers_change_is_undone_as_well(protected: Crm) -> None:
    protected.execute(
        "CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.created_by := 'stamp'; RETURN NEW; END $$"
    )
    protected.execute("CREATE TRIGGER z_stamp BEFORE UPDATE ON activity FOR EACH ROW EXECUTE FUNCTION stamp()")
    before = rows(protected)
    protected.execute("UPDATE activity SET description = 'changed'")
    assert rows(protected) == before


@pytest.mark.parametrize("category", ["manual", "system", "automated"])
def test_rows_of_other_writers_stay_theirs(protected: Crm, category: str) -> None:
    write(protected, activity_category=category)
    other = "WHERE activity_id = 2"
    assert execute(protected.connection, f"UPDATE activity SET description = 'changed' {other}") == (1, [])
    assert protected.value(f"SELECT description FROM activity {other}") == "changed"
    assert execute(protected.connection, f"DELETE FROM activity {other}") == (1, [])


def test_a_lead_of_which_only_the_worker_wrote_can_be_deleted(protected: Crm) -> None:
    before = rows(protected)
    assert execute(protected.connection, "DELETE FROM lead") == (1, [])
    assert rows(protected) == before


def test_a_lead_with_manual_activities_behaves_as_before(protected: Crm) -> None:
    write(protected)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        protected.execute("DELETE FROM lead")
    protected.execute("INSERT INTO customer (customer_uid, name) VALUES (7, 'Acme')")
    write(protected, lead_id=None, customer_uid=7)
    write(protected, lead_id=None, customer_uid=7, activity_category="system", change_key="w/2")
    protected.execute("DELETE FROM customer")
    assert protected.execute("SELECT change_key FROM activity ORDER BY 1") == [("w/1",), ("w/2",), (None,)]


def test_the_worker_goes_on_recording(protected: Crm) -> None:
    protected.record()
    protected.execute("DELETE FROM lead")
    protected.record()
    assert protected.types() == ["call", "lead_created", "lead_deleted"]


# The switch


def test_an_administrator_may_after_setting_the_switch(protected: Crm) -> None:
    protected.execute("SET cdc_worker.protect = off")
    assert execute(protected.connection, "UPDATE activity SET description = 'changed'") == (1, [])
    assert protected.value("SELECT description FROM activity") == "changed"
    assert execute(protected.connection, "DELETE FROM activity") == (1, [])
    assert rows(protected) == []


@pytest.mark.parametrize("value", ["on", "''", "DEFAULT"])
def test_any_other_value_of_the_switch_protects(protected: Crm, value: LiteralString) -> None:
    protected.execute("SET cdc_worker.protect = off")
    protected.execute(f"SET cdc_worker.protect = {value}")
    assert execute(protected.connection, "DELETE FROM activity") == (0, [WARNING.format(1)])


def test_the_switch_is_nothing_to_the_application(protected: Crm) -> None:
    """It has no rights in the worker's schema, not even to look into it, and meets no error for that."""
    before = rows(protected)
    with role(protected) as application:
        application.execute("SET cdc_worker.protect = off")
        assert execute(application, "UPDATE activity SET description = 'changed'") == (1, [WARNING.format(1)])
        assert execute(application, "DELETE FROM activity") == (0, [WARNING.format(1)])
        assert execute(application, "UPDATE activity SET is_visible_to_bd = true") == (1, [])
        application.execute("INSERT INTO activity (lead_id, activity_type) VALUES (1, 'call')")
        application.execute("DELETE FROM activity WHERE change_key IS NULL")
    assert rows(protected) == before


def test_the_switch_counts_for_the_workers_role(protected: Crm) -> None:
    with role(protected, "GRANT SELECT, UPDATE ON cdc_worker.checkpoint TO {}") as worker:
        assert execute(worker, "UPDATE activity SET description = 'changed'") == (1, [WARNING.format(1)])
        worker.execute("SET cdc_worker.protect = off")
        assert execute(worker, "UPDATE activity SET description = '', metadata = '{\"erased\": true}'") == (1, [])
    assert protected.value("SELECT description FROM activity") == ""


# Where it is installed


def test_once_installed_there_is_nothing_to_do(protected: Crm) -> None:
    assert apply(protected) == []


def unprotect(crm: Crm) -> None:
    crm.execute("DROP TRIGGER IF EXISTS zz_cdc_worker_protect ON activity")


@pytest.mark.parametrize("actions", ["", "ON DELETE CASCADE", "ON DELETE RESTRICT", "ON UPDATE RESTRICT"])
def test_a_foreign_key_that_can_be_carried_is_no_hindrance(crm: Crm, actions: LiteralString) -> None:
    """It still stands on the link itself when `setup --dry-run` looks."""
    unprotect(crm)
    crm.execute(f"ALTER TABLE activity ADD FOREIGN KEY (lead_id) REFERENCES lead {actions}")
    assert len(apply(crm)) == 1


@pytest.mark.parametrize("link", ["lead_id", "customer_uid"])
@pytest.mark.parametrize("actions", ["ON DELETE SET NULL", "ON DELETE SET DEFAULT", "ON UPDATE CASCADE"])
def test_a_foreign_key_that_sets_the_link_keeps_protection_out(
    crm: Crm, link: LiteralString, actions: LiteralString
) -> None:
    unprotect(crm)
    subject = "lead" if link == "lead_id" else "customer"
    crm.execute(f"ALTER TABLE activity ADD FOREIGN KEY ({link}) REFERENCES {subject} {actions}")
    assert apply(crm) == []
    crm.add_leads(1)
    write(crm, change_key="w/1")
    assert execute(crm.connection, "DELETE FROM activity") == (1, [])


def test_a_foreign_key_of_another_column_keeps_nothing_out(crm: Crm) -> None:
    unprotect(crm)
    crm.execute("CREATE TABLE bd (name varchar(20) PRIMARY KEY)")
    crm.execute("ALTER TABLE activity ADD assigned_to varchar(20) REFERENCES bd ON DELETE SET NULL")
    assert len(apply(crm)) == 1


# SQLAlchemy


class Models:
    """An application's models, whose leads deal with their activities in one of the ways that there are."""

    def __init__(self, crm: Crm, **activities: Any) -> None:
        class Base(DeclarativeBase):
            pass

        class Lead(Base):
            __tablename__ = "lead"
            lead_id: Mapped[int] = mapped_column(primary_key=True)
            full_name: Mapped[str]

        class Activity(Base):
            __tablename__ = "activity"
            activity_id: Mapped[int] = mapped_column(primary_key=True)
            lead_id: Mapped[int | None] = mapped_column(sqlalchemy.ForeignKey("lead.lead_id"))
            activity_type: Mapped[str]
            activity_category: Mapped[str]
            description: Mapped[str | None]
            is_visible_to_bd: Mapped[bool]

        Lead.activities = relationship(Activity, **activities)
        self.Lead = Lead
        self.Activity = Activity
        self.engine = sqlalchemy.create_engine(
            "postgresql+psycopg://", creator=lambda: psycopg.connect(crm.dsn), poolclass=sqlalchemy.NullPool
        )

    def delete_lead(self) -> None:
        """As an application does it."""
        with Session(self.engine) as session:
            session.delete(session.get_one(self.Lead, 1))
            session.commit()


NULLING: dict[str, Any] = {}
CASCADING = {"cascade": "all, delete-orphan"}
PASSIVE = {"passive_deletes": "all"}
CASCADING_PASSIVELY = {"cascade": "all, delete-orphan", "passive_deletes": True}


@pytest.fixture
def history(protected: Crm) -> list[tuple[Any, ...]]:
    """Three rows of the worker's, as they must stay."""
    write(protected, change_key="w/2", activity_category="system", description="Lead updated")
    write(protected, change_key="w/3", activity_category="system", description="Lead updated again")
    return rows(protected)


@pytest.mark.parametrize("relation", [NULLING, PASSIVE, CASCADING_PASSIVELY], ids=repr)
def test_an_orm_deletes_a_lead_and_its_history_stays(
    protected: Crm, history: list[tuple[Any, ...]], relation: dict[str, Any]
) -> None:
    Models(protected, **relation).delete_lead()
    assert protected.value("SELECT count(*) FROM lead") == 0
    assert rows(protected) == history


def test_an_orm_that_deletes_the_activities_first_gets_no_more_than_a_warning(
    protected: Crm, history: list[tuple[Any, ...]]
) -> None:
    with pytest.warns(sqlalchemy.exc.SAWarning, match="expected to delete 3 row"):
        Models(protected, **CASCADING).delete_lead()
    assert protected.value("SELECT count(*) FROM lead") == 0
    assert rows(protected) == history


def test_an_orm_that_nulls_links_nulls_those_of_manual_activities(
    protected: Crm, history: list[tuple[Any, ...]]
) -> None:
    manual = write(protected)
    Models(protected).delete_lead()
    assert protected.execute("SELECT activity_id, lead_id FROM activity ORDER BY 1") == [
        (1, 1),
        (2, 1),
        (3, 1),
        (manual, None),
    ]


def test_an_orm_that_deletes_activities_deletes_the_manual_ones(protected: Crm, history: list[tuple[Any, ...]]) -> None:
    write(protected)
    with pytest.warns(sqlalchemy.exc.SAWarning, match="expected to delete 4 row"):
        Models(protected, **CASCADING).delete_lead()
    assert rows(protected) == history


def test_an_orm_that_leaves_it_to_the_database_is_refused_for_a_manual_activity_as_before(protected: Crm) -> None:
    write(protected)
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        Models(protected, **PASSIVE).delete_lead()
    assert protected.value("SELECT count(*) FROM lead") == 1


def test_an_orm_changes_visibility_and_automated_activities(protected: Crm) -> None:
    opened = write(protected, activity_category="automated", activity_type="email_opened")
    models = Models(protected)
    with Session(models.engine) as session:
        session.get_one(models.Activity, 1).is_visible_to_bd = False
        session.get_one(models.Activity, opened).description = "Opened twice"
        session.commit()
    found = protected.execute("SELECT is_visible_to_bd, description FROM activity ORDER BY activity_id")
    assert found == [(False, "Lead created"), (True, "Opened twice")]


def test_an_orm_that_changes_a_row_of_the_workers_finds_it_unchanged_afterwards(protected: Crm) -> None:
    models = Models(protected)
    with Session(models.engine) as session:
        activity = session.get_one(models.Activity, 1)
        activity.description = "Never happened"
        session.commit()
        assert activity.description == "Lead created"
