"""The demo: a private server, the worker as a real process, a sales day, and two checks of what came of it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import psycopg

from cdc_worker import config, ddl, profile, shadow
from cdc_worker import setup as setting_up
from cdc_worker.binaries import Plugin
from cdc_worker.cluster import Binaries, Cluster, find_binaries
from cdc_worker.errors import CdcWorkerError
from cdc_worker.sales_day import AFTERNOON, BY_HAND, MORNING, RUSH_HOUR, Scene, faults
from cdc_worker.timeline import HEADING, POLL, Timeline, milliseconds, percentile, say

PAUSE: Final = 0.9
"""Between two scenes."""

RUSH_PAUSE: Final = 0.45

PATIENCE: Final = 20.0
"""How long the worker may need for anything; it needs a fraction of a second."""

SHOWN: Final = 10
"""So many faults are printed."""

_CHANGE: Final = "UPDATE lead SET status = '6. closed won' WHERE full_name LIKE 'Nora%'"

_WATCH: Final = (
    "SELECT activity_id, activity_category, activity_type, description, created_by"
    " FROM activity ORDER BY activity_id DESC LIMIT 15 \\watch 1"
)


class DemoError(CdcWorkerError):
    """The demo can't go on."""


def demo(*, keep: bool = False, pace: float = 1, plugin: Plugin | None = None) -> bool:
    """Play the day. Returns whether the activities are those of both lists. Pauses are multiplied by `pace`.

    With `keep`, everything stays up until Ctrl-C. Without `plugin`, wal2json is taken where it can be had.
    """
    # Nothing that is set for another server or another worker may reach this one.
    for name in [name for name in os.environ if name.startswith(("PG", "CDC_WORKER_"))]:
        del os.environ[name]
    began = time.monotonic()
    binaries = find_binaries(plugin=plugin)
    say(f"server    {binaries.origin}")
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(binaries, settings={"timezone": "UTC"}))
        say(f"          as a private cluster in {cluster.directory}, port {cluster.port}")
        dsn = _set_up(cluster)
        worker = WorkerProcess(dsn, cluster.directory / "worker.log")
        stack.callback(worker.stop)
        timeline = Timeline(dsn)
        stack.callback(timeline.stop)
        worker.start()
        say(f"worker    cdc-worker run, process {worker.pid}, streaming from slot cdc_worker\n")
        say(click.style(HEADING, underline=True))
        timeline.start()
        day = Day(dsn, worker, timeline, pace)
        day.play()
        day.wait()
        if keep:
            right = day.summary(began)
            _keep(dsn, binaries, worker, timeline)
            return right
        timeline.stop()
        ended = worker.stop()
        return day.summary(began, ended)


def _set_up(cluster: Cluster) -> str:
    cluster.createdb("leadfi")
    dsn = cluster.dsn("leadfi")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(ddl.schema("leadfi.sql").encode())
        settings = config.load(flags={"dsn": dsn, "plugin": cluster.binaries.plugin})
        done = setting_up.setup(settings, profile.load("leadfi"))
        slot = next(line for line in [*done] if line.startswith("slot "))
        shadow.install(connection)
    say(f"setup     LeadFi's tables; {slot}; shadow triggers")
    return dsn


class WorkerProcess:
    """`cdc-worker run` as a process of its own, with its log in a file."""

    def __init__(self, dsn: str, log: Path) -> None:
        self.log = log
        self._environment = os.environ | {"CDC_WORKER_DSN": dsn, "CDC_WORKER_LOG_FORMAT": "json"}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that runs; 0 while none does."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it, and wait until it streams."""
        offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cdc_worker", "run"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + PATIENCE
        while b'"replication_started"' not in self.log.read_bytes()[offset:]:
            self.check()
            if time.monotonic() > deadline:
                raise DemoError(f"the worker doesn't start to stream\n{self._log_tail()}")
            time.sleep(0.01)

    def check(self) -> None:
        """Raises DemoError if it has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise DemoError(f"the worker ended with {self._process.returncode}\n{self._log_tail()}")

    def kill(self) -> None:
        """kill -9."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def stop(self) -> str:
        """Ask it to end, and make it; says how that went."""
        process, began = self._process, time.monotonic()
        if process is None or process.poll() is not None:
            return "it had ended by itself"
        try:
            process.terminate()
            process.wait(3)
        except subprocess.TimeoutExpired:
            return "did not end within 3 s when asked to"
        finally:
            self.kill()
        return f"asked to end, it ended with {process.returncode} in {time.monotonic() - began:.1f} s"

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])


