"""An activity table, in whatever state it is found, becomes the enhanced one while the application goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any, Final, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from support import Crm, crm_on, eventually

from cdc_worker import ddl, errors, postgres
from cdc_worker.cluster import Cluster
from cdc_worker.ddl import Step

HERE = Path(__file__).parent
SCHEMA = HERE.parent / "schema"
FILES = [SCHEMA / "010_cdc_worker.sql", SCHEMA / "015_context.sql", *sorted(SCHEMA.glob("0?0_leadfi_*.sql"))]

LEGACY, ROWS = ((HERE / "legacy" / name).read_text() for name in ("legacy.sql", "rows.sql"))
MIGRATION = [step.text for step in ddl.steps((HERE / "legacy" / "old_migration.sql").read_text())]
LINKED_ONLY = "DELETE FROM activity WHERE lead_id IS NULL"
TRACKED = """
UPDATE lead SET status = '2. proposal', is_converted = true WHERE lead_id = 1;
UPDATE activity SET date_created = '2022-01-01' WHERE activity_category = 'system'
"""

# As psql runs the migration, which goes on after a statement that fails.
STATES: Final[dict[str, list[str]]] = {
    "fresh": [],
    "legacy": [LEGACY, ROWS],
    "half migrated": [LEGACY, ROWS, *MIGRATION[:6]],
    "migrated, but for the CHECK": [LEGACY, ROWS, *MIGRATION, TRACKED],
    "migrated": [LEGACY, ROWS, LINKED_ONLY, *MIGRATION, TRACKED],
}
AFTER_EACH_STATEMENT = {
    f"migrated up to statement {n}": [LEGACY, ROWS, LINKED_ONLY, *MIGRATION[:n]] for n in range(1, len(MIGRATION))
}

ENHANCED = {
    "activity_id": "integer",
    "lead_id": "integer",
    "customer_uid": "integer",
    "activity_type": "character varying(50)",
    "activity_category": "character varying(20) DEFAULT 'manual'::character varying",
    "description": "text",
    "metadata": "jsonb",
    "date_created": "timestamp without time zone DEFAULT now()",
    "bd_in_charge": "character varying(20)",
    "created_by": "character varying(50)",
    "is_visible_to_bd": "boolean DEFAULT true",
    "change_key": "text",
    "manual_lead_id": "integer GENERATED",
    "manual_customer_uid": "integer GENERATED",
}


def make(crm: Crm, state: Iterable[str]) -> None:
    for statement in state:
        try:
            crm.connection.execute(statement.encode())
        except psycopg.errors.CheckViolation:
            assert "CHECK" in statement


def steps(*files: str) -> Iterator[Step]:
    """Those of all files, or of those whose names begin so."""
    for path in FILES:
        if path.name.startswith(files or ""):
            yield from ddl.steps(path.read_text())


def apply(crm: Crm, *files: str, user: str = "postgres") -> list[str]:
    """Run the files as setup does; returns the statements that were generated."""
    with postgres.connect(make_conninfo(crm.dsn, user=user), "test") as connection:
        connection.execute("SET search_path = public")
        wait = ddl.brief(connection)
        return [
            statement
            for step in steps(*files)
            for statement in ddl.perform(connection, step, patience=30, wait=wait)
            if step.generates
        ]


def activities(crm: Crm) -> dict[int, dict[str, Any]]:
    with crm.connection.cursor(row_factory=dict_row) as cursor:
        return {row["activity_id"]: row for row in cursor.execute("SELECT * FROM activity")}


def columns(crm: Crm) -> dict[str, str]:
    return dict(
        crm.execute("""
            SELECT attname, format_type(atttypid, atttypmod) || CASE
                WHEN attgenerated <> '' THEN ' GENERATED'
                WHEN atthasdef AND attname <> 'activity_id' THEN ' DEFAULT ' || pg_get_expr(adbin, adrelid)
                ELSE '' END
            FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            WHERE attrelid = 'activity'::regclass AND attnum > 0 AND NOT attisdropped
        """)
    )


def constraints(crm: Crm) -> dict[str, str]:
    return dict(
        crm.execute(
            "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'activity'::regclass"
        )
    )


def foreign_keys(crm: Crm) -> dict[str, str]:
    return {name: text for name, text in constraints(crm).items() if text.startswith("FOREIGN KEY")}


CATALOG: Final[Mapping[str, LiteralString]] = {
    "columns": """
        SELECT attnum, attname, format_type(atttypid, atttypmod), attnotnull, attgenerated::text,
               pg_get_expr(adbin, adrelid), col_description(attrelid, attnum)
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attrelid = 'activity'::regclass AND attnum > 0 AND NOT attisdropped""",
    "constraints": """
        SELECT conname, pg_get_constraintdef(oid), obj_description(oid, 'pg_constraint')
        FROM pg_constraint WHERE conrelid = 'activity'::regclass""",
    "indexes": """
        SELECT pg_get_indexdef(indexrelid), indisvalid FROM pg_index WHERE indrelid = 'activity'::regclass""",
    "triggers": """
        SELECT tgrelid::regclass::text, pg_get_triggerdef(oid), tgenabled::text
        FROM pg_trigger WHERE NOT tgisinternal""",
    "functions": """
        SELECT pg_get_functiondef(oid), obj_description(oid, 'pg_proc') FROM pg_proc
        WHERE pronamespace IN ('public'::regnamespace, 'cdc_worker'::regnamespace)""",
    "views": """
        SELECT relname, pg_get_viewdef(oid), relacl::text, reloptions, obj_description(oid, 'pg_class')
        FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'v'""",
    "replaced": "SELECT kind, table_name, name, restore FROM cdc_worker.replaced",
    "rows": "SELECT to_jsonb(activity) FROM activity",
}


def catalog(crm: Crm) -> dict[str, list[str]]:
    """All that the files make, and the rows."""
    return {what: sorted(map(repr, crm.execute(query))) for what, query in CATALOG.items()}


def psql(server: Cluster, crm: Crm, script: str) -> None:
    path = crm.directory / "script.sql"
    path.write_text(script)
    server.run("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", crm.dsn, "-f", str(path))


def write(crm: Crm, **row: Any) -> int:
    """Insert an activity; returns its id."""
    row = {"activity_type": "call"} | row
    names = ", ".join(row)
    places = ", ".join(["%s"] * len(row))
    query = f"INSERT INTO activity ({names}) VALUES ({places}) RETURNING activity_id"
    ((number,),) = crm.connection.execute(query.encode(), list(row.values())).fetchall()
    return int(number)


def write_as_worker(crm: Crm, **row: Any) -> int:
    return write(crm, **{"activity_category": "system", "change_key": f"key {next(_keys)}", **row})


_keys = count(1)


# From every state, to the enhanced table.


@pytest.mark.parametrize(
    "state", [*STATES.values(), *AFTER_EACH_STATEMENT.values()], ids=[*STATES, *AFTER_EACH_STATEMENT]
)
def test_every_state_ends_in_the_enhanced_table_with_every_row_kept(bare_crm: Crm, state: list[str]) -> None:
    make(bare_crm, state)
    before = activities(bare_crm) if state else {}
    # Stopped between the column and its key, the migration leaves a link without one, which stays so.
    without_key = any("customer_uid" in row for row in before.values()) and len(foreign_keys(bare_crm)) == 1
    apply(bare_crm)

    found = columns(bare_crm)
    assert found.pop("bd", None) in (None, "character varying(20)")
    assert found == {name: text for name, text in ENHANCED.items() if name != "manual_customer_uid" or not without_key}

    after = activities(bare_crm)
    assert after.keys() == before.keys()
    for number, old in before.items():
        new = after[number]
        bd = old.get("bd_in_charge", old.get("bd"))
        manual = old.get("activity_category", "manual") == "manual"
        assert all(new[column] == value for column, value in old.items() if (column, value) != ("created_by", None))
        assert new["bd_in_charge"] == bd
        assert new["created_by"] == (bd if manual else old["created_by"])
        assert new["activity_category"] == ("manual" if manual else "system")
        assert new["is_visible_to_bd"] is True
        assert new["change_key"] is None
        assert new["manual_lead_id"] == (old["lead_id"] if manual else None)

    # The worker's rows need nothing that is there, and keep their dates. Those of others keep their guarantee.
    bare_crm.add_leads(1)
    (lead,) = bare_crm.execute("SELECT max(lead_id) FROM lead")[0]
    number = write_as_worker(bare_crm, lead_id=12345, customer_uid=12345, date_created=OLD_DATE)
    assert activities(bare_crm)[number]["date_created"] == OLD_DATE
    write_as_worker(bare_crm)
    write(bare_crm, lead_id=lead)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        write(bare_crm, lead_id=12345)
    if not without_key:
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            write(bare_crm, lead_id=lead, customer_uid=12345)
    with pytest.raises(psycopg.errors.UniqueViolation):
        bare_crm.execute(
            "INSERT INTO activity (activity_type, change_key) SELECT 'x', 'key' FROM generate_series(1, 2)"
        )


def test_old_rows_are_manual_and_created_by_their_bd(bare_crm: Crm) -> None:
    make(bare_crm, STATES["legacy"])
    apply(bare_crm)
    assert bare_crm.execute(
        "SELECT lead_id, description, date_created::text, bd, bd_in_charge, created_by FROM activity"
        " WHERE activity_category = 'manual' AND is_visible_to_bd AND metadata IS NULL ORDER BY activity_id"
    ) == [
        (1, "Wants to see fees in writing", "2021-03-01 09:00:00", "jane", "jane", "jane"),
        (1, None, "2021-03-02 10:30:00.123456", "john", "john", "john"),
        (2, "Ünïcode “quotes” and a \\ ", "2021-03-03 00:00:00", None, None, None),
        (None, "of nobody", "2021-03-04 00:00:00", "jane", "jane", "jane"),
        (99, "of a lead that is gone", "2021-03-05 00:00:00", "john", "john", "john"),
        (3, "", "2021-03-06 00:00:00", "", "", ""),
    ]


@pytest.mark.parametrize("state", STATES)
def test_a_second_time_there_is_nothing_to_do(bare_crm: Crm, state: str) -> None:
    make(bare_crm, STATES[state])
    assert apply(bare_crm)
    before = catalog(bare_crm)
    assert apply(bare_crm) == []
    assert catalog(bare_crm) == before


@pytest.mark.parametrize(
    "state",
    [of if of in ("legacy", "half migrated") else pytest.param(of, marks=pytest.mark.chaos) for of in STATES],
)
def test_an_interruption_after_any_step_is_repaired_by_running_again(
    bare_crm: Crm, server: Cluster, tmp_path: Path, state: str
) -> None:
    make(bare_crm, STATES[state])
    done: set[str] = set()
    while _interrupted(bare_crm, done):
        pass
    with crm_on(server, tmp_path) as other:
        make(other, STATES[state])
        apply(other)
        assert catalog(bare_crm) == catalog(other)


def _interrupted(crm: Crm, done: set[str]) -> bool:
    """Run the files up to the first statement that no run before has come to, and no further."""
    for step in steps():
        for statement in step.statements(crm.connection):
            crm.connection.execute(statement.encode())
            if statement not in done:
                done.add(statement)
                return True
    return False


@pytest.mark.parametrize("state", STATES)
def test_what_a_dry_run_prints_does_the_same_by_psql(
    bare_crm: Crm, server: Cluster, tmp_path: Path, state: str
) -> None:
    make(bare_crm, STATES[state])
    printed = "".join(ddl.script(bare_crm.connection, step) for step in steps())
    psql(server, bare_crm, printed)
    with crm_on(server, tmp_path) as other:
        make(other, STATES[state])
        apply(other)
        assert catalog(bare_crm) == catalog(other)
    assert [statement for step in steps() if step.generates for statement in step.statements(bare_crm.connection)] == []


@pytest.mark.parametrize("state", STATES)
def test_each_file_can_be_run_by_psql_twice(bare_crm: Crm, server: Cluster, tmp_path: Path, state: str) -> None:
    make(bare_crm, STATES[state])
    for path in FILES:
        psql(server, bare_crm, path.read_text())
        psql(server, bare_crm, path.read_text())
    with crm_on(server, tmp_path) as other:
        make(other, STATES[state])
        apply(other)
        assert catalog(bare_crm) == catalog(other)


# Beside the application.

# Weaker ones are those of ordinary reading and writing.
MODES = ["ShareUpdateExclusiveLock", "ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock"]
HELD = """
SELECT relname::text, mode FROM pg_locks JOIN pg_class c ON c.oid = relation
WHERE pid = %s AND granted AND relkind IN ('r', 'v') AND relnamespace = 'public'::regnamespace
"""
FILENODES = """
SELECT relname::text, pg_relation_filenode(oid) FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
"""


def claimed(step: Step) -> tuple[dict[str, str], set[str]]:
    """What the comment above a step says: the mode in which each relation is locked, and those that are rewritten."""
    locks, _, rewritten = step.lock.partition("; rewrites ")
    found: dict[str, str] = {}
    for part in filter(None, re.split(r" and (?=[A-Z])", locks)):
        mode, _, names = part.partition(" on ")
        found |= dict.fromkeys(names.split(", "), mode.title().replace(" ", "") + "Lock")
    return strongest(found.items()), set(filter(None, rewritten.split(", ")))


def strongest(found: Iterable[tuple[str, str]]) -> dict[str, str]:
    return dict(sorted((held for held in found if held[1] in MODES), key=lambda held: MODES.index(held[1])))


def test_the_lines_on_locks_and_rewrites_are_true(server: Cluster, tmp_path: Path) -> None:
    all_steps = list(steps())
    told = [claimed(step) for step in all_steps]
    found: list[tuple[dict[str, str], set[str]]] = [({}, set()) for _ in all_steps]
    for state in STATES.values():
        with crm_on(server, tmp_path) as crm, psycopg.connect(crm.dsn, autocommit=True) as observer:
            make(crm, state)
            # What replaces something of an earlier version is only seen the second time.
            for number, step in [*enumerate(all_steps)] * (2 if state == STATES["fresh"] else 1):
                for statement in step.statements(crm.connection):
                    held, rewrites = watch(crm, observer, statement)
                    locks, rewritten = found[number]
                    found[number] = strongest([*locks.items(), *held.items()]), rewritten | rewrites
                    assert len(held.keys() & {"lead", "customer", "contact"}) <= 1, statement
    for step, claim, seen in zip(all_steps, told, found, strict=True):
        assert seen == claim, step.title or step.text


def watch(crm: Crm, observer: psycopg.Connection[Any], statement: str) -> tuple[dict[str, str], set[str]]:
    """Execute a statement; returns how it locked each relation, and which of them it rewrote."""
    own, pid = crm.connection, crm.connection.info.backend_pid
    before = dict(observer.execute(FILENODES).fetchall())
    if "CONCURRENTLY" in statement:
        # It waits for those who may write, and holds its own lock meanwhile.
        with ThreadPoolExecutor(1) as thread, psycopg.connect(crm.dsn) as writer:
            writer.execute("LOCK TABLE activity IN ROW EXCLUSIVE MODE")
            writer.execute("SELECT pg_current_xact_id()")
            done = thread.submit(own.execute, statement.encode())
            eventually(
                lambda: (
                    done.done()
                    or observer.execute("SELECT FROM pg_locks WHERE pid = %s AND NOT granted", (pid,)).fetchall()
                )
            )
            held = strongest(observer.execute(HELD, (pid,)).fetchall())
            writer.rollback()
            done.result()
    elif "COMMIT;" in statement and statement.startswith("DO"):
        # It ends its transactions itself: a trigger looks.
        observer.execute("CREATE TABLE seen (relname text, mode text)")
        observer.execute(
            "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen "
            + HELD.replace("%s", "pg_backend_pid()")
            + "; RETURN NULL; END $$"
        )
        observer.execute("CREATE TRIGGER look AFTER UPDATE ON activity FOR EACH ROW EXECUTE FUNCTION look()")
        own.execute(statement.encode())
        held = strongest(observer.execute("SELECT * FROM seen").fetchall())
        observer.execute("DROP TABLE seen; DROP FUNCTION look() CASCADE")
    else:
        own.execute("BEGIN")
        own.execute(statement.removeprefix("BEGIN;").removesuffix("COMMIT").encode() or b"SELECT")
        # Who looks from outside knows what there was before.
        held = strongest(observer.execute(HELD, (pid,)).fetchall())
        own.execute("COMMIT")
    after = dict(observer.execute(FILENODES).fetchall())
    return held, {name for name, node in before.items() if after[name] != node}


class Application:
    """LeadFi's: what it does goes on in a thread of its own, and may not fail."""

    def __init__(self, crm: Crm, *, old_names: bool, new_names: bool) -> None:
        self.crm = crm
        self.old_names = old_names
        self.new_names = new_names
        self.rounds = 0
        self.written: list[int] = []
        self._stop = Event()

    @contextmanager
    def working(self) -> Iterator[None]:
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(self._work)
            try:
                yield
            finally:
                self._stop.set()
                done.result()

    def goes_on(self) -> None:
        """Wait until it has done all that it does once more."""
        before = self.rounds
        eventually(lambda: self._stop.is_set() or self.rounds > before + 1)

    def _work(self) -> None:
        with psycopg.connect(self.crm.dsn, autocommit=True) as connection:
            try:
                while not self._stop.is_set():
                    for bd in ["bd"] * self.old_names + ["bd_in_charge"] * self.new_names:
                        self._round(connection, bd)
                    self.rounds += 1
            finally:
                self._stop.set()

    def _round(self, connection: psycopg.Connection[Any], bd: str) -> None:
        insert = (
            f"INSERT INTO activity (lead_id, activity_type, description, {bd})"
            " VALUES (%s, 'call', 'new', 'jane') RETURNING activity_id"
        ).encode()
        update = f"UPDATE activity SET description = 'edited', {bd} = 'john' WHERE activity_id = %s".encode()
        ((number,),) = connection.execute(insert, (1,))
        assert connection.execute(update, (number,)).rowcount == 1
        self.written.append(number)
        with connection.transaction():
            ((lead,),) = connection.execute(
                "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('A', 's', 'b', 't') RETURNING lead_id"
            )
            ((number,),) = connection.execute(insert, (lead,))
            connection.execute("SELECT activity_id, description FROM activity WHERE lead_id = %s", (lead,))
        with connection.transaction():
            connection.execute("DELETE FROM activity WHERE lead_id = %s", (lead,))
            assert connection.execute("DELETE FROM lead WHERE lead_id = %s", (lead,)).rowcount == 1


