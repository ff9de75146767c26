from __future__ import annotations

import json
from collections.abc import Collection, Container, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from factories import (
    COMMITTED_AT,
    ORIGIN,
    activities,
    assembled,
    contact,
    customer,
    deleted,
    inserted,
    lead,
    leadfi,
    outcomes,
    rules,
    said,
    truncated,
    updated,
)
from hypothesis import given
from hypothesis import strategies as st

from cdc_worker import transform as module
from cdc_worker.activities import Activity, DeadLetter, Scope, Stretch
from cdc_worker.changes import Change, Message, Row, Transaction, update
from cdc_worker.lsn import LSN
from cdc_worker.rules import Rules
from cdc_worker.transform import (
    ERASED,
    FACT_DISTANCE,
    MAX_ROWS,
    Fetch,
    Outcome,
    Told,
    Transformer,
    Wanted,
    transform,
)


def keys(came: list[Told]) -> list[str]:
    return [outcome.change_key for outcome in came]


def converted(lead_id: int = 7) -> Change:
    return updated("lead", lead(lead_id=lead_id), is_converted=True)


def customers_of(came: list[Told]) -> list[Any]:
    """The customers that conversions were linked to, in order."""
    return [
        outcome.fields["customer"]
        for outcome in came
        if isinstance(outcome, Activity) and outcome.fields["type"] == "lead_converted"
    ]


# The identity of a change


def test_the_key_names_worker_cluster_commit_table_ordinal_and_rule() -> None:
    (outcome,) = outcomes(inserted("lead", lead()), commit_lsn=0x16_B374D848)
    assert outcome.change_key == "w/1/00000016B374D848/public.lead/0/lead_created"


def test_keys_sort_as_commits_do() -> None:
    lsns = [0x1, 0xFFFFFFFF, 0x1_00000000, 0x10_00000000, 2**63]
    came = [outcomes(inserted("lead", lead()), commit_lsn=lsn)[0].change_key for lsn in lsns]
    assert came == sorted(came)


def test_ordinals_count_the_changes_of_one_table_in_one_commit() -> None:
    came = outcomes(
        inserted("lead", lead()),
        inserted("customer", customer()),
        inserted("elsewhere", {}),
        inserted("contact", contact()),
        updated("lead", lead()),  # a no-op is counted as well
        deleted("lead", lead()),
        deleted("customer", customer()),
    )
    assert [key.removeprefix("w/1/0000000000001000/public.") for key in keys(came)] == [
        "lead/0/lead_created",
        "customer/0/customer_created",
        "lead/2/lead_deleted",
        "customer/1/customer_deleted",
    ]
    assert [outcome.index for outcome in came] == [0, 1, 4, 5], "changes of captured tables before it"


def test_a_truncate_is_counted_too() -> None:
    came = outcomes(truncated("lead"), inserted("lead", lead()))
    assert [key.rpartition("public.")[2] for key in keys(came)] == ["lead/0/leads_truncated", "lead/1/lead_created"]


def test_ordinals_begin_anew_with_each_commit() -> None:
    transactions = [
        *assembled([inserted("lead", lead())] * 2, commit_lsn=0x1000),
        *assembled([inserted("lead", lead())], commit_lsn=0x2000),
    ]
    came = transform(leadfi(), transactions, worker="w", system_identifier="1")
    assert keys(came) == [
        "w/1/0000000000001000/public.lead/0/lead_created",
        "w/1/0000000000001000/public.lead/1/lead_created",
        "w/1/0000000000002000/public.lead/0/lead_created",
    ]


CHANGES = st.one_of(
    st.builds(lambda n: inserted("lead", lead(lead_id=n)), st.integers(1, 3)),
    st.builds(lambda n: updated("lead", lead(lead_id=n), status="x", title="y"), st.integers(1, 3)),
    st.builds(lambda n: updated("lead", lead(lead_id=n), status="x", is_converted=True), st.integers(1, 3)),
    st.builds(lambda n: updated("lead", lead(lead_id=n), is_converted=True, title="y"), st.integers(1, 3)),
    st.builds(lambda n: updated("lead", lead(lead_id=n)), st.integers(1, 3)),
    st.builds(lambda n: update("public", "lead", {"lead_id": n}, lead(lead_id=n)), st.integers(1, 3)),
    st.builds(
        lambda n, to: inserted("contact", contact(lead_id=n, customer_uid=to)), st.integers(1, 3), st.integers(1)
    ),
    st.builds(lambda n: deleted("contact", contact(lead_id=n)), st.integers(1, 3)),
    st.builds(lambda n: deleted("lead", {"lead_id": n}), st.integers(1, 3)),
    st.just(inserted("customer", customer())),
    st.just(inserted("elsewhere", {"lead_id": 1})),
)
MESSAGES = st.builds(lambda who: said(json.dumps({"changed_by": who})), st.text(max_size=3))
SCRIPTS = st.lists(st.one_of(CHANGES, MESSAGES), max_size=30)
CUTS = st.sets(st.integers(0, 30))
DISTANCES = st.sampled_from([0, 1, 2, 3, 5, FACT_DISTANCE])


@contextmanager
def distance(changes: int) -> Iterator[None]:
    """Facts are sought in so many changes, so that a short script can reach beyond."""
    with mock.patch.object(module, "FACT_DISTANCE", changes):
        yield


