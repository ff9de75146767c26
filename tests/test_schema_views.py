"""The views and functions that LeadFi's people and programs use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from support import Crm, crm_on

from cdc_worker import ddl, postgres
from cdc_worker.cluster import Cluster

VIEWS = ("v_manual_activities", "v_system_activities", "v_lead_timeline", "v_customer_timeline")

ACTIVITY = (
    "activity_id", "lead_id", "customer_uid", "activity_type", "activity_category", "description", "metadata",
    "date_created", "bd_in_charge", "created_by", "is_visible_to_bd",
)  # fmt: skip


def apply(crm: Crm, name: str) -> tuple[list[str], list[str | None]]:
    """Run a file of `schema/`; returns what its queries generated, and the warnings."""
    warnings: list[str | None] = []
    with postgres.connect(crm.dsn, "test") as connection:
        connection.execute("SET search_path = public")
        connection.add_notice_handler(lambda notice: warnings.append(notice.message_primary))
        generated = [
            statement
            for step in ddl.steps(ddl.schema(name))
            for statement in ddl.perform(connection, step)
            if step.generates
        ]
    return generated, warnings


def with_views(crm: Crm) -> Crm:
    for name in ("040_leadfi_indexes.sql", "060_leadfi_functions.sql", "070_leadfi_views.sql"):
        apply(crm, name)
    return crm


@pytest.fixture
def views(crm: Crm) -> Crm:
    """A database with the views and functions."""
    return with_views(crm)


def write(crm: Crm, **columns: Any) -> int:
    """An activity; returns its id."""
    row = {"activity_type": "call"} | columns
    insert = sql.SQL("INSERT INTO activity ({}) VALUES ({}) RETURNING activity_id").format(
        sql.SQL(", ").join(map(sql.Identifier, row)), sql.SQL(", ").join([sql.Placeholder()] * len(row))
    )
    found = crm.connection.execute(insert, list(row.values())).fetchone()
    assert found is not None
    return int(found[0])


def columns(crm: Crm, view: str) -> tuple[str, ...]:
    return tuple(
        name
        for (name,) in crm.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum", view
        )
    )


# What they show


def test_the_views_have_the_columns_of_activity_and_the_subjects_names(views: Crm) -> None:
    assert {view: columns(views, view) for view in VIEWS} == {
        "v_manual_activities": (*ACTIVITY, "lead_name", "company_name", "customer_name"),
        "v_system_activities": (*ACTIVITY, "lead_name", "company_name", "customer_name"),
        "v_lead_timeline": (*ACTIVITY, "lead_name", "company_name", "current_lead_status"),
        "v_customer_timeline": (*ACTIVITY, "customer_name"),
    }


def test_each_category_has_its_view(views: Crm) -> None:
    """None at all is manual, as it is for the foreign keys."""
    for category in ("manual", "system", "automated", None):
        write(views, activity_category=category)
    assert views.execute("SELECT activity_id FROM v_manual_activities ORDER BY 1") == [(1,), (4,)]
    assert views.execute("SELECT activity_id FROM v_system_activities") == [(2,)]


def test_hidden_activities_are_shown_as_hidden(views: Crm) -> None:
    write(views, is_visible_to_bd=False)
    assert views.execute("SELECT is_visible_to_bd FROM v_manual_activities") == [(False,)]


def test_names_are_those_of_the_subjects_row_as_it_is_now(views: Crm) -> None:
    """Also where that has none."""
    views.add_leads(2)
    views.execute("UPDATE lead SET company_name = NULL, status = '2. proposal' WHERE lead_id = 2")
    views.execute("INSERT INTO customer (customer_uid, name) VALUES (7, 'Acme')")
    told = json.dumps({"lead_name": "Before", "company_name": "Before", "customer_name": "Before"})
    write(views, lead_id=1, customer_uid=7, metadata=told)
    write(views, lead_id=2, metadata=told)
    assert views.execute(
        "SELECT lead_name, company_name, customer_name FROM v_manual_activities ORDER BY activity_id"
    ) == [("Lead 1", "Company c4n4ry 1", "Acme"), ("Lead 2", None, "Before")]
    assert views.execute(
        "SELECT lead_name, company_name, current_lead_status FROM v_lead_timeline ORDER BY activity_id"
    ) == [("Lead 1", "Company c4n4ry 1", "1. lead generated"), ("Lead 2", None, "2. proposal")]
    assert views.execute("SELECT customer_name FROM v_customer_timeline") == [("Acme",)]


HISTORY: LiteralString = (
    "SELECT activity_type, lead_name, company_name, current_lead_status FROM v_lead_timeline WHERE lead_id = 1"
)


def test_the_history_of_a_deleted_lead_still_shows(views: Crm) -> None:
    views.add_leads(2)
    views.execute("UPDATE lead SET status = '2. proposal'")
    views.execute("DELETE FROM lead WHERE lead_id = 1")
    views.record()
    assert views.execute(HISTORY) == [
        ("lead_deleted", "Lead 1", "Company c4n4ry 1", None),
        ("status_changed", "Lead 1", "Company c4n4ry 1", None),
        ("lead_created", "Lead 1", "Company c4n4ry 1", None),
    ]
    assert views.execute("SELECT DISTINCT lead_name FROM v_system_activities ORDER BY 1") == [("Lead 1",), ("Lead 2",)]


def test_the_history_of_a_deleted_customer_still_shows(views: Crm) -> None:
    views.execute("INSERT INTO customer (customer_uid, name) VALUES (2147483647, 'Acme')")
    views.execute("DELETE FROM customer")
    views.record()
    assert views.execute(
        "SELECT activity_type, customer_name FROM v_customer_timeline WHERE customer_uid = 2147483647"
    ) == [("customer_deleted", "Acme"), ("customer_created", "Acme")]


def test_history_that_lost_its_links_still_shows(views: Crm) -> None:
    """Where a foreign key sets them to NULL, the identity in the metadata is what remains."""
    views.execute("DROP TRIGGER IF EXISTS zz_cdc_worker_protect ON activity")
    views.execute("ALTER TABLE activity ADD FOREIGN KEY (lead_id) REFERENCES lead ON DELETE SET NULL")
    views.execute("ALTER TABLE activity ADD FOREIGN KEY (customer_uid) REFERENCES customer ON DELETE SET NULL")
    views.add_leads(1)
    views.execute("INSERT INTO customer (customer_uid, name) VALUES (2147483647, 'Acme')")
    views.record()
    views.execute("DELETE FROM lead")
    views.execute("DELETE FROM customer")
    assert views.execute("SELECT lead_id, customer_uid FROM activity") == [(None, None), (None, None)]
    assert views.execute(HISTORY) == [("lead_created", "Lead 1", "Company c4n4ry 1", None)]
    found = views.execute("SELECT customer_uid, customer_name FROM v_customer_timeline")
    assert found == [(2147483647, "Acme")]


def test_timelines_show_the_newest_first(views: Crm) -> None:
    views.add_leads(1)
    views.execute("INSERT INTO customer (customer_uid, name) VALUES (7, 'Acme')")
    for day in (2, 3, 1, 3):
        write(views, lead_id=1, customer_uid=7, date_created=datetime(2026, 1, day))
    for timeline in ("v_lead_timeline WHERE lead_id = 1", "v_customer_timeline WHERE customer_uid = 7"):
        assert views.execute(f"SELECT activity_id FROM {timeline}") == [(4,), (2,), (1,), (3,)]


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "null",
        "[]",
        '[{"lead_id": 1}]',
        '"text"',
        "1",
        "{}",
        '{"lead_name": ["Ann"], "company_name": {"a": 1}, "customer_name": 1.5}',
        '{"lead_id": null, "customer_uid": null}',
        '{"lead_id": "seven", "customer_uid": ""}',
        '{"lead_id": {"a": 1}, "customer_uid": [7]}',
        '{"lead_id": -7, "customer_uid": 1.5}',
        '{"lead_id": 2147483648, "customer_uid": 99999999999999999999}',
        '{"lead_id": 1e40, "customer_uid": true}',
    ],
)
def test_metadata_may_have_any_shape(views: Crm, metadata: str | None) -> None:
    views.execute("ALTER TABLE activity DROP CONSTRAINT IF EXISTS activity_metadata_is_object")
    for category, key in (("manual", None), ("system", None), ("system", "w/1"), ("automated", "w/2")):
        write(views, metadata=metadata, activity_category=category, change_key=key)
        write(views, metadata=metadata, activity_category="automated", lead_id=5, customer_uid=6)
    for view in (*VIEWS, "v_activity_statistics"):
        assert views.value(f"SELECT count(*) > 0 FROM (SELECT * FROM {view}) shown")
    assert views.execute("SELECT DISTINCT lead_id FROM v_lead_timeline WHERE lead_id IS NOT NULL") == [(5,)]
    assert views.execute("SELECT DISTINCT customer_uid FROM v_customer_timeline WHERE customer_uid IS NOT NULL") == [
        (6,)
    ]


# What they cost


@pytest.fixture(scope="module")
def filled(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crm]:
    """Two years of activities, of 2,000 leads and 500 customers, to be looked at only."""
    with crm_on(server, tmp_path_factory.mktemp("filled"), prepared=True) as crm:
        views = with_views(crm)
        views.add_leads(2_000)
        views.execute(
            "INSERT INTO customer (customer_uid, name) SELECT n, 'Customer ' || n FROM generate_series(1, 500) n"
        )
        views.execute(
            "INSERT INTO activity (lead_id, customer_uid, activity_type, activity_category, change_key, date_created)"
            " SELECT n %% 2000 + 1, CASE WHEN n %% 4 = 0 THEN n %% 500 + 1 END, 'call', categories[n %% 3 + 1],"
            "        CASE n %% 3 WHEN 1 THEN 'w/' || n END, now()::timestamp - n * interval '20 minutes'"
            " FROM generate_series(1, 50000) n, (SELECT '{manual, system, automated}'::text[] AS categories) c"
        )
        views.execute("VACUUM ANALYZE activity, lead, customer")
        yield views


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM v_lead_timeline WHERE lead_id = 123",
        "SELECT * FROM v_customer_timeline WHERE customer_uid = 123",
        "SELECT count(*) FROM v_lead_timeline WHERE lead_id = 123 AND activity_category = 'system'",
    ],
)
def test_a_timeline_is_read_by_index(filled: Crm, query: LiteralString) -> None:
    plan = "\n".join(line for (line,) in filled.execute(f"EXPLAIN {query}"))
    assert "Seq Scan" not in plan, plan
    assert "activity_unlinked" in plan


@pytest.mark.parametrize(
    "query",
    [
        "SELECT bd_in_charge, activity_type, count(*) FROM v_manual_activities"
        " WHERE date_created >= current_date - interval '30 days' GROUP BY bd_in_charge, activity_type",
        "SELECT * FROM v_system_activities"
        " WHERE activity_type = 'status_changed' AND date_created >= current_date - interval '7 days'",
        "SELECT * FROM v_activity_statistics WHERE statistic = 'trend'",
    ],
)
def test_what_is_asked_for_a_time_is_read_by_index(filled: Crm, query: LiteralString) -> None:
    plan = [line for (line,) in filled.execute(f"EXPLAIN ANALYZE {query}")]
    assert not [line for line in plan if "Seq Scan on activity" in line and "never executed" not in line], plan


def test_joins_that_nobody_asks_for_are_left_out(filled: Crm) -> None:
    plan = "\n".join(line for (line,) in filled.execute("EXPLAIN SELECT count(*) FROM v_manual_activities"))
    assert "lead" not in plan
    assert "customer" not in plan


# Statistics


def test_the_statistics_are_right(views: Crm) -> None:
    """In one transaction, whose date stays the same at midnight."""
    with views.connection.transaction():
        today = views.value("SELECT current_date")
        noon = datetime.combine(today, time(12))

        def at(days_ago: int, count: int, activity_type: str, category: str | None, bd: str | None = None) -> None:
            for _ in range(count):
                write(
                    views,
                    activity_type=activity_type,
                    activity_category=category,
                    bd_in_charge=bd,
                    date_created=noon - timedelta(days=days_ago),
                )

        at(0, 2, "call", "manual", "jane")
        at(6, 1, "call", None, "jane")
        at(7, 4, "email", "manual", "jane")
        at(1, 1, "call", "manual", "bob")
        at(30, 1, "call", "manual")
        at(0, 3, "lead_created", "system", "jane")
        at(10, 2, "status_changed", "system")
        at(0, 1, "email_opened", "automated")

        def statistic(name: str, *wanted: str) -> set[tuple[Any, ...]]:
            names = sql.SQL(", ").join(map(sql.Identifier, (*wanted, "activities", "last_7_days", "latest")))
            query = sql.SQL("SELECT {} FROM v_activity_statistics WHERE statistic = {}").format(names, name)
            found = views.connection.execute(query).fetchall()
            assert len(found) == len(set(found))
            return {(*row[:-1], row[-1] and (today - row[-1].date()).days) for row in found}

        assert statistic("total", "activity_category") == {
            ("manual", 9, 4, 0),
            ("system", 5, 3, 0),
            ("automated", 1, 1, 0),
        }
        assert statistic("bd", "bd_in_charge", "activity_type") == {
            ("jane", "call", 3, 3, 0),
            ("jane", "email", 4, 0, 7),
            ("bob", "call", 1, 1, 1),
            (None, "call", 1, 0, 30),
        }
        assert statistic("system_event", "activity_type") == {("lead_created", 3, 3, 0), ("status_changed", 2, 0, 10)}
        days: list[date] = [today - timedelta(days=ago) for ago in range(7)]
        counted = {(days[0], "manual"): 2, (days[6], "manual"): 1, (days[1], "manual"): 1}
        counted |= {(days[0], "system"): 3, (days[0], "automated"): 1}
        trend = views.execute(
            "SELECT day, activity_category, activities FROM v_activity_statistics WHERE day IS NOT NULL"
        )
        assert sorted(trend) == sorted(
            (day, category, counted.get((day, category), 0))
            for day in days
            for category in ("manual", "system", "automated")
        )


# Coming from others


OLD: LiteralString = (
    "CREATE VIEW v_lead_timeline AS SELECT full_name AS who, activity_id, activity_type, lead_id AS id"
    " FROM activity JOIN lead USING (lead_id)"
)
"""A view of the name with other columns, in another order."""


@pytest.fixture
def old(crm: Crm) -> Crm:
    """A database in which that is one of the views."""
    crm.execute("DROP VIEW IF EXISTS v_manual_activities, v_system_activities, v_lead_timeline, v_customer_timeline")
    crm.execute(OLD)
    return crm


def test_a_view_with_other_columns_is_replaced(old: Crm) -> None:
    assert apply(old, "070_leadfi_views.sql")[1] == []
    assert columns(old, "v_lead_timeline") == (*ACTIVITY, "lead_name", "company_name", "current_lead_status")


def rights(crm: Crm) -> list[tuple[Any, ...]]:
    """Owner, options and privileges of a view, also those of columns."""
    return [
        *crm.execute(
            "SELECT relowner::regrole::text, reloptions FROM pg_class WHERE oid = 'v_lead_timeline'::regclass"
        ),
        *crm.execute(
            "SELECT attname, acl.grantor::regrole::text, nullif(acl.grantee, 0)::regrole::text, privilege_type,"
            "       is_grantable"
            " FROM (SELECT NULL::name, relacl FROM pg_class WHERE oid = 'v_lead_timeline'::regclass"
            "       UNION ALL SELECT attname, attacl FROM pg_attribute WHERE attrelid = 'v_lead_timeline'::regclass)"
            "      AS granted (attname, acls), aclexplode(acls) acl ORDER BY 1, 2, 3, 4"
        ),
    ]


@pytest.mark.parametrize("columns", ["other", "the same"])
def test_a_view_keeps_its_owner_and_its_grants_and_gets_no_others(old: Crm, columns: str) -> None:
    """Default privileges would give some to a view that is made anew."""
    if columns == "the same":
        apply(old, "070_leadfi_views.sql")
    roles = [f"{name} {old.slot}" for name in ("owner", "reader", "writer", "stranger")]
    owner, reader, writer, stranger = map(sql.Identifier, roles)
    try:
        for statement in (
            "CREATE ROLE {owner}",
            "CREATE ROLE {reader}",
            "CREATE ROLE {writer}",
            "CREATE ROLE {stranger}",
            "GRANT SELECT ON activity, lead TO {owner}",
            "ALTER VIEW v_lead_timeline OWNER TO {owner}",
            "ALTER VIEW v_lead_timeline SET (security_barrier = true)",
            "GRANT SELECT ON v_lead_timeline TO {reader} WITH GRANT OPTION",
            "GRANT SELECT, UPDATE ON v_lead_timeline TO {writer}",
            "GRANT TRIGGER ON v_lead_timeline TO PUBLIC",
            "GRANT UPDATE (activity_type), SELECT (activity_id) ON v_lead_timeline TO {reader}",
            "REVOKE DELETE ON v_lead_timeline FROM {owner}",
            "ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {stranger}, PUBLIC",
        ):
            old.connection.execute(
                sql.SQL(statement).format(owner=owner, reader=reader, writer=writer, stranger=stranger)
            )
        before = rights(old)
        assert len(before) > 10
        assert apply(old, "070_leadfi_views.sql")[1] == []
        assert rights(old) == before
    finally:
        for name in (owner, reader, writer, stranger):
            old.connection.execute(sql.SQL("DROP OWNED BY {0} CASCADE").format(name))
            old.connection.execute(sql.SQL("DROP ROLE {0}").format(name))


def test_the_grant_on_a_column_that_is_gone_goes_with_it(old: Crm) -> None:
    old.execute("GRANT SELECT (who), UPDATE (activity_id) ON v_lead_timeline TO PUBLIC")
    apply(old, "070_leadfi_views.sql")
    assert old.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'v_lead_timeline'::regclass AND attacl IS NOT NULL"
    ) == [("activity_id",)]


def test_a_view_on_which_others_depend_stays_with_a_warning_that_names_them(old: Crm) -> None:
    old.execute("CREATE VIEW report AS SELECT who FROM v_lead_timeline")
    old.execute("CREATE MATERIALIZED VIEW extract AS SELECT activity_id FROM v_lead_timeline")
    _, (warning,) = apply(old, "070_leadfi_views.sql")
    assert warning is not None
    assert "v_lead_timeline keeps its old columns" in warning
    assert "view report depends on view v_lead_timeline" in warning
    assert 'materialized view "extract" depends on view v_lead_timeline' in warning
    assert columns(old, "v_lead_timeline") == ("who", "activity_id", "activity_type", "id")
    assert columns(old, "v_customer_timeline") == (*ACTIVITY, "customer_name")
    old.execute("DROP VIEW report")
    old.execute("DROP MATERIALIZED VIEW extract")
    assert apply(old, "070_leadfi_views.sql")[1] == []
    assert columns(old, "v_lead_timeline")[-1] == "current_lead_status"


def test_a_view_with_the_wanted_columns_is_replaced_though_others_depend_on_it(views: Crm) -> None:
    views.execute("CREATE VIEW report AS SELECT lead_name FROM v_lead_timeline")
    assert apply(views, "070_leadfi_views.sql") == ([], [])


def test_an_index_that_was_left_invalid_is_made_anew(views: Crm) -> None:
    views.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'activity_unlinked_lead'::regclass RETURNING 1"
    )
    generated, _ = apply(views, "070_leadfi_views.sql")
    assert [statement.split(" ON ")[0] for statement in generated] == [
        "DROP INDEX CONCURRENTLY activity_unlinked_lead",
        "CREATE INDEX CONCURRENTLY activity_unlinked_lead",
    ]
    assert views.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'activity_unlinked_lead'::regclass")


# Functions


SIGNATURES = {
    "create_manual_activity": "p_activity_type character varying, p_description text,"
    " p_lead_id integer DEFAULT NULL::integer, p_customer_uid integer DEFAULT NULL::integer,"
    " p_metadata jsonb DEFAULT NULL::jsonb, p_bd_in_charge character varying DEFAULT NULL::character varying",
    "create_system_activity": "p_activity_type character varying, p_description text,"
    " p_lead_id integer DEFAULT NULL::integer, p_customer_uid integer DEFAULT NULL::integer,"
    " p_metadata jsonb DEFAULT NULL::jsonb, p_created_by character varying DEFAULT 'system'::character varying",
}


def test_the_functions_have_the_published_signatures(views: Crm) -> None:
    found = views.execute(
        "SELECT proname, pg_get_function_arguments(oid), pg_get_function_result(oid) FROM pg_proc"
        " WHERE proname LIKE 'create\\_%%\\_activity' ORDER BY 1"
    )
    assert found == [(name, arguments, "integer") for name, arguments in SIGNATURES.items()]


def made(crm: Crm, activity_id: int) -> tuple[Any, ...]:
    (row,) = crm.execute(
        "SELECT activity_type, activity_category, description, lead_id, customer_uid, metadata, bd_in_charge,"
        " created_by, is_visible_to_bd, change_key, date_created IS NOT NULL FROM activity WHERE activity_id = %s",
        activity_id,
    )
    return row


def test_a_system_activity_is_made_with_what_is_given(views: Crm) -> None:
    number = views.value(
        "SELECT create_system_activity('stage_changed', 'Stage changed', 7, 8, '{\"a\": 1}', 'import')"
    )
    given = (7, 8, {"a": 1}, None, "import", True, None, True)
    assert made(views, number) == ("stage_changed", "system", "Stage changed", *given)
    number = views.value("SELECT create_system_activity('stage_changed', 'Stage changed')")
    given_less = (None, None, None, None, "system", True, None, True)
    assert made(views, number) == ("stage_changed", "system", "Stage changed", *given_less)


def test_a_manual_activity_is_made_by_its_bd(views: Crm) -> None:
    views.add_leads(1)
    number = views.value(
        "SELECT create_manual_activity(p_activity_type => 'call', p_description => 'Discovery call',"
        " p_lead_id => 1, p_bd_in_charge => 'John')"
    )
    assert made(views, number) == ("call", "manual", "Discovery call", 1, None, None, "John", "John", True, None, True)


def test_a_manual_activity_needs_its_lead(views: Crm) -> None:
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        views.execute("SELECT create_manual_activity('call', 'Nobody', 1)")


def test_the_functions_write_to_activity_whatever_the_search_path(views: Crm) -> None:
    views.execute("SET search_path = pg_catalog")
    assert views.value("SELECT public.create_manual_activity('call', 'Called')") == 1


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_function_of_the_name_stays_as_it_is(crm: Crm, name: str) -> None:
    """Other names of arguments can't be replaced (42P13), and a second signature makes calls ambiguous (42725)."""
    for function in SIGNATURES:
        crm.connection.execute(f"DROP FUNCTION IF EXISTS {function}".encode())
    crm.connection.execute(
        f"CREATE FUNCTION {name}(kind varchar, told text, lead integer DEFAULT NULL) RETURNS integer"
        " LANGUAGE sql AS 'SELECT 42'".encode()
    )
    assert len(apply(crm, "060_leadfi_functions.sql")[0]) == 1
    assert crm.value(f"SELECT {name}('call', 'Called')") == 42


def test_once_made_there_is_nothing_to_do(views: Crm) -> None:
    for name in ("060_leadfi_functions.sql", "070_leadfi_views.sql"):
        assert apply(views, name) == ([], [])
