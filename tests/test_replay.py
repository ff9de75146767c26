"""Recordings, told again: nothing that the stream has written is written twice, and what it would have is the same."""

from __future__ import annotations

import gzip
import io
import json
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest
from application import Application, statuses
from doctoring import mend
from psycopg import sql
from storms import Faults, kill
from support import Crm, WorkerProcess, crm_on, eventually, role, storm
from test_backfill import fill
from test_lookups import looking_crm, told
from test_sales_cookbook import add, change, use
from test_verify import verified

from cdc_worker import config, log, profile
from cdc_worker.activities import Clusters, Key, Place, parsed_key
from cdc_worker.cluster import Cluster
from cdc_worker.errors import FencedError, RecordingUnreadableError, SettingsError, TargetUnusableError
from cdc_worker.late import Late
from cdc_worker.lsn import LSN
from cdc_worker.replay import Replayed, Wishes, replay
from cdc_worker.verify import Wishes as Repairs
from cdc_worker.verify import verify


@pytest.fixture
def recording(crm: Crm, tmp_path: Path) -> Path:
    """Where the worker of `crm` keeps what it consumes."""
    directory = tmp_path / "recording"
    directory.mkdir()
    crm.settings["recording_directory"] = str(directory)
    return directory


def replayed(crm: Crm, *paths: Path | str, **wishes: Any) -> Replayed:
    """`cdc-worker replay`, in this process."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    return replay(settings, profile.load(settings.profile), paths, Wishes(**wishes), log=log.get())


def added(done: Replayed) -> int:
    """How many activities were written."""
    return sum(done.activities.values())


def written(crm: Crm) -> dict[str, dict[str, Any]]:
    """The worker's activities by key, without what the target numbers by itself."""
    return {
        activity["change_key"]: {name: value for name, value in activity.items() if name != "activity_id"}
        for activity in crm.activities()
    }


def lose(crm: Crm, condition: str = "true") -> int:
    """Delete activities of the worker; returns how many."""
    with psycopg.connect(crm.dsn) as connection:
        connection.execute("SET cdc_worker.protect = off")
        return connection.execute(
            f"DELETE FROM activity WHERE change_key IS NOT NULL AND {condition}".encode()
        ).rowcount


class Workload:
    """A random application, which does the same for the same seed."""

    def __init__(self, crm: Crm, seed: int) -> None:
        self._crm, self._random = crm, random.Random(seed)
        self._leads: list[int] = []
        self._customers: list[int] = []
        self._left: list[int] = []
        self._number = 0

    def run(self, transactions: int, *, many: int = 0) -> None:
        """Commit so many transactions, and so many large ones among them."""
        sizes = [*self._random.choices((1, 1, 1, 2, 5), k=transactions), *[0] * many]
        self._random.shuffle(sizes)
        for size in sizes:
            with self._crm.connection.transaction():
                for _ in range(size):
                    self._random.choice(self._steps)(self)
                if not size:
                    self._crm.add_leads(1_500)

    def _some(self, of: list[int]) -> int | None:
        return self._random.choice(of) if of else None

    def _say(self) -> None:
        said = json.dumps({"changed_by": self._random.choice(("ann", "bob"))})
        self._crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', %s)", said)

    def _lead(self) -> None:
        self._number += 1
        background = "é\t\\ \n" * self._random.choice((0, 1, 2_000))
        self._leads.append(
            self._crm.value(
                "INSERT INTO lead (full_name, source, bd_in_charge, type, status, background)"
                " VALUES (%s, 'web', 'jane', 'exchange', %s, %s) RETURNING lead_id",
                f"Lead {self._number}",
                self._random.choice((None, "1. lead generated", "2. proposal")),
                background,
            )
        )

    def _change(self) -> None:
        lead = self._some(self._leads)
        status = self._random.choice((None, "2. proposal", "3. negotiation", "7. lost"))
        self._crm.execute("UPDATE lead SET status = %s, phone_number = %s WHERE lead_id = %s", status, status, lead)

    def _assign(self) -> None:
        self._crm.execute(
            "UPDATE lead SET bd_in_charge = %s WHERE lead_id = %s",
            self._random.choice(("jane", "joe")),
            self._some(self._leads),
        )

    def _convert(self) -> None:
        lead = self._some(self._leads)
        if lead is None:
            return
        self._number += 1
        self._customers.append(self._number)
        self._crm.execute("INSERT INTO customer (customer_uid, name) VALUES (%s, 'Acme')", self._number)
        self._crm.execute("UPDATE lead SET is_converted = true WHERE lead_id = %s", lead)
        self._crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (%s, %s)", self._number, lead)

    def _close(self) -> None:
        self._crm.execute(
            "UPDATE customer SET is_closed = NOT is_closed, name = name || '.' WHERE customer_uid = %s",
            self._some(self._customers),
        )

    def _delete(self) -> None:
        if (lead := self._some(self._leads)) is not None:
            self._leads.remove(lead)
            self._crm.execute("DELETE FROM lead WHERE lead_id = %s", lead)

    def _rename(self) -> None:
        """A lead gets another key."""
        if (lead := self._some(self._leads)) is not None:
            moved = self._crm.execute(
                "UPDATE lead SET lead_id = lead_id + 100000 WHERE lead_id = %s"
                " AND NOT EXISTS (SELECT FROM contact WHERE contact.lead_id = lead.lead_id) RETURNING lead_id",
                lead,
            )
            self._leads[self._leads.index(lead)] = moved[0][0] if moved else lead

    def _leave(self) -> None:
        """A customer goes, whose key may be given to another."""
        if (customer := self._some(self._customers)) is not None:
            self._customers.remove(customer)
            self._left.append(customer)
            self._crm.execute("DELETE FROM customer WHERE customer_uid = %s", customer)

    def _return(self) -> None:
        if self._left:
            self._customers.append(self._left.pop())
            self._crm.execute("INSERT INTO customer (customer_uid, name) VALUES (%s, 'Anew')", self._customers[-1])

    def _think_better_of_it(self) -> None:
        with self._crm.connection.transaction(force_rollback=True):
            self._crm.add_leads(3)

    _steps = (
        *(_lead, _lead, _lead, _change, _change, _change, _assign, _convert, _close, _delete, _say),
        *(_rename, _leave, _return, _think_better_of_it),
    )


