from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from click.testing import CliRunner
from support import Crm, eventually

from cdc_worker import cli, demo, shadow
from cdc_worker.cluster import ClusterError
from cdc_worker.decoders import PLUGINS
from cdc_worker.sales_day import BY_HAND, Entry, faults

PATIENCE = 120
IN_HASTE = "from cdc_worker.demo import demo; raise SystemExit(not demo(keep=True, pace=0, plugin={!r}))"


@pytest.fixture
def directory() -> Iterator[Path]:
    """A temporary directory of the demo's own, into which the server's user can look as well."""
    path = Path(tempfile.mkdtemp(prefix="cdc-demo-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


class Demo:
    """The demo as a process, and what it has printed so far."""

    def __init__(self, command: list[str], directory: Path, **environment: str) -> None:
        self.out = directory.with_suffix(".out")
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"TMPDIR": str(directory)} | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def printed(self) -> str:
        return self.out.read_text()

    def wait_for(self, text: str) -> None:
        def is_there() -> bool:
            assert text in self.printed or self.process.poll() is None, self.printed
            return text in self.printed

        eventually(is_there, what=text)

    def end(self, number: signal.Signals | None = None) -> int:
        """Its exit code, after a signal or by itself."""
        if number is not None:
            self.process.send_signal(number)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.out.unlink()


def leaves_nothing(directory: Path) -> bool:
    """Whether neither a file in the directory is left, nor a process that was started with it."""

    def is_gone() -> bool:
        # A server that was stopped at once leaves a child or two to end by themselves.
        return not any(was_started_there(path) for path in Path("/proc").glob("[0-9]*"))

    def was_started_there(process: Path) -> bool:
        try:
            return f"TMPDIR={directory}\0".encode() in (process / "environ").read_bytes()
        except OSError:
            return False  # it has just ended

    eventually(is_gone, what="all processes have ended", patience=5)
    return not [*directory.iterdir()]


def test_the_demo_shows_the_day_finds_all_right_and_leaves_nothing(directory: Path) -> None:
    elsewhere = {"PGHOST": "/nowhere", "PGSSLMODE": "verify-full", "CDC_WORKER_PROFILE": "nowhere.toml"}
    day = Demo([sys.executable, "-m", "cdc_worker", "demo"], directory, **elsewhere)
    day.wait_for("took ")
    printed = day.printed
    assert day.end() == 0
    assert leaves_nothing(directory)
    assert printed.count("check     ok: ") == 2
    assert re.search(
        r"^[\d:]{8} lead_converted +jane +Lead \"Ada Lind\" converted to customer +[\d.]+ ms$", printed, re.M
    )
    assert re.search(r"^[\d:]{8} call +jane +Ada Lind: Wants to see fees in writing +manual$", printed, re.M)
    assert re.search(r"^ +… and 198 more of the same transaction +[\d.]+ ms$", printed, re.M)
    assert re.search(r"^latency +p50 [\d.]+ ms, p99 [\d.]+ ms", printed, re.M)
    assert max(map(len, printed[printed.index("time ") :].splitlines())) <= 100
    assert "\x1b" not in printed


@pytest.mark.parametrize("plugin", [PLUGINS[0], *(pytest.param(of, marks=pytest.mark.chaos) for of in PLUGINS[1:])])
def test_keep_leaves_all_up_until_it_is_interrupted(directory: Path, plugin: str) -> None:
    day = Demo([sys.executable, "-c", IN_HASTE.format(plugin)], directory)
    day.wait_for("Ctrl-C stops and removes everything.")
    assert re.match(rf"server    PostgreSQL \d+\.\d+ with {plugin}: ", day.printed)
    assert day.printed.count("check     ok: ") == 2
    match = re.search(r"--dsn '(.*)'", day.printed)
    assert match is not None, day.printed
    with psycopg.connect(match[1]) as connection:
        connection.execute("UPDATE lead SET status = '6. closed won' WHERE full_name LIKE 'Nora%'")
    day.wait_for('Nora O\'Neil: "5. integration" to "6. closed won"')
    assert day.end(signal.SIGINT) == 0
    assert leaves_nothing(directory)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.chaos), signal.SIGTERM])
def test_a_demo_that_is_broken_off_leaves_nothing(directory: Path, number: signal.Signals) -> None:
    day = Demo([sys.executable, "-m", "cdc_worker", "demo"], directory)
    day.wait_for("lead_created")
    printed = day.printed
    assert day.end(number) == 1
    assert leaves_nothing(directory)
    assert "Traceback" not in printed


def test_a_wrong_result_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "demo", lambda **given: False)
    assert CliRunner().invoke(cli.main, ["demo"]).exit_code == 1


def test_without_a_server_to_be_had_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_binaries(**given: str) -> None:
        raise ClusterError("no PostgreSQL server with wal2json found", hint="install wal2json")

    monkeypatch.setattr(demo, "find_binaries", find_binaries)
    done = CliRunner(env={}).invoke(cli.main, ["demo"])
    assert done.exit_code == 1
    assert done.output == "error: no PostgreSQL server with wal2json found\nhint: install wal2json\n"


# The list written by hand


