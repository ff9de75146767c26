"""Messages that can't be read: they end the worker, and what someone allowed is passed over and kept."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import reduce
from itertools import dropwhile, takewhile
from typing import Any, LiteralString

import msgspec
import pytest
import zstandard
from factories import COMMITTED_AT, begin, inserted, lead, leadfi, rules, said
from hypothesis import given
from hypothesis import strategies as st
from spoiling import Spoil, Wire, ends, head, tail
from support import Crm, either_plugin, eventually, role, storm
from test_docs import shown, varying
from test_partitions import DEALS, set_up
from test_verify import insert, missing, running

from cdc_worker import config, decoders, errors, log, pgoutput, recording, wal2json
from cdc_worker.activities import Activity, DeadLetter, Scope
from cdc_worker.changes import (
    STREAM,
    Assembler,
    Begin,
    BeginToldError,
    Change,
    Commit,
    Part,
    Row,
    Transaction,
    Unread,
)
from cdc_worker.context import Policy
from cdc_worker.lsn import LSN
from cdc_worker.profile import load as load_profile
from cdc_worker.rules import Rules
from cdc_worker.skips import Skips, skip
from cdc_worker.transform import transform
from cdc_worker.verify import lines, verify

# The core: what a message that can't be read leaves behind.


def unread(table: tuple[str, str] = ("public", "lead"), of: Part = "change", position: int = 0x900) -> Unread:
    return Unread(
        *("unreadable", *table, None, None),
        of=of,
        position=LSN(position),
        reason="it can't be read",
        met_at=COMMITTED_AT,
        raw=b"\xff{",
    )


def put_together(*messages: Begin | Change | Commit, assembler: Assembler | None = None) -> list[Transaction]:
    assembler = Assembler(keep=True) if assembler is None else assembler
    found = [
        assembler.pass_over(message, recording.unread(message, raw=True))
        if isinstance(message, Unread)
        else assembler.feed(message, b"?")
        for message in messages
    ]
    return [transaction for transaction in found if transaction is not None]


def became(
    *messages: Begin | Change | Commit, given: Rules | None = None, **wishes: Any
) -> list[Activity | DeadLetter]:
    return transform(given or leadfi(), put_together(*messages), worker="w", system_identifier="1", **wishes)


def keys(*messages: Begin | Change | Commit, **wishes: Any) -> list[str]:
    return [outcome.change_key.removeprefix("w/1/0000000000001000/") for outcome in became(*messages, **wishes)]


def test_it_counts_as_a_change_of_its_table_so_that_the_keys_after_it_are_the_true_ones() -> None:
    ann, eve = inserted("lead", lead(lead_id=1)), inserted("lead", lead(lead_id=3))
    read = keys(begin(), ann, inserted("lead", lead(lead_id=2)), eve, Commit())
    assert read == [f"public.lead/{n}/lead_created" for n in range(3)]
    assert keys(begin(), ann, unread(), eve, Commit()) == [read[0], "public.lead/1/*", read[2]]
    elsewhere = keys(begin(), ann, unread(STREAM), eve, unread(STREAM), Commit())
    assert elsewhere == [read[0], "cdc_worker.stream/0/*", read[1], "cdc_worker.stream/1/*"]


@given(st.lists(st.sampled_from(["read", "unread", "stream"]), max_size=12), st.sets(st.integers(0, 12)))
def test_what_comes_of_it_does_not_depend_on_slices(script: list[str], cuts: set[int]) -> None:
    def slices(size: Callable[[int], int]) -> Iterator[Transaction | None]:
        assembler = Assembler()
        yield assembler.feed(begin(), b"")
        for number, kind in enumerate(script):
            if kind == "read":
                yield assembler.feed(inserted("lead", lead(lead_id=number)), bytes(size(number)))
            else:
                table = STREAM if kind == "stream" else ("public", "lead")
                yield assembler.pass_over(unread(table), bytes(size(number)))
        yield assembler.feed(Commit(), b"")

    whole, cut = (
        transform(leadfi(), [of for of in slices(size) if of is not None], worker="w", system_identifier="1")
        for size in (lambda _: 1, lambda number: Assembler.MAX_BYTES if number in cuts else 1)
    )
    assert cut == whole
    assert [outcome.index for outcome in whole] == [*range(len(script))]


def test_the_dead_letter_has_the_message_and_its_transaction_and_no_row() -> None:
    _, letter = became(begin(), inserted("lead", lead()), unread(), Commit())
    assert isinstance(letter, DeadLetter)
    assert letter.kind == "unreadable"
    assert letter.raw == b"\xff{"
    assert letter.change == Change("unreadable", "public", "lead", None, None)
    assert (letter.index, letter.committed_at, letter.origin.commit_lsn) == (1, COMMITTED_AT, begin().commit_lsn)


def test_of_a_table_that_is_not_the_workers_to_record_there_is_none() -> None:
    scope = Scope(excluded={("public", "lead"): [(LSN(0), None)]})
    assert keys(begin(), unread(), unread(STREAM), Commit(), scope=scope) == ["cdc_worker.stream/0/*"]


def test_where_values_are_masked_the_message_is_not_kept() -> None:
    given = rules('[tables.lead]\nmasked = ["email"]\nrules = [{ on = "insert", type = "x", description = "y" }]')
    for letter in became(begin(), unread(), unread(STREAM), Commit(), given=given):
        assert isinstance(letter, DeadLetter)
        assert letter.raw is None


def test_among_changes_that_are_collapsed_it_is_kept_and_done_with_them() -> None:
    assembler = Assembler()
    assembler.feed(begin(), b"")
    assembler.feed(said('{"collapse": {"type": "import"}}'), b"")
    assembler.feed(inserted("lead", lead(lead_id=1)), b"")
    assembler.pass_over(unread(), b"")
    assembler.feed(inserted("lead", lead(lead_id=2)), b"")
    found = put_together(Commit(), assembler=assembler)
    policy = Policy(unsigned_control=True)
    letter, summary = transform(leadfi(), found, worker="w", system_identifier="1", policy=policy)
    assert isinstance(letter, DeadLetter)
    assert isinstance(summary, Activity)
    assert (letter.index, summary.index) == (0, 0)
    assert summary.fields["metadata"]["changes"] == {"lead": {"insert": 2}}


def test_what_was_remembered_of_a_table_is_asked_for_again() -> None:
    """A row of it may have been changed."""
    given = rules(
        '[tables.lead]\nkey = "lead_id"\n'
        "[tables.contact]\n"
        'lookups.lead = { table = "lead", match = { lead_id = "lead_id" } }\n'
        'rules = [{ on = "insert", type = "added", description = "{lookup.lead.full_name}" }]'
    )
    asked: list[Any] = []

    def fetch(wanted: Any) -> Any:
        asked.extend(wanted)
        return dict.fromkeys(wanted)

    contact = inserted("contact", {"contact_id": 1, "lead_id": 7})
    for messages, times in (
        ([inserted("lead", lead()), contact], 0),
        ([inserted("lead", lead()), unread(), contact], 1),
        ([inserted("lead", lead()), unread(STREAM), contact], 1),
        ([inserted("lead", lead()), unread(("public", "contact")), contact], 0),
    ):
        asked.clear()
        became(begin(), *messages, Commit(), given=given, fetch=fetch)
        assert len(asked) == times, messages


def test_a_commit_that_cannot_be_read_ends_the_transaction_nevertheless() -> None:
    ann = inserted("lead", lead(lead_id=1))
    (found,) = put_together(begin(), ann, unread(STREAM, "commit", 0x1030))
    assert (found.changes[0], found.last, found.end_lsn) == (ann, True, 0x1030)
    assert [outcome.change_key.rpartition("stream/")[2] for outcome in became(begin(), unread(STREAM, "commit"))] == [
        "0/commit"
    ]
    lines = [bytes(of.payload) for of in found.received]
    assert len(lines) == 3
    assert recording.decode(lines[-1]) == unread(STREAM, "commit", 0x1030), "that line stands for it"


def test_a_begin_that_cannot_be_read_is_told_by_the_commit() -> None:
    assembler = Assembler()
    assert put_together(unread(STREAM, "begin"), inserted("lead", lead()), assembler=assembler) == []
    assert assembler.open
    with pytest.raises(BeginToldError) as told_of:
        assembler.feed(Commit(), b'{"action":"C","xid":700,"lsn":"0/1"}')
    assert told_of.value.position == 0x900
    assert wal2json.begin_told(told_of.value.commit) == b'{"action":"B","xid":700,"lsn":"0/1"}'
    assert not assembler.open


@pytest.mark.parametrize("end", [[unread(STREAM, "commit", 0x1030)], [unread(STREAM, "change", 0x1030), begin(0x2000)]])
def test_of_a_transaction_without_begin_and_end_all_is_left_out_and_said_so(end: list[Unread | Begin]) -> None:
    ann = inserted("lead", lead(lead_id=1))
    first, last = became(unread(STREAM, "begin"), ann, unread(position=0x910), ann, *end)
    assert isinstance(first, DeadLetter)
    assert isinstance(last, DeadLetter)
    assert [of.change_key for of in (first, last)] == [f"w/1/0000000000001030/cdc_worker.stream/{n}/*" for n in (0, 1)]
    assert "nor can its end" in first.reason
    (found,) = put_together(unread(STREAM, "begin"), ann, *end)
    assert found.end_lsn == 0x1030
    assert put_together(unread(STREAM, "begin"), ann, *end, assembler=Assembler(LSN(0x1030))) == [], "it is dealt with"


def test_what_seemed_to_be_a_begin_and_was_none_leaves_nothing_out() -> None:
    ann = inserted("lead", lead(lead_id=1))
    (found,) = put_together(unread(STREAM, "begin"), begin(), ann, Commit())
    assert found.changes == [ann]


def test_between_the_halves_of_a_row_that_moved_they_are_what_they_seem() -> None:
    assembler = Assembler(root_of=lambda change, _: ("public", "deal"), keys={("public", "deal"): ("id",)})
    row: Row = {"id": 1, "region": "north"}
    gone, come = (
        Change("delete", "public", "deal_north", row, None),
        Change("insert", "public", "deal_south", None, row),
    )
    (moved,) = put_together(begin(), gone, come, Commit(), assembler=assembler)
    assert [change.operation for change in moved.changes] == ["update"]
    (found,) = put_together(begin(), gone, unread(("public", "deal")), come, Commit(), assembler=assembler)
    assert [change.operation for change in found.changes] == ["delete", "unreadable", "insert"]


@pytest.mark.parametrize(
    ("line", "table"),
    [
        (
            b'{"action":"U","xid":7,"timestamp":"t","lsn":"0/1","schema":"public","table":"lead","colu\xff',
            ("public", "lead"),
        ),
        (b'{"action":"T","schema":"My \\"S\\"","table":"a,b"}', ('My "S"', "a,b")),
        (b'{"action":"U","xid":7,"schema":"public","tabel":"lead","columns"', None),
        (b'{"action":"U","xid":7,"lsn":"0/1","schema":"public","table":"le', None),
        (b'{"action":"M","schema":"public","table":"lead"}', None),
        (b'!"action":"I","schema":"public","table":"lead"}', None),
        (b'{"action":"I","schema":"\xff","table":"lead"}', None),
        (b'{"action":"I","schema":"\\q","table":"lead"}', None),
        (b'{"action":"I","columns":[],"schema":"public","table":"lead"}', None),
        (b"", None),
    ],
)
def test_the_table_is_told_by_nothing_but_a_line_that_begins_as_those_of_the_plugin(
    line: bytes, table: tuple[str, str] | None
) -> None:
    assert wal2json.table_of(memoryview(line)) == table


def test_the_line_in_a_recording_is_json_and_comes_back() -> None:
    given = msgspec.structs.replace(
        unread(), partition=("public", "lead_2026"), met_at=datetime(2026, 1, 2, tzinfo=UTC)
    )
    line = recording.unread(given, raw=True)
    assert recording.is_own(line)
    assert recording.decode(line) == given
    assert json.loads(line)["raw"] == "/3s="
    assert recording.decode(recording.unread(given, raw=False)) == msgspec.structs.replace(given, raw=None)


def test_what_can_be_read_by_now_is_the_change_that_it_was() -> None:
    line = b'{"action":"I","schema":"public","table":"%s","columns":[{"name":"id","value":1}]}'
    change = Change("insert", "public", "lead", None, {"id": 1})
    assert decoders.read_again(unread(), line % b"lead") == change
    of_partition = msgspec.structs.replace(unread(), partition=("public", "p"))
    assert decoders.read_again(of_partition, line % b"p") == msgspec.structs.replace(change, partition=("public", "p"))
    assert decoders.read_again(of_partition, line % b"lead") is None
    assert decoders.read_again(unread(STREAM), line % b"lead") is None, "its place among those of the table isn't known"
    assert decoders.read_again(unread(), b"\xff{") is None


def test_what_was_dealt_with_before_needs_no_permission() -> None:
    assembler = Assembler(LSN(0x1030))
    skips = Skips(frozenset(), leadfi(), None, {}, wal2json.Decoder(), raw=True, log=log.get())
    error = errors.MessageUnreadableError("")
    assembler.feed(begin(), b"")
    for position in (0x900, 0x1030):
        assert assembler.open
        assert skips.pass_over(assembler, b"{", LSN(position), error) is None
    assert not assembler.open
    with pytest.raises(errors.MessageUnreadableError, match="outside of any transaction"):
        skips.pass_over(assembler, b"{", LSN(0x1030), error)


@pytest.mark.parametrize(
    ("raw", "table", "kept"), [(False, b"lead", False), (False, b"customer", True), (True, b"lead", True)]
)
def test_a_recording_has_no_message_in_which_values_are_to_be_masked(raw: bool, table: bytes, kept: bool) -> None:
    rule = 'rules = [{ on = "insert", type = "x", description = "y" }]'
    given = rules(f'[tables.lead]\nmasked = ["email"]\n{rule}\n[tables.customer]\n{rule}\n')
    skips = Skips(frozenset([LSN(0x900)]), given, None, {}, wal2json.Decoder(), raw=raw, log=log.get())
    assembler = Assembler(keep=True)
    assembler.feed(begin(), b"")
    message = b'{"action":"I","schema":"public","table":"%b","columns' % table
    skips.pass_over(assembler, message, LSN(0x900), errors.MessageUnreadableError(""))
    found = assembler.feed(Commit(), b"")
    assert found is not None
    line = recording.decode(found.received[1].payload)
    assert isinstance(line, Unread)
    assert (line.table, line.raw) == (table.decode(), message if kept else None)


def test_what_can_be_read_and_stands_in_a_wrong_place_is_not_passed_over() -> None:
    skips = Skips(frozenset([LSN(0x900)]), leadfi(), None, {}, wal2json.Decoder(), raw=True, log=log.get())
    line = b'{"action":"T","schema":"public","table":"lead"}'
    with pytest.raises(errors.MessageUnreadableError, match="this is the message at 0/900, outside") as raised:
        skips.pass_over(Assembler(), line, LSN(0x900), errors.MessageUnreadableError(""))
    assert raised.value.hint == "this is no fault of one message: report it"


def marks(crm: Crm, *tables: str) -> list[str]:
    """What `verify` says of commits that were not read whole."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    found = verify(settings, load_profile(settings.profile), tables, log=log.get())
    return [line for line in lines(found) if line.startswith("not all of the commit")]


