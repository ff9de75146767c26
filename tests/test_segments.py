"""Recordings are read: each commit once, what is whole of what is damaged, and what is missing is named."""

from __future__ import annotations

import gzip
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import zstandard
from factories import rules

from cdc_worker import recording
from cdc_worker.errors import RecordingUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.recording import Frame
from cdc_worker.rules import Rules
from cdc_worker.segments import Missing, Recorded, Source

CLUSTER = "75"

TABLES = """
[tables.lead]
key = ["lead_id"]
[[tables.lead.rules]]
on = "insert"
type = "lead_created"
description = "{new.lead_id}"
[tables.customer]
key = ["customer_uid"]
[[tables.customer.rules]]
on = "insert"
type = "customer_created"
description = "{new.customer_uid}"
"""

RULES = rules(TABLES)

compress = zstandard.ZstdCompressor(level=1, write_checksum=True).compress


def begin(end: int) -> dict[str, Any]:
    return {"action": "B", "xid": 7, "timestamp": at(end), "lsn": lsn(end - 8), "nextlsn": lsn(end)}


def at(end: int) -> str:
    return f"2026-01-01 {end // 3600 % 24:02}:{end // 60 % 60:02}:{end % 60:02}+00"


def lsn(position: int) -> str:
    return str(LSN(position))


def change(number: int, table: str = "lead", **more: Any) -> dict[str, Any]:
    key = {"customer": "customer_uid"}.get(table, "lead_id")
    columns = [{"name": key, "typeoid": 23, "value": number}]
    return {"action": "I", "schema": "public", "table": table, "columns": columns} | more


def transaction(end: int, *changes: int | Mapping[str, Any], without: Container[str] = ()) -> list[bytes]:
    """The lines of a commit with this end; a number is that of a lead."""
    of = [change(one) if isinstance(one, int) else one for one in changes or (end,)]
    lines = [begin(end), *of, begin(end) | {"action": "C"}]
    return [msgspec.json.encode({key: of for key, of in line.items() if key not in without}) for line in lines]


def header(after: int, until: int, *, within: bool = False, **more: Any) -> bytes:
    named = Frame(
        worker="crm",
        system_identifier=CLUSTER,
        database="crm",
        after=lsn(after),
        until=lsn(until),
        within=within,
        tables=["public.customer", "public.lead"],
    )
    return recording.frame(msgspec.structs.replace(named, **more))


def text(lines: Sequence[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def frame(after: int, until: int, *lines: bytes, within: bool = False, **more: Any) -> bytes:
    return compress(text([header(after, until, within=within, **more), *lines]))


def segment(after: int, *ends: int, each: int = 1) -> bytes:
    """A file whose frames hold so many commits each; a commit inserts the lead of its end's number."""
    frames = []
    for place in range(0, len(ends), each):
        held = ends[place : place + each]
        frames.append(frame(after, held[-1], *(line for end in held for line in transaction(end))))
        after = held[-1]
    return b"".join(frames)


def written(directory: Path, **files: bytes) -> Path:
    for name, data in files.items():
        (directory / f"{name}.jsonl.zst").write_bytes(data)
    return directory


def source(*paths: Path | Literal["-"], rules: Rules = RULES, **more: Any) -> Source:
    options: dict[str, Any] = {"worker": "crm", "cluster": CLUSTER, "database": "crm", "rules": rules}
    return Source(paths, **(options | more))


def numbers(recorded: Sequence[Recorded]) -> list[Any]:
    """The rows that were inserted, in order."""
    return [next(iter((c.new or {}).values())) for one in recorded for c in one.transaction.changes]


def read(*paths: Path | Literal["-"], **more: Any) -> tuple[list[Any], list[Missing]]:
    """The rows that were inserted, and what is missing."""
    of = source(*paths, **more)
    return numbers([*of]), of.missing


def lost(missing: Sequence[Missing]) -> list[tuple[str, str | None, str | None]]:
    return [(Path(one.file).name.split(".")[0], one.after, one.until) for one in missing]


def test_a_segment_is_read_with_its_positions(tmp_path: Path) -> None:
    of = source(written(tmp_path, a=segment(100, 120, 140)))
    first, second = of
    assert (first.system_identifier, first.database, first.exact) == (CLUSTER, "crm", True)
    assert (first.transaction.commit_lsn, first.transaction.end_lsn) == (112, 120)
    assert (first.transaction.first, first.transaction.last) == (True, True)
    assert second.transaction.end_lsn == 140
    assert of.missing == []
    assert (of.transactions, of.repeated, of.others) == (2, 0, [])
    assert of.total == (tmp_path / "a.jsonl.zst").stat().st_size


def test_a_commit_in_several_files_is_read_once(tmp_path: Path) -> None:
    """A process was paused, and went on recording what its successor had recorded."""
    written(tmp_path, a=segment(100, 120, 140, 160), b=segment(120, 140, 160, 180))
    of = source(tmp_path)
    assert numbers([*of]) == [120, 140, 160, 180]
    assert of.repeated == 2
    assert of.missing == []


def test_a_damaged_frame_is_left_out_and_named(tmp_path: Path) -> None:
    frames = [segment(100, 120), segment(120, 140), segment(140, 160)]
    frames[1] = frames[1][:-1] + bytes([frames[1][-1] ^ 1])
    found, missing = read(written(tmp_path, a=b"".join(frames)))
    assert found == [120, 160]
    assert lost(missing) == [("a", lsn(120), lsn(140))]
    assert "checksum" in missing[0].reason


def test_a_gap_between_segments_is_named(tmp_path: Path) -> None:
    found, missing = read(written(tmp_path, a=segment(100, 120), b=segment(140, 160)))
    assert found == [120, 160]
    assert lost(missing) == [("b", lsn(120), lsn(140))]


def test_a_commit_that_is_half_in_one_file_and_whole_in_another_is_read_whole(tmp_path: Path) -> None:
    lines = transaction(140, 1, 2, 3)
    half = frame(100, 120, *transaction(120), *lines[:2])
    found, missing = read(written(tmp_path, a=half, b=frame(120, 140, *lines)))
    assert (found, missing) == ([120, 1, 2, 3], [])


def test_a_commit_goes_on_in_the_frame_that_follows(tmp_path: Path) -> None:
    lines = transaction(140, 1, 2, 3)
    frames = [
        frame(100, 120, *transaction(120), *lines[:2]),
        frame(120, 120, lines[2], within=True),
        frame(120, 160, *lines[3:], *transaction(160), within=True),
    ]
    assert read(written(tmp_path, a=b"".join(frames))) == ([120, 1, 2, 3, 160], [])


def test_plain_and_gzip_are_read_alike(tmp_path: Path) -> None:
    lines = text([*transaction(120), *transaction(140)])
    for name, data in {"a": lines, "b": gzip.compress(lines), "c": compress(lines)}.items():
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == ([120, 140], [])


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hello\n")
    with pytest.raises(RecordingUnreadableError, match="text of another kind"):
        source(tmp_path / "a")
