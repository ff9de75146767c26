"""Profiles and rows of every kind: what comes out is an activity or a dead letter, with the values as they are."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from factories import assembled, deleted, inserted, outcomes, profile, rules, said, truncated, updated
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cdc_worker.activities import Activity, DeadLetter, change_key
from cdc_worker.catalog import TargetTable
from cdc_worker.changes import Change, Message, Row, update
from cdc_worker.config import load as load_settings
from cdc_worker.ddl import schema
from cdc_worker.errors import ProfileError
from cdc_worker.lines import encoder, parsed
from cdc_worker.profile import Profile, Target
from cdc_worker.rules import Lookup, Rules, compile_rules, qualified
from cdc_worker.templates import MAX_DEPTH, Event
from cdc_worker.transform import Told, Wanted, transform
from cdc_worker.values import Value

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
"""What a text column can hold."""

ODD = st.sampled_from(
    [
        *("", " ", "{", "}}", "{new.a}", "{0.__class__}", "%s", "%(a)s", "%", "$1", "\\", "\\N", "\\.", "\t", "\r\n"),
        *("a\ts", "'", '"', "'; DROP TABLE lead; --", "NaN", "-Infinity", "1_000", "1e999999999", "-1e-999999999"),
        *("12.50", "\u202e", "😀", "null", "true", "*", "unclaimed", "***"),
    ]
)

# Of floats no NaN: JSON has none, and wal2json tells NULL in its place.
VALUES: st.SearchStrategy[Value] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(10**4000), Decimal("1e400"), Decimal("1e-400"), 1e308, 5e-324]),
    st.decimals(allow_nan=False, allow_infinity=False, places=2),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
    ODD,
)

COLUMNS = ["id", "a", "b", "c"]

WHOLE = st.fixed_dictionaries({"id": st.integers(1, 3), **dict.fromkeys("abc", VALUES)})

ROWS = st.one_of(
    WHOLE, WHOLE, WHOLE, st.fixed_dictionaries({"id": st.integers(1, 3)}, optional=dict.fromkeys("abc", VALUES))
)
"""Rows of which columns may be missing, as after a rename or where a large value isn't sent."""

# Profiles made at random, of all that the language has.

LITERALS = st.sampled_from(["", "x", " ", "{{", "}}", "%", "'", "\\", "\n", "\ts", "ü"])

SPECS = st.sampled_from(
    ["", ":,.2f", ":>7", ":*^9", ":cut 3", ":cut 1 ...", ":d", ":.0%", ":x", ":.3", ":n", ":,", ":_", ":e", ":z.1f"]
)

PATHS = st.sampled_from(
    [
        *("row.id", "row.a", "row.b", "row.c", "row.kind", "columns"),
        *("lookup.other", "lookup.other.a", "lookup.next.b", "lookup.near.c", "values.v", "values.w", "context.why"),
    ]
)


@st.composite
def templates(draw: st.DrawFn, paths: st.SearchStrategy[str] = PATHS) -> str:
    made = ""
    for _ in range(draw(st.integers(0, 3))):
        found = " or ".join(draw(st.lists(paths, min_size=1, max_size=2)))
        default = draw(st.sampled_from(["", "", " or 'none'", " or ''"]))
        made += draw(LITERALS) + "{" + found + default + draw(SPECS) + "}"
    return made + draw(LITERALS)


CONSTANTS = st.one_of(st.booleans(), st.integers(-5, 5), st.decimals(-9, 9, places=1), TEXT.map(lambda t: t[:3]))


def negated(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return inner.map(lambda matcher: {"not": matcher})


MATCHERS: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        CONSTANTS,
        st.fixed_dictionaries(
            {},
            optional={
                "null": st.booleans(),
                "empty": st.booleans(),
                **dict.fromkeys(["over", "at_least", "under", "at_most"], st.decimals(-99, 99, places=1)),
            },
        ),
    ),
    lambda inner: st.one_of(st.lists(inner.filter(lambda m: not isinstance(m, list)), max_size=2), negated(inner)),
    max_leaves=3,
)