# The worker, on a wire that spoils what the server sends.


def run(crm: Crm, wire: Wire) -> tuple[LSN, str] | None:
    """Where `run` ends, at what it can't read, and what it says; None if it doesn't."""
    done = crm.command("run", "--once", dsn=wire.dsn)
    if not done.returncode:
        return None
    assert done.returncode == errors.MessageUnreadableError.exit_code, done.stderr
    said = re.search(r"^error: (.*)\nhint: (.*)$", done.stderr, re.M)
    assert said, done.stderr
    position = re.search(r"cdc-worker recover --skip (\S+)$", said[2])
    assert position, said[2]
    assert f"this is the message at {position[1]}" in said[1]
    return LSN.parse(position[1]), said[1]


def stopped(crm: Crm, wire: Wire) -> LSN:
    """Where `run` ends."""
    found = run(crm, wire)
    assert found is not None
    return found[0]


def allowed(crm: Crm, position: LSN, **wishes: Any) -> list[str]:
    return [*skip(config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings), position, **wishes)]


def passed_over(crm: Crm, spoil: Spoil) -> list[str]:
    """Let the worker go on, at each message that it ends at; returns what it said of them.

    They are fewer than the messages where some lie at the same position: a commit ends where the next transaction may
    begin.
    """
    reasons = []
    with Wire(crm.dsn, spoil) as wire:
        while (found := run(crm, wire)) is not None:
            position, said = found
            reasons.append(said)
            assert "is allowed to pass over" in allowed(crm, position)[0], "it doesn't end there twice"
    return reasons