IN_STEP = "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgname = 'activity_bd_in_step')"


@pytest.mark.parametrize("state", ["legacy", "half migrated", "migrated"])
def test_the_application_goes_on_without_an_error_during_all_steps(bare_crm: Crm, state: str) -> None:
    make(bare_crm, STATES[state])
    migrated = "migrat" in state
    application = Application(bare_crm, old_names=not migrated, new_names=migrated)
    with postgres.connect(bare_crm.dsn, "test") as connection, application.working():
        connection.execute("SET search_path = public")
        for step in steps():
            application.goes_on()
            ddl.perform(connection, step, patience=60)
            if not migrated:
                application.new_names = bare_crm.value(IN_STEP)
        application.goes_on()
    found = activities(bare_crm)
    assert {found[number]["bd_in_charge"] for number in application.written} == {"john"}
    assert {found[number]["description"] for number in application.written} == {"edited"}
    assert {found[number]["activity_category"] for number in application.written} == {"manual"}
    if not migrated:
        assert {found[number]["bd"] for number in application.written} == {"john"}


# Foreign keys.

CUSTOMER_KEY = "FOREIGN KEY (manual_customer_uid) REFERENCES customer(customer_uid) ON DELETE CASCADE"
CLEAN = "DELETE FROM activity WHERE lead_id = 99"


