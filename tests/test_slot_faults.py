"""Faults of the slot, under an application that writes: each ends the worker with a code of its own, which says what is
missing, in positions and in time, and nothing goes on before someone has led on: `cdc-worker recover`.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql
from storms import Faults, Writers, kill, killed, kills_at
from support import Crm, WorkerProcess, crm_on, eventually, storm, stranger
from test_bad_input import add, one_error, refused
from test_doctor_slot import traffic
from test_verify import caught_up, missing, running

from cdc_worker import config, errors, log
from cdc_worker import profile as profiles
from cdc_worker.cluster import Binaries, Cluster
from cdc_worker.decoders import PLUGINS
from cdc_worker.errors import CdcWorkerError
from cdc_worker.failpoints import Point
from cdc_worker.replication import Replication
from cdc_worker.stop import Stop
from cdc_worker.worker import Worker

DROP = "SELECT pg_drop_replication_slot(%s)"


def drop(crm: Crm) -> None:
    crm.execute(DROP, crm.slot)


def drop_all(crm: Crm) -> None:
    """With what it is read by."""
    drop(crm)
    crm.connection.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(crm.slot)))


def make_anew(crm: Crm) -> None:
    plugin = crm.value("SELECT plugin FROM cdc_worker.checkpoint")
    drop(crm)
    crm.execute("SELECT pg_create_logical_replication_slot(%s, %s)", crm.slot, plugin)


def advance(crm: Crm) -> None:
    crm.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", crm.slot)


def get_changes(crm: Crm) -> None:
    """A person looks what is in it, by the function that takes it out."""
    crm.execute("SELECT count(*) FROM pg_logical_slot_get_changes(%s, NULL, NULL, 'format-version', '2')", crm.slot)


def names(crm: Crm) -> list[str]:
    """Of whom activities of leads tell, in order."""
    return [activity["metadata"]["lead_name"] for activity in crm.activities() if activity["lead_id"]]


def lose(crm: Crm) -> None:
    """The server discards WAL that it needed."""
    traffic(crm, 3)
    crm.execute("CHECKPOINT")
    assert crm.value("SELECT wal_status = 'lost' FROM pg_replication_slots WHERE slot_name = %s", crm.slot)


def position(crm: Crm) -> str:
    """Of the checkpoint."""
    return str(crm.value("SELECT lsn FROM cdc_worker.checkpoint WHERE worker = %s", crm.slot))


TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"


def told(said: str) -> tuple[str, datetime, str, datetime]:
    """The range that a message says is missing, with its times."""
    since = rf"changes from (\S+) \(the last change written was committed at ({TIME})[^)]*\)(?: there)?"
    until = rf"(?:to|until) (\S+)[^()]*\((?:now, )?({TIME})\)"
    found = re.search(f"{since} {until}", said)
    assert found, said
    times = [datetime.strptime(found[n], "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC) for n in (2, 4)]
    assert times[0] <= times[1]
    assert times[1] > datetime.now(UTC) - timedelta(minutes=2), "now is now"
    return found[1], times[0], found[3], times[1]


def stopped(crm: Crm, kind: type[CdcWorkerError]) -> str:
    """What `run`, `setup` and the doctor say of a gap, having written nothing."""
    before = crm.value("SELECT count(*) FROM activity")
    at = position(crm)
    said, hint = refused(crm, kind, "setup")
    since, committed, _, _ = told(said)
    assert since == at
    assert crm.value("SELECT committed_at - %s BETWEEN '0s' AND '1s' FROM cdc_worker.checkpoint", committed)
    assert hint.endswith("; then: cdc-worker recover")
    assert (crm.value("SELECT count(*) FROM activity"), position(crm)) == (before, at)
    return said


def recovered(crm: Crm) -> str:
    """What `recover` prints; it has nothing to do when it is done."""
    printed = crm.succeed("recover")
    assert "\nreconciled, by " in printed
    assert crm.succeed("recover").startswith("nothing to do: ")
    return printed


def gaps(crm: Crm) -> list[tuple[Any, ...]]:
    """What is noted: what `run` had ended with, from where until where, and whether it is reconciled."""
    return crm.execute(
        "SELECT exit_code, from_lsn::text, until_lsn::text, reconciled_at IS NOT NULL FROM cdc_worker.gap ORDER BY gap"
    )


def true_and_goes_on(crm: Crm) -> None:
    """The log is true, and what comes is recorded, once."""
    with running(crm):
        add(crm, "Zoe")
        caught_up(crm)
        assert missing(crm) == []
    assert names(crm).count("Zoe") == 1
    assert crm.value("SELECT count(*) - count(DISTINCT change_key) FROM activity") == 0
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


@pytest.mark.parametrize(
    ("plugin", "fault", "kind"),
    [
        ("wal2json", drop, errors.SlotMissingError),
        ("pgoutput", drop_all, errors.SlotMissingError),
        pytest.param("wal2json", get_changes, errors.SlotAheadError, marks=pytest.mark.chaos),
        pytest.param("wal2json", make_anew, errors.SlotAheadError, marks=pytest.mark.chaos),
        pytest.param("pgoutput", make_anew, errors.SlotAheadError, marks=pytest.mark.chaos),
        pytest.param("pgoutput", advance, errors.SlotAheadError, marks=pytest.mark.chaos),
    ],
)
def test_a_slot_that_is_meddled_with_while_the_worker_is_away(
    crm: Crm, seed: int, fault: Callable[[Crm], None], kind: type[CdcWorkerError], faults: Faults
) -> None:
    with Writers(crm, seed, sessions=1) as writers:
        with crm.worker() as worker:
            eventually(lambda: len(crm.types()) > 20)
            kill(worker, faults)
        wait_for_more(writers)
        fault(crm)
        faults[f"slot: {fault.__name__}".replace("_", " ")] += 1
        wait_for_more(writers)
        stopped(crm, kind)
        recovered(crm)
    true_and_goes_on(crm)


def wait_for_more(writers: Writers) -> None:
    since = writers.commits
    eventually(lambda: writers.commits > since + 10)


@pytest.mark.parametrize(
    "made_anew", [pytest.param(False, id="dropped", marks=pytest.mark.chaos), pytest.param(True, id="made anew")]
)
def test_a_slot_that_is_meddled_with_between_two_connections_of_a_running_worker(
    crm: Crm, seed: int, made_anew: bool, faults: Faults
) -> None:
    kind = errors.SlotAheadError if made_anew else errors.SlotMissingError
    with Writers(crm, seed, sessions=1) as writers, crm.worker() as worker:
        eventually(lambda: len(crm.types()) > 20)
        worker.process.send_signal(signal.SIGSTOP)
        crm.execute("SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots WHERE active")
        (make_anew if made_anew else drop)(crm)
        faults["walsender terminated, and the slot dropped"] += 1
        wait_for_more(writers)
        worker.process.send_signal(signal.SIGCONT)
        assert worker.wait() == kind.exit_code
        told(worker.said)
        stopped(crm, kind)
        recovered(crm)
    true_and_goes_on(crm)


def test_a_slot_that_is_made_anew_right_before_it_is_read(
    crm: Crm, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    """It was looked at, and was in order."""
    add(crm, "Ann")
    crm.record()
    add(crm, "Bob")
    start = Replication.start

    def make_anew_and_start(self: Replication, *arguments: Any, **options: Any) -> Any:
        make_anew(crm)
        faults["slot: made anew"] += 1
        return start(self, *arguments, **options)

    monkeypatch.setattr(Replication, "start", make_anew_and_start)
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    with pytest.raises(errors.SlotAheadError):
        Worker(settings, profiles.load(settings.profile), stop=Stop(), log=log.get(), once=True).run()
    assert names(crm) == ["Ann"]
    stopped(crm, errors.SlotAheadError)


def test_a_stranger_who_confirms_what_we_have_yet_to_read(server: Cluster, crm: Crm, faults: Faults) -> None:
    add(crm, "Ann")
    crm.record()
    with stranger(server, crm, "--fsync-interval=0", "--status-interval=1") as (_, pid), crm.worker() as worker:
        add(crm, "Bob")
        assert worker.wait_for("waiting_for_slot")["active_pid"] == pid
        ahead = "SELECT confirmed_flush_lsn > %s FROM pg_replication_slots WHERE slot_name = %s"
        eventually(lambda: crm.value(ahead, position(crm), crm.slot))
        crm.execute("SELECT pg_terminate_backend(%s)", pid)
        faults["slot: read by a stranger"] += 1
        assert worker.wait() == errors.SlotAheadError.exit_code
        told(worker.said)
    assert names(crm) == ["Ann"]
    stopped(crm, errors.SlotAheadError)
    recovered(crm)
    assert names(crm) == ["Ann", "Bob"]
    true_and_goes_on(crm)


@pytest.fixture(scope="module")
def tight(binaries: Binaries) -> Iterator[Cluster]:
    """A server with room for one slot, for which it keeps very little."""
    with Cluster(binaries, settings={"max_slot_wal_keep_size": "1MB", "max_replication_slots": "1"}) as server:
        yield server


@pytest.fixture
def tight_crm(tight: Cluster, tmp_path: Path, plugin: str) -> Iterator[Crm]:
    """A database there, set up for the worker."""
    with crm_on(tight, tmp_path, prepared=True, plugin=plugin) as crm:
        yield crm


def test_a_slot_that_the_server_gives_up(tight_crm: Crm, seed: int, faults: Faults) -> None:
    """What it has no room for shows as well that a slot of no use is dropped before there is another."""
    crm = tight_crm
    said, hint = one_error(crm, ["setup"], 1, slot="another")
    assert (said, hint) == ("all replication slots of the server are taken", "raise max_replication_slots")
    with Writers(crm, seed, sessions=1) as writers:
        with crm.worker() as worker:
            eventually(lambda: len(crm.types()) > 20)
            worker.process.send_signal(signal.SIGSTOP)
            lose(crm)
            faults["slot: lost"] += 1
            worker.process.send_signal(signal.SIGCONT)
            assert worker.wait() == errors.SlotLostError.exit_code
            told(worker.said)
        wait_for_more(writers)
        stopped(crm, errors.SlotLostError)
        assert ", lost)\n" in crm.succeed("status")
        assert f'\nslot "{crm.slot}" is dropped\n' in recovered(crm)
    true_and_goes_on(crm)


POINTS: tuple[Point, ...] = ("gap_noted", "slot_dropped", "slot_made", "checkpoint_made", "repaired")

CODES = [kind.exit_code for kind in (errors.SlotLostError, errors.SlotMissingError, errors.SlotAheadError)]
"""What `run` ends with where `recover` was killed at the first three of them."""


@storm(1, chaos=4)
@pytest.mark.parametrize("plugin", ["wal2json", pytest.param("pgoutput", marks=pytest.mark.chaos)])
@kills_at(*POINTS)
def test_recover_killed_at_any_point_goes_on_from_there(tight_crm: Crm, seed: int, rounds: int, faults: Faults) -> None:
    crm = tight_crm
    with Writers(crm, seed, sessions=1) as writers:
        for _ in range(rounds):
            crm.record()
            wait_for_more(writers)
            lose(crm)
            at, before = position(crm), len(gaps(crm))
            for number, point in enumerate(POINTS):
                killed(crm, faults, point, 1, "recover")
                assert [since for _, since, *_ in gaps(crm)[before:]] == [at]
                if number < len(CODES):  # it never goes on as if nothing were
                    assert crm.command("run").returncode == CODES[number]
            recovered(crm)
    assert all(reconciled for *_, reconciled in gaps(crm))
    true_and_goes_on(crm)


@storm(1, chaos=15)
def test_recover_killed_at_random_goes_on_from_there(crm: Crm, seed: int, rounds: int, faults: Faults) -> None:
    dice = random.Random(seed)
    crm.record()
    with Writers(crm, seed, sessions=1):
        for _ in range(rounds):
            dice.choice((drop, make_anew, advance))(crm)
            for _ in range(dice.randrange(1, 4)):
                with WorkerProcess(["recover"], crm.environment(), crm.directory / "recover.log") as process:
                    threading.Event().wait(dice.random() * 2)
                    kill(process, faults)
            crm.succeed("recover")
    true_and_goes_on(crm)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_database_that_is_restored_into_another_cluster(
    server: Cluster, tight: Cluster, crm: Crm, tmp_path: Path, faults: Faults
) -> None:
    """What was not recorded by the time of the dump is made up for, and what was done before the worker was led on."""
    for name in ("Ann", "Abe", "Ada", "Amy", "Art"):
        add(crm, name)
    crm.record()
    add(crm, "Bob")
    crm.execute("DELETE FROM lead WHERE full_name = 'Abe'")
    crm.execute("UPDATE lead SET status = '2' WHERE full_name IN ('Ann', 'Ada')")
    crm.execute("UPDATE cdc_worker.excluded SET until_lsn = NULL, triggers = true WHERE table_name = 'public.customer'")
    crm.execute("INSERT INTO cdc_worker.partition VALUES (%s, 'public', 'lead_old', 'public.lead', 'FF/0')", crm.slot)
    database, dump = crm.connection.info.dbname, tmp_path / "dump.sql"
    server.run("pg_dump", "--no-owner", "--file", str(dump), database)
    tight.createdb(f"{database}_restored")
    tight.run("psql", "--quiet", "--file", str(dump), f"{database}_restored")
    faults["restored into another cluster"] += 1
    restored = Crm(tight.dsn(f"{database}_restored"), crm.slot, tmp_path)
    restored.settings = crm.settings
    try:
        add(restored, "Cid")
        restored.execute("DELETE FROM lead WHERE full_name = 'Amy'")
        restored.execute("UPDATE lead SET status = '3' WHERE full_name IN ('Ada', 'Art')")
        cluster = "SELECT system_identifier::text FROM pg_control_system()"
        said = stopped(restored, errors.ClusterMismatchError)
        assert f"of the cluster {crm.value(cluster)}, and this is {restored.value(cluster)}: " in said
        assert "\npublic.lead: 7 rows, 0 agree, 7 disagree, 7 repaired by 7 activities\n" in recovered(restored)
        made = sorted((of["activity_type"], of["metadata"]["lead_name"]) for of in restored.activities()[5:])
        assert made == [
            *(("lead_created", name) for name in ("Bob", "Cid")),
            *(("lead_deleted", name) for name in ("Abe", "Amy")),
            *(("status_changed", name) for name in ("Ada", "Ann", "Art")),
        ]
        (at,) = restored.execute("SELECT system_identifier, until_system_identifier FROM cdc_worker.gap")
        assert at == (crm.value(cluster), restored.value(cluster))
        assert restored.execute("SELECT 1 FROM cdc_worker.partition") == []
        restored.execute("UPDATE lead SET status = '4' WHERE full_name = 'Ann'")
        true_and_goes_on(restored)
        statuses = "SELECT metadata ->> 'new_status' FROM activity WHERE metadata ->> 'lead_name' = 'Ann' ORDER BY 1"
        assert restored.execute(statuses) == [("2",), ("4",), (None,)]
    finally:
        restored.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database()"
        )
        restored.close()
    crm.record()
    assert names(crm)[5:] == ["Bob", "Abe", "Ann", "Ada"]


def restarted_with(server: Cluster, crm: Crm, change: Callable[[Path], object]) -> None:
    """Change its files while it is down, as one that takes its place would have them."""
    server.stop()
    change(server.data / "pg_replslot" / crm.slot)
    server.start()
    crm.reconnect()


def put_back(then: Path, slot: Path) -> None:
    """Let a slot's files be what they were in another directory, of the same owner."""
    for file in then.iterdir():
        (slot / file.name).write_bytes(file.read_bytes())


