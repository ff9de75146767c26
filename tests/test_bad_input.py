"""Bad input, on real servers: each is one clear error with the way out and a code of its own, and loses nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from doctoring import mend
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support import Crm, crm_on, eventually, grant, having, role, stranger

from cdc_worker import config, errors, postgres
from cdc_worker.cluster import Binaries, Cluster, find_binaries
from cdc_worker.doctor import doctor
from cdc_worker.errors import CdcWorkerError

CANARY = "c4n4ry"
"""A password, which nothing may print."""

HBA = (
    "host all secretive 127.0.0.1/32 scram-sha-256",
    "host all barred 127.0.0.1/32 reject",
    "host all postgres,cdc,unknown,sleeping 127.0.0.1/32 trust",
    "local all all trust",
)


@pytest.fixture(scope="module")
def spare(binaries: Binaries) -> Iterator[Cluster]:
    """A server whose settings the tests here change, and set back."""
    with Cluster(binaries) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE ROLE secretive SUPERUSER LOGIN PASSWORD '{CANARY}'".encode())
            connection.execute("CREATE ROLE sleeping NOLOGIN")
        server.write_hba(*HBA)
        yield server


@pytest.fixture
def spare_crm(spare: Cluster, tmp_path: Path) -> Iterator[Crm]:
    """A database with LeadFi's tables on the spare server, set up for the worker."""
    with crm_on(spare, tmp_path, prepared=True) as crm:
        yield crm


@pytest.fixture(scope="module")
def untouched(spare: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crm]:
    """A database of which nothing is lost, whatever the commands are told."""
    with crm_on(spare, tmp_path_factory.mktemp("untouched")) as crm:
        crm.setup()
        add(crm, "Ann")
        yield crm
        crm.reconnect()
        crm.record()
        assert names(crm) == ["Ann"]


def refused(crm: Crm, kind: type[CdcWorkerError], *others: str, **settings: str) -> tuple[str, str]:
    """What `run` and `others` say, message and hint: one error, which ends `run` with a code of its own."""
    settings = {"dsn": make_conninfo(crm.settings.get("dsn", crm.dsn), password=CANARY)} | settings
    said = one_error(crm, ["run"], kind.exit_code, **settings)
    if kind not in FOUND_LATER:
        diagnosed(crm, said, **settings)
    for other in others:
        assert _without_positions(one_error(crm, [other], 1, **settings)) == _without_positions(said)
    return said


FOUND_LATER = (errors.TargetUnusableError, errors.TooManyRefusalsError, errors.MessageUnreadableError)
"""What `run` meets only when it writes, or reads."""


def diagnosed(crm: Crm, said: tuple[str, str], **settings: str) -> None:
    """Assert that the doctor says the same, a finding a fault."""
    failures: list[tuple[str, str]] = []
    try:
        report = doctor(config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings | settings))
        failures = [(found.message, found.fix or "") for found in report.findings if found.outcome == "failed"]
    except CdcWorkerError as error:  # settings with which no command begins
        failures = [(str(error), error.hint or "")]
    if "does not fit the database:" in said[0]:
        faults = [line.strip() for line in said[0].splitlines()[1:]]
        assert [message for message, _ in failures if message in faults] == faults
    else:
        assert _without_positions(said) in [_without_positions(failure) for failure in failures]


def _without_positions(said: tuple[str, str]) -> list[str]:
    return [re.sub(r"[0-9A-F]+/[0-9A-F]+|20\d\d-[-\d :]+ UTC", "…", text) for text in said]


