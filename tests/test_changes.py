from collections import Counter

import pytest
from factories import assembled, begin, lead, said, updated
from hypothesis import given
from hypothesis import strategies as st

from cdc_worker.changes import Assembler, Begin, Change, Commit, Message, Row, Transaction, update
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.values import Value


def change(number: int) -> Change:
    return Change("insert", "public", "lead", None, {"lead_id": number})


def fed(assembler: Assembler, *messages: Begin | Change | Message | Commit) -> list[Transaction]:
    return [transaction for message in messages if (transaction := assembler.feed(message, b"?")) is not None]


SCRIPTS = st.lists(st.one_of(st.just("change"), st.just("message")), max_size=40).map(
    lambda kinds: [change(n) if kind == "change" else said(str(n)) for n, kind in enumerate(kinds)]
)


@given(SCRIPTS, st.sets(st.integers(0, 40)))
def test_slices_put_together_are_the_transaction(script: list[Change | Message], cuts: set[int]) -> None:
    slices = assembled(script, cuts=cuts)
    changes = [message for message in script if isinstance(message, Change)]
    assert [c for part in slices for c in part.changes] == changes
    assert [part.index for part in slices] == [sum(len(p.changes) for p in slices[:n]) for n in range(len(slices))]
    assert [part.last for part in slices] == ([False] * (len(slices) - 1) + [True] if changes else [])
    assert {(part.xid, part.commit_lsn, part.end_lsn, part.committed_at) for part in slices} <= {
        (begin().xid, begin().commit_lsn, begin().end_lsn, begin().committed_at)
    }


@given(SCRIPTS, st.sets(st.integers(0, 40)))
def test_messages_keep_their_place_among_the_changes(script: list[Change | Message], cuts: set[int]) -> None:
    slices = assembled(script, cuts=cuts)
    together: list[Change | Message] = []
    for part in slices:
        places = Counter(place for place, _ in part.messages)
        assert set(places) <= set(range(len(part.changes) + 1))
        assert [place for place, _ in part.messages] == sorted(places.elements())
        messages = iter(part.messages)
        for number in range(len(part.changes) + 1):
            together += [next(messages)[1] for _ in range(places[number])]
            together += part.changes[number : number + 1]
    assert together == (script if any(isinstance(message, Change) for message in script) else [])


