"""Context messages: what is heard, kept, believed and allowed, and that nothing anyone says gets in the way."""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

import pytest
from factories import assembled, inserted, rules, said
from hypothesis import given
from hypothesis import strategies as st

from cdc_worker import config
from cdc_worker.activities import Activity
from cdc_worker.context import MAX_LENGTH, NOTHING, Collapse, Context, Policy, hear, signature
from cdc_worker.errors import SettingsError
from cdc_worker.transform import transform

XID = 4711
KEY = b"sixteen bytes or more"
SIGNED = Policy(KEY)
UNSIGNED_CONTROL = Policy(unsigned_control=True)
KEEPING = Policy(kept=("request_id", "reason"))


def heard(*messages: object, policy: Policy = KEEPING, xid: int = XID) -> Context:
    """What holds after these messages, each a document or the text of one."""

    def after(context: Context, message: object) -> Context:
        content = message if isinstance(message, str) else json.dumps(message)
        return hear(context, content, xid=xid, policy=policy)

    return reduce(after, messages, NOTHING)


def signed(message: object, *, key: bytes = KEY, xid: int = XID) -> dict[str, str]:
    payload = message if isinstance(message, str) else json.dumps(message)
    return {"signed": payload, "signature": signature(key, xid, payload)}


JANE = {"changed_by": "jane", "request_id": "r1"}
MALLORY = {"changed_by": "mallory", "request_id": "r2"}


# What is said


def test_a_message_is_heard_and_what_the_profile_keeps_of_it_is_told() -> None:
    assert heard({"changed_by": "jane", "request_id": "r1", "other": 7}) == Context(
        said={"changed_by": "jane", "request_id": "r1", "other": 7}, told={"request_id": "r1"}
    )


def test_later_messages_override_names_and_leave_the_others() -> None:
    assert heard(JANE, {"request_id": "r2", "reason": "call"}).said == {
        "changed_by": "jane",
        "request_id": "r2",
        "reason": "call",
    }


def test_a_null_takes_a_name_back() -> None:
    context = heard(JANE, {"changed_by": None, "request_id": None})
    assert (context.said, context.told) == ({"changed_by": None, "request_id": None}, {})


def test_clear_forgets_what_was_said_before_and_hears_the_rest_of_its_message() -> None:
    assert heard(JANE, {"clear": True, "reason": "nightly"}).said == {"reason": "nightly"}


@pytest.mark.parametrize("clear", [False, None, "true", 1, {}])
def test_only_true_clears(clear: object) -> None:
    assert heard(JANE, {"clear": clear}) == heard(JANE)


@pytest.mark.parametrize("content", ["", "jane", "null", "[]", '"jane"', "7", "{", '{"changed_by": "x"', "\ufffd"])
def test_what_is_no_object_is_as_if_it_had_not_been_said(content: str) -> None:
    assert heard(JANE, content) == heard(JANE)


def test_only_plain_values_are_kept() -> None:
    odd = {"list": [1], "object": {"a": 1}, "nul": "a\0b", "n\0ame": 1}
    assert heard({**JANE, **odd}) == heard(JANE)


def test_a_message_that_is_too_long_is_not_heard() -> None:
    def of_length(length: int) -> str:
        return json.dumps({"request_id": "x" * (length - len('{"request_id": ""}'))})

    assert heard(of_length(MAX_LENGTH)).said
    assert heard(of_length(MAX_LENGTH + 1)) == NOTHING


def test_what_many_messages_say_is_bounded_and_who_did_it_is_heard_all_the_same() -> None:
    context = heard(*({f"name {n}": "x" * 1000} for n in range(100)), JANE)
    assert sum(len(name) + len(str(value)) for name, value in context.said.items()) <= MAX_LENGTH + len(
        "changed_byjane"
    )
    assert context.said["changed_by"] == "jane"
    assert heard(*({"name": "x" * n} for n in range(0, MAX_LENGTH, 100))).said == {"name": "x" * 8100}


# Whether it is to be believed