@given(SCRIPTS)
def test_the_key_of_a_change_is_the_same_whatever_other_tables_are_recorded(script: list[Change | Message]) -> None:
    """A narrower filter, or a recording with other tables, numbers it alike."""
    alone = [message for message in script if isinstance(message, Message) or message.table == "lead"]
    of_leads = [key for key in keys(outcomes(*script)) if "/public.lead/" in key]
    assert keys(outcomes(*alone)) == of_leads
    assert len(set(of_leads)) == len(of_leads)


# Slices


@given(SCRIPTS, CUTS, DISTANCES)
def test_what_comes_out_does_not_depend_on_slices(script: list[Change | Message], cuts: set[int], within: int) -> None:
    with distance(within):
        assert outcomes(*script, cuts=cuts) == outcomes(*script)


@given(SCRIPTS, CUTS, DISTANCES)
def test_done_never_runs_ahead_of_what_is_out(script: list[Change | Message], cuts: set[int], within: int) -> None:
    with distance(within):
        transformer = Transformer(leadfi(), worker="w", system_identifier="1")
        whole, out, before = outcomes(*script), [], 0
        for part in assembled(script, cuts=cuts):
            out += transformer.feed(part)
            assert out == [outcome for outcome in whole if outcome.index < transformer.done]
            assert transformer.done >= before, "it never goes back"
            before = transformer.done
            if part.last:
                assert transformer.done == sum(
                    isinstance(message, Change) and ("public", message.table) in leadfi() for message in script
                )
        assert out == whole


@given(SCRIPTS, CUTS, DISTANCES, st.data())
def test_a_commit_that_is_resumed_loses_and_repeats_nothing(
    script: list[Change | Message], cuts: set[int], within: int, data: st.DataObject
) -> None:
    """The process died after some slices were written; the whole commit comes again, sliced otherwise."""
    slices = assembled(script, cuts=cuts)
    survived = data.draw(st.integers(0, len(slices)))
    again = assembled(script, cuts=data.draw(CUTS))
    with distance(within):
        first = Transformer(leadfi(), worker="w", system_identifier="1")
        written = [outcome for part in slices[:survived] for outcome in first.feed(part)]
        second = Transformer(leadfi(), worker="w", system_identifier="1")
        done = first.done if survived else 0
        resumed = [outcome for part in again for outcome in second.feed(part) if outcome.index >= done]
        assert written + resumed == outcomes(*script)


def test_a_transformer_that_was_interrupted_within_a_commit_begins_it_anew() -> None:
    """The connection was lost, the process was not: nothing of the first attempt is left in the second."""
    script: list[Change | Message] = [
        said('{"changed_by": "jane"}'),
        converted(),
        inserted("lead", lead()),
        inserted("contact", contact()),
    ]
    slices = assembled(script, cuts={0, 1})
    transformer = Transformer(leadfi(), worker="w", system_identifier="1")
    transformer.feed(slices[0])
    assert [outcome for part in slices for outcome in transformer.feed(part)] == outcomes(*script)
    assert not transformer._waiting
    assert transformer.feed(assembled([inserted("lead", lead())], commit_lsn=0x2000)[0])[0].index == 0


# Context messages


def changed_by(*messages: Change | Message) -> list[str]:
    return [fields["created_by"] for fields in activities(*messages)]


def test_a_context_message_applies_to_the_changes_after_it() -> None:
    insert = inserted("lead", lead())
    assert changed_by(
        insert, said('{"changed_by": "jane"}'), insert, insert, said('{"changed_by": "joe"}'), insert
    ) == [
        *("system", "jane", "jane", "joe"),
    ]


def test_context_ends_with_its_commit() -> None:
    insert = inserted("lead", lead())
    came = transform(
        leadfi(),
        [*assembled([said('{"changed_by": "jane"}'), insert]), *assembled([insert], commit_lsn=0x2000)],
        worker="w",
        system_identifier="1",
    )
    assert [outcome.fields["created_by"] for outcome in came if isinstance(outcome, Activity)] == ["jane", "system"]


CONTEXT = """
[tables.lead]
rules = [{ on = "insert", type = "t", description = "{context.changed_by} from {context.source}" }]
"""


def test_context_messages_are_merged() -> None:
    (fields,) = activities(
        said('{"changed_by": "jane", "source": "web"}'),
        said('{"source": "import"}'),
        said("{}"),
        inserted("lead", {}),
        rules=rules(CONTEXT),
    )
    assert fields["description"] == "jane from import"


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "jane",
            "null",
            "[]",
            '"jane"',
            "7",
            "{",
            '{"changed_by": "x"',
            '{"changed_by": x}',
            "{'changed_by': 'x'}",
        ),
        *('{"changed_by": "\\ud800"}', '{"changed_by": 1e999}', '{"changed_by": ' + "[" * 100_000, "\ufffd"),
    ],
)
def test_a_context_that_is_no_json_object_is_ignored(content: str) -> None:
    """Anyone may send one. The change is recorded all the same, with the context that was there before."""
    (fields,) = activities(
        said('{"changed_by": "jane", "source": "web"}'), said(content), inserted("lead", {}), rules=rules(CONTEXT)
    )
    assert fields["description"] == "jane from web"


def test_of_a_context_only_what_a_text_column_can_hold_is_heard() -> None:
    content = '{"changed_by": "nul\\u0000", "source": {"deep": ["x"]}, "other": "\\\\u0000"}'
    (fields,) = activities(
        said('{"changed_by": "jane"}'),
        said(content),
        inserted("lead", {}),
        rules=rules(CONTEXT.replace("{context.source}", "{context.source}{context.other}")),
    )
    assert fields["description"] == "jane from \\u0000"


