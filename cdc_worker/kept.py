"""Dead letters as they are kept: as JSON, from which every value comes back as it was.

What JSON can't tell stands beside it: in which order a row has its columns, and which numbers are no exact ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

import msgspec

from cdc_worker.activities import NOTHING_FOUND, DeadLetter, DeadLetterKind, Origin
from cdc_worker.changes import Change, Operation, Row, update
from cdc_worker.context import NOTHING, Collapse, Context, Plain
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.values import integer

_encode: Final = msgspec.json.Encoder(decimal_format="number").encode


def encoded(worker: str, letters: Iterable[DeadLetter]) -> bytes:
    """Rows of cdc_worker.dead_letter, as an array of objects."""
    return _encode([_columns(worker, letter) for letter in letters])


def _columns(worker: str, letter: DeadLetter) -> dict[str, Any]:
    origin, change = letter.origin, letter.change
    return {
        "worker": worker,
        "change_key": letter.change_key,
        "kind": letter.kind,
        "reason": letter.reason,
        "sqlstate": letter.sqlstate,
        "constraint_name": letter.constraint,
        "committed_at": letter.committed_at,
        "change": _document(change),
        "fields": letter.fields,
        "xid": origin.xid or None,
        "commit_lsn": str(origin.commit_lsn) if origin.commit_lsn else None,
        "end_lsn": str(origin.end_lsn) if origin.end_lsn else None,
        "context": None if origin.context == NOTHING else _said(origin.context),
        "found": None if not letter.found else {"rows": letter.found, **_floats(letter.found), **_masked(origin)},
        "masked": sorted(origin.masked.get((change.schema, change.table), ())),
        "raw": None if letter.raw is None else letter.raw.hex(),
    }


def encoded_change(change: Change) -> str:
    """A change as it is kept."""
    return _encode(_document(change)).decode()


def _document(change: Change) -> dict[str, Any]:
    rows = {name: row if row is None else dict(row) for name, row in (("old", change.old), ("new", change.new))}
    columns = [*dict.fromkeys([*(change.new or ()), *(change.old or ())])]
    return {**msgspec.structs.asdict(change), **rows, "columns": columns, **_floats(rows)}


def _said(context: Context) -> dict[str, Any]:
    # What activities tell of it depends on the profile, and is told anew.
    said = {"said": context.said, "claimed": context.claimed}
    control = {"skip": context.skip, "collapse": context.collapse, "refused": sorted(context.refused)}
    return {**said, **control, **_floats(said)}


def _masked(origin: Origin) -> dict[str, Any]:
    """In rows of which tables values are masked."""
    found = [(*table, sorted(columns)) for table, columns in origin.masked.items() if columns]
    return {"masked": found} if found else {}


def _floats(rows: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    found = {
        name: [column for column, value in (row or {}).items() if type(value) is float] for name, row in rows.items()
    }
    return {"floats": of} if (of := {name: columns for name, columns in found.items() if columns}) else {}


def read(text: str) -> Any:
    """What JSON tells, with every digit."""
    return json.loads(text, parse_int=integer, parse_float=Decimal)


def _rows(document: Mapping[str, Any], names: Iterable[str], of: Mapping[str, Any]) -> dict[str, Row | None]:
    """Rows of a document, with the floats that it names."""
    floats = document.get("floats", {})
    return {
        name: of.get(name) and {c: float(v) if c in floats.get(name, ()) else v for c, v in of[name].items()}
        for name in names
    }


class Kept(NamedTuple):
    """What of a row of cdc_worker.dead_letter a dead letter is made of; JSON as text. Older rows have less."""

    change_key: str
    kind: DeadLetterKind
    reason: str
    sqlstate: str | None
    constraint: str | None
    committed_at: datetime
    change: str
    fields: str | None
    xid: int | None
    commit_lsn: str | None
    end_lsn: str | None
    context: str | None
    found: str | None
    masked: list[str] | None
    raw: bytes | None

    @property
    def whole(self) -> bool:
        """Whether its transaction was kept with it."""
        return self.end_lsn is not None

    def letter(self) -> DeadLetter:
        """The dead letter that it was."""
        about = change(self.change)
        found = {} if self.found is None else read(self.found)
        masked = {(schema, table): frozenset(columns) for schema, table, columns in found.get("masked", ())}
        if self.masked:
            masked[about.schema, about.table] = frozenset(self.masked)
        origin = Origin(
            self.xid or 0,
            LSN.parse(self.commit_lsn) if self.commit_lsn else INVALID,
            LSN.parse(self.end_lsn) if self.end_lsn else INVALID,
            context(self.context),
            masked,
        )
        return DeadLetter(
            self.change_key,
            self.kind,
            self.reason,
            about,
            0,
            self.committed_at,
            self.sqlstate,
            self.constraint,
            None if self.fields is None else read(self.fields),
            origin,
            _rows(found, found["rows"], found["rows"]) if found else NOTHING_FOUND,
            self.raw,
        )


def change(text: str) -> Change:
    """The change that a dead letter is about."""
    found = read(text)
    rows = _rows(found, ("old", "new"), found)
    order = {column: place for place, column in enumerate(found.get("columns", ()))}
    old, new = (
        row if row is None else {column: row[column] for column in sorted(row, key=lambda name: order.get(name, 0))}
        for row in rows.values()
    )
    operation: Operation = found["operation"]
    name, changed = (found["schema"], found["table"]), tuple(found["changed"])
    partition = None if found["partition"] is None else tuple(found["partition"])
    if operation == "update" and old is not None and new is not None and old.keys() == new.keys():
        # Anew: what the profile ignored by then may count by now.
        return update(*name, old, new, partition, also=changed)
    return Change(operation, *name, old, new, changed, partition)


def context(text: str | None) -> Context:
    """What had been said before it; what is told of that is for the policy to say."""
    if text is None:
        return NOTHING
    found = read(text)
    said = _rows(found, ("said", "claimed"), found)
    wish = found["collapse"]
    return Context(
        said=_plain(said["said"]),
        claimed=_plain(said["claimed"]),
        skip=found["skip"],
        collapse=None if wish is None else Collapse(**wish),
        refused=frozenset(found["refused"]),
    )


def _plain(row: Row | None) -> dict[str, Plain]:
    # No number that was said is a Decimal: it was no exact one, or an integer.
    return {name: float(value) if isinstance(value, Decimal) else value for name, value in (row or {}).items()}