def compared(columns: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(columns, MATCHERS, max_size=2)


DELTAS = st.dictionaries(
    st.sampled_from("abc"),
    st.dictionaries(
        st.sampled_from(["over", "at_least", "over_ratio", "at_least_ratio"]), st.decimals(0, 9, places=1), max_size=2
    ),
    max_size=1,
)

_ABC = st.sampled_from("abc")

CONDITIONS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.fixed_dictionaries({}, optional={"row": compared(_ABC), "context": compared(st.just("why"))}),
    lambda inner: st.one_of(
        negated(inner), st.lists(inner, max_size=2).map(lambda of: {"all": of}), inner.map(lambda of: {"any": [of]})
    ),
    max_leaves=3,
)

KNOWN_LATER = st.one_of(CONDITIONS, compared(_ABC).map(lambda of: {"lookup": {"other": of}}))


def values(text: st.SearchStrategy[str] | None = None) -> st.SearchStrategy[Any]:
    """Values of a profile."""
    simple = st.one_of(st.booleans(), st.integers(-9, 9), templates() if text is None else text)
    paths = st.sampled_from(["row.a", "row.b", "lookup.other.a", "context.why"])
    maps = st.fixed_dictionaries(
        {"by": paths, "map": st.dictionaries(TEXT, simple, min_size=1, max_size=2)}, optional={"default": simple}
    )
    written = templates() if text is None else text
    parts = st.lists(
        st.one_of(
            written,
            st.fixed_dictionaries({"text": written, "when": KNOWN_LATER}, optional={"otherwise": written}),
        ),
        max_size=3,
    )
    return st.one_of(simple, maps, parts)


_OWN = templates(st.sampled_from(["row.a", "row.b", "lookup.next.b", "columns"]))


OPERATIONS = st.permutations(["insert", "update", "update", "delete", "truncate"])


@st.composite
def a_rule(draw: st.DrawFn, name: int, on: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"on": on, "name": f"r{name}", "type": draw(values()), "description": draw(values())}
    rule["metadata"] = draw(st.dictionaries(TEXT, st.one_of(values(), st.just("{changes}")), max_size=2))
    rule["fields"] = {"extra": draw(values())}
    rule["values"] = {"w": draw(values(_OWN))}
    seldom: dict[str, st.SearchStrategy[Any]] = {
        "when": CONDITIONS,
        "skip_unless": st.lists(st.sampled_from(["row.a", "lookup.other", "values.v"]), max_size=1),
    }
    if on == "update":
        rule["changed"] = draw(st.sampled_from(["*", "*", "unclaimed", "a", ["b", "c"], ["kind"]]))
        seldom |= {"from": compared(_ABC), "to": compared(st.sampled_from(["a", "b", "kind"])), "delta": DELTAS}
    return rule | {key: draw(of) for key, of in seldom.items() if draw(st.integers(0, 3)) == 0}


LOOKUPS = {
    "other": {"table": "other", "match": {"id": "id"}},
    "next": {"table": "other", "match": {"id": "lookup.other.id"}, "where": {"a": "x"}},
    "near": {"table": "other", "match": {"id": "id"}, "same_transaction": True},
}