def drifted(crm: Crm, key: str) -> None:
    """A legacy table whose foreign key is another, and has another name."""
    make(crm, [LEGACY, ROWS, CLEAN])
    crm.connection.execute(
        b'ALTER TABLE activity DROP CONSTRAINT activity_lead_id_fkey, ADD CONSTRAINT "its Lead" '
        + f"FOREIGN KEY (lead_id) REFERENCES lead(lead_id) {key}".encode()
    )


@pytest.mark.parametrize(
    "actions",
    [
        "",
        "ON DELETE RESTRICT",
        "ON DELETE CASCADE",
        "MATCH FULL ON UPDATE RESTRICT ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED",
    ],
)
def test_a_foreign_key_keeps_name_and_actions_on_the_generated_column(bare_crm: Crm, actions: str) -> None:
    drifted(bare_crm, actions)
    apply(bare_crm)
    assert foreign_keys(bare_crm) == {
        "its Lead": f"FOREIGN KEY (manual_lead_id) REFERENCES lead(lead_id) {actions}".strip(),
        "activity_customer_uid_fkey": CUSTOMER_KEY,
    }


@pytest.mark.parametrize("actions", ["ON DELETE SET NULL", "ON DELETE SET DEFAULT", "ON UPDATE CASCADE"])
def test_a_foreign_key_that_a_generated_column_cannot_carry_stays(bare_crm: Crm, actions: str) -> None:
    drifted(bare_crm, actions)
    apply(bare_crm)
    assert foreign_keys(bare_crm)["its Lead"] == f"FOREIGN KEY (lead_id) REFERENCES lead(lead_id) {actions}"
    assert "manual_lead_id" not in columns(bare_crm)
    assert "manual_customer_uid" in columns(bare_crm)
    assert apply(bare_crm) == []