def one_error(crm: Crm, command: list[str], code: int, **settings: str) -> tuple[str, str]:
    """What a command says that fails with this code: the message and the hint of its only error."""
    done = crm.command(*command, **settings)
    said = "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("{"))
    match = re.fullmatch(r"error: (.+)\nhint: (.+)\n", said, re.DOTALL)
    assert match, done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in done.stderr
    assert CANARY not in done.stderr + done.stdout
    return match[1], match[2]


def follow(crm: Crm, hint: str) -> None:
    """Execute, as a superuser, the statements that a hint names."""
    statements = re.findall(r"\b(?:ALTER|DELETE|GRANT|SELECT) [^;]+", hint)
    assert statements, hint
    for statement in statements:
        crm.connection.execute(statement.encode())


def names(crm: Crm) -> list[str]:
    """Of whom the recorded activities tell, in order."""
    return [activity["metadata"]["lead_name"] for activity in crm.activities()]


def add(crm: Crm, name: str) -> None:
    """Insert a lead."""
    crm.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES (%s, 's', 'b', 't')", name)


# Who and where


def test_a_dsn_that_means_nothing(untouched: Crm) -> None:
    said, hint = refused(untouched, errors.ConnectionStringError, "setup", "status", dsn="nonsense")
    assert said == "CDC_WORKER_DSN is not a connection string"
    assert hint == 'write "postgresql://user@host/database" or "host=… user=… dbname=…"'


@pytest.mark.parametrize(
    "dsn",
    [
        f"host=127.0.0.1 password=a {CANARY}",
        f"postgresql://jane:{CANARY}%zz@127.0.0.1/crm",
        f"postgresql://jane:50%25@{CANARY}@127.0.0.1/crm",
        f"postgresql://jane:{CANARY}/half@127.0.0.1/crm",
        f"host=127.0.0.1 sslmode=never password={CANARY}",
        f"service=nowhere password={CANARY}",
        "host=a,b,c port=1,2",
        "host=127.0.0.1 connect_timeout=soon",
    ],
)
def test_a_dsn_that_libpq_cannot_use(untouched: Crm, dsn: str) -> None:
    refused(untouched, errors.ConnectionStringError, dsn=dsn)


@pytest.mark.parametrize("option", ["-c no_such=1", "-c work_mem=much", "-z"])
def test_a_dsn_with_options_that_the_server_does_not_know(untouched: Crm, option: str) -> None:
    _, hint = refused(untouched, errors.ConnectionStringError, dsn=make_conninfo(untouched.dsn, options=option))
    assert hint == "mend the options in CDC_WORKER_DSN or PGOPTIONS"


def test_a_wrong_password(untouched: Crm) -> None:
    dsn = make_conninfo(untouched.dsn, user="secretive", password=f"{CANARY}, but wrong")
    said, hint = refused(untouched, errors.AuthenticationError, "setup", "status", dsn=dsn)
    assert said == 'password authentication failed for user "secretive"'
    assert hint == "mend user and password (CDC_WORKER_DSN, ~/.pgpass) or pg_hba.conf"
    assert untouched.succeed("status", dsn=make_conninfo(dsn, password=CANARY))


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("secretive", "no password supplied"),
        ("unlisted", 'no pg_hba.conf entry for host "127.0.0.1", user "unlisted", database'),
        ("barred", 'pg_hba.conf rejects connection for host "127.0.0.1", user "barred", database'),
        ("sleeping", 'role "sleeping" is not permitted to log in'),
        ("unknown", 'role "unknown" does not exist'),
    ],
)
def test_a_role_that_the_server_refuses(untouched: Crm, user: str, message: str) -> None:
    said, _ = refused(untouched, errors.AuthenticationError, dsn=make_conninfo(untouched.dsn, user=user))
    assert message in said


def test_a_wrong_password_is_waited_out_once_the_worker_has_run(spare_crm: Crm) -> None:
    dsn = make_conninfo(spare_crm.dsn, user="secretive", password=CANARY)
    with spare_crm.worker(dsn=dsn) as worker:
        worker.wait_for("replication_started")
        spare_crm.execute("ALTER ROLE secretive PASSWORD 'another'")
        try:
            spare_crm.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'secretive'")
            eventually(lambda: [e for e in worker.events("connection_lost") if e["error"] == "AuthenticationError"])
        finally:
            spare_crm.connection.execute(f"ALTER ROLE secretive PASSWORD '{CANARY}'".encode())
        add(spare_crm, "Ann")
        eventually(lambda: names(spare_crm) == ["Ann"])
        assert worker.terminate() == 0
        assert CANARY not in worker.said


def test_no_such_database(untouched: Crm) -> None:
    dsn = make_conninfo(untouched.dsn, dbname="nowhere")
    said, hint = refused(untouched, errors.DatabaseMissingError, "setup", "status", dsn=dsn)
    assert (said, hint) == ('database "nowhere" does not exist', "name another database in the DSN, or create it")


def test_a_database_that_the_role_may_not_connect_to(spare_crm: Crm) -> None:
    database = sql.Identifier(spare_crm.connection.info.dbname)
    spare_crm.connection.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(database))
    with role(spare_crm):
        said, hint = refused(spare_crm, errors.AuthenticationError, "status")
        assert said.startswith("permission denied for database")
        follow(spare_crm, hint)
        spare_crm.record()


