"""Recordings: whatever the checkpoint has passed is in them, durable and whole, whatever is killed.

They are read here by a reader of the test's own. What they should hold says pg_recvlogical, which reads a slot of its
own with the worker's options.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, LiteralString, NamedTuple

import msgspec
import pytest
import structlog
import zstandard
from application import Application, Connection
from factories import COMMITTED_AT, leadfi
from psycopg import sql
from storms import BACKEND_TERMINATED, TAKEN_OVER_ASLEEP, WALSENDER_TERMINATED, Faults, kill
from support import Crm, WorkerProcess, either_plugin, eventually, storm
from test_docs import shown
from test_reload import LEADFI, THINGS, hang_up, with_profile, within_a_commit

from cdc_worker import config, profile, recorder, slot, wal2json
from cdc_worker.changes import Begin, Received, Transaction
from cdc_worker.cluster import Cluster
from cdc_worker.errors import RecordingError
from cdc_worker.lsn import LSN
from cdc_worker.pgoutput import PLUGIN
from cdc_worker.recorder import Recorder
from cdc_worker.replication import offer
from cdc_worker.rules import compile_rules
from cdc_worker.transform import PREFIXES

MAGIC = b"\x28\xb5\x2f\xfd"


class Frame(NamedTuple):
    header: dict[str, Any]
    lines: list[bytes]


def frames(path: Path) -> list[Frame]:
    """All whole frames of a segment. What is torn may only be the last one."""
    data, found = path.read_bytes(), []
    while data:
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        try:
            text = decompressor.decompress(data)
        except zstandard.ZstdError:
            text = b""
        if not decompressor.eof:
            assert MAGIC not in data[4:], f"{path.name} goes on after a frame that is torn"
            break
        data = decompressor.unused_data
        header, *lines = text.removesuffix(b"\n").split(b"\n")
        found.append(Frame(json.loads(header), lines))
    return found


def segments(directory: Path) -> dict[str, list[Frame]]:
    """All segments by name; each is so that nothing is missing within."""
    found = {path.name: frames(path) for path in sorted(directory.iterdir())}
    for name, of in found.items():
        within, after = False, int(name.split("-")[-2], 16)
        for number, (header, lines) in enumerate(of):
            assert (header["action"], header["number"]) == ("R", number)
            assert (LSN.parse(header["after"]), header["within"]) == (after, within)
            after = LSN.parse(header["until"])
            actions = [line[11:12] for line in lines if line[11:12] in b"BC"]
            assert actions == [b"BC"[(place + within) % 2 :][:1] for place in range(len(actions))]
            within = actions[-1] == b"B" if actions else within
    return found


OURS = (b'{"action":"L"', b'{"action":"P"')


def commits(directory: Path) -> dict[LSN, list[bytes]]:
    """The lines of all whole transactions by the ends of these, as the plugin wrote them. Copies are alike."""
    found: dict[LSN, list[bytes]] = {}
    for of in segments(directory).values():
        lines: list[bytes] = []
        for line in (line for frame in of for line in frame.lines if not line.startswith(OURS)):
            lines = [line] if line.startswith(b'{"action":"B"') else [*lines, line]
            if line.startswith(b'{"action":"C"'):
                end = LSN.parse(json.loads(line)["nextlsn"])
                assert found.setdefault(end, lines) == lines
    return found


def meaning(lines: Sequence[bytes]) -> list[object]:
    """What the lines of a transaction say, with its end in place of what its begin says of that."""
    begin, *rest = [wal2json.decode(line) for line in lines]
    assert isinstance(begin, Begin)
    return [msgspec.structs.replace(begin, end_lsn=LSN.parse(json.loads(lines[-1])["nextlsn"])), *rest]


class Recorded:
    """A CRM whose worker records, and a slot from which pg_recvlogical tells what it should have recorded.

    What comes by pgoutput is recorded in lines that say the same.
    """

    def __init__(self, crm: Crm, server: Cluster) -> None:
        self.crm = crm
        self.directory = crm.directory / "recording"
        self.directory.mkdir(exist_ok=True)
        crm.settings["recording_directory"] = str(self.directory)
        self._server = server
        self._slot = f"{crm.slot}_witness"
        self._options = wal2json.options(compile_rules(profile.load("leadfi")), PREFIXES)
        crm.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", self._slot)
        for unknown in offer(
            self._options, wal2json.OPTIONAL, lambda accepted: slot.peek(crm.connection, self._slot, accepted)
        ):
            del self._options[unknown]

    def environment(self) -> dict[str, str]:
        """For programs of the server's: they are found, and connect to it."""
        directory = Path(self._server.binaries.program("pg_recvlogical")).parent
        found = self._server.environment()
        return found | {"PATH": f"{directory}:{found.get('PATH', os.defpath)}"}

    def position(self) -> LSN:
        """How far the worker has come."""
        return LSN.parse(self.crm.value("SELECT lsn::text FROM cdc_worker.checkpoint"))

    def owed(self) -> dict[LSN, list[bytes]]:
        """The lines of all transactions with changes by their ends, as pg_recvlogical prints them."""
        output = self.crm.directory / "received.jsonl"
        end = self.crm.value("SELECT pg_current_wal_flush_lsn()::text")
        arguments = ["--slot", self._slot, "--dbname", self.crm.connection.info.dbname, "--endpos", end, "--no-loop"]
        arguments += [part for name, value in self._options.items() for part in ("--option", f"{name}={value}")]
        self._server.run("pg_recvlogical", "--start", *arguments, "--file", str(output))
        found: dict[LSN, list[bytes]] = {}
        lines: list[bytes] = []
        for line in output.read_bytes().splitlines():
            lines = [line] if line.startswith(b'{"action":"B"') else [*lines, line]
            changed = any(not line.startswith((b'{"action":"B"', b'{"action":"M"')) for line in lines[:-1])
            if line.startswith(b'{"action":"C"') and changed:
                found[LSN.parse(json.loads(line)["nextlsn"])] = lines
        return found

    def holds(self, until: Sequence[LSN] = (), ends: Sequence[set[LSN]] = ()) -> int:
        """Whether all is recorded that the checkpoint has passed; returns how many transactions that are.

        `ends` are the ends of those that were recorded when the checkpoint had come up to each of `until`.
        """
        position = self.position()
        owed = {end: lines for end, lines in self.owed().items() if end <= position}
        found = commits(self.directory)
        assert owed.keys() - found.keys() == set()
        compared: Callable[[list[bytes]], object] = list if self.crm.settings.get("plugin") != PLUGIN else meaning
        assert {end for end in owed if compared(found[end]) != compared(owed[end])} == set()
        for passed, then in zip(until, ends, strict=True):
            assert {end for end in owed if end <= passed} - then == set()
        return len(owed)