def test_without_a_key_everyone_is_believed_also_who_signs() -> None:
    assert heard(signed(JANE)) == heard(JANE)


def test_with_a_key_a_signed_message_is_believed() -> None:
    assert heard(signed(JANE), policy=SIGNED).said == JANE


def test_the_signature_is_over_transaction_and_payload() -> None:
    """As the documents tell applications to make it; this value is computed by openssl."""
    payload = '{"changed_by": "jane_doe"}'
    assert signature(b"secret", 741, payload) == "40e42507c4f23cf5423f5a7417f148735a921324914ddcb69331ec31c1d389b4"


@pytest.mark.parametrize(
    "message",
    [
        MALLORY,
        signed(MALLORY, key=b"another key, not ours"),
        signed(MALLORY, xid=XID + 1),
        {**signed(MALLORY), "signature": ""},
        {**signed(MALLORY), "signature": None},
        {**signed(MALLORY), "signature": "é" * 64},
        {"signed": json.dumps(MALLORY)},
        {"signed": json.dumps(MALLORY), "signature": signature(KEY, XID, json.dumps(JANE))},
        {"signed": json.dumps(MALLORY), "signature": {"x": 1}},
    ],
)
def test_with_a_key_what_is_not_signed_is_told_as_a_claim_and_overrides_nothing(message: object) -> None:
    policy = Policy(KEY, kept=("request_id",))
    claims = {"context_trusted": False, "context_claimed": MALLORY}
    alone = heard(message, policy=policy)
    assert (alone.said, alone.told) == ({}, claims)
    after = heard(signed(JANE), message, policy=policy)
    assert (after.said, after.told) == (JANE, {"request_id": "r1", **claims})


def test_templates_and_conditions_see_nothing_that_is_not_trusted() -> None:
    table = rules("""
[tables.lead]
rules = [
  { on = "insert", type = "told", description = "{context.reason}" },
  { on = "insert", type = "asked", description = "", when = { context = { reason = "test" } } },
]
""")
    script = assembled([said('{"reason": "test"}'), inserted("lead", {})])
    for policy, told in ((Policy(), [("told", "test"), ("asked", "")]), (SIGNED, [("told", "")])):
        came = transform(table, script, worker="w", system_identifier="1", policy=policy)
        assert [(o.fields["type"], o.fields["description"]) for o in came if isinstance(o, Activity)] == told


def test_a_transaction_without_a_number_proves_nothing() -> None:
    """wal2json before include-xids: every transaction would be 0."""
    assert heard(signed(JANE, xid=0), xid=0, policy=SIGNED).said == {}


def test_a_claim_clears_claims_and_nothing_else() -> None:
    context = heard(signed(JANE), MALLORY, {"clear": True}, policy=SIGNED)
    assert (context.said, context.claimed) == (JANE, {})


def test_a_signed_clear_forgets_everything() -> None:
    context = heard(signed(JANE), MALLORY, signed({"clear": True}), policy=SIGNED)
    assert (context.said, context.claimed) == ({}, {})


def test_a_signed_payload_that_is_no_object_is_as_if_it_had_not_been_said() -> None:
    assert heard(JANE, signed("[]")) == heard(JANE)


@pytest.mark.parametrize("key", ["a key of sixteen or more", "too short a key"])
def test_the_key_is_in_no_representation_of_the_settings_and_no_error(key: str) -> None:
    try:
        found = config.load(None, {"context_key": key})
        shown = f"{found!r} {found} {found.model_dump()} {found.model_dump_json()}"
    except SettingsError as error:
        shown = str(error)
    assert ("context_key" in shown, key in shown) == (True, False)


# What it may ask for


@pytest.mark.parametrize(
    ("policy", "message", "allowed"),
    [
        (Policy(), {"skip": True}, False),
        (Policy(), signed({"skip": True}), False),
        (SIGNED, {"skip": True}, False),
        (SIGNED, signed({"skip": True}, xid=1), False),
        (SIGNED, signed({"skip": True}), True),
        (UNSIGNED_CONTROL, {"skip": True}, True),
        (Policy(KEY, unsigned_control=True), {"skip": True}, True),
    ],
)
def test_to_skip_takes_a_signature_or_the_setting(policy: Policy, message: object, allowed: bool) -> None:
    context = heard(message, policy=policy)
    assert context.skip is allowed
    assert context.told == ({} if allowed else {"context_refused": ["skip"]})