def test_nothing_that_the_stream_has_written_is_written_again(crm: Crm, recording: Path, seed: int) -> None:
    Workload(crm, seed).run(60)
    crm.record()
    before = crm.activities()
    assert len(before) > 20
    done = replayed(crm)
    assert (added(done), done.already_there, done.missing) == (0, len(before), [])
    assert crm.activities() == before


def test_what_is_lost_is_brought_back_as_it_was(crm: Crm, recording: Path, seed: int) -> None:
    Workload(crm, seed).run(60)
    crm.record()
    before = written(crm)
    count = lose(crm, "activity_id % 3 = 0")
    assert count
    done = replayed(crm)
    assert (added(done), done.already_there) == (count, len(before) - count)
    assert written(crm) == before
    assert added(replayed(crm)) == 0


@pytest.fixture
def empty(server: Cluster, crm: Crm, tmp_path: Path) -> Iterator[Crm]:
    """Another database, of a worker of the same name, in which nothing happens."""
    with crm_on(server, tmp_path, prepared=True, begun=False) as other:
        other.settings["name"] = crm.slot
        other.setup()
        yield other


@storm(1, chaos=10)
def test_an_empty_database_gets_the_same(
    crm: Crm, empty: Crm, recording: Path, seed: int, faults: Faults, *, rounds: int
) -> None:
    workload = Workload(crm, seed)
    for _ in range(rounds):
        workload.run(40)
        crm.record()
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            workload.run(20, many=1)
            kill(worker, faults)
    crm.record()
    done = replayed(empty, recording)
    assert written(empty) == written(crm)
    assert added(done) == len(crm.activities())
    assert done.missing == []
    assert empty.types() == crm.types()  # in the same order
    assert added(replayed(empty, recording)) == 0


LOGGED = """
SELECT change_key, to_jsonb(log) - 'id' FROM core_interactionlog AS log
JOIN cdc_worker.written_key ON row_id = id ORDER BY change_key
"""


FOREIGN_KEYS = """
SELECT conrelid::regclass::text, conname FROM pg_constraint
WHERE contype = 'f' AND conrelid = 'core_interactionlog'::regclass
"""