def test_a_slice_is_cut_at_its_number_of_changes_and_at_its_number_of_bytes() -> None:
    assembler = Assembler()
    fed(assembler, begin())
    whole = fed(assembler, *(change(n) for n in range(2 * Assembler.MAX_CHANGES)), Commit())
    assert [(len(part.changes), part.index, part.last) for part in whole] == [
        (Assembler.MAX_CHANGES, 0, False),
        (Assembler.MAX_CHANGES, Assembler.MAX_CHANGES, False),
        (0, 2 * Assembler.MAX_CHANGES, True),
    ]
    fed(assembler, begin())
    half = bytes(Assembler.MAX_BYTES // 2)
    assert assembler.feed(change(0), half) is None
    cut = assembler.feed(change(1), half)
    assert cut is not None
    assert cut.changes == [change(0), change(1)]
    assert assembler.feed(change(2), half) is None, "the size counts from the cut"


def test_a_transaction_without_our_changes_is_none_and_leaves_nothing_behind() -> None:
    assembler = Assembler()
    assert fed(assembler, begin(0x100), said("{}"), Commit()) == []
    assert assembler.received == 0x130
    assert fed(assembler, begin(0x200), change(0), Commit()) == [
        Transaction(700, LSN(0x200), LSN(0x230), begin().committed_at, [change(0)], [], [b"?"], 0, True, True)
    ]


def test_what_ends_at_or_before_the_start_is_skipped_and_what_ends_after_it_is_not() -> None:
    assembler = Assembler(LSN(0x230))
    for lsn in (0x100, 0x200):
        assert fed(assembler, begin(lsn), said("{}"), change(0)) == []
        assert fed(assembler, Commit()) == []
        assert assembler.received == 0x230, "it never goes back"
    assert fed(assembler, begin(0x201), change(1)) == []
    (transaction,) = fed(assembler, Commit())
    assert (transaction.changes, transaction.messages) == ([change(1)], [])
    assert assembler.received == 0x231


def test_it_knows_whether_a_transaction_is_open() -> None:
    assembler = Assembler()
    assert not assembler.open
    fed(assembler, begin())
    assert assembler.open
    fed(assembler, Commit())
    assert not assembler.open


def test_what_is_not_transactional_is_ignored_inside_and_outside() -> None:
    """It arrives at once, also from transactions that roll back."""
    assembler = Assembler()
    now = said("{}", transactional=False)
    (transaction,) = fed(assembler, now, begin(), now, change(0), now, Commit(), now)
    assert transaction.messages == []


def test_a_stream_out_of_order_is_unreadable() -> None:
    with pytest.raises(MessageUnreadableError, match="a change came outside a transaction"):
        fed(Assembler(), change(0))
    with pytest.raises(MessageUnreadableError, match="a commit came outside a transaction"):
        fed(Assembler(), Commit())
    with pytest.raises(MessageUnreadableError, match="transaction 700 began inside transaction 700"):
        fed(Assembler(), begin(), begin())


def test_an_update_names_the_columns_that_are_distinct_in_the_order_of_the_table() -> None:
    assert updated("lead", lead(), type="x", status=None, source="web").changed == ("status", "type")
    assert updated("lead", lead(status=None), status="").changed == ("status",)
    assert updated("lead", lead()).changed == ()


def test_an_unchanged_toasted_column_is_taken_from_the_old_row() -> None:
    """It isn't sent. Under REPLICA IDENTITY FULL the old row has it, so it is neither changed nor NULL."""
    old: Row = {"id": 1, "body": "long", "last": 2}
    got = update("public", "t", old, {"id": 1, "last": 3})
    assert got == Change("update", "public", "t", old, {"id": 1, "body": "long", "last": 3}, ("last",))
    assert list(got.new or ()) == ["id", "body", "last"]
    assert not got.old_row_unknown


def test_old_values_are_unknown_without_the_whole_old_row() -> None:
    assert update("public", "t", {"id": 1}, {"id": 1, "name": "b"}).old_row_unknown
    assert update("public", "t", {}, {"id": 1}).old_row_unknown
    assert not update("public", "t", {"id": 1, "name": None}, {"id": 1, "name": "b"}).old_row_unknown


# Partitions

DEAL, ONE, TWO = ("public", "deal"), ("public", "one"), ("far", "two")
LEAD, STRANGE = ("public", "lead"), ("public", "strange")


def partitioned(*messages: Begin | Change | Message | Commit, sizes: dict[int, int] | None = None) -> list[Transaction]:
    """One commit of these messages, where deal has the partitions one and two, and key is `id`."""
    roots = {ONE: DEAL, TWO: DEAL, DEAL: DEAL, LEAD: LEAD}
    assembler = Assembler(root_of=lambda change, _: roots.get((change.schema, change.table)), keys={DEAL: ("id",)})
    slices = []
    for number, message in enumerate((begin(), *messages, Commit())):
        slices.append(assembler.feed(message, bytes((sizes or {}).get(number, 1))))
    return [part for part in slices if part is not None]


def gone(partition: tuple[str, str], **row: Value) -> Change:
    return Change("delete", *partition, row, None)


def came(partition: tuple[str, str], **row: Value) -> Change:
    return Change("insert", *partition, None, row)


def emptied(schema: str, name: str) -> Change:
    return Change("truncate", schema, name, None, None)


def test_changes_of_partitions_are_those_of_their_root_and_others_are_nobodys() -> None:
    (only,) = partitioned(came(ONE, id=1), came(STRANGE, id=2), change(3), update(*TWO, {"id": 4}, {"id": 5}))
    assert only.changes == [
        Change("insert", *DEAL, None, {"id": 1}, (), ONE),
        change(3),
        Change("update", *DEAL, {"id": 4}, {"id": 5}, ("id",), TWO),
    ]
    assert only.payloads == [only.changes[0], bytes(1), only.changes[2]], "as received is under another name"
    assert partitioned(came(STRANGE, id=1), gone(STRANGE, id=1), emptied(*STRANGE)) == []


def test_a_row_that_moves_to_another_partition_is_updated() -> None:
    (only,) = partitioned(gone(ONE, id=1, at=1, n=None), came(STRANGE, id=1), came(TWO, id=1, at=2, n=None))
    moved = Change("update", *DEAL, {"id": 1, "at": 1, "n": None}, {"id": 1, "at": 2, "n": None}, ("at",), ONE)
    assert (only.changes, only.payloads) == ([moved], [moved])
    (only,) = partitioned(gone(ONE, id=1), came(TWO, id=1, at=2))
    assert only.changes[0].old_row_unknown


@pytest.mark.parametrize(
    "after",
    [
        came(TWO, id=2),
        came(TWO, at=1),
        came(ONE, id=1),
        came(LEAD, id=1),
        came(DEAL, id=1),
        gone(TWO, id=1),
        update(*TWO, {"id": 1}, {"id": 1}),
        emptied(*TWO),
    ],
)
def test_a_delete_with_anything_else_after_it_is_a_delete(after: Change) -> None:
    (only,) = partitioned(gone(ONE, id=1), after)
    assert [(c.operation, c.partition) for c in only.changes[:1]] == [("delete", ONE)]
    assert [(c.operation, c.old, c.new) for c in only.changes[1:]] == [(after.operation, after.old, after.new)]


def test_a_message_between_a_delete_and_an_insert_is_heard_between_them() -> None:
    (only,) = partitioned(gone(ONE, id=1), said("{}"), came(TWO, id=1))
    assert [c.operation for c in only.changes] == ["delete", "insert"]
    assert [place for place, _ in only.messages] == [1]


def test_a_table_that_is_emptied_with_its_partitions_is_emptied_once() -> None:
    whole, part = emptied(*DEAL), Change("truncate", *DEAL, None, None, (), ONE)
    all_of_it = (emptied(*DEAL), emptied(*ONE), emptied(*TWO))
    assert partitioned(*all_of_it, *all_of_it, emptied(*ONE))[0].changes == [whole, whole]
    assert partitioned(emptied(*ONE), emptied(*TWO))[0].changes == [part]
    assert partitioned(emptied(*ONE), *all_of_it)[0].changes == [part, whole]
    assert partitioned(*all_of_it, change(1), emptied(*ONE))[0].changes == [whole, change(1), part]
    assert partitioned(*all_of_it, gone(TWO, id=1), emptied(*ONE))[0].changes[2:] == [part]


STEPS = st.lists(
    st.one_of(
        st.builds(gone, st.sampled_from([ONE, TWO]), id=st.integers(1, 2)),
        st.builds(came, st.sampled_from([ONE, TWO, STRANGE]), id=st.integers(1, 2)),
        st.sampled_from([emptied(*DEAL), emptied(*ONE), emptied(*TWO), change(1), said("{}")]),
    ),
    max_size=12,
)


@given(STEPS, st.sets(st.integers(0, 12)))
def test_what_rows_that_move_come_to_does_not_depend_on_slices(script: list[Change | Message], cuts: set[int]) -> None:
    whole = partitioned(*script)
    slices = partitioned(*script, sizes=dict.fromkeys(cuts, Assembler.MAX_BYTES))
    changes = [change for part in slices for change in part.changes]
    assert changes == [change for part in whole for change in part.changes]
    assert [part.index for part in slices] == [sum(len(p.changes) for p in slices[:n]) for n in range(len(slices))]
    assert [part.last for part in slices] == [False] * (len(slices) - 1) + [True] * bool(slices)


def test_a_flood_of_messages_is_sliced_too() -> None:
    """A transaction may say very much and change nothing for long."""
    assembler = Assembler()
    slices = fed(assembler, begin(), *(said("{}") for _ in range(Assembler.MAX_CHANGES)), change(0), Commit())
    assert [(len(s.messages), len(s.changes), s.first, s.last) for s in slices] == [
        (Assembler.MAX_CHANGES, 0, True, False),
        (0, 1, False, True),
    ]