def test_two_foreign_keys_of_a_link_are_moved_both_or_neither(bare_crm: Crm) -> None:
    drifted(bare_crm, "ON DELETE CASCADE")
    bare_crm.execute(
        "ALTER TABLE activity ADD CONSTRAINT second FOREIGN KEY (lead_id) REFERENCES lead ON UPDATE CASCADE"
    )
    apply(bare_crm)
    assert {text.split(" REF")[0] for name, text in foreign_keys(bare_crm).items() if "customer" not in name} == {
        "FOREIGN KEY (lead_id)"
    }
    bare_crm.execute("ALTER TABLE activity DROP CONSTRAINT second, ADD FOREIGN KEY (lead_id) REFERENCES lead")
    apply(bare_crm)
    assert {text.split(" REF")[0] for name, text in foreign_keys(bare_crm).items() if "customer" not in name} == {
        "FOREIGN KEY (manual_lead_id)"
    }


def test_a_link_without_a_foreign_key_gets_none(bare_crm: Crm) -> None:
    make(bare_crm, [LEGACY, ROWS, "ALTER TABLE activity DROP CONSTRAINT activity_lead_id_fkey"])
    apply(bare_crm)
    assert [*foreign_keys(bare_crm)] == ["activity_customer_uid_fkey"]
    assert "manual_lead_id" not in columns(bare_crm)
    write(bare_crm, lead_id=12345)