@pytest.fixture
def recorded(crm: Crm, server: Cluster) -> Recorded:
    return Recorded(crm, server)


# What is recorded


def test_lines_are_those_of_pg_recvlogical_byte_for_byte(recorded: Recorded) -> None:
    crm = recorded.crm
    crm.execute("CREATE TABLE other (id int)")
    crm.add_leads(3)
    with crm.connection.transaction():
        crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', %s)", '{"changed_by": "Jörg"}')
        crm.execute("UPDATE lead SET background = %s WHERE lead_id = 1", 'a "quoted"\nline\\ and ☃' * 1000)
        crm.execute("UPDATE lead SET status = '2. proposal' WHERE lead_id = 1")
    crm.execute("INSERT INTO other VALUES (1)")
    crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{}')")
    crm.execute("UPDATE lead SET title = title")
    crm.execute("DELETE FROM lead WHERE lead_id = 2")
    crm.execute("TRUNCATE customer CASCADE")
    crm.record()
    assert recorded.holds() == 5
    assert len(commits(recorded.directory)) == 5, "what is empty is not recorded"


def test_frames_say_what_they_cover(recorded: Recorded) -> None:
    crm = recorded.crm
    began = recorded.position()
    crm.add_leads(1)
    crm.record()
    middle = recorded.position()
    crm.add_leads(1)
    crm.record()
    ((_, (first,)), (_, (second,))) = segments(recorded.directory).items()
    assert first.header == {
        "action": "R",
        "version": 1,
        "number": 0,
        "worker": crm.slot,
        "system_identifier": crm.value("SELECT system_identifier::text FROM pg_control_system()"),
        "database": crm.connection.info.dbname,
        "after": str(began),
        "until": str(middle),
        "within": False,
        "tables": ["public.contact", "public.customer", "public.lead"],
        "masked": {},
    }
    assert (second.header["after"], second.header["until"]) == (str(middle), str(recorded.position()))


