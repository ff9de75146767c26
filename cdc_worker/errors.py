"""Every way to fail, what it asks of the operator, and the exit code of `run`.

CdcWorkerError
├── SettingsError            2   a setting is wrong: mend it
├── ProfileError             3   the profile can't be read: mend the file
├── ConnectionStringError    4   the DSN can't be used: mend it
├── AuthenticationError      5   the server refuses role, password or host, or isn't trusted: mend the one or the other
├── DatabaseMissingError     6   no such database: mend the DSN
├── WalLevelError            7   wal_level is not logical: change it and restart the server
├── PluginMissingError       8   the server has no wal2json, or one that is too old: install it, or switch the plugin
├── PluginRefusedError       9   the server doesn't allow wal2json: allow it, or switch the plugin
├── NotSetUpError           10   tables of the worker are missing: run setup
├── SlotMissingError        11   the slot isn't there: a gap
├── SlotMismatchError       12   the slot belongs to another plugin or database: name another slot, or switch it
├── SlotTakenError          13   another process reads the slot, with --no-wait: stop it, or name another slot
├── SlotLostError           14   the server discarded WAL that the slot needed: a gap
├── SlotAheadError          15   the slot was moved or made anew behind our back: a gap
├── ClusterMismatchError    16   the checkpoint belongs to another cluster, or to a later state of this one: a gap
├── CatalogMismatchError    17   profile and database disagree: mend the profile or the tables
├── FencedError             18   another worker has taken over: nothing to do
├── SynchronousStandbyError 19   commits of the application would wait for this worker: exclude it
├── MessageUnreadableError  20   the stream holds something we don't understand: report it, or run recover --skip
├── TargetUnusableError     21   the target refuses every write (grants, read-only, missing column): mend it
├── TooManyRefusalsError    22   the target refuses row after row for the same reason: mend it
├── SlotGivenUpError        23   the server kept too much WAL for the slot, which was dropped: a gap, as you have set it
├── RecordingError          24   the directory of the recording isn't there, or can't be written: mend it
├── PublicationError        25   the publication lacks a captured table, or isn't there: run setup
├── HungError               26   the loop hangs, in a function of the profile perhaps: restart it, and mend that
├── UnknownValueError        –   a rule lacks a value: the change becomes a dead letter, nothing stops
├── ClusterError             1   the demo's private cluster can't be had: install what it names
├── DemoError                1   the demo can't go on: see its log
├── BusyError                1   another command is at it: wait for it
├── RecordingUnreadableError 1   what is given as a recording is none, or isn't whole: name another, or do without
├── NotRunningError          1   a command needs a worker that runs beside it: run one
└── ServerError              1   any other answer of the server to a one-shot command

A service manager must not restart into 11, 12, 14 to 16 and 23: each is a gap or a mix-up that a person has to look at,
and then run recover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self


class CdcWorkerError(Exception):
    """What is wrong, with its value, and in `hint` the way out."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class SettingsError(CdcWorkerError):
    """A setting is wrong."""

    exit_code = 2


Place = tuple[int | str, ...]
"""Where something stands in a profile: keys, and numbers of elements from 0."""


@dataclass(frozen=True, slots=True)
class ProfileFault:
    """What is wrong with a profile, and where. The message names the place as well, in words."""

    place: Place
    message: str


class ProfileError(CdcWorkerError):
    """The profile can't be read, or not be compiled: each fault is named."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str | None = None, faults: Sequence[ProfileFault] = ()) -> None:
        super().__init__(message, hint=hint)
        self.faults = faults

    @classmethod
    def of(cls, profile: str, faults: Sequence[ProfileFault]) -> Self:
        """All that is wrong with a profile."""
        lines = "\n".join(f"  {fault.message}" for fault in faults)
        hint = "mend each place named; on which lines they are says: cdc-worker profile check"
        return cls(f'profile "{profile}" is wrong:\n{lines}', hint=hint, faults=faults)


class ConnectionStringError(CdcWorkerError):
    """The DSN can't be used: libpq or the server doesn't understand it."""

    exit_code = 4


class AuthenticationError(CdcWorkerError):
    """The server refuses the role, its password or this host, or its certificate isn't trusted."""

    exit_code = 5


class DatabaseMissingError(CdcWorkerError):
    """There is no such database."""

    exit_code = 6


class WalLevelError(CdcWorkerError):
    """The server doesn't write what logical decoding needs."""

    exit_code = 7


class PluginMissingError(CdcWorkerError):
    """The server has no such output plugin."""

    exit_code = 8


class PluginRefusedError(CdcWorkerError):
    """The server has the output plugin and doesn't allow it (CVE-2026-6471)."""

    exit_code = 9


class NotSetUpError(CdcWorkerError):
    """The worker's own tables, or its checkpoint, are missing."""

    exit_code = 10


class SlotMissingError(CdcWorkerError):
    """The slot isn't there."""

    exit_code = 11


class SlotMismatchError(CdcWorkerError):
    """The slot is another plugin's or another database's."""

    exit_code = 12


class SlotTakenError(CdcWorkerError):
    """Another process reads the slot, and was not to be waited for."""

    exit_code = 13


class SlotLostError(CdcWorkerError):
    """The server has discarded WAL that the slot needed."""

    exit_code = 14


class SlotAheadError(CdcWorkerError):
    """The slot's confirmed position is beyond the checkpoint: what lies between was never written."""

    exit_code = 15


class ClusterMismatchError(CdcWorkerError):
    """The checkpoint was made on another cluster, or on a later state of this one."""

    exit_code = 16


class CatalogMismatchError(CdcWorkerError):
    """The profile names a table or column that the database doesn't have."""

    exit_code = 17


class FencedError(CdcWorkerError):
    """Another worker owns the checkpoint now."""

    exit_code = 18


class SynchronousStandbyError(CdcWorkerError):
    """`synchronous_standby_names` would match this worker."""

    exit_code = 19


class MessageUnreadableError(CdcWorkerError):
    """The stream holds a message that can't be read; the next attempt would meet the same."""

    exit_code = 20


class TargetUnusableError(CdcWorkerError):
    """The target refuses the write whatever the row (SQLSTATE classes 42, 25006, 0A000)."""

    exit_code = 21


class TooManyRefusalsError(CdcWorkerError):
    """The target refused very many rows in a row with one SQLSTATE."""

    exit_code = 22


class SlotGivenUpError(CdcWorkerError):
    """The server kept more WAL for the slot than `retained_limit_bytes`: it was dropped, and changes are lost."""

    exit_code = 23


class RecordingError(CdcWorkerError):
    """What the stream brings can't be kept where it is to be."""

    exit_code = 24


class PublicationError(CdcWorkerError):
    """The publication that a pgoutput slot is read by isn't there, or lacks a captured table: changes are left out."""

    exit_code = 25


class HungError(CdcWorkerError):
    """The loop has not turned for minutes, and would not have any more."""

    exit_code = 26


class BusyError(CdcWorkerError):
    """Another command runs that this one must not meet."""


class RecordingUnreadableError(CdcWorkerError):
    """What is given as a recording is none, or isn't whole and was to be."""


class NotRunningError(CdcWorkerError):
    """No worker runs, and what was asked waits for one."""


class ServerError(CdcWorkerError):
    """Another answer of the server that ends a one-shot command."""


class UnknownValueError(CdcWorkerError):
    """A rule needs a value that the change doesn't carry. The change becomes a dead letter; nothing stops."""