def letters(crm: Crm) -> dict[str, bytes]:
    """The messages that were kept, by what their keys end with."""
    rows = crm.execute("SELECT change_key, raw, kind FROM cdc_worker.dead_letter ORDER BY dead_letter_id")
    assert {kind for _, _, kind in rows} <= {"unreadable"}
    return {"/".join(key.split("/")[3:]): raw for key, raw, _ in rows}


def ordinals(crm: Crm) -> list[tuple[str, str]]:
    """Of whom the activities tell, and by which numbers."""
    return [(of["metadata"]["lead_name"], "/".join(of["change_key"].split("/")[3:])) for of in crm.activities()]


def in_one_transaction(crm: Crm, *names: str) -> int:
    """Insert leads; returns the transaction's number."""
    with crm.connection.transaction():
        for name in names:
            crm.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES (%s, 's', 'b', 't')", name)
        return int(crm.value("SELECT pg_current_xact_id()::text"))


@either_plugin
def test_it_ends_the_worker_which_goes_on_once_that_is_allowed(crm: Crm, plugin: str) -> None:
    in_one_transaction(crm, "Ann")
    xid = in_one_transaction(crm, "Bob", "Spoilt", "Eve")
    in_one_transaction(crm, "Joe", "Torn", "Zoe")
    first, second = passed_over(crm, lambda payload: tail(b"Spoilt")(head(b"Torn")(payload)))
    assert f", a change of public.lead, after 1 change of transaction {xid}, whose commit is at " in first
    assert "a change of" not in second, "how it begins can't be read either"
    assert "Spoilt" not in first
    assert ordinals(crm) == [
        ("Ann", "public.lead/0/lead_created"),
        ("Bob", "public.lead/0/lead_created"),
        ("Eve", "public.lead/2/lead_created"),
        ("Joe", "public.lead/0/lead_created"),
        ("Zoe", "public.lead/1/lead_created"),
    ]
    kept = letters(crm)
    assert [*kept] == ["public.lead/1/*", "cdc_worker.stream/0/*"]
    raw = kept["public.lead/1/*"]
    if plugin == pgoutput.PLUGIN:
        assert raw.startswith(b"R"), "what it takes to read it later"
        assert b"N\xff\xff" in raw
    else:
        assert raw.startswith(b'{"action":"I","xid":')
        assert raw.endswith(b"\x01")
    origins = crm.execute("SELECT xid = %s, end_lsn > commit_lsn FROM cdc_worker.dead_letter ORDER BY 1 DESC", xid)
    assert origins == [(True, True), (False, True)]
    assert crm.value("SELECT dead_letters FROM cdc_worker.checkpoint") == 2


