"""The doctor on captured tables and the target: each ailment is produced, told, and cured by doing what it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from doctoring import ailing, cure, findings, healthy, mend, report
from psycopg import sql
from support import Crm, crm_on, grant, role
from test_bad_input import leadfi_with
from test_unprepared_target import LEAD_KEY, TARGET, use, without_backfill

from cdc_worker import catalog, ddl, errors, postgres, profile
from cdc_worker.checks import Finding
from cdc_worker.cluster import Cluster
from cdc_worker.rules import compile_rules

LEGACY = Path(__file__).parent / "legacy"

TABLES = [
    *("profile", "replica_identity", "target", "target_checks", "target_key", "target_foreign_keys"),
    *("target_triggers", "row_security", "truncate", "trackers", "other_writers"),
]


@pytest.fixture(scope="module")
def own(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crm]:
    """A database whose target is made anew for each test."""
    with crm_on(server, tmp_path_factory.mktemp("own")) as crm:
        yield use(crm, TARGET)


@pytest.fixture
def plain(own: Crm) -> Crm:
    """A target that asks for nothing and was not prepared."""
    own.connection.execute(
        """
        DROP TABLE activity CASCADE;
        DROP TYPE IF EXISTS kind;
        DROP DOMAIN IF EXISTS brief, sure;
        DROP FUNCTION IF EXISTS fill, unknowing, picky;
        ALTER TABLE lead ALTER lead_id TYPE integer
        """
    )
    return use(own, TARGET)


TWICE: LiteralString = """
INSERT INTO activity (activity_type, lead_id, bd, date_created, change_key) VALUES ('x', 1, 'jane', 'yesterday', {})
"""


def unwell(crm: Crm) -> list[Finding]:
    """All findings about tables that aren't ok."""
    return [finding for finding in report(crm) if finding.check in TABLES and finding.outcome != "ok"]


def stops_at_start(crm: Crm) -> bool:
    """Whether the profile has faults with which the worker doesn't start."""
    loaded = profile.load(crm.settings["profile"])
    with postgres.connect(crm.settings.get("dsn", crm.dsn), "test") as connection:
        try:
            catalog.check(connection, loaded, compile_rules(loaded))
        except errors.CatalogMismatchError:
            return True
    return False


# Healthy ones


def test_a_crm_that_was_set_up_is_healthy(crm: Crm) -> None:
    assert unwell(crm) == []
    crm.add_leads(3)
    crm.record()
    assert unwell(crm) == []


def test_legacy_installations_are_healthy_once_they_are_set_up(bare_crm: Crm) -> None:
    """Both the legacy table and what the published migration makes of it."""
    for name in ("legacy.sql", "rows.sql"):
        bare_crm.connection.execute((LEGACY / name).read_text().encode())
    bare_crm.execute("DELETE FROM activity WHERE lead_id IS NULL")
    for step in ddl.steps((LEGACY / "old_migration.sql").read_text()):
        bare_crm.connection.execute(step.text.encode())
    assert {finding.fix for finding in unwell(bare_crm)} >= {"cdc-worker setup"}
    bare_crm.setup()
    assert unwell(bare_crm) == []


def test_a_target_that_asks_for_nothing_is_healthy_unprepared(bare_crm: Crm) -> None:
    crm = use(bare_crm, TARGET)
    crm.add_leads(3)
    crm.record()
    assert unwell(crm) == []


def test_a_role_with_nothing_but_the_grants_can_look_at_all_but_rows(crm: Crm) -> None:
    role = f"cdc_{crm.slot}"
    grant(crm, role)
    try:
        assert [(finding.check, finding.outcome) for finding in unwell(crm)] == [("other_writers", "unknown")]
        cure(crm, "other_writers")
    finally:
        crm.connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


def test_before_setup_the_doctor_says_what_setup_is_for(bare_crm: Crm) -> None:
    missing = "target table public.activity does not exist"
    told = {(finding.message, finding.fix) for finding in unwell(bare_crm) if finding.check.startswith("target")}
    assert told == {(missing, "cdc-worker setup")}
    (found,) = findings(bare_crm, "other_writers")
    assert (found.message, found.fix) == (missing, "cdc-worker setup")
    assert cure(bare_crm, "profile").message == missing
    assert unwell(bare_crm) == []


# The profile

PICKY: LiteralString = """
CREATE FUNCTION picky(text) RETURNS boolean LANGUAGE plpgsql STABLE AS $$ BEGIN
    IF $1 IN ('lead_deleted', '1', '20010203') THEN RAISE 'not %', $1; END IF;
    RETURN true;
END $$
"""


def test_each_fault_of_a_profile_is_a_finding_with_a_way_out(crm: Crm, tmp_path: Path) -> None:
    crm.connection.execute(
        """
        CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id);
        CREATE TABLE one PARTITION OF parted FOR VALUES FROM (1) TO (2);
        CREATE UNLOGGED TABLE others PARTITION OF parted DEFAULT;
        CREATE VIEW seen AS SELECT id FROM parted;
        CREATE UNLOGGED TABLE fast (id int PRIMARY KEY);
        """
    )
    rule = '[tables.{0}]\n[[tables.{0}.rules]]\non = "insert"\ntype = "made"\ndescription = "made"\n'
    more = "".join(rule.format(table) for table in ("parted", "seen", "fast"))
    crm.settings["profile"] = leadfi_with(
        tmp_path,
        ("[tables.contact]", f"{more}[tables.contact]"),
        ("{new.source}", "{new.sauce}"),
        ("tables.customer", "tables.client"),
    )
    told = [(finding.message, finding.fix) for finding in findings(crm, "profile")]
    assert told == [
        ("captured table public.lead has no column sauce", "name columns that it has in [tables.lead] of the profile"),
        ("captured table public.client does not exist", "rename [tables.client] of the profile, or take it out"),
        (
            "partition public.others of captured table public.parted is unlogged: its changes are not in the WAL",
            "as its owner: ALTER TABLE public.others SET LOGGED",
        ),
        (
            "captured table public.seen is a view: it has no changes of its own",
            "capture the tables that it shows in its place",
        ),
        (
            "captured table public.fast is unlogged: its changes are not in the WAL",
            "as its owner: ALTER TABLE public.fast SET LOGGED",
        ),
    ]
    mend(crm, told[-1][1] or "")
    assert len(findings(crm, "profile")) == 4