def test_nobody_else_may_read_it(recorded: Recorded) -> None:
    recorded.crm.add_leads(1)
    recorded.crm.record()
    (path,) = recorded.directory.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_where_nothing_of_ours_happens_frames_say_so(recorded: Recorded) -> None:
    crm = recorded.crm
    crm.execute("CREATE TABLE other (filler text)")
    began = recorded.position()
    with crm.worker(idle_advance_interval="0.05", idle_advance_bytes="65536") as worker:
        worker.wait_for("replication_started")
        for _ in range(3):
            before = recorded.position()
            crm.execute("INSERT INTO other SELECT repeat('x', 1000) FROM generate_series(1, 500)")
            eventually(lambda before=before: recorded.position() > before)  # type: ignore[misc]
    ((_, found),) = segments(recorded.directory).items()
    assert [lines for _, lines in found] == [[]] * len(found)
    assert found[0].header["after"] == str(began)
    assert LSN.parse(found[-1].header["until"]) >= recorded.position()


def test_much_that_means_nothing_is_recorded_in_frames_that_are_held_easily(recorded: Recorded) -> None:
    crm = recorded.crm
    crm.add_leads(5_000)
    crm.record()
    crm.execute("UPDATE lead SET title = title")
    crm.execute("UPDATE lead SET title = 'CTO' WHERE lead_id = 1")
    crm.record()
    assert crm.types()[-1] == "lead_updated"
    assert recorded.holds() == 3
    sizes = [sum(map(len, lines)) for of in segments(recorded.directory).values() for _, lines in of]
    assert len(sizes) > 2
    assert max(sizes) < 4 << 20


LOOKING = """
name = "test"
[target]
table = "activity"
columns = { activity_type = "type", description = "description", metadata = "metadata", change_key = "change_key" }
constants = { activity_category = "system" }

[tables.deal]
key = "deal_id"
masked = { secret = "hidden" }
lookups.owner = { table = "owner", match = { owner_id = "owner_id" } }

[[tables.deal.rules]]
on = "insert"
type = "deal_created"
description = "{new.title} of {lookup.owner.name or 'nobody'}"

[[tables.deal.rules]]
on = "update"
changed = "*"
type = "deal_updated"
description = "{new.title} {columns}"
"""

DEALS: LiteralString = """
CREATE TABLE owner (owner_id int PRIMARY KEY, name text);
CREATE TABLE deal (deal_id int, title text, secret text, owner_id int) PARTITION BY LIST (deal_id);
CREATE TABLE deal_1 PARTITION OF deal FOR VALUES IN (1);
CREATE TABLE deal_rest PARTITION OF deal DEFAULT;
INSERT INTO owner VALUES (1, 'jane');
"""


@pytest.fixture
def deals(crm: Crm) -> Crm:
    """A partitioned table with values that are masked, and a table into which is looked."""
    with_profile(crm, LOOKING)
    crm.connection.execute(DEALS)
    crm.setup()
    return crm


def recorded_lines(crm: Crm, **settings: str) -> list[bytes]:
    """Record into a directory of its own; returns all lines but those that begin a frame."""
    directory = crm.directory / "recording"
    directory.mkdir()
    crm.record(recording_directory=str(directory), **settings)
    return [line for of in segments(directory).values() for frame in of for line in frame.lines]


def shape(lines: Sequence[bytes]) -> list[str]:
    """The actions of lines, with the tables that they are of."""
    return [" ".join(filter(None, map(json.loads(line).get, ("action", "table")))) for line in lines]


def test_what_else_it_takes_to_tell_the_same_stands_before_the_changes(deals: Crm) -> None:
    with deals.connection.transaction():
        deals.execute("INSERT INTO deal VALUES (1, 'first', 'x', 1), (2, 'second', 'x', 2), (3, 'third', 'x', NULL)")
        deals.execute("INSERT INTO deal VALUES (4, 'fourth', 'x', 1)")
    lines = recorded_lines(deals)
    lines = lines[max(number for number, line in enumerate(lines) if line.startswith(b'{"action":"B"')) :]
    assert shape(lines) == [
        *("B", "L owner", "L owner", "L owner"),
        *("P deal_1", "I deal_1", "P deal_rest", "I deal_rest", "I deal_rest", "I deal_rest", "C"),
    ]
    assert [(of["change"], of["columns"]) for of in map(json.loads, lines[1:4])] == [
        (0, [{"name": "name", "value": "jane"}]),
        (1, None),
        (3, [{"name": "name", "value": "jane"}]),
    ]
    assert json.loads(lines[4])["root"] == ["public", "deal"]


