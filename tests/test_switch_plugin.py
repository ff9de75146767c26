"""Switching the plugin, on real servers: nothing is lost or comes twice, wherever it is interrupted."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
import servers
from doctoring import ailing, healthy
from storms import Faults, Writers, kill, recorded_exactly
from support import Crm, WorkerProcess, crm_on, eventually, role, storm, stranger
from test_docs import shown, varying

from cdc_worker import config, errors, profile, shadow, slot
from cdc_worker.cluster import Binaries, Cluster
from cdc_worker.switch_plugin import published, switch_plugin

Slots = dict[str, str]


@pytest.fixture
def plugin(server: Cluster) -> str:
    """They begin with wal2json, whatever all others do."""
    if "wal2json" not in servers.plugins(server):
        pytest.skip("the server has no wal2json")
    return "auto"


def switching(crm: Crm, plugin: str | None = None, *, dry_run: bool = False) -> Iterator[str]:
    """What the command does, in this process."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    return switch_plugin(settings, profile.load(settings.profile), plugin, dry_run=dry_run)


def switch(crm: Crm, plugin: str | None = None) -> list[str]:
    """Switch; returns what is told."""
    return [*switching(crm, plugin)]


def refused(
    crm: Crm, kind: type[errors.CdcWorkerError] | tuple[type[errors.CdcWorkerError], ...], plugin: str | None = None
) -> tuple[str, str]:
    """What is told where it can't be switched, of which nothing is left."""
    before = slots(crm), state(crm)
    with pytest.raises(kind) as caught:
        switch(crm, plugin)
    assert (slots(crm), state(crm)) == before
    return str(caught.value), caught.value.hint or ""


def slots(crm: Crm) -> Slots:
    """The slots of the database, with their plugins."""
    return dict(
        crm.execute(
            "SELECT slot_name::text, plugin::text FROM pg_replication_slots WHERE database = current_database()"
        )
    )


def state(crm: Crm) -> tuple[str | None, ...]:
    """What the checkpoint says of slots."""
    (found,) = crm.execute(
        "SELECT slot, plugin, spare_slot, nonce::text, slot_created_at::text FROM cdc_worker.checkpoint"
    )
    return found


def settled(crm: Crm, plugin: str) -> None:
    """Assert that there is one slot, of this plugin, and that it is the worker's."""
    ((name, found),) = slots(crm).items()
    assert found == plugin
    assert state(crm)[:3] == (name, plugin, None)


def leads(crm: Crm) -> list[int]:
    """Whose creation is recorded, in order."""
    return [activity["lead_id"] for activity in crm.activities() if activity["activity_type"] == "lead_created"]


def complete(crm: Crm) -> bool:
    """Whether the creation of each lead is recorded, once."""
    return leads(crm) == [lead for (lead,) in crm.execute("SELECT lead_id FROM lead ORDER BY lead_id")]


@contextmanager
def streaming(crm: Crm) -> Iterator[WorkerProcess]:
    """A worker that runs, and is asked to end."""
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        yield worker
        assert worker.terminate() == 0, worker.said


def running(crm: Crm, *arguments: str) -> WorkerProcess:
    """Start `cdc-worker switch-plugin`."""
    return WorkerProcess(["switch-plugin", *arguments], crm.environment(), crm.directory / "switch.log")


# Names


def test_a_copy_is_named_for_its_plugin() -> None:
    assert slot.names("crm") == ("crm", "crm_wal2json", "crm_pgoutput")
    assert slot.names("x" * 63) == ("x" * 63, "x" * 54 + "_wal2json", "x" * 54 + "_pgoutput")


def test_every_name_is_of_another_slot_also_where_it_is_cut(crm: Crm) -> None:
    long = "x" * 54 + "_pgoutput"
    crm.execute("SELECT pg_drop_replication_slot(%s)", crm.slot)
    crm.settings["slot"] = long
    crm.setup()
    for name, plugin in (("x" * 54 + "_wal2json", "pgoutput"), (long, "wal2json")):
        switch(crm)
        assert slots(crm) == {name: plugin}