def test_a_column_of_the_target_that_setup_makes_is_for_setup(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity DROP COLUMN created_by CASCADE")
    found = cure(crm, "profile")
    assert (found.message, found.fix) == ("target table public.activity has no column created_by", "cdc-worker setup")


def test_columns_of_the_target_that_nobody_makes_get_types_that_fit(plain: Crm) -> None:
    crm = plain
    crm.execute("ALTER TABLE activity DROP metadata, DROP customer_uid, DROP created_by, DROP bd, DROP date_created")
    found = cure(crm, "profile")
    assert (
        found.message
        == "target table public.activity has no column bd, created_by, customer_uid, date_created, metadata"
    )
    types: dict[str, str] = dict(
        crm.execute("SELECT column_name, data_type FROM information_schema.columns WHERE table_name = 'activity'")
    )
    assert types["customer_uid"] == "integer"
    assert types["bd"] == "character varying"
    assert types["metadata"] == "jsonb"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "CREATE TYPE kind AS ENUM ('lead_created', 'status_changed', 'assignment_changed', 'lead_converted',"
            " 'lead_updated', 'customer_created', 'customer_updated', 'customer_deleted');"
            "ALTER TABLE activity ALTER activity_type TYPE kind USING activity_type::kind",
            'target column public.activity.activity_type is of the type kind, as which "lead_deleted" can\'t be read:'
            " lead_deleted of public.lead, leads_truncated of public.lead",
        ),
        (
            "CREATE DOMAIN brief AS text CHECK (VALUE <> 'customer_deleted');"
            "ALTER TABLE activity ALTER activity_type TYPE brief",
            'target column public.activity.activity_type is of the type brief, as which "customer_deleted" can\'t be'
            " read: customer_deleted of public.customer, customers_truncated of public.customer",
        ),
        (
            "ALTER TABLE activity ALTER lead_id TYPE uuid USING NULL",
            "target column public.activity.lead_id is of the type uuid, as which public.lead.lead_id can't be read:",
        ),
        (
            "ALTER TABLE activity ALTER metadata TYPE text[] USING NULL",
            "target column public.activity.metadata is of the type text[], as which the field metadata can't",
        ),
        (
            "ALTER TABLE activity ALTER date_created TYPE bigint USING 0",
            "target column public.activity.date_created is of the type bigint, as which the field occurred_at can't be"
            " read: all rules",
        ),
        (
            f"{PICKY}; CREATE DOMAIN brief AS text CHECK (picky(VALUE));"
            "ALTER TABLE activity ALTER activity_type TYPE brief",
            'target column public.activity.activity_type is of the type brief, as which "lead_deleted" can\'t be read:'
            " lead_deleted of public.lead, leads_truncated of public.lead",
        ),
        (
            "ALTER TABLE activity DROP bd; ALTER TABLE activity ADD bd text GENERATED ALWAYS AS (description) STORED",
            "target column public.activity.bd is generated, and takes no values",
        ),
    ],
    ids=["enum", "domain", "link", "metadata", "time", "raises", "generated"],
)
def test_a_value_that_the_target_can_never_read_stops_the_worker(
    plain: Crm, change: LiteralString, message: str
) -> None:
    crm = plain
    crm.connection.execute(change)
    found = [finding for finding in findings(crm, "profile") if finding.outcome != "ok"]
    assert found[0].message.startswith(message)
    assert {finding.outcome for finding in found} == {"failed"}
    assert stops_at_start(crm)
    for finding in found:
        mend(crm, finding.fix or "")
    assert healthy(crm, "profile")
    assert not stops_at_start(crm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "ALTER TABLE activity ALTER bd TYPE integer USING 0",
            "as which public.lead.bd_in_charge can't always be read",
        ),
        ("ALTER TABLE activity ALTER created_by TYPE uuid USING NULL", "as which the field created_by can't always"),
        (
            "ALTER TABLE lead ALTER lead_id TYPE bigint",
            "as which public.lead.lead_id can't always be read, and such rows",
        ),
        (
            f"{PICKY}; CREATE DOMAIN brief AS integer CHECK (picky(VALUE::text));"
            "ALTER TABLE lead ALTER lead_id TYPE bigint; ALTER TABLE activity ALTER lead_id TYPE brief",
            "as which public.lead.lead_id can't always be read, and such rows",
        ),
        (
            "ALTER TABLE activity ALTER created_by TYPE regclass USING NULL",
            "as which the field created_by can't always",
        ),
    ],
)
def test_a_value_that_the_target_cannot_always_read_is_a_warning(
    plain: Crm, change: LiteralString, message: str
) -> None:
    crm = plain
    crm.connection.execute(change)
    assert not stops_at_start(crm)
    found = cure(crm, "profile")
    assert found.outcome == "warning"
    assert message in found.message


