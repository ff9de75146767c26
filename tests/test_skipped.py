"""What messages let changes pass over: which rows are noted, once each, whatever slices, kills and refusals."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from factories import (
    assembled,
    contact,
    customer,
    deleted,
    inserted,
    lead,
    leadfi,
    rules,
    said,
    truncated,
    updated,
)
from hypothesis import given
from hypothesis import strategies as st
from psycopg.types.json import Jsonb
from storms import Faults, kill
from support import Crm, eventually, role, storm

from cdc_worker import config, profile
from cdc_worker import transform as module
from cdc_worker.activities import Activity, Position, Scope, Skipped
from cdc_worker.changes import Change, Message, Transaction, update
from cdc_worker.context import Policy
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.profile_trial import Counts, told_change, try_changes
from cdc_worker.rules import Rules
from cdc_worker.transform import MAX_SKIPPED, MAX_SUBJECT, Outcome, Transformer

LEAD = inserted("lead", lead())

SKIP, COLLAPSE, TELL = (said(json.dumps(wish)) for wish in ({"skip": True}, {"collapse": True}, {"clear": True}))


def leads(count: int, start: int = 0) -> list[Change]:
    return [inserted("lead", lead(lead_id=number)) for number in range(start, start + count)]


def transformer(
    compiled: Rules | None = None, *, scope: Scope | None = None, allowed: bool = True, done: int = 0
) -> Transformer:
    return Transformer(
        compiled or leadfi(),
        worker="w",
        system_identifier="1",
        scope=scope or Scope(),
        policy=Policy(unsigned_control=allowed),
        resumed=Position(INVALID, LSN(0x1000), done),
    )


def fed(of: Transformer, slices: list[Transaction]) -> Iterator[Outcome]:
    for part in slices:
        yield from of.feed(part)
        while of.ready:
            yield from of.rest()


def came(
    *script: Change | Message, compiled: Rules | None = None, cuts: set[int] | None = None, scope: Scope | None = None
) -> Iterator[Outcome]:
    return fed(transformer(compiled, scope=scope), assembled(script, cuts=cuts or set()))


def noted(*script: Change | Message, compiled: Rules | None = None) -> list[tuple[str, str, tuple[str, ...]]]:
    """The table, the operation and the rows of what is noted of a commit."""
    outcomes = came(*script, compiled=compiled)
    return [(o.table[1], o.operation, o.subjects) for o in outcomes if isinstance(o, Skipped)]


# Which rows


def test_a_skipped_change_is_noted_by_the_key_of_its_row() -> None:
    skipped, told = came(inserted("contact", contact()), SKIP, LEAD, inserted("lead", lead(lead_id=8)), TELL, LEAD)
    assert skipped == Skipped(
        ("public", "lead"), "insert", ("7", "8"), collapsed=False, commit_lsn=LSN(0x1000), number=1, index=1
    )
    assert isinstance(told, Activity)


def test_each_table_and_operation_is_noted_by_itself() -> None:
    assert noted(
        SKIP,
        LEAD,
        updated("lead", lead(), status="x"),
        inserted("customer", customer()),
        deleted("lead", {"lead_id": 9}),
        inserted("lead", lead(lead_id=8)),
    ) == [
        ("lead", "insert", ("7", "8")),
        ("lead", "update", ("7",)),
        ("customer", "insert", ("42",)),
        ("lead", "delete", ("9",)),
    ]


def test_what_came_and_went_is_noted_in_this_order() -> None:
    eight = inserted("lead", lead(lead_id=8))
    gone = deleted("lead", {"lead_id": 7})
    came = ("lead", "insert", ("7",))
    left = ("lead", "delete", ("7",))
    assert noted(SKIP, LEAD, eight, gone, LEAD) == [("lead", "insert", ("7", "8")), left, came]
    assert noted(SKIP, gone, LEAD, updated("lead", lead(), lead_id=8)) == [
        left,
        came,
        left,
        ("lead", "insert", ("8",)),
    ]
    assert noted(SKIP, LEAD, truncated("lead"), eight) == [
        came,
        ("lead", "truncate", ()),
        ("lead", "insert", ("8",)),
    ]


def test_a_row_with_a_new_key_is_noted_as_gone_and_come() -> None:
    assert noted(SKIP, updated("lead", lead(), lead_id=8)) == [("lead", "delete", ("7",)), ("lead", "insert", ("8",))]


def test_a_truncate_is_about_all_rows() -> None:
    assert noted(SKIP, truncated("lead")) == [("lead", "truncate", ())]


@pytest.mark.parametrize("wish", [SKIP, COLLAPSE], ids=["skip", "collapse"])
def test_what_no_rule_could_have_told_leaves_nothing(wish: Message) -> None:
    assert noted(wish, updated("lead", lead()), inserted("contact", contact()), inserted("elsewhere", {})) == []


def test_what_is_left_to_others_leaves_nothing() -> None:
    assert list(came(SKIP, LEAD, scope=Scope(excluded={("public", "lead"): [(INVALID, None)]}))) == []


def test_without_a_message_nothing_is_noted() -> None:
    assert noted(LEAD, updated("lead", lead(), status="x"), truncated("lead")) == []


def test_a_row_whose_key_is_not_known_leaves_nothing() -> None:
    assert noted(SKIP, deleted("lead", {}), update("public", "lead", {}, {"status": "x"})) == []
    keyless = rules("[tables.lead]\nrules = [{ on = ['insert', 'truncate'], type = 't', description = '' }]")
    assert noted(SKIP, LEAD, truncated("lead"), compiled=keyless) == []


def test_a_key_that_no_index_takes_leaves_nothing() -> None:
    named = rules("[tables.tag]\nkey = 'name'\nrules = [{ on = 'insert', type = 't', description = '' }]")
    tags = [inserted("tag", {"name": "x" * length}) for length in (MAX_SUBJECT, MAX_SUBJECT + 1)]
    assert noted(SKIP, *tags, compiled=named) == [("tag", "insert", ("x" * MAX_SUBJECT,))]


def test_of_an_erased_person_the_key_is_noted_as_of_any() -> None:
    (skipped,) = came(SKIP, LEAD, scope=Scope(erased={("lead", "7"): [(LSN(0x5000), None)]}))
    assert isinstance(skipped, Skipped)
    assert skipped.subjects == ("7",)


def test_to_try_a_profile_shows_nothing_of_what_is_skipped() -> None:
    settings, counts = config.load(None, {"unsigned_control": "true"}), Counts()
    change = told_change('{"table": "lead", "new": {"lead_id": 7}, "context": {"skip": true}}')
    assert list(try_changes(settings, profile.load("leadfi"), [change], counts)) == []
    assert counts == Counts(changes=1)


# In portions


def test_many_are_noted_in_portions_each_done_when_it_is_out() -> None:
    found = [o for o in came(SKIP, *leads(2 * MAX_SKIPPED + 1), cuts={300}) if isinstance(o, Skipped)]
    assert [(len(o.subjects), o.number, o.index) for o in found] == [
        (MAX_SKIPPED, 0, 0),
        (MAX_SKIPPED, MAX_SKIPPED, MAX_SKIPPED),
        (1, 2 * MAX_SKIPPED, 2 * MAX_SKIPPED),
    ]


def test_of_a_stretch_that_is_collapsed_nothing_is_done_before_its_summary() -> None:
    *found, summary = came(LEAD, COLLAPSE, *leads(MAX_SKIPPED + 1))
    assert [(o.collapsed, o.number, o.index) for o in found if isinstance(o, Skipped)] == [
        (True, 1, 1),
        (True, 1 + MAX_SKIPPED, 1),
    ]
    assert isinstance(summary, Activity)
    assert summary.index == 1


CHANGES = st.one_of(
    st.builds(lambda key: inserted("lead", lead(lead_id=key)), st.integers(1, 3)),
    st.builds(lambda key, to: updated("lead", lead(lead_id=key), lead_id=to), st.integers(1, 3), st.integers(1, 3)),
    st.builds(lambda key: deleted("lead", {"lead_id": key}), st.integers(1, 3)),
    st.sampled_from([inserted("customer", customer()), inserted("contact", contact()), truncated("lead")]),
)
WISHES = [*({"skip": wish} for wish in (True, False)), *({"collapse": wish} for wish in (True, "x", False))]
SCRIPTS = st.lists(st.one_of(CHANGES, CHANGES, st.sampled_from([said(json.dumps(w)) for w in WISHES])), max_size=30)


CUTS = st.sets(st.integers(0, 30))


@given(SCRIPTS, CUTS, CUTS, st.integers(1, 5))
def test_a_commit_that_is_resumed_anywhere_notes_no_row_less_and_no_portion_otherwise(
    script: list[Change | Message], cuts: set[int], later: set[int], few: int
) -> None:
    with mock.patch.object(module, "MAX_SKIPPED", few):
        whole = list(came(SKIP, *script))
        first = transformer()
        written: list[Outcome] = []
        for part in assembled([SKIP, *script], cuts=cuts):
            written += fed(first, [part])
            assert written == whole[: len(written)]
            slices = assembled([SKIP, *script], cuts=later)
            again = [o for o in fed(transformer(done=first.done), slices) if o.index >= first.done]
            noted = [o for o in written if isinstance(o, Skipped) and o.collapsed]
            assert written + [o for o in again if o not in noted] == whole


@pytest.mark.parametrize("wish", [SKIP, COLLAPSE], ids=["skip", "collapse"])
def test_what_was_told_before_it_was_allowed_to_ask_is_not_noted(wish: Message) -> None:
    (first, *_) = slices = assembled([wish, *leads(9)], cuts={3})
    refusing = transformer(allowed=False)
    assert len(list(fed(refusing, [first]))) == refusing.done == 4
    skipped, *_ = fed(transformer(done=4), slices)
    assert isinstance(skipped, Skipped)
    assert skipped.subjects == ("4", "5", "6", "7", "8")


@given(SCRIPTS, CUTS, st.integers(1, 5))
def test_every_row_that_is_passed_over_is_noted_and_no_other(
    script: list[Change | Message], cuts: set[int], few: int
) -> None:
    expected = set()
    wish: dict[str, Any] = {}
    for one in script:
        if isinstance(one, Message):
            wish |= json.loads(one.content)
            continue
        rows = [row["lead_id" if one.table == "lead" else "customer_uid"] for row in (one.old, one.new) if row]
        nothing = one.table == "contact" or (one.operation == "update" and not one.changed)
        if not nothing and (wish.get("skip") or wish.get("collapse")):
            keys: list[str | None] = [*map(str, rows)] or [None]
            moved = ("delete", "insert") if len({*keys}) > 1 else (one.operation, one.operation)
            expected |= {(one.table, of, key, not wish.get("skip")) for of, key in zip(moved, keys, strict=False)}
    with mock.patch.object(module, "MAX_SKIPPED", few):
        found = [o for o in came(*script, cuts=cuts) if isinstance(o, Skipped)]
    assert {(o.table[1], o.operation, key, o.collapsed) for o in found for key in o.subjects or (None,)} == expected
    places = [(o.table, o.operation, o.number) for o in found]
    assert len(set(places)) == len(places)


# On a real server


def say(crm: Crm, **wishes: Any) -> None:
    crm.execute("SELECT cdc_worker.set_context(%s)", Jsonb(wishes))


@pytest.fixture
def obeying(crm: Crm) -> Crm:
    """One whose worker does what anyone asks."""
    crm.settings["unsigned_control"] = "true"
    return crm


def test_what_an_application_asked_not_to_tell_is_noted_by_key_alone(obeying: Crm) -> None:
    """By a role that has no more than its grants, which let it read nothing of it."""
    crm = obeying
    crm.add_leads(3)
    with crm.connection.transaction():
        say(crm, skip=True)
        crm.add_leads(1)
        crm.execute("INSERT INTO customer (customer_uid, name) VALUES (42, 'Acme')")
        crm.execute("UPDATE lead SET status = '7. lost' WHERE lead_id = 1")
        crm.execute("UPDATE lead SET status = status")
        crm.execute("UPDATE lead SET lead_id = 20 WHERE lead_id = 2")
        crm.execute("DELETE FROM lead WHERE lead_id = 3")
        say(crm, clear=True, collapse="Cleared")
        crm.execute("DELETE FROM lead WHERE lead_id IN (1, 20)")
    with role(crm):
        crm.record()
    assert crm.types() == ["lead_created"] * 3 + ["changes_collapsed"]
    noted = crm.execute(
        "SELECT table_name, operation, collapsed, number, subjects FROM cdc_worker.skipped"
        " WHERE worker = %s AND system_identifier = cdc_worker.cluster() AND commit_lsn > '0/0' ORDER BY number",
        crm.slot,
    )
    assert noted == [
        ("public.lead", "insert", False, 0, ["4", "20"]),
        ("public.customer", "insert", False, 1, ["42"]),
        ("public.lead", "update", False, 2, ["1"]),
        ("public.lead", "delete", False, 7, ["2", "3"]),
        ("public.lead", "delete", True, 9, ["1", "20"]),
    ]
    with crm.connection.transaction():
        say(crm, skip=True)
        crm.execute("TRUNCATE lead, customer, contact, activity")
    crm.record()
    truncated = "SELECT table_name FROM cdc_worker.skipped WHERE operation = 'truncate' AND subjects = '{}' ORDER BY 1"
    assert crm.execute(truncated) == [("public.customer",), ("public.lead",)]
    crm.add_leads(1)
    crm.record()
    assert crm.value("SELECT count(*) FROM cdc_worker.skipped") == 7


def test_what_is_skipped_beside_rows_that_the_target_refuses_is_noted(obeying: Crm) -> None:
    crm = obeying
    crm.execute("ALTER TABLE activity ADD CHECK (lead_id %% 50 <> 0)")
    for number in range(4):
        with crm.connection.transaction():
            say(crm, skip=True)
            crm.execute("INSERT INTO customer (customer_uid, name) VALUES (%s, 'Acme')", number)
            say(crm, skip=False)
            crm.add_leads(100)
    crm.record()
    assert len(crm.activities()) == 392
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 8
    assert crm.execute("SELECT subjects FROM cdc_worker.skipped ORDER BY 1") == [([str(n)],) for n in range(4)]


NOTED = "SELECT (SELECT count(*) FROM cdc_worker.skipped), lsn FROM cdc_worker.checkpoint"
INSIDE = "SELECT commit_lsn > '0/0' FROM cdc_worker.checkpoint"


@pytest.mark.parametrize("wish", [{"skip": True}, {"collapse": "All"}], ids=["skip", "collapse"])
@storm(2, chaos=20)
def test_kills_within_a_commit_that_is_passed_over_lose_and_double_no_row(
    obeying: Crm, seed: int, faults: Faults, wish: dict[str, Any], rounds: int
) -> None:
    crm, dice = obeying, random.Random(seed)
    with crm.connection.transaction():
        crm.add_leads(500)
        say(crm, **wish)
        crm.add_leads(20_000)
        crm.execute("UPDATE lead SET title = 'Dr' WHERE lead_id > 500 AND lead_id %% 10 = 0")
    inside = 0
    for _ in range(rounds):
        before = crm.execute(NOTED)
        with crm.worker() as worker:
            eventually(lambda: worker.process.poll() is not None or crm.execute(NOTED) != before)  # noqa: B023  # at once
            threading.Event().wait(dice.random() * 0.2)
            kill(worker, faults)
        if not crm.value(INSIDE):
            break  # all of it is written
        inside += 1
    assert inside, "it was killed within the transaction"
    crm.record()
    collapsed = "collapse" in wish
    assert Counter(crm.types()) == Counter({"lead_created": 500} | ({"changes_collapsed": 1} if collapsed else {}))
    assert crm.execute(
        "SELECT operation, collapsed, count(*), count(DISTINCT subject), min(subject::int), max(subject::int)"
        " FROM cdc_worker.skipped, unnest(subjects) AS subject GROUP BY 1, 2 ORDER BY 1"
    ) == [("insert", collapsed, 20_000, 20_000, 501, 20_500), ("update", collapsed, 2000, 2000, 510, 20_500)]
    if collapsed:
        assert crm.activities()[-1]["metadata"]["changes"] == {"lead": {"insert": 20_000, "update": 2000}}


def test_who_was_upgraded_without_setup_is_told_to_run_it(crm: Crm) -> None:
    crm.execute("DROP TABLE cdc_worker.skip; DELETE FROM cdc_worker.schema_file")
    assert crm.command("run", "--once").stderr.endswith("hint: run: cdc-worker setup\n")
    crm.setup()
    crm.record()
