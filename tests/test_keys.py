from hypothesis import example, given
from hypothesis import strategies as st

from cdc_worker.activities import Clusters, Key, Place, change_key, key_prefix, own_key, parsed_key
from cdc_worker.lsn import LSN
from cdc_worker.rules import subject

TABLE = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
RULE = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1)
LSNS = st.integers(0, 2**64 - 1).map(LSN)
ORDINAL = st.integers(0, 10**10)
CLUSTERS = Clusters("7", ("9", "8"))
ANYWHERE = st.tuples(st.integers(1, CLUSTERS.here), LSNS, ORDINAL).map(lambda at: Place(*at)) | st.just(Place())


@given(TABLE, RULE, LSNS, ORDINAL)
@example("public.a/0/b", "0", LSN(0), 0)
@example("public.backfill/a/b/0", "0", LSN(0), 0)
def test_a_key_of_the_stream_says_what_it_was_made_of(table: str, rule: str, lsn: LSN, ordinal: int) -> None:
    key = change_key(key_prefix("w", "7", lsn), "public", table, ordinal, rule)
    assert parsed_key("w", Clusters("7"), key) == Key("stream", f"public.{table}", rule, Place(1, lsn, ordinal))
    assert parsed_key("w", Clusters("8"), key) == Key("stream", f"public.{table}", rule, Place(0, lsn, ordinal))
    assert parsed_key("other", Clusters("7"), key) is None


@given(TABLE, st.lists(TABLE, min_size=1).map(subject), RULE, ANYWHERE, st.integers(1, 99))
def test_a_key_of_its_own_kind_says_what_it_was_made_of(
    table: str, row: str, rule: str, place: Place, number: int
) -> None:
    read = Key("backfill", f"public.{table}", rule, place._replace(rank=1), row)
    assert parsed_key("w", CLUSTERS, own_key("w", CLUSTERS, read)) == read
    repaired = Key("repair", f"public.{table}", rule, place._replace(rank=2, number=number), row)
    assert parsed_key("w", CLUSTERS, own_key("w", CLUSTERS, repaired)) == repaired
    # As it says on the next one.
    assert parsed_key("w", Clusters("6", ("9", "8", "7")), own_key("w", CLUSTERS, repaired)) == repaired


def test_other_keys_say_nothing() -> None:
    for key in ("", "w", "w/", "w/7", "x/7/0000000000000001/public.lead/0/rule", "w/7/1/public.lead/0/rule"):
        assert parsed_key("w", Clusters("7"), key) is None


def test_what_was_read_stands_after_the_deletion_and_before_what_came_next() -> None:
    deleted = Place(1, LSN(5), 0)
    assert Place() < Place(rank=1) < deleted < deleted._replace(rank=1) < deleted._replace(rank=2, number=1)
    assert deleted._replace(rank=2, number=2) < Place(1, LSN(5), 1) < Place(1, LSN(6), 0)
