"""LSN: a position in the write-ahead log."""

from __future__ import annotations

from typing import Final, Self

_CHARACTERS: Final = "0123456789ABCDEFabcdef/"


class LSN(int):
    """A byte position in the WAL, written as Postgres writes pg_lsn: two hexadecimal halves, `0/17FE4B8`.

    0 means "unknown" in the replication protocol.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `0/17FE4B8`. ValueError when it isn't one."""
        high, separator, low = text.partition("/")
        # int() would also read signs, underscores, spaces, 0x and the digits of other scripts.
        if not separator or text.strip(_CHARACTERS) or not (0 < len(high) < 9 and 0 < len(low) < 9):
            raise ValueError(f"not an LSN: {text!r}")
        return cls(int(high, 16) << 32 | int(low, 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"LSN({str(self)!r})"


INVALID = LSN(0)