def test_messages_of_others_are_not_context() -> None:
    mine = said('{"changed_by": "jane"}', prefix="cdc_worker.contextual")
    assert changed_by(mine, inserted("lead", lead())) == ["system"]


def test_an_activity_that_waits_keeps_the_context_it_met() -> None:
    came = activities(
        said('{"changed_by": "jane"}'), converted(), said('{"changed_by": "joe"}'), inserted("contact", contact())
    )
    assert [(fields["type"], fields["created_by"]) for fields in came] == [("lead_converted", "jane")]


# Facts


def fillers(count: int) -> list[Change]:
    """Changes of a captured table that mean nothing by themselves."""
    return [updated("customer", customer())] * count


@pytest.mark.parametrize(("between", "linked"), [(0, 42), (FACT_DISTANCE - 1, 42), (FACT_DISTANCE, None)])
def test_a_fact_that_follows_is_found_within_10000_changes(between: int, linked: int | None) -> None:
    came = outcomes(converted(), *fillers(between), inserted("contact", contact()))
    assert customers_of(came) == [linked]


@pytest.mark.parametrize(("between", "linked"), [(0, 42), (FACT_DISTANCE - 1, 42), (FACT_DISTANCE, None)])
def test_a_fact_that_came_before_is_found_within_10000_changes(between: int, linked: int | None) -> None:
    came = outcomes(inserted("contact", contact()), *fillers(between), converted())
    assert customers_of(came) == [linked]


def test_what_came_before_goes_before_what_follows_and_the_nearest_goes_first() -> None:
    came = outcomes(
        inserted("contact", contact(customer_uid=1)),
        inserted("contact", contact(customer_uid=2)),
        converted(),
        inserted("contact", contact(customer_uid=3)),
    )
    assert customers_of(came) == [2]
    came = outcomes(
        converted(), inserted("contact", contact(customer_uid=3)), inserted("contact", contact(customer_uid=4))
    )
    assert customers_of(came) == [3]


def test_an_updated_row_is_a_fact_as_well_and_a_deleted_one_is_none() -> None:
    moved = updated("contact", contact(lead_id=8, customer_uid=1), lead_id=7, customer_uid=2)
    assert customers_of(outcomes(converted(), deleted("contact", contact()), moved)) == [2]
    assert customers_of(outcomes(moved, deleted("contact", contact()), converted())) == [2]


def test_a_fact_of_another_row_or_another_transaction_is_none() -> None:
    assert customers_of(outcomes(converted(), inserted("contact", contact(lead_id=8)))) == [None]
    came = transform(
        leadfi(),
        [
            *assembled([inserted("contact", contact())]),
            *assembled([converted()], commit_lsn=0x2000),
            *assembled([inserted("contact", contact())], commit_lsn=0x3000),
        ],
        worker="w",
        system_identifier="1",
    )
    assert customers_of(came) == [None]


def test_null_matches_nothing() -> None:
    """As in SQL: two rows whose columns are both NULL don't belong together."""
    compiled = rules(
        """
        [tables.task]
        lookups.lead = { table = "lead", match = { id = "lead_id" }, same_transaction = true }
        rules = [{ on = "insert", type = "t", description = "{lookup.lead.name}" }]
        [tables.lead]
        """
    )
    nobody = inserted("lead", {"id": None, "name": "nobody"})
    for script in ([nobody, inserted("task", {"lead_id": None})], [inserted("task", {"lead_id": None}), nobody]):
        assert [fields["description"] for fields in activities(*script, rules=compiled)] == [""]
    transformer = Transformer(compiled, worker="w", system_identifier="1")
    first, _ = assembled([inserted("task", {"lead_id": None})], cuts={0})
    assert len(transformer.feed(first)) == 1, "there is nothing to wait for"


def test_the_order_of_changes_is_kept_behind_one_that_waits() -> None:
    came = outcomes(
        inserted("lead", lead(lead_id=1)),
        updated("lead", lead(lead_id=1), status="x", is_converted=True, title="y"),
        inserted("lead", lead(lead_id=2)),
        converted(2),
        deleted("lead", {"lead_id": 3}),
        inserted("contact", contact(lead_id=2)),
        inserted("contact", contact(lead_id=1)),
        inserted("lead", lead(lead_id=4)),
    )
    assert [(outcome.index, outcome.change_key.rpartition("/")[2]) for outcome in came] == [
        (0, "lead_created"),
        (1, "status_changed"),
        (1, "lead_converted"),
        (1, "lead_updated"),
        (2, "lead_created"),
        (3, "lead_converted"),
        (4, "lead_deleted"),
        (7, "lead_created"),
    ]
    assert customers_of(came) == [42, 42]


def fed(script: list[Change | Message], compiled: Rules | None = None) -> list[tuple[int, int]]:
    """After each change of one commit: how many outcomes are out, and how many changes are done."""
    transformer = Transformer(leadfi() if compiled is None else compiled, worker="w", system_identifier="1")
    return [(len(transformer.feed(part)), transformer.done) for part in assembled(script, cuts=set(range(len(script))))]


