"""Recordings are read: each commit once, what is whole of what is damaged, and what is missing is named."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import msgspec
import pytest
import zstandard
from factories import leadfi, rules
from hypothesis import given
from hypothesis import strategies as st

from cdc_worker import recording, wal2json
from cdc_worker.changes import Assembler, Change, Message, Unread
from cdc_worker.documents import Documents
from cdc_worker.errors import RecordingUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.recording import Frame, Looked
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

RECORDED = TABLES.replace("customer_uid", "id").replace("customer", "keyed")
"""Of what is in `recordings/format*`."""

BARE = ("xid", "timestamp", "lsn", "nextlsn")

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


def by_pgoutput(lines: Sequence[bytes]) -> list[bytes]:
    """The same commit, of which the begin doesn't say yet where it ends."""
    first = json.loads(lines[0])
    return [msgspec.json.encode(first | {"nextlsn": lsn(LSN.parse(first["lsn"]) + 1)}), *lines[1:]]


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
    return [next(iter((c.new or {}).values()), None) for one in recorded for c in one.transaction.changes]


def read(*paths: Path | Literal["-"], **more: Any) -> tuple[list[Any], list[Missing]]:
    """The rows that were inserted, and what is missing."""
    of = source(*paths, **more)
    return numbers([*of]), of.missing


def source_read(*paths: Path) -> list[Missing]:
    return read(*paths)[1]


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


@pytest.mark.parametrize("plain", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("by", [(by_pgoutput, by_pgoutput), (by_pgoutput, list), (list, by_pgoutput)])
def test_a_commit_of_which_a_begin_does_not_say_where_it_ends_is_read_once(
    tmp_path: Path, plain: Sequence[bool], by: Sequence[Callable[[list[bytes]], list[bytes]]]
) -> None:
    """As of a large one that came by pgoutput, also where the slot was wal2json's before."""
    paths = []
    for number, (is_plain, made) in enumerate(zip(plain, by, strict=True)):
        lines = [header(100, 160), *transaction(120), *made(transaction(140, *range(2_000))), *transaction(160)]
        data = text(lines)
        paths.append(tmp_path / f"{number}.jsonl{'' if is_plain else '.zst'}")
        paths[-1].write_bytes(data if is_plain else compress(data))
        os.utime(paths[-1], (number, number))
    of = source(*paths)
    assert numbers([*of]) == [120, *range(2_000), 160]
    assert (of.transactions, of.repeated, of.missing) == (3, 3, [])


def test_a_commit_without_frames_is_read_once_whoever_sent_it(tmp_path: Path) -> None:
    lines = transaction(140, *range(2_000))
    for name, of in {"a": lines, "b": by_pgoutput(lines), "c": lines}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(text(of))
    assert read(tmp_path) == ([*range(2_000)], [])


def test_a_damaged_frame_is_left_out_and_named(tmp_path: Path) -> None:
    frames = [segment(100, 120), segment(120, 140), segment(140, 160)]
    frames[1] = frames[1][:-1] + bytes([frames[1][-1] ^ 1])
    found, missing = read(written(tmp_path, a=b"".join(frames)))
    assert found == [120, 160]
    assert lost(missing) == [("a", lsn(120), lsn(140))]
    assert "checksum" in missing[0].reason


@pytest.mark.parametrize("begins", [100, 120])
def test_of_two_segments_that_have_a_commit_the_one_begun_last_is_read(tmp_path: Path, begins: int) -> None:
    """The first worker was killed before it had told it: what it had looked up is not what was told."""
    earlier = segment(100, 120) + frame(120, 140, *transaction(140, 1), number=1)
    later = frame(begins, 160, *(transaction(120) if begins < 120 else ()), *transaction(140, 2), *transaction(160))
    written(tmp_path, b=earlier, a=later)
    os.utime(tmp_path / "b.jsonl.zst", (1, 1))
    assert read(tmp_path) == ([120, 2, 160], [])
    of = source(tmp_path)
    assert (len([*of]), of.transactions, of.repeated) == (3, 3, 1 + (begins < 120))


def test_a_commit_that_breaks_off_is_read_from_the_segment_that_has_it_whole_alone(tmp_path: Path) -> None:
    lines = transaction(140, *range(2_500))
    written(tmp_path, a=segment(100, 120) + frame(120, 120, *lines[:-1], number=1), b=frame(120, 140, *lines))
    assert read(tmp_path) == ([120, *range(2_500)], [])
    damaged = frame(120, 140, *lines)
    written(tmp_path, b=damaged[:-1] + bytes([damaged[-1] ^ 1]))
    assert read(tmp_path)[0] == [120, *range(2_000)]


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
        frame(120, 120, lines[2], within=True, number=1),
        frame(120, 160, *lines[3:], *transaction(160), within=True, number=2),
    ]
    assert read(written(tmp_path, a=b"".join(frames))) == ([120, 1, 2, 3, 160], [])