def test_a_target_that_is_captured_would_never_end(plain: Crm) -> None:
    crm = plain
    profile = Path(crm.settings["profile"])
    rule = '[tables.activity]\n[[tables.activity.rules]]\non = "{}"\ntype = "made"\ndescription = "made"\n'
    profile.write_text(profile.read_text() + rule.format("insert"))
    found = ailing(crm, "profile")
    assert found.message == (
        "target table public.activity is captured, with a rule on insert: each activity would make another, for ever"
    )
    ended = crm.command("run", "--once")
    assert (ended.returncode, crm.activities()) == (17, [])
    assert found.message in ended.stderr
    profile.write_text(profile.read_text().replace('on = "insert"\ntype = "made"', 'on = "delete"\ntype = "made"'))
    assert healthy(crm, "profile")


def test_a_target_that_a_crash_empties_stops_the_worker(plain: Crm) -> None:
    crm = plain
    crm.execute("ALTER TABLE activity SET UNLOGGED")
    assert stops_at_start(crm)
    found = cure(crm, "profile")
    assert found.message.startswith("target table public.activity is unlogged: a crash of the server empties it")
    assert not stops_at_start(crm)


def test_a_target_that_is_no_table(plain: Crm) -> None:
    crm = plain
    crm.execute("ALTER TABLE activity RENAME TO stored")
    crm.execute("CREATE VIEW activity AS SELECT * FROM stored")
    try:
        found = ailing(crm, "profile")
        assert found.message == "target public.activity is a view: it takes no rows"
        assert found.fix == "in [target] of the profile, name the table where the rows are to be"
        assert stops_at_start(crm)
        assert {finding.message for finding in unwell(crm)} == {found.message}
        crm.connection.execute(FILL.format("BEGIN INSERT INTO stored VALUES (NEW.*); RETURN NEW; END"))
        crm.execute("CREATE TRIGGER fill INSTEAD OF INSERT ON activity FOR EACH ROW EXECUTE FUNCTION fill()")
        assert "what its trigger does" in ailing(crm, "profile").message
        assert not stops_at_start(crm)
        profile = Path(crm.settings["profile"])
        profile.write_text(profile.read_text().replace('table = "activity"', 'table = "stored"'))
        assert unwell(crm) == []
    finally:
        crm.execute("DROP VIEW activity CASCADE")
        crm.execute("ALTER TABLE stored RENAME TO activity")


@pytest.mark.parametrize(
    ("column", "value"),
    [("is_converted", '"yes"'), ("lead_id", '"7"'), ("status", f'"{"x" * 51}"'), ("date_created", '"soon"')],
)
def test_a_rule_that_waits_for_what_its_column_never_is_stops_the_worker(
    crm: Crm, tmp_path: Path, column: str, value: str
) -> None:
    crm.settings["profile"] = leadfi_with(tmp_path, ("to = { is_converted = true }", f"to = {{ {column} = {value} }}"))
    found = ailing(crm, "profile")
    assert found.message.startswith(f"rule lead_converted of public.lead is about {column} = {value}, which a ")
    assert stops_at_start(crm)


@pytest.mark.parametrize(
    ("column", "value"),
    [("is_converted", "false"), ("lead_id", "7"), ("status", '"é \'"'), ("date_created", '"2026-01-01T00:00"')],
)
def test_a_rule_may_wait_for_what_its_column_can_be(crm: Crm, tmp_path: Path, column: str, value: str) -> None:
    crm.settings["profile"] = leadfi_with(tmp_path, ("to = { is_converted = true }", f"to = {{ {column} = {value} }}"))
    assert healthy(crm, "profile")


def test_what_an_oid_is_about_is_a_number(crm: Crm, tmp_path: Path) -> None:
    crm.execute("ALTER TABLE lead ADD photo oid")
    for value, healthy_ in (("7", True), ('"7"', False)):
        change = ("to = { is_converted = true }", f"to = {{ photo = {value} }}")
        crm.settings["profile"] = leadfi_with(tmp_path, change)
        assert healthy(crm, "profile") == healthy_


def test_types_that_the_role_may_not_use_are_believed_and_compared(plain: Crm) -> None:
    crm = plain
    path = Path(crm.settings["profile"])
    text = path.read_text()
    crm.connection.execute(
        """
        CREATE SCHEMA types;
        CREATE TYPE types.state AS ENUM ('new', 'won');
        CREATE DOMAIN types.word AS text CHECK (VALUE <> '');
        ALTER TABLE lead ADD state types.state, ADD word types.word;
        ALTER TABLE activity ALTER activity_type TYPE types.word
        """
    )
    try:
        with role(crm):
            for to, known in (('state = "won"', True), ('state = "lost"', False), ('word = "anything"', True)):
                path.write_text(text.replace("to = { is_converted = true }", f"to = {{ {to} }}"))
                assert healthy(crm, "profile") == known
                assert stops_at_start(crm) != known
    finally:
        crm.execute("DROP SCHEMA types CASCADE")


# Old rows


@pytest.mark.parametrize(
    ("identity", "fate"), [("DEFAULT", "become dead letters"), ("NOTHING", "are not sent at all, and lost")]
)
def test_a_replica_identity_without_old_rows(crm: Crm, identity: str, fate: str) -> None:
    crm.connection.execute(f"ALTER TABLE lead REPLICA IDENTITY {identity}".encode())
    found = cure(crm, "replica_identity")
    assert found.message == (
        f"replica identity of public.lead is {identity}: its updates and deletes lack the old row, and {fate}"
    )