# Under load


def test_a_worker_under_load_is_switched_there_and_back_and_goes_on_by_itself(
    crm: Crm, seed: int, faults: Faults
) -> None:
    shadow.install(crm.connection)
    with streaming(crm) as worker, Writers(crm, seed, sessions=2) as writers:
        for number, plugin in enumerate(("pgoutput", "wal2json", "pgoutput"), start=2):
            switch(crm)
            eventually(lambda: len(worker.events("replication_started")) == number)  # noqa: B023  # at once
            count = crm.value("SELECT count(*) FROM activity")
            eventually(lambda: crm.value("SELECT count(*) FROM activity") > count + 20)  # noqa: B023
            settled(crm, plugin)
        assert worker.events("connection_lost") == []
        assert [event["plugin"] for event in worker.events("replication_started")] == [
            *("wal2json", "pgoutput", "wal2json", "pgoutput")
        ]
    assert writers.commits > 50
    recorded_exactly(crm, faults)
    settled(crm, "pgoutput")


def test_a_quiet_worker_hears_of_it_and_one_that_stands_by_does_when_it_takes_over(crm: Crm) -> None:
    with crm.worker() as active:
        active.wait_for("replication_started")
        with crm.worker() as standby:
            standby.wait_for("waiting_for_slot")
            assert switch(crm)[-1] == f'slot "{crm.slot}" is dropped'
            eventually(lambda: len(active.events("replication_started") + standby.events("replication_started")) == 2)
            crm.add_leads(1)
            eventually(lambda: complete(crm))
            # Who stands by may be the faster one.
            ahead, behind = (standby, active) if standby.events("replication_started") else (active, standby)
            before = len(behind.events("replication_started"))
            ahead.kill()
            eventually(lambda: len(behind.events("replication_started")) > before)
            crm.add_leads(1)
            eventually(lambda: complete(crm))
            assert behind.terminate() == 0
    settled(crm, "pgoutput")