TARGET = {
    "table": "activity",
    "columns": {"t": "type", "d": "description", "m": "metadata", "x": "extra", "n": "occurred_at", "k": "change_key"},
    "constants": {"c": "\t\\N'"},
    "lengths": {"t": 5},
}


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Profiles of one table, `lead`, with a few rules."""
    spec = {
        "key": "id",
        "actor": draw(st.sampled_from(["{row.a}", "{lookup.other.b or row.c}"])),
        "identity": {"id": "{row.id}"},
        "values": {"v": draw(values(_OWN))},
        "mapped": {"kind": {"column": "a", "map": {"x": "X", "": "empty"}, "default": "other"}},
        "lookups": LOOKUPS,
        "rules": [draw(a_rule(number, on)) for number, on in enumerate(draw(OPERATIONS))],
    }
    return Profile.model_validate({"name": "any", "target": TARGET, "tables": {"lead": spec}, "context": ["why"]})


@st.composite
def changes(draw: st.DrawFn) -> Change:
    table = draw(st.sampled_from(["lead", "lead", "other"]))
    match draw(st.sampled_from(["insert", "update", "delete", "truncate"])):
        case "insert":
            return inserted(table, draw(ROWS))
        case "update":
            return update("public", table, draw(ROWS), draw(ROWS))
        case "delete":
            return deleted(table, draw(ROWS))
        case _:
            return truncated(table)


MESSAGES = st.dictionaries(
    st.sampled_from(["why", "changed_by", "clear", "skip", "collapse"]), st.one_of(st.none(), st.booleans(), TEXT, ODD)
).map(lambda message: said(json.dumps(message)))

COMMITS = st.lists(st.one_of(changes(), changes(), MESSAGES), min_size=1, max_size=4)


def told(rules: Rules, commit: list[Change | Message], found: Row | None = None) -> list[Told]:
    """What a commit becomes, where every row that is looked for is the one that is `found`."""

    def fetch(wanted: Collection[Wanted]) -> Mapping[Wanted, Row | None]:
        return {(lookup, values): kept(lookup, values) for lookup, values in wanted}

    def kept(lookup: Lookup, values: tuple[Value, ...]) -> Row | None:
        return None if found is None else {column: found.get(column) for column in lookup.columns}

    return transform(rules, assembled(commit), worker="w", system_identifier="1", fetch=fetch)


TABLE = TargetTable(
    columns={"t": "text", "d": "text", "m": "jsonb", "x": "text", "n": "timestamp with time zone", "k": "text"},
    lengths={"t": 5},
    foreign_keys={},
    deferrable=False,
    row_security=False,
    deadlock_timeout=1,
    shape="",
)


@settings(max_examples=20)
@given(profiles(), COMMITS, st.none() | ROWS)
def test_whatever_a_change_is_it_becomes_rows_of_the_target_or_dead_letters(
    profile: Profile, commit: list[Change | Message], found: Row | None
) -> None:
    encode = encoder(profile.target, TABLE, ZoneInfo("UTC"))
    for outcome in told(compile_rules(profile), commit, found):
        if isinstance(outcome, DeadLetter):
            assert outcome.kind in ("rule_failed", "old_values_unknown")
            continue
        values = parsed(encode(outcome))
        assert values[-2:] == [outcome.change_key, "\t\\N'"], "a value has become two"
        assert isinstance(json.loads(values[2] or ""), dict)


MOMENTS = st.datetimes(timezones=st.just(UTC))
NEARBY = st.tuples(MOMENTS, st.lists(st.timedeltas(timedelta(seconds=-5), timedelta(seconds=5)), max_size=4))


@given(NEARBY, st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns", "Pacific/Kiritimati"]))
def test_times_are_those_of_the_zone_whatever_was_told_before(
    nearby: tuple[datetime, list[timedelta]], name: str
) -> None:
    moment, distances = nearby
    target = Target.model_validate({"table": "activity", "columns": {"n": "occurred_at"}})
    table = dataclasses.replace(TABLE, columns={"n": "timestamp without time zone"})
    encode = encoder(target, table, ZoneInfo(name))
    change = Change("insert", "public", "lead", None, {})
    for distance in (timedelta(0), *distances):
        expected = None  # beyond the calendar it is told somehow
        at = moment
        with suppress(OverflowError):
            at = moment + distance
            expected = at.astimezone(ZoneInfo(name)).replace(tzinfo=None)
        (printed,) = parsed(encode(Activity("k", {"type": "t", "metadata": {}, "occurred_at": at}, change, 0)))
        assert printed is not None
        if expected is not None:
            assert datetime.fromisoformat(printed) == expected


# Data stays data.

ROUTES = {
    "alone": "{new.a}",
    "or": "{new.none or new.a}",
    "in_text": "<{new.a}>",
    "cut": "<{new.a:cut 100}>",
    "padded": "<{new.a:>2}>",
    "named": "{values.named}",
    "map": {"by": "new.a", "map": {"unlikely": "x"}, "default": "<{new.a}>"},
    "parts": [{"text": "<{new.a}>", "when": {"new": {"none": {"null": True}}}}],
    "lookup": "{lookup.other.a}",
    "context": "{context.why}",
}


@given(st.one_of(TEXT, ODD).filter(bool))
def test_a_text_comes_out_as_it_went_in_by_every_way(text: str) -> None:
    profile = Profile.model_validate(
        {
            "name": "any",
            "target": {"table": "activity", "columns": {"t": "type"}},
            "tables": {
                "lead": {
                    "lookups": {"other": {"table": "other", "match": {"id": "id"}}},
                    "values": {"named": "{new.a}"},
                    "rules": [{"on": "insert", "type": "{new.a}", "name": "r", "description": "", "metadata": ROUTES}],
                }
            },
        }
    )
    commit: list[Change | Message] = [
        said(json.dumps({"why": text})),
        inserted("lead", {"id": 1, "a": text, "none": None}),
    ]
    (outcome,) = told(compile_rules(profile), commit, {"a": text})
    assert isinstance(outcome, Activity)
    whole = outcome.fields["metadata"]
    bare = ("alone", "or", "named", "lookup", "context")
    assert {name: whole[name] for name in ROUTES} == {
        name: text if name in bare else f"<{text:>2}>" if name == "padded" else f"<{text}>" for name in ROUTES
    }
    assert outcome.fields["type"] == text


@pytest.mark.parametrize("spec", [",.2f", ".0%", "d", "e", ">9"])
@pytest.mark.parametrize("text", ["1e999999999", "-1e-999999999", "NaN", "sNaN", "Infinity", "9" * 200_000])
def test_a_text_that_names_a_number_which_no_memory_could_hold_is_no_number(text: str, spec: str) -> None:
    compiled = rules(f"[tables.lead]\nrules = [{{ on = 'insert', type = 't', description = '{{new.a:{spec}}}' }}]")
    (outcome,) = outcomes(inserted("lead", {"a": text}), rules=compiled)
    if isinstance(outcome, Activity):
        assert outcome.fields["description"].strip() == text
    else:
        assert text not in outcome.reason


@given(
    st.integers() | st.decimals(allow_nan=False, allow_infinity=False, places=3),
    st.sampled_from([",.2f", ".0f", ".4f"]),
)
@example(2**63 - 1, ",.2f")
@example(10**400, ",.2f")
def test_money_is_exact_whatever_the_amount(amount: int | Decimal, spec: str) -> None:
    """A numeric without a fraction arrives as an int, of which Python's own formats would make a float."""
    compiled = rules(f"[tables.lead]\nrules = [{{ on = 'insert', type = 't', description = '{{new.a:{spec}}}' }}]")
    (outcome,) = outcomes(inserted("lead", {"a": amount}), rules=compiled)
    assert isinstance(outcome, Activity)
    printed = Decimal(outcome.fields["description"].replace(",", ""))
    assert abs(Fraction(printed) - Fraction(amount)) <= Fraction(1, 2 * 10 ** int(spec.strip(",")[1]))