@pytest.mark.parametrize("masked", [True, False])
def test_masked_values_are_recorded_only_if_that_is_asked_for(deals: Crm, masked: bool) -> None:
    deals.execute("INSERT INTO deal VALUES (1, 'first', 'confidential', 1)")
    deals.execute("UPDATE deal SET secret = 'classified'")
    lines = recorded_lines(deals, recording_masked=str(masked))
    said = b"".join(lines)
    assert (b"confidential" in said, b"classified" in said) == (not masked, not masked)
    (directory,) = (path for path in deals.directory.iterdir() if path.name == "recording")
    ((_, found),) = segments(directory).items()
    assert found[0].header["masked"] == ({"public.deal": ["secret"]} if masked else {})
    assert found[0].header["tables"] == ["public.deal", "public.owner"]
    assert deals.types() == ["deal_created", "deal_updated"]


def test_a_table_that_is_new_in_the_profile_is_recorded_from_there_on(crm: Crm, server: Cluster) -> None:
    path = with_profile(crm, LEADFI)
    crm.execute("CREATE TABLE thing (thing_id int PRIMARY KEY)")
    recorded = Recorded(crm, server)
    with crm.worker() as worker:
        crm.add_leads(1)
        eventually(lambda: crm.types() == ["lead_created"])
        path.write_text(LEADFI + THINGS.format("thing"), "utf-8")
        crm.setup()
        hang_up(crm, worker)
        worker.wait_for("profile_reloaded")
        eventually(lambda: len(worker.events("replication_started")) > 1)
        crm.execute("INSERT INTO thing VALUES (1)")
        crm.add_leads(1)
        eventually(lambda: len(crm.types()) == 3)
    found = [frame for of in segments(recorded.directory).values() for frame in of]
    assert "public.thing" not in found[0].header["tables"]
    assert "public.thing" in found[-1].header["tables"]
    assert sum(b'"table":"thing"' in line for frame in found for line in frame.lines) == 1
    ends = [(LSN.parse(frame.header["after"]), LSN.parse(frame.header["until"])) for frame in found]
    assert [after for number, (after, _) in enumerate(ends[1:]) if after > ends[number][1]] == [], "without a gap"
    assert recorded.holds() == 2


# Whatever is killed


def busy(connection: Connection, session: int, turn: int) -> None:
    """Change one of the session's own leads, sometimes many, and now and then nothing."""
    dice = random.Random(f"{session}/{turn}")
    mine = session * 100
    for number in range(dice.choice((1, 1, 1, 3, 60))):
        lead = mine + number % 50 + 1
        match dice.randrange(4):
            case 0:
                connection.execute(
                    "UPDATE lead SET background = %s WHERE lead_id = %s", (dice.randbytes(900).hex(), lead)
                )
            case 1:
                connection.execute("UPDATE lead SET title = title WHERE lead_id = %s", (lead,))
            case _:
                connection.execute("UPDATE lead SET status = %s WHERE lead_id = %s", (f"{turn}.{number}", lead))


@either_plugin
@storm(2, chaos=40)
def test_kills_at_any_moment_leave_nothing_out(recorded: Recorded, seed: int, faults: Faults, rounds: int) -> None:
    """After each, what the checkpoint has passed by then is there by then."""
    dice, crm = random.Random(seed), recorded.crm
    crm.add_leads(300)
    passed, ends = [], []
    with Application(crm, busy):
        for _ in range(rounds):
            with crm.worker(recording_segment_bytes="65536") as worker:
                if dice.random() < 0.9:
                    worker.wait_for("replication_started")
                threading.Event().wait(dice.random() ** 2)
                kill(worker, faults)
            passed.append(recorded.position())
            ends.append(set(commits(recorded.directory)))
    crm.record()
    assert recorded.holds(passed, ends) > rounds


@pytest.mark.parametrize("plugin", ["wal2json", pytest.param("pgoutput", marks=pytest.mark.chaos)])
@storm(1, chaos=8)
def test_kills_within_one_large_commit_leave_it_whole(
    recorded: Recorded, seed: int, faults: Faults, rounds: int
) -> None:
    dice, crm = random.Random(seed), recorded.crm
    crm.add_leads(22_000)
    for number in range(rounds):
        with crm.worker() as worker:
            if number:
                worker.wait_for("replication_started")
                threading.Event().wait(dice.random() / rounds)
            with within_a_commit(crm):
                kill(worker, faults)
        assert commits(recorded.directory) == {}
    crm.record()
    assert recorded.holds() == 1
    assert crm.value("SELECT count(*) FROM activity") == 22_000


