"""The commands that see to dead letters, and how their arrival is told."""

from __future__ import annotations

import json
import urllib.request
from decimal import Decimal
from typing import LiteralString

import pytest
from support import Crm, free_port, role
from test_docs import assert_has, fields_table, shown, varying

from cdc_worker import config, dead_letters
from cdc_worker.dead_letters import Listed, Tried

POISON: LiteralString = """
INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Ann', 'web', 'jane', 'exchange'),
    ('poison', 'web', 'jane', 'exchange'), ('poison', 'fair', 'bob', 'exchange');
UPDATE lead SET status = '2. proposal' WHERE full_name = 'poison' AND source = 'web'
"""


@pytest.fixture
def poisoned(crm: Crm) -> Crm:
    """A database whose target has refused two creations, and a change of status by another constraint."""
    crm.execute("ALTER TABLE activity ADD CONSTRAINT no_poison CHECK (metadata ->> 'lead_name' <> 'poison')")
    crm.connection.execute(POISON)
    crm.execute("UPDATE lead SET full_name = 'Bea' WHERE full_name = 'Ann'")
    crm.record()
    return crm


def ids(crm: Crm, *arguments: str) -> list[int]:
    """The dead letters that are listed."""
    if not arguments:
        settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot})
        return [of.id for of in dead_letters.listed(settings, dead_letters.Selection())]
    listed = crm.succeed("dead-letters", "list", "--json", *arguments)
    return [Listed.model_validate_json(line).id for line in listed.splitlines()]


def test_they_are_listed_by_number_table_and_error(poisoned: Crm) -> None:
    crm = poisoned
    first, second, third = ids(crm)
    assert ids(crm, "--all") == ids(crm, "--table", "lead") == ids(crm, "--error", "23") == [first, second, third]
    assert ids(crm, "--error", "23514", "--table", "public.lead") == ids(crm, "--error", "refused") == ids(crm)
    assert ids(crm, str(third), str(first)) == [first, third]
    for nothing in (["--table", "customer"], ["--error", "22"], ["--error", "rule_failed"], ["--discarded"]):
        assert crm.succeed("dead-letters", "list", *nothing) == "none\n"
    lines = crm.succeed("dead-letters", "list").splitlines()
    assert lines[0].split() == ["id", "committed", "attempts", "rule", "reason"]
    assert lines[1].split()[0] == str(first)
    assert lines[3].endswith(
        "  lead/status_changed       the target refused the row (SQLSTATE 23514, constraint no_poison)"
    )
    assert "poison" not in "".join(lines).replace("no_poison", "")


NONSENSE = [
    (["retry"], "it takes IDs, --table, --error or --all to say which are meant"),
    (["discard"], "it takes IDs, --table, --error or --all to say which are meant"),
    (["export"], "it takes IDs, --table, --error or --all to say which are meant"),
    (["retry", "1", "--all"], "it takes IDs, or --table and --error, or else --all"),
    (["list", "--table", "lead", "--all"], "it takes IDs, or --table and --error, or else --all"),
    (["discard", "--all"], "there is no terminal to ask on: --yes does it"),
    (["retry", "77"], "has no dead letter 77\nhint: it may have been written meanwhile; see those that wait"),
    (["show", "77"], "has no dead letter 77"),
    (["retry", "--error", "check"], '"check" is no error that dead letters have\nhint: name a kind (old_values_'),
]