# Conditions say yes or no.


@given(VALUES, VALUES, MATCHERS, DELTAS)
def test_a_condition_says_yes_or_no_of_every_value(old: Value, new: Value, matcher: Any, delta: Any) -> None:
    rule = {"on": "update", "changed": "*", "type": "t", "description": "", "from": {"a": matcher}}
    compiled = compiled_rule({**rule, "to": {"a": {"not": matcher}}, "delta": delta})
    assert len(told(compiled, [updated("lead", {"a": old}, a=new)])) <= 1


def compiled_rule(rule: dict[str, Any], **table: Any) -> Rules:
    tables = {"lead": {"rules": [rule], **table}}
    return compile_rules(
        Profile.model_validate({"name": "any", "target": {"table": "t", "columns": {"t": "type"}}, "tables": tables})
    )


@given(VALUES)
def test_a_condition_and_its_opposite_never_agree(value: Value) -> None:
    for matcher in ({"null": True}, {"empty": True}, {"over": 5}, {"at_most": 5}, 1, "x", [1, "x"]):
        came = [
            told(compiled_rule({"on": "insert", "type": "t", "description": "", "when": {"row": {"a": of}}}), [change])
            for of in (matcher, {"not": matcher})
            for change in [inserted("lead", {"a": value})]
        ]
        assert sorted(map(len, came)) == [0, 1]


