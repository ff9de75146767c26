"""A commit in which everything waits for everything: whatever is out, the position says what is still to come."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any
from unittest import mock

from factories import assembled, deleted, inserted, rules, said, truncated, updated
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_worker import transform as module
from cdc_worker.activities import Batch, Position, Scope, Skipped
from cdc_worker.changes import Change, Message, Row
from cdc_worker.context import Policy
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.transform import Outcome, Transformer, Wanted

RULES = rules(
    """
[tables.task]
key = "id"
identity = { task_id = "{row.id}" }
fields = { task = "{row.id}", team = "{lookup.person.team_id}" }
lookups.person = { table = "person", match = { id = "person_id" } }
lookups.head = { table = "person", match = { team_id = "lookup.person.team_id" }, where = { head = true } }
lookups.note = { table = "note", match = { task_id = "id" }, same_transaction = true }
lookups.file = { table = "file", match = { task_id = "id" }, same_transaction = true }
[[tables.task.rules]]
on = "insert"
name = "plain"
type = "plain"
description = "{new.id}"
[[tables.task.rules]]
on = ["insert", "delete"]
name = "all"
type = "all"
description = "{lookup.person.name or '-'} {lookup.head.name or '-'} {lookup.note.text or '-'}"
[[tables.task.rules]]
on = "insert"
name = "facts"
type = "facts"
description = "{lookup.note.text or '-'} {lookup.file.text or '-'}"
[[tables.task.rules]]
on = ["insert", "delete"]
name = "required"
type = "required"
description = "required"
skip_unless = "lookup.head"

[[tables.task.rules]]
on = "update"
changed = "*"
name = "update"
type = "update"
description = "{lookup.person.name or '-'} {lookup.head.name or '-'} {lookup.note.text or '-'}"

[tables.person]
key = "id"
rules = [{ on = ["insert", "truncate"], type = "person", description = "{row.name or '-'}" }]
"""
)

PEOPLE: list[Row] = [
    {"id": 1, "name": "jane", "team_id": 1, "head": True},
    {"id": 2, "name": "joe", "team_id": 1, "head": False},
    {"id": 3, "name": "bob", "team_id": None, "head": False},
    {"id": 4, "name": "eve", "team_id": 1, "head": False},
]


def fetch(wanted: Collection[Wanted]) -> dict[Wanted, Row | None]:
    def first(lookup: Any, values: Any) -> Row | None:
        rows = (row for row in PEOPLE if lookup.sought(row) == values)
        return next((kept for row in rows if (kept := lookup.kept(row)) is not None), None)

    return {(lookup, values): first(lookup, values) for lookup, values in wanted}


def task(number: int, person: int | None) -> Row:
    return {"id": number, "person_id": person, "title": "x"}


TASKS = st.builds(task, st.integers(1, 3), st.none() | st.integers(1, 5))
CHANGES = st.one_of(
    st.builds(lambda row: inserted("task", row), TASKS),
    st.builds(lambda row: updated("task", row, title="y"), TASKS),
    st.builds(lambda row: updated("task", row), TASKS),
    st.builds(lambda row: deleted("task", row), TASKS),
    st.builds(lambda row: deleted("task", {"id": row["id"]}), TASKS),
    st.builds(
        lambda name, n: inserted(name, {"task_id": n, "text": name}),
        *map(st.sampled_from, (("note", "file"), (1, 2, 3))),
    ),
    st.just(inserted("person", PEOPLE[3])),
    st.just(truncated("person")),
)
WISHES: list[dict[str, Any]] = [
    {"collapse": True},
    {"collapse": "x"},
    {"collapse": False},
    {"skip": True},
    {"skip": False},
    {"clear": True},
    {"changed_by": "jane"},
]
SCRIPTS = st.lists(
    st.one_of(CHANGES, CHANGES, CHANGES, st.sampled_from([said(json.dumps(w)) for w in WISHES])), max_size=25
)
CUTS = st.sets(st.integers(0, 25))
SCOPES = st.sampled_from(
    [
        Scope(),
        Scope(erased={("task", "1"): [(LSN(0x800), None)]}),
        Scope(erased={("task", "1"): [(LSN(0x1800), None)], ("task", "2"): [(LSN(0x800), LSN(0x1000))]}),
        Scope(marked={("public", "task"): [(INVALID, None)]}),
    ]
)


def taken(
    script: list[Change | Message], cuts: set[int], scope: Scope, resumed: Position | None = None
) -> tuple[list[Outcome], list[tuple[Position, int]]]:
    """What comes of a commit as the worker takes it, and each position with how many of the outcomes are before it."""
    transformer = Transformer(
        RULES,
        worker="w",
        system_identifier="1",
        scope=scope,
        policy=Policy(unsigned_control=True),
        resumed=resumed or Position(INVALID),
    )
    batch, positions = Batch(Position(INVALID)), []
    done_before = resumed.changes if resumed is not None else 0
    for part in assembled(script, cuts=cuts):
        came = transformer.feed(part)
        while True:
            outcomes: list[Any] = [outcome for outcome in came if outcome.index >= done_before]
            more = transformer.ready or bool(transformer.wanted)
            done = max(transformer.done, done_before)
            batch.add(outcomes, part, done=done, complete=part.last and not more, given=transformer.given)
            positions.append((batch.end, len(batch.outcomes)))
            if not more:
                break
            if transformer.wanted:
                transformer.tell(fetch(transformer.wanted))
            came = transformer.rest()
    inside = ((batch.position_before(place), place) for place in range(len(batch.outcomes)))
    positions += [(position, place) for position, place in inside if position is not None]
    whole: list[Any] = batch.outcomes
    return whole, positions


def without_noted(outcomes: list[Outcome], written: list[Outcome]) -> list[Outcome]:
    """What is new to the database: rows of a stretch that was being collapsed are noted once, by the same place."""
    return [o for o in outcomes if not (isinstance(o, Skipped) and o.collapsed and o in written)]


@given(SCRIPTS, CUTS, CUTS, SCOPES, st.integers(1, 8))
@settings(max_examples=100)
def test_whatever_waits_a_commit_goes_on_where_it_was_written_to(
    script: list[Change | Message], cuts: set[int], later: set[int], scope: Scope, few: int
) -> None:
    with mock.patch.multiple(module, MAX_OUTCOMES=few, FACT_DISTANCE=few, MAX_SKIPPED=few):
        whole, _ = taken(script, set(), scope)
        came, positions = taken(script, cuts, scope)
        assert came == whole
        for position, place in positions:
            if position.commit_lsn:
                again, _ = taken(script, later, scope, position)
                assert without_noted(again, whole[:place]) == whole[place:]
            else:
                assert place in (0, len(whole))