def test_what_means_nothing_is_refused(crm: Crm) -> None:
    for arguments, said in NONSENSE:
        done = crm.command("dead-letters", *arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert said in done.stderr


def test_all_that_is_kept_of_one_is_shown(poisoned: Crm) -> None:
    crm = poisoned
    *_, third = ids(crm)
    shown = crm.succeed("dead-letters", "show", str(third))
    for line in (
        f"dead letter: {third}",
        "kind:        refused",
        "sqlstate:    23514",
        "constraint:  no_poison",
        "change:      update of public.lead, by the rule status_changed",
        "attempts:    1",
        '  status: null → "2. proposal"',
        '  source: "web"',
        "refused:",
        '  activity_type: "status_changed"',
    ):
        assert line in shown.splitlines()


def test_what_a_row_holds_does_not_reach_the_terminal_as_it_is(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CHECK (false) NOT VALID")
    crm.execute(
        "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES (E'\\x1b[2J\\u009b1m\\nx', 's', 'b', 't')"
    )
    crm.record()
    shown = crm.succeed("dead-letters", "show", str(ids(crm)[0]))
    assert r'full_name: "\u001b[2J\u009b1m\nx"' in shown
    assert not {"\x1b", "\u009b"} & {*shown}


def test_they_are_tried_again_and_the_rest_waits(poisoned: Crm) -> None:
    crm = poisoned
    first, second, third = ids(crm)
    done = crm.command("dead-letters", "retry", str(first))
    refused = "the target refused the row (SQLSTATE 23514, constraint no_poison)"
    assert (done.returncode, done.stdout) == (
        1,
        f"{first}: failed again: {refused}\n1 tried: 1 failed again\n",
    )
    crm.execute("ALTER TABLE activity DROP CONSTRAINT no_poison")
    assert crm.succeed("dead-letters", "retry", "--error", "23514") == (
        f"{first}: written\n{second}: written\n{third}: written\n3 tried: 3 written\n"
    )
    assert crm.succeed("dead-letters", "retry", "--all") == "0 tried: none wait\n"
    assert sorted(crm.types()) == ["lead_created"] * 3 + ["lead_updated", "status_changed"]


def test_what_came_of_them_is_told_to_machines(poisoned: Crm) -> None:
    crm = poisoned
    done = crm.command("dead-letters", "retry", "--all", "--json")
    found = [Tried.model_validate_json(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [(of.id, of.outcome) for of in found] == [(number, "failed again") for number in ids(crm)]


def test_discarded_ones_wait_no_more_and_are_kept(poisoned: Crm) -> None:
    crm = poisoned
    first, second, third = ids(crm)
    assert crm.succeed("dead-letters", "discard", "--table", "lead", "--yes") == "3 discarded\n"
    assert (ids(crm), ids(crm, "--discarded")) == ([], [first, second, third])
    assert json.loads(crm.succeed("status", "--json"))["dead_letters_waiting"] == 0
    assert "discarded; " in crm.succeed("dead-letters", "list", "--discarded")
    assert crm.succeed("dead-letters", "discard", "--all", "--yes") == "0 discarded\n"
    crm.command("dead-letters", "retry", str(second))
    assert ids(crm) == [second]


def test_every_digit_is_exported(crm: Crm) -> None:
    number = "12345678901234567890.10"
    crm.execute("ALTER TABLE lead ADD worth numeric, ADD share float8")
    crm.execute("ALTER TABLE activity ADD CHECK (false) NOT VALID")
    crm.execute(
        "INSERT INTO lead (full_name, source, bd_in_charge, type, worth, share)"
        " VALUES ('Ann', 's', 'b', 't', 12345678901234567890.10, 1e22)"
    )
    crm.record()
    path = crm.directory / "letters.jsonl"
    assert crm.succeed("dead-letters", "export", "--all", "--output", str(path)) == ""
    assert path.stat().st_mode & 0o777 == 0o600
    (line,) = path.read_text().splitlines()
    assert crm.succeed("dead-letters", "export", *map(str, ids(crm))) == f"{line}\n"
    found = json.loads(line, parse_float=Decimal)
    assert found["change"]["new"]["worth"] == Decimal(number)
    assert f'"worth": {number}' in line
    assert found["change"]["floats"] == {"new": ["share"]}
    assert (found["kind"], found["fields"]["activity_type"], found["masked"]) == ("refused", "lead_created", [])
    assert found["commit_lsn"]


def test_a_role_that_runs_the_worker_sees_them_and_changes_nothing(poisoned: Crm) -> None:
    crm = poisoned
    with role(crm):
        assert len(ids(crm)) == 3
        for command, lacking in (("retry", "DELETE ON"), ("discard", "UPDATE ON cdc_worker.dead_letter")):
            done = crm.command("dead-letters", command, "--all", *(["--yes"] if command == "discard" else []))
            assert done.returncode == 1
            assert lacking in done.stderr
            assert "hint: as the owner: GRANT " in done.stderr
    assert len(ids(crm)) == 3


def test_without_tables_of_the_worker_it_says_how_to_make_them(bare_crm: Crm) -> None:
    for command in (["list"], ["export", "--all"], ["discard", "--all", "--yes"], ["retry", "--all"]):
        done = bare_crm.command("dead-letters", *command)
        assert done.returncode == 1
        assert done.stderr.endswith("hint: run: cdc-worker setup\n")


def test_with_tables_of_an_older_version_it_says_how_to_renew_them(crm: Crm) -> None:
    crm.execute("ALTER TABLE cdc_worker.dead_letter DROP COLUMN discarded_at")
    for command in (["dead-letters", "list"], ["dead-letters", "retry", "--all"], ["status"]):
        done = crm.command(*command)
        assert done.returncode == 1
        assert "hint: run: cdc-worker setup" in done.stderr


def test_their_arrival_is_counted_and_logged(poisoned: Crm) -> None:
    crm, port = poisoned, free_port()
    with crm.worker(http_port=str(port)) as worker:
        worker.wait_for("replication_started")
        crm.connection.execute(POISON)
        crm.execute("UPDATE lead SET full_name = 'Cy' WHERE full_name = 'Ann'")
        event = worker.wait_for("change_dead_lettered")
        worker.wait_for("change_dead_lettered")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            said = answer.read().decode()
        assert worker.terminate() == 0
    assert 'cdc_worker_dead_letters_total{kind="refused"}' in said
    assert 'cdc_worker_activities_total{type="lead_created"}' in said
    assert "poison" not in said
    assert event["lsn"] in (of["lsn"] for of in worker.events("change_dead_lettered"))


ADDED: LiteralString = """
INSERT INTO lead (full_name, company_name, source, status, bd_in_charge, type) VALUES
    ('Ada Lind', 'Lind Ltd', 'web', '1. lead generated', 'jane', 'exchange'),
    ('Ken Abe', '', 'web', '1. lead generated', 'jane', 'exchange')
"""

PAGE = "docs/dead-letters.md"


def test_the_page_shows_what_the_commands_print(new_crm: Crm) -> None:
    crm = new_crm
    crm.slot = crm.settings["slot"] = "cdc_worker"
    crm.setup()
    crm.execute("ALTER TABLE activity ADD CONSTRAINT activity_company CHECK (metadata ->> 'company_name' <> '')")
    crm.execute(ADDED)
    with crm.connection.transaction():
        crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{\"changed_by\": \"jane_doe\"}')")
        crm.execute("UPDATE lead SET status = '2. proposal', phone_number = '555-1' WHERE full_name = 'Ken Abe'")
    crm.record()

    def on_page(first: str, *arguments: str) -> None:
        (*parts,) = shown(PAGE, first)
        printed = "\n".join(varying(crm.command("dead-letters", *arguments).stdout))
        for part in parts:
            assert "\n".join(varying(part)) in printed

    header = f"{'id':>8}  committed            attempts  rule                      reason\n       "
    on_page(f"{header}1  ", "list")
    on_page("dead letter: 2", "show", "2")
    on_page("1: failed again", "retry", "1")
    crm.execute("ALTER TABLE activity DROP CONSTRAINT activity_company")
    on_page("1: written", "retry", "1", "2")
    assert crm.succeed("dead-letters", "discard", "3", "--yes") == "1 discarded\n"
    on_page(f"{header}3  ", "list", "--discarded")


def test_the_page_lists_the_fields() -> None:
    assert_has(PAGE, fields_table(Tried))
    assert_has(PAGE, fields_table(Listed))
