"""Whether a log is true, and what makes it so: laws of histories, without a database."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from factories import COMMITTED_AT, assembled, deleted, inserted, lead, profile, truncated, updated
from hypothesis import assume, given
from hypothesis import strategies as st

from cdc_worker import reconcile
from cdc_worker.activities import Activity, Clusters, Place, parsed_key
from cdc_worker.changes import Change, Row, Transaction
from cdc_worker.history import Event, recorded, standing
from cdc_worker.lsn import LSN
from cdc_worker.profile import load
from cdc_worker.rules import compile_backfill, compile_rules
from cdc_worker.templates import text
from cdc_worker.transform import Transformer, settled, transform
from cdc_worker.truth import Break, Log, Of, Silence, Story, Teller, Told

LEADFI = load("leadfi")
RULES = compile_rules(LEADFI)
READING = compile_backfill(LEADFI)
OF_NOBODY = compile_rules(reconcile.of_nobody(LEADFI))
RECORDED = recorded(LEADFI, "lead")
LOG = Log(LEADFI, "lead")
ON_ONE = Clusters("1")


@dataclass
class Book:
    """The log of leads as a target has it, and the leads that there are."""

    clusters: Clusters = ON_ONE
    written: list[Activity] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    lsn: int = 0x1000

    def commit(self, *changes: Change, record: bool = True) -> None:
        """Changes that are committed, and recorded."""
        self.lsn += 0x100
        came = transform(
            RULES, assembled(changes, commit_lsn=self.lsn), worker="w", system_identifier=self.clusters.current
        )
        self.written += [outcome for outcome in came if isinstance(outcome, Activity) and record]
        for change in changes:
            if change.operation == "truncate":
                self.rows.clear()
            if change.old is not None:
                self.rows.pop(text(change.old["lead_id"]), None)
            if change.new is not None:
                self.rows[text(change.new["lead_id"])] = change.new

    def restore(self, *clusters: str) -> None:
        """Go on on another cluster, whose positions begin lower."""
        self.clusters, self.lsn = Clusters(clusters[-1], clusters[:-1]), 0x10

    @property
    def teller(self) -> Teller:
        return Teller(LOG, worker="w", clusters=self.clusters, named=lambda key: key[0])

    def event(self, activity: Activity) -> Event | None:
        """As a journal reads it."""
        parsed = parsed_key("w", self.clusters, activity.change_key)
        assert parsed is not None
        metadata = json.loads(msgspec.json.encode(activity.fields["metadata"]), parse_float=Decimal)
        what, before = RECORDED.what(parsed.rule), tuple[str, ...]()
        subject = parsed.subject or text(activity.fields["lead"])
        for name in RECORDED.changes.get(parsed.rule, ()):
            old = metadata.get(name, {}).get("lead_id", {}).get("old")
            if old is not None:
                what, before = "moved", (text(old),)
        if not subject:
            return None
        return Event(
            *(subject, parsed.rule, what, parsed.place, parsed.kind),
            before=before,
            change_key=activity.change_key,
            metadata=metadata,
        )

    def events(self) -> dict[str, list[Event]]:
        found: dict[str, list[Event]] = {subject: [] for subject in self.rows}
        for activity in self.written:
            if (event := self.event(activity)) is not None:
                found.setdefault(event.subject, []).append(event)
                for key in event.before:
                    found.setdefault(key, [])
        return found

    def emptied(self) -> list[Place]:
        keys = (parsed_key("w", self.clusters, activity.change_key) for activity in self.written)
        return [key.place for key in keys if key is not None and key.rule in RECORDED.emptied]

    def stories(self, silence: Silence | None = None) -> Mapping[str, Story]:
        return self.teller.stories(self.events(), emptied=self.emptied(), silence=silence or Silence())

    def breaks(self, silence: Silence | None = None) -> list[Break]:
        """All that is missing."""
        return [
            gap
            for subject, story in self.stories(silence).items()
            for gap in self.teller.breaks(
                subject, story, LOG.values(self.rows[subject]) if subject in self.rows else None
            )
        ]

    def repair(self) -> None:
        """Make up for what is missing, once."""
        for gap in self.breaks():
            row = self.rows.get(gap.subject)
            columns = list(lead() if row is None else row)
            key: Row = {"lead_id": int(gap.subject)}
            made = reconcile.mend(LOG, RECORDED, gap, key=key, columns=columns, row=row)
            assert made is not None
            read = made.change.operation == "read"
            rules = READING if read else OF_NOBODY
            transformer = Transformer(rules, worker="w", system_identifier=self.clusters.current)
            at = LSN(self.lsn)
            commit = Transaction(0, at, at, COMMITTED_AT, [made.change], [], [made.change], 0, True, True)
            number = reconcile.number(gap)
            assert number is not None
            rules_of = []
            for outcome in settled(transformer, commit, dict.fromkeys):
                assert isinstance(outcome, Activity), outcome
                rule = outcome.change_key.rpartition("/")[2]
                if not reconcile.meant(LOG, RECORDED, gap, rule):
                    continue
                rules_of.append(rule)
                self.written.append(
                    reconcile.finished(
                        LOG,
                        RECORDED,
                        made,
                        outcome,
                        rule=rule,
                        worker="w",
                        clusters=self.clusters,
                        moment=reconcile.Moment("now", LSN(self.lsn), COMMITTED_AT),
                        number=number,
                    )
                )
            assert reconcile.covered(LOG, gap, rules_of), gap


COLUMNS: dict[str, list[Any]] = {
    "status": ["a", "b", None],
    "bd_in_charge": ["jane", "joe"],
    "full_name": ["Ada", "Bea", "x" * 300, "x" * 299 + "y"],
    "email": [None, "a@x", "b@x"],
    "is_converted": [True, False, None],
}

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "update", "update", "update", "delete", "move"]),
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from([(column, value) for column, values in COLUMNS.items() for value in values]),
        st.sampled_from([(column, value) for column, values in COLUMNS.items() for value in values]),
    ),
    max_size=14,
)


def lived(steps: Sequence[Any], book: Book | None = None) -> Book:
    """A book of what has happened, all of it recorded."""
    book = Book() if book is None else book
    for what, one, other, first, second in steps:
        row = book.rows.get(str(one))
        match what:
            case "insert" if row is None:
                book.commit(inserted("lead", lead(lead_id=one, **dict([first]))))
            case "update" if row is not None:
                book.commit(updated("lead", row, **dict([first])))
                book.commit(updated("lead", book.rows[str(one)], **dict([first, second])))
            case "delete" if row is not None:
                book.commit(deleted("lead", row))
            case "move" if row is not None and str(other) not in book.rows:
                book.commit(updated("lead", row, lead_id=other, **dict([second])))
            case "truncate":
                book.commit(truncated("lead"))
    return book


@given(STEPS)
def test_a_log_of_all_that_has_happened_is_true(steps: Sequence[tuple[Any, ...]]) -> None:
    assert lived(steps).breaks() == []


TOLD_FROM_THE_BEGINNING = ("lead_created", "status_changed", "assignment_changed", "lead_deleted")


@given(STEPS, st.data())
def test_what_is_lost_is_found_missing_and_can_be_made_up_for(steps: Sequence[tuple[Any, ...]], data: Any) -> None:
    book = lived(steps)
    lost = [a for a in book.written if a.fields["type"] in TOLD_FROM_THE_BEGINNING]
    # Who came and went before anything else was recorded of the key may as well have been there before the worker.
    lost = [a for a in lost if a.fields["type"] != "lead_created" or str(a.fields["lead"]) in book.rows]
    assume(lost)
    gone = data.draw(st.sampled_from(lost))
    book.written.remove(gone)
    if gone.fields["type"] != "lead_created":
        assert book.breaks() != []
    for _ in range(3):  # what is made up for may bring to light what it hid
        book.repair()
    assert book.breaks() == []
    before = [*book.written]
    book.repair()
    assert book.written == before


@given(STEPS, st.data())
def test_whatever_is_lost_a_log_can_be_made_true(steps: Sequence[tuple[Any, ...]], data: Any) -> None:
    book = lived(steps)
    assume(book.written)
    for _ in range(data.draw(st.integers(1, 5))):
        if book.written:
            book.written.remove(data.draw(st.sampled_from(book.written)))
    for _ in range(4):
        book.repair()
    assert book.breaks() == []


@given(STEPS, STEPS)
def test_what_was_never_recorded_is_made_up_for(
    before: Sequence[tuple[Any, ...]], after: Sequence[tuple[Any, ...]]
) -> None:
    book = lived(before)
    kept = [*book.written]
    lived(after, book)
    book.written = kept
    for _ in range(3):
        book.repair()
    assert book.breaks() == []


@given(STEPS, STEPS, STEPS, STEPS, st.integers(0, 3))
def test_what_was_lost_with_a_cluster_is_made_up_for_on_the_next(
    before: Sequence[Any], gap: Sequence[Any], after: Sequence[Any], later: Sequence[Any], lost: int
) -> None:
    book = lived(before)
    for _ in range(lost):
        if book.written:
            book.written.pop(len(book.written) // 2)
    for steps, clusters in ((after, ("1", "2")), (later, ("1", "2", "3"))):
        kept = [*book.written]
        lived(gap, book)
        book.restore(*clusters)
        lived(gap[::-1], book)
        book.written = kept
        lived(steps, book)
        for _ in range(4):
            book.repair()
        assert book.breaks() == []
        keys = [of.change_key for of in book.written]
        assert len(keys) == len({*keys})
        lived(steps, book)
        assert book.breaks() == []


def story(book: Book) -> list[tuple[str, str, list[str]]]:
    return [(gap.what, gap.subject, [str(d.of) for d in gap.differences]) for gap in book.breaks()]


def test_leadfi_tells_every_change_of_its_columns() -> None:
    lead_log, customer_log = Log(LEADFI, "lead"), Log(LEADFI, "customer")
    assert [column for column in lead() if not lead_log.tracks(Of(column))] == []
    assert customer_log.tracks(Of("is_closed"))
    assert customer_log.tracks(Of("is_closed", "status"))
    assert (lead_log.creation, lead_log.deletion) == (True, True)


def test_the_sales_cookbook_tells_nothing_for_certain() -> None:
    cookbook = load("sales_cookbook")
    for name, table in cookbook.tables.items():
        log = Log(cookbook, name)
        assert not log.creation
        assert [rule for rule in table.rules for column in rule.changed if log.tracks(Of(column))] == []


RULES_OF = """
[tables.lead]
key = "id"
fields = { lead = "{row.id}" }
ignored = "seen"
[[tables.lead.rules]]
on = "insert"
type = "created"
description = ""
[[tables.lead.rules]]
on = "update"
changed = ["plain", "untold"]
type = "a"
description = ""
metadata = { plain = "{new.plain}", cut = "{new.untold:cut 3}" }
[[tables.lead.rules]]
on = "update"
changed = "wanted"
to = { wanted = "x" }
type = "b"
description = ""
[[tables.lead.rules]]
on = "update"
changed = "big"
when = { new = { big = { over = 5 } } }
type = "c"
description = ""
metadata = { how = "{new.big or 'none'}" }
[[tables.lead.rules]]
on = "update"
changed = "asked"
skip_unless = "new.owner"
type = "d"
description = ""
metadata = { asked = "{new.asked}" }
[[tables.lead.rules]]
on = "update"
changed = "unclaimed"
type = "e"
description = ""
metadata = { changes = "{changes}" }
"""


@pytest.mark.parametrize(
    ("column", "tracked"),
    [
        ("plain", True),
        ("untold", False),  # claimed, and told in part
        ("wanted", True),  # by the constant, or as unclaimed
        ("big", False),
        ("asked", False),
        ("other", True),
        ("seen", False),
    ],
)
def test_a_column_is_tracked_if_every_change_of_it_is_told(column: str, tracked: bool) -> None:
    assert Log(profile(RULES_OF), "lead").tracks(Of(column)) is tracked


def test_a_missing_status_change_is_found_at_the_end_and_in_the_middle() -> None:
    book = Book()
    book.commit(inserted("lead", lead()))
    for status in ("2", "3", "4"):
        book.commit(updated("lead", book.rows["7"], status=status))
    changes = book.written[1:]
    book.written = [book.written[0], *changes[:-1]]
    assert story(book) == [("change", "7", ["status"])]
    book.written = [book.written[0], changes[0], changes[2]]
    (gap,) = book.breaks()
    assert gap.before is not None
    assert gap.after is not None
    assert (gap.before.change_key, gap.after.change_key) == (changes[0].change_key, changes[2].change_key)
    assert [(d.known.value, d.found.value) for d in gap.differences] == [("2", "3")]


def test_a_row_that_nothing_says_came_to_be_has_no_creation() -> None:
    book = Book()
    book.commit(inserted("lead", lead()), record=False)
    assert story(book) == [("creation", "7", [])]
    book.commit(updated("lead", lead(), status="2"))
    assert story(book) == [("creation", "7", [])]
    book.commit(deleted("lead", book.rows["7"]))
    assert story(book) == []  # it was there before, for all that is known
    book.commit(inserted("lead", lead()), record=False)
    book.commit(updated("lead", lead(), status="2"))
    assert story(book) == [("creation", "7", [])]


def test_a_row_that_is_gone_and_was_never_deleted_has_no_deletion() -> None:
    book = Book()
    book.commit(inserted("lead", lead()))
    book.commit(deleted("lead", lead()), record=False)
    assert story(book) == [("deletion", "7", [])]
    book.commit(inserted("lead", lead()))
    assert story(book) == [("deletion", "7", [])]


def test_on_another_cluster_the_log_goes_on_where_it_was_left_on_the_one_before() -> None:
    book = Book()
    book.commit(inserted("lead", lead()), inserted("lead", lead(lead_id=8)), inserted("lead", lead(lead_id=9)))
    book.commit(updated("lead", lead(), status="2"))
    book.restore("1", "2")
    assert story(book) == []
    book.commit(updated("lead", book.rows["7"], status="3"), deleted("lead", lead(lead_id=8)), record=False)
    assert story(book) == [("change", "7", ["status"]), ("deletion", "8", [])]
    book.commit(updated("lead", book.rows["7"], status="4"))
    assert story(book) == [("change", "7", ["status"]), ("deletion", "8", [])]
    book.repair()
    assert [of.change_key for of in book.written[-2:]] == [
        f"w/2/repair/public.lead/7/status_changed/1:{0x1200:016X}-0.1000",
        f"w/2/repair/public.lead/8/lead_deleted/1:{0x1100:016X}-1.1000",
    ]
    assert story(book) == []
    book.commit(inserted("lead", lead(lead_id=8)), record=False)
    book.repair()
    assert book.written[-1].change_key == f"w/2/repair/public.lead/8/lead_created/1:{0x1100:016X}-1.2000"
    # Of the order of clusters that aren't known nothing is known.
    book.commit(updated("lead", book.rows["7"], status="5"), record=False)
    book.clusters = Clusters("3")
    assert story(book) == []


def test_an_identity_that_is_told_later_shows_what_was_lost() -> None:
    book = Book()
    book.commit(inserted("lead", lead()))
    book.commit(updated("lead", lead(), full_name="Augusta"), record=False)
    book.commit(updated("lead", book.rows["7"], status="2"))
    (gap,) = book.breaks()
    assert gap.after is not None
    assert [str(difference.of) for difference in gap.differences] == ["full_name"]


def test_after_a_truncate_there_is_nothing() -> None:
    book = Book()
    book.commit(inserted("lead", lead()))
    book.commit(truncated("lead"))
    assert story(book) == []
    book.commit(inserted("lead", lead(status="9")))
    assert story(book) == []


def test_what_a_message_kept_from_being_told_is_silence() -> None:
    book = Book()
    book.commit(inserted("lead", lead()))
    book.commit(updated("lead", lead(), status="2"), record=False)
    skipped = Event("7", "*", "told", Place(1, LSN(book.lsn), 0), skipped=True)
    book.commit(updated("lead", book.rows["7"], status="3"))
    assert story(book) == [("change", "7", ["status"])]
    assert book.breaks(Silence({"7": [skipped]})) == []
    # What was lost after it, is.
    book.commit(updated("lead", book.rows["7"], status="4"), record=False)
    assert [gap.what for gap in book.breaks(Silence({"7": [skipped]}))] == ["change"]


def test_what_triggers_recorded_meanwhile_is_silence_and_so_is_what_was_blanked() -> None:
    book = Book()
    book.commit(inserted("lead", lead()))
    begin = LSN(book.lsn + 1)
    book.commit(updated("lead", lead(), status="2"), record=False)
    end = LSN(book.lsn + 1)
    assert book.breaks(Silence(stretches=[(begin, Place(1, end))])) == []
    assert book.breaks(Silence(blank={"7": Place(1, end)})) == []
    book.commit(updated("lead", book.rows["7"], status="3"))
    book.commit(updated("lead", book.rows["7"], status="4"), record=False)
    assert [gap.what for gap in book.breaks(Silence(stretches=[(begin, Place(1, end))]))] == ["change"]


def test_what_came_to_be_after_a_deletion_that_was_made_up_for_stands_after_it() -> None:
    book = Book()
    book.commit(inserted("lead", lead()))
    book.commit(deleted("lead", lead()), record=False)
    book.repair()
    book.commit(inserted("lead", lead(status="2")), record=False)
    assert story(book) == [("creation", "7", [])]
    book.repair()
    assert story(book) == []
    assert book.written[-1].change_key.endswith("-0.2000")
    assert standing("7", book.events()["7"]).rules == {"lead_created"}


@pytest.mark.parametrize(
    ("told", "value", "same"),
    [
        (None, None, True),
        (None, "", False),
        (5, 5, True),
        (5, Decimal("5.0"), True),
        (Decimal("0.1"), 0.1, True),
        (5, 6, False),
        (True, True, True),
        (True, 1, False),
        ("5", "5", True),
        ("5", "5.0", False),  # texts, as they are
        (5, "5", True),  # the column has got another type
        ("abc…", "abcd", False),
    ],
)
def test_values_as_told_and_as_they_are(told: Any, value: Any, same: bool) -> None:
    assert Told(told).agrees(Told(value)) is same
    assert Told(value).agrees(Told(told)) is same


def test_of_a_text_that_was_cut_only_the_beginning_is_compared() -> None:
    assert Told("abc…", cut=True).agrees(Told("abcdef"))
    assert Told("abcdef").agrees(Told("abc…", cut=True))
    assert not Told("abx…", cut=True).agrees(Told("abcdef"))
    assert not Told("abc", cut=True).agrees(Told("abcdef"))


def test_what_is_made_up_for_says_no_more_than_is_known() -> None:
    book = Book()
    book.commit(inserted("lead", lead(email="old@x")))
    for status in ("2", "3"):
        book.commit(updated("lead", book.rows["7"], status=status))
    del book.written[1]
    book.repair()
    made = book.written[-1]
    assert made.change_key == f"w/1/repair/public.lead/7/status_changed/{0x1100:016X}-0.1000"
    assert made.fields["description"] == 'Lead status changed from "1. lead generated" to "2"'
    assert made.fields["metadata"] == {
        "old_status": "1. lead generated",
        "new_status": "2",
        "lead_id": 7,
        "lead_name": "Ada Lovelace",
        "company_name": "Engines",
        "context_source": "default",
        "reconciled": True,
        "as_of": "now",
        "as_of_lsn": "0/1300",
    }
    assert made.fields["created_by"] == "system"
    assert "owner" not in made.fields


def test_of_a_row_that_was_there_before_only_what_is_told_counts() -> None:
    book = Book()
    book.commit(inserted("lead", lead()), record=False)
    book.repair()
    (made,) = book.written
    assert made.change_key == "w/1/backfill/public.lead/7/lead_created/0"
    assert made.fields["metadata"]["values"]["status"] == "1. lead generated"
    assert story(book) == []
    book.commit(updated("lead", lead(), status="2"), record=False)
    assert story(book) == [("change", "7", ["status"])]
    before_that = Silence(stretches=[(LSN(0), Place(1, LSN(0x1080)))])
    assert [gap.what for gap in book.breaks(before_that)] == ["change"]
    book.repair()
    assert book.breaks(before_that) == []