def test_rows_of_other_tables_are_those_that_were_looked_up(server: Cluster, bare_crm: Crm, tmp_path: Path) -> None:
    """The target has no column for keys, either."""
    cookbook = use(bare_crm)
    with crm_on(server, tmp_path) as other:
        other.settings["name"] = cookbook.slot
        use(other)
        for table, name in other.execute(FOREIGN_KEYS):  # of rows that aren't there
            drop = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}")
            other.connection.execute(drop.format(sql.Identifier(table), sql.Identifier(name)))
        directory = tmp_path / "recording"
        directory.mkdir()
        cookbook.settings["recording_directory"] = str(directory)
        connection = cookbook.connection
        with cookbook.worker() as worker:
            worker.wait_for("replication_started")
            for number in range(1, 8):
                lead = add(connection, "core_lead", name=f"Ada {number}", assigned_to_id=1 + number % 2)
                change(connection, "core_lead", lead, status="qualified")
                opportunity = add(connection, "core_opportunity", owner_id=1)
                change(connection, "core_opportunity", opportunity, amount=9000 + number)
                add(connection, "core_quote", opportunity_id=opportunity, created_by_id=1)
                task = add(connection, "core_task", owner_id=2, related_lead_id=lead)
                change(connection, "core_task", task, status="completed", notes="é" * 200)
            worker.terminate()
        cookbook.record()
        connection.execute("UPDATE core_user SET organization_id = 2")
        connection.execute("DELETE FROM core_task")
        done = replayed(other, directory)
        assert added(done) > 30
        assert done.looked_up_now == 0
        assert other.execute(LOGGED) == cookbook.execute(LOGGED)
        assert added(replayed(other, directory)) == 0


def test_nothing_is_told_by_a_row_that_is_not_recorded_as_it_was_found(
    crm: Crm, empty: Crm, recording: Path, tmp_path: Path
) -> None:
    """The worker is killed while it looks up a row for the second change of a commit, and has one for the first."""
    looking = looking_crm(crm, tmp_path)
    looking_crm(empty, tmp_path)
    looking.execute("INSERT INTO person VALUES (5, 'eve', 1, false, NULL)")
    looking.execute("INSERT INTO task (title, person_id) VALUES ('first', 4)")
    with looking.worker() as worker, psycopg.connect(crm.dsn) as other:
        eventually(lambda: len(told(looking)) == 1)
        other.execute("LOCK TABLE team")
        looking.execute("INSERT INTO task (title, person_id) VALUES ('second', 4), ('third', 1)")
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        eventually(lambda: looking.value(waits))
        with looking.connection.transaction():
            looking.execute("SET LOCAL session_replication_role = replica")
            looking.execute("UPDATE person SET name = 'bobby' WHERE person_id = 4")
        worker.kill()
    looking.record()
    assert added(replayed(empty, recording)) == 3
    assert told(empty) == told(looking)


def test_two_replays_at_once_write_once(crm: Crm, recording: Path, seed: int) -> None:
    Workload(crm, seed).run(80)
    crm.record()
    before = written(crm)
    lose(crm)
    with ThreadPoolExecutor() as pool:
        done = [*pool.map(lambda _: replayed(crm), range(3))]
    assert written(crm) == before
    assert sum(map(added, done)) == len(before)
    assert crm.value("SELECT count(*) FROM cdc_worker.replay") == 0


def replaying(crm: Crm, *arguments: str) -> WorkerProcess:
    """Start `cdc-worker replay`."""
    return WorkerProcess(["replay", *arguments], crm.environment(), crm.directory / "replay.log")


def test_a_replay_that_is_killed_and_run_again_writes_the_rest(crm: Crm, recording: Path) -> None:
    crm.add_leads(5_000)
    crm.record()
    before = written(crm)
    lose(crm)
    with replaying(crm) as process:
        eventually(lambda: crm.value("SELECT coalesce(max(activities), 0) FROM cdc_worker.replay"))
        process.kill()
    done = replayed(crm)
    assert 0 < added(done) < 5_000
    assert written(crm) == before
    assert crm.value("SELECT count(*) FROM cdc_worker.replay") == 0


def test_a_replay_goes_on_beside_the_worker_and_the_application(crm: Crm, recording: Path) -> None:
    crm.add_leads(300)
    crm.record()
    lost = lose(crm)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        with Application(crm, statuses) as application:
            done = replayed(crm)
            application.go_on(3)
        worker.terminate()
    assert added(done) == lost
    crm.record()
    assert added(replayed(crm)) == 0
    assert crm.value("SELECT count(*) FROM lead") == crm.types().count("lead_created")


def test_a_creation_that_is_recorded_after_all_replaces_what_a_backfill_made_up(crm: Crm, recording: Path) -> None:
    crm.add_leads(3)
    crm.record()
    before = written(crm)
    lose(crm, "lead_id <> 3")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        assert fill(crm, "lead")["lead"].activities == {"lead_created": 2}
        done = replayed(crm)
        assert (added(done), done.replaced) == (2, 2)
        assert fill(crm, "lead")["lead"].activities == {}
        worker.terminate()
    assert written(crm) == before