# What changed.


@given(ROWS, st.sets(st.sampled_from(COLUMNS)))
def test_a_row_that_is_as_it_was_has_no_changed_columns(row: Row, unsent: set[str]) -> None:
    """What isn't sent is an unchanged TOASTed value: as it was, which is neither a change nor NULL."""
    sent = {column: value for column, value in row.items() if column not in unsent}
    change = update("public", "lead", row, sent)
    assert change.changed == ()
    assert change.new == row
    assert not change.old_row_unknown


@given(ROWS, st.sampled_from("abc"), VALUES, VALUES)
def test_a_column_is_changed_if_its_values_are_distinct_null_being_a_value(
    row: Row, column: str, old: Value, new: Value
) -> None:
    change = update("public", "lead", {**row, column: old}, {**row, column: new})
    assert change.changed == (() if old == new else (column,))


@given(ROWS, ROWS)
def test_what_is_not_known_of_the_old_row_is_no_change_that_rules_see(old: Row, new: Row) -> None:
    assume(not old.keys() >= new.keys())
    compiled = compiled_rule({"on": "update", "changed": "*", "type": "t", "description": ""})
    (outcome,) = told(compiled, [update("public", "lead", old, new)])
    assert isinstance(outcome, DeadLetter)
    assert outcome.kind == "old_values_unknown"


# Masks.

SECRETS = st.sampled_from(["s3cr3t", 987654321987, Decimal("98765.4321987"), "x s3cr3t\n"])

SECRET_ROWS = st.fixed_dictionaries(
    {"id": st.integers(1, 3), "a": SECRETS, "b": SECRETS, "c": st.none() | SECRETS},
)


def everything(event: Event) -> dict[str, Any]:
    """What a curious function can see of a change."""
    seen = [event.change, event.old, event.new, event.row, event.found]
    return {"type": "t", "description": repr(seen), "metadata": {"row": dict(event.row)}}


def secret_changes() -> st.SearchStrategy[Change]:
    tables = st.sampled_from(["lead", "other"])
    return st.one_of(
        st.builds(inserted, tables, SECRET_ROWS),
        st.builds(deleted, tables, SECRET_ROWS),
        st.builds(lambda table, old, new: update("public", table, old, new), tables, SECRET_ROWS, SECRET_ROWS),
        # Neither does a dead letter tell: of these the old row is not known, or a column is gone.
        st.builds(lambda new: update("public", "lead", {"id": 1}, new), SECRET_ROWS),
        st.builds(lambda row: inserted("lead", {k: v for k, v in row.items() if k != "a"}), SECRET_ROWS),
    )


@settings(max_examples=15)
@given(st.data(), st.lists(secret_changes(), min_size=1, max_size=4), SECRET_ROWS)
def test_no_masked_value_is_ever_told(data: st.DataObject, commit: list[Change | Message], found: Row) -> None:
    masked = {"a": "hidden", "b": "hash", "c": "hidden"}
    asked = data.draw(profiles(), label="profile").model_dump(by_alias=True, exclude_unset=True)
    asked["tables"]["lead"]["masked"] = masked
    for rule in asked["tables"]["lead"]["rules"]:
        for compared_with in ("from", "to", "delta"):  # which is a fault
            rule.pop(compared_with, None)
    asked["tables"]["other"] = {"masked": masked}
    curious = [
        {"on": on, "name": f"curious {on}", "rule": "own:everything", **({"changed": "*"} if on == "update" else {})}
        for on in ("insert", "update", "delete")
    ]
    asked["tables"]["lead"]["rules"] += curious
    for lookup in asked["tables"]["lead"]["lookups"].values():
        lookup.pop("where", None)
    compiled = compile_rules(Profile.model_validate(asked), function=lambda _: everything, mask_key="k" * 16)
    for outcome in told(compiled, commit, found):
        text = repr(outcome)
        assert "s3cr3t" not in text
        assert "98765" not in text


