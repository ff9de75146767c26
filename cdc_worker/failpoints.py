"""Named points of the work at which tests kill the process. In production to reach one is to do nothing.

No setting, variable or flag switches one on: whoever runs this code in a process of its own has to put another function
in the place of `reach`, as `tests/launcher.py` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, get_args

Point = Literal[
    # The stream
    "received",  # a commit was read and what it means is known, and nothing of it is written
    "within_transaction",  # a slice of a large commit was, and the rest of it is not read
    "frame_appended",  # the recording's file has a batch, not yet durable
    "recorded",  # the recording has a batch and the database doesn't
    "before_write",  # nothing of a batch was sent
    "before_commit",  # rows of a batch were sent, and the server has not been told to commit
    "part_written",  # of a batch that is written in parts, one is durable and the next isn't
    "committed",  # a batch is durable and the slot doesn't know
    "confirmed",
    "idle_advance",  # the position of a quiet stream is to be noted
    "idle_advanced",  # a position without rows is durable and the slot doesn't know
    "refused",  # the target has refused a batch, whose transaction is still open
    "rolled_back",  # to the savepoint before rows that were refused
    "letters_inserted",  # dead letters of a batch are in a transaction that is still open
    "predecessor_ended",  # nobody else can write any more, and the owner is still another
    "taken_over",  # the owner is this process, which has written nothing
    # Commands
    "step_done",  # one step of setup, cutover or teardown is durable and the next isn't
    "slot_made",  # and there is no checkpoint
    "checkpoint_made",
    "gap_noted",  # and nothing has been done about it
    "slot_dropped",  # which was of no use, and there is no other
    "copy_noted",  # whose name is in the checkpoint, and which is not there
    "slot_copied",  # and the checkpoint speaks of the old one
    "checkpoint_moved",  # to the copy, and the old slot is there
    "spare_dropped",  # a slot that the checkpoint still notes
    "backfill_begun",  # which nobody else has been told
    "chunk_read",  # what is to be written of rows is known
    "chunk_written",
    "backfill_told",  # all is written, and it is not noted as finished
    "late_registered",  # a command that writes late has said that it is there
    "late_written",  # a batch of what comes late is durable
    "rows_changed",  # in a transaction that is still open
    "rows_rewritten",
    "repaired",  # what was missing of some rows is durable
    "letters_taken_up",  # that had been discarded
    "letters_retried",  # what came of them is durable
    "person_registered",  # in a transaction that is still open
    "person_blanked",  # likewise
]

POINTS: Final[tuple[Point, ...]] = get_args(Point)


def nothing(point: Point) -> None:
    """What a point does in production."""


reach: Callable[[Point], None] = nothing