@either_plugin
@pytest.mark.parametrize("action", [b"B", b"C"])
def test_of_a_begin_or_a_commit_that_cannot_be_read_nothing_is_missing(crm: Crm, action: bytes) -> None:
    """Each says what the other does."""
    in_one_transaction(crm, "Ann")
    xid = in_one_transaction(crm, "Bob", "Eve")
    in_one_transaction(crm, "Joe")
    (said,) = passed_over(crm, ends(action, xid))
    assert ("outside of any transaction" in said) == (action == b"B")
    assert [name for name, _ in ordinals(crm)] == ["Ann", "Bob", "Eve", "Joe"]
    part = {b"B": "begin", b"C": "commit"}[action]
    assert letters(crm)[f"cdc_worker.stream/0/{part}"].startswith(b"!")
    keys = [of["change_key"].split("/")[2] for of in crm.activities()]
    assert (
        keys[1]
        == keys[2]
        == crm.value("SELECT lpad(replace(commit_lsn::text, '0/', ''), 16, '0') FROM cdc_worker.dead_letter")
    )


@either_plugin
def test_a_transaction_of_which_neither_can_be_read_is_left_out_and_said_to_be(crm: Crm) -> None:
    in_one_transaction(crm, "Ann")
    xid = in_one_transaction(crm, "Bob", "Eve")
    in_one_transaction(crm, "Joe")
    first, second = passed_over(crm, ends(b"BC", xid))
    assert "outside of any transaction" in first
    assert "in a transaction whose begin can't be read either" in second
    assert [name for name, _ in ordinals(crm)] == ["Ann", "Joe"]
    assert [*letters(crm)] == ["cdc_worker.stream/0/*", "cdc_worker.stream/1/*"]