def test_tls_that_the_server_does_not_speak(untouched: Crm) -> None:
    said, hint = refused(
        untouched, errors.AuthenticationError, "status", dsn=make_conninfo(untouched.dsn, sslmode="require")
    )
    assert said == "server does not support SSL, but SSL was required"
    assert hint == "mend sslmode and sslrootcert, or the server's certificate"


def test_a_server_that_is_down_fails_what_runs_once_and_is_waited_for_by_run(spare: Cluster, spare_crm: Crm) -> None:
    add(spare_crm, "Ann")
    spare.stop()
    try:
        for command in (["run", "--once"], ["setup"], ["status"]):
            said, hint = one_error(spare_crm, command, 1)
            assert "Connection refused" in said
            assert "\n" not in said
            assert hint.startswith("see that the server is up, can be reached")
        with spare_crm.worker() as worker:
            worker.wait_for("connection_lost")
            spare.start()
            worker.wait_for("replication_started")
            spare_crm.reconnect()
            eventually(lambda: names(spare_crm) == ["Ann"])
            assert worker.terminate() == 0
    finally:
        if not spare.is_running:
            spare.start()
        spare_crm.reconnect()


# What the server must be able to do


def test_no_wal_level(binaries: Binaries, tmp_path: Path) -> None:
    with Cluster(binaries, settings={"wal_level": "replica"}) as server, crm_on(server, tmp_path) as crm:
        said, hint = refused(crm, errors.WalLevelError, "setup")
        assert said == 'wal_level is "replica"'
        follow(crm, hint)
        server.restart()
        crm.reconnect()
        crm.setup()
        add(crm, "Ann")
        crm.record()
        assert names(crm) == ["Ann"]


@contextmanager
def without_wal2json(server: Cluster) -> Iterator[None]:
    with having(server, dynamic_library_path="/nowhere"):
        yield


def test_no_wal2json_on_a_server_that_never_had_it(binaries: Binaries, tmp_path: Path) -> None:
    bare = Cluster(replace(binaries, plugin_dir=None), settings={"dynamic_library_path": "/nowhere"})
    with bare as server, crm_on(server, tmp_path) as crm:
        said, hint = one_error(crm, ["setup"], 1, plugin="wal2json")
        assert said == "the server has no output plugin wal2json"
        assert hint.startswith("name pgoutput in CDC_WORKER_PLUGIN; or install wal2json there, ")
        assert hint.endswith(f"apt-get install postgresql-{binaries.version.split('.')[0]}-wal2json")


def test_wal2json_is_gone(spare: Cluster, spare_crm: Crm) -> None:
    add(spare_crm, "Ann")
    with without_wal2json(spare):
        said, _ = refused(spare_crm, errors.PluginMissingError)
        assert said == "the server has no output plugin wal2json"
    spare_crm.record()
    assert names(spare_crm) == ["Ann"]


@pytest.fixture(scope="module")
def newest() -> Iterator[Cluster]:
    """A server that refuses wal2json unless it is told to allow it, and isn't."""
    binaries = find_binaries(newest=True)
    assert binaries.plugin_list, f"{binaries.origin} is too old to refuse a plugin"
    with Cluster(binaries, allow_plugins=False) as server:
        yield server


def test_wal2json_is_refused_to_setup(newest: Cluster, tmp_path: Path) -> None:
    with crm_on(newest, tmp_path) as crm, role(crm, "SUPERUSER", granted=False):
        said, hint = one_error(crm, ["setup"], 1, plugin="wal2json")
        assert said == (
            "the server refuses the output plugin wal2json: output_plugin_libraries is pgoutput, test_decoding"
        )
        follow(crm, hint)
        crm.setup()
        add(crm, "Ann")
        crm.record()
        assert names(crm) == ["Ann"]


@pytest.mark.parametrize("libraries", ['"pgoutput, wal2json"', "''"])
def test_wal2json_is_refused_after_an_upgrade_of_the_server(newest: Cluster, tmp_path: Path, libraries: str) -> None:
    """The first is one name with a comma in it: the mistake that is easiest to make with ALTER SYSTEM."""
    with crm_on(newest, tmp_path) as crm:
        crm.execute("ALTER ROLE postgres SET output_plugin_libraries = wal2json")
        crm.setup()
        add(crm, "Ann")
        crm.connection.execute(f"ALTER ROLE postgres SET output_plugin_libraries = {libraries}".encode())
        try:
            said, hint = refused(crm, errors.PluginRefusedError)
            assert said.startswith("the server refuses the output plugin wal2json")
            follow(crm, hint)
            crm.record()
            assert names(crm) == ["Ann"]
        finally:
            crm.execute("ALTER ROLE postgres RESET output_plugin_libraries")