def test_null_stays_visible_and_equal_values_have_equal_hashes() -> None:
    rule = {"on": "update", "changed": "*", "type": "t", "description": "{columns}", "metadata": {"c": "{changes}"}}
    compiled = compile_rules(
        Profile.model_validate(
            {
                "name": "any",
                "target": {"table": "t", "columns": {"t": "type"}},
                "tables": {"lead": {"masked": {"a": "hidden", "b": "hash", "c": "hash"}, "rules": [rule]}},
            }
        ),
        mask_key="k" * 16,
    )
    old: Row = {"a": 1, "b": "x", "c": None}
    (outcome,) = told(compiled, [update("public", "lead", old, {"a": 2, "b": None, "c": "x"})])
    assert isinstance(outcome, Activity)
    assert outcome.fields["description"] == "a, b, c"
    hashed = "hmac:" + hmac.new(b"k" * 16, b"x", hashlib.sha256).hexdigest()[:32]
    assert outcome.fields["metadata"]["c"] == {
        "a": {"old": "***", "new": "***"},
        "b": {"old": hashed, "new": None},
        "c": {"old": None, "new": hashed},
    }


def test_a_partition_that_is_emptied_is_not_its_table_though_values_are_masked() -> None:
    rule = {"on": "truncate", "type": "t", "description": "all gone"}
    compiled = compiled_rule(rule, masked=["a"])
    emptied = Change("truncate", "public", "lead", None, None, partition=("public", "lead_2026"))
    (outcome,) = told(compiled, [emptied])
    assert isinstance(outcome, DeadLetter)
    assert outcome.kind == "old_values_unknown"


@pytest.mark.parametrize(
    ("tables", "fault"),
    [
        ("lookups.x = { table = 'other', match = { a = 'id' } }", "tables.lead.lookups.x: the values of a are masked"),
        ("lookups.x = { table = 'other', match = { id = 'b' } }", "tables.lead.lookups.x: the values of b are masked"),
        ("lookups.x = { table = 'other', match = { id = 'm' } }", "tables.lead.lookups.x: the values of b are masked"),
        (
            "lookups.x = { table = 'other', match = { id = 'id' }, where = { a = 1 } }",
            "tables.lead.lookups.x: the values of a are masked",
        ),
        (
            "rules = [{ on = 'update', changed = '*', to = { m = 'x' }, type = 't', description = '' }]",
            "the values of b are masked, and can't be compared",
        ),
    ],
)
def test_nothing_is_found_or_compared_by_masked_values(tables: str, fault: str) -> None:
    """Hidden values are all alike: rows that have nothing to do with each other would have been taken for one."""
    mapped = "mapped.m = { column = 'b', map = { x = 'y' } }"
    with pytest.raises(ProfileError, match=re.escape(fault)):
        rules(f"[tables.lead]\nmasked = ['b']\n{mapped}\n{tables}\n[tables.other]\nmasked = ['a']")


# Hostile profiles.


def refused(table: str) -> str:
    """The first fault of a profile with such a table."""
    with pytest.raises(ProfileError) as caught:
        rules("[tables.lead]\n" + table)
    return str(caught.value).splitlines()[1].strip()


def described(template: str) -> str:
    return f"[[tables.lead.rules]]\non = 'insert'\ntype = 't'\ndescription = {json.dumps(template)}"


@pytest.mark.parametrize(
    "path",
    [
        *("old", "__class__", "event", "event.change", "self.x", "change.new", "lookup", "lookup.other.__class__.x"),
        *("values.__init__", "values.", "new.", "0", "", " ", "rows.a", "NEW.a", "new .a", "'x'", "or 'x'"),
    ],
)
def test_no_name_is_reachable_but_those_that_are_declared(path: str) -> None:
    assert refused(described("{" + path + "}")).startswith("tables.lead, rule 1 (t): ")


@pytest.mark.parametrize(
    "spec", [">1000000000", "01000", ".1000000000f", "c", "zzz", "s.5", "{new.a}", "!r", "cut -1", "cut", "5 5"]
)
def test_a_format_that_no_value_has_or_that_fills_the_memory_is_a_fault(spec: str) -> None:
    assert refused(described("{new.a:" + spec + "}")).startswith("tables.lead, rule 1 (t): ")


def test_a_template_of_nothing_but_spaces_is_read_in_no_time() -> None:
    """It took minutes: each of them was tried as the first one before an `or`."""
    spaces = " " * 300_000
    assert rules("[tables.lead]\n" + described("{new.a" + spaces + "x}"))