def test_what_was_made_up_of_a_row_gives_way_when_it_turns_out_to_have_had_another_key(
    crm: Crm, recording: Path
) -> None:
    crm.add_leads(1)
    crm.execute("UPDATE lead SET lead_id = 5")
    crm.execute("UPDATE lead SET lead_id = 6")
    crm.record()
    before = written(crm)
    for lost in ("lead_id = 5", "lead_id >= 5", "true", "activity_type = 'lead_created'"):
        assert lose(crm, lost)
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            fill(crm, "lead")
            worker.terminate()
        replayed(crm)
        assert written(crm) == before, lost


def test_what_a_repair_made_up_gives_way_to_what_fills_the_hole(crm: Crm, recording: Path) -> None:
    crm.add_leads(1)
    for status in ("2. proposal", "3. negotiation", "7. lost"):
        crm.execute("UPDATE lead SET status = %s", status)
        crm.execute("UPDATE lead SET phone_number = %s", status)  # after which the repair stands
    crm.record()
    before = written(crm)
    assert lose(crm, "metadata ->> 'new_status' = '3. negotiation'") == 1
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.command("verify", "lead", "--repair")
        assert [key for key in written(crm) if "/repair/" in key]
        done = replayed(crm)
        assert (added(done), done.replaced) == (1, 1)
        worker.terminate()
    assert written(crm) == before


MOVED = "activity_type = 'lead_updated' AND metadata -> 'changes' ? 'lead_id'"

BY_ANOTHER_KEY = {
    MOVED: {"backfill lead_created", "repair lead_deleted"},
    f"({MOVED}) OR activity_type = 'lead_created'": {"backfill lead_created", "repair lead_deleted"},
    "metadata ->> 'new_status' = '3. negotiation'": {"repair status_changed"},
}
"""What of a row that gets another key is lost, and what is made up for it: under one key, or under both."""


@pytest.mark.parametrize("refused", [False, True])
def test_what_was_made_up_gives_way_by_whichever_key_its_row_was_known(
    crm: Crm, recording: Path, *, refused: bool
) -> None:
    """Also where the target has refused it."""
    crm.add_leads(1)
    crm.execute("UPDATE lead SET status = '2. proposal'")
    crm.execute("UPDATE lead SET status = '3. negotiation'")
    crm.execute("UPDATE lead SET lead_id = 5")
    crm.execute("UPDATE lead SET phone_number = '1'")
    crm.execute("UPDATE lead SET status = '7. lost'")
    crm.record()
    before = written(crm)
    cluster = crm.value("SELECT cdc_worker.cluster()")
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        for lost, made_up in BY_ANOTHER_KEY.items():
            assert lose(crm, lost)
            if refused:
                crm.execute("ALTER TABLE activity ADD CONSTRAINT refused CHECK (change_key IS NULL) NOT VALID")
            for _ in verify(settings, profile.load(settings.profile), ["lead"], Repairs(repair=True), log=log.get()):
                pass
            query = "SELECT change_key FROM cdc_worker.dead_letter" if refused else "SELECT change_key FROM activity"
            keys = [parsed_key(crm.slot, Clusters(cluster), key) for (key,) in crm.execute(query)]
            assert {f"{key.kind} {key.rule}" for key in keys if key is not None and key.kind != "stream"} == made_up
            if refused:
                crm.execute("ALTER TABLE activity DROP CONSTRAINT refused")
            replayed(crm)
            assert written(crm) == before, lost
            assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0, lost
        worker.terminate()


def test_who_was_erased_stays_erased(crm: Crm, recording: Path) -> None:
    crm.add_leads(2)
    crm.execute("UPDATE lead SET status = '7. lost'")
    crm.record()
    crm.succeed("forget", "--lead", "1", "--yes")
    blank = written(crm)
    lose(crm)
    assert added(replayed(crm)) == 4
    assert written(crm) == blank
    crm.succeed("forget", "--lead", "2", "--yes")
    blank = written(crm)
    lose(crm)
    replayed(crm)
    assert written(crm) == blank
    assert not any(activity["description"] for activity in blank.values())


@contextmanager
def before_it_writes(do: Callable[[], object]) -> Iterator[None]:
    """Have something done when a replay has all in hand that it is about to write, for the first time."""
    flush, done = Late.flush, False

    def flushed(late: Late) -> None:
        nonlocal done
        if not done:
            done = True
            do()
        flush(late)

    with mock.patch.object(Late, "flush", flushed):
        yield


