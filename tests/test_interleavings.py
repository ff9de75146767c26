"""Stream, backfill, replay, dead letters and verify in any order, and any number of times: one activity a change."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from support import Crm, storm
from test_backfill import fill
from test_replay import Workload, lose, replayed, written
from test_verify import running, verified

from cdc_worker import config, log, profile
from cdc_worker.activities import Clusters, parsed_key
from cdc_worker.verify import Verified, verify

REFUSE = """
ALTER TABLE activity ADD CONSTRAINT moody CHECK (change_key IS NULL OR mod(hashtext(change_key), 5) <> 0) NOT VALID
"""

ALLOW = "ALTER TABLE activity DROP CONSTRAINT moody"


class Interleaving:
    """One random run: what may happen to an installation, in any order."""

    def __init__(self, crm: Crm, seed: int) -> None:
        self._crm, self._random = crm, random.Random(seed)
        self._workload = Workload(crm, seed)
        self._refusing = False
        self.done: list[str] = []

    def run(self, steps: int) -> None:
        """Do so many things."""
        for _ in range(steps):
            step = self._random.choice(self._steps)
            self.done.append(step.__name__.strip("_"))
            print(self.done[-1])  # noqa: T201  # pytest shows it where a test fails
            step(self)

    def end(self) -> None:
        """All that is still to be told is."""
        if self._refusing:
            self._refuse()
        self._record()
        replayed(self._crm)
        self._fill()
        replayed(self._crm)

    def _write(self) -> None:
        self._workload.run(self._random.randint(1, 15), many=self._random.random() < 0.05)

    def _record(self) -> None:
        self._crm.record()

    def _kill(self) -> None:
        """The worker is killed at some moment of its work."""
        with self._crm.worker() as worker:
            worker.wait_for("replication_started")
            self._workload.run(self._random.randint(1, 10), many=self._random.random() < 0.2)
            worker.kill()

    def _fill(self) -> None:
        with self._crm.worker() as worker:
            worker.wait_for("replication_started")
            fill(self._crm)
            worker.terminate()

    def _switch(self) -> None:
        """The worker goes on with the other output plugin."""
        with self._crm.worker() as worker:
            worker.wait_for("replication_started")
            self._workload.run(self._random.randint(1, 10), many=self._random.random() < 0.2)
            self._crm.succeed("switch-plugin")
            worker.terminate()

    def _replay(self) -> None:
        replayed(self._crm)

    def _retry(self) -> None:
        self._crm.command("dead-letters", "retry", "--all", "--yes")

    def _verify(self) -> None:
        with self._crm.worker() as worker:
            worker.wait_for("replication_started")
            self._crm.command("verify", *(["--repair"] if self._random.random() < 0.5 else []))
            worker.terminate()

    def _refuse(self) -> None:
        """The target refuses some rows from now on, or none any more."""
        self._refusing = not self._refusing
        self._crm.execute(REFUSE if self._refusing else ALLOW)

    def _lose(self) -> None:
        """Somebody deletes activities."""
        lose(self._crm, f"hashtext(change_key) % 7 = {self._random.randrange(7)}")

    _steps = (_write, _write, _write, _record, _kill, _switch, _fill, _replay, _retry, _verify, _refuse, _lose)


def true(crm: Crm) -> list[Verified]:
    """What verify says of each table; it must be true."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        found = [*verify(settings, profile.load(settings.profile), log=log.get())]
        worker.terminate()
    assert [of for of in found if not isinstance(of, Verified)] == []
    return [of for of in found if isinstance(of, Verified)]


# What was recorded is replayed again and again: a run three times as long takes ten times as long.
@pytest.mark.parametrize(
    ("steps", "run"), [(6, 0), *(pytest.param(60, run, marks=pytest.mark.chaos) for run in range(4))]
)
def test_whatever_is_done_there_is_one_activity_a_change(
    crm: Crm, tmp_path: Path, seed: int, steps: int, run: int
) -> None:
    """Sixty steps take about forty seconds."""
    directory = tmp_path / "recording"
    directory.mkdir()
    crm.settings["recording_directory"] = str(directory)
    crm.add_leads(1)
    crm.record()
    interleaving = Interleaving(crm, seed + run)
    interleaving.run(steps)
    interleaving.end()
    assert all(of.true for of in true(crm))
    cluster = crm.value("SELECT cdc_worker.cluster()")
    keys = [parsed_key(crm.slot, Clusters(cluster), activity["change_key"]) for activity in crm.activities()]
    assert None not in keys
    once = Counter((key.kind, key.table, key.subject, key.rule, key.place) for key in keys if key is not None)
    assert [of for of, count in once.items() if count > 1] == []
    created = Counter(a["lead_id"] for a in crm.activities() if a["activity_type"] == "lead_created")
    assert [lead for lead, count in created.items() if count > 1] == []  # no key is given twice here
    # All was recorded in the end: nothing that was made up is left.
    assert {key.kind for key in keys if key is not None} == {"stream"}
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


class Mending:
    """One random run in which nothing happens any more: what was recorded is lost, made up for, and told again."""

    def __init__(self, crm: Crm, seed: int) -> None:
        self._crm, self._random = crm, random.Random(seed)
        self._refusing = False
        found = [parsed_key(crm.slot, Clusters(crm.value("SELECT cdc_worker.cluster()")), key) for key in written(crm)]
        self._commits = sorted({key.place.lsn for key in found if key is not None})

    def run(self, steps: int) -> None:
        """Do so many things, and tell all again."""
        for step in self._random.choices(self._steps, k=steps):
            print(step.__name__.strip("_"))  # noqa: T201  # pytest shows it where a test fails
            step(self)
        if self._refusing:
            self._refuse()
        replayed(self._crm)

    def _lose(self) -> None:
        lose(self._crm, f"hashtext(change_key || '{self._random.random()}') % 5 = 0")

    def _repair(self) -> None:
        verified(self._crm, repair=True)

    def _fill(self) -> None:
        fill(self._crm)

    def _replay(self) -> None:
        """A part of it."""
        since, until = sorted(self._random.sample(self._commits, 2))
        replayed(self._crm, since=since, until=until)

    def _retry(self) -> None:
        self._crm.command("dead-letters", "retry", "--all", "--yes")

    def _refuse(self) -> None:
        """The target refuses some rows from now on, or none any more."""
        self._refusing = not self._refusing
        self._crm.execute(REFUSE if self._refusing else ALLOW)

    _steps = (*(_lose, _lose, _lose, _repair, _repair, _repair), *(_fill, _replay, _replay, _retry, _refuse))


@storm(2, chaos=25)
def test_a_log_that_is_told_again_is_what_it_was_whatever_was_made_up(
    crm: Crm, tmp_path: Path, seed: int, rounds: int
) -> None:
    directory = tmp_path / "recording"
    directory.mkdir()
    crm.settings["recording_directory"] = str(directory)
    Workload(crm, seed).run(120)
    crm.record()
    before = written(crm)
    mending = Mending(crm, seed)
    with running(crm):
        for _ in range(rounds):
            mending.run(4)
            assert written(crm) == before
            assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0
        assert all(of.true for of in verified(crm)[1].values())