def test_all_outcomes_of_one_change_come_out_together() -> None:
    """Else `done` would count the change as not done, and a restart would repeat those that are out."""
    both = updated("lead", lead(), status="x", is_converted=True)
    assert fed([inserted("lead", lead()), both, inserted("contact", contact())]) == [(1, 1), (0, 1), (2, 3), (0, 3)]
    other = updated("lead", lead(lead_id=8), status="x", is_converted=True)
    assert fed([both, other, inserted("contact", contact()), inserted("contact", contact(lead_id=8))]) == [
        *((0, 0), (0, 0), (2, 1), (2, 4), (0, 4)),
    ]


def test_what_waits_is_let_go_when_the_distance_is_passed() -> None:
    with distance(2):
        assert fed([converted(), *fillers(3)]) == [(0, 0), (0, 0), (0, 0), (1, 4), (0, 4)]


def test_what_waits_longest_does_not_take_along_another_that_waits_for_the_same() -> None:
    """One lead converted twice in a transaction: the first has waited in vain, the second's contact is near enough."""
    with distance(2):
        came = outcomes(converted(), *fillers(1), converted(), *fillers(1), inserted("contact", contact()))
    assert customers_of(came) == [None, 42]


TWO_FACTS = """
[tables.lead]
lookups.maker = { table = "maker", match = { lead = "id" }, same_transaction = true }
lookups.taker = { table = "taker", match = { lead = "id" }, same_transaction = true }
rules = [{ on = "insert", type = "t", description = "{lookup.maker.name} {lookup.taker.name}" }]
[tables.maker]
[tables.taker]
[tables.filler]
"""


@pytest.mark.parametrize(
    "order", ["mlt", "mtl", "tlm", "lmt", "ltm", "tml", "ml..t", "m.lt", "m.l.t", "l.m.t", "lmmt", "m..l.ot"]
)
def test_a_rule_may_need_several_facts(order: str) -> None:
    """One found before it stays found, however long the other takes."""
    made = {
        "l": inserted("lead", {"id": 1}),
        "m": inserted("maker", {"lead": 1, "name": "jane"}),
        "t": inserted("taker", {"lead": 1, "name": "joe"}),
        "o": inserted("maker", {"lead": 2, "name": "other"}),
        ".": updated("filler", {"id": 1}),
    }
    with distance(4):
        (fields,) = activities(*(made[letter] for letter in order), rules=rules(TWO_FACTS))
    assert fields["description"] == "jane joe"


def test_what_is_known_is_told_though_another_fact_never_comes() -> None:
    lead_1, filler = inserted("lead", {"id": 1}), updated("filler", {"id": 1})
    with distance(2):
        (fields,) = activities(
            inserted("maker", {"lead": 1, "name": "jane"}),
            lead_1,
            filler,
            filler,
            inserted("taker", {"lead": 1, "name": "joe"}),
            rules=rules(TWO_FACTS),
        )
    assert fields["description"] == "jane "


@given(st.lists(st.sampled_from([*(f"l{n}" for n in "123"), *(f"c{n}" for n in "123"), "."]), max_size=25), DISTANCES)
def test_a_conversion_is_linked_to_the_nearest_contact_before_else_to_the_first_after(
    letters: list[str], within: int
) -> None:
    script: list[Change] = []
    expected = []
    for place, letter in enumerate(letters):
        match letter:
            case ".":
                script += fillers(1)
            case _ if letter[0] == "c":
                script.append(inserted("contact", contact(lead_id=int(letter[1]), customer_uid=place)))
            case _:
                script.append(converted(int(letter[1])))
                contacts = [
                    n for n, other in enumerate(letters) if other == f"c{letter[1]}" and abs(n - place) <= within
                ]
                before = [n for n in contacts if n < place]
                after = [n for n in contacts if n > place]
                expected.append(before[-1] if before else after[0] if after else None)
    with distance(within):
        assert customers_of(outcomes(*script)) == expected


def test_nothing_is_kept_of_what_has_been_dealt_with() -> None:
    """A commit of any size is held in the memory of 10,000 changes."""
    transformer = Transformer(rules(TWO_FACTS), worker="w", system_identifier="1")
    script = []
    for n in range(50):
        script += [
            inserted("maker", {"lead": 0, "name": "joan"}),
            inserted("maker", {"lead": n, "name": "jane"}),
            inserted("lead", {"id": n}),
            inserted("maker", {"lead": 0, "name": "joan"}),
            inserted("lead", {"id": n}),
            inserted("taker", {"lead": n, "name": "joe"}) if n % 2 else updated("filler", {"id": 1}),
        ]
    with distance(3):
        for part in assembled(script, cuts=set(range(300))):
            transformer.feed(part)
            assert len(transformer._facts) <= 8
            assert len(transformer._waiting) <= 4
            assert len(transformer._held) <= 4


# What is no activity


def test_an_update_that_changes_nothing_is_nothing() -> None:
    assert outcomes(updated("lead", lead()), updated("customer", customer()), updated("contact", contact())) == []


def test_tables_and_operations_without_rules_are_nothing() -> None:
    other = Change("insert", "crm", "lead", None, lead())
    assert outcomes(inserted("elsewhere", {"id": 1}), other, deleted("contact", contact()), truncated("contact")) == []
    assert outcomes(update("public", "contact", {"contact_id": 1}, contact())) == []