def test_a_person_who_is_erased_meanwhile_is_not_told_of(crm: Crm, recording: Path) -> None:
    crm.add_leads(2)
    crm.record()
    lose(crm)
    with before_it_writes(lambda: crm.succeed("forget", "--lead", "1", "--yes")):
        assert added(replayed(crm)) == 2
    assert [activity["description"] == "" for activity in crm.activities()] == [True, False]


def test_standard_input_is_read_once(crm: Crm, recording: Path) -> None:
    crm.add_leads(2)
    crm.record()
    before = written(crm)
    (segment,) = recording.iterdir()

    def from_stdin() -> Replayed:
        with segment.open("rb") as file, mock.patch("sys.stdin", io.TextIOWrapper(file)):
            return replayed(crm, "-")

    lose(crm)
    refused = pytest.raises(FencedError, match="standard input can't be read again")
    with before_it_writes(lambda: crm.succeed("forget", "--lead", "7", "--yes")), refused:  # who isn't there
        from_stdin()
    assert written(crm) == {}
    assert added(from_stdin()) == 2
    assert written(crm) == before


def test_what_a_backfill_makes_up_meanwhile_gives_way(crm: Crm, recording: Path) -> None:
    crm.add_leads(2)
    crm.record()
    before = written(crm)
    lose(crm)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        with before_it_writes(lambda: fill(crm, "lead")):
            done = replayed(crm)
        worker.terminate()
    assert (added(done), done.replaced) == (2, 2)
    assert written(crm) == before


def test_a_dead_letter_that_succeeds_now_is_resolved_and_one_that_was_discarded_is_left(
    crm: Crm, recording: Path
) -> None:
    crm.execute("ALTER TABLE activity ADD CONSTRAINT no_web CHECK (metadata ->> 'source' <> 'website')")
    crm.add_leads(3)
    crm.record()
    done = replayed(crm)
    assert (added(done), done.known_dead_letters, done.dead_letters) == (0, 3, 0)
    crm.execute("ALTER TABLE activity DROP CONSTRAINT no_web")
    crm.execute("UPDATE cdc_worker.dead_letter SET discarded_at = now() WHERE change -> 'new' ->> 'lead_id' = '2'")
    done = replayed(crm)
    assert (added(done), done.resolved, done.discarded) == (2, 2, 1)
    assert [activity["lead_id"] for activity in crm.activities()] == [1, 3]
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 1


def test_what_comes_after_the_checkpoint_is_left_to_the_stream(crm: Crm, recording: Path) -> None:
    crm.add_leads(1)
    crm.record()
    ((lsn,),) = crm.execute("SELECT lsn FROM cdc_worker.checkpoint")
    crm.add_leads(1)
    crm.record()
    lose(crm)
    crm.execute("UPDATE cdc_worker.checkpoint SET lsn = %s", lsn)
    done = replayed(crm)
    assert (added(done), done.left_to_the_stream) == (1, 1)


def test_what_is_meant_can_be_said(crm: Crm, recording: Path) -> None:
    crm.add_leads(1)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (7, 'Acme')")
    crm.execute("UPDATE lead SET status = '7. lost', phone_number = '1'")
    crm.record()
    lose(crm)
    assert replayed(crm, dry_run=True, tables=["lead"]).activities == {
        "lead_created": 1,
        "status_changed": 1,
        "lead_updated": 1,
    }
    assert replayed(crm, dry_run=True, types=["status_changed", "customer_created"]).activities == {
        "status_changed": 1,
        "customer_created": 1,
    }
    at = crm.value("SELECT date_created FROM customer")
    assert replayed(crm, dry_run=True, since=at, tables=["lead"]).activities == {"status_changed": 1, "lead_updated": 1}
    assert replayed(crm, dry_run=True, until=at).activities == {"lead_created": 1}
    assert crm.activities() == []
    with pytest.raises(SettingsError, match="no table"):
        replayed(crm, tables=["nothing"])


