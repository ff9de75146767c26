"""Values of columns, from how Postgres prints them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Final

MAX_DIGITS: Final = 131_072
"""So many a numeric has before its point, and fewer behind it: no memory could hold all that a Decimal can name."""

_INTEGER_DIGITS: Final = 4_300
"""More than these int() doesn't read."""

Value = None | bool | int | float | Decimal | str
"""A column's value: integers are int, numeric is exact, everything else is text as Postgres prints it.

What is no finite number is text as well: NaN, Infinity, -Infinity.
"""

# Manual: "Object Identifier Types"; the numbers are in src/include/catalog/pg_type.dat.
BOOLEAN, BYTEA, BIGINT, SMALLINT, INTEGER, OID, REAL, DOUBLE, NUMERIC = 16, 17, 20, 21, 23, 26, 700, 701, 1700

INFINITE: Final = ("NaN", "Infinity", "-Infinity")
"""Values of numeric columns that are no finite numbers."""


def integer(digits: str) -> int | Decimal:
    """An integer of however many digits. Raises ValueError."""
    return int(digits) if len(digits) < _INTEGER_DIGITS else Decimal(digits)


def _boolean(text: str) -> Value:
    return text == "t" if text in ("t", "f") else text


def _bytea(text: str) -> Value:
    return text.removeprefix("\\x")


def _number(text: str) -> Value:
    """An integer is an int, be it of a numeric: in JSON there is no difference."""
    if len(text) < _INTEGER_DIGITS:
        try:
            return int(text)
        except ValueError:
            pass
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    return number if number.is_finite() and abs(number.adjusted()) <= MAX_DIGITS else text


def _float(text: str) -> Value:
    number = _number(text)
    return inexact(number) if type(number) is Decimal else number


def inexact(number: Decimal) -> Value:
    """A number of a type that is no exact one."""
    found = float(number)
    return found if abs(found) < float("inf") else str(number)


READERS: Final[Mapping[int, Callable[[str], Value]]] = {
    BOOLEAN: _boolean,
    BYTEA: _bytea,
    **dict.fromkeys((BIGINT, SMALLINT, INTEGER, OID, NUMERIC), _number),
    **dict.fromkeys((REAL, DOUBLE), _float),
}
"""By the OIDs of their types, how values are read that aren't kept as text. What isn't of its type stays text."""

NUMBERS: Final = frozenset((BIGINT, SMALLINT, INTEGER, OID, REAL, DOUBLE, NUMERIC))
"""OIDs of types whose values are numbers."""

FLOATS: Final = frozenset((REAL, DOUBLE))
"""Those that are no exact ones."""


def value(typeoid: int, text: str) -> Value:
    """What a text that Postgres printed stands for, of a type that is no domain."""
    read = READERS.get(typeoid)
    return text if read is None else read(text)