def test_an_update_whose_old_values_are_unknown_is_one_dead_letter() -> None:
    change = update("public", "lead", {"lead_id": 7}, lead(status="x", is_converted=True))
    assert outcomes(inserted("lead", lead()), change)[1:] == [
        DeadLetter(
            "w/1/0000000000001000/public.lead/1/*",
            "old_values_unknown",
            "the change carries no old row: the table needs REPLICA IDENTITY FULL",
            change,
            1,
            COMMITTED_AT,
            origin=ORIGIN,
        )
    ]


def test_a_delete_that_carries_only_its_key_is_a_dead_letter_of_the_rule() -> None:
    change = deleted("lead", {"lead_id": 7})
    assert outcomes(change) == [
        DeadLetter(
            "w/1/0000000000001000/public.lead/0/lead_deleted",
            "rule_failed",
            'the change does not carry the column "full_name"',
            change,
            0,
            COMMITTED_AT,
            origin=ORIGIN,
        )
    ]


FAILING = """
[[tables.lead.rules]]
on = "update"
changed = "b"
to = { gone = 1 }
type = "never"
description = ""
[[tables.lead.rules]]
on = "update"
changed = "a"
type = "a_changed"
description = "{new.a:,.2f}"
[[tables.lead.rules]]
on = "update"
changed = "unclaimed"
type = "rest"
description = "{columns}"
"""


def test_a_rule_that_fails_on_data_is_a_dead_letter_and_the_others_still_apply() -> None:
    change = updated("lead", {"a": 1, "b": 1}, a="many", b=2)
    first, second, third = outcomes(change, rules=rules(FAILING))
    assert first == DeadLetter(
        "w/1/0000000000001000/public.lead/0/never",
        "rule_failed",
        'the change does not carry the column "gone"',
        change,
        0,
        COMMITTED_AT,
        origin=ORIGIN,
    )
    assert isinstance(second, DeadLetter)
    assert (second.change_key, second.kind) == ("w/1/0000000000001000/public.lead/0/a_changed", "rule_failed")
    assert third == Activity(
        "w/1/0000000000001000/public.lead/0/rest",
        {
            "type": "rest",
            "description": "b",
            "metadata": {"context_source": "default"},
            "occurred_at": COMMITTED_AT,
            "created_by": "system",
        },
        change,
        0,
        ORIGIN,
    )


def test_the_time_of_an_activity_is_that_of_the_commit() -> None:
    (transaction,) = assembled([inserted("lead", lead())])
    assert isinstance(transaction, Transaction)
    assert transaction.commit_lsn == LSN(0x1000)
    (fields,) = activities(inserted("lead", lead()))
    assert fields["occurred_at"] is COMMITTED_AT


# Erased persons


def erased(*stretches: Stretch, field: str = "lead", key: str = "7") -> Scope:
    """Of one person, whose key is not given to somebody else unless a stretch has an end."""
    return Scope(erased={(field, key): stretches or ((LSN(0x800), None),)})


def scoped(
    scope: Scope, *messages: Change | Message, cuts: set[int] | None = None, rules: Rules | None = None
) -> list[Told]:
    return transform(
        leadfi() if rules is None else rules,
        assembled(messages, cuts=cuts or ()),
        worker="w",
        system_identifier="1",
        scope=scope,
    )


def silent(outcome: Outcome) -> bool:
    """Whether it tells nothing but that something happened."""
    if isinstance(outcome, DeadLetter):
        return outcome.reason == ERASED
    assert isinstance(outcome, Activity)
    metadata = {name: told for name, told in outcome.fields["metadata"].items() if name != "changes"}
    return (outcome.fields["description"], metadata) == ("", {"erased": True})


def silences(scope: Scope, *messages: Change | Message) -> list[tuple[str, bool]]:
    """The rules of what came, each with whether it is blank."""
    return [(outcome.change_key.rpartition("/")[2], silent(outcome)) for outcome in scoped(scope, *messages)]


def test_of_an_erased_person_there_are_blank_activities() -> None:
    change = updated("lead", lead(), status="7. lost")
    (told,) = outcomes(said('{"changed_by": "jane"}'), change)
    (outcome,) = scoped(erased(), said('{"changed_by": "jane"}'), change)
    assert isinstance(told, Activity)
    assert outcome == Activity(
        told.change_key,
        {**told.fields, "description": "", "metadata": {"erased": True}},
        Change("update", "public", "lead", {"lead_id": 7}, {"lead_id": 7}, ("status",)),
        0,
        ORIGIN,
    )
    assert (told.fields["lead"], told.fields["created_by"], told.fields["owner"]) == (7, "jane", "jane")


def test_a_dead_letter_of_an_erased_person_has_no_values_either() -> None:
    unknown = update("public", "lead", {"lead_id": 7}, lead(status="x"))
    failed = deleted("lead", {"lead_id": 7, "company_name": "Engines"})
    first, second = scoped(erased(), unknown, failed)
    assert isinstance(first, DeadLetter)
    assert (first.kind, first.reason) == ("old_values_unknown", ERASED)
    assert (first.change.old, first.change.new) == ({"lead_id": 7}, {"lead_id": 7})
    assert isinstance(second, DeadLetter)
    assert (second.kind, second.reason) == ("rule_failed", ERASED)
    assert (second.change.old, second.change.new) == ({"lead_id": 7}, None)


def test_others_are_told_of_as_ever() -> None:
    script = [updated("lead", lead(lead_id=70), title="CTO"), updated("customer", customer(customer_uid=7), name="x")]
    assert scoped(erased(), *script, truncated("lead")) == outcomes(*script, truncated("lead"))