def test_a_lead_is_deleted_as_before_if_it_has_manual_activities(bare_crm: Crm) -> None:
    make(bare_crm, STATES["legacy"])
    apply(bare_crm)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        bare_crm.execute("DELETE FROM lead WHERE lead_id = 1")


def test_what_a_cascade_deletes_is_manual(bare_crm: Crm) -> None:
    drifted(bare_crm, "ON DELETE CASCADE")
    apply(bare_crm)
    kept = {
        write_as_worker(bare_crm, lead_id=1),
        write(bare_crm, lead_id=1, activity_category="system"),
        write(bare_crm, lead_id=1, activity_category="automated"),
    }
    write(bare_crm, lead_id=1)
    write(bare_crm, lead_id=1, activity_category=None)
    bare_crm.execute("DELETE FROM lead WHERE lead_id = 1")
    assert {number for number, row in activities(bare_crm).items() if row["lead_id"] == 1} == kept


def test_a_lead_with_only_system_activities_can_be_deleted_and_they_stay(bare_crm: Crm) -> None:
    make(bare_crm, STATES["legacy"])
    apply(bare_crm)
    number = write_as_worker(bare_crm, lead_id=4)
    bare_crm.execute("DELETE FROM lead WHERE lead_id = 4")
    assert activities(bare_crm)[number]["lead_id"] == 4