@either_plugin
def test_only_what_cannot_be_read_is_passed_over(crm: Crm) -> None:
    in_one_transaction(crm, "Ann", "Spoilt")
    with Wire(crm.dsn, tail(b"Spoilt")) as wire:
        position = stopped(crm, wire)
    allowed(crm, position)
    crm.record()
    assert [name for name, _ in ordinals(crm)] == ["Ann", "Spoilt"]
    assert letters(crm) == {}


_WHERE: LiteralString = """
SELECT lsn::text FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, VARIADIC %s)
WHERE encode(data, 'escape') ~ %s
"""


@either_plugin
@storm(2, chaos=30)
def test_it_is_kept_once_however_often_the_worker_is_killed_within_its_commit(
    crm: Crm, plugin: str, rounds: int
) -> None:
    crm.add_leads(rounds * 5_000)
    numbers = tuple(range(1_500, rounds * 5_000, 4_000))
    # Behind a name stands that there is no title.
    parts = [f"Lead {number}n" if plugin == pgoutput.PLUGIN else f'"Lead {number}"' for number in numbers]
    options = pgoutput.options(crm.slot) if plugin == pgoutput.PLUGIN else {"format-version": "2"}
    told_by = [part for option in options.items() for part in option]
    for (lsn,) in crm.execute(_WHERE, crm.slot, told_by, "|".join(parts)):
        allowed(crm, LSN.parse(lsn))

    def position() -> tuple[str, int]:
        ((lsn, changes),) = crm.execute("SELECT commit_lsn::text, changes FROM cdc_worker.checkpoint")
        return lsn, changes

    within = set()
    with Wire(crm.dsn, tail(*(part.encode() for part in parts))) as wire:
        for _ in range(rounds):
            before = position()
            with crm.worker(dsn=wire.dsn) as worker:
                worker.wait_for("replication_started")
                eventually(lambda before=before: position() != before)  # type: ignore[misc]
            within.add(position())
        crm.record(dsn=wire.dsn)
    assert len(within) > 1, "not always at the end"
    told = [*range(1, rounds * 5_000 + 1)]
    assert [int(name.split()[1]) for name, _ in ordinals(crm)] == [n for n in told if n not in numbers]
    assert [int(key.split("/")[1]) for _, key in ordinals(crm)] == [n - 1 for n in told if n not in numbers]
    assert [*letters(crm)] == [f"public.lead/{number - 1}/*" for number in numbers]
    assert crm.value("SELECT dead_letters FROM cdc_worker.checkpoint") == len(numbers)
    assert crm.value("SELECT activities FROM cdc_worker.checkpoint") == rounds * 5_000 - len(numbers)


