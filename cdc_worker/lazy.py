"""Rows of which nobody looks at most: what was sent of a column becomes a value when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any

from cdc_worker.values import Value


class Layout:
    """The columns of rows, in order, and how what was sent of each is read, if it isn't the value."""

    __slots__ = ("columns", "places", "readers")

    def __init__(self, columns: Sequence[str], readers: Sequence[Callable[[str], Value] | None]) -> None:
        """Raises ValueError where two columns have one name."""
        self.columns = columns
        self.places = {column: place for place, column in enumerate(columns)}
        self.readers = readers
        if len(self.places) < len(columns):
            raise ValueError("two columns have one name")


class LazyRow(dict[str, Value]):
    """A row with all columns of its layout, of which `sent` has what is to be read.

    It is a dict for its values' sake: one that is there is found as fast as in any other. Nobody changes it, and what
    reads the memory of a dict without asking it, as msgspec's encoders do, is to be given a `dict` of it.
    """

    __slots__ = ("layout", "sent")

    layout: Layout
    sent: Sequence[Any]

    def __missing__(self, column: str) -> Value:
        layout = self.layout
        place = layout.places[column]
        value: Value = self.sent[place]
        read = layout.readers[place]
        if read is not None and value is not None:
            value = read(self.sent[place])
        self[column] = value
        return value

    def __contains__(self, column: object) -> bool:
        return column in self.layout.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.columns)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self.layout.columns)

    def __len__(self) -> int:
        return len(self.layout.columns)

    def get(self, column: str, default: Any = None) -> Any:
        return self[column] if column in self.layout.places else default

    def keys(self) -> Any:
        return KeysView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def __eq__(self, other: object) -> bool:
        return dict(self) == (dict(other) if isinstance(other, Mapping) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # as of any dict

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[type[dict[str, Value]], tuple[dict[str, Value]]]:
        return dict, (dict(self),)

    def copy(self) -> dict[str, Value]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)


def lazy_row(layout: Layout, sent: Sequence[Any]) -> LazyRow:
    """A row of which so much as its layout has columns was sent."""
    row = LazyRow()  # without an __init__, which would cost as much as all else
    row.layout, row.sent = layout, sent
    return row
