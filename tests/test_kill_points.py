"""The worker and its commands are killed wherever something is durable and the next thing isn't, and all is done once.

A process kills itself when it comes to a point: from outside, the moment would be missed nearly always.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import random
import re
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
import servers
from application import Application, everything, owed
from application import told as statuses_told
from storms import TAKEN_OVER_ASLEEP, Faults, Writers, drawn, kill, killed, kills_at, recorded_exactly
from support import Crm, either_plugin, eventually, storm
from test_erasure import told
from test_replay import lose
from test_switch_plugin import slots, state, streaming

from cdc_worker import failpoints, profile, shadow
from cdc_worker.cluster import Cluster
from cdc_worker.errors import FencedError
from cdc_worker.failpoints import POINTS, Point

TESTS = Path(__file__).parent
PACKAGE = Path(failpoints.__file__).parent


@pytest.fixture
def plugin(seed: int, server: Cluster, request: pytest.FixtureRequest) -> str:
    """Drawn for each test that doesn't try both."""
    dice = random.Random(f"{seed}/{request.node.name}")
    return os.environ.get("CDC_TEST_PLUGIN") or dice.choice(servers.plugins(server))


# Points


def marked(path: Path) -> set[Point]:
    """The points at which a file's tests have processes killed."""
    found = vars(importlib.import_module(path.stem)).values()
    marks = [mark for of in found for mark in getattr(of, "pytestmark", ()) if isinstance(mark, pytest.Mark)]
    return {point for mark in marks if mark.name == "kills_at" for point in mark.args}


@pytest.fixture(scope="module")
def killed_at() -> set[Point]:
    files = [path for path in TESTS.glob("test_*.py") if "\n@kills_at(" in path.read_text("utf-8")]
    return set().union(*map(marked, files))


@pytest.mark.parametrize("point", POINTS)
def test_at_each_point_there_is_a_test_that_kills(point: Point, killed_at: set[Point]) -> None:
    assert point in killed_at, "write one, and say so with @kills_at"


CODE = {path.name: ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}