def test_a_key_may_be_text() -> None:
    compiled = rules(
        """
        [tables.lead]
        identity = { code = "{row.code}" }
        fields = { lead = "{row.code}" }
        rules = [{ on = "delete", type = "t", description = "{old.name}" }]
        """
    )
    gone = [deleted("lead", {"code": code, "name": "Ada"}) for code in ("7", "07", None)]
    assert [silent(outcome) for outcome in scoped(erased(), *gone, rules=compiled)] == [True, False, False]
    nobody = deleted("lead", {"code": None, "name": "Ada"})
    assert [silent(outcome) for outcome in scoped(erased(key=""), nobody, rules=compiled)] == [False]


def test_an_activity_that_links_to_the_person_is_blank_whatever_its_change_is_of() -> None:
    """A conversion links to the customer whom a contact names that comes later."""
    script = [converted(), inserted("contact", contact())]
    assert silences(erased(field="customer", key="42"), *script) == [("lead_converted", True)]
    assert silences(erased(field="customer", key="43"), *script) == [("lead_converted", False)]


def test_a_person_whose_key_changes_is_not_told_of_under_either() -> None:
    renamed = updated("lead", lead(), lead_id=8)
    for key, blank in (("7", True), ("8", True), ("9", False)):
        assert silences(erased(key=key), renamed) == [("lead_updated", blank)]


def test_of_a_person_whose_key_changes_no_more_is_told_than_that() -> None:
    """Without that nobody knew what became of the row, and verify would miss its deletion."""
    (outcome,) = scoped(erased(key="8"), updated("lead", lead(), lead_id=8, full_name="Grace"))
    assert isinstance(outcome, Activity)
    assert outcome.fields["metadata"] == {"erased": True, "changes": {"lead_id": {"old": 7, "new": 8}}}


def test_whose_rows_are_persons_and_who_is_only_linked_to() -> None:
    """A deal is about its lead; its own number is nobody's key, and a new deal is no new lead."""
    compiled = rules(
        """
        [tables.lead]
        identity = { id = "{row.id}", name = "{row.name}" }
        fields = { lead = "{row.id}", bd = "{row.bd}", kind = "a {row.id}" }
        rules = [{ on = "insert", type = "t", description = "{new.name}" }]
        [tables.deal]
        identity = { deal = "{row.id}" }
        fields = { lead = "{row.lead_id}", bd = "{row.bd}" }
        rules = [{ on = "insert", type = "t", description = "{new.name}" }]
        """
    )
    assert {name[1]: (table.persons, table.links) for name, table in compiled.items()} == {
        "lead": ({"lead": "id"}, {"lead": "id"}),
        "deal": ({}, {"lead": "lead_id"}),
    }
    deal = inserted("deal", {"id": 1, "lead_id": 7, "name": "for Ada", "owner": "jane"})
    (outcome,) = scoped(erased(), deal, rules=compiled)
    assert silent(outcome)
    assert outcome.change.new == {"lead_id": 7}


REUSED = [
    updated("lead", lead(), title="CTO"),
    deleted("lead", lead()),
    inserted("lead", lead(full_name="Grace")),
    updated("lead", lead(full_name="Grace"), title="CTO"),
]


@pytest.mark.parametrize(
    ("stretches", "first_told"),
    [
        ([(0x800, None)], 2),
        ([(0x800, 0x1000)], 2),  # as it is read again after a restart
        ([(0x800, 0x900)], 0),
        ([(0x800, 0x2000)], 2),
        ([(0x1800, None)], 4),
        ([(0x800, None), (0x1800, None)], 4),  # who has the key now was erased as well
        ([(0x800, 0x1000), (0x1800, None)], 4),
        ([(0x800, 0x900), (0x980, None)], 2),
    ],
)
def test_somebody_who_is_given_the_key_later_is_told_of(
    stretches: list[tuple[int, int | None]], first_told: int
) -> None:
    """Of the commit, what comes before is still of the erased person."""
    scope = erased(*((LSN(begin), None if end is None else LSN(end)) for begin, end in stretches))
    assert [blank for _, blank in silences(scope, *REUSED)] == [place < first_told for place in range(4)]


def test_the_key_stays_with_who_was_given_it() -> None:
    transformer = Transformer(leadfi(), worker="w", system_identifier="1", scope=erased())
    seen = []
    for lsn, script in ((0x900, REUSED[:2]), (0x1000, REUSED[2:]), (0x2000, REUSED[:2])):
        (transaction,) = assembled(script, commit_lsn=lsn)
        came = transformer.feed(transaction)
        seen.append(([silent(outcome) for outcome in came], transformer.given))
    assert seen == [([True, True], []), ([False, False], [("lead", "7")]), ([False, False], [])]


def test_a_key_is_given_also_where_nothing_is_recorded() -> None:
    excluded = Scope({("public", "lead"): [(LSN(0), None)]}, erased().erased)
    transformer = Transformer(leadfi(), worker="w", system_identifier="1", scope=excluded)
    (transaction,) = assembled(REUSED)
    assert (transformer.feed(transaction), transformer.given) == ([], [("lead", "7")])