NOT = ".".join(["not"] * 300)


@pytest.mark.parametrize(
    "table",
    [
        f"{described('')}\nwhen.{NOT}.row.a = 1",
        f"{described('')}\nwhen.{NOT.replace('not', 'any')}.row.a = 1",
        f"{described('')}\nwhen = {'{ any = [' * 2000}{'] }' * 2000}",
        "[[tables.lead.rules]]\non = 'insert'\nname = 't'\ndescription = ''\n"
        + "\n".join(f"type.{'default.' * n}by = 'new.a'\ntype.{'default.' * n}map.x = 'x'" for n in range(40)),
    ],
)
def test_what_is_nested_too_deeply_is_a_fault(table: str) -> None:
    with pytest.raises(ProfileError, match=r"nested too deeply|recursion"):
        rules("[tables.lead]\n" + table)


def test_the_deepest_profile_that_can_be_read_can_be_used() -> None:
    """Of conditions in parts of values that are made of each other: nothing runs out of stack."""
    chain = []
    for number in range(MAX_DEPTH - 1):
        inner = f"[{{text = '{{values.v{number + 1}}}', when.{'.'.join(['not'] * 8)}.row.a = 1}}]"
        for _ in range(7):
            inner = f"{{by = 'row.a', map.x = '', default = {inner}}}"
        chain.append(f"values.v{number} = {inner}")
    chain.append(f"values.v{MAX_DEPTH - 1} = 'found'")
    compiled = rules("\n".join(["[tables.lead]", *chain, described("{values.v0}")]))
    (outcome,) = outcomes(inserted("lead", {"a": 1}), rules=compiled)
    assert isinstance(outcome, Activity)
    assert outcome.fields["description"] == "found"


@pytest.mark.parametrize(
    ("count", "each"), [(2_000, "{{values.v{}}}"), (12, "{{values.v{0}}}{{values.v{0}}}"), (3, "{{values.v{0}}}" * 20)]
)
def test_values_that_are_made_of_each_other_do_not_multiply(count: int, each: str) -> None:
    """Twelve of them, each made of the next one twice, are 4,096 pieces of text."""
    chain = [
        f"v{number} = '{each.format(number + 1).replace('{{', '{').replace('}}', '}')}'" for number in range(count)
    ]
    table = "[tables.lead.values]\n" + "\n".join([*chain, f"v{count} = 'x'"])
    assert "in too many ways" in refused(f"{table}\n{described('{values.v0}')}")


@pytest.mark.parametrize("count", [20, 2_000])
def test_lookups_that_start_from_each_other_do_not_multiply(count: int) -> None:
    lookups = [
        f"l{n} = {{ table = 't', match = {{ a = 'lookup.l{n + 1}.a', b = 'lookup.l{n + 1}.b' }} }}"
        for n in range(count)
    ]
    last = f"l{count} = {{ table = 't', match = {{ a = 'a' }} }}"
    table = "[tables.lead.lookups]\n" + "\n".join([*lookups, last])
    assert "too many lookups" in refused(f"{table}\n{described('{lookup.l0.a}')}")


@pytest.mark.parametrize(
    ("constant", "fault"),
    [
        ('"a\\u0000s"', "it has the character NUL, which PostgreSQL doesn't"),
        ('{ by = "new.a", map = { "\\u0000" = "x" } }', "a key has the character NUL, which PostgreSQL doesn't"),
        ("1e999999999", "it is a number of more than 1,000 digits"),
        ("-1e-999999999", "it is a number of more than 1,000 digits"),
        ("0x" + "f" * 10_000, "a number of TOML has 64 bits"),
        ("9223372036854775808", "a number of TOML has 64 bits"),
        ("nan", "Input should be a finite number"),
        ("2026-01-01", "Input should be of another kind: such values have no meaning here"),
    ],
)
def test_a_constant_that_no_column_can_hold_is_a_fault(constant: str, fault: str) -> None:
    """A NUL stands between values when they are written: it would have made two of one."""
    told = refused(f"{described('')}\nmetadata.a = {constant}")
    assert told.startswith("tables.lead.rules.0.metadata.a")
    assert told.endswith(fault)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "x/y.sql", "020_leadfi_activity.sql\n", "a b.sql", ""]
)
def test_a_target_is_prepared_with_files_of_the_package_alone(name: str) -> None:
    with pytest.raises(ValidationError, match="String should match pattern"):
        Target.model_validate({"table": "t", "columns": {"t": "type"}, "prepare": [name]})


