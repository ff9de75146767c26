"""Activities as lines of COPY's text format, and back. Manual: "COPY", File Formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final
from zoneinfo import ZoneInfo

import msgspec

from cdc_worker.activities import Activity
from cdc_worker.catalog import TargetTable
from cdc_worker.profile import Target

_json = msgspec.json.Encoder(decimal_format="number")

_SECOND: Final = timedelta(seconds=1)
"""Commits come many in one, and zones have changed their offsets at full seconds."""

_INTEGERS: Final = ("smallint", "integer", "bigint")

# Text in Postgres has no NUL, so what begins with one is no text.
_NULL: Final = "\0n"


def encoder(target: Target, table: TargetTable, zone: ZoneInfo) -> Callable[[Activity], bytes]:
    """A function that writes an activity as a line.

    What is too long for its column is cut, where there is metadata to have the whole of it, or the profile says so.
    """
    names = list(target.columns.values())
    columns = table.columns
    constants = [_text(value) for value in target.constants.values()]
    local = {field for column, field in target.columns.items() if columns[column] == "timestamp without time zone"}

    limits = [
        (place, column, table.lengths[column])
        for place, (column, name) in enumerate(target.columns.items())
        if column in table.lengths
        and name not in ("metadata", "change_key")
        and ("metadata" in names or column in target.lengths)
    ]

    def cut(values: list[str], metadata: dict[str, Any]) -> None:
        whole = {}
        for place, column, length in limits:
            value = values[place]
            if len(value) > length and value != _NULL:
                whole[column] = value
                values[place] = value[: length - 1] + "…"
        if whole and "metadata" in names:
            values[names.index("metadata")] = _text({**metadata, "untruncated": whole})

    since = until = datetime.min.replace(tzinfo=UTC)
    second = ""  # in between, in the zone

    def at_home(moment: datetime) -> str:
        nonlocal since, until, second
        if not since <= moment < until:
            try:
                since = moment.replace(microsecond=0)
                until = since + _SECOND
                second = since.astimezone(zone).replace(tzinfo=None).isoformat(" ")
            except OverflowError:  # at an end of Python's calendar, where a day is as good as another
                until = since
                return moment.replace(tzinfo=None).isoformat(" ")
        return f"{second}.{moment.microsecond:06}"

    def printed(name: str, value: Any) -> str:
        return at_home(value) if name in local and isinstance(value, datetime) else _text(value)

    key = names.index("change_key") if "change_key" in names else None
    others = [name for name in names if name != "change_key"]

    def encode(activity: Activity) -> bytes:
        fields = activity.fields
        get = fields.get
        values = [value if type(value := get(name)) is str else printed(name, value) for name in others]
        if key is not None:
            values.insert(key, activity.change_key)
        for place, _, length in limits:
            if len(values[place]) > length:
                cut(values, fields["metadata"])
                break
        values += constants
        return _copied(values)

    return encode


def unlinked(
    values: Mapping[str, str | None], columns: Collection[str], *, metadata: str | None, types: Mapping[str, str]
) -> dict[str, str | None]:
    """A row as it is sent, without links in these columns; its `metadata` tells them instead, by their `types`."""
    links = {column: value for column in columns if (value := values.get(column)) is not None}
    left = {**values, **dict.fromkeys(links)}
    if metadata is not None and links:
        found = msgspec.json.decode(values[metadata] or "{}", type=dict[str, msgspec.Raw])
        told = msgspec.json.decode(found.get("unlinked", b"{}"))  # of another key
        told = told if isinstance(told, dict) else {}
        told |= {column: int(v) if types[column] in _INTEGERS else v for column, v in links.items()}
        found["unlinked"] = msgspec.Raw(_json.encode(told))
        left[metadata] = _json.encode(found).decode()
    return left


def copied(values: Iterable[Any]) -> bytes:
    """A line of COPY's text format."""
    return _copied([*map(_text, values)])


def parsed(line: bytes) -> list[str | None]:
    """The values of a line of COPY's text format."""
    unescaped = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
    return [
        value
        if "\\" not in value
        else None
        if value == "\\N"
        else re.sub(r"\\[\\tnr]", lambda found: unescaped[found[0]], value)
        for value in line.decode().removesuffix("\n").split("\t")
    ]


def escaped(text: str) -> str:
    """A value as it stands in a line of COPY's text format."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _copied(values: Sequence[str]) -> bytes:
    line = "\t".join(values)
    if "\\" in line or "\n" in line or "\r" in line or line.count("\t") >= len(values):
        line = "\t".join(map(escaped, values))
    return (line.replace(_NULL, "\\N") + "\n").encode()


def _text(value: Any) -> str:
    if value is None:
        return _NULL
    kind = type(value)
    if kind is dict:
        return _json.encode(value).decode()
    if kind is bool:
        return "t" if value else "f"
    if kind is Decimal:
        return f"{value:f}"
    if kind is datetime:
        return str(value.isoformat(" "))
    return str(value)
