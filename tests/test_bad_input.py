"""Bad input, on real servers: each is one clear error with the way out and a code of its own, and loses nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support import Crm, crm_on, eventually, grant

from cdc_worker import errors
from cdc_worker.cluster import Binaries, Cluster
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
    with crm_on(spare, tmp_path) as crm:
        crm.setup()
        yield crm


@contextmanager
def having(server: Cluster, **settings: str) -> Iterator[None]:
    """A server with other settings, which take effect without a restart."""

    def current() -> dict[str, str]:
        with psycopg.connect(server.dsn()) as connection:
            rows = connection.execute(
                "SELECT name, reset_val FROM pg_settings WHERE name = ANY (%s)", (list(settings),)
            )
            return dict(rows.fetchall())

    before = current()
    server.set(**settings)
    server.reload()
    eventually(lambda: current() != before, what=f"{settings}")
    changed = current()
    try:
        yield
    finally:
        server.set(**before)
        server.reload()
        eventually(lambda: current() != changed, what=f"{before}")


@pytest.fixture(scope="module")
def untouched(spare: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crm]:
    """A database of which nothing is lost, whatever the commands are told."""
    with crm_on(spare, tmp_path_factory.mktemp("untouched")) as crm:
        crm.setup()
        add(crm, "Ann")
        yield crm
        crm.record()
        assert names(crm) == ["Ann"]


def refused(crm: Crm, kind: type[CdcWorkerError], *others: str, **settings: str) -> tuple[str, str]:
    """What `run` and `others` say, message and hint: one error, which ends `run` with a code of its own."""
    settings = {"dsn": make_conninfo(crm.settings.get("dsn", crm.dsn), password=CANARY)} | settings
    said = one_error(crm, ["run"], kind.exit_code, **settings)
    for other in others:
        assert _without_positions(one_error(crm, [other], 1, **settings)) == _without_positions(said)
    return said


def _without_positions(said: tuple[str, str]) -> list[str]:
    return [re.sub(r"[0-9A-F]+/[0-9A-F]+", "…", text) for text in said]


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
            assert hint == "see that the server is up and can be reached"
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
        ('bd_in_charge = "bd"', 'bd = "bd"'),
    )
    said, hint = refused(crm, errors.CatalogMismatchError, "setup", profile=leadfi_with(tmp_path, *changes))
    assert said.splitlines() == [
        'profile "leadfi" does not fit the database:',
        "  captured table public.lead has no column sauce",
        "  captured table public.client does not exist",
        "  target table public.activity has no column bd",
    ]
    assert hint == "mend the profile, or run: cdc-worker setup"
    crm.record()
    assert names(crm) == ["Ann"]


# Rights


@contextmanager
def role(crm: Crm, attributes: str = "", *, granted: bool = True) -> Iterator[None]:
    """Let the commands use a role of their own, with all that the worker needs or with some attributes only."""
    if granted:
        grant(crm, "cdc")
    else:
        crm.connection.execute(f"CREATE ROLE cdc LOGIN {attributes}".encode())
        crm.settings["dsn"] = make_conninfo(crm.dsn, user="cdc")
    try:
        yield
    finally:
        del crm.settings["dsn"]
        crm.execute("DROP OWNED BY cdc CASCADE")
        crm.execute("DROP ROLE cdc")


def test_a_role_without_replication(spare_crm: Crm) -> None:
    add(spare_crm, "Ann")
    with role(spare_crm):
        spare_crm.execute("ALTER ROLE cdc NOREPLICATION")
        _, hint = refused(spare_crm, errors.AuthenticationError)
        assert hint == 'as a superuser: ALTER ROLE "cdc" REPLICATION'
        follow(spare_crm, hint)
        spare_crm.record()
    assert names(spare_crm) == ["Ann"]


@pytest.mark.parametrize(
    "right",
    [
        "USAGE ON SCHEMA cdc_worker",
        "SELECT ON cdc_worker.checkpoint",
        "UPDATE ON cdc_worker.checkpoint",
        "INSERT ON activity",
        "USAGE ON SEQUENCE activity_activity_id_seq",
    ],
)
def test_a_role_without_a_right_that_the_worker_needs(spare_crm: Crm, right: str) -> None:
    add(spare_crm, "Ann")
    with role(spare_crm):
        spare_crm.connection.execute(f"REVOKE {right} FROM cdc".encode())
        said, _ = refused(spare_crm, errors.TargetUnusableError)
        assert "SQLSTATE 42501" in said
        spare_crm.connection.execute(f"GRANT {right} TO cdc".encode())
        spare_crm.record()
    assert names(spare_crm) == ["Ann"]


def test_a_role_that_may_not_set_up(spare: Cluster, tmp_path: Path) -> None:
    with crm_on(spare, tmp_path) as crm, role(crm, "REPLICATION", granted=False):
        said, hint = one_error(crm, ["setup"], 1)
        assert "SQLSTATE 42501" in said
        assert hint == "set up as the owner of the tables, or as a superuser"


def test_a_database_that_is_read_only(crm: Crm) -> None:
    add(crm, "Ann")
    database = sql.Identifier(crm.connection.info.dbname)
    crm.connection.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(database))
    said, hint = refused(crm, errors.TargetUnusableError)
    assert "SQLSTATE 25006" in said
    one_error(crm, ["setup"], 1)
    assert hint == "let the database be written, or name the primary in CDC_WORKER_DSN"
    crm.connection.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(database))
    crm.record()
    assert names(crm) == ["Ann"]


def test_tables_of_the_worker_that_someone_altered(crm: Crm) -> None:
    add(crm, "Ann")
    crm.execute("ALTER TABLE cdc_worker.checkpoint RENAME commit_lsn TO commit")
    said, _ = refused(crm, errors.TargetUnusableError, "status")
    assert "SQLSTATE 42703" in said
    crm.execute("ALTER TABLE cdc_worker.checkpoint RENAME commit TO commit_lsn")
    crm.record()
    assert names(crm) == ["Ann"]
