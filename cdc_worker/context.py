"""Who did it: what an application says of the changes that follow, and whether it is to be believed.

A context message is a JSON object under PREFIX. Its plain values are kept by name until a later message of the same
transaction overrides them; the names in RESERVED ask for something instead. A signed message holds another one as the
text that was signed, so that both sides mean the same bytes: `{"signed": "{…}", "signature": "<hex>"}`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Set
from typing import Any, Final

import msgspec

PREFIX: Final = "cdc_worker.context"
"""Prefix of the logical messages in which an application says who changes what follows."""

CHANGED_BY: Final = "changed_by"

RESERVED: Final = frozenset({"clear", "skip", "collapse", "signed", "signature"})
"""Names that are no values: what they ask for is done, or told to be refused."""

MAX_LENGTH: Final = 1 << 13
"""A message of more characters is not heard, and what is kept of several has no more: they must not fill the memory."""

Plain = None | bool | int | float | str
"""What is kept of a message: what a text column can hold."""


class Policy(msgspec.Struct, frozen=True):
    """What an installation believes, allows and keeps.

    With a `key`, only signed messages are trusted. `skip` and `collapse` want a signature in any case, unless
    `unsigned_control`. `kept` are the names that go to the metadata of activities beside `changed_by`.
    """

    key: bytes | None = None
    unsigned_control: bool = False
    kept: tuple[str, ...] = ()


class Collapse(msgspec.Struct, frozen=True):
    """One activity is wanted in place of those of the changes that follow; None leaves its words to us."""

    type: str | None = None
    description: str | None = None


class Context(msgspec.Struct, frozen=True):
    """What was said in a transaction up to here.

    `said` is to be trusted. `claimed` was said in messages that aren't; `refused` are the names of what was asked for
    and not allowed.
    """

    said: Mapping[str, Plain] = {}
    claimed: Mapping[str, Plain] = {}
    skip: bool = False
    collapse: Collapse | None = None
    refused: frozenset[str] = frozenset()
    told: Mapping[str, Any] = {}
    """What activities tell of it in their metadata, but for who did it."""


NOTHING: Final = Context()


def signature(key: bytes, xid: int, payload: str) -> str:
    """What signs a payload in the transaction `xid`, which is 32 bits wide: in another one it is worth nothing."""
    return hmac.new(key, f"{xid}:{payload}".encode(), hashlib.sha256).hexdigest()


def hear(context: Context, content: str, *, xid: int, policy: Policy) -> Context:
    """What holds after one more message. Words that can't be read change nothing: they aren't ours to mend."""
    if len(content) > MAX_LENGTH or (message := _read(content)) is None:
        return context
    signed = False
    if isinstance(payload := message.get("signed"), str):
        signed = policy.key is not None and _is_signed(policy.key, xid, payload, message.get("signature"))
        if (message := _read(payload)) is None:
            return context
    trusted = signed or policy.key is None
    allowed = signed or policy.unsigned_control
    said, claimed = dict(context.said), dict(context.claimed)
    skip, collapse, refused = context.skip, context.collapse, set(context.refused)
    if not RESERVED.isdisjoint(message):
        if message.get("clear") is True:
            claimed.clear()
            refused.clear()
            if trusted:
                said.clear()
            if allowed:
                skip, collapse = False, None
        for name in ("skip", "collapse"):
            if name in message:
                refused.discard(name)
                if message[name] and not allowed:
                    refused.add(name)
        if allowed and "skip" in message:
            skip = message["skip"] is True
        if allowed and "collapse" in message:
            collapse = _collapse(message["collapse"])
    _keep(said if trusted else claimed, message)
    return Context(
        said=said,
        claimed=claimed,
        skip=skip,
        collapse=collapse,
        refused=frozenset(refused),
        told=_told(said, claimed, refused, policy),
    )


def _read(content: str) -> dict[str, Any] | None:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return None


def _is_signed(key: bytes, xid: int, payload: str, given: object) -> bool:
    # An old plugin that doesn't tell transactions apart gives them the number 0, which none has.
    if not xid or not isinstance(given, str):
        return False
    return hmac.compare_digest(given.lower().encode(), signature(key, xid, payload).encode())


def _collapse(wish: object) -> Collapse | None:
    def words(value: object) -> str | None:
        return value if isinstance(value, str) and value and _plain(value) else None

    match wish:
        case True:
            return Collapse()
        case str():
            return Collapse(description=words(wish))
        case dict():
            return Collapse(words(wish.get("type")), words(wish.get("description")))
        case _:
            return None


def _keep(values: dict[str, Plain], message: dict[str, Any]) -> None:
    room = MAX_LENGTH - sum(map(_length, values, values.values())) if values else None
    for name, value in message.items():
        if name in RESERVED or not _plain(name) or not _plain(value):
            continue
        if room is None:  # no message says more than there is room for
            values[name] = value
            continue
        more = _length(name, value) - (_length(name, values[name]) if name in values else 0)
        if more <= room or name == CHANGED_BY:
            values[name] = value
            room -= more


def _length(name: str, value: Plain) -> int:
    return len(name) + len(str(value))


def _plain(value: object) -> bool:
    # Only what a text column can hold: whatever anyone says here, it must not get in the way of the changes.
    return "\0" not in value if isinstance(value, str) else not isinstance(value, dict | list)


def retold(context: Context, policy: Policy) -> Context:
    """What was heard, as activities tell it by this policy."""
    told = _told(context.said, context.claimed, context.refused, policy)
    return msgspec.structs.replace(context, told=told)


def _told(said: Mapping[str, Plain], claimed: Mapping[str, Plain], refused: Set[str], policy: Policy) -> dict[str, Any]:
    told: dict[str, Any] = {name: said[name] for name in policy.kept if said.get(name) is not None}
    claims = {name: claimed[name] for name in (CHANGED_BY, *policy.kept) if claimed.get(name) is not None}
    if claims:
        told |= {"context_trusted": False, "context_claimed": claims}
    if refused:
        told["context_refused"] = sorted(refused)
    return told