def test_a_file_gets_every_activity_with_and_without_a_database(crm: Crm, recording: Path, tmp_path: Path) -> None:
    crm.add_leads(2)
    crm.record()
    output = tmp_path / "activities.jsonl"
    crm.execute("ALTER DATABASE " + crm.connection.info.dbname + " SET timezone = 'UTC'")
    crm.succeed("replay", "--output", str(output))
    assert output.stat().st_mode & 0o777 == 0o600
    told = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [line["change_key"] for line in told] == [activity["change_key"] for activity in crm.activities()]
    for line, activity in zip(told, crm.activities(), strict=True):
        assert line["columns"]["description"] == activity["description"]
        assert json.loads(line["columns"]["metadata"]) == activity["metadata"]
        assert line["type"] == activity["activity_type"]
    printed = crm.succeed("replay", str(recording), "--output", "-", dsn="", name=crm.slot)
    undated = [json.loads(line) for line in printed.splitlines()]  # without a database it isn't known how it has dates
    for line in (*told, *undated):
        del line["columns"]["date_created"]
    assert undated == told


def test_a_file_for_activities_is_no_part_of_the_recording(crm: Crm, recording: Path) -> None:
    crm.add_leads(1)
    crm.record()
    (segment,) = recording.iterdir()
    before = segment.read_bytes()
    for read, output in ((segment, segment), (recording, segment), (recording, recording / "activities.jsonl")):
        with pytest.raises(SettingsError, match="would be a part of the recording"):
            replayed(crm, read, output=str(output))
    assert [*recording.iterdir()] == [segment]
    assert segment.read_bytes() == before


def test_a_replay_needs_something_to_read_and_somewhere_to_write(crm: Crm) -> None:
    with pytest.raises(SettingsError, match="no recording is named"):
        replayed(crm)
    done = crm.command("replay", "-", dsn="")
    assert done.returncode == 2
    assert "there is no database to write to" in done.stderr


def test_a_role_that_lacks_rights_is_told_which(crm: Crm, recording: Path) -> None:
    crm.add_leads(1)
    crm.record()
    lose(crm)
    with role(crm):
        with pytest.raises(TargetUnusableError, match='role "cdc" lacks') as refused:
            replayed(crm)
        mend(crm, refused.value.hint or "")
        assert added(replayed(crm)) == 1


# What pg_recvlogical has recorded


class Witness:
    """A slot beside the worker's, which pg_recvlogical reads."""

    def __init__(self, server: Cluster, crm: Crm) -> None:
        self._server, self._crm, self._slot = server, crm, f"{crm.slot}_witness"
        crm.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", self._slot)

    def records(self, name: str, **options: str) -> Path:
        """A file of what was committed since the last time."""
        output = self._crm.directory / name
        end = self._crm.value("SELECT pg_current_wal_flush_lsn()::text")
        asked = [part for option, value in options.items() for part in ("-o", f"{option.replace('_', '-')}={value}")]
        database = self._crm.connection.info.dbname
        source = ["--slot", self._slot, "--dbname", database, "--endpos", end, "--no-loop"]
        self._server.run("pg_recvlogical", "--start", *source, *asked, "--file", str(output))
        return output


PROPERLY = {"format_version": "2", "include_lsn": "1", "include_timestamp": "1", "include_xids": "1"}


@pytest.fixture
def witness(server: Cluster, crm: Crm) -> Witness:
    return Witness(server, crm)


def test_what_pg_recvlogical_has_recorded_is_the_same(crm: Crm, witness: Witness, seed: int) -> None:
    Workload(crm, seed).run(40)
    crm.record()
    before = written(crm)
    recorded = witness.records("recorded.jsonl", **PROPERLY)
    assert added(replayed(crm, recorded)) == 0
    lose(crm)
    with gzip.open(crm.directory / "recorded.jsonl.gz", "wb") as file:
        file.write(recorded.read_bytes())
    done = replayed(crm, Path(file.name), recorded)
    assert written(crm) == before
    assert (added(done), done.missing) == (len(before), [])
    assert done.repeated


def test_what_is_recorded_without_positions_goes_into_a_file(crm: Crm, witness: Witness) -> None:
    crm.add_leads(2)
    recorded = witness.records("recorded.jsonl", format_version="2")
    output = crm.directory / "activities.jsonl"
    done = replayed(crm, recorded, output=str(output))
    told = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert added(done) == len(told) == 2
    for line in told:
        assert (line["change_key"], line["commit_lsn"], line["committed_at"]) == (None, None, None)
        assert line["columns"]["date_created"] is None
    with pytest.raises(RecordingUnreadableError, match="doesn't say when"):
        replayed(crm, recorded)


