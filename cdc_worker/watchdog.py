"""Alive means alive: who owes a sign of life and has not given one, and when it is to be asked after.

What the loop waits for owes it a sign, each since it was due:

    stream    always, once it was asked for a keepalive: bytes
    changes   while a commit is open: more of it, for keepalives alone bring none to its end
    writing   while a batch is written: whatever moves on the socket
    lookup    while a row is looked up, likewise

All lag is owed by one of the last three: while there is any, either the checkpoint gets nearer to moving, or somebody
is late. While nothing is read, since a batch is full or a row is missing, the first two owe nothing. An idle worker is
owed keepalives alone.

Whoever is late makes the worker unhealthy, whatever the reason. What is done about it the server is asked for, through
another connection: what does its process do that serves the one that is silent?

    it works, or waits for a lock, a disk, a standby   That is the reason. It is waited for: begun anew, all of it would
                                                       have to be done again, and would be held up again.
    it waits for us, has nothing to do, or is gone     What it said was lost on the way, and nothing more will come. The
                                                       connection is given up, and another one goes on.
    the server can't be asked                          Nor could another connection be had. It is asked again.

That the loop itself hangs nobody here can see: the server does, which hears nothing of us, and frees the slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Debtor = Literal["stream", "changes", "writing", "lookup"]


class Watchdog:
    """Knows whom it has asked after, and when. Times are seconds of one clock that never goes back."""

    def __init__(self, patience: float) -> None:
        """Who owes a sign for longer than the `patience` is late."""
        self.patience = patience
        self._asked: dict[Debtor, float] = {}

    def late(self, owed: Mapping[Debtor, float], now: float) -> dict[Debtor, float]:
        """For how long those have owed a sign that are late, by since when all of them owe one."""
        return {debtor: now - since for debtor, since in owed.items() if now - since > self.patience}

    def to_ask_after(self, owed: Mapping[Debtor, float], now: float) -> dict[Debtor, float]:
        """Those of the late that were not asked after for so long again. They are, now."""
        late = self.late(owed, now)
        # Who has given a sign since, and is late again, is asked after at once.
        due = {
            debtor: by for debtor, by in late.items() if self._asked.get(debtor, owed[debtor]) <= now - self.patience
        }
        self._asked = {debtor: now if debtor in due else self._asked[debtor] for debtor in late}
        return due