@storm(2, chaos=40)
def test_terminated_connections_leave_nothing_out(recorded: Recorded, seed: int, faults: Faults, rounds: int) -> None:
    dice, crm = random.Random(seed), recorded.crm
    crm.add_leads(300)
    end = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = %s AND (backend_type = 'walsender') = %s"
    )
    with crm.worker() as worker, Application(crm, busy):
        for _ in range(rounds):
            eventually(crm.reader)
            threading.Event().wait(dice.random() * 0.3)
            reading = dice.random() < 0.5
            ended = crm.execute(end, f"cdc-worker {crm.slot}", reading)
            faults[WALSENDER_TERMINATED if reading else BACKEND_TERMINATED] += len(ended)
        assert worker.process.poll() is None, worker.said
    crm.record()
    assert recorded.holds() > rounds


@storm(1, chaos=16)
def test_a_stand_by_that_takes_over_goes_on_in_files_of_its_own(
    recorded: Recorded, seed: int, faults: Faults, rounds: int
) -> None:
    """The active worker is killed, or is replaced and wakes up later."""
    dice, crm = random.Random(seed), recorded.crm
    crm.add_leads(300)
    with ExitStack() as stack, Application(crm, busy) as application:
        worker = stack.enter_context(crm.worker())
        worker.wait_for("replication_started")
        for number in range(rounds):
            application.go_on(dice.randint(1, 30))
            if number % 2:
                worker.process.send_signal(signal.SIGSTOP)
                successor = stack.enter_context(crm.worker("--takeover"))
                successor.wait_for("replication_started")
                worker.process.send_signal(signal.SIGCONT)
                faults[TAKEN_OVER_ASLEEP] += 1
            else:
                successor = stack.enter_context(crm.worker())
                successor.wait_for("waiting_for_slot")
                kill(worker, faults)
                successor.wait_for("replication_started")
            worker = successor
        application.go_on(5)
        worker.terminate()
    crm.record()
    assert recorded.holds() > rounds
    assert len(segments(recorded.directory)) > 1


def test_a_stand_by_writes_nothing(recorded: Recorded) -> None:
    crm = recorded.crm
    with crm.worker() as first, crm.worker(recording_directory=str(crm.directory)) as second:
        for worker in (first, second):
            eventually(lambda worker=worker: worker.events("replication_started") or worker.events("waiting_for_slot"))  # type: ignore[misc]
        crm.add_leads(3)
        eventually(lambda: len(crm.types()) == 3)
        active = recorded.directory if first.events("replication_started") else crm.directory
    assert [path.parent for path in crm.directory.rglob("*.zst")] == [active]


# A disk that can't be written


