"""The activity feed in the terminal: what happened, manual and system together, as the CRM's people ask for it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, LiteralString

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql
from support import PATIENCE, Crm, WorkerProcess, eventually
from test_sales_cookbook import add, use
from test_schema_views import write

from cdc_worker.feed import AT_ONCE, GAPS, GIVEN_UP, Numbers, printable

LEAD: LiteralString = (
    "INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type, status) VALUES (%s, %s, 'web', 'jane', 't', '1')"
)


def told(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def of(crm: Crm, *arguments: str) -> list[str]:
    """What a command tells of, by their types."""
    return [entry["type"] for entry in told(crm.succeed(*arguments, "--json"))]


@pytest.fixture
def busy(crm: Crm) -> Crm:
    """Lead 7 was created, called, changed, and is gone; lead 8 became customer 42, of which others made something."""
    crm.execute(LEAD, 7, "Ada")
    crm.record()
    write(crm, lead_id=7, activity_type="call", description="It rang\nand rang", bd_in_charge="bob")
    crm.execute("UPDATE lead SET status = '2', bd_in_charge = 'bob' WHERE lead_id = 7")
    crm.execute(LEAD, 8, "Bea")
    with crm.connection.transaction():
        crm.execute("INSERT INTO customer (customer_uid, name) VALUES (42, 'Acme')")
        crm.execute("UPDATE lead SET is_converted = true WHERE lead_id = 8")
        crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (42, 8)")
    crm.record()
    write(crm, customer_uid=42, activity_type="email_opened", activity_category="automated", is_visible_to_bd=False)
    crm.execute("DELETE FROM activity WHERE lead_id = 7 AND activity_category = 'manual'")
    crm.execute("DELETE FROM lead WHERE lead_id = 7")
    crm.record()
    crm.execute("SET cdc_worker.protect = off")
    crm.execute("INSERT INTO activity (activity_type, bd_in_charge, created_by) VALUES ('meeting', 'bob', 'Bob')")
    return crm


def test_a_timeline_is_manual_and_system_together_in_order_also_of_who_is_gone(busy: Crm) -> None:
    write(busy, lead_id=8, activity_type="call", description="Hello")
    assert of(busy, "timeline", "--lead", "7") == [
        *("lead_created", "status_changed", "assignment_changed", "lead_deleted")
    ]
    assert of(busy, "timeline", "--lead", "8") == ["lead_created", "lead_converted", "call"]
    assert of(busy, "timeline", "--customer", "42") == ["customer_created", "lead_converted", "email_opened"]
    assert of(busy, "timeline", "--lead", "8", "--limit", "2") == ["lead_converted", "call"]
    assert of(busy, "timeline", "--lead", "8", "--customer", "42") == ["lead_converted"]


def test_an_activity_is_told_whole_with_every_digit(crm: Crm) -> None:
    activity_id = write(
        crm,
        customer_uid=7,
        metadata='{"amount": 12345678901234567890.10}',
        date_created="2026-11-21 10:02:13.000001",
        created_by="Jane",
        activity_category="automated",
    )
    printed = crm.succeed("timeline", "--customer", "7", "--json")
    assert "12345678901234567890.10" in printed
    assert told(printed) == [
        {
            "id": activity_id,
            "at": "2026-11-21T10:02:13.000001",
            "category": "automated",
            "type": "call",
            "description": None,
            "links": {"lead": None, "customer": 7},
            "owner": None,
            "created_by": "Jane",
            "visible": True,
            "metadata": {"amount": 12345678901234567890.10},
        }
    ]


def test_an_activity_that_lost_its_link_is_in_the_timeline(crm: Crm) -> None:
    crm.execute(LEAD, 7, "Ada")
    crm.record()
    crm.execute("SET cdc_worker.protect = off")
    crm.execute("UPDATE activity SET lead_id = NULL")
    assert of(crm, "timeline", "--lead", "7") == ["lead_created"]
    assert of(crm, "timeline", "--lead", "8") == []


def test_a_timeline_and_what_comes_are_read_by_index(crm: Crm) -> None:
    crm.execute(
        "INSERT INTO activity (lead_id, activity_type, activity_category, change_key)"
        " SELECT n, 'call', 'system', 'w/' || n FROM generate_series(1, 60000) n"
    )
    crm.execute("VACUUM ANALYZE activity")
    scanned = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'activity'"
    before = crm.value(scanned)
    assert len(of(crm, "timeline", "--lead", "777")) == 1
    assert len(of(crm, "tail", "--no-follow")) == 10
    with Tail(crm) as tail:
        eventually(lambda: len(tail.types) == 10)
        write(crm, activity_type="call")
        eventually(lambda: len(tail.types) == 11)
    assert crm.value(scanned) == before
    crm.succeed("stats")
    assert eventually(lambda: crm.value(scanned) > before, what="the server has counted what it read")


@pytest.mark.parametrize(
    ("selected", "types"),
    [
        (("--category", "manual"), {"meeting"}),
        (("--category", "manual", "--category", "automated"), {"meeting", "email_opened"}),
        (("--type", "lead_created", "--type", "meeting"), {"lead_created", "meeting"}),
        (("--bd", "bob", "--category", "system"), {"status_changed", "assignment_changed", "lead_deleted"}),
        (("--visible-only", "--customer", "42"), {"customer_created", "lead_converted"}),
        (("--link", "customer", "42", "--type", "email_opened"), {"email_opened"}),
        (("--bd", "nobody"), set[str]()),
    ],
)
def test_all_is_selected_as_the_document_has_it(busy: Crm, selected: tuple[str, ...], types: set[str]) -> None:
    assert {*of(busy, "tail", "--no-follow", "--lines", "100", *selected)} == types


def test_the_statistics_are_those_of_the_view(busy: Crm) -> None:
    write(busy, activity_type="call", activity_category=None, date_created="2020-01-31 12:00:00", bd_in_charge="jane")
    write(busy, activity_type="call", date_created="infinity")
    columns = "statistic", "activity_category", "activity_type", "bd_in_charge", "day", "activities", "last_7_days"
    query = sql.SQL("SELECT {}, to_jsonb(latest) #>> '{{}}' FROM v_activity_statistics")
    texts = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in columns)
    view = busy.connection.execute(query.format(texts)).fetchall()
    found = told(busy.succeed("stats", "--json"))
    assert len(found) == len(view)
    assert {
        tuple(None if count[name] is None else str(count[name]) for name in (*columns, "latest")) for count in found
    } == {*view}


def test_statistics_of_some_are_of_these_alone(busy: Crm) -> None:
    found = told(busy.succeed("stats", "--json", "--lead", "7"))
    assert [(c["activity_category"], c["activities"]) for c in found if c["statistic"] == "total"] == [("system", 4)]
    assert not [c for c in found if c["statistic"] == "bd"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("timeline",), "it takes --lead, --customer or --link to say whose"),
        (("timeline", "--lead", "7", "--link", "lead", "8"), "it takes one key of a field at a time"),
        (("timeline", "--lead", "x"), '"x" can\'t be the key of a lead, which is of type integer'),
        (
            ("timeline", "--link", "deal", "7"),
            'the profile "leadfi" has no links to a "deal"\nhint: those it has: lead',
        ),
        (("tail", "--lines", "-1"), "-1 is not in the range x>=0"),
    ],
)
def test_what_cannot_be_asked_is_said(crm: Crm, arguments: tuple[str, ...], said: str) -> None:
    done = crm.command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_target_that_does_not_tell_says_so(bare_crm: Crm) -> None:
    crm = use(bare_crm)
    for option, what in (("--bd", "owner"), ("--visible-only", "visible")):
        done = crm.command("stats", option, *(["jane"] if option == "--bd" else []))
        assert done.returncode == 2
        assert f"core_interactionlog doesn't tell the {what} of an activity" in done.stderr


def test_a_role_that_may_not_read_is_told_what_it_lacks(crm: Crm) -> None:
    crm.execute("CREATE ROLE reader LOGIN")
    try:
        crm.settings["dsn"] = psycopg.conninfo.make_conninfo(crm.dsn, user="reader")
        done = crm.command("stats")
        assert done.returncode == 1
        assert done.stderr == (
            'error: role "reader" lacks SELECT ON "public"."activity"\n'
            'hint: as the owner: GRANT SELECT ON "public"."activity" TO "reader"\n'
        )
    finally:
        del crm.settings["dsn"]
        crm.execute("DROP ROLE reader")


def test_a_log_that_keeps_its_keys_elsewhere_is_told_as_well(bare_crm: Crm) -> None:
    crm = use(bare_crm)
    lead = add(crm.connection, "core_lead", assigned_to_id=1)
    crm.record()
    crm.execute(
        "INSERT INTO core_interactionlog (type, summary, timestamp, user_id, lead_id)"
        " VALUES ('call', 'It rang', '2026-11-21 10:02:13+00', 1, %s)",
        lead,
    )
    found = told(crm.succeed("timeline", "--lead", str(lead), "--json"))
    assert {(entry["category"], entry["type"]) for entry in found} == {("system", "note"), ("manual", "call")}
    assert found[0]["links"] == {"user": 1, "lead": lead, "contact": None, "opportunity": None, "organization": None}
    assert {entry["at"][-6:] for entry in found} == {"+00:00"}
    assert of(crm, "tail", "--no-follow", "--category", "system") == ["note"]
    assert "note" in crm.succeed("stats")


def test_a_role_may_need_the_keys_as_well(bare_crm: Crm) -> None:
    crm = use(bare_crm)
    role = f"reader_{crm.slot}"
    crm.connection.execute(f"CREATE ROLE {role} LOGIN; GRANT SELECT ON core_interactionlog TO {role}".encode())
    owner = crm.settings.get("dsn")
    crm.settings["dsn"] = psycopg.conninfo.make_conninfo(crm.dsn, user=role)
    try:
        done = crm.command("tail", "--no-follow")
        assert done.returncode == 1
        _, _, grants = done.stderr.partition("hint: as the owner: ")
        crm.connection.execute(grants.encode())
        assert crm.succeed("tail", "--no-follow") == ""
    finally:
        crm.settings.pop("dsn") if owner is None else crm.settings.update(dsn=owner)
        crm.connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def test_a_target_that_is_not_there_is_said_not_to_be(bare_crm: Crm) -> None:
    done = bare_crm.command("stats")
    assert "error: there is no table activity\n" in done.stderr


# Following


class Tail(WorkerProcess):
    """`cdc-worker tail` as a process."""

    def __init__(self, crm: Crm, *arguments: str) -> None:
        super().__init__(["tail", "--json", *arguments], crm.environment(), crm.directory / "tail.log")

    @property
    def types(self) -> list[str]:
        """Of what it has printed so far."""
        return [entry["type"] for entry in told(self.printed.read_text().rpartition("\n")[0])]

    def has(self, *types: str) -> bool:
        """Wait until it has printed these, and nothing else."""
        eventually(lambda: len(self.types) >= len(types), what=f"{types}: {self.said}")
        return self.types == [*types]


def test_what_happens_is_shown_as_it_happens(busy: Crm) -> None:
    with busy.worker() as worker, Tail(busy, "--lines", "1") as tail:
        assert tail.has("meeting")
        busy.execute(LEAD, 9, "Cleo")
        assert tail.has("meeting", "lead_created")
        write(busy, lead_id=9, activity_type="demo")
        busy.execute("DELETE FROM lead WHERE lead_id = 8")
        assert tail.has("meeting", "lead_created", "demo", "lead_deleted")
        assert worker.terminate() == 0
        tail.process.send_signal(signal.SIGINT)
        assert tail.wait() == 0
        assert tail.said == ""


def test_only_what_is_selected_is_shown(busy: Crm) -> None:
    with Tail(busy, "--lines", "0", "--type", "demo", "--lead", "8") as tail:
        eventually(lambda: sessions(busy), what="it has begun")
        write(busy, lead_id=7, activity_type="demo", activity_category="automated")
        write(busy, lead_id=8, activity_type="call")
        write(busy, lead_id=8, activity_type="demo")
        write(busy, activity_type="demo", customer_uid=42)
        write(busy, lead_id=8, activity_type="demo")
        assert tail.has("demo", "demo")


def sessions(crm: Crm) -> int:
    """How many sessions of others have read the target last."""
    return int(
        crm.value(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND state = 'idle' AND query LIKE '%%activity_id%%'"
            " AND pid <> pg_backend_pid()"
        )
    )


def test_an_activity_that_commits_after_younger_ones_is_shown(busy: Crm) -> None:
    with psycopg.connect(busy.dsn) as late, Tail(busy, "--lines", "1") as tail:
        assert tail.has("meeting")
        late.execute("INSERT INTO activity (activity_type) VALUES ('late')")
        rolled_back = psycopg.connect(busy.dsn)
        rolled_back.execute("INSERT INTO activity (activity_type) VALUES ('never')")
        write(busy, activity_type="young")
        assert tail.has("meeting", "young")
        rolled_back.close()
        late.commit()
        assert tail.has("meeting", "young", "late")


def test_a_transaction_of_many_rows_is_shown_whole_however_late_it_commits(crm: Crm) -> None:
    """Also to who began when nothing was there yet."""
    many = 3 * AT_ONCE
    with psycopg.connect(crm.dsn) as late, Tail(crm) as tail:
        late.execute("INSERT INTO activity (activity_type) SELECT 'late' FROM generate_series(1, %s)", (many,))
        write(crm, activity_type="young")
        assert tail.has("young")
        write(crm, activity_type="younger")
        assert tail.has("young", "younger")
        late.commit()
        assert tail.has("young", "younger", *["late"] * many)


def test_numbers_that_a_session_keeps_for_later_are_looked_for(crm: Crm) -> None:
    crm.execute("ALTER SEQUENCE activity_activity_id_seq CACHE 20")
    with psycopg.connect(crm.dsn, autocommit=True) as pooled, Tail(crm, "--lines", "1") as tail:
        pooled.execute("INSERT INTO activity (activity_type) VALUES ('first')")
        assert tail.has("first")
        write(crm, activity_type="of another")
        assert tail.has("first", "of another")
        pooled.execute("INSERT INTO activity (activity_type) VALUES ('kept')")
        assert tail.has("first", "of another", "kept")


def test_where_numbers_are_set_back_it_begins_anew(busy: Crm) -> None:
    with Tail(busy, "--lines", "1") as tail:
        assert tail.has("meeting")
        busy.execute("TRUNCATE activity RESTART IDENTITY")
        write(busy, activity_type="anew")
        assert tail.has("meeting", "anew")
        assert tail.said == "the numbers of activity were set back: beginning anew\n"
        write(busy, activity_type="further")
        assert tail.has("meeting", "anew", "further")


def test_what_no_reader_could_decode_ends_nobodys_feed(crm: Crm) -> None:
    numbers = ["1e5000", "9" * 309 + ".5", "[" * 1_000 + "]" * 1_000]
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (7, 'Acme')")
    people = WorkerProcess(["tail"], crm.environment(), crm.directory / "people.log")
    with people, Tail(crm) as tail:
        for number in numbers:
            write(crm, customer_uid=7, metadata=f'{{"x": {number}}}')
        for process in (people, tail):
            eventually(lambda process=process: process.printed.read_text().count("\n") == 3)  # type: ignore[misc]
    assert crm.succeed("timeline", "--customer", "7").count("call") == 3
    assert crm.succeed("timeline", "--customer", "7", "--json").count("\n") == 3


def test_as_json_an_activity_is_one_line_and_steers_no_terminal(crm: Crm) -> None:
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (7, 'Acme')")
    write(crm, customer_uid=7, metadata='{"text": "a\u009b31mb\u202ec"}', description="\u009b31m\x7f")
    (line,) = crm.succeed("timeline", "--customer", "7", "--json").splitlines()
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["metadata"] == {"text": "a\u009b31mb\u202ec"}
    assert json.loads(line)["description"] == "\u009b31m\x7f"


def test_what_the_type_json_keeps_of_its_layout_is_on_one_line_as_well() -> None:
    assert printable('{\n\t"text": "\u2028"\r}') == '{  "text": "\\u2028" }'


def test_a_server_that_goes_away_is_waited_for(busy: Crm) -> None:
    with Tail(busy, "--lines", "1") as tail:
        assert tail.has("meeting")
        eventually(lambda: sessions(busy))
        busy.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        write(busy, activity_type="while it was away")
        assert tail.has("meeting", "while it was away")
        assert re.fullmatch(r"connection lost, trying again: [^\n]+\n", tail.said)


def test_a_target_without_numbers_is_shown_and_not_followed(bare_crm: Crm) -> None:
    bare_crm.setup()
    bare_crm.execute("ALTER TABLE activity ALTER activity_id DROP DEFAULT")
    bare_crm.execute("INSERT INTO activity (activity_id, lead_id, activity_type) VALUES (1, NULL, 'call')")
    done = bare_crm.command("tail")
    assert done.returncode == 1
    assert "activity has no primary key from a sequence, by which to know what is new" in done.stderr
    assert of(bare_crm, "tail", "--no-follow") == ["call"]


@given(st.lists(st.integers(1, 3_000), unique=True, max_size=60), st.sampled_from([1, 2, 7]), st.data())
def test_each_row_is_asked_for_until_it_was_seen(numbers: list[int], step: int, data: st.DataObject) -> None:
    """In whatever order they come, and however few are read at a time."""
    rows = [number * step for number in numbers]
    seen, there, found = Numbers(step=step), set[int](), list[int]()
    while len(found) < len(numbers):
        come = data.draw(st.integers(0, len(rows)))
        there.update(rows[:come])
        rows = rows[come:]
        asked = sorted(n for n in there if any(low <= n <= high for low, high in seen.gaps))
        read = asked[: data.draw(st.integers(0 if rows else 1, 5))]
        seen.note(read)
        found += read
    assert sorted(found) == sorted(there)


def test_of_what_is_missing_most_is_forgotten_after_a_while() -> None:
    now = 0.0
    seen = Numbers([1, 2, 5], clock=lambda: now)
    assert seen.gaps[1:] == [(3, 4), (6, 2**63 - 1)]
    now = GIVEN_UP
    seen.note(range(7, 2 * GAPS + 7, 2))
    assert len(seen.gaps) == GAPS + 1
    assert (3, 4) not in seen.gaps
    seen.note(range(2 * GAPS + 7, 4 * GAPS + 7, 2))
    assert len(seen.gaps) == 2 * GAPS + 1
    now = 2 * GIVEN_UP
    seen.note([])
    assert len(seen.gaps) == GAPS + 1
    assert seen.gaps[-2] == (4 * GAPS + 4, 4 * GAPS + 4)


def test_of_a_step_nothing_is_missing_between() -> None:
    seen = Numbers([10, 20, 50], whole=False, step=10)
    assert seen.gaps == [(21, 49), (51, 2**63 - 1)]


# In a terminal


def shown(crm: Crm, width: int, *arguments: str, **variables: str) -> str:
    """What a command prints on a terminal of this width."""
    leader, follower = pty.openpty()
    environment = {**crm.environment(), "TERM": "xterm-256color", "COLUMNS": str(width), **variables}
    process = subprocess.Popen(
        [sys.executable, "-m", "cdc_worker", *arguments], env=environment, stdout=follower, stderr=subprocess.PIPE
    )
    os.close(follower)
    parts = []
    try:
        while part := os.read(leader, 1 << 16):
            parts.append(part)
    except OSError:  # as Linux says that nobody writes any more
        pass
    _, stderr = process.communicate(timeout=PATIENCE)
    os.close(leader)
    assert process.returncode == 0, stderr
    return b"".join(parts).decode().replace("\r\n", "\n")


Look = Callable[..., str]


@pytest.fixture
def look(crm: Crm) -> Look:
    """What commands print of a lead of whom somebody has written to steer terminals, and at length."""
    at = "2026-11-21 10:02:13.5"
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (7, 'Acme')")
    write(
        crm, customer_uid=7, description="\x1b[31mred\x1b[0m \x07 " + "very " * 40, date_created=at, bd_in_charge="bob"
    )
    write(
        crm,
        customer_uid=7,
        activity_type="customer_updated",
        activity_category="system",
        description='Customer "Acme" updated',
        created_by="jane_doe",
        date_created="2026-11-22 08:00:00",
    )

    def run(width: int, *arguments: str, **variables: str) -> str:
        return shown(crm, width, *arguments, **variables)

    return run


def test_nothing_that_others_wrote_steers_the_terminal(look: Look) -> None:
    for arguments in (("timeline", "--customer", "7"), ("tail", "--no-follow"), ("stats",)):
        printed = look(100, *arguments)
        assert "\x1b[31mred" not in printed
        assert "\x07" not in printed


def test_colours_are_for_terminals_without_no_color(look: Look, crm: Crm) -> None:
    assert "\x1b[36mcustomer_updated" in look(100, "timeline", "--customer", "7")
    assert "\x1b[36m" not in look(100, "timeline", "--customer", "7", NO_COLOR="1")
    assert "\x1b" not in crm.succeed("timeline", "--customer", "7")


@pytest.mark.parametrize("width", [40, 60, 79, 80, 120])
def test_no_line_is_wider_than_the_terminal(look: Look, width: int) -> None:
    for arguments in (("timeline", "--customer", "7"), ("tail", "--no-follow")):
        printed = plain(look(width, *arguments))
        assert max(map(len, printed.splitlines())) <= width
        assert "customer_updated" in printed


def plain(printed: str) -> str:
    """Without bold, dim and colours."""
    return "\n".join(line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines())


def test_a_timeline_reads_like_one(look: Look) -> None:
    assert plain(look(120, "timeline", "--customer", "7")).splitlines() == [
        "2026-11-21",
        "  10:02:13  call              bob       [31mred [0m" + " very" * 13,
        " " * 40 + " ".join(["very"] * 16),
        " " * 40 + " ".join(["very"] * 11),
        "2026-11-22",
        '  08:00:00  customer_updated  jane_doe  Customer "Acme" updated',
    ]
    assert plain(look(60, "timeline", "--customer", "7")).endswith(
        """
2026-11-22
  08:00:00  customer_updated  jane_doe
    Customer "Acme" updated"""
    )


def test_what_is_no_terminal_gets_whole_lines(look: Look, crm: Crm) -> None:
    (first, second) = crm.succeed("tail", "--no-follow").splitlines()
    assert first.count("very") == 40
    assert second == '2026-11-22 08:00:00  customer_updated    jane_doe      Customer "Acme" updated'
