"""A row whose values are read when they are asked for is, to everybody, the dict that it stands for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cdc_worker.lazy import Layout, LazyRow, lazy_row
from cdc_worker.values import Value

NUMBERS = st.integers().map(str)
COLUMNS = st.dictionaries(st.text(max_size=3), st.tuples(st.booleans(), st.none() | NUMBERS), max_size=6)


def pair(columns: Mapping[str, tuple[bool, str | None]]) -> tuple[LazyRow, dict[str, Value]]:
    """A row of which the columns that are marked are numbers, and what it stands for."""
    layout = Layout([*columns], [int if number else None for number, _ in columns.values()])
    whole: dict[str, Value]
    whole = {name: int(text) if number and text is not None else text for name, (number, text) in columns.items()}
    return lazy_row(layout, [text for _, text in columns.values()]), whole


@given(COLUMNS, st.data())
def test_it_is_the_dict_that_it_stands_for_whatever_was_asked_before(
    columns: dict[str, tuple[bool, str | None]], data: st.DataObject
) -> None:
    row, whole = pair(columns)
    for name in data.draw(st.lists(st.sampled_from([*columns, "there is none"]))):
        assert row.get(name, "no") == whole.get(name, "no")
        assert (name in row) == (name in whole)
    assert len(row) == len(whole)
    assert bool(row) == bool(whole)
    assert [*row] == [*whole]
    assert [*reversed(row)] == [*reversed(whole)]
    assert [*row.keys()] == [*whole.keys()]
    assert [*row.items()] == [*whole.items()]
    assert [*row.values()] == [*whole.values()]
    assert row.keys() & whole.keys() == whole.keys()
    assert repr(row) == repr(whole)


@given(COLUMNS)
def test_copies_of_it_and_what_is_made_of_it_are_whole(columns: dict[str, tuple[bool, str | None]]) -> None:
    def fresh() -> LazyRow:
        return pair(columns)[0]

    whole = pair(columns)[1]
    copies = [
        dict(fresh()),
        {**fresh()},
        fresh().copy(),
        copy.copy(fresh()),
        copy.deepcopy(fresh()),
        pickle.loads(pickle.dumps(fresh())),  # noqa: S301  # what was packed just now
        fresh() | {},
        {} | fresh(),
        dict(**fresh()) if all(columns) else whole,
    ]
    for of in copies:
        assert type(of) is dict
        assert of == whole
    assert msgspec.json.encode(dict(fresh())) == msgspec.json.encode(whole)


@given(COLUMNS, COLUMNS)
def test_it_is_equal_to_what_is_equal_to_that_dict(
    columns: dict[str, tuple[bool, str | None]], others: dict[str, tuple[bool, str | None]]
) -> None:
    (row, whole), (other, other_whole) = pair(columns), pair(others)
    assert row == whole
    assert whole == row
    assert (row == other) == (whole == other_whole)
    assert (row != other_whole) == (whole != other_whole)
    assert row != []


def test_what_nobody_asks_for_is_not_read() -> None:
    def unreadable(text: str) -> Value:
        raise AssertionError(text)

    row = lazy_row(Layout(["a", "b"], [unreadable, None]), ["1", "2"])
    assert row["b"] == "2"
    assert "a" in row
    assert [*row] == ["a", "b"]
