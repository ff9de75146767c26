"""Changes that are skipped or told as one: what is counted and credited, and that slices and restarts don't matter."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from factories import (
    COMMITTED_AT,
    assembled,
    contact,
    converted,
    customer,
    deleted,
    inserted,
    lead,
    leadfi,
    said,
    truncated,
    updated,
)
from hypothesis import given
from hypothesis import strategies as st
from psycopg.types.json import Jsonb
from support import Crm, eventually, storm

from cdc_worker.activities import Activity, Position, Scope
from cdc_worker.changes import Change, Message, Transaction, update
from cdc_worker.context import Policy
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.transform import Told, Transformer
from cdc_worker.transform import told as told_of

LEAD = inserted("lead", lead())
PREFIX = "w/1/0000000000001000"


def asked(**wishes: Any) -> Message:
    return said(json.dumps(wishes))


def fed(transformer: Transformer, slices: list[Transaction]) -> Iterator[Told]:
    """What is told of them: what is noted without being told is in test_skipped.py."""
    for part in slices:
        yield from told_of(transformer.feed(part))
        while transformer.ready:
            yield from told_of(transformer.rest())


def transformer(*, allowed: bool = True, scope: Scope | None = None, resumed: Position | None = None) -> Transformer:
    policy = Policy(unsigned_control=allowed, kept=("request_id",))
    return Transformer(
        leadfi(),
        worker="w",
        system_identifier="1",
        scope=scope or Scope(),
        policy=policy,
        resumed=resumed or Position(INVALID),
    )


def counts(outcome: Told) -> int:
    """Of how many changes an outcome is the summary."""
    if "/collapse" not in outcome.change_key:
        return 0
    assert isinstance(outcome, Activity)
    return sum(sum(by.values()) for by in outcome.fields["metadata"]["changes"].values())


def outcomes(*script: Change | Message, scope: Scope | None = None) -> list[Told]:
    return list(fed(transformer(scope=scope), assembled(script)))


def told(*script: Change | Message) -> list[str]:
    """The ends of the keys of what comes of it."""
    return [outcome.change_key.removeprefix(PREFIX) for outcome in outcomes(*script)]


# Skip


def test_skipped_changes_leave_nothing_and_are_counted() -> None:
    assert told(LEAD, asked(skip=True), LEAD, truncated("lead"), asked(skip=False), LEAD) == [
        "/public.lead/0/lead_created",
        "/public.lead/3/lead_created",
    ]


def test_a_skip_ends_with_its_commit() -> None:
    slices = [*assembled([asked(skip=True), LEAD]), *assembled([LEAD], commit_lsn=0x2000)]
    assert [o.change_key for o in fed(transformer(), slices)] == ["w/1/0000000000002000/public.lead/0/lead_created"]


def test_skipped_changes_tell_the_others_their_facts() -> None:
    (_, outcome) = outcomes(
        asked(skip=True), inserted("contact", contact(customer_uid=43)), asked(clear=True), *(LEAD, converted())
    )
    assert isinstance(outcome, Activity)
    assert outcome.fields["customer"] == 43


def test_a_skipped_row_takes_the_key_of_an_erased_person() -> None:
    of = transformer(scope=Scope(erased={("lead", "7"): [(LSN(0x500), None)]}))
    assert list(fed(of, assembled([asked(skip=True), LEAD]))) == []
    assert of.given == [("lead", "7")]


def test_a_skip_goes_before_a_collapse() -> None:
    assert told(asked(skip=True, collapse=True), LEAD) == []


def test_who_may_not_ask_is_told_of_and_everything_is_recorded() -> None:
    of = transformer(allowed=False)
    slices = assembled([LEAD, asked(skip=True), LEAD, asked(collapse="x"), LEAD], cuts={0, 1, 2})
    refused, metadata = [], []
    for part in slices:
        metadata += [o.fields["metadata"].get("context_refused") for o in of.feed(part) if isinstance(o, Activity)]
        refused.append(sorted(of.refused))
    assert refused == [[], ["skip"], ["collapse"], []]
    assert metadata == [None, ["skip"], ["collapse", "skip"]]


# Collapse


def test_collapsed_changes_are_told_as_one_that_counts_them() -> None:
    script: list[Change | Message] = [
        LEAD,
        asked(changed_by="jane", request_id="r1", collapse={"type": "import", "description": "Prices of 2027"}),
        *[updated("lead", lead(), status="x")] * 3,
        updated("lead", lead()),  # changes nothing
        inserted("contact", contact()),  # has no activities
        inserted("elsewhere", {}),
        update("public", "lead", {"lead_id": 7}, lead()),  # whose old values are unknown
        deleted("customer", customer()),
        truncated("lead"),
    ]
    first, summary = outcomes(*script)
    assert isinstance(summary, Activity)
    assert first.change_key == f"{PREFIX}/public.lead/0/lead_created"
    assert summary == Activity(
        f"{PREFIX}/cdc_worker.context/0/collapse",
        {
            "type": "import",
            "description": "Prices of 2027",
            "metadata": {
                "changes": {"lead": {"update": 4, "truncate": 1}, "customer": {"delete": 1}},
                "changed_by": "jane",
                "context_source": "message",
                "request_id": "r1",
            },
            "occurred_at": COMMITTED_AT,
            "created_by": "jane",
        },
        Change("update", "public", "lead", None, None),
        1,
        summary.origin,
    )
    assert summary.origin.context.said == {"changed_by": "jane", "request_id": "r1"}


def test_without_words_of_its_own_it_says_what_it_counts() -> None:
    (summary,) = outcomes(asked(collapse=True), LEAD, LEAD, inserted("customer", customer()))
    assert isinstance(summary, Activity)
    assert summary.fields["type"] == "changes_collapsed"
    assert summary.fields["description"] == "Changes: lead insert 2, customer insert 1"
    assert summary.fields["created_by"] == "system"


def test_nothing_collapsed_is_nothing_told() -> None:
    assert told(asked(collapse=True)) == []
    assert told(asked(collapse=True), inserted("contact", contact())) == []
    assert told(asked(collapse=True), asked(collapse=False), LEAD) == ["/public.lead/0/lead_created"]


def test_it_is_told_before_the_change_that_is_no_longer_collapsed() -> None:
    assert told(asked(collapse=True), LEAD, LEAD, asked(collapse=False), LEAD) == [
        "/cdc_worker.context/0/collapse",
        "/public.lead/2/lead_created",
    ]


def test_nobody_is_credited_with_the_changes_of_somebody_else() -> None:
    came = outcomes(
        asked(collapse=True, changed_by="jane"),
        LEAD,
        LEAD,
        asked(changed_by="joe"),
        LEAD,
        asked(changed_by="joe"),
        LEAD,
    )
    found = [(o.fields["created_by"], o.fields["metadata"]["changes"]) for o in came if isinstance(o, Activity)]
    assert found == [("jane", {"lead": {"insert": 2}}), ("joe", {"lead": {"insert": 2}})]
    assert [o.change_key.removeprefix(PREFIX) for o in came] == [
        "/cdc_worker.context/0/collapse",
        "/cdc_worker.context/1/collapse",
    ]


def test_its_key_does_not_depend_on_the_tables_that_are_recorded() -> None:
    script: list[Change | Message] = [asked(collapse=True), inserted("customer", customer()), asked(collapse="x"), LEAD]
    assert told(*script)[-1:] == told(*[m for m in script if isinstance(m, Message) or m.table == "lead"])


def test_a_summary_names_no_person() -> None:
    (summary,) = outcomes(asked(collapse=True), LEAD, LEAD, scope=Scope(erased={("lead", "7"): [(LSN(0x5000), None)]}))
    assert isinstance(summary, Activity)
    assert "Ada" not in str(summary)
    assert summary.fields["metadata"]["changes"] == {"lead": {"insert": 2}}


def test_changes_that_are_left_to_others_are_not_counted() -> None:
    scope = Scope(excluded={("public", "lead"): [(INVALID, None)]})
    assert outcomes(asked(collapse=True), LEAD, scope=scope) == []


# Slices and restarts

CHANGES = st.sampled_from(
    [LEAD, converted(), updated("lead", lead()), inserted("contact", contact()), inserted("customer", customer())]
)
COLLAPSES = st.sampled_from(
    [
        *(asked(collapse=wish) for wish in (True, "x", False)),
        *(asked(changed_by=name) for name in ("jane", "joe")),
        asked(clear=True),
    ]
)
SKIPS = st.sampled_from([asked(skip=wish) for wish in (True, False)])
SCRIPTS = st.lists(st.one_of(CHANGES, CHANGES, COLLAPSES, SKIPS), max_size=30)
CUTS = st.sets(st.integers(0, 30))


@given(SCRIPTS, CUTS)
def test_what_comes_out_does_not_depend_on_slices(script: list[Change | Message], cuts: set[int]) -> None:
    assert list(fed(transformer(), assembled(script, cuts=cuts))) == outcomes(*script)


@given(SCRIPTS, CUTS, st.data())
def test_a_commit_that_is_resumed_loses_and_repeats_nothing(
    script: list[Change | Message], cuts: set[int], data: st.DataObject
) -> None:
    slices = assembled(script, cuts=cuts)
    survived = data.draw(st.integers(0, len(slices)))
    first = transformer()
    written = list(fed(first, slices[:survived]))
    done = first.done if survived else 0
    again = fed(transformer(), assembled(script, cuts=data.draw(CUTS)))
    assert written + [outcome for outcome in again if outcome.index >= done] == outcomes(*script)


@given(st.lists(st.one_of(CHANGES, CHANGES, COLLAPSES), max_size=30), CUTS, st.data())
def test_a_commit_may_be_resumed_by_who_allows_no_longer_to_collapse(
    script: list[Change | Message], cuts: set[int], data: st.DataObject
) -> None:
    """Nothing of a stretch is done before its summary is: who counts otherwise has all of it."""
    slices = assembled(script, cuts=cuts)
    first = transformer()
    written = list(fed(first, slices[: data.draw(st.integers(0, len(slices)))]))
    done = first.done if written else 0
    again = [outcome for outcome in fed(transformer(allowed=False), assembled(script)) if outcome.index >= done]
    whole = {outcome.index for outcome in fed(transformer(allowed=False), assembled(script))}
    kept = [outcome.index for outcome in written if not counts(outcome)]
    assert len({*kept, *(outcome.index for outcome in again)}) + sum(map(counts, written)) == len(whole)


@given(st.lists(st.one_of(CHANGES, CHANGES, COLLAPSES), max_size=30), CUTS, st.data())
def test_a_commit_may_be_resumed_by_who_allows_to_collapse_what_was_not(
    script: list[Change | Message], cuts: set[int], data: st.DataObject
) -> None:
    """As where somebody stops the worker within a bulk change, to let the rest of it be told as one."""
    slices = assembled(script, cuts=cuts)
    first = transformer(allowed=False)
    written = list(fed(first, slices[: data.draw(st.integers(0, len(slices)))]))
    done = first.done if written else 0
    second = transformer(resumed=Position(LSN(0), slices[0].commit_lsn if slices else INVALID, done))
    again = [outcome for outcome in fed(second, assembled(script)) if outcome.index >= done]
    whole = {outcome.index for outcome in fed(transformer(allowed=False), assembled(script))}
    assert len({*(outcome.index for outcome in (*written, *again) if not counts(outcome))}) + sum(
        map(counts, again)
    ) == len(whole)


@given(SCRIPTS)
def test_keys_are_unique_and_every_change_is_told_once_or_skipped(script: list[Change | Message]) -> None:
    came = outcomes(*script)
    keys = [outcome.change_key for outcome in came]
    assert len(set(keys)) == len(keys)
    assert [outcome.index for outcome in came] == sorted(outcome.index for outcome in came)


# On a real server


def say(crm: Crm, **wishes: Any) -> None:
    crm.execute("SELECT cdc_worker.set_context(%s)", Jsonb(wishes))


@storm(3, chaos=20)
def test_kills_within_a_transaction_that_is_partly_collapsed_lose_and_double_nothing(
    crm: Crm, seed: int, rounds: int
) -> None:
    dice = random.Random(seed)
    crm.settings["unsigned_control"] = "true"
    with crm.connection.transaction():
        for number in range(rounds):
            say(crm, collapse=False)
            crm.add_leads(3000)
            say(crm, collapse=f"Round {number}", changed_by="jane")
            crm.execute("UPDATE lead SET title = 'Dr' WHERE title IS NULL")
    position = "SELECT changes FROM cdc_worker.checkpoint"
    inside = 0
    for _ in range(rounds):
        before = crm.value(position)
        if inside and not before:
            break  # all of it is written
        with crm.worker() as worker:
            eventually(lambda: worker.process.poll() is not None or crm.value(position) != before)  # noqa: B023  # at once
            threading.Event().wait(dice.random() * 0.2)
            worker.kill()
        inside += crm.value(position) > 0
    assert inside > 0, "it was killed within the transaction"
    crm.record()
    assert Counter(crm.types()) == {"lead_created": rounds * 3000, "changes_collapsed": rounds}
    summaries = [a for a in crm.activities() if a["activity_type"] == "changes_collapsed"]
    assert [(a["description"], a["created_by"], a["metadata"]["changes"]) for a in summaries] == [
        (f"Round {number}", "jane", {"lead": {"update": 3000}}) for number in range(rounds)
    ]
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_what_a_target_without_room_for_it_refuses_is_a_dead_letter(crm: Crm) -> None:
    """As where activities need a lead: a summary belongs to none."""
    crm.execute("ALTER TABLE activity ADD CHECK (lead_id IS NOT NULL)")
    crm.settings["unsigned_control"] = "true"
    with crm.connection.transaction():
        say(crm, collapse="Import")
        crm.add_leads(3)
        say(crm, collapse=False)
        crm.add_leads(1)
    crm.record()
    assert crm.types() == ["lead_created"]
    ((key, kind, fields),) = crm.execute("SELECT change_key, kind, fields FROM cdc_worker.dead_letter")
    assert (key.rpartition("/cdc_worker")[2], kind) == (".context/0/collapse", "refused")
    assert fields["description"] == "Import"


def test_the_worker_warns_once_of_messages_that_the_key_has_not_signed(crm: Crm) -> None:
    with crm.worker(context_key="a key of sixteen or more") as worker:
        for name in ("jane", "joe"):
            with crm.connection.transaction():
                say(crm, changed_by=name)
                crm.add_leads(1)
        eventually(lambda: len(crm.types()) == 2)
        (warning,) = worker.events("context_untrusted")
        assert warning["level"] == "warning"
    found = [(a["created_by"], a["metadata"]["context_claimed"]) for a in crm.activities()]
    assert found == [("system", {"changed_by": "jane"}), ("system", {"changed_by": "joe"})]


def test_the_worker_warns_of_what_it_does_not_allow_once_a_transaction(crm: Crm) -> None:
    with crm.connection.transaction():
        say(crm, skip=True)
        crm.add_leads(2)
    with crm.worker() as worker:
        warning = worker.wait_for("context_refused")
        eventually(lambda: len(crm.types()) == 2)
        assert (warning["level"], warning["asked"]) == ("warning", ["skip"])
        assert len(worker.events("context_refused")) == 1
        assert worker.events("context_untrusted") == []
    assert [activity["metadata"]["context_refused"] for activity in crm.activities()] == [["skip"]] * 2