def test_where_old_rows_break_a_foreign_key_it_holds_for_new_ones(bare_crm: Crm) -> None:
    make(bare_crm, STATES["legacy"])
    said: list[str | None] = []
    apply(bare_crm, "010", "020")
    bare_crm.connection.add_notice_handler(lambda notice: said.append(notice.message_primary))
    for step in steps("030"):
        for statement in step.statements(bare_crm.connection):
            bare_crm.connection.execute(statement.encode())
    assert said == ['constraint "activity_lead_id_fkey" of activity is checked for new rows only: old ones break it']
    assert foreign_keys(bare_crm)["activity_lead_id_fkey"].endswith(" NOT VALID")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        write(bare_crm, lead_id=99)
    bare_crm.execute("UPDATE activity SET description = 'still editable' WHERE lead_id = 99")
    bare_crm.execute("DELETE FROM activity WHERE lead_id = 99")
    bare_crm.execute("ALTER TABLE activity VALIDATE CONSTRAINT activity_lead_id_fkey")
    assert apply(bare_crm, "030") == []


def test_a_link_keeps_its_type(bare_crm: Crm) -> None:
    make(bare_crm, [LEGACY, "ALTER TABLE activity ALTER COLUMN lead_id TYPE bigint"])
    apply(bare_crm)
    assert columns(bare_crm)["manual_lead_id"] == "bigint GENERATED"


def test_deleting_a_lead_finds_its_manual_activities_by_an_index(bare_crm: Crm) -> None:
    apply(bare_crm)
    bare_crm.add_leads(2000)
    bare_crm.execute("INSERT INTO activity (lead_id, activity_type) SELECT lead_id, 'call' FROM lead")
    bare_crm.execute("ANALYZE activity")
    plan = bare_crm.execute("EXPLAIN SELECT 1 FROM ONLY activity x WHERE 1 = manual_lead_id FOR KEY SHARE OF x")
    assert "activity_manual_lead_id" in str(plan)


# Constraints.


def test_a_check_that_demands_a_link_leaves_out_the_worker(bare_crm: Crm) -> None:
    make(bare_crm, STATES["migrated"])
    apply(bare_crm)
    assert constraints(bare_crm)["chk_activity_link"] == (
        "CHECK (((change_key IS NOT NULL) OR ((lead_id IS NOT NULL) OR (customer_uid IS NOT NULL))))"
    )
    write_as_worker(bare_crm)
    with pytest.raises(psycopg.errors.CheckViolation):
        write(bare_crm)


def test_a_link_that_is_not_null_stays_so_for_all_but_the_worker(bare_crm: Crm) -> None:
    make(bare_crm, [LEGACY, ROWS, LINKED_ONLY, "ALTER TABLE activity ALTER COLUMN lead_id SET NOT NULL"])
    apply(bare_crm)
    assert constraints(bare_crm)["activity_lead_id_given"] == (
        "CHECK (((change_key IS NOT NULL) OR (lead_id IS NOT NULL)))"
    )
    write_as_worker(bare_crm)
    with pytest.raises(psycopg.errors.CheckViolation):
        write(bare_crm)
    assert apply(bare_crm) == []


def test_categories_are_known_ones_and_metadata_is_an_object(bare_crm: Crm) -> None:
    apply(bare_crm)
    for row in ({"activity_category": "other"}, {"metadata": "[]"}, {"metadata": '"text"'}, {"metadata": "null"}):
        with pytest.raises(psycopg.errors.CheckViolation):
            write(bare_crm, **row)


def test_where_old_rows_break_a_rule_it_holds_for_new_ones(bare_crm: Crm) -> None:
    make(bare_crm, [LEGACY, ROWS, "ALTER TABLE activity ADD metadata jsonb, ADD activity_category varchar(20)"])
    bare_crm.execute("UPDATE activity SET metadata = '[]', activity_category = 'imported' WHERE activity_id = 1")
    before = activities(bare_crm)[1]
    apply(bare_crm)
    found = constraints(bare_crm)
    assert found["activity_category_known"].endswith(" NOT VALID")
    assert found["activity_metadata_is_object"].endswith(" NOT VALID")
    assert activities(bare_crm)[1].items() >= before.items()
    assert apply(bare_crm) == []


def test_a_check_of_the_applications_own_stays_the_only_one(bare_crm: Crm) -> None:
    make(bare_crm, [LEGACY, ROWS, "ALTER TABLE activity ADD metadata jsonb CHECK (metadata <> '[1]')"])
    make(bare_crm, ["ALTER TABLE activity ADD activity_category text CONSTRAINT own CHECK (activity_category <> 'x')"])
    apply(bare_crm)
    write(bare_crm, metadata="[]", activity_category="imported")
    assert not constraints(bare_crm).keys() & {"activity_category_known", "activity_metadata_is_object"}


# Dates.

OLD_DATE = datetime(2020, 2, 29, 12, 30)
TRIGGERS: LiteralString = "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = 'set_timestamp' AND tgrelid"