def test_what_was_refused_is_told_until_it_is_no_longer_asked_for() -> None:
    assert heard({"skip": True, "collapse": "x"}).told == {"context_refused": ["collapse", "skip"]}
    assert heard({"skip": True, "collapse": "x"}, JANE, {"skip": False}).refused == {"collapse"}
    assert heard({"skip": True, "collapse": "x"}, {"clear": True}).refused == frozenset()


def test_who_may_not_ask_for_it_can_not_end_it_either() -> None:
    for message in ({"skip": False}, {"clear": True}, {"collapse": None}):
        context = heard(signed({"skip": True, "collapse": True}), message, policy=SIGNED)
        assert (context.skip, context.collapse) == (True, Collapse())


@pytest.mark.parametrize("end", [{"skip": False, "collapse": False}, {"clear": True}, {"skip": None, "collapse": None}])
def test_who_may_ask_for_it_can_end_it(end: object) -> None:
    context = heard({"skip": True, "collapse": True}, end, policy=UNSIGNED_CONTROL)
    assert (context.skip, context.collapse) == (False, None)


@pytest.mark.parametrize(
    ("wish", "collapse"),
    [
        (True, Collapse()),
        ("Prices of 2027", Collapse(None, "Prices of 2027")),
        ({"type": "import", "description": "Prices"}, Collapse("import", "Prices")),
        ({"type": 7, "description": "nul\0"}, Collapse()),
        ({}, Collapse()),
        *((odd, None) for odd in (False, None, 1, ["x"])),
    ],
)
def test_a_collapse_may_have_words_of_its_own(wish: object, collapse: Collapse | None) -> None:
    assert heard({"collapse": wish}, policy=UNSIGNED_CONTROL).collapse == collapse


def test_what_asks_for_something_is_no_value() -> None:
    context = heard({"clear": 0, "skip": 0, "collapse": 0, "signature": "x", "signed": 7, "a": 1})
    assert context.said == {"a": 1}


# Laws

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["changed_by", "request_id", "clear", "skip", "collapse", "signed", "signature"]) | st.text()
MESSAGES = st.dictionaries(NAMES, JSON, max_size=4)
ANYTHING = st.text() | MESSAGES | JSON | MESSAGES.map(signed) | MESSAGES.map(lambda m: signed(m, xid=1))
POLICIES = st.builds(
    Policy, st.sampled_from([None, KEY]), unsigned_control=st.booleans(), kept=st.just(("request_id", "a"))
)


@given(st.lists(ANYTHING, max_size=4), POLICIES)
def test_whatever_is_said_is_heard_without_harm(messages: list[object], policy: Policy) -> None:
    context = heard(*messages, policy=policy)
    for text in json.dumps(context.told), json.dumps(dict(context.said)):
        assert "\\u0000" not in text.replace("\\\\", "")
    assert all(not isinstance(value, dict | list) for value in context.said.values())


@given(st.lists(ANYTHING, max_size=4), st.lists(MESSAGES | st.text(), max_size=3))
def test_no_unsigned_message_changes_what_signed_ones_have_established(
    before: list[object], after: list[dict[str, Any] | str]
) -> None:
    established, later = heard(*before, policy=SIGNED), heard(*before, *after, policy=SIGNED)
    assert (later.said, later.skip, later.collapse) == (established.said, established.skip, established.collapse)


@given(MESSAGES, MESSAGES)
def test_a_message_is_heard_on_top_of_the_one_before(one: dict[str, Any], other: dict[str, Any]) -> None:
    for message in (one, other):
        for name in ("clear", "signed"):
            message.pop(name, None)
    assert heard(one, other).said == {**heard(one).said, **heard(other).said}
