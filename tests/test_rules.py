import json
from decimal import Decimal
from typing import Any

import pytest
from factories import activities, deleted, inserted, outcomes, rules, said, truncated, updated
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_worker.activities import Activity, DeadLetter
from cdc_worker.changes import Row
from cdc_worker.errors import ProfileError
from cdc_worker.profile import parse
from cdc_worker.rules import compile_rules, subject
from cdc_worker.values import Value

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def told(template: str, row: Row, **keys: str) -> dict[str, Any]:
    """The fields of the activity of an inserted row, with this description and metadata."""
    metadata = json.dumps(keys).replace('":', '" =')
    rule = f'{{ on = "insert", type = "t", description = {json.dumps(template)}, metadata = {metadata} }}'
    (fields,) = activities(inserted("lead", row), rules=rules(f"[tables.lead]\nrules = [{rule}]"))
    return fields


def description(template: str, row: Row) -> Any:
    return told(template, row)["description"]


def failed(template: str, row: Row) -> str:
    """The reason of the dead letter that such a row becomes."""
    rule = f'{{ on = "insert", type = "t", description = {json.dumps(template)} }}'
    (outcome,) = outcomes(inserted("lead", row), rules=rules(f"[tables.lead]\nrules = [{rule}]"))
    assert isinstance(outcome, DeadLetter)
    assert outcome.kind == "rule_failed"
    return outcome.reason


@given(TEXT, TEXT)
@example("{old.x} {0} {{}} %s %(a)s ${x} {new.b}", "\"'\\\n\r\t😀")
@example("{", "}")
def test_data_is_never_interpreted(a: str, b: str) -> None:
    fields = told("{{{new.a}}}: {new.b}%", {"a": a, "b": b}, bare="{new.a}", quoted='"{new.b}"')
    assert fields["description"] == "{" + a + "}: " + b + "%"
    assert fields["metadata"] == {"bare": a, "quoted": f'"{b}"'}


def test_null_prints_as_nothing_and_alone_it_is_null() -> None:
    fields = told('from "{new.a}" to "{new.b:>5}"', {"a": None, "b": None}, alone="{new.a}", within="<{new.a}>")
    assert fields["description"] == 'from "" to ""'
    assert fields["metadata"] == {"alone": None, "within": "<>"}


@pytest.mark.parametrize("value", [None, True, False, 0, -5, 2**63, 1.5, Decimal("1.10"), "", "x", "1"])
def test_a_bare_name_keeps_the_type(value: Value) -> None:
    kept = told("x", {"a": value}, kept="{new.a}")["metadata"]["kept"]
    assert kept == value
    assert type(kept) is type(value)


def test_constants_keep_their_type() -> None:
    compiled = rules(
        """
        [tables.lead]
        rules = [{ on = "insert", type = "t", description = "{{x}}", metadata = { a = true, b = 7, c = "7", d = "" } }]
        """
    )
    (fields,) = activities(inserted("lead", {}), rules=compiled)
    assert fields["description"] == "{x}"
    assert fields["metadata"] == {"a": True, "b": 7, "c": "7", "d": ""}
    assert type(fields["metadata"]["a"]) is bool


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (None, ""),
        (True, "true"),
        (False, "false"),
        (-7, "-7"),
        (Decimal("1.10"), "1.10"),
        (Decimal("0E-7"), "0.0000000"),
        (Decimal("-1E-10"), "-0.0000000001"),
        (Decimal("1E+6"), "1000000"),
        (0.1, "0.1"),
        (1e6, "1000000"),
        (-0.0, "-0"),
        (1e300, "1e+300"),
        (" x ", " x "),
    ],
)
def test_values_print_as_postgres_prints_them_in_a_description(value: Value, printed: str) -> None:
    assert description("{new.a}", {"a": value}) == printed
    assert description("<{new.a}>", {"a": value}) == f"<{printed}>"


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_a_decimal_never_takes_to_exponents(value: Decimal) -> None:
    for template in ("{new.a} ", "{new.a:>3}", "{new.a:,}", "{new.a:.3}"):
        printed = description(template, {"a": value})
        assert "e" not in printed.lower()
    assert Decimal(description("{new.a}", {"a": value})) == value