def test_dates_of_the_worker_are_kept_and_those_of_others_set_as_before(bare_crm: Crm) -> None:
    make(bare_crm, STATES["legacy"])
    on_others = TRIGGERS + " <> 'activity'::regclass"
    before = bare_crm.execute(on_others)
    apply(bare_crm)
    worker, manual, automated = (
        write_as_worker(bare_crm, date_created=OLD_DATE),
        write(bare_crm, date_created=OLD_DATE),
        write(bare_crm, date_created=OLD_DATE, activity_category="automated"),
    )
    found = activities(bare_crm)
    assert found[worker]["date_created"] == OLD_DATE
    assert found[manual]["date_created"] > OLD_DATE
    assert found[automated]["date_created"] > OLD_DATE
    assert bare_crm.execute(on_others) == before


def test_a_trigger_that_has_a_condition_keeps_it(bare_crm: Crm) -> None:
    make(bare_crm, [LEGACY, ROWS, "DROP TRIGGER set_timestamp ON activity"])
    bare_crm.execute(
        "CREATE TRIGGER dated BEFORE INSERT ON activity FOR EACH ROW"
        " WHEN (NEW.bd = 'jane' OR NEW.activity_type = 'call') EXECUTE FUNCTION trigger_set_timestamp()"
    )
    apply(bare_crm)
    calls = [write(bare_crm, date_created=OLD_DATE), write_as_worker(bare_crm, date_created=OLD_DATE)]
    imported = write(bare_crm, date_created=OLD_DATE, activity_type="imported")
    found = activities(bare_crm)
    assert [found[number]["date_created"] == OLD_DATE for number in [*calls, imported]] == [False, True, True]


def test_a_trigger_that_sets_the_date_on_updates_spoils_no_old_row(bare_crm: Crm) -> None:
    make(bare_crm, [LEGACY, ROWS, "DROP TRIGGER set_timestamp ON activity"])
    bare_crm.execute(
        "CREATE TRIGGER dated BEFORE INSERT OR UPDATE ON activity FOR EACH ROW EXECUTE FUNCTION trigger_set_timestamp()"
    )
    before = activities(bare_crm)
    apply(bare_crm)
    after = activities(bare_crm)
    assert {number: row["date_created"] for number, row in after.items()} == {
        number: row["date_created"] for number, row in before.items()
    }
    assert after[1]["created_by"] == "jane"
    bare_crm.execute("UPDATE activity SET description = 'edited' WHERE activity_id = 1")
    assert activities(bare_crm)[1]["date_created"] > before[1]["date_created"]


def test_what_was_replaced_can_be_restored(bare_crm: Crm) -> None:
    make(bare_crm, STATES["legacy"])
    definition = TRIGGERS + " = 'activity'::regclass"
    before = bare_crm.value(definition)
    apply(bare_crm)
    assert bare_crm.value(definition) != before
    ((*replaced, restore),) = bare_crm.execute("SELECT kind, table_name, name, restore FROM cdc_worker.replaced")
    assert replaced == ["trigger", "public.activity", "set_timestamp"]
    bare_crm.connection.execute(restore.encode())
    assert bare_crm.value(definition) == before
    assert len(apply(bare_crm)) == 1


# Old rows.


def test_rows_of_other_writers_keep_their_category_and_creator(bare_crm: Crm) -> None:
    make(bare_crm, [LEGACY, ROWS, LINKED_ONLY, *MIGRATION[:6]])
    bare_crm.execute("UPDATE activity SET activity_category = 'system' WHERE activity_id = 1")
    bare_crm.execute("UPDATE activity SET activity_category = 'automated', created_by = 'mailer' WHERE activity_id = 2")
    bare_crm.execute("UPDATE activity SET activity_category = NULL, bd_in_charge = 'ann' WHERE activity_id = 3")
    bare_crm.execute("UPDATE activity SET created_by = 'import' WHERE activity_id = 5")
    apply(bare_crm)
    assert bare_crm.execute("SELECT activity_id, activity_category, created_by FROM activity ORDER BY 1") == [
        (1, "system", None),
        (2, "automated", "mailer"),
        (3, "manual", "ann"),
        (5, "manual", "import"),
        (6, "manual", ""),
    ]


def many(crm: Crm) -> None:
    make(crm, [LEGACY])
    crm.execute("INSERT INTO activity (activity_type, bd) SELECT 'call', 'jane' FROM generate_series(1, 2500)")


UNFILLED = "SELECT array_agg(activity_id ORDER BY activity_id) FROM activity WHERE created_by IS DISTINCT FROM 'jane'"


def test_rows_that_the_application_holds_are_not_waited_for_and_filled_at_last(bare_crm: Crm) -> None:
    many(bare_crm)
    for step in steps("010", "020"):
        if "$fill$" in step.text:
            break
        ddl.perform(bare_crm.connection, step)
    with psycopg.connect(bare_crm.dsn) as application:
        application.execute("UPDATE activity SET description = 'held' WHERE activity_id = 1500")
        with pytest.raises(errors.ServerError):
            ddl.perform(bare_crm.connection, step, patience=0)
        assert bare_crm.value(UNFILLED) == [1500]
    apply(bare_crm)
    assert bare_crm.value(UNFILLED) is None
    assert activities(bare_crm)[1500]["description"] == "held"