def test_a_role_that_may_not_see_what_the_server_allows(newest: Cluster, tmp_path: Path) -> None:
    """The setting is hidden from ordinary roles, which the worker's should be."""
    with crm_on(newest, tmp_path) as crm:
        crm.connection.execute("ALTER ROLE postgres SET output_plugin_libraries = pgoutput, wal2json")
        try:
            crm.setup()
            grant(crm, "modest")
            add(crm, "Ann")
            said, hint = refused(crm, errors.PluginRefusedError)
            assert said.endswith("output_plugin_libraries doesn't name it")
            follow(crm, hint)
            crm.record()
            assert names(crm) == ["Ann"]
        finally:
            crm.connection.execute("ALTER ROLE postgres RESET output_plugin_libraries")


def test_a_worker_that_would_be_a_synchronous_standby(spare: Cluster, spare_crm: Crm) -> None:
    add(spare_crm, "Ann")
    with having(spare, synchronous_standby_names="*"):
        said, hint = refused(spare_crm, errors.SynchronousStandbyError, "setup")
        assert said.startswith('synchronous_standby_names is "*"')
        assert "name the real standbys" in hint
    spare_crm.record()
    assert names(spare_crm) == ["Ann"]


# Slot and checkpoint


def test_not_set_up(bare_crm: Crm) -> None:
    said, hint = refused(bare_crm, errors.NotSetUpError, "status")
    assert (said, hint) == ("the database has no tables of cdc-worker", "run: cdc-worker setup")
    bare_crm.setup()
    said, hint = refused(bare_crm, errors.NotSetUpError, "status", name="another")
    assert (said, hint) == ('there is no checkpoint of the worker "another"', "run: cdc-worker setup")


def test_the_slot_is_another_plugins(crm: Crm) -> None:
    crm.execute("SELECT pg_drop_replication_slot(%s)", crm.slot)
    crm.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", crm.slot)
    said, hint = refused(crm, errors.SlotMismatchError, "setup")
    assert said == f'slot "{crm.slot}" is of the plugin "test_decoding", not wal2json or pgoutput'
    assert hint == "name another slot in CDC_WORKER_SLOT, then: cdc-worker setup"
    crm.settings["slot"] = f"{crm.slot}_other"
    crm.setup()
    add(crm, "Ann")
    crm.record()
    assert names(crm) == ["Ann"]


def test_the_slot_is_a_physical_one(bare_crm: Crm) -> None:
    bare_crm.execute("SELECT pg_create_physical_replication_slot(%s)", bare_crm.slot)
    try:
        said, _ = one_error(bare_crm, ["setup"], 1)
        assert said == f'slot "{bare_crm.slot}" is a physical one'
    finally:
        bare_crm.execute("SELECT pg_drop_replication_slot(%s)", bare_crm.slot)


def test_the_slot_is_another_databases(server: Cluster, crm: Crm) -> None:
    """As in a copy of the database, made for a rehearsal."""
    add(crm, "Ann")
    name = f"{crm.connection.info.dbname}_copy"
    database = crm.connection.info.dbname
    crm.close()
    server.createdb(name, template=database)
    crm.reconnect()
    copy = Crm(server.dsn(name), crm.slot, crm.directory)
    try:
        said, hint = refused(copy, errors.SlotMismatchError, "setup")
        assert said == f'slot "{crm.slot}" belongs to the database "{database}", not to "{name}"'
        assert "CDC_WORKER_SLOT" in hint
    finally:
        copy.close()
        crm.connection.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))
    crm.record()
    assert names(crm) == ["Ann"]


def test_the_slot_is_taken_by_a_stranger(server: Cluster, crm: Crm) -> None:
    add(crm, "Ann")
    with stranger(server, crm) as (process, pid):
        for command in (["run", "--no-wait"], ["run", "--once"]):
            said, hint = one_error(crm, command, errors.SlotTakenError.exit_code)
            assert said == f'slot "{crm.slot}" is read by process {pid} (pg_recvlogical, 127.0.0.1)'
        follow(crm, hint)
        process.wait()
    crm.record()
    assert names(crm) == ["Ann"]