PERSONS = st.sampled_from([("lead", "1"), ("lead", "2"), ("lead", "3"), ("customer", "42"), ("customer", "1")])
STRETCHES = st.sampled_from(
    [
        (LSN(begin), end)
        for begin in (0x800, 0x1800)
        for end in (None, LSN(0x1000), LSN(0x2000))
        if end is None or begin < end
    ]
)
SCOPES = st.builds(lambda found: Scope(erased=found), st.dictionaries(PERSONS, st.lists(STRETCHES, max_size=2)))


@given(SCRIPTS, CUTS, DISTANCES, SCOPES)
def test_who_is_erased_does_not_depend_on_slices(
    script: list[Change | Message], cuts: set[int], within: int, scope: Scope
) -> None:
    with distance(within):
        assert scoped(scope, *script, cuts=cuts) == scoped(scope, *script)


@given(SCRIPTS, DISTANCES, SCOPES)
def test_an_erasure_changes_nothing_but_what_is_told(script: list[Change | Message], within: int, scope: Scope) -> None:
    with distance(within):
        whole, came = outcomes(*script), scoped(scope, *script)
    assert keys(came) == keys(whole)
    for outcome, told in zip(came, whole, strict=True):
        assert silent(outcome) or outcome == told
        assert outcome.index == told.index
        if isinstance(outcome, Activity):
            assert isinstance(told, Activity)
            kept = outcome.fields.keys() - {"description", "metadata"}
            assert {name: outcome.fields[name] for name in kept} == {name: told.fields[name] for name in kept}


@given(SCRIPTS, CUTS, DISTANCES, SCOPES, st.data())
def test_a_commit_in_which_keys_are_given_may_be_resumed(
    script: list[Change | Message], cuts: set[int], within: int, scope: Scope, data: st.DataObject
) -> None:
    """The process died after some slices were written, and with them, or not, which keys had been given."""
    slices = assembled(script, cuts=cuts)
    survived = data.draw(st.integers(0, len(slices)))
    with distance(within):
        whole = scoped(scope, *script)
        first = Transformer(leadfi(), worker="w", system_identifier="1", scope=scope)
        written: list[Outcome] = []
        given = set()
        for part in slices[:survived]:
            written += first.feed(part)
            given.update(first.given)
        if data.draw(st.booleans()):
            commit = LSN(0x1000)
            known = {
                person: [
                    (begin, commit if person in given and end is None and begin < commit else end)
                    for begin, end in stretches
                ]
                for person, stretches in scope.erased.items()
            }
            scope = Scope(erased=known)
        second = Transformer(leadfi(), worker="w", system_identifier="1", scope=scope)
        resumed = [outcome for part in slices for outcome in second.feed(part)]
        done = first.done if survived else 0
        assert written + [o for o in resumed if o.index >= done] == whole


# Lookups


LOOKUPS = """
[tables.task]
key = "id"
lookups.person = { table = "person", match = { id = "person_id" } }
lookups.team = { table = "team", match = { id = "lookup.person.team_id" } }
lookups.head = { table = "person", match = { team_id = "lookup.person.team_id" }, where = { head = true } }
[[tables.task.rules]]
on = ["insert", "delete"]
type = "task"
description = "{row.id} {lookup.person.name or '-'} {lookup.team.name or '-'} {lookup.head.name or '-'}"
metadata = { team = "{lookup.team.id}" }
[[tables.task.rules]]
on = "insert"
name = "required"
type = "required"
description = "required {row.id}"
skip_unless = "lookup.person"

[tables.person]
key = "id"
rules = [{ on = "insert", type = "person", description = "{new.name}" }]

[tables.other]
rules = [{ on = "insert", type = "other", description = "{new.id}" }]
"""

DATABASE: dict[str, list[Row]] = {
    "person": [
        {"id": 1, "name": "jane", "team_id": 1, "head": True},
        {"id": 2, "name": "joe", "team_id": 1, "head": False},
        {"id": 3, "name": "bob", "team_id": None, "head": False},
        {"id": 4, "name": "eve", "team_id": 9, "head": False},
    ],
    "team": [{"id": 1, "name": "sales"}, {"id": 2, "name": "support"}],
}


def looked_for(database: dict[str, list[Row]], asked: list[Wanted] | None = None) -> Fetch:
    """Lookups in a database of lists of rows; notes what it was asked."""

    def fetch(wanted: Collection[Wanted]) -> dict[Wanted, Row | None]:
        found: dict[Wanted, Row | None] = {}
        for lookup, values in wanted:
            rows = (row for row in database[lookup.table[1]] if lookup.sought(row) == values)
            found[lookup, values] = next((kept for row in rows if (kept := lookup.kept(row)) is not None), None)
            if asked is not None:
                asked.append((lookup, values))
        return found

    return fetch


def task(number: int, person: int | None) -> Change:
    return inserted("task", {"id": number, "person_id": person})


def looked_up(
    *messages: Change | Message, fetch: Fetch | None = None, cuts: Container[int] = ()
) -> list[tuple[str, str]]:
    """Types and descriptions of what one commit comes to."""
    came = transform(
        rules(LOOKUPS),
        assembled(messages, cuts=cuts),
        worker="w",
        system_identifier="1",
        fetch=fetch or looked_for(DATABASE),
    )
    return [
        (outcome.fields["type"], outcome.fields["description"]) for outcome in came if isinstance(outcome, Activity)
    ]