def test_a_worker_that_does_not_answer_is_ended_and_goes_on_when_it_wakes_up(
    crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc_worker.switch_plugin.FAREWELL", 0.5)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        worker.process.send_signal(signal.SIGSTOP)
        try:
            switch(crm)
        finally:
            worker.process.send_signal(signal.SIGCONT)
        settled(crm, "pgoutput")
        crm.add_leads(2)
        eventually(lambda: complete(crm))
        assert worker.terminate() == 0


@storm(3, chaos=40)
def test_random_kills_of_worker_and_switch_lose_and_double_nothing(
    crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    with Writers(crm, seed, sessions=2):
        for _ in range(rounds):
            with crm.worker() as worker, running(crm) as switching:
                worker.wait_for("replication_started")
                threading.Event().wait(dice.random() ** 2)
                kill(switching, faults)
                kill(worker, faults)
    with streaming(crm):
        switch(crm, "pgoutput")
    recorded_exactly(crm, faults)
    settled(crm, "pgoutput")


# Within a commit

MANY = 12_000
"""So many leads are not written at once."""

WAITING: LiteralString = """
    SELECT count(*) = 0 FROM pg_stat_activity
    WHERE application_name = %s AND backend_type = 'client backend'
      AND state = 'active' AND wait_event_type IS DISTINCT FROM 'Client'
"""
"""Whether the sessions that write have nothing to do until their client speaks."""


def within_a_commit(crm: Crm, worker: WorkerProcess) -> None:
    """Come to where a part of a large commit is written, and no more of it is while the worker doesn't go on."""
    for _ in range(20):
        crm.add_leads(MANY)
        eventually(lambda: crm.value("SELECT changes FROM cdc_worker.checkpoint"))
        worker.process.send_signal(signal.SIGSTOP)
        eventually(lambda: crm.value(WAITING, f"cdc-worker {crm.slot}"))
        if crm.value("SELECT changes FROM cdc_worker.checkpoint"):
            return
        worker.process.send_signal(signal.SIGCONT)  # it was faster
    raise AssertionError("it never stopped within a commit")


def test_within_a_large_commit_it_waits_for_the_end(crm: Crm) -> None:
    with streaming(crm) as worker:
        within_a_commit(crm, worker)
        with running(crm) as switching:
            eventually(lambda: "waiting: of the commit at" in switching.printed.read_text())
            assert state(crm)[0] == crm.slot
            worker.process.send_signal(signal.SIGCONT)
            assert switching.wait() == 0, switching.said
        eventually(lambda: complete(crm))
    settled(crm, "pgoutput")


def test_within_a_commit_that_nobody_goes_on_with_it_is_refused(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc_worker.switch_plugin.ABSENCE", 0.5)
    with crm.worker() as worker:
        within_a_commit(crm, worker)
        worker.kill()
    eventually(lambda: crm.reader() is None)
    before = slots(crm)
    with pytest.raises(errors.NotRunningError, match="a part is written, and no worker writes the rest"):
        switch(crm)
    assert slots(crm) == before
    assert state(crm)[2] is None
    crm.record()
    switch(crm)
    crm.record()
    assert complete(crm)


# Interrupted


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_interrupted_after_any_step_it_is_gone_on_with(crm: Crm, steps: int) -> None:
    for plugin in ("pgoutput", "wal2json"):
        crm.add_leads(1)
        generator = switching(crm, plugin)
        assert len([*islice(generator, steps)]) == steps
        crm.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_locks JOIN pg_database d ON d.oid = database"
            " WHERE locktype = 'advisory' AND datname = current_database()"
        )
        with pytest.raises(psycopg.OperationalError):
            next(generator)
        assert len(slots(crm)) == (1 if steps == 3 else 2)
        crm.add_leads(1)
        switch(crm, plugin)
        settled(crm, plugin)
        crm.add_leads(1)
        crm.record()
        assert complete(crm)


LOCKS = {
    "before anything is done": "FOR UPDATE",
    "before the checkpoint moves": "FOR KEY SHARE",
}


@pytest.mark.parametrize("strength", LOCKS.values(), ids=LOCKS)
def test_killed_while_it_waits_it_is_gone_on_with(crm: Crm, strength: str) -> None:
    crm.add_leads(1)
    with streaming(crm):
        eventually(lambda: complete(crm))
        with psycopg.connect(crm.dsn) as locking, running(crm) as killed:
            locking.execute(f"SELECT 1 FROM cdc_worker.checkpoint {strength}".encode())
            eventually(
                lambda: crm.value(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                    " AND query LIKE '%%cdc_worker.checkpoint%%' AND datname = current_database()"
                )
            )
            killed.kill()
        assert len(slots(crm)) == (1 if strength == "FOR UPDATE" else 2)
        assert state(crm)[0] == crm.slot
        crm.add_leads(1)
        switch(crm)
        settled(crm, "pgoutput")
        crm.add_leads(1)
        eventually(lambda: complete(crm))


def test_killed_before_the_slot_from_before_is_dropped_it_is_gone_on_with(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        worker.process.send_signal(signal.SIGSTOP)
        with running(crm) as killed:
            eventually(lambda: state(crm)[0] == f"{crm.slot}_pgoutput")
            killed.kill()
        worker.process.send_signal(signal.SIGCONT)
        assert slots(crm) == {crm.slot: "wal2json", f"{crm.slot}_pgoutput": "pgoutput"}
        left = ailing(crm, "spare_slot")
        assert left.message.startswith(f'the slot "{crm.slot}" is left of a switch of the plugin that was interrupted')
        assert left.fix == "cdc-worker switch-plugin --to pgoutput"
        crm.add_leads(1)
        assert crm.succeed("switch-plugin", "--to", "pgoutput").splitlines() == [
            f'slot "{crm.slot}" is dropped',
            f'nothing to do: slot "{crm.slot}_pgoutput" is of pgoutput',
        ]
        assert healthy(crm, "spare_slot")
        settled(crm, "pgoutput")
        eventually(lambda: complete(crm))
        assert worker.terminate() == 0


def test_what_has_become_another_workers_is_not_dropped(crm: Crm) -> None:
    switch(crm)
    crm.execute("UPDATE cdc_worker.checkpoint SET spare_slot = %s", crm.slot)  # killed right after it was dropped
    with_another = crm.settings | {"name": "other"}
    crm.settings, own = with_another, crm.settings
    crm.setup()
    crm.settings = own
    assert crm.slot in slots(crm)
    switch(crm)
    assert slots(crm) == {crm.slot: slots(crm)[crm.slot], f"{crm.slot}_wal2json": "wal2json"}


def test_in_a_copy_of_the_database_nothing_is_dropped(crm: Crm, server: Cluster) -> None:
    switch(crm)
    crm.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", f"{crm.slot}_pgoutput", crm.slot)
    crm.execute("UPDATE cdc_worker.checkpoint SET spare_slot = %s", crm.slot)
    assert slot.spare(crm.connection, crm.slot) is not None
    name = crm.connection.info.dbname
    crm.close()
    server.createdb(f"{name}_copy", template=name)
    crm.reconnect()
    with psycopg.connect(server.dsn(f"{name}_copy")) as connection:
        assert slot.spare(connection, crm.slot) is None
    server.run("dropdb", f"{name}_copy")


# The publication


@pytest.mark.parametrize("statement", ["DROP PUBLICATION {}", "ALTER PUBLICATION {} DROP TABLE lead"])
def test_what_was_written_before_it_was_published_is_not_left_out(crm: Crm, statement: str) -> None:
    """The second would go wrong without a word: pgoutput leaves out what wasn't in the publication by then."""
    crm.connection.execute(statement.format(crm.slot).encode())
    said, hint = refused(crm, errors.PublicationError)
    assert said.startswith(f'the publication "{crm.slot}" ')
    assert hint == "run: cdc-worker setup"
    crm.add_leads(2)
    crm.setup()
    said, hint = refused(crm, errors.PublicationError)
    assert said == (
        f'slot "{crm.slot}" has still to read what was written before the publication "{crm.slot}" was as it is:'
        " pgoutput would leave out changes"
    )
    assert hint == "run: cdc-worker run, and beside it the same again"
    with streaming(crm):
        switch(crm)
        crm.add_leads(1)
        eventually(lambda: complete(crm))
    settled(crm, "pgoutput")


def test_a_transaction_that_began_before_it_was_published_is_not_left_out(crm: Crm) -> None:
    crm.connection.execute(f"ALTER PUBLICATION {crm.slot} DROP TABLE lead".encode())
    with streaming(crm), psycopg.connect(crm.dsn) as application:
        application.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Ann', 's', 'b', 't')")
        crm.connection.execute(f"ALTER PUBLICATION {crm.slot} ADD TABLE lead".encode())
        with running(crm) as switching:
            time.sleep(1)  # it could be through by then
            assert switching.process.poll() is None
            assert state(crm)[0] == crm.slot
            application.commit()
            assert switching.wait() == 0, switching.said
        eventually(lambda: complete(crm))
    settled(crm, "pgoutput")


# Refused


def test_what_would_be_done_is_tried_without_a_trace(crm: Crm) -> None:
    with streaming(crm):
        before = slots(crm), state(crm)
        assert [*switching(crm, dry_run=True)] == [
            f'slot "{crm.slot}" would be copied to "{crm.slot}_pgoutput" with pgoutput',
            f'worker "{crm.slot}" would go on with that, and slot "{crm.slot}" would be dropped',
        ]
        assert (slots(crm), state(crm)) == before


def test_a_slot_of_the_copys_name_is_not_touched(crm: Crm) -> None:
    name = f"{crm.slot}_pgoutput"
    crm.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", name)
    said, hint = refused(crm, errors.SlotMismatchError)
    assert said == f'slot "{name}" is there, and is not known to be this worker\'s'
    assert hint == f"see whose it is; if nobody needs it: SELECT pg_drop_replication_slot('{name}')"
    crm.connection.execute(hint.partition("needs it: ")[2].encode())
    switch(crm)
    settled(crm, "pgoutput")


def test_settings_that_name_the_other_plugin(crm: Crm) -> None:
    crm.settings["plugin"] = "wal2json"
    assert switch(crm) == [f'nothing to do: slot "{crm.slot}" is of wal2json']
    said, hint = refused(crm, errors.SettingsError, "pgoutput")
    assert said == 'the settings name the plugin "wal2json": with pgoutput the worker would refuse its slot'
    assert hint.startswith('leave out CDC_WORKER_PLUGIN, or name "pgoutput" there')
    crm.settings["plugin"] = "pgoutput"
    done = crm.command("run", "--once")
    assert done.returncode == errors.SlotMismatchError.exit_code
    assert "hint: run: cdc-worker switch-plugin" in done.stderr
    switch(crm)
    settled(crm, "pgoutput")
    crm.record()


def test_a_slot_that_a_stranger_reads(server: Cluster, crm: Crm) -> None:
    with stranger(server, crm):
        said, _ = refused(crm, errors.SlotTakenError)
        assert said.startswith(f'slot "{crm.slot}" is read by process ')


def test_a_role_that_may_not_replicate(crm: Crm) -> None:
    with role(crm, granted=False):
        said, hint = refused(crm, errors.ServerError)
    assert said == 'role "cdc" lacks REPLICATION: it may not copy a slot'
    assert hint == 'name the worker\'s role in CDC_WORKER_DSN, or as a superuser: ALTER ROLE "cdc" REPLICATION'


def test_the_workers_own_role_may_do_it(crm: Crm) -> None:
    with role(crm), streaming(crm):
        crm.succeed("switch-plugin")
        crm.add_leads(1)
        eventually(lambda: complete(crm))
        assert crm.succeed("switch-plugin", "--to", "wal2json").splitlines()[-1] == (
            f'slot "{crm.slot}_pgoutput" is dropped'
        )
        crm.add_leads(1)
        eventually(lambda: complete(crm))
    settled(crm, "wal2json")


# Afterwards


def test_every_command_knows_the_slot_by_then(crm: Crm) -> None:
    switch(crm)
    name = f"{crm.slot}_pgoutput"
    crm.setup()
    settled(crm, "pgoutput")
    with streaming(crm):
        crm.add_leads(1)
        eventually(lambda: complete(crm))
        assert f"slot:         {name} (pgoutput, reserved)" in crm.succeed("status")
        for check in ("checkpoint", "reader", "plugin", "replication_slots"):
            assert healthy(crm, check)
        crm.succeed("backfill")
        crm.succeed("verify")
    crm.succeed("cutover")
    crm.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", name, crm.slot)
    crm.execute("UPDATE cdc_worker.checkpoint SET spare_slot = %s", crm.slot)
    done = crm.succeed("teardown", "--yes")
    assert f'slot "{name}" is dropped' in done
    assert f'slot "{crm.slot}", which a switch of the plugin has left, is dropped' in done
    assert slots(crm) == {}


def test_operating_shows_what_is_printed(bare_crm: Crm) -> None:
    crm = bare_crm
    crm.slot = crm.settings["slot"] = "cdc_worker"
    crm.setup()
    for verb in ("DROP", "ADD"):
        crm.connection.execute(f"ALTER PUBLICATION cdc_worker {verb} TABLE lead".encode())
    done = crm.command("switch-plugin")
    assert shown("docs/operating.md", 'error: slot "cdc_worker" has still to read') == [done.stderr]
    with streaming(crm):
        (page,) = shown("docs/operating.md", 'slot "cdc_worker" is copied')
        assert varying(crm.succeed("switch-plugin")) == varying(page)


# On other servers


def test_on_each_server_there_and_back(each_server: Cluster, tmp_path: Path) -> None:
    """Where there are failover slots it stays one."""
    plugins = servers.plugins(each_server)
    with crm_on(each_server, tmp_path, prepared=True, begun=False) as crm:
        failover = crm.connection.info.server_version >= 170000
        crm.succeed("setup", *(["--failover"] if failover else []))
        settled(crm, plugins[0])
        if "wal2json" not in plugins:
            said, _ = refused(crm, (errors.PluginMissingError, errors.PluginRefusedError))
            assert "the output plugin wal2json" in said or "no output plugin wal2json" in said
            return
        with streaming(crm):
            for plugin in reversed(plugins):
                switch(crm)
                settled(crm, plugin)
                assert not failover or crm.value("SELECT failover FROM pg_replication_slots")
                crm.add_leads(1)
                eventually(lambda: complete(crm))


def test_slots_whose_plugin_a_new_minor_refuses_are_switched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three databases: one in whose commit the worker was stopped, and one that was published too late."""
    monkeypatch.setattr("cdc_worker.switch_plugin.ABSENCE", 0.5)
    before, after = found("distribution"), found("newest")
    with Cluster(before) as server, ExitStack() as stack:
        crms = [stack.enter_context(crm_on(server, tmp_path, prepared=True)) for _ in range(3)]
        plain, halfway, unpublished = crms
        for crm in crms:
            with streaming(crm):  # another slot of the server may have held back what is known to be in the past
                eventually(lambda: in_the_past(crm))  # noqa: B023  # at once
        with halfway.worker() as worker:
            within_a_commit(halfway, worker)
            worker.kill()
        unpublished.connection.execute(f"DROP PUBLICATION {unpublished.slot}".encode())
        for crm in crms:
            crm.add_leads(2)
            crm.close()
        server.stop()
        server.binaries = after
        if after.plugin_dir is not None:
            server.set(dynamic_library_path=f"{after.plugin_dir}:$libdir")
        server.start()
        for crm in crms:
            crm.reconnect()
            crm.add_leads(2)

        done = plain.command("run")
        assert done.returncode == errors.PluginRefusedError.exit_code
        assert "hint: to go on with pgoutput: cdc-worker switch-plugin" in done.stderr
        plain.succeed("switch-plugin")
        plain.record()
        settled(plain, "pgoutput")
        said, hint = refused(plain, errors.PluginRefusedError)
        assert said.startswith("the server refuses the output plugin wal2json")
        assert re.fullmatch('to use wal2json, as a superuser: ALTER ROLE "postgres".*"wal2json"', hint)

        assert not complete(halfway)
        assert switch(halfway)[1].startswith("waiting: of the commit at ")
        halfway.record()  # what is written is met again, and known by its keys
        assert halfway.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0
        settled(halfway, "pgoutput")

        unpublished.setup()
        said, hint = refused(unpublished, errors.PublicationError)
        assert said.endswith("pgoutput would leave out changes")
        match = re.fullmatch("to use wal2json, as a superuser: (ALTER ROLE .*); then: cdc-worker run, and .*", hint)
        assert match, hint
        unpublished.connection.execute(match[1].encode())
        with streaming(unpublished):
            switch(unpublished)
            eventually(lambda: complete(unpublished))
        settled(unpublished, "pgoutput")
        assert all(complete(crm) for crm in crms)


def in_the_past(crm: Crm) -> bool:
    """Whether the publication was made before all that the slot has still to read."""
    crm.execute("CHECKPOINT")
    crm.add_leads(1)
    return published(crm.connection, crm.slot, crm.slot)


def found(name: str) -> Binaries:
    """A server, if this machine has it."""
    try:
        return servers.find(name)
    except servers.Missing as missing:
        pytest.skip(str(missing))