@either_plugin
def test_a_change_of_a_partition_counts_as_one_of_its_root(crm: Crm) -> None:
    set_up(crm, DEALS)
    with crm.connection.transaction():
        crm.execute(
            "INSERT INTO deal (id, region, note) VALUES (1, 'north', ''), (2, 'south', 'Spoilt'), (3, 'east', '')"
        )
    passed_over(crm, tail(b"Spoilt"))
    assert [of["change_key"].split("/", 3)[3] for of in crm.activities()] == [
        "public.deal/0/deal_created",
        "public.deal/2/deal_created",
    ]
    assert [*letters(crm)] == ["public.deal/1/*"]
    assert crm.value("SELECT change -> 'partition' FROM cdc_worker.dead_letter") == ["Far, away", "deal, south"]


_LETTERS: LiteralString = """
SELECT change_key, kind, reason, committed_at, change, xid, commit_lsn, end_lsn, context, found, masked, raw
FROM cdc_worker.dead_letter ORDER BY commit_lsn, change_key
"""


@either_plugin
def test_a_recording_has_a_line_in_its_place_with_which_a_replay_tells_the_same(crm: Crm, plugin: str) -> None:
    directory = crm.directory / "recording"
    directory.mkdir()
    crm.settings["recording_directory"] = str(directory)
    xid = in_one_transaction(crm, "Ann", "Spoilt", "Joe")
    begins = in_one_transaction(crm, "Eve", "Torn")
    spoils = tail(b"Spoilt"), head(b"Torn"), ends(b"C", xid), ends(b"B", begins)
    passed_over(crm, lambda payload: reduce(lambda spoilt, spoil: spoil(spoilt), spoils, payload))
    text = b""
    for path in sorted(directory.iterdir()):
        with (
            path.open("rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as lines,
        ):
            text += lines.read()
    found = [json.loads(line) for line in text.splitlines()]
    # What was not yet written when the begin was found out is recorded again.
    unread = {line["position"] + line["of"]: line["of"] for line in found if line["action"] == "X"}
    assert [*unread.values()] == ["change", "commit", "begin", "change"]
    ours = takewhile(lambda line: line.get("of") != "commit", dropwhile(lambda line: line.get("xid") != xid, found))
    assert [line["action"] for line in ours] == ["B", "I", "X", "I"]
    before = crm.activities(), crm.execute(_LETTERS)
    assert [len(of) for of in before] == [3, 4]
    crm.execute("SET cdc_worker.protect = off")
    crm.execute("DELETE FROM activity")
    crm.execute("DELETE FROM cdc_worker.dead_letter")
    crm.succeed("replay", str(directory))
    told = crm.activities()
    assert [{**of, "activity_id": 0} for of in told] == [{**of, "activity_id": 0} for of in before[0]]
    assert crm.execute(_LETTERS) == before[1]
    crm.succeed("replay", str(directory))
    assert (crm.activities(), crm.execute(_LETTERS)) == (told, before[1])

    # Who can read it tells it in its place.
    key, raw = crm.execute("SELECT change_key, raw FROM cdc_worker.dead_letter WHERE change ->> 'table' = 'lead'")[0]
    newer = crm.directory / "newer.jsonl"
    mended = raw[:-1] + b"}"
    if plugin == pgoutput.PLUGIN:
        columns = crm.value("SELECT count(*) FROM pg_attribute WHERE attrelid = 'lead'::regclass AND attnum > 0")
        mended = raw.replace(b"N\xff\xff", b"N" + columns.to_bytes(2))
    newer.write_bytes(text.replace(base64.b64encode(raw), base64.b64encode(mended)))
    crm.execute("UPDATE cdc_worker.dead_letter SET discarded_at = now()")
    crm.succeed("replay", str(newer))
    assert crm.activities() == told, "it was to stay untold"
    crm.execute("UPDATE cdc_worker.dead_letter SET discarded_at = NULL")
    crm.succeed("replay", str(newer))
    (new,) = [of for of in crm.activities() if of not in told]
    assert (new["change_key"], new["metadata"]["lead_name"]) == (key.replace("*", "lead_created"), "Spoilt")
    assert len(crm.execute(_LETTERS)) == 3
    crm.succeed("replay", str(newer))
    assert [len(crm.activities()), len(crm.execute(_LETTERS))] == [4, 3]


@either_plugin
def test_verify_finds_what_is_missing_and_makes_up_for_it(crm: Crm) -> None:
    insert(crm, 101, 102)
    crm.record()
    crm.execute("UPDATE lead SET status = 'Spoilt' WHERE lead_id = 101")
    crm.execute("UPDATE lead SET status = 'fine' WHERE lead_id = 102")
    crm.execute("INSERT INTO customer (customer_uid, name, type) VALUES (1, 'Torn', 't')")
    xid = in_one_transaction(crm, "Eve")
    spoils = tail(b"Spoilt"), head(b"Torn"), ends(b"C", xid)
    passed_over(crm, lambda payload: reduce(lambda spoilt, spoil: spoil(spoilt), spoils, payload))
    rows = crm.execute("SELECT dead_letter_id, commit_lsn::text FROM cdc_worker.dead_letter ORDER BY 1")
    (first, first_lsn), (second, second_lsn), _ = rows
    not_all = "not all of the commit at "
    with running(crm):
        assert marks(crm, "lead") == [
            f"{not_all}{first_lsn} could be read: 1 message of public.lead, kept as dead letter {first}",
            f"{not_all}{second_lsn} could be read: 1 message, kept as dead letter {second}",
        ]
        assert len(marks(crm, "customer")) == 1
        assert missing(crm, repair=True) == [("1", "creation", []), ("101", "change", ["status"])]
        assert missing(crm) == []
        assert len(marks(crm)) == 2
        crm.execute("UPDATE cdc_worker.dead_letter SET discarded_at = now()")
        assert marks(crm) == []


def test_who_is_forgotten_may_still_be_told_of_in_messages_that_nobody_can_read(crm: Crm) -> None:
    in_one_transaction(crm, "Ann", "Spoilt")
    passed_over(crm, tail(b"Spoilt"))
    done = json.loads(crm.succeed("forget", "--lead", "2", "--yes", "--json"))
    what, _, statement = done["out_of_reach"][-1].partition(": ")
    assert what == "1 message that could not be read, in dead letters; to be rid of them"
    crm.connection.execute(statement.encode())
    again = json.loads(crm.succeed("forget", "--lead", "2", "--yes", "--json"))
    assert again["out_of_reach"] == done["out_of_reach"][:-1]


# The command


def test_it_says_what_is_allowed_and_what_comes_next(crm: Crm) -> None:
    in_one_transaction(crm, "Ann", "Spoilt")
    with Wire(crm.dsn, tail(b"Spoilt")) as wire:
        position = stopped(crm, wire)
    may = f"to pass over the message at {position}, if it can't be read"
    (said, kept, following) = allowed(crm, position, dry_run=True)
    assert said == f'the worker "{crm.slot}" would be allowed {may}'
    assert "cdc_worker.dead_letter" in kept
    assert following == "next: cdc-worker run"
    assert crm.value("SELECT count(*) FROM cdc_worker.skip") == 0
    assert (
        crm.succeed("recover", "--skip", str(position)).splitlines()[0] == f'the worker "{crm.slot}" is allowed {may}'
    )
    assert allowed(crm, position)[0] == f'the worker "{crm.slot}" was allowed already {may}'
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        assert "when it is started anew" in allowed(crm, position)[2]


def test_operating_shows_what_is_printed(bare_crm: Crm) -> None:
    crm = bare_crm
    crm.slot = crm.settings["slot"] = "cdc_worker"
    crm.setup()
    in_one_transaction(crm, "Ann", "Spoilt")
    crm.execute("UPDATE lead SET status = 'x', email = 'Torn' WHERE lead_id = 1")
    with Wire(crm.dsn, tail(b"Spoilt", b"Torn")) as wire:
        position = stopped(crm, wire)
        (page,) = shown("docs/operating.md", "error: wal2json sent")
        assert varying(page) == varying(
            "error: " + crm.command("run", "--once", dsn=wire.dsn).stderr.split("error: ")[1]
        )
        (page,) = shown("docs/operating.md", 'the worker "cdc_worker" is allowed')
        assert varying(page) == varying(crm.succeed("recover", "--skip", str(position)))
        allowed(crm, stopped(crm, wire))
        crm.record(dsn=wire.dsn)
    with running(crm):
        (page,) = shown("docs/operating.md", "not all of the commit at")
        assert varying(page) == varying(crm.command("verify", "lead", "--repair").stdout)


def test_a_position_at_which_nothing_can_be_is_refused(crm: Crm) -> None:
    with pytest.raises(errors.SettingsError, match=r"nothing at 0/1 can come any more: the slot .* keeps the WAL from"):
        allowed(crm, LSN(1))
    with pytest.raises(errors.SettingsError, match="nothing is at FFFF/0 yet: the server's WAL ends at"):
        allowed(crm, LSN.parse("FFFF/0"))
    done = crm.command("recover", "--skip", "here")
    assert done.returncode == 2
    assert "'here' is no position such as 0/17FE4B8." in done.stderr


def test_it_takes_the_owners_rights(crm: Crm) -> None:
    with role(crm), pytest.raises(errors.TargetUnusableError, match=r"lacks INSERT ON cdc_worker\.skip"):
        allowed(
            crm,
            crm.value("SELECT pg_current_wal_insert_lsn()")
            and LSN.parse(crm.value("SELECT pg_current_wal_insert_lsn()")),
        )