def test_a_file_that_the_package_has_not_is_told() -> None:
    with pytest.raises(ProfileError, match=r'^the package has no file "999_nothing.sql" to prepare a target with$'):
        schema("999_nothing.sql")


@pytest.mark.parametrize("rule", ["os:system", "builtins:eval", "cdc_worker.rules:compile_rules", "subprocess:run"])
def test_a_profile_alone_names_no_function(rule: str) -> None:
    table = f"rules = [{{ on = 'insert', name = 'x', rule = '{rule}' }}]"
    assert refused(table) == (
        f'tables.lead, rule 1 (x): "{rule}": the settings allow functions of no modules (rule_modules)'
    )
    allowing = load_settings(None, {"rule_modules": "operators.own"})
    with pytest.raises(ProfileError, match=r"the settings allow functions of operators\.own"):
        allowing.rules(profile(f"[tables.lead]\n{table}"))


@pytest.mark.parametrize("rule", ["os.path", "os:path.join", "os:system('x')", ":f", "a b:c", "os:", "../x:y"])
def test_a_function_has_a_module_and_a_name(rule: str) -> None:
    assert "String should match pattern" in refused(f"rules = [{{ on = 'insert', name = 'x', rule = \"{rule}\" }}]")


@pytest.mark.parametrize(
    "made",
    [
        *({"type": "a\0s"}, {"type": "t", "x": "\ud800"}, {"type": "t", "x": object()}, {"type": "t", "x": b"x"}),
        *({"type": "t", "metadata": {1: 2}}, {"type": "t", "metadata": {"a": {"\0": 1}}}, {"type": "t", "x": (1,)}),
        *({"type": "t", "metadata": {"a": [{"b": {1}}]}}, {"type": "t", "x": 10**5000}, {"type": "t", "metadata": "x"}),
        *({"type": "t", "x": Decimal("NaN")}, {"type": "t", "x": Decimal("1e999999999")}, {"type": None}, {}, "t", []),
    ],
)
def test_what_a_function_returns_and_no_column_can_hold_is_a_dead_letter(made: Any) -> None:
    compiled = compile_rules(
        profile("[tables.lead]\nrules = [{ on = 'insert', name = 'x', rule = 'own:made' }]"),
        function=lambda _: lambda event: made,
    )
    (outcome,) = outcomes(inserted("lead", {"a": "s3cr3t"}), rules=compiled)
    assert isinstance(outcome, DeadLetter)
    assert outcome.kind == "rule_failed"
    assert "s3cr3t" not in outcome.reason


# Keys.

_NAMES = st.text("a/.0", min_size=1, max_size=4)

_SUBJECTS = st.tuples(_NAMES.map(qualified), st.integers(0, 11), st.text("a.0", min_size=1, max_size=4))


@given(_SUBJECTS, _SUBJECTS)
def test_different_changes_and_rules_never_share_a_key(
    one: tuple[tuple[str, str], int, str], other: tuple[tuple[str, str], int, str]
) -> None:
    keys = {change_key("w/1/0/", *table, ordinal, rule) for table, ordinal, rule in (one, other)}
    assert len(keys) == len({one, other})


@pytest.mark.parametrize("rule", ["type = 'x/0/r'", "type = 'x'\nname = 'x/0/r'"])
def test_a_rule_has_no_name_that_makes_it_look_like_one_of_another_table(rule: str) -> None:
    """Rule `r` of table `a/0/x` and rule `x/0/r` of table `a`: the second would have counted as written already."""
    fault = refused(f"[[tables.lead.rules]]\non = 'insert'\ndescription = ''\n{rule}")
    assert fault.endswith('"/" parts what change keys are made of: the rule needs a "name" without it')