@pytest.mark.parametrize(
    "options",
    [
        {"format_version": "1", "include_lsn": "1", "include_timestamp": "1"},
        {"format_version": "2", "include_timestamp": "1"},
    ],
    ids=["with its end", "with its time"],
)
def test_what_is_recorded_without_positions_goes_into_a_target_that_has_nothing_of_its_time(
    crm: Crm, witness: Witness, options: dict[str, str]
) -> None:
    crm.add_leads(3)
    crm.execute("DELETE FROM lead WHERE lead_id = 2")
    recorded = witness.records("recorded.json", **options)
    with pytest.raises(RecordingUnreadableError, match="may still tell them"):
        replayed(crm, recorded)
    crm.record()
    with pytest.raises(RecordingUnreadableError, match=r"has recorded something of that time|may still tell them"):
        replayed(crm, recorded)
    before = crm.activities()
    lose(crm)
    crm.add_leads(1)
    crm.record()
    done = replayed(crm, recorded)
    assert added(done) == len(before) == 4
    assert added(replayed(crm, recorded)) == 0
    own = {"activity_id", "change_key"}
    told = [{name: value for name, value in of.items() if name not in own} for of in crm.activities()[1:]]
    assert told == [{name: value for name, value in of.items() if name not in own} for of in before]
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        assert fill(crm, "lead")["lead"].activities == {}
        crm.succeed("verify", "lead")
        worker.terminate()


def test_what_was_recorded_before_there_was_a_worker_is_told(server: Cluster, new_crm: Crm) -> None:
    crm = new_crm
    witness = Witness(server, crm)
    crm.add_leads(2)
    crm.setup()
    crm.add_leads(1)
    crm.record()
    done = replayed(crm, witness.records("recorded.jsonl", **PROPERLY))
    assert (added(done), done.already_there) == (2, 1)
    assert crm.value("SELECT count(DISTINCT lead_id) FROM activity") == 3


def test_what_triggers_have_told_is_left_out(crm: Crm, recording: Path) -> None:
    crm.add_leads(1)
    crm.record()
    lose(crm)
    crm.execute(
        "INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn, until_lsn, triggers)"
        " SELECT worker, 'public.lead', '0/1', lsn, true FROM cdc_worker.checkpoint"
    )
    assert added(replayed(crm)) == 0


@contextmanager
def restored_on(other: Cluster, server: Cluster, crm: Crm, tmp_path: Path) -> Iterator[Crm]:
    """The database from a dump, on another cluster."""
    dump, database = tmp_path / "dump.sql", crm.connection.info.dbname
    server.run("pg_dump", "--no-owner", "--file", str(dump), database)
    other.createdb(database)
    other.run("psql", "--quiet", "--file", str(dump), database)
    restored = Crm(other.dsn(database), crm.slot, tmp_path)
    try:
        yield restored
    finally:
        restored.close()


def test_what_another_cluster_has_recorded_is_told_under_its_own_keys(
    server: Cluster, own_server: Cluster, crm: Crm, recording: Path, tmp_path: Path
) -> None:
    """After a dump, which had its activities, was restored here; but for those that were lost."""
    crm.add_leads(3)
    crm.execute("UPDATE lead SET status = '7. lost' WHERE lead_id = 2")
    crm.record()
    before = written(crm)
    with restored_on(own_server, server, crm, tmp_path) as restored:
        restored.execute("DELETE FROM cdc_worker.checkpoint")
        restored.setup()
        restored.add_leads(1)
        restored.record()
        assert added(replayed(restored, recording)) == 0
        assert lose(restored, "lead_id = 2") == 2
        with restored.worker() as worker:
            worker.wait_for("replication_started")
            assert fill(restored, "lead")["lead"].activities == {"lead_created": 1}
            worker.terminate()
        restored.succeed("forget", "--lead", "3", "--yes")
        lose(restored, "lead_id = 3")
        done = replayed(restored, recording)
        assert (added(done), done.replaced) == (3, 1)
        after = written(restored)
        assert {key: after[key] for key in before if before[key]["lead_id"] != 3} == {
            key: activity for key, activity in before.items() if activity["lead_id"] != 3
        }
        assert [after[key]["description"] for key in before if before[key]["lead_id"] == 3] == [""]
        assert added(replayed(restored, recording)) == 0


