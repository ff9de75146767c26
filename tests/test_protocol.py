import struct
from contextlib import suppress
from datetime import UTC, datetime

import factories  # noqa: F401  # hypothesis runs by its profile
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.protocol import EPOCH, PrimaryKeepalive, XLogData, parse, standby_status_update

XLOG_DATA = bytes.fromhex(
    "77"  # Byte1('w')
    "00000000017fe4b8"  # Int64: the starting point of the WAL data
    "0000000001800000"  # Int64: the current end of WAL on the server
    "000000141dd76001"  # Int64: the server's clock
    "7b7d"  # the data
)

KEEPALIVE = bytes.fromhex(
    "6b"  # Byte1('k')
    "00000016b374d848"  # Int64: the current end of WAL on the server
    "000000141dd76001"  # Int64: the server's clock, microseconds since 2000-01-01
    "01"  # Byte1: reply as soon as possible
)


def test_xlog_data_is_read() -> None:
    message = parse(memoryview(XLOG_DATA))
    assert message == XLogData(LSN(0x17FE4B8), LSN(0x1800000), memoryview(b"{}"))
    assert isinstance(message.wal_start, LSN)
    message = parse(memoryview(XLOG_DATA[:25]))
    assert isinstance(message, XLogData)
    assert bytes(message.payload) == b""


def test_a_keepalive_is_read() -> None:
    sent_at = datetime(2000, 1, 2, 0, 0, 0, 1, tzinfo=UTC)
    assert parse(memoryview(KEEPALIVE)) == PrimaryKeepalive(LSN(0x16_B374D848), sent_at, reply_requested=True)
    assert parse(memoryview(KEEPALIVE[:-1] + b"\0")) == PrimaryKeepalive(LSN(0x16_B374D848), sent_at, False)


def test_a_standby_status_update_is_laid_out_as_the_manual_says() -> None:
    assert standby_status_update(
        written=LSN(3), flushed=LSN(2), applied=LSN(1), at=datetime(2000, 1, 1, 0, 0, 1, tzinfo=UTC)
    ) == bytes.fromhex(
        "72"  # Byte1('r')
        "0000000000000003"  # Int64: the byte after the last one received and written
        "0000000000000002"  # Int64: the byte after the last one flushed
        "0000000000000001"  # Int64: the byte after the last one applied
        "00000000000f4240"  # Int64: our clock
        "00"  # Byte1: no reply wanted
    )


def test_what_is_not_told_is_unknown_to_the_server() -> None:
    update = standby_status_update(written=LSN(5), at=EPOCH, reply_requested=True)
    assert update == b"r" + struct.pack(">4q", 5, 0, 0, 0) + b"\x01"


def test_positions_use_all_64_bits() -> None:
    last = LSN(2**64 - 1)
    assert parse(memoryview(b"w" + b"\xff" * 16 + b"\0" * 8)) == XLogData(last, last, memoryview(b""))
    assert standby_status_update(written=last, at=EPOCH)[1:9] == b"\xff" * 8


@pytest.mark.parametrize("message", [XLOG_DATA[:25], KEEPALIVE])
def test_a_message_that_is_cut_short_is_unreadable(message: bytes) -> None:
    for length in range(len(message)):
        with pytest.raises(MessageUnreadableError):
            parse(memoryview(message[:length]))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(MessageUnreadableError, match="unknown kind of replication message: b's'"):
        parse(memoryview(b"s" + b"\0" * 30))


def test_a_clock_beyond_the_calendar_is_unreadable() -> None:
    with pytest.raises(MessageUnreadableError, match="calendar"):
        parse(memoryview(b"k" + b"\0" * 8 + b"\x7f" + b"\xff" * 7 + b"\0"))


@given(
    st.one_of(
        st.binary(max_size=40),
        st.builds(bytes.__add__, st.sampled_from([b"w", b"k"]), st.binary(max_size=30)),
        st.builds(bytes.__add__, st.just(b"k"), st.binary(min_size=17, max_size=17)),
    )
)
def test_arbitrary_bytes_are_read_or_unreadable_and_nothing_else(data: bytes) -> None:
    with suppress(MessageUnreadableError):
        parse(memoryview(data))