def test_a_commit_is_given_up_where_a_frame_of_it_is_gone(tmp_path: Path) -> None:
    lines = transaction(140, 1, 2, 3)
    frames = [
        frame(100, 120, *transaction(120), *lines[:2]),
        frame(120, 120, lines[2], within=True, number=1),
        frame(120, 160, *lines[3:], *transaction(160), within=True, number=2),
    ]
    found, (missing,) = read(written(tmp_path, a=frames[0] + frames[2]))
    assert (found, missing.after, missing.until) == ([120, 160], "0/84", "0/8C")


def test_where_a_commit_ends_is_not_said_to_be_known_if_it_breaks_off_and_came_by_pgoutput(tmp_path: Path) -> None:
    lines = by_pgoutput(transaction(140, 1, 2, 3))
    found, (missing,) = read(written(tmp_path, a=frame(100, 120, *transaction(120), *lines[:2])))
    assert (found, missing.after, missing.until) == ([120], "0/84", None)


def test_a_file_may_be_cut_anywhere_in_what_nobody_asked_for(tmp_path: Path) -> None:
    lines = text([*transaction(120), *transaction(140)])
    for size in range(len(lines)):
        (tmp_path / "a").write_bytes(lines[:size])
        assert read(tmp_path / "a", since=LSN(200))[0] == []


@pytest.mark.parametrize("since", [0, 133, 152, 173])
def test_wherever_a_plain_segment_is_cut_what_was_asked_for_is_read_or_named(tmp_path: Path, since: int) -> None:
    """Also within a commit that nobody wants. Between two nobody can see that there were others."""
    frames = [
        [header(100, 160), *transaction(120, 1, 2, 3), *transaction(140, *range(12)), *transaction(160, 4, 5)],
        [header(160, 200, number=1), *transaction(180, 6), *transaction(200, 7, 8)],
    ]
    whole_lines = [line for held in frames for line in held]
    ends = [*accumulate(len(line) + 1 for line in whole_lines)]
    between = {end for line, end in zip(whole_lines, ends, strict=True) if b'"action":"R"' in line or b'"C"' in line}
    held_by = {120: ends[0], 140: ends[0], 160: ends[0], 180: len(text(frames[0])) + len(frames[1][0])}
    held_by[200] = held_by[180]
    path = tmp_path / "a.jsonl"
    for size in range(since % 3, ends[-1], 3):
        path.write_bytes(text(whole_lines)[:size])
        of = source(path, since=LSN(since))
        known = whole([*of])
        told = [end for end, header_end in held_by.items() if end - 8 >= since and size > header_end]
        unnamed = [end for end in told if end not in known and not is_named(end, of.missing)]
        assert unnamed == [] or {size, size + 1} & between, size


def test_plain_and_gzip_are_read_alike(tmp_path: Path) -> None:
    lines = text([*transaction(120), *transaction(140)])
    for name, data in {"a": lines, "b": gzip.compress(lines), "c": compress(lines)}.items():
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == ([120, 140], [])


@dataclass(frozen=True)
class Segment:
    """A file of frames, and which commits are, at least in part, in each."""

    frames: list[bytes]
    commits: list[set[int]]
    rows: dict[int, list[int]]

    @property
    def data(self) -> bytes:
        return b"".join(self.frames)


def framed(
    commits: Sequence[tuple[int, Sequence[int]]], cuts: Container[int], after: int = 0, *, pgoutput: bool = False
) -> Segment:
    """Commits, by their ends, in frames that are cut after lines with these numbers."""
    made_by = by_pgoutput if pgoutput else list[bytes]
    made = Segment([], [], {end: [*rows] for end, rows in commits})
    held: list[bytes] = []
    of: set[int] = set()
    within, until = False, after
    lines = [(end, line) for end, rows in commits for line in made_by(transaction(end, *rows))]
    for number, (end, line) in enumerate(lines):
        held.append(line)
        of.add(end)
        ended = line.startswith(b'{"action":"C"')
        until = end if ended else until
        if number in cuts or number == len(lines) - 1:
            made.frames.append(frame(after, until, *held, within=within, number=len(made.frames)))
            made.commits.append(of)
            held, of, within, after = [], set(), not ended, until
    return made