def test_partitions_that_are_new(crm: Crm, tmp_path: Path) -> None:
    crm.connection.execute(
        """
        CREATE SCHEMA old;
        CREATE TABLE deal (id int, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
        CREATE TABLE deal_2025 PARTITION OF deal FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
        CREATE TABLE "deal 2026" PARTITION OF deal FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')
            PARTITION BY RANGE (at);
        CREATE TABLE old.half PARTITION OF "deal 2026" FOR VALUES FROM ('2026-01-01') TO ('2026-07-01');
        """
    )
    rules = '[tables.{0}]\n[[tables.{0}.rules]]\non = "delete"\ntype = "gone"\ndescription = "gone"\n'
    one, two = rules.format("deal_2025"), rules.format('"old.half"')
    crm.settings["profile"] = leadfi_with(tmp_path, ("[tables.contact]", f"{one}[tables.contact]"))
    crm.setup()
    found = ailing(crm, "replica_identity")
    assert found.message == "partition old.half of deal isn't in the profile, as others are: nothing of it is recorded"
    assert found.fix == 'give the profile a [tables."old.half"] like theirs; then: cdc-worker setup'
    leadfi_with(tmp_path, ("[tables.contact]", f"{one}{two}[tables.contact]"))
    assert ailing(crm, "replica_identity").message.startswith("replica identity of old.half is DEFAULT")
    mend(crm, "cdc-worker setup")
    assert healthy(crm, "replica_identity")


def test_tables_that_inherit_are_not_recorded(crm: Crm, tmp_path: Path) -> None:
    crm.execute("CREATE TABLE foreign_lead () INHERITS (lead)")
    found = ailing(crm, "replica_identity")
    assert (found.outcome, found.message) == (
        "warning",
        "table public.foreign_lead inherits from lead and isn't in the profile: nothing of it is recorded",
    )
    assert found.fix == "give the profile a [tables.foreign_lead] like its parent's; then: cdc-worker setup"
    rule = '[tables.foreign_lead]\n[[tables.foreign_lead.rules]]\non = "insert"\ntype = "x"\ndescription = "x"\n'
    crm.settings["profile"] = leadfi_with(tmp_path, ("[tables.contact]", f"{rule}[tables.contact]"))
    mend(crm, "cdc-worker setup")
    assert healthy(crm, "replica_identity")


# The target


@pytest.mark.parametrize(
    ("change", "outcome", "message"),
    [
        ("ALTER TABLE activity ADD hours integer NOT NULL", "failed", "column hours must have a value, has no default"),
        (
            "ALTER TABLE activity ALTER activity_id DROP DEFAULT",
            "failed",
            "column activity_id must have a value, has no",
        ),
        (
            "CREATE DOMAIN sure AS integer NOT NULL; ALTER TABLE activity ADD hours sure",
            "failed",
            "column hours must have a value, has no default",
        ),
        (
            "ALTER TABLE activity ALTER lead_id SET NOT NULL",
            "failed",
            "column lead_id must have a value, and these rules have none, so that their rows become dead letters:"
            " leads_truncated of public.lead, customer_created of public.customer,",
        ),
        (
            "ALTER TABLE activity ADD state text NOT NULL",
            "warning",
            "column state must have a value, and these rules don't always have one; rows without become dead letters:"
            " lead_created of public.lead",
        ),
        (
            "ALTER TABLE activity ALTER change_key TYPE varchar(40)",
            "failed",
            "column change_key has 40 characters, and a key of this worker up to ",
        ),
    ],
    ids=["left out", "key", "domain", "link", "nullable", "change_key"],
)
def test_what_columns_ask(plain: Crm, change: LiteralString, outcome: str, message: str) -> None:
    crm = plain
    crm.connection.execute(change)
    if "state" in change:  # in place of the links, which customers have not
        profile = Path(crm.settings["profile"])
        text = without_backfill(profile.read_text()).replace('"lead_id" = "lead"', '"state" = "state"')
        text = text.replace('lead = "{row.lead_id}"', 'state = "{context.state}"')
        profile.write_text(text.replace('fields = { customer = "{row', 'fields = { state = "x", customer = "{row'))
    found = cure(crm, "target")
    assert (found.outcome, found.message[: len(message)]) == (outcome, message)


UUID = "ALTER TABLE activity DROP activity_id, ADD activity_id uuid "


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        (f"{UUID} PRIMARY KEY", None),
        ("ALTER TABLE activity DROP activity_id, ADD activity_id text PRIMARY KEY", "give activity_id a default"),
        (
            "ALTER TABLE activity ALTER activity_id DROP DEFAULT, DROP CONSTRAINT activity_pkey,"
            " ADD PRIMARY KEY (activity_type, activity_id)",
            "name a table in [target] of the profile whose primary key isn't activity_id, activity_type",
        ),
        (
            "ALTER TABLE activity DROP CONSTRAINT activity_pkey, ADD PRIMARY KEY (lead_id, activity_id)",
            "name a table in [target] of the profile whose primary key isn't activity_id, lead_id",
        ),
    ],
    ids=["uuid", "text", "two columns", "links"],
)
def test_primary_keys_that_no_identity_fits(plain: Crm, change: LiteralString, fix: str | None) -> None:
    crm = plain
    crm.connection.execute(change)
    if fix is None:
        cure(crm, "target")
        for key in ("'a'", "'b'"):
            crm.execute(TWICE.format(key))
    else:
        assert fix in (ailing(crm, "target").fix or "")


def test_what_columns_still_ask_of_others_after_the_cure(plain: Crm) -> None:
    crm = plain
    crm.execute("ALTER TABLE activity ALTER lead_id SET NOT NULL, ALTER activity_id DROP DEFAULT")
    for finding in findings(crm, "target"):
        mend(crm, finding.fix or "")
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    crm.record()
    assert crm.types() == ["customer_created"]
    with pytest.raises(psycopg.errors.CheckViolation):
        crm.execute("INSERT INTO activity (activity_type, date_created) VALUES ('call', now())")