@pytest.mark.parametrize(
    ("template", "value", "printed"),
    [
        ("${new.a:,.2f}", Decimal("1234567.005"), "$1,234,567.00"),
        ("${new.a:,.2f}", 1234, "$1,234.00"),
        ("{new.a:,}", Decimal("1234.50"), "1,234.50"),
        ("{new.a:.0%}", Decimal("0.25"), "25%"),
        ("{new.a:.2e}", Decimal(1234), "1.23e+3"),
        ("{new.a:>8}|", "x", "       x|"),
        ("{new.a:*^7}", Decimal("1.5"), "**1.5**"),
        ("{new.a:.3}", "abcdef", "abc"),
        ("{new.a:05d}", 42, "00042"),
        ("{new.a:>6}", True, "  true"),
        ("{new.a:>6}", None, ""),
    ],
)
def test_format_specs_are_pythons(template: str, value: Value, printed: str) -> None:
    assert description(template, {"a": value}) == printed


def test_a_decimal_is_formatted_without_passing_through_a_float() -> None:
    value = Decimal("12345678901234567890123456789.12")
    assert description("{new.a:,.2f}", {"a": value}) == "12,345,678,901,234,567,890,123,456,789.12"


@pytest.mark.parametrize(
    "template", ["{new.__class__}", "{new.status.__init__}", "{new.status[0]}", "{row.items}", "{new.status.real}"]
)
def test_a_template_reaches_columns_and_never_attributes(template: str) -> None:
    name = template.strip("{}").partition(".")[2]
    assert failed(template, {"status": "x"}) == f'the change does not carry the column "{name}"'
    assert description(template, {name: "a column of that name"}) == "a column of that name"


def test_a_format_that_does_not_fit_the_value_is_a_dead_letter_without_the_value() -> None:
    reason = failed("{new.a:,.2f}", {"a": "secret"})
    assert "secret" not in reason
    assert "'f'" in reason


def test_a_column_that_is_absent_is_unknown_and_not_null() -> None:
    assert failed("{new.a}", {}) == 'the change does not carry the column "a"'


def test_row_is_the_new_row_or_the_old_one_of_a_delete() -> None:
    compiled = rules(
        """
        [tables.lead]
        identity = { id = "{row.id}" }
        fields = { lead = "{row.id}" }
        rules = [
            { on = ["insert", "delete"], type = "a", description = "{row.id}" },
            { on = "update", changed = "*", type = "b", description = "{row.id}" },
            { on = "truncate", type = "c", description = "{row.id}" },
        ]
        """
    )
    came = activities(
        inserted("lead", {"id": 1}),
        updated("lead", {"id": 2}, id=3),
        deleted("lead", {"id": 4}),
        truncated("lead"),
        rules=compiled,
    )
    assert [(fields["type"], fields["description"], fields["lead"], fields["metadata"]) for fields in came] == [
        ("a", "1", 1, {"id": 1}),
        ("b", "3", 3, {"id": 3}),
        ("a", "4", 4, {"id": 4}),
        ("c", "", None, {}),
    ]


def test_what_a_rule_says_comes_before_what_its_table_says() -> None:
    compiled = rules(
        """
        [tables.lead]
        identity = { id = "{row.id}", kind = "table" }
        fields = { lead = "{row.id}", kind = "table" }
        [[tables.lead.rules]]
        on = "insert"
        type = "t"
        description = ""
        metadata = { kind = "rule" }
        fields = { kind = "rule" }
        """
    )
    (fields,) = activities(inserted("lead", {"id": 1}), rules=compiled)
    assert fields["metadata"] == {"id": 1, "kind": "rule"}
    assert (fields["lead"], fields["kind"]) == (1, "rule")


CLAIMS = """
[tables.lead]
rules = [
    { on = "update", changed = "a", type = "a", description = "{columns}" },
    { on = "update", changed = ["b", "c"], type = "bc", description = "{columns}" },
    { on = "update", changed = "d", to = { d = 1 }, type = "d_is_1", description = "{columns}" },
    { on = "update", changed = "unclaimed", type = "rest", description = "{columns}" },
    { on = "update", changed = "*", type = "any", description = "{columns}", metadata = { changes = "{changes}" } },
]
"""


@pytest.mark.parametrize(
    ("changes", "came"),
    [
        ({"a": 9}, {"a": "a", "any": "a"}),
        ({"c": 9}, {"bc": "c", "any": "c"}),
        ({"c": 9, "b": 9}, {"bc": "b, c", "any": "b, c"}),
        ({"d": 1}, {"d_is_1": "d", "any": "d"}),
        ({"d": 2}, {"rest": "d", "any": "d"}),
        ({"e": 9}, {"rest": "e", "any": "e"}),
        ({"e": 9, "a": 9, "d": 1}, {"a": "a", "d_is_1": "d", "rest": "e", "any": "a, d, e"}),
    ],
)
def test_what_an_earlier_rule_claims_is_not_among_the_rest(changes: dict[str, int], came: dict[str, str]) -> None:
    old: Row = dict.fromkeys("abcde", 0)
    fields = activities(updated("lead", old, **changes), rules=rules(CLAIMS))
    assert {of["type"]: of["description"] for of in fields} == came
    assert fields[-1]["metadata"] == {
        "changes": {name: {"old": 0, "new": new} for name, new in sorted(changes.items())}
    }