def test_a_server_whose_slot_is_behind_or_ahead(
    own_server: Cluster, own_crm: Crm, tmp_path: Path, faults: Faults
) -> None:
    """As where the slot was kept elsewhere, and is as it was a while ago; or is further than the data is."""
    crm, then, later, data = own_crm, tmp_path / "slot", tmp_path / "later", tmp_path / "data"
    add(crm, "Ann")
    crm.record()
    restarted_with(own_server, crm, lambda slot: shutil.copytree(slot, then))
    add(crm, "Bob")
    crm.record()
    assert names(crm) == ["Ann", "Bob"]
    restarted_with(own_server, crm, lambda slot: put_back(then, slot))
    faults["failover to a server whose slot is behind"] += 1
    at = "SELECT confirmed_flush_lsn < lsn FROM pg_replication_slots, cdc_worker.checkpoint WHERE slot_name = slot"
    assert crm.value(at)
    add(crm, "Cid")
    crm.record()
    assert names(crm) == ["Ann", "Bob", "Cid"]

    restarted_with(own_server, crm, lambda slot: shutil.copytree(own_server.data, data, symlinks=True))
    add(crm, "Dan")
    crm.record()
    traffic(crm, 1)
    advance(crm)  # as an idle worker does; and it is written to disk

    def without_dan(slot: Path) -> None:
        shutil.copytree(slot, later)
        restore(data, own_server.data)
        put_back(later, slot)

    restarted_with(own_server, crm, without_dan)
    faults["failover to a server whose slot is ahead"] += 1
    assert names(crm) == ["Ann", "Bob", "Cid"]
    add(crm, "Eve")  # the slot would pass her over, and whoever comes before the WAL is as long as it was
    assert crm.value("SELECT confirmed_flush_lsn > pg_current_wal_lsn() FROM pg_replication_slots")
    stopped(crm, errors.SlotAheadError)
    recovered(crm)
    assert names(crm) == ["Ann", "Bob", "Cid", "Eve"]
    true_and_goes_on(crm)