def test_one_lookup_starts_from_what_another_has_found() -> None:
    assert looked_up(task(1, 2), task(2, 3), task(3, 4), task(4, None), task(5, 77)) == [
        ("task", "1 joe sales jane"),
        ("required", "required 1"),
        ("task", "2 bob - -"),
        ("required", "required 2"),
        ("task", "3 eve - -"),
        ("required", "required 3"),
        ("task", "4 - - -"),
        ("task", "5 - - -"),
    ]


def test_what_waits_for_a_lookup_keeps_its_place() -> None:
    other = inserted("other", {"id": 1})
    assert [kind for kind, _ in looked_up(other, task(1, 1), other, task(2, None), other)] == [
        *("other", "task", "required", "other", "task", "other"),
    ]


def test_nothing_is_asked_twice_and_what_the_stream_tells_is_not_asked() -> None:
    asked: list[Wanted] = []
    looked_up(*[task(n, 1) for n in range(50)], fetch=looked_for(DATABASE, asked))
    assert sorted((lookup.table[1], lookup.theirs, values) for lookup, values in asked) == [
        ("person", ("id",), (1,)),
        ("person", ("team_id",), (1,)),
        ("team", ("id",), (1,)),
    ]
    asked.clear()
    new = inserted("person", {"id": 8, "name": "ann", "team_id": None, "head": False})
    assert looked_up(new, task(1, 8), fetch=looked_for(DATABASE, asked))[1] == ("task", "1 ann - -")
    assert asked == []


def test_a_row_that_the_stream_tells_later_is_found_though_the_database_has_lost_it() -> None:
    new = inserted("person", {"id": 8, "name": "ann", "team_id": None, "head": False})
    assert looked_up(task(1, 8), new)[0] == ("task", "1 ann - -")


def test_the_stream_keeps_true_what_is_remembered() -> None:
    joe = DATABASE["person"][1]
    script = [
        task(1, 2),
        updated("person", joe, name="jo"),
        task(2, 2),
        updated("person", {**joe, "name": "jo"}, id=5),
        task(3, 2),
        task(4, 5),
        deleted("person", {**joe, "name": "jo", "id": 5}),
        task(5, 5),
    ]
    by_now = looked_for({**DATABASE, "person": [row for row in DATABASE["person"] if row["id"] != 2]})
    for cuts in (range(9), (), (0,), (1, 3, 5)):
        told = [text for kind, text in looked_up(*script, cuts=cuts, fetch=by_now) if kind == "task"]
        assert told[1:] == ["2 jo sales jane", "3 - - -", "4 jo sales jane", "5 - - -"]


SCRIPTS = st.lists(
    st.one_of(
        st.builds(task, st.integers(0, 9), st.none() | st.integers(1, 6)),
        st.builds(lambda n: inserted("other", {"id": n}), st.integers(0, 9)),
    ),
    max_size=12,
)


@given(SCRIPTS, st.sets(st.integers(0, 11)))
def test_what_is_looked_up_does_not_depend_on_slices(script: list[Change], cuts: set[int]) -> None:
    assert looked_up(*script, cuts=cuts) == looked_up(*script)


@given(SCRIPTS, st.sets(st.integers(0, 11)), st.integers(0, 12))
def test_what_is_done_while_rows_are_looked_up_can_be_resumed(script: list[Change], cuts: set[int], stop: int) -> None:
    """Nothing that is before the position is missing, nothing behind it is there."""
    whole = transform(rules(LOOKUPS), assembled(script), worker="w", system_identifier="1", fetch=looked_for(DATABASE))
    transformer = Transformer(rules(LOOKUPS), worker="w", system_identifier="1")
    came: list[Outcome] = []
    steps = 0
    for transaction in assembled(script, cuts=cuts):
        came += transformer.feed(transaction)
        while transformer.wanted or transformer.ready:
            steps += 1
            if steps == stop:
                break
            if transformer.wanted:
                transformer.tell(looked_for(DATABASE)(transformer.wanted))
            came += transformer.rest()
        if steps == stop:
            break
    assert came == whole[: len(came)]
    assert all(outcome.index < transformer.done for outcome in came)
    assert all(outcome.index >= transformer.done for outcome in whole[len(came) :])


def test_a_lookup_and_a_fact_of_the_same_transaction_complete_one_activity() -> None:
    both = rules(
        """
        [tables.lead]
        lookups.contact = { table = "contact", match = { lead_id = "id" }, same_transaction = true }
        lookups.owner = { table = "person", match = { id = "owner_id" } }
        rules = [{ on = "insert", type = "t", description = "{lookup.contact.name or '-'} {lookup.owner.name or '-'}" }]
        """
    )
    lead, contact = inserted("lead", {"id": 1, "owner_id": 1}), inserted("contact", {"lead_id": 1, "name": "ann"})
    for script in ([lead, contact], [contact, lead]):
        for cuts in ((), (0,)):
            came = transform(
                both,
                assembled(script, cuts=cuts),
                worker="w",
                system_identifier="1",
                fetch=looked_for(DATABASE),
            )
            assert [o.fields["description"] for o in came if isinstance(o, Activity)] == ["ann jane"]


def test_looked_up_rows_are_remembered_in_bounded_memory() -> None:
    transformer = Transformer(rules(LOOKUPS), worker="w", system_identifier="1")
    people = [inserted("person", {"id": n, "name": "x", "team_id": None, "head": False}) for n in range(MAX_ROWS + 500)]
    for transaction in assembled(people):
        transformer.feed(transaction)
    assert max(map(len, transformer._rows.values())) == MAX_ROWS