def test_a_directory_that_is_not_there_ends_run_at_its_start(recorded: Recorded) -> None:
    missing = recorded.directory / "missing"
    done = recorded.crm.command("run", recording_directory=str(missing))
    assert done.returncode == RecordingError.exit_code
    assert f'error: the recording can\'t be written to "{missing}": No such file or directory\nhint: ' in done.stderr


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match="Not a directory"):
        recorder.check(tmp_path / "file")
    recorder.check(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "it leaves nothing behind"


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[None]:
    """A file system of its own."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        pytest.skip("nothing may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_directory_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path, "ro"), pytest.raises(RecordingError, match="Read-only file system"):
        recorder.check(tmp_path)


@contextmanager
def full_disk(recorded: Recorded, worker: WorkerProcess) -> Iterator[None]:
    """There is no more room until the block is left."""
    (recorded.directory / "filler").write_bytes(bytes(1 << 20))
    yield
    (recorded.directory / "filler").unlink()


@contextmanager
def limited_files(recorded: Recorded, worker: WorkerProcess) -> Iterator[None]:
    """No file may become larger than this: a part of a frame is taken, and the rest refused."""
    before = resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    yield
    resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def directory_away(recorded: Recorded, worker: WorkerProcess) -> Iterator[None]:
    """The directory is moved away, with the file that is being written."""
    away = recorded.directory.rename(recorded.directory.with_name("away"))
    yield
    away.rename(recorded.directory)


def add_large_leads(crm: Crm, count: int) -> None:
    """Insert so many leads, each by itself, with a text that can't be compressed much."""
    dice = random.Random(1)
    for _ in range(count):
        crm.execute(
            "INSERT INTO lead (full_name, source, bd_in_charge, type, background) VALUES ('x', 'x', 'x', 'x', %s)",
            dice.randbytes(1000).hex(),
        )


@pytest.mark.parametrize("broken", [full_disk, limited_files, directory_away])
def test_a_disk_that_fails_is_waited_for_and_nothing_is_confirmed(
    recorded: Recorded, broken: Callable[[Recorded, WorkerProcess], Any]
) -> None:
    """What was recorded before is whole, and what could not be comes again."""
    crm = recorded.crm
    with ExitStack() as stack:
        if broken is full_disk:
            stack.enter_context(mounted(recorded.directory, "size=1088k"))
        worker = stack.enter_context(crm.worker())
        add_large_leads(crm, 1)
        eventually(lambda: len(crm.types()) == 1)
        with broken(recorded, worker):
            add_large_leads(crm, 200)
            assert str(recorded.directory) in worker.wait_for("recording_failed")["reason"]
            eventually(lambda: len(worker.events("recording_failed")) > 2)
            confirmed = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
            assert LSN.parse(crm.value(confirmed, crm.slot)) <= recorded.position()
            assert len(crm.types()) < 201
        eventually(lambda: len(crm.types()) == 201)
        assert worker.terminate() == 0
        assert recorded.holds() == 201


def test_once_ends_where_the_disk_fails(recorded: Recorded) -> None:
    recorded.crm.add_leads(1)
    with mounted(recorded.directory, "size=4k"):
        (recorded.directory / "filler").write_bytes(bytes(4096))
        done = recorded.crm.command("run", "--once")
    assert done.returncode == RecordingError.exit_code
    assert "No space left on device" in done.stderr
    assert recorded.crm.types() == []


# Segments


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def a_recorder(directory: Path, clock: Clock, name: str = "crm", start: int = 0, **settings: object) -> Recorder:
    given = {f"recording_{setting}": value for setting, value in settings.items()}
    return Recorder(
        directory,
        leadfi(),
        settings=config.load(None, {"name": name, **given}),
        system_identifier="1",
        database="crm",
        start=LSN(start),
        log=structlog.get_logger(),
        clock=clock,
        today=clock,
    )


def a_slice(number: int, *, size: int = 10, first: bool = True, last: bool = True) -> Transaction:
    """A slice of a commit that ends at this number, with one line of this size, hardly compressible."""
    end = LSN(number)
    received = [Received(b'{"action":"B"}')] if first else []
    line = json.dumps({"action": "I", "x": random.Random(number).randbytes(size // 2).hex()}, separators=(",", ":"))
    received.append(Received(line.encode(), ("public", "lead")))
    received += [Received(f'{{"action":"C","nextlsn":"{end}"}}'.encode())] if last else []
    return Transaction(7, LSN(number - 1), end, COMMITTED_AT, [], [], [], 0, first, last, received)


def wrote(recorder: Recorder, number: int, **slice_: Any) -> None:
    """A slice, and all before it, durable."""
    recorder.add(a_slice(number, **slice_), ())
    recorder.write(LSN(0))


def names(directory: Path) -> list[str]:
    """The segments, by the positions at which they begin."""
    return [path.name.rsplit("-", 1)[0] for path in sorted(directory.iterdir())]


def test_a_partition_is_named_anew_when_it_comes_to_another_table(tmp_path: Path) -> None:
    recorder = a_recorder(tmp_path, Clock())
    part, line = ("public", "part"), b'{"action":"T","schema":"public","table":"part"}'
    for number, root in ((10, ("public", "lead")), (20, ("public", "lead")), (30, ("public", "customer"))):
        received = [Received(b'{"action":"B"}'), Received(line, root, part), Received(b'{"action":"C"}')]
        recorder.add(msgspec.structs.replace(a_slice(number), received=received), ())
    recorder.write(LSN(30))
    recorder.close()
    ((frame,),) = segments(tmp_path).values()
    roots = [json.loads(line)["root"][1] if line[11:12] == b"P" else None for line in frame.lines]
    assert roots == [None, "lead", None, None, None, None, None, None, "customer", None, None]


def test_a_segment_ends_by_size_and_only_between_two_commits(tmp_path: Path) -> None:
    recorder = a_recorder(tmp_path, Clock(), segment_bytes=65536)
    wrote(recorder, 10)
    wrote(recorder, 20, size=200_000, last=False)
    wrote(recorder, 20, size=200_000, first=False, last=False)
    assert names(tmp_path) == ["crm-0000000000000000"]
    wrote(recorder, 20, first=False)
    wrote(recorder, 30)
    recorder.close()
    assert names(tmp_path) == ["crm-0000000000000000", "crm-0000000000000014"]
    (first, second) = segments(tmp_path).values()
    assert [(frame.header["after"], frame.header["until"], frame.header["within"]) for frame in first] == [
        ("0/0", "0/A", False),
        ("0/A", "0/A", False),
        ("0/A", "0/A", True),
        ("0/A", "0/14", True),
    ]
    assert [(frame.header["after"], frame.header["until"]) for frame in second] == [("0/14", "0/1E")]


def test_a_segment_ends_by_age_and_another_begins_when_there_is_something_to_record(tmp_path: Path) -> None:
    clock = Clock()
    recorder = a_recorder(tmp_path, clock, segment_seconds=60)
    wrote(recorder, 10)
    clock.now += 61
    recorder.tend()
    assert len(names(tmp_path)) == 1
    wrote(recorder, 20)
    clock.now += 59
    wrote(recorder, 30)
    recorder.close()
    assert names(tmp_path) == ["crm-0000000000000000", "crm-000000000000000A"]


def test_what_was_not_written_is_not_there_and_comes_again(tmp_path: Path) -> None:
    recorder = a_recorder(tmp_path, Clock())
    recorder.add(a_slice(10), ())
    recorder.close()
    assert names(tmp_path) == []


def test_a_write_without_anything_new_writes_nothing(tmp_path: Path) -> None:
    recorder = a_recorder(tmp_path, Clock(), start=10)
    recorder.write(LSN(10))
    assert names(tmp_path) == []
    wrote(recorder, 20)
    recorder.write(LSN(20))
    recorder.close()
    assert [len(of) for of in segments(tmp_path).values()] == [1]


def test_what_is_made_durable_later_is_no_frame_of_its_own(tmp_path: Path) -> None:
    recorder = a_recorder(tmp_path, Clock())
    recorder.add(a_slice(10, last=False), ())
    recorder.flush()
    recorder.write(LSN(0))
    wrote(recorder, 10, first=False)
    recorder.close()
    assert [len(of) for of in segments(tmp_path).values()] == [2]


def aged(directory: Path, clock: Clock, names: Sequence[str], *, size: int = 1 << 19) -> None:
    """Files of this size, each written a day after the one before, the last a day ago."""
    for number, name in enumerate(names):
        (directory / name).write_bytes(bytes(size))
        written = clock.now - (len(names) - number) * 86_400
        os.utime(directory / name, (written, written))


OLD = [f"crm-{number:016X}-{number:08x}.jsonl.zst" for number in (1, 2, 3, 4)]
OTHERS = ["crm-x-0000000000000001-00000001.jsonl.zst", "crm.jsonl", "crm-0000000000000001-00000001.jsonl.zst.bak"]


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, OLD),
        ({"retention_days": 2.5}, OLD[2:]),
        ({"retention_days": 0.5}, []),
        ({"retention_bytes": 3 << 19}, OLD[2:]),  # with the current one
        ({"retention_bytes": 1 << 20, "retention_days": 3.5}, OLD[3:]),
    ],
    ids=["for ever", "days", "all are old", "bytes", "both"],
)
def test_old_segments_are_deleted_the_oldest_first_and_never_the_current(
    tmp_path: Path, settings: dict[str, Any], left: list[str]
) -> None:
    clock = Clock()
    aged(tmp_path, clock, OTHERS)
    aged(tmp_path, clock, OLD)
    recorder = a_recorder(tmp_path, clock, start=256, **settings)
    wrote(recorder, 512, size=1 << 16)
    current = [name for name in names(tmp_path) if name == "crm-0000000000000100"]
    recorder.close()
    assert len(current) == 1
    found = {path.name for path in tmp_path.iterdir()}
    assert {name for name in found if not name.startswith("crm-0000000000000100")} == {*left, *OTHERS}


def test_retention_is_seen_to_where_nothing_happens(tmp_path: Path) -> None:
    clock = Clock()
    recorder = a_recorder(tmp_path, clock, retention_days=1, segment_seconds=60)
    wrote(recorder, 10)
    (path,) = tmp_path.iterdir()
    os.utime(path, (clock.now, clock.now))
    for days, left in ((0.5, 1), (1.1, 0)):
        clock.now = 1_000_000 + days * 86_400
        recorder.tend()
        assert len(names(tmp_path)) == left


# What the page says


def broken(lines: Sequence[bytes]) -> str:
    """Lines as the page has them, but in one line each, with all that differs each time alike."""
    text = "\n".join(line.decode() for line in lines)
    text = re.sub(r'("(?:after|until|lsn|nextlsn)":)"[^"]*"', r'\1"0/0"', text)
    text = re.sub(r'("(?:timestamp|system_identifier|database)":)"[^"]*"', r'\1""', text)
    return re.sub(r'"xid":\d+', '"xid":0', text)


def test_recordings_shows_what_is_recorded(crm: Crm) -> None:
    crm.slot = crm.settings["slot"] = "crm"
    with_profile(crm, LOOKING)
    crm.connection.execute(DEALS)
    crm.setup()
    crm.record()
    with crm.connection.transaction():
        crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', %s)", '{"changed_by": "jane"}')
        crm.execute("INSERT INTO deal VALUES (1, 'Fair', 'x', 1)")
        crm.execute("UPDATE deal SET title = 'Trade fair'")
    crm.record(recording_directory=str(crm.directory))
    (path,) = crm.directory.glob("*.zst")
    lines = zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read().splitlines()
    (page,) = shown("docs/recordings.md", '{"action":"R"')
    assert broken(re.sub(r"\n +", "", page).encode().splitlines()) == broken(lines)
    (name,) = shown("docs/recordings.md", "crm-")
    assert re.fullmatch(recorder._NAME, name.strip())


def test_settings_as_recordings_shows_them_are_settings(tmp_path: Path) -> None:
    (text,) = shown("docs/recordings.md", "[recording]")
    (tmp_path / "settings.toml").write_text(text)
    settings = config.load(tmp_path / "settings.toml")
    assert str(settings.recording_directory) == "/var/lib/cdc-worker"
    given = {name for name in config.Settings.model_fields if name.startswith("recording_")}
    assert {f"recording_{line.split()[0]}" for line in text.splitlines()[1:]} == given


HOSTILE: dict[str, str] = {
    "bytea_output": "escape",
    "datestyle": "SQL, DMY",
    "extra_float_digits": "-5",
    "intervalstyle": "sql_standard",
    "timezone": "Asia/Kolkata",
}


def test_recording_without_the_worker_as_the_page_has_it_gives_the_same_lines(recorded: Recorded) -> None:
    """Whatever a database's defaults would print."""
    crm = recorded.crm
    (create,) = shown("docs/recordings.md", "export PGOPTIONS")
    name = crm.connection.info.dbname
    for setting, value in HOSTILE.items():
        statement = sql.SQL("ALTER DATABASE {} SET {} = {}")
        crm.connection.execute(statement.format(sql.Identifier(name), sql.Identifier(setting), sql.Literal(value)))
    crm.reconnect()
    commands = create.replace("=crm ", f"={name} ").replace("=recording ", f"={crm.slot}_page ")
    commands = commands.replace("crm.jsonl", str(crm.directory / "crm.jsonl")).replace("--start", "--start --no-loop")
    # It would go on for ever.
    commands = commands.replace("--no-loop", '--no-loop --endpos="$END"')
    script, _, start = commands.partition("--plugin=wal2json\n")

    def run(text: str, **variables: str) -> None:
        environment = recorded.environment() | variables
        subprocess.run(["sh", "-euc", text], env=environment, check=True, capture_output=True)

    run(script + "--plugin=wal2json")
    crm.add_leads(2)
    crm.execute("UPDATE lead SET date_created = '2026-02-03 04:05:06.789' WHERE lead_id = 1")
    crm.record()
    exports = script.partition("pg_recvlogical")[0]
    run(exports + start, END=crm.value("SELECT pg_current_wal_flush_lsn()::text"))
    lines = set((crm.directory / "crm.jsonl").read_bytes().splitlines())
    found = [line for of in commits(recorded.directory).values() for line in of]
    assert len(found) == 7
    assert [line for line in found if line not in lines] == []