class Day:
    """The day, from the morning's first lead to the last word on its activities."""

    def __init__(self, dsn: str, worker: WorkerProcess, timeline: Timeline, pace: float) -> None:
        self._dsn = dsn
        self._worker = worker
        self._timeline = timeline
        self._pace = pace
        self._over = threading.Event()
        self._killed_at = self._started_at = datetime.now(UTC)

    def play(self) -> None:
        """All scenes, with the worker killed during the rush hour."""
        self._session(MORNING)
        say(click.style("rush hour: four sessions at once, one in a transaction that stays open", bold=True))
        with ThreadPoolExecutor(len(RUSH_HOUR)) as pool:
            try:
                sessions = [pool.submit(self._session, scenes, RUSH_PAUSE) for scenes in RUSH_HOUR]
                self._rest(2)
                say(
                    click.style(f"kill -9 {self._worker.pid}: the worker is gone, the sales go on", fg="red", bold=True)
                )
                self._worker.kill()
                self._killed_at = datetime.now(UTC)
                self._rest(2.5)
                say(click.style("the worker is started again, and goes on from its checkpoint", fg="green", bold=True))
                self._started_at = datetime.now(UTC)
                self._worker.start()
                for session in sessions:
                    session.result()
            except BaseException:
                self._over.set()
                raise
        self._rest(1)
        self._session(AFTERNOON)

    def wait(self) -> None:
        """Until the worker has written as much as is owed, or its time is up."""
        owed = sum(entry.category == "system" for entry in BY_HAND)
        deadline = time.monotonic() + PATIENCE
        while self._timeline.recorded < owed and time.monotonic() < deadline:
            self._check()
            time.sleep(0.01)
        time.sleep(0.3)  # for what should not come

    def summary(self, began: float, ended: str = "it still runs") -> bool:
        """Print it, and return whether both checks hold."""
        rows = self._timeline.rows
        types = Counter((row.entry.category, row.entry.type) for row in rows)
        say(click.style("\nsummary", bold=True))
        for (category, kind), count in sorted(types.items(), key=lambda item: (item[0][0] != "system", -item[1])):
            say(f"  {kind:20} {count:5}  {category if category != 'system' else ''}".rstrip())
        say(f"  {'activities':20} {len(rows):5}")
        for line in self._latencies():
            say(line)
        say(f"worker    killed once with kill -9 and started again; {ended}")
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            by_triggers = shadow.faults(connection)
            owed, _ = shadow.counts(connection)
        by_hand = faults(BY_HAND, [row.entry for row in sorted(rows, key=lambda row: row.activity_id)])
        _verdict(f"{len(BY_HAND)} activities, as listed by hand beside the scenes", by_hand)
        _verdict(f"{owed} system activities, as the shadow triggers' ledger tells", by_triggers)
        say(f"took      {time.monotonic() - began:.1f} s")
        return not by_hand and not by_triggers

    def _latencies(self) -> list[str]:
        system = [row for row in self._timeline.rows if row.is_system]
        back = min((row.at for row in system if row.at > self._started_at), default=self._started_at)
        waited = [row.latency for row in system if row.at > self._killed_at and row.created < back]
        others = [row for row in system if row.at <= self._killed_at or row.created >= back]
        if not others:
            return ["latency   nothing was recorded"]
        latencies = [row.latency for row in others]
        first = {row.created: row.latency for row in reversed(others)}
        return [
            f"latency   p50 {percentile(latencies, 50)}, p99 {percentile(latencies, 99)} from commit to visible,"
            f" over {len(others)} system activities",
            f"          p50 {percentile(first.values(), 50)}, p99 {percentile(first.values(), 99)} over their"
            f" {len(first)} transactions; a session looked every {POLL * 1000:.0f} ms",
            f"          without {len(waited)} that waited for the killed worker, up to"
            f" {milliseconds(max(waited, default=0))}",
        ]

    def _session(self, scenes: Sequence[Scene], pause: float = PAUSE) -> None:
        """One session of the application."""
        with psycopg.connect(self._dsn) as connection:
            for scene in scenes:
                if scene.story:
                    say(click.style(scene.story, bold=True))
                if scene.by is not None:
                    shadow.act_as(connection, scene.by)
                if scene.copy:
                    with connection.cursor().copy(scene.sql.encode()) as copy:
                        for row in scene.copy:
                            copy.write_row(row)
                else:
                    connection.execute(scene.sql.encode())
                if scene.rolled_back:
                    connection.rollback()
                else:
                    connection.commit()
                self._rest(pause)

    def _rest(self, seconds: float) -> None:
        if self._over.wait(seconds * self._pace):
            raise DemoError("the day was broken off")
        self._check()

    def _check(self) -> None:
        self._worker.check()
        self._timeline.check()


def _verdict(claim: str, wrong: Sequence[str]) -> None:
    say(f"check     {click.style('WRONG', fg='red') if wrong else click.style('ok', fg='green')}: {claim}")
    for line in wrong[:SHOWN]:
        say(f"            {line}")
    if len(wrong) > SHOWN:
        say("            … and more")


def _keep(dsn: str, binaries: Binaries, worker: WorkerProcess, timeline: Timeline) -> None:
    """Leave everything up until Ctrl-C."""
    library_path = f"LD_LIBRARY_PATH={shlex.quote(binaries.library_path)} " if binaries.library_path else ""
    psql = f"{library_path}{shlex.quote(binaries.program('psql'))} {shlex.quote(dsn)}"
    command = sys.argv[0] if Path(sys.argv[0]).name == "cdc-worker" else f"{sys.executable} -m cdc_worker"
    say(f"""
Everything is still up. Connect, and change something: its activity appears below.
  connect   {psql}
  change    {_CHANGE};
  watch     echo {shlex.quote(_WATCH)} | {psql}
  status    {command} status --dsn {shlex.quote(dsn)}
  log       tail -f {worker.log}
Ctrl-C stops and removes everything.
""")
    try:
        while True:
            worker.check()
            timeline.check()
            time.sleep(0.1)
    except KeyboardInterrupt:
        say("\nstopped, and removed")
