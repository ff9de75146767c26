import factories  # noqa: F401  # hypothesis runs by its profile
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_worker.lsn import INVALID, LSN


def test_it_reads_and_prints_as_pg_lsn_does() -> None:
    assert LSN.parse("0/17FE4B8") == 0x17FE4B8
    assert LSN.parse("16/B374D848") == 0x16_B374D848
    assert str(LSN(0x16_B374D848)) == "16/B374D848"
    assert repr(LSN(0x17FE4B8)) == "LSN('0/17FE4B8')"
    assert LSN.parse("a/0000000f") == LSN.parse("A/F")
    assert str(INVALID) == "0/0"


@given(st.integers(0, 2**64 - 1))
def test_every_position_survives_being_printed(position: int) -> None:
    assert LSN.parse(str(LSN(position))) == position
    assert isinstance(LSN.parse(str(LSN(position))), LSN)


def test_positions_are_ordered_by_value_not_by_text() -> None:
    assert LSN.parse("9/0") < LSN.parse("10/0")
    assert LSN.parse("0/FFFFFFFF") < LSN.parse("1/0")


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "0", "0/", "/0", "0/0/0", "0/G", "0\\1", "0/123456789", "123456789/0", "-1/0", "0/-1", "0/+1"),
        *("0x1/0", "0/1_0", " 0/1", "0/1\n", "0 /1", "0/ 1", "\u0660/\u0661", "\uff10/\uff11", "0/17FE4B8\0"),
    ],
)
def test_what_postgres_would_not_print_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an LSN|invalid literal"):
        LSN.parse(text)