def test_what_was_made_up_for_after_a_restore_gives_way_to_what_the_cluster_before_has_recorded(
    server: Cluster, own_server: Cluster, crm: Crm, recording: Path, tmp_path: Path
) -> None:
    """What is known to be missing there is so here."""
    crm.settings["unsigned_control"] = "true"
    crm.execute("ALTER TABLE activity ADD CONSTRAINT no_poison CHECK (metadata ->> 'new_status' <> 'poison') NOT VALID")
    crm.add_leads(6)
    crm.execute("UPDATE lead SET status = '7. lost' WHERE lead_id IN (1, 6)")
    with crm.connection.transaction():
        crm.execute("SELECT cdc_worker.set_context('{\"skip\": true}')")
        crm.execute("UPDATE lead SET status = '9' WHERE lead_id = 2")
    crm.execute("UPDATE lead SET status = 'poison' WHERE lead_id = 3")
    crm.execute("DELETE FROM lead WHERE lead_id = 5")
    crm.record()
    crm.succeed("forget", "--lead", "4", "--yes")
    assert lose(crm, "lead_id = 4 OR (activity_type <> 'lead_created' AND lead_id IN (1, 5))") == 3
    with restored_on(own_server, server, crm, tmp_path) as restored:
        restored.settings = {name: of for name, of in crm.settings.items() if name != "recording_directory"}
        restored.execute("UPDATE lead SET status = '8' WHERE lead_id = 6")
        printed = restored.succeed("recover")
        assert "\npublic.lead: 6 rows, 0 agree, 3 disagree, 3 are explained, 3 repaired by 3 activities\n" in printed
        made = [key for key in written(restored) if "/repair/" in key]
        assert len(made) == 3
        done = replayed(restored, recording)
        assert (done.activities, done.replaced) == ({"status_changed": 1, "lead_deleted": 1, "lead_created": 1}, 2)
        assert sorted(key.split("/")[4] for key in made if key in written(restored)) == ["6"]
        with restored.worker() as worker:
            worker.wait_for("replication_started")
            found, _ = verified(restored)
            worker.terminate()
        assert {of.subject: of.explained for of in found} == {"2": "skipped", "3": "dead letter"}


def test_the_cluster_of_a_recording_that_does_not_name_it_can_be_said(crm: Crm, witness: Witness) -> None:
    crm.add_leads(1)
    crm.record()
    recorded = witness.records("recorded.jsonl", **PROPERLY)
    assert added(replayed(crm, recorded, system_identifier="7")) == 1
    assert sorted(activity["change_key"].split("/")[1] for activity in crm.activities())[0] == "7"


def test_keys_without_positions_are_of_the_stream_and_not_its_own() -> None:
    place = Place(1, LSN(0x1F), 2)
    assert parsed_key("crm", Clusters("7"), "crm/7/000000000000001F/public.lead/2/lead_created") == Key(
        "stream", "public.lead", "lead_created", place
    )
    assert parsed_key("crm", Clusters("7"), "crm/7/recording/000000000000001F/public.lead/2/lead_created") == Key(
        "stream", "public.lead", "lead_created", place
    )
    # Of a time nobody knows what else was in the WAL: it comes before all that has a position.
    assert parsed_key("crm", Clusters("7"), "crm/7/recording/T000000000000001F/public.lead/2/lead_created") == Key(
        "stream", "public.lead", "lead_created", place._replace(generation=0)
    )


# What is not whole


def damage(recording: Path) -> Path:
    """Flip a byte in the middle of the first segment."""
    first = min(recording.iterdir())
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    return first


def test_what_is_whole_is_told_and_what_is_missing_is_named(crm: Crm, recording: Path) -> None:
    crm.add_leads(1)
    crm.record()
    damaged = damage(recording)
    crm.add_leads(1)
    crm.record()
    lose(crm)
    done = crm.command("replay", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert sum(told["activities"].values()) == 1
    assert [of["file"] for of in told["missing"]] == [str(damaged)]
    assert f"missing: {damaged}, from" in done.stderr
    strict = crm.command("replay", "--strict")
    assert strict.returncode == 1
    assert str(damaged) in strict.stderr


def test_who_is_interrupted_is_told_how_things_are_left(crm: Crm, recording: Path) -> None:
    crm.add_leads(1)
    crm.record()
    lose(crm)
    with crm.connection.transaction():
        crm.execute("LOCK TABLE activity IN SHARE MODE")
        with replaying(crm) as process:
            eventually(lambda: crm.value("SELECT count(*) FROM pg_locks WHERE NOT granted"))
            process.process.send_signal(signal.SIGINT)
            assert process.wait() == 130
            assert "interrupted: what is written stays: run it again for the rest" in process.said
    assert added(replayed(crm)) == 1


def test_lines_say_what_was_done(crm: Crm, recording: Path) -> None:
    crm.add_leads(2)
    crm.record()
    lose(crm, "lead_id = 1")
    assert crm.succeed("replay", "--dry-run").splitlines()[0] == (
        "1 transactions read, 1 activities would be written: 1 lead_created"
    )