def entry(kind: str, subject: str = "Ada", by: str = "jane", category: str = "system") -> Entry:
    return Entry(kind, subject, f"{kind} of {subject}", by, category)


CREATED, CHANGED, OTHER = entry("lead_created"), entry("status_changed"), entry("lead_created", "Nora")
CALL = entry("call", category="manual")


@pytest.mark.parametrize(
    "recorded",
    [
        pytest.param([CREATED, CALL, CHANGED, OTHER], id="as listed"),
        pytest.param([OTHER, CREATED, CHANGED, CALL], id="only the worker's on one subject have an order"),
    ],
)
def test_what_is_as_listed_has_no_faults(recorded: list[Entry]) -> None:
    assert faults([CREATED, CALL, CHANGED, OTHER], recorded) == []


@pytest.mark.parametrize(
    ("recorded", "fault"),
    [
        ([CREATED, OTHER], ["missing 1: status_changed · Ada · status_changed of Ada · jane · system"]),
        (
            [CREATED, CHANGED, CHANGED, OTHER],
            ["too many 1: status_changed · Ada · status_changed of Ada · jane · system"],
        ),
        (
            [CREATED, CHANGED._replace(created_by="bob"), OTHER],
            [
                "missing 1: status_changed · Ada · status_changed of Ada · jane · system",
                "too many 1: status_changed · Ada · status_changed of Ada · bob · system",
            ],
        ),
        ([CHANGED, CREATED, OTHER], ["out of order: Ada: status_changed · lead_created"]),
        ([], None),
    ],
)
def test_what_is_missing_doubled_altered_or_out_of_order_is_a_fault(
    recorded: list[Entry], fault: list[str] | None
) -> None:
    found = faults([CREATED, CHANGED, OTHER], recorded)
    assert found == fault if fault else len(found) == 3


def test_the_day_has_every_type_of_activity() -> None:
    assert {entry.type for entry in BY_HAND if entry.category == "system"} == {
        *("lead_created", "status_changed", "assignment_changed", "lead_converted", "lead_updated", "lead_deleted"),
        *("customer_created", "customer_updated", "customer_deleted"),
    }


# The shadow triggers


@pytest.fixture
def recorded(crm: Crm) -> Crm:
    """A lead that was created, moved on, converted and deleted, all recorded."""
    shadow.install(crm.connection)
    with crm.connection.transaction():
        shadow.act_as(crm.connection, "jane")
        crm.add_leads(2)
        crm.execute("INSERT INTO customer (customer_uid, name) VALUES (7, 'Kestrel')")
        crm.execute(
            "UPDATE lead SET status = '2. proposal', country = NULL, is_converted = true, email = 'a@b.example'"
        )
        crm.execute("INSERT INTO contact (customer_uid, lead_id) SELECT 7, lead_id FROM lead")
    crm.execute("UPDATE customer SET is_closed = true, date_closed = '2024-05-01 10:00:00.25'")
    crm.execute("UPDATE lead SET is_converted = NULL, background = repeat('ü', 300), bd_in_charge = 'bob'")
    crm.execute("UPDATE lead SET background = background, status = NULL")
    with crm.connection.transaction():
        crm.execute("SET LOCAL session_replication_role = replica")
        crm.execute("UPDATE lead SET lead_id = lead_id + 100")
    crm.execute("DELETE FROM lead WHERE full_name = 'Lead 1'")
    crm.execute("DELETE FROM customer")
    crm.record()
    return crm


def test_what_the_worker_wrote_is_what_the_shadow_triggers_tell(recorded: Crm) -> None:
    assert shadow.faults(recorded.connection) == []
    assert shadow.counts(recorded.connection) == (len(recorded.activities()),) * 2


def test_the_shadow_triggers_tell_what_is_missing_doubled_altered_or_out_of_order(recorded: Crm) -> None:
    missing = "DELETE FROM activity WHERE activity_id = 1"
    doubled = """
        INSERT INTO activity (lead_id, activity_category, activity_type, description, metadata, bd_in_charge,
                              created_by, change_key)
        SELECT lead_id, activity_category, activity_type, description, metadata, bd_in_charge, created_by, 'again'
        FROM activity WHERE activity_id = 1
    """
    altered = """UPDATE activity SET metadata = metadata || '{"status": null}' WHERE activity_id = 1"""
    later = "UPDATE activity SET activity_id = 1000 WHERE activity_id = 1"
    assert wrong_after(recorded, missing) == ["missing 1: lead_created"]
    assert wrong_after(recorded, doubled) == ["too many 1: lead_created"]
    assert wrong_after(recorded, altered) == ["missing 1: lead_created", "too many 1: lead_created"]
    assert wrong_after(recorded, later) == ["out of order: lead 1, place 1"]


def wrong_after(recorded: Crm, damage: LiteralString) -> list[str]:
    """How the faults begin that are found after some damage, which is undone."""
    with recorded.connection.transaction(force_rollback=True):
        recorded.execute("SET LOCAL cdc_worker.protect = off")
        recorded.execute(damage)
        return sorted(re.split(" '|: '", fault)[0] for fault in shadow.faults(recorded.connection))