def reaching(tree: ast.Module) -> list[ast.Call]:
    """The calls of `failpoints.reach`."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return [call for call in calls if call.func.attr == "reach" and ast.unparse(call.func) == "failpoints.reach"]  # type: ignore[attr-defined]


def test_each_point_is_somewhere_in_the_code() -> None:
    found: set[str] = set()
    for (argument,) in (call.args for tree in CODE.values() for call in reaching(tree)):
        choices = [argument.body, argument.orelse] if isinstance(argument, ast.IfExp) else [argument]
        found.update(map(ast.literal_eval, choices))
    assert found == {*POINTS}


def test_in_production_to_reach_a_point_is_to_do_nothing() -> None:
    """Nothing puts another function in the place of `reach`, and nothing outside the process can ask for one."""
    assert failpoints.reach is failpoints.nothing
    (function,) = (node for node in CODE["failpoints.py"].body if isinstance(node, ast.FunctionDef))
    assert [type(statement) for statement in function.body] == [ast.Expr], "a docstring and no more"
    imported = {ast.unparse(of) for of in CODE["failpoints.py"].body if isinstance(of, ast.Import | ast.ImportFrom)}
    assert imported == {
        "from __future__ import annotations",
        "from collections.abc import Callable",
        "from typing import Final, Literal, get_args",
    }
    for name, tree in CODE.items():
        nodes = [*ast.walk(tree)]
        uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == "failpoints"]
        assert len(uses) == len(reaching(tree)), f"{name} does something else with them than to reach one"
        others = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "cdc_worker.failpoints"]
        assert others == [], f"{name} has a copy of what it imports, in whose place nothing can be put"


def test_the_faults_have_each_point_in_their_table() -> None:
    text = (TESTS.parent / "docs" / "faults.md").read_text("utf-8")
    section = text.partition("\n## Where the worker is killed\n")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \| \S[^|]* \| \S[^|]* \|$", section, re.MULTILINE)) == POINTS


# The stream

STREAM: tuple[Point, ...] = (
    *("received", "within_transaction", "before_write", "before_commit", "committed", "confirmed"),
    *("predecessor_ended", "taken_over"),
)

MOST: dict[Point, int] = {
    **{"received": 20, "within_transaction": 3, "predecessor_ended": 1, "taken_over": 1},
    **{"refused": 1, "rolled_back": 20, "letters_inserted": 2, "part_written": 1},
}
"""At which time a worker is killed there, at the latest; of others at the fifth."""


def run_killed(crm: Crm, faults: Faults, dice: random.Random, point: Point) -> None:
    """Run the worker until it is killed there, at the first time that it comes there or a later one."""
    killed(crm, faults, point, dice.randint(1, MOST.get(point, 5)), "run")


@either_plugin
@storm(1, chaos=10)
@kills_at(*STREAM)
def test_a_worker_killed_at_any_point_of_the_stream_loses_and_doubles_nothing(
    crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    with Writers(crm, seed, sessions=2):
        for point in drawn(STREAM, rounds, dice):
            if point == "within_transaction":
                crm.add_leads(3_500)
            run_killed(crm, faults, dice, point)
    recorded_exactly(crm, faults)


@storm(2, chaos=20)
@kills_at("idle_advance", "idle_advanced")
def test_a_worker_killed_as_it_notes_where_a_quiet_stream_is(crm: Crm, seed: int, faults: Faults, rounds: int) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    crm.execute("CREATE TABLE other (filler text)")
    for point in drawn(("idle_advance", "idle_advanced"), rounds, dice):
        crm.add_leads(dice.randint(1, 3))
        crm.execute("INSERT INTO other SELECT repeat('x', 1000) FROM generate_series(1, 200)")
        killed(crm, faults, point, 1, "run", idle_advance_interval="0.05", idle_advance_bytes="65536")
    recorded_exactly(crm, faults)


@storm(1, chaos=10)
@kills_at("predecessor_ended", "taken_over")
def test_who_takes_over_from_a_worker_that_sleeps_is_killed_before_and_after_it_is_the_owner(
    crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    """What the other had in hand is either written or never will be, also when it wakes up."""
    dice = random.Random(seed)
    shadow.install(crm.connection)
    with Writers(crm, seed, sessions=2):
        for point in drawn(("predecessor_ended", "taken_over"), rounds, dice):
            with crm.worker() as sleeper:
                sleeper.wait_for("replication_started")
                threading.Event().wait(dice.random() * 0.1)
                sleeper.process.send_signal(signal.SIGSTOP)
                killed(crm, faults, point, 1, "run", "--takeover")
                sleeper.process.send_signal(signal.SIGCONT)
                faults[TAKEN_OVER_ASLEEP] += 1
                if point == "taken_over":
                    assert sleeper.wait() == FencedError.exit_code
                else:
                    eventually(lambda: len(sleeper.events("replication_started")) == 2)  # at once
    recorded_exactly(crm, faults)


# What the target refuses

REFUSED: tuple[Point, ...] = ("refused", "rolled_back", "letters_inserted", "part_written", "before_commit")

RETRIED: tuple[Point, ...] = ("letters_taken_up", "letters_retried")

HALF_REFUSED = """
INSERT INTO lead (full_name, source, bd_in_charge, type)
SELECT CASE n % 2 WHEN 0 THEN 'Refused ' || n ELSE 'Lead ' || n END, 'web', 'jane', 't' FROM generate_series(1, 120) n
"""
"""So many are not written in one transaction."""


@storm(1, chaos=7)
@kills_at(*REFUSED, *RETRIED)
def test_a_row_that_is_refused_is_one_dead_letter_and_tried_again_one_activity(
    crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    crm.execute("ALTER TABLE activity ADD CONSTRAINT fault CHECK (description NOT LIKE '%%Refused%%')")
    with Writers(crm, seed, sessions=2):
        for point in drawn(REFUSED, rounds, dice):
            crm.connection.execute(HALF_REFUSED)
            run_killed(crm, faults, dice, point)
    crm.record()
    refused = crm.value("SELECT count(*) FROM lead WHERE full_name LIKE 'Refused%%'")
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == refused
    crm.execute("ALTER TABLE activity DROP CONSTRAINT fault")
    for point in drawn(RETRIED, rounds, dice):
        which = "--all"
        if point == "letters_taken_up":
            which = str(crm.value("SELECT min(dead_letter_id) FROM cdc_worker.dead_letter"))
            crm.succeed("dead-letters", "discard", which, "--yes")
        killed(crm, faults, point, 1, "dead-letters", "retry", which)
    crm.succeed("dead-letters", "retry", "--all")
    recorded_exactly(crm, faults)


# Recordings, and what comes late

RECORDED: tuple[Point, ...] = ("frame_appended", "recorded", "committed")

LATE: tuple[Point, ...] = ("late_registered", "late_written", "before_commit")

REWRITTEN: tuple[Point, ...] = ("rows_changed", "rows_rewritten")

HALF = "hashtext(coalesce('lead ' || lead_id, 'customer ' || customer_uid)) & 1 = {}"
"""All that is told of some subjects: what was told of others stays in order."""


@pytest.mark.parametrize("rounds", [pytest.param(5, marks=pytest.mark.chaos)])
@kills_at(*RECORDED, *LATE, *REWRITTEN)
def test_a_recording_is_whole_and_is_told_again_once_and_otherwise_and_back(
    crm: Crm, tmp_path: Path, seed: int, faults: Faults, rounds: int
) -> None:
    """Its worker is killed between recording and database, and the commands are killed that tell it."""
    dice = random.Random(seed)
    crm.settings["recording_directory"] = str(tmp_path)
    shadow.install(crm.connection)
    with Writers(crm, seed, sessions=2):
        for point in drawn(RECORDED, rounds, dice):
            crm.add_leads(dice.choice((1, 1_500)))
            killed(crm, faults, point, 1, "run")  # later ones have mostly been recorded with those before them
    recorded_exactly(crm, faults)
    for point in drawn(LATE, rounds, dice):
        lose(crm, HALF.format(dice.randrange(2)))
        killed(crm, faults, point, 1, "replay")
    crm.succeed("replay")
    recorded_exactly(crm, faults)
    lose(crm)
    crm.succeed("replay")
    recorded_exactly(crm, faults)

    shipped = profile.read("leadfi")
    says = itertools.cycle((shipped.replace(" created by {new.bd_in_charge}", " came"), shipped))
    changed = crm.directory / "changed.toml"
    changed.write_text(next(says))
    crm.settings["profile"] = str(changed)
    for point in drawn(REWRITTEN, rounds, dice):
        killed(crm, faults, point, 1, "replay", "--rewrite")
        if point == "rows_rewritten":
            changed.write_text(next(says))
    changed.write_text(shipped)
    crm.succeed("replay", "--rewrite")
    recorded_exactly(crm, faults)


# Rows against the log

UNTRUE = """
SELECT count(*) FROM lead LEFT JOIN (
    SELECT lead_id, count(*) AS times FROM activity WHERE activity_type = 'lead_created' GROUP BY lead_id
) AS created USING (lead_id) WHERE times IS DISTINCT FROM 1
"""


def true(crm: Crm) -> bool:
    """Whether each lead came to be once, and the log is true."""
    assert "disagree" in crm.succeed("verify")
    return bool(crm.value(UNTRUE) == 0)


BACKFILL: tuple[Point, ...] = ("backfill_begun", "chunk_read", "chunk_written", "backfill_told")


@pytest.mark.parametrize("rounds", [pytest.param(10, marks=pytest.mark.chaos)])
@kills_at(*BACKFILL, "before_commit")
def test_a_backfill_killed_at_any_point_creates_each_row_once(
    new_crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    crm, dice = new_crm, random.Random(seed)
    crm.add_leads(100 * rounds)
    crm.setup()
    command, small = ("backfill", "lead"), ("backfill", "lead", "--chunk-size", "20")
    with streaming(crm):
        with Writers(crm, seed, sessions=2):
            for _ in range(rounds):  # while there is something to write
                killed(crm, faults, "before_commit", dice.randint(1, 2), *small)
            for point in drawn(BACKFILL, rounds, dice):
                within = point.startswith("chunk")
                killed(crm, faults, point, dice.randint(1, 4) if within else 1, *(small if within else command))
            crm.succeed(*command)
        assert true(crm)
    assert crm.value("SELECT count(*) FROM activity WHERE metadata ? 'backfilled'") == 100 * rounds


@storm(1, chaos=7)
@kills_at("late_registered", "repaired", "before_commit")
def test_a_repair_killed_at_any_point_makes_up_for_each_loss_once(
    crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    dice = random.Random(seed)
    with streaming(crm):
        with Writers(crm, seed, sessions=2) as writers:
            eventually(lambda: writers.commits > 40)
        for point in drawn(("late_registered", "repaired", "before_commit"), rounds, dice):
            crm.succeed("verify", "--repair")
            assert lose(crm, HALF.format(dice.randrange(2)))
            killed(crm, faults, point, 1, "verify", "--repair")
        crm.succeed("dead-letters", "retry", "--all")  # for which a repair that is gone is nobody to wait for
        crm.succeed("verify", "--repair")
        assert true(crm)


# Persons


@storm(2, chaos=15)
@kills_at("person_registered", "person_blanked")
def test_who_is_forgotten_by_a_command_that_is_killed_is_told_of_until_it_is_run_again(
    crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    persons = []
    with streaming(crm), Writers(crm, seed, sessions=2):
        for number, point in enumerate(drawn(("person_registered", "person_blanked"), rounds, dice), start=1_000_001):
            name, command = f"Ada {number}", ("forget", "--yes", "--lead", str(number))
            persons.append(f"lead {number},")
            crm.execute(
                "INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type) VALUES (%s, %s, 'web', 'jane', 't')",
                number,
                name,
            )
            eventually(lambda: told(crm, name) > 0)  # noqa: B023  # at once
            killed(crm, faults, point, 1, *command)
            assert told(crm, name) > 0
            assert crm.value("SELECT count(*) FROM cdc_worker.erased WHERE key = %s", str(number)) == 0
            crm.succeed(*command)
            crm.execute("UPDATE lead SET title = 'Dr' WHERE lead_id = %s", number)
    crm.record()
    assert told(crm, "Ada 1") == 0
    expected, recorded = shadow.counts(crm.connection)
    assert expected == recorded > 0
    wrong = shadow.faults(crm.connection, limit=100_000)
    assert [fault for fault in wrong if not any(person in fault for person in persons)] == []


# Changes of structure

LEGACY = TESTS / "legacy"


@storm(1, chaos=10)
@kills_at("step_done", "slot_made", "checkpoint_made")
def test_setup_cutover_and_teardown_killed_after_any_step_leave_no_commit_to_nobody(
    bare_crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    """From triggers to the worker and back, again and again: each status is told of once, by whomever."""
    crm, dice = bare_crm, random.Random(seed)
    for name in ("legacy.sql", "old_migration.sql"):
        crm.connection.execute((LEGACY / name).read_bytes())
    crm.add_leads(100)
    crm.execute("INSERT INTO customer (customer_uid, name) SELECT n, 'C' FROM generate_series(1, 10) n")
    setup, there, back = ("setup",), ("cutover",), ("cutover", "--back")
    teardown = ("teardown", "--all", "--restore-triggers", "--yes")
    with Application(crm, everything, rest=True) as application:
        for _ in range(rounds):
            killed(crm, faults, "step_done", dice.randint(1, 8), *setup)
            killed(crm, faults, "slot_made", 1, *setup)
            application.go_on(2)
            killed(crm, faults, "checkpoint_made", 1, *setup)
            killed(crm, faults, "step_done", 1, *setup)  # of two tables one is cut over
            application.go_on(2)
            with crm.worker() as worker:
                killed(crm, faults, "step_done", 1, *there)
                application.go_on(2)
                crm.succeed(*there)
                for command in (back, there):
                    killed(crm, faults, "step_done", dice.randint(1, 2), *command)
                    application.go_on(2)
                    crm.succeed(*command)
                application.go_on(2)
                kill(worker, faults)
            killed(crm, faults, "step_done", 1, *teardown)
            crm.command(*teardown)  # which says what the worker has still to record, if anything
            crm.record()
            killed(crm, faults, "step_done", dice.randint(1, 5), *teardown)
            crm.succeed(*teardown)
    assert statuses_told(crm) == Counter(owed(application.done))
    assert crm.value("SELECT count(*) FROM activity WHERE activity_type = 'call'") == sum(application.done)
    assert slots(crm) == {}


SWITCH: tuple[Point, ...] = ("copy_noted", "slot_copied", "checkpoint_moved", "spare_dropped")


@storm(1, chaos=15)
@kills_at(*SWITCH)
def test_a_switch_of_the_plugin_killed_at_any_point_loses_and_doubles_nothing(
    crm: Crm, server: Cluster, seed: int, faults: Faults, rounds: int
) -> None:
    if "wal2json" not in servers.plugins(server):
        pytest.skip("the server has no wal2json")
    dice = random.Random(seed)
    crm.settings.pop("plugin", None)
    shadow.install(crm.connection)
    with Writers(crm, seed, sessions=2):
        for point in drawn(SWITCH, rounds, dice):
            with crm.worker() as worker:
                worker.wait_for("replication_started")
                killed(crm, faults, point, 1, "switch-plugin")
                threading.Event().wait(dice.random() * 0.1)
                kill(worker, faults)
    with streaming(crm):
        crm.succeed("switch-plugin")
    recorded_exactly(crm, faults)
    assert len(slots(crm)) == 1
    assert state(crm)[2] is None