def test_a_column_that_a_trigger_fills_may_be_left_out(plain: Crm) -> None:
    crm = plain
    crm.execute("ALTER TABLE activity ADD hours integer NOT NULL")
    crm.execute(
        "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.hours := 0; RETURN NEW; END $$"
    )
    crm.execute("CREATE TRIGGER fill BEFORE INSERT ON activity FOR EACH ROW EXECUTE FUNCTION fill()")
    assert healthy(crm, "target")


def test_texts_that_are_cut_are_told(plain: Crm) -> None:
    crm = plain
    (found,) = findings(crm, "target")
    assert found.message.endswith(
        "; texts too long for activity_type, bd, created_by are cut, and stand in the metadata whole"
    )


def test_texts_that_there_is_no_metadata_for_are_too_long(plain: Crm) -> None:
    columns = {"activity_type": "type", "bd": "owner", "date_created": "occurred_at", "change_key": "change_key"}
    crm = use(plain, "ALTER TABLE activity ALTER bd TYPE varchar(19)", columns=columns)
    found = cure(crm, "target")
    assert found.message.startswith(
        "column bd has 19 characters, and with no metadata to keep the whole of it, what is"
    )
    crm.execute("ALTER TABLE activity ALTER activity_type TYPE varchar(12)")
    found = cure(crm, "target")
    assert found.message.startswith("column activity_type has 12 characters, too few for what these rules write")
    assert "status_changed of public.lead, assignment_changed of public.lead" in found.message


AS_RULE = """
INSERT INTO activity (activity_type, lead_id, metadata, date_created, change_key) VALUES (%s, %s, '{}', now(), NULL)
"""


@pytest.mark.parametrize(
    ("check", "rules"),
    [
        ("num_nonnulls(lead_id, customer_uid) > 0", ["leads_truncated", "customers_truncated"]),
        ("activity_type IN ('call', 'lead_created') OR lead_id IS NULL", ["status_changed", "lead_deleted"]),
        (
            "customer_uid IS NOT NULL OR activity_type = 'call' OR lead_id IS NOT NULL",
            ["leads_truncated", "customers_truncated"],
        ),
        ("jsonb_typeof(metadata) = 'array'", ["lead_created", "customers_truncated"]),
        ("lead_id > 100", []),
        ("lower(activity_type) <> 'lead_created'", ["lead_created"]),
        ("date_created <= now()", []),
        ("activity_type <> 'call' AND description <> ''", []),
        ("unknowing(activity_type)", []),
    ],
)
def test_checks_that_refuse_whole_rules(plain: Crm, check: str, rules: list[str]) -> None:
    crm = plain
    crm.execute("CREATE FUNCTION unknowing(text) RETURNS boolean LANGUAGE sql STABLE AS 'SELECT false'")
    crm.connection.execute(f"ALTER TABLE activity ADD CONSTRAINT asked CHECK ({check})".encode())
    if not rules:
        assert healthy(crm, "target_checks")
        return
    found = cure(crm, "target_checks")
    assert found.message.startswith('CHECK "asked" refuses all that these rules write')
    assert all(f"{rule} of public." in found.message for rule in rules)
    link = None if "truncated" in rules[0] else 1
    with pytest.raises(psycopg.errors.CheckViolation):
        crm.execute(AS_RULE, rules[0], link)
    crm.execute(AS_RULE.replace("NULL", "'x/1/2/3'"), rules[0], link)