def test_null_is_a_value_like_any_other_when_columns_are_compared() -> None:
    compiled = rules(CLAIMS)
    old: Row = dict.fromkeys("abcde", None)
    assert [of["type"] for of in activities(updated("lead", old, a=0), rules=compiled)] == ["a", "any"]
    assert [of["type"] for of in activities(updated("lead", {**old, "a": 0}, a=None), rules=compiled)] == ["a", "any"]
    assert activities(updated("lead", old, a=None), rules=compiled) == []


@pytest.mark.parametrize(
    ("constant", "values"),
    [("true", [True]), ("false", [False]), ("1", [1, Decimal("1.00"), 1.0]), ("0.1", [Decimal("0.10"), 0.1])],
)
def test_a_constant_equals_values_of_its_kind(constant: str, values: list[Value]) -> None:
    compiled = rules(
        f"[tables.lead]\nrules = [{{ on = 'insert', type = 'x', description = '', when.new.a = {constant} }}]"
    )
    every: list[Value] = [True, False, 0, 1, Decimal("1.00"), 1.0, Decimal("0.10"), 0.1, "1", "true", "0.1", "", None]
    came = [value for value in every if activities(inserted("lead", {"a": value}), rules=compiled)]
    assert [(type(value), value) for value in came] == [(type(value), value) for value in values]


MAPPED = """
[tables.customer]
[tables.customer.mapped.state]
column = "is_closed"
map = { true = "closed", "" = "not said" }
default = "open"
[[tables.customer.rules]]
on = "update"
changed = "state"
type = "state_changed"
description = "{old.state} to {new.state} by {columns}"
[[tables.customer.rules]]
on = "update"
changed = ["state", "is_closed"]
to = { state = "closed" }
type = "closed"
description = "{columns}"
[[tables.customer.rules]]
on = "insert"
type = "made"
description = "{row.state}"
"""


def test_a_mapped_column_changes_when_what_it_maps_to_changes() -> None:
    def came(old: Value, new: Value) -> list[str]:
        change = updated("customer", {"id": 1, "is_closed": old}, is_closed=new, id=2)
        return [fields["description"] for fields in activities(change, rules=rules(MAPPED))]

    assert came(False, True) == ["open to closed by is_closed", "is_closed"]
    assert came(None, True) == ["not said to closed by is_closed", "is_closed"]
    assert came(True, None) == ["closed to not said by is_closed"]
    assert came(False, "no") == []
    (made,) = activities(inserted("customer", {"is_closed": None}), rules=rules(MAPPED))
    assert made["description"] == "not said"


def test_a_value_without_a_place_in_the_map_and_no_default_is_null() -> None:
    compiled = rules(
        """
        [tables.lead]
        mapped.kind = { column = "a", map = { x = "X" } }
        rules = [{ on = "insert", type = "t", description = "<{new.kind}>", metadata = { kind = "{new.kind}" } }]
        """
    )
    (fields,) = activities(inserted("lead", {"a": "y"}), rules=compiled)
    assert (fields["description"], fields["metadata"]) == ("<>", {"kind": None})


def test_long_texts_are_cut_in_changes_and_nowhere_else() -> None:
    compiled = rules(
        """
        [tables.lead]
        [[tables.lead.rules]]
        on = "update"
        changed = "*"
        type = "t"
        description = "{new.a}"
        metadata = { changes = "{changes}", whole = "{new.a}" }
        """
    )
    exactly, longer = "😀" * 200, "😀" * 201
    (fields,) = activities(updated("lead", {"a": exactly, "b": 1}, a=longer, b=10**300), rules=compiled)
    assert fields["metadata"] == {
        "changes": {"a": {"old": exactly, "new": exactly + "…"}, "b": {"old": 1, "new": 10**300}},
        "whole": longer,
    }
    assert fields["description"] == longer


ACTOR = """
[tables.lead]
actor = "{row.updated_by}"
rules = [{ on = ["insert", "delete", "truncate"], type = "t", description = "", metadata = { why = "{context.why}" } }]
"""