@kills_at("gap_noted")
def test_a_server_that_was_set_back_and_got_a_later_database(
    binaries: Binaries, own_server: Cluster, own_crm: Crm, tmp_path: Path, faults: Faults
) -> None:
    """The cluster is the same by its number, and its WAL has yet to come to where the checkpoint is."""
    crm, back, dump = own_crm, tmp_path / "data", tmp_path / "dump.sql"
    add(crm, "Ann")
    crm.record()
    own_server.stop()
    shutil.copytree(own_server.data, back, symlinks=True)
    own_server.start()
    crm.reconnect()
    traffic(crm, 5)
    with crm.worker(idle_advance_bytes="65536") as worker:
        worker.wait_for("replication_started")
        caught_up(crm)
        worker.terminate()
    database = crm.connection.info.dbname
    own_server.run("pg_dump", "--no-owner", "--file", str(dump), database)
    crm.close()
    own_server.stop()
    restore(back, own_server.data)
    own_server.start()
    faults["server set back"] += 1
    crm.reconnect()
    crm.execute("DROP SCHEMA public, cdc_worker CASCADE")
    crm.execute("DROP PUBLICATION IF EXISTS cdc_worker")
    crm.execute("CREATE SCHEMA public")
    own_server.run("psql", "--quiet", "--file", str(dump), database)
    add(crm, "Bob")
    said, _ = refused(crm, errors.ClusterMismatchError, "setup")
    beyond = rf"the checkpoint is at \S+ \(.* at {TIME}\), and the server's WAL ends at \S+ \({TIME}\): the server was "
    assert re.match(beyond + "set back to an earlier state, and changes up to that position would be skipped", said)
    crm.execute("SET cdc_worker.protect = off")
    crm.execute("UPDATE activity SET change_key = replace(change_key, '/00000000', '/00000001')")
    said, hint = one_error(crm, ["recover"], 1)
    assert said.startswith("activities are recorded of commits that the server, whose WAL ends at ")
    assert hint.startswith("restore the database as it was by then; or name another worker in CDC_WORKER_NAME")
    assert gaps(crm) == []
    crm.execute("UPDATE activity SET change_key = replace(change_key, '/00000001', '/00000000')")
    # What was noted at positions that this server comes to now is so from now on.
    later = position(crm)
    crm.execute("UPDATE cdc_worker.excluded SET until_lsn = %s WHERE table_name = 'public.lead'", later)
    crm.execute(
        "INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn) VALUES (%s, 'lost', %s)", crm.slot, later
    )
    crm.execute(
        "INSERT INTO cdc_worker.partition VALUES (%s, 'public', 'lead_old', 'public.lead', %s)", crm.slot, later
    )
    for begin, until in (("0/1", later), (later, "FF/0"), ("FF/0", None)):
        erased = (
            "INSERT INTO cdc_worker.erased (worker, field, key, erased_lsn, until_lsn) VALUES (%s, 'lead', '9', %s, %s)"
        )
        crm.execute(erased, crm.slot, begin, until)
    killed(crm, faults, "gap_noted", 1, "recover")
    traffic(crm, 7)
    assert crm.value("SELECT lsn < pg_current_wal_lsn() FROM cdc_worker.checkpoint"), "nothing else tells of the gap"
    said, hint = one_error(crm, ["run"], errors.ClusterMismatchError.exit_code)
    assert said.startswith(f"it was noted that changes from {later} ")
    assert hint == "run: cdc-worker recover"
    recovered(crm)
    assert names(crm) == ["Ann", "Bob"]
    noted = "SELECT from_lsn, until_lsn FROM cdc_worker.excluded WHERE table_name IN ('public.lead', 'lost') ORDER BY 1"
    stretches = crm.execute(noted) + crm.execute("SELECT erased_lsn, until_lsn FROM cdc_worker.erased ORDER BY 1")
    assert [(begin < later, until is None or until < later) for begin, until in stretches] == [(True, True)] * 4
    assert [until is None for _, until in stretches] == [False, True, False, True]
    assert crm.execute("SELECT 1 FROM cdc_worker.partition") == []
    true_and_goes_on(crm)


def restore(back: Path, data: Path) -> None:
    """Let the directory have the files that it had, of the same owner."""
    owner = data.stat()
    shutil.rmtree(data)
    shutil.copytree(back, data, symlinks=True)
    for path in (data, *data.rglob("*")):
        shutil.chown(path, owner.st_uid, owner.st_gid)
    data.chmod(0o700)