@st.composite
def segments(draw: st.DrawFn, first: int = 0) -> Segment:
    """Of some commits from one on, of which each is the same wherever it is."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=8)) if not first else [1 + n % 4 for n in range(8)]
    commits = [(20 * (n + 1), [100 * n + k for k in range(size)]) for n, size in enumerate(sizes)]
    begins = draw(st.integers(0, first))
    commits = commits[begins : begins + draw(st.integers(1, 8))] if first else commits
    return framed(commits, draw(st.sets(st.integers(0, 40), max_size=12)), 20 * begins, pgoutput=draw(st.booleans()))


def whole(recorded: Sequence[Recorded]) -> dict[int, list[Any]]:
    """The rows of commits that were read to their end."""
    found: dict[int, list[Any]] = {}
    for one in recorded:
        if one.transaction.first:
            found[one.transaction.end_lsn] = []
        found[one.transaction.end_lsn] += numbers([one])
    return {
        end: rows
        for end, rows in found.items()
        if any(r.transaction.last for r in recorded if r.transaction.end_lsn == end)
    }


def is_named(end: int, missing: Sequence[Missing]) -> bool:
    return any(
        (one.after is None or LSN.parse(one.after) < end) and (one.until is None or end <= LSN.parse(one.until))
        for one in missing
    )


def judge(segment: Segment, damaged: set[int], directory: Path, *, named: bool = True) -> None:
    """What is in none of the `damaged` frames is read, and what is not is named."""
    of = source(directory)
    recorded = [*of]
    found = whole(recorded)
    assert all(segment.rows[one.transaction.end_lsn] for one in recorded)
    assert {end: segment.rows[end] for end in found} == found
    assert all(set(numbers([one])) <= {*segment.rows[one.transaction.end_lsn]} for one in recorded)
    touched = {end for number in damaged for end in segment.commits[number]}
    assert set(segment.rows) - touched <= set(found)
    if named:
        assert [end for end in segment.rows if end not in found and not is_named(end, of.missing)] == []
    for one in of.missing:
        assert one.file.startswith(str(directory))


@given(segments(), st.data())
def test_whatever_byte_is_flipped_the_rest_is_read_and_what_is_missing_is_named(
    tmp_path_factory: pytest.TempPathFactory, segment: Segment, data: st.DataObject
) -> None:
    number = data.draw(st.integers(0, len(segment.frames) - 1))
    of = segment.frames[number]
    place = data.draw(st.integers(0, len(of) - 1))
    flipped = bytes([of[place] ^ data.draw(st.integers(1, 255))])
    frames = [*segment.frames[:number], of[:place] + flipped + of[place + 1 :], *segment.frames[number + 1 :]]
    directory = written(tmp_path_factory.mktemp("flipped"), a=b"".join(frames))
    judge(segment, {number}, directory)


@given(segments(), st.data())
def test_wherever_a_stretch_is_cut_out_the_rest_is_read_and_what_is_missing_is_named(
    tmp_path_factory: pytest.TempPathFactory, segment: Segment, data: st.DataObject
) -> None:
    whole = segment.data
    first = data.draw(st.integers(0, len(whole) - 1))
    last = data.draw(st.integers(first, len(whole) - 1) | st.just(len(whole) - 1))
    ends = [*accumulate(map(len, segment.frames))]
    starts = [0, *ends[:-1]]
    damaged = {n for n, (start, end) in enumerate(zip(starts, ends, strict=True)) if start <= last and first < end}
    # Between two frames nobody sees that something was there, unless it goes on elsewhere.
    clean = first in starts and (last + 1) in ends
    directory = written(tmp_path_factory.mktemp("cut"), a=whole[:first] + whole[last + 1 :])
    judge(segment, damaged, directory, named=not clean)


def test_what_is_left_of_the_beginning_of_a_file_hides_nothing_behind_it(tmp_path: Path) -> None:
    made = framed([(20, [0]), (40, [100]), (60, [200, 201]), (80, [300]), (100, [400])], {0, 1, 10})
    start, end = len(made.frames[0]), len(made.data) - len(made.frames[-1])
    for first in (4, 5, 9, 20, start - 1):
        for last in range(start, end):
            found, missing = read(written(tmp_path, a=made.data[:first] + made.data[last:]))
            assert (found[-1:], bool(missing)) == ([400], True), (first, last)


def test_a_first_byte_that_is_a_brace_makes_no_text_of_a_segment(tmp_path: Path) -> None:
    made = framed([(20, [0]), (40, [100])], {2})
    found, (missing,) = read(written(tmp_path, a=b"{" + made.data[1:]))
    assert (found, missing.until) == ([100], "0/14")


# Several files


@given(st.lists(st.tuples(segments(first=7), st.integers(0, 3)), min_size=1, max_size=3), st.data())
def test_each_commit_is_read_once_from_whichever_file_has_it_whole(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[Segment, int]], data: st.DataObject
) -> None:
    """Of each file perhaps a frame is flipped, or torn; the same commits are the same in all files.

    Nobody knows how far the last frame of a file went: it is taken to end where the file that goes on begins.
    """
    directory = tmp_path_factory.mktemp("several")
    read: set[int] = set()
    rows: dict[int, list[int]] = {}
    last: set[int] = set()
    for number, (segment, damage) in enumerate(files):
        frames, touched = [*segment.frames], set[int]()
        rows |= segment.rows
        if damage == 0:
            place = data.draw(st.integers(0, len(frames) - 1))
            frames[place] = frames[place][:-1] + bytes([frames[place][-1] ^ 1])
            touched = segment.commits[place]
            last |= touched if place == len(frames) - 1 else set()
        elif damage == 1:
            frames[-1] = frames[-1][: data.draw(st.integers(1, len(frames[-1]) - 1))]
            touched = segment.commits[-1]
            last |= touched
        read |= segment.rows.keys() - touched
        written(directory, **{f"{number}": b"".join(frames)})
    of = source(directory)
    recorded = [*of]
    found = whole(recorded)
    assert {*found} >= read
    assert {end: rows[end] for end in found} == found
    ends = [one.transaction.end_lsn for one in recorded if one.transaction.last]
    assert len(ends) == len({*ends})
    assert [end for end in rows if end not in found and not is_named(end, of.missing) and end not in last] == []


def test_files_are_read_in_the_order_of_their_commits_whatever_their_names(tmp_path: Path) -> None:
    written(tmp_path, c=segment(100, 120), a=segment(140, 160), b=segment(120, 140))
    assert read(tmp_path) == ([120, 140, 160], [])
    paths = [tmp_path / f"{name}.jsonl.zst" for name in "abc"]
    assert read(*paths) == ([120, 140, 160], [])
    assert read(*paths, tmp_path, paths[0]) == ([120, 140, 160], []), "each once"


def test_a_file_without_frames_comes_after_those_that_have_them(tmp_path: Path) -> None:
    written(tmp_path, z=segment(100, 120))
    (tmp_path / "a.jsonl").write_bytes(text([*transaction(120), *transaction(140)]))
    of = source(tmp_path)
    assert numbers([*of]) == [120, 140]
    assert (of.repeated, of.missing) == (1, [])


def test_commits_between_those_of_a_file_without_frames_are_read_from_another(tmp_path: Path) -> None:
    """Nobody says that such a file is without a gap: two may have been put together."""
    (tmp_path / "a.jsonl").write_bytes(text([*transaction(120), *transaction(160)]))
    (tmp_path / "b.jsonl").write_bytes(text([*transaction(120), *transaction(140), *transaction(160)]))
    assert read(tmp_path) == ([120, 160, 140], [])


def test_files_with_different_tables_over_the_same_commits_are_both_read(tmp_path: Path) -> None:
    customer = change(7, "customer")
    (tmp_path / "leads.jsonl").write_bytes(text([*transaction(120, 1), *transaction(140, 2)]))
    (tmp_path / "customers.jsonl").write_bytes(text([*transaction(120, customer), *transaction(140, customer, 2)]))
    assert sorted(read(tmp_path)[0]) == [1, 2, 7, 7]


def test_a_table_that_only_one_of_two_segments_captured_is_read_from_that_one(tmp_path: Path) -> None:
    """The profile has got a table and lost another, and the segments overlap."""
    both = transaction(120, 1, change(7, "customer"), 2)
    leads = frame(100, 120, both[0], both[1], both[3], both[4], tables=["public.lead", "public.contact"])
    directory = written(tmp_path, a=leads, b=frame(100, 120, *both, tables=["public.lead", "public.customer"]))
    of = source(directory, rules=leadfi())
    first, second = of
    assert (numbers([first]), numbers([second])) == ([1, 2], [7])
    assert (second.transaction.index, second.transaction.first, second.transaction.last) == (0, True, True)


def test_a_repetition_in_one_file_is_read_once(tmp_path: Path) -> None:
    """pg_recvlogical was started again, and appended what it had not confirmed; once it was killed in a line."""
    first, second, third = (transaction(end, end, end + 1) for end in (120, 140, 160))
    cut = [*second[:2], second[2][:30] + first[0]]
    (tmp_path / "a").write_bytes(text([*first, *second, *first, *second, *third]))
    assert read(tmp_path / "a") == ([120, 121, 140, 141, 160, 161], [])
    (tmp_path / "b").write_bytes(text([*first, *cut, *first[1:], *second, *third]))
    found, missing = read(tmp_path / "b")
    assert found == [120, 121, 140, 141, 160, 161]
    assert missing == []


def test_files_of_other_workers_are_left_out_and_named(tmp_path: Path) -> None:
    written(tmp_path, a=segment(100, 120), b=frame(100, 140, *transaction(140), worker="erp"))
    (tmp_path / "c.jsonl").write_bytes(zstandard.decompress((tmp_path / "b.jsonl.zst").read_bytes()))
    of = source(tmp_path)
    assert numbers([*of]) == [120]
    assert [Path(name).name for name in of.others] == ["b.jsonl.zst", "c.jsonl"]
    assert of.missing == []


def test_clusters_are_kept_apart(tmp_path: Path) -> None:
    written(tmp_path, a=segment(100, 120), b=frame(300, 120, *transaction(120), system_identifier="76"))
    recorded = [*source(tmp_path)]
    assert [one.system_identifier for one in recorded] == ["75", "76"]


# What a kill leaves


def torn(directory: Path) -> Path:
    """A file whose last frame was being written."""
    return written(directory, **{"crm-0000000000000064-01234567": segment(100, 120) + segment(120, 140)[:-9]})


def test_a_torn_last_frame_is_missing_if_the_checkpoint_has_passed_it(tmp_path: Path) -> None:
    assert read(torn(tmp_path), checkpoint=LSN(120)) == ([120], [])
    assert read(tmp_path, checkpoint=LSN(120), strict=True) == ([120], [])
    for checkpoint, until in ((LSN(140), lsn(140)), (None, None)):
        found, missing = read(tmp_path, checkpoint=checkpoint)
        assert (found, lost(missing)) == ([120], [("crm-0000000000000064-01234567", lsn(120), until)])
        assert "is cut" in missing[0].reason


def test_a_torn_last_frame_is_not_missing_if_another_file_goes_on(tmp_path: Path) -> None:
    written(torn(tmp_path), b=segment(120, 160))
    assert read(tmp_path) == ([120, 160], [])
    assert read(tmp_path, strict=True) == ([120, 160], [])


def test_a_file_that_has_nothing_yet_lacks_nothing(tmp_path: Path) -> None:
    written(tmp_path, **{"crm-0000000000000078-01234567": b""}, a=segment(100, 120))
    assert read(tmp_path) == ([120], [])


def test_a_file_whose_first_frame_is_torn_is_named_with_where_it_begins(tmp_path: Path) -> None:
    written(tmp_path, **{"crm-0000000000000078-01234567": segment(120, 140)[:-3]}, a=segment(100, 120))
    found, missing = read(tmp_path)
    assert (found, lost(missing)) == ([120], [("crm-0000000000000078-01234567", lsn(120), None)])


# Strict


def test_strict_stops_at_what_is_missing(tmp_path: Path) -> None:
    frames = [segment(100, 120), segment(120, 140), segment(140, 160)]
    for number, data in enumerate((frames[0] + frames[2], b"".join(frames)[:-2], frames[0] + b"\0" * 9 + frames[2])):
        directory = tmp_path / str(number)
        directory.mkdir()
        of, found = source(written(directory, a=data), strict=True), list[Recorded]()
        with pytest.raises(RecordingUnreadableError, match="isn't whole"):
            found.extend(of)
        assert set(numbers(found)) <= {120, 140, 160}


def test_strict_stops_before_a_gap(tmp_path: Path) -> None:
    of, found = source(written(tmp_path, a=segment(100, 120), b=segment(140, 160)), strict=True), list[Recorded]()
    with pytest.raises(RecordingUnreadableError, match=r"b\.jsonl\.zst, from 0/78 to 0/8C: .* goes on$"):
        found.extend(of)
    assert numbers(found) == [120]


# A range


def test_a_range_is_one_of_commits(tmp_path: Path) -> None:
    written(tmp_path, a=segment(100, *range(120, 220, 20), each=2))
    moment = datetime(2026, 1, 1, 0, 2, 40, tzinfo=UTC)  # of the commit that ends at 160
    assert read(tmp_path, since=LSN(152)) == ([160, 180, 200], [])
    assert read(tmp_path, since=LSN(153), until=LSN(192)) == ([180], [])
    assert read(tmp_path, until=LSN(193)) == ([120, 140, 160, 180, 200], [])
    assert read(tmp_path, since=moment) == ([160, 180, 200], [])
    assert read(tmp_path, until=moment) == ([120, 140], [])


@given(segments(), st.integers(0, 180), st.integers(0, 180))
def test_a_range_is_read_however_frames_are_cut(
    tmp_path_factory: pytest.TempPathFactory, segment: Segment, since: int, until: int
) -> None:
    directory = written(tmp_path_factory.mktemp("range"), a=segment.data)
    of = source(directory, since=LSN(since), until=LSN(until))
    wanted = {end: rows for end, rows in segment.rows.items() if since <= end - 8 < until}
    assert (whole([*of]), of.missing) == (wanted, [])


def test_what_is_missing_outside_the_range_is_not_named(tmp_path: Path) -> None:
    written(tmp_path, a=segment(100, 120), b=segment(140, 160, 180))
    after = datetime(2026, 1, 1, 0, 2, 50, tzinfo=UTC)
    for range_ in ({"since": LSN(140)}, {"until": LSN(120)}, {"since": after}):
        assert read(tmp_path, **range_)[1] == [], range_
    assert read(tmp_path, since=LSN(139))[1] != []


# Other ways to record


def test_lines_without_lsn_or_time_are_read_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(text([*transaction(120, without=BARE), *transaction(140, without=BARE)]))
    of = source(tmp_path / "a")
    first, second = of
    assert (first.has_lsn, first.has_time, first.exact) == (False, False, False)
    assert first.transaction.end_lsn <= second.transaction.commit_lsn
    assert numbers([first, second]) == [120, 140]
    (tmp_path / "b").write_bytes(text(transaction(120, without=["timestamp"])))
    (only,) = source(tmp_path / "b")
    assert (only.has_lsn, only.has_time, only.transaction.end_lsn) == (True, False, 120)
    (tmp_path / "c").write_bytes(text(transaction(120, without=["lsn"])))
    (only,) = source(tmp_path / "c")
    assert (only.has_lsn, only.has_time, str(only.transaction.committed_at)) == (False, True, at(120) + ":00")


def test_a_range_of_what_is_not_told_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(text(transaction(120, without=BARE)))
    with pytest.raises(RecordingUnreadableError, match="without LSN"):
        read(tmp_path / "a", since=LSN(1))
    with pytest.raises(RecordingUnreadableError, match="without time"):
        read(tmp_path / "a", until=datetime.now(UTC))


RECORDINGS = Path(__file__).parent / "recordings"

FORMAT_1 = ("format1.jsonl", "format1_lsn.jsonl", "format1_pretty.json", "format1_chunks.jsonl")


def told(name: str) -> list[tuple[list[Change], list[tuple[int, Message]]]]:
    """The transactions of a recording in which something was captured."""
    of = source(RECORDINGS / name, rules=rules(RECORDED))
    found = [(one.transaction.changes, one.transaction.messages) for one in of]
    assert of.missing == []
    return found


@pytest.mark.parametrize("name", FORMAT_1)
def test_format_1_says_the_same_as_format_2_but_for_truncates(name: str) -> None:
    """All four were recorded beside it: by default, with `include-lsn`, `pretty-print` and `write-in-chunks`."""
    assert told(name) == [pair for pair in told("format2.jsonl") if pair[0][0].operation != "truncate"]


def test_format_2_without_options_says_the_same() -> None:
    assert told("format2_bare.jsonl") == told("format2.jsonl")


# What goes with changes


DEALS = rules("""
[tables.deal]
key = ["id"]
[[tables.deal.rules]]
on = "update"
changed = ["region"]
type = "deal_moved"
description = "{new.id}"
""")


def deal(action: str, number: int, year: int, region: str = "n") -> dict[str, Any]:
    columns = [{"name": "id", "typeoid": 23, "value": number}, {"name": "region", "typeoid": 25, "value": region}]
    name = "identity" if action == "D" else "columns"
    return {"action": action, "schema": "public", "table": f"deal_{year}", name: columns}


def test_a_row_that_moves_between_partitions_is_one_change(tmp_path: Path) -> None:
    lines = transaction(140, deal("D", 1, 2025), deal("I", 1, 2026, "s"))
    parts = [recording.partition(("public", f"deal_{year}"), ("public", "deal")) for year in (2025, 2026)]
    own = frame(100, 140, lines[0], parts[0], lines[1], parts[1], *lines[2:], tables=["public.deal"])
    (tmp_path / "own").write_bytes(own)
    (tmp_path / "foreign").write_bytes(text(lines))
    roots = {("public", f"deal_{year}"): ("public", "deal") for year in (2025, 2026)}
    for name, more in {"own": {}, "foreign": {"roots": lambda change, _: roots[change.schema, change.table]}}.items():
        (recorded,) = source(tmp_path / name, rules=DEALS, **more)
        (moved,) = recorded.transaction.changes
        assert (moved.operation, moved.table, moved.partition) == ("update", "deal", ("public", "deal_2025"))
        assert moved.changed == ("region",)
    assert [*source(tmp_path / "foreign", rules=DEALS)] == []
    (recorded,) = source(tmp_path / "own", rules=DEALS, keys={})
    assert [change.operation for change in recorded.transaction.changes] == ["delete", "insert"]


def found(number: int, name: str, row: int | None) -> bytes:
    line = {"action": "L", "change": number, "lookup": name, "schema": "public", "table": "owner"}
    where = [{"name": "id", "value": 1}]
    return msgspec.json.encode(
        line | {"where": where, "columns": None if row is None else [{"name": "id", "value": row}]}
    )


def test_what_was_looked_up_goes_with_its_change(tmp_path: Path) -> None:
    lines = transaction(140, 1, 2)
    held = frame(100, 140, lines[0], found(0, "owner", 7), found(1, "owner", None), *lines[1:])
    (recorded,) = source(written(tmp_path, a=held))
    assert recorded.transaction.answers == {(0, "owner"): {"id": 7}, (1, "owner"): None}
    assert recorded.looked == [
        Looked(0, "owner", ("public", "owner"), {"id": 1}, {"id": 7}),
        Looked(1, "owner", ("public", "owner"), {"id": 1}, None),
    ]


def test_what_was_looked_up_keeps_its_change_where_others_are_left_out(tmp_path: Path) -> None:
    """A table was captured that the profile has no longer."""
    lines = transaction(140, change(7, "customer"), 1, change(8, "customer"), 2)
    answers = [found(number, "owner", number + 10) for number in range(4)]
    leads = rules(TABLES.partition("[tables.customer]")[0])
    (recorded,) = source(written(tmp_path, a=frame(100, 140, lines[0], *answers, *lines[1:])), rules=leads)
    assert numbers([recorded]) == [1, 2]
    assert recorded.transaction.answers == {(0, "owner"): {"id": 11}, (1, "owner"): {"id": 13}}


def test_slices_have_what_was_looked_up_for_them(tmp_path: Path) -> None:
    most = Assembler.MAX_CHANGES
    lines = transaction(140, *range(2 * most))
    answers = [found(number, "owner", number) for number in range(2 * most)]
    first = frame(100, 100, lines[0], *answers[:most], *lines[1 : most + 1])
    second = frame(100, 140, *answers[most:], *lines[most + 1 :], within=True, number=1)
    recorded = [*source(written(tmp_path, a=first + second))]
    assert [(one.transaction.first, one.transaction.last) for one in recorded] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert [one.transaction.index for one in recorded] == [0, most, 2 * most]
    assert [sorted(number for number, _ in one.transaction.answers) for one in recorded] == [
        [*range(most)],
        [*range(most, 2 * most)],
        [],
    ]


def test_messages_keep_their_place_where_changes_are_left_out(tmp_path: Path) -> None:
    said = {"action": "M", "transactional": True, "prefix": "cdc_worker.context", "content": "{}"}
    lines = transaction(140, change(7, "customer"), said, 1, change(8, "customer"), said, 2)
    leads = rules(TABLES.partition("[tables.customer]")[0])
    (recorded,) = source(written(tmp_path, a=frame(100, 140, *lines)), rules=leads)
    assert [place for place, _ in recorded.transaction.messages] == [0, 1]
    assert [wal2json.decode(cast(bytes, one)) for one in recorded.transaction.payloads] == recorded.transaction.changes


def test_which_columns_are_masked_goes_with_a_transaction(tmp_path: Path) -> None:
    held = frame(100, 120, *transaction(120), masked={"public.lead": ["email"]})
    (recorded,) = source(written(tmp_path, a=held))
    assert recorded.transaction.masked == {("public", "lead"): frozenset({"email"})}


def test_a_message_that_could_not_be_read_has_its_place(tmp_path: Path) -> None:
    unread = Unread(
        *("unreadable", "public", "lead", None, None), position=LSN(130), reason="?", met_at=datetime.now(UTC), raw=b"x"
    )
    lines = transaction(140, 1, 2)
    held = frame(100, 140, *lines[:2], recording.unread(unread, raw=True), *lines[2:])
    (recorded,) = source(written(tmp_path, a=held))
    first, between, last = recorded.transaction.changes
    assert (
        numbers([recorded._replace(transaction=msgspec.structs.replace(recorded.transaction, changes=[first, last]))]),
        between,
    ) == ([1, 2], unread)


# Format 1


def document(*changes: dict[str, Any], **more: Any) -> bytes:
    return msgspec.json.encode({**more, "change": [{"schema": "public", "table": "lead", **one} for one in changes]})


def updated(new: Sequence[Any], old: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"keynames": [*old], "keyvalues": [*old.values()]}
    return {"kind": "update", "columnnames": ["lead_id", "a", "b"], "columnvalues": new, "oldkeys": keys}


def old_rows(*documents: bytes) -> list[Any]:
    of = Documents()
    changes = [of.message(raw) for one in documents for raw in of.read(one)[1]]
    return [one.old for one in changes if isinstance(one, Change)]


def test_an_old_row_of_format_1_has_nulls_only_where_that_is_certain() -> None:
    first = document(updated([1, "x", "y"], {"lead_id": 1, "b": "z"}))
    assert old_rows(first) == [{"lead_id": 1, "b": "z"}], "a key of these columns would look the same"
    assert old_rows(first, document(updated([2, "x", "y"], {"lead_id": 2, "a": "z"}))) == [
        {"lead_id": 1, "b": "z"},
        {"lead_id": 2, "a": "z", "b": None},
    ]
    assert old_rows(document(updated([1, "x", None], {"lead_id": 1, "b": "z"}))) == [
        {"lead_id": 1, "a": None, "b": "z"}
    ], "no key has a column that can be NULL"


def test_a_damaged_document_is_left_out_and_named(tmp_path: Path) -> None:
    whole = [
        document({"kind": "insert", "columnnames": ["lead_id"], "columnvalues": [n]}, nextlsn=lsn(n))
        for n in (120, 140, 160)
    ]
    (tmp_path / "a").write_bytes(text([whole[0], whole[1][:-9], whole[2], whole[2]]))
    of = source(tmp_path / "a")
    assert numbers([*of]) == [120, 160]
    assert lost(of.missing) == [("a", lsn(120), None)]
    assert "before line 3" in of.missing[0].reason
    assert of.repeated == 1
    pretty = json.dumps(json.loads(whole[0]), indent=1).encode()
    (tmp_path / "b").write_bytes(pretty + b"\n" + pretty[: len(pretty) // 2])
    assert [one.reason for one in source_read(tmp_path / "b")] == ["it ends within a document, at line 23"]


# Files


def test_standard_input_is_read_as_it_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = text([*transaction(120), *transaction(140)])
    for data in (lines, gzip.compress(lines), compress(lines), segment(100, 120, 140)):
        descriptor, writer = os.pipe()
        with os.fdopen(descriptor, "rb") as reader:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=reader))
            of = source("-")
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(data)
            assert (numbers([*of]), of.missing, of.total) == ([120, 140], [], None)


def test_a_pipe_is_read_as_a_file_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        pool.submit((tmp_path / "pipe").write_bytes, segment(100, 120, 140))
        of = source(tmp_path / "pipe")
        assert (numbers([*of]), of.missing, of.total) == ([120, 140], [], None)


def test_all_bytes_are_told_of_once(tmp_path: Path) -> None:
    lines = text([line for end in range(20, 20_000, 20) for line in transaction(end)])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.jsonl").write_bytes(lines)
    (tmp_path / "c.jsonl.zst").write_bytes(segment(0, *range(20, 2_000, 20)) + b"\0" * 99)
    advanced: list[int] = []
    of = source(tmp_path, advance=advanced.append)
    for _ in of:
        pass
    assert sum(advanced) == of.total == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"name,date\nAda,2026-01-01\n", "text of another kind"),
        (b"\x7fELF\x02\x01\x01\0\0\0\xff", "binary data of another kind"),
        (b"BEGIN 123\ntable public.lead: INSERT:", "what test_decoding writes"),
        (b"PGDMP\x01\x0e", "an archive of pg_dump"),
        (b"\xfd7zXZ\0\0", "compressed with xz"),
        (gzip.compress(b"SELECT 1;\n", mtime=0), "text of another kind"),
        (compress(b"SELECT 1;\n"), "text of another kind"),
    ],
)
def test_what_is_no_recording_is_refused_with_what_it_looks_like(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(RecordingUnreadableError, match=what) as caught:
        source(tmp_path / "a.jsonl")
    assert str(tmp_path / "a.jsonl") in str(caught.value)
    written(tmp_path, b=segment(100, 120))
    found, missing = read(tmp_path)
    assert found == [120], "in a directory it is one of many"
    assert [what in one.reason for one in missing] == [True]


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingUnreadableError, match=r'"/nowhere/at/all" can\'t be read: No such file or directory'):
        source(Path("/nowhere/at/all"))
    with pytest.raises(RecordingUnreadableError, match="there is no recording in"):
        source(tmp_path)


@given(st.sampled_from(["gzip", "zstandard"]), segments(), st.data())
def test_what_others_compressed_is_used_as_far_as_it_is_certain(
    tmp_path_factory: pytest.TempPathFactory, how: str, segment: Segment, data: st.DataObject
) -> None:
    """What is cut is used up to there; where something is wrong nothing is, for nobody knows from where on it is."""
    plain = text([line for end, rows in segment.rows.items() for line in transaction(end, *rows)])
    whole_ = gzip.compress(plain) if how == "gzip" else compress(plain)
    place = data.draw(st.integers(4, len(whole_) - 1))
    cut = data.draw(st.booleans())
    damaged = whole_[:place] if cut else whole_[:place] + bytes([whole_[place] ^ 1]) + whole_[place + 1 :]
    path = tmp_path_factory.mktemp("foreign") / "a"
    path.write_bytes(damaged)
    of = source(path)
    recorded = [*of]
    found = whole(recorded)
    assert {end: segment.rows[end] for end in found} == found
    assert of.missing != [] or found == segment.rows


@given(segments(), st.data())
def test_a_damaged_plain_file_stops_nothing(
    tmp_path_factory: pytest.TempPathFactory, segment: Segment, data: st.DataObject
) -> None:
    """Nobody can see a value that has become another one. What comes before the damage and after it is read."""
    lines = [transaction(end, *rows) for end, rows in segment.rows.items()]
    number = data.draw(st.integers(0, len(lines) - 1))
    of = text(lines[number])
    place = data.draw(st.integers(0, len(of) - 2))  # not the end of its last line, which parts it from the next
    flipped = of[:place] + data.draw(st.binary(max_size=2)) + of[place + 1 :]
    path = tmp_path_factory.mktemp("plain") / "a.jsonl"
    path.write_bytes(b"".join([*map(text, lines[:number]), flipped, *map(text, lines[number + 1 :])]))
    read_ = source(path.parent)
    found = whole([*read_])
    others = {end: rows for n, (end, rows) in enumerate(segment.rows.items()) if n != number}
    assert {end: rows for end, rows in found.items() if end in others and rows == others[end]} == others


READ = """
import sys
from pathlib import Path
from test_segments import source

for _ in source(Path(sys.argv[1])):
    pass
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def peak(path: Path) -> int:
    """The most memory that a process has which reads a file, in bytes."""
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"}
    done = subprocess.run([sys.executable, "-c", READ, path], env=environment, capture_output=True, check=True)
    return int(done.stdout) * 1024


def test_only_what_is_needed_is_held(tmp_path: Path) -> None:
    """Fifty megabytes, as one commit without frames and as many with them."""
    row = change(1, columns=[{"name": "lead_id", "typeoid": 23, "value": 1}, {"name": "name", "value": "x" * 50_000}])
    (tmp_path / "none").write_bytes(segment(0, 20))
    (tmp_path / "foreign").write_bytes(gzip.compress(text(transaction(1_000_000, *[row] * 1_000)), 1))
    ends = range(20, 1_020, 20)
    (tmp_path / "own").write_bytes(b"".join(frame(end - 20, end, *transaction(end, *[row] * 20)) for end in ends))
    idle = peak(tmp_path / "none")
    for name in ("foreign", "own"):
        assert peak(tmp_path / name) - idle < 24 << 20, name