def test_filling_goes_on_where_it_was_interrupted(bare_crm: Crm) -> None:
    many(bare_crm)
    make(bare_crm, ["CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$"])
    bare_crm.execute(
        "CREATE TRIGGER fail BEFORE UPDATE ON activity"
        " FOR EACH ROW WHEN (OLD.activity_id = 1500) EXECUTE FUNCTION fail()"
    )
    with pytest.raises(psycopg.errors.RaiseException):
        apply(bare_crm)
    assert bare_crm.value(UNFILLED) == [*range(1001, 2501)]
    bare_crm.execute("DROP TRIGGER fail ON activity")
    apply(bare_crm)
    assert bare_crm.value(UNFILLED) is None


# The column that is renamed.


def test_the_old_and_the_new_name_of_the_bd_are_kept_in_step(bare_crm: Crm) -> None:
    make(bare_crm, STATES["legacy"])
    apply(bare_crm)
    both = "SELECT bd, bd_in_charge FROM activity WHERE activity_id = %s"
    for one, other in (("bd", "bd_in_charge"), ("bd_in_charge", "bd")):
        number = write(bare_crm, **{one: "ann"})
        assert bare_crm.execute(both, number) == [("ann", "ann")]
        for column, value in ((one, "ben"), (other, "cleo"), (one, None)):
            bare_crm.connection.execute(
                f"UPDATE activity SET {column} = %s WHERE activity_id = %s".encode(), (value, number)
            )
            assert bare_crm.execute(both, number) == [(value, value)]


def test_the_old_name_can_be_dropped_as_the_file_says(bare_crm: Crm) -> None:
    make(bare_crm, STATES["legacy"])
    apply(bare_crm)
    head = (SCHEMA / "020_leadfi_activity.sql").read_text().split("\n\n")[0]
    statements = re.findall(r"^--     ((?:DROP|ALTER) .*;)$", head, re.MULTILINE)
    assert len(statements) == 2
    make(bare_crm, statements)
    number = write(bare_crm, bd_in_charge="ann")
    bare_crm.execute("UPDATE activity SET bd_in_charge = 'ben' WHERE activity_id = %s", number)
    assert columns(bare_crm) == ENHANCED
    assert apply(bare_crm) == []


# Indexes.

INDEXES = (
    "SELECT pg_get_indexdef(indexrelid), indisvalid FROM pg_index WHERE indrelid = 'activity'::regclass ORDER BY 1"
)


def test_manual_rows_pay_nothing_for_the_index_of_the_keys(bare_crm: Crm) -> None:
    apply(bare_crm)
    assert bare_crm.value("SELECT pg_get_indexdef('activity_change_key'::regclass)") == (
        "CREATE UNIQUE INDEX activity_change_key ON public.activity USING btree (change_key)"
        " WHERE (change_key IS NOT NULL)"
    )


def test_indexes_whose_build_was_interrupted_are_built_again(bare_crm: Crm) -> None:
    apply(bare_crm)
    before = bare_crm.execute(INDEXES)
    bare_crm.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indrelid = 'activity'::regclass AND NOT indisprimary"
    )
    apply(bare_crm)
    assert bare_crm.execute(INDEXES) == before


def test_an_index_of_another_name_is_enough(bare_crm: Crm) -> None:
    make(bare_crm, [LEGACY, ROWS, "CREATE INDEX own ON activity (lead_id, date_created DESC, activity_type)"])
    make(bare_crm, ["ALTER TABLE activity ADD change_key text", "CREATE UNIQUE INDEX keys ON activity (change_key)"])
    make(bare_crm, ["CREATE INDEX partial ON activity (date_created) WHERE lead_id = 1"])
    apply(bare_crm)
    names = {
        name
        for (name,) in bare_crm.execute("SELECT relname FROM pg_class WHERE relname ^@ 'activity' AND relkind = 'i'")
    }
    assert not names & {"activity_lead", "activity_change_key"}
    assert "activity_date" in names


def test_the_owner_of_the_tables_needs_no_more_rights(bare_crm: Crm) -> None:
    make(bare_crm, STATES["migrated"])
    database = bare_crm.connection.info.dbname
    make(bare_crm, ["CREATE ROLE keeper LOGIN", f"GRANT CREATE ON DATABASE {database} TO keeper"])
    try:
        make(bare_crm, ["GRANT ALL ON SCHEMA public TO keeper"])
        for (name,) in bare_crm.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')"
        ):
            make(bare_crm, [f"ALTER TABLE {name} OWNER TO keeper"])
        apply(bare_crm, user="keeper")
        assert columns(bare_crm) == ENHANCED
    finally:
        make(bare_crm, ["DROP OWNED BY keeper CASCADE", "DROP ROLE keeper"])