@pytest.mark.parametrize(
    ("context", "updated_by", "actor", "source"),
    [
        ({"changed_by": "jane"}, "joe", "jane", "message"),
        ({"changed_by": ""}, "joe", "joe", "column"),
        ({"changed_by": None}, "joe", "joe", "column"),
        ({"changed_by": ["jane"]}, "joe", "joe", "column"),
        ({"changed_by": {"name": "jane"}}, "joe", "joe", "column"),
        ({"changed_by": "nul\0"}, "joe", "joe", "column"),
        ({"changed_by": 7}, "joe", "7", "message"),
        ({}, 7, "7", "column"),
        ({}, 0, "0", "column"),
        ({}, "", None, "default"),
        ({}, None, None, "default"),
    ],
)
def test_the_actor_is_the_contexts_else_the_columns_else_the_system(
    context: dict[str, object], updated_by: Value, actor: str | None, source: str
) -> None:
    change = inserted("lead", {"updated_by": updated_by})
    (outcome,) = outcomes(said(json.dumps(context)), change, rules=rules(ACTOR))
    assert isinstance(outcome, Activity)
    assert outcome.fields["created_by"] == (actor or "system")
    told = {"changed_by": actor} if actor else {}
    assert outcome.fields["metadata"] == {"why": None, "context_source": source, **told}


def test_an_actor_of_a_row_is_no_obstacle_to_a_truncate() -> None:
    (fields,) = activities(said('{"why": "cleaning"}'), truncated("lead"), rules=rules(ACTOR))
    assert (fields["created_by"], fields["metadata"]) == ("system", {"why": "cleaning"})


FACTS = """
[tables.lead]
actor = "{lookup.by.name}"
lookups.by = { table = "contact", match = { lead = "id" }, same_transaction = true }
fields = { who = "{lookup.by.name}" }
[[tables.lead.rules]]
on = "insert"
type = "t"
description = "{lookup.by.name}"
metadata = { who = "{lookup.by.name}", text = "by {lookup.by.name}" }
[tables.contact]
"""


def test_a_fact_that_is_not_there_is_nothing_in_text_null_in_a_field_and_no_key() -> None:
    (fields,) = activities(inserted("lead", {"id": 1}), rules=rules(FACTS))
    assert {name: value for name, value in fields.items() if name != "occurred_at"} == {
        "type": "t",
        "description": "",
        "metadata": {"text": "by "},
        "created_by": "system",
        "who": None,
    }


def test_a_fact_that_is_there_is_a_value_everywhere() -> None:
    (fields,) = activities(
        inserted("lead", {"id": 1}), inserted("contact", {"lead": 1, "name": "jane"}), rules=rules(FACTS)
    )
    assert {name: value for name, value in fields.items() if name != "occurred_at"} == {
        "type": "t",
        "description": "jane",
        "metadata": {"who": "jane", "text": "by jane", "changed_by": "jane", "context_source": "column"},
        "created_by": "jane",
        "who": "jane",
    }


@pytest.mark.parametrize("changed", ["'at'", "['a', 'at']", "'since'"])
def test_no_rule_is_about_what_is_ignored(changed: str) -> None:
    with pytest.raises(ProfileError, match="changes of at are ignored, and no rule is about them"):
        rules(
            "[tables.lead]\nignored = 'at'\nmapped.since = { column = 'at', map = { x = 'y' } }\n"
            f"rules = [{{ on = 'update', changed = {changed}, type = 't', description = '' }}]"
        )


_ENDLESS: list[Any] = []
_ENDLESS.append(_ENDLESS)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"type": "t", "metadata": {"a": _ENDLESS}}, 'returned no value for "metadata"'),
        ({"type": "t", "x": {"a": _ENDLESS}}, 'returned no value for "x"'),
        ({"type": "t", "metadata": ["a"]}, 'returned no dict for "metadata"'),
        ({"type": "t", "metadata": "s3cr3t"}, 'returned no dict for "metadata"'),
    ],
)
def test_what_is_wrong_with_what_a_function_returns_is_told(made: dict[str, Any], reason: str) -> None:
    compiled = compile_rules(
        parse(
            "name = 'own'\ntarget = { table = 't', columns = { t = 'type' } }\n[tables.lead]\n"
            "rules = [{ on = 'insert', name = 'x', rule = 'own:made' }]",
            source="own",
        ),
        function=lambda _: lambda event: made,
    )
    (outcome,) = outcomes(inserted("lead", {"a": 1}), rules=compiled)
    assert isinstance(outcome, DeadLetter)
    assert outcome.reason == f'the function of the rule "x" {reason}'


@given(st.lists(TEXT, min_size=1), st.lists(TEXT, min_size=1))
@example(["a,b"], ["a", "b"])
@example(["a/b"], ["a%2Fb"])
def test_no_two_rows_have_the_same_name(one: list[str], other: list[str]) -> None:
    assert (subject(one) == subject(other)) is (one == other)
    assert "/" not in subject(one)