def test_what_is_the_same_is_asked_once(plain: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rules of each of thirty tables, and ten CHECKs."""
    crm = plain
    profile = Path(crm.settings["profile"])
    rules = [f'[[tables.t{n}.rules]]\non = "insert"\ntype = "r{n}_{rule}"' for n in range(30) for rule in range(10)]
    for n in range(30):
        crm.connection.execute(f"CREATE TABLE t{n} (id int PRIMARY KEY)".encode())
    profile.write_text("\n".join([profile.read_text(), *(f'{rule}\ndescription = "made"' for rule in rules)]))
    for n in range(10):
        check = f"activity_type <> 'r{n}_{n}' OR lead_id IS NOT NULL"
        crm.connection.execute(f"ALTER TABLE activity ADD CHECK ({check})".encode())
    statements = []
    execute = psycopg.Connection.execute

    def counting(*given: Any, **more: Any) -> Any:
        statements.append(given[1])
        return execute(*given, **more)

    monkeypatch.setattr(psycopg.Connection, "execute", counting)
    found = findings(crm, "target_checks")
    assert [f"r{n}_{n} of public.t{n}" in finding.message for n, finding in enumerate(found)] == [True] * 10
    assert len(statements) < 150


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE activity DROP CONSTRAINT activity_key",
        "ALTER TABLE activity DROP CONSTRAINT activity_key, ADD UNIQUE (change_key) DEFERRABLE",
        "ALTER TABLE activity DROP CONSTRAINT activity_key, ADD UNIQUE (change_key, activity_id)",
        "ALTER TABLE activity DROP CONSTRAINT activity_key;"
        "CREATE UNIQUE INDEX ON activity (change_key) WHERE lead_id IS NOT NULL",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'activity_spare'::regclass",
    ],
    ids=["none", "deferrable", "two columns", "partial", "invalid"],
)
def test_a_key_that_is_not_unique(plain: Crm, change: LiteralString) -> None:
    crm = plain
    if "indisvalid" in change:
        crm.execute("ALTER TABLE activity DROP CONSTRAINT activity_key")
        crm.execute("CREATE UNIQUE INDEX activity_spare ON activity (change_key)")
    crm.connection.execute(change)
    found = cure(crm, "target_key")
    assert found.outcome == "failed"
    assert found.message.startswith("column change_key has no unique index of its own")
    assert ("DROP INDEX" in (found.fix or "")) == ("indisvalid" in change)


def test_keys_that_are_there_twice_are_shown(plain: Crm) -> None:
    crm = plain
    crm.execute("ALTER TABLE activity DROP CONSTRAINT activity_key")
    for _ in range(2):
        crm.execute(TWICE.format("'a'"))
    fix = ailing(crm, "target_key").fix or ""
    select = fix.partition("first: ")[2].partition("; then: ")[0]
    assert crm.connection.execute(select.encode()).fetchall() == [("a", 2)]
    with pytest.raises(psycopg.errors.UniqueViolation):
        mend(crm, fix)
    crm.execute("DELETE FROM activity WHERE activity_id > (SELECT min(activity_id) FROM activity)")
    assert "; then: DROP INDEX CONCURRENTLY" in (cure(crm, "target_key").fix or "")


def test_a_partitioned_target_is_unique_by_key_and_partition(plain: Crm) -> None:
    crm = plain
    crm.connection.execute(
        """
        ALTER TABLE activity DROP CONSTRAINT activity_pkey;
        ALTER TABLE activity DROP CONSTRAINT activity_key;
        ALTER TABLE activity RENAME TO stored;
        CREATE TABLE activity (LIKE stored INCLUDING ALL) PARTITION BY RANGE (date_created);
        ALTER TABLE activity ATTACH PARTITION stored DEFAULT
        """
    )
    assert cure(crm, "target_key").outcome == "failed"
    for key, refused in (("'a'", False), ("NULL", False), ("NULL", False), ("'a'", True)):
        with pytest.raises(psycopg.errors.UniqueViolation) if refused else nullcontext():
            crm.execute(TWICE.format(key))
    crm.execute("ALTER TABLE stored SET UNLOGGED")
    assert cure(crm, "profile").message.startswith("target table public.stored is unlogged")
    crm.add_leads(1)
    crm.record()
    assert crm.types()[-1] == "lead_created"
    crm.connection.execute(
        """
        ALTER TABLE activity RENAME TO old;
        CREATE TABLE activity (LIKE old INCLUDING DEFAULTS) PARTITION BY LIST (activity_id);
        DROP TABLE old CASCADE
        """
    )
    assert "is partitioned by what the worker doesn't write" in (ailing(crm, "target_key").fix or "")


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE activity ADD CONSTRAINT once UNIQUE (bd, activity_type)",
        "ALTER TABLE activity ADD CONSTRAINT once EXCLUDE (bd WITH =)",
        "CREATE UNIQUE INDEX once ON activity (lead_id) WHERE activity_type <> 'call'",
    ],
)
def test_what_else_has_to_be_unique(plain: Crm, change: LiteralString) -> None:
    crm = plain
    crm.connection.execute(change)
    found = cure(crm, "target_key")
    assert found.outcome == "warning"
    assert found.message.startswith('"once" lets equal values of ')
    for key in ("'a'", "'b'", "NULL"):
        crm.execute(TWICE.format(key))
    with pytest.raises(psycopg.errors.IntegrityError):
        crm.execute(TWICE.format("NULL"))


@pytest.mark.parametrize(
    "change",
    [
        "CREATE UNIQUE INDEX once ON activity (lead_id) WHERE activity_type = 'call'",
        "CREATE UNIQUE INDEX once ON activity (lead_id, activity_id)",
        "CREATE UNIQUE INDEX once ON activity (activity_type, change_key)",
    ],
)
def test_what_may_be_unique(plain: Crm, change: LiteralString) -> None:
    crm = plain
    crm.connection.execute(change)
    assert healthy(crm, "target_key")


@pytest.mark.parametrize(
    ("action", "fate"),
    [
        ("", "is refused while it has history"),
        ("ON DELETE CASCADE", "takes its history along"),
        ("ON DELETE SET NULL", "takes it out of its history"),
    ],
)
def test_foreign_keys_of_the_workers_rows(plain: Crm, action: LiteralString, fate: str) -> None:
    plain.execute(LEAD_KEY + action)
    found = cure(plain, "target_foreign_keys")
    assert found.message == (
        'foreign key "of_lead" on lead_id: each row that the worker writes locks a row of public.lead, so it writes few'
        f" at a time; and a DELETE there {fate}"
    )


def test_foreign_keys_that_setup_can_move_are_for_setup(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CONSTRAINT again FOREIGN KEY (lead_id) REFERENCES lead ON DELETE CASCADE")
    assert cure(crm, "target_foreign_keys").fix == "cdc-worker setup"
    assert "(manual_lead_id)" in crm.value(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'again'"
    )


FILL = "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS $$ {} $$"
ON_INSERT = "CREATE TRIGGER fill BEFORE INSERT ON activity FOR EACH ROW {} EXECUTE FUNCTION fill()"


@pytest.mark.parametrize(
    ("body", "when", "does"),
    [
        ("BEGIN NEW.date_created = now(); RETURN NEW; END", "", "sets date_created"),
        ("BEGIN IF true THEN NEW.\"bd\" := 'x'; END IF; RETURN NEW; END", "", "sets bd"),
        ("BEGIN SELECT 'x' INTO NEW.bd; RETURN NEW; END", "WHEN (NEW.lead_id > 0)", "sets bd"),
        (
            "BEGIN IF NEW.lead_id < 0 THEN RETURN NULL; END IF; RETURN NEW; END",
            "",
            "may leave a row out without an error",
        ),
        ("BEGIN RETURN OLD; END", "", "may leave a row out without an error"),
        ('BEGIN NEW := jsonb_populate_record(NEW, \'{"bd": "x"}\'); RETURN NEW; END', "", "may change any column"),
        (
            "DECLARE other activity; BEGIN other = NEW; other.bd = 'x'; RETURN other; END",
            "",
            "may change any column",
        ),
        ("BEGIN IF TG_OP = 'DELETE' THEN RETURN OLD; END IF; RETURN coalesce(NEW, OLD); END", "", None),
        ("BEGIN -- NEW.bd := 'x'\n IF NEW.bd = 'x' THEN PERFORM 1; END IF; RETURN NEW; END", "", None),
        ("BEGIN NEW.bd := 'x'; RETURN NEW; END", "WHEN (NEW.activity_type = 'call')", None),
        ("BEGIN NEW.bd := 'x'; RETURN NEW; END", "WHEN (NEW.change_key IS NULL AND pg_trigger_depth() = 1)", None),
    ],
)
def test_triggers_that_change_what_the_worker_writes(
    plain: Crm, body: LiteralString, when: LiteralString, does: str | None
) -> None:
    crm = plain
    crm.connection.execute(FILL.format(body))
    crm.connection.execute(ON_INSERT.format(when))
    if does is None:
        assert healthy(crm, "target_triggers")
        return
    crm.execute("ALTER TABLE activity ENABLE ALWAYS TRIGGER fill")
    found = cure(crm, "target_triggers")
    assert found.message == f'trigger "fill" (public.fill) {does}, also of what the worker writes'
    assert crm.value("SELECT tgenabled FROM pg_trigger WHERE tgname = 'fill'") == "A"
    crm.execute(TWICE.format("'a'"))
    assert crm.value("SELECT (bd, date_created) = ('jane', 'yesterday') FROM activity")


@pytest.mark.parametrize(
    ("body", "does"),
    [
        ("UPDATE activity SET bd = 'x' WHERE activity_id = NEW.activity_id", "may change rows that are there"),
        ("DELETE FROM public.activity WHERE activity_id = NEW.activity_id", "may remove rows that are there"),
        (
            "UPDATE lead SET title = 'contacted' WHERE lead_id = NEW.lead_id",
            "may write public.lead, whose changes are recorded in turn, which may never end",
        ),
        ("UPDATE activity_count SET bd = 'x'; PERFORM NEW.bd = 'x'", None),
    ],
)
@pytest.mark.parametrize("constraint", ["", "CONSTRAINT "])
def test_triggers_that_change_what_the_worker_wrote(
    plain: Crm, body: LiteralString, does: str | None, constraint: LiteralString
) -> None:
    crm = plain
    crm.connection.execute(FILL.format(f"BEGIN {body}; RETURN NULL; END"))
    crm.connection.execute(ON_INSERT.format("").replace("TRIGGER", f"{constraint}TRIGGER").replace("BEFORE", "AFTER"))
    if does is None:
        assert healthy(crm, "target_triggers")
        return
    found = cure(crm, "target_triggers")
    assert found.message == f'trigger "fill" (public.fill) {does}, also of what the worker writes'
    crm.execute(TWICE.format("'a'"))
    assert crm.value("SELECT bd FROM activity") == "jane"


def test_triggers_that_setup_makes_conditional_are_for_setup(crm: Crm) -> None:
    crm.connection.execute(FILL.format("BEGIN NEW.date_created = now(); RETURN NEW; END"))
    crm.connection.execute(ON_INSERT.format(""))
    assert cure(crm, "target_triggers").fix == "cdc-worker setup"


def test_row_security(crm: Crm) -> None:
    role = f"cdc_{crm.slot}"
    name = sql.Identifier(role)
    grant(crm, role)
    try:
        crm.execute("ALTER TABLE activity ENABLE ROW LEVEL SECURITY")
        crm.connection.execute(sql.SQL("CREATE POLICY add ON activity FOR INSERT TO {} WITH CHECK (true)").format(name))
        crm.execute("CREATE RULE aside AS ON INSERT TO activity DO INSTEAD NOTHING")
        crm.execute("ALTER TABLE activity ALTER lead_id SET NOT NULL")
        crm.execute("ALTER TABLE activity ALTER lead_id ADD GENERATED ALWAYS AS IDENTITY")
        always, required = findings(crm, "target")
        assert always.message.startswith("column lead_id is GENERATED ALWAYS: with row security, rows are inserted")
        mend(crm, always.fix or "")
        assert findings(crm, "target") == [required]
        assert ailing(crm, "row_security").outcome == "warning"
        assert cure(crm, "target_triggers").message.startswith('rule "aside" does something else')
        crm.execute("DROP POLICY add ON activity")
        found = cure(crm, "row_security")
        assert (found.outcome, found.message.endswith("no policy lets it insert anything")) == ("failed", True)
    finally:
        crm.connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(name))


def test_truncate_by_cascade(crm: Crm) -> None:
    app = f"app of {crm.slot}"
    name = sql.Identifier(app)
    crm.connection.execute(sql.SQL("CREATE ROLE {0}; ALTER TABLE activity OWNER TO {0}").format(name))
    crm.execute("GRANT TRUNCATE ON activity TO PUBLIC")
    try:
        assert healthy(crm, "truncate")
        crm.connection.execute(sql.SQL("GRANT TRUNCATE ON lead, customer TO {0}").format(name))
        found = cure(crm, "truncate")
        assert found.message == (
            "a TRUNCATE … CASCADE of customer or lead empties public.activity as well, and these roles may do that:"
            f' "{app}", PUBLIC'
        )
        crm.connection.execute(sql.SQL("GRANT TRUNCATE ON contact TO {0}; SET ROLE {0}").format(name))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            crm.execute("TRUNCATE lead CASCADE")
    finally:
        crm.execute("RESET ROLE")
        crm.connection.execute(
            sql.SQL("REASSIGN OWNED BY {0} TO postgres; DROP OWNED BY {0}; DROP ROLE {0}").format(name)
        )


def test_truncate_where_nothing_leads_to_the_target(plain: Crm) -> None:
    crm = plain
    crm.execute("GRANT TRUNCATE ON activity TO PUBLIC")
    assert healthy(crm, "truncate")


# Who else records

TRACKER: LiteralString = """
CREATE FUNCTION track() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO activity (activity_type, activity_category, description)
    VALUES ('lead_updated', 'system', 'Lead ' || NEW.lead_id);
    RETURN NEW;
END $$;
CREATE TRIGGER tracker AFTER UPDATE ON lead FOR EACH ROW EXECUTE FUNCTION track()
"""

DEAL = '[tables.deal]\n[[tables.deal.rules]]\non = "insert"\ntype = "dealt"\ndescription = "dealt"\n[tables.contact]'


def test_a_tracker_beside_the_worker(crm: Crm) -> None:
    crm.execute(TRACKER)
    found = cure(crm, "trackers")
    assert found.outcome == "failed"
    assert found.message == "public.lead is recorded by tracker and by the worker: all is there twice"


def test_trackers_until_cut_over_and_given_back(bare_crm: Crm) -> None:
    crm = bare_crm
    crm.execute(TRACKER)
    crm.succeed("setup", "--no-cutover")
    found = cure(crm, "trackers")
    assert found.message == "public.lead is recorded by tracker, until the cut-over"
    crm.succeed("cutover", "--back")
    told = [(finding.outcome, finding.message) for finding in findings(crm, "trackers")]
    assert told == [("ok", "public.lead is left to its triggers since cutover --back: tracker")]


def test_tables_that_are_not_set_up_or_not_in_the_profile(crm: Crm, tmp_path: Path) -> None:
    crm.execute("CREATE TABLE deal (id int PRIMARY KEY)")
    crm.settings["profile"] = leadfi_with(tmp_path, ("[tables.contact]", DEAL))
    assert cure(crm, "trackers").message == "public.deal is not set up: the worker leaves it out"
    del crm.settings["profile"]
    found = cure(crm, "trackers")
    assert found.message.startswith("public.deal is set up and no longer in the profile, so it isn't recorded")


def test_a_tracked_table_that_the_worker_has_not_run_with(crm: Crm, tmp_path: Path) -> None:
    crm.record()
    crm.execute("CREATE TABLE deal (lead_id int PRIMARY KEY)")
    crm.execute(TRACKER.replace("ON lead", "ON deal"))
    crm.settings["profile"] = leadfi_with(tmp_path, ("[tables.contact]", DEAL))
    crm.setup()
    found = ailing(crm, "trackers")
    assert found.message == "public.deal is recorded by tracker, and the worker has not run with it yet"
    crm.record()
    assert cure(crm, "trackers").fix == "cdc-worker cutover"


def test_triggers_that_may_record(crm: Crm) -> None:
    crm.execute(TRACKER.replace("AFTER UPDATE", "BEFORE UPDATE"))
    assert cure(crm, "trackers").outcome == "warning"
    crm.execute(
        "CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'SELECT 1'; RETURN NULL; END $$"
    )
    crm.execute("CREATE TRIGGER audit AFTER INSERT ON lead FOR EACH ROW EXECUTE FUNCTION audit()")
    assert cure(crm, "trackers").outcome == "unknown"


WRITE: LiteralString = """
INSERT INTO activity (activity_type, activity_category, description, created_by) VALUES (%s, 'system', %s, 'app')
"""


def test_rows_of_others_that_tell_what_the_worker_tells(crm: Crm) -> None:
    crm.execute(WRITE, "lead_created", "older than all of the worker's rows")
    crm.add_leads(2)
    crm.record()
    crm.execute(WRITE, "lead_created", "twice")
    crm.execute(WRITE, "lead_created", "twice")
    crm.execute(WRITE, "document_signed", "of their own")
    crm.execute("INSERT INTO activity (activity_type, description) VALUES ('lead_created', 'by hand')")
    found = cure(crm, "other_writers")
    assert found.message.startswith(
        "2 of the newest 10,000 rows of activity look like the worker's, and have no change_key"
    )
    assert crm.execute("SELECT description FROM activity WHERE change_key IS NULL ORDER BY activity_id") == [
        ("older than all of the worker's rows",),
        ("of their own",),
        ("by hand",),
    ]
    (found,) = findings(crm, "other_writers")
    assert "1 of the newest 10,000 rows" in found.message


def test_rows_of_triggers_before_a_cut_over_are_theirs(crm: Crm) -> None:
    """Also those between the worker's rows, when the triggers were given back for a while."""
    crm.execute(TRACKER)
    crm.succeed("cutover")
    crm.add_leads(1)
    crm.record()
    crm.succeed("cutover", "--back")
    crm.execute("UPDATE lead SET title = 'x'")
    assert crm.value("SELECT count(*) FROM activity WHERE change_key IS NULL") == 1
    assert healthy(crm, "other_writers")
    crm.succeed("cutover")
    crm.execute("UPDATE lead SET title = 'y'")
    crm.record()
    assert healthy(crm, "other_writers")
    crm.execute(WRITE, "lead_updated", "twice")
    cure(crm, "other_writers")
    assert crm.value("SELECT count(*) FROM activity WHERE change_key IS NULL") == 1