def test_no_slot_is_left(binaries: Binaries, tmp_path: Path) -> None:
    with Cluster(binaries, settings={"max_replication_slots": "1"}) as server, crm_on(server, tmp_path) as crm:
        crm.setup()
        said, hint = one_error(crm, ["setup"], 1, slot="another")
        assert (said, hint) == ("all replication slots of the server are taken", "raise max_replication_slots")


def test_the_worker_reads_another_slot(crm: Crm) -> None:
    add(crm, "Ann")
    said, hint = refused(crm, errors.SlotMismatchError, "setup", slot="another", name=crm.slot)
    assert said == f'the worker "{crm.slot}" reads the slot "{crm.slot}", not "another"'
    assert "CDC_WORKER_SLOT" in hint
    crm.record()
    assert names(crm) == ["Ann"]


# The profile


@pytest.mark.parametrize(
    "content",
    [None, b"[target\n", b"\xff\xfe", b'name = "x"\ncolour = "red"\n'],
    ids=["none", "torn", "latin", "wrong"],
)
def test_an_unreadable_profile(untouched: Crm, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "profile.toml"
    if content is not None:
        path.write_bytes(content)
    said, _ = refused(untouched, errors.ProfileError, "setup", profile=str(path))
    assert str(path) in said


def test_a_directory_for_a_profile(untouched: Crm, tmp_path: Path) -> None:
    refused(untouched, errors.ProfileError, "setup", profile=str(tmp_path))


def leadfi_with(directory: Path, *changes: tuple[str, str]) -> str:
    """The path of LeadFi's profile with changes."""
    text = (Path(errors.__file__).parent / "profiles" / "leadfi.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = directory / "profile.toml"
    path.write_text(text)
    return str(path)


def test_a_profile_that_does_not_fit_the_database(crm: Crm, tmp_path: Path) -> None:
    add(crm, "Ann")
    changes = (
        ("{new.source}", "{new.sauce}"),
        ("tables.customer", "tables.client"),
        ('bd_in_charge = "owner"', 'bd = "owner"'),
    )
    said, hint = refused(crm, errors.CatalogMismatchError, "setup", profile=leadfi_with(tmp_path, *changes))
    assert said.splitlines() == [
        'profile "leadfi" does not fit the database:',
        "  captured table public.lead has no column sauce",
        "  captured table public.client does not exist",
        "  target table public.activity has no column bd",
    ]
    assert hint == "mend the profile, or run: cdc-worker setup; of each fault tells: cdc-worker doctor"
    crm.record()
    assert names(crm) == ["Ann"]


def test_tables_of_which_nothing_would_come(crm: Crm, tmp_path: Path) -> None:
    add(crm, "Ann")
    crm.connection.execute(
        """
        CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id);
        CREATE TABLE part PARTITION OF parted DEFAULT;
        CREATE VIEW seen AS SELECT id FROM parted;
        CREATE MATERIALIZED VIEW kept AS SELECT id FROM parted;
        CREATE FOREIGN DATA WRAPPER nothing;
        CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing;
        CREATE FOREIGN TABLE remote (id int) SERVER nowhere;
        CREATE UNLOGGED TABLE fast (id int PRIMARY KEY);
        """
    )
    rule = '[tables.{0}]\nidentity = {{ id = "{{row.id}}" }}\nfields = {{}}\n'
    rule += '[[tables.{0}.rules]]\non = "insert"\ntype = "made"\ndescription = "made"\n'
    more = "".join(rule.format(table) for table in ("parted", "part", "seen", "kept", "remote", "fast"))
    profile = leadfi_with(tmp_path, ("[tables.contact]", f"{more}[tables.contact]"))
    said, _ = refused(crm, errors.CatalogMismatchError, profile=profile)
    assert said.splitlines()[1:] == [
        "  captured table public.seen is a view: it has no changes of its own",
        "  captured table public.kept is a view: it has no changes of its own",
        "  captured table public.remote is foreign: its changes are another server's",
        "  captured table public.fast is unlogged: its changes are not in the WAL",
    ]
    crm.record()
    assert names(crm) == ["Ann"]


# Rights


def test_a_role_without_replication(spare_crm: Crm) -> None:
    add(spare_crm, "Ann")
    with role(spare_crm):
        spare_crm.execute("ALTER ROLE cdc NOREPLICATION")
        _, hint = refused(spare_crm, errors.AuthenticationError)
        assert hint == 'as a superuser: ALTER ROLE "cdc" REPLICATION'
        follow(spare_crm, hint)
        spare_crm.record()
    assert names(spare_crm) == ["Ann"]


def test_a_role_without_a_right_that_the_worker_needs(spare_crm: Crm) -> None:
    add(spare_crm, "Ann")
    with role(spare_crm):
        for right in (
            "USAGE ON SCHEMA cdc_worker",
            "SELECT ON cdc_worker.checkpoint",
            "UPDATE ON cdc_worker.checkpoint",
            "INSERT ON activity",
            "USAGE ON SEQUENCE activity_activity_id_seq",
        ):
            spare_crm.connection.execute(f"REVOKE {right} FROM cdc".encode())
            said, hint = refused(spare_crm, errors.TargetUnusableError)
            assert said.startswith('role "cdc" lacks '), right
            diagnosed(spare_crm, (said, hint))
            mend(spare_crm, hint)
        spare_crm.record()
    assert names(spare_crm) == ["Ann"]


def test_a_role_that_may_not_set_up(spare: Cluster, tmp_path: Path) -> None:
    with crm_on(spare, tmp_path) as crm, role(crm, "REPLICATION", granted=False):
        said, hint = one_error(crm, ["setup"], 1)
        assert said.endswith("\n  CREATE SCHEMA cdc_worker AUTHORIZATION cdc;")
        assert hint == "have an administrator do it, then the same again"
        crm.execute("CREATE SCHEMA cdc_worker AUTHORIZATION cdc")
        said, hint = one_error(crm, ["setup"], 1)
        assert said == "the server refused: permission denied for schema public (SQLSTATE 42501)"
        assert hint == "do it as a superuser, or as the owner of the tables, who needs CREATE on their schemas"


def test_a_database_that_is_read_only(crm: Crm) -> None:
    add(crm, "Ann")
    crm.execute("ALTER TABLE lead REPLICA IDENTITY DEFAULT")  # setup has something to do
    database = sql.Identifier(crm.connection.info.dbname)
    crm.connection.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(database))
    said, hint = refused(crm, errors.TargetUnusableError)
    assert "SQLSTATE 25006" in said
    assert one_error(crm, ["setup"], 1)[1] == hint
    follow(crm, hint)
    crm.record()
    assert names(crm) == ["Ann"]


def test_tables_of_the_worker_that_someone_altered(crm: Crm) -> None:
    add(crm, "Ann")
    crm.execute("ALTER TABLE cdc_worker.checkpoint RENAME commit_lsn TO commit")
    said, hint = refused(crm, errors.NotSetUpError, "status")
    assert said == 'the tables of cdc-worker are not those of this version: column "commit_lsn" does not exist'
    assert hint == "run: cdc-worker setup; what someone has renamed or dropped there, bring back"
    crm.execute("ALTER TABLE cdc_worker.checkpoint RENAME commit TO commit_lsn")
    crm.record()
    assert names(crm) == ["Ann"]


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (
            postgres.error("XX000", "the server ended the stream"),
            errors.ServerError,
            "the server ended the stream (SQLSTATE XX000)",
        ),
        (postgres.error("23505", "Ann"), errors.ServerError, "the server refused a row (SQLSTATE 23505)"),
        (postgres.error("0A000", "no"), errors.TargetUnusableError, "no (SQLSTATE 0A000)"),
        (psycopg.OperationalError("one\tmore\nCONTEXT: two\n"), errors.ServerError, "one more"),
    ],
)
def test_an_error_that_nobody_foresaw_is_told_without_the_values_of_rows(
    error: psycopg.Error, kind: type[CdcWorkerError], said: str
) -> None:
    failure = postgres.failure(error)
    assert type(failure) is kind
    assert str(failure) == said
    assert failure.hint


def test_a_time_zone_that_postgres_alone_knows(crm: Crm) -> None:
    add(crm, "Ann")
    database = sql.Identifier(crm.connection.info.dbname)
    crm.connection.execute(sql.SQL("ALTER DATABASE {} SET timezone = '<+03>-03'").format(database))
    said, _ = refused(crm, errors.SettingsError)
    assert said.startswith('the database\'s time zone: "<+03>-03" is not the name of a time zone such as')
    assert one_error(crm, ["backfill", "--dry-run"], 2)[0] == said
    crm.record(time_zone="Asia/Baghdad")
    assert names(crm) == ["Ann"]
