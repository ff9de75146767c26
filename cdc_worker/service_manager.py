"""Tells a service manager that the worker has begun, how it does, and that it is alive. Manual: sd_notify(3)."""

from __future__ import annotations

import os
import socket
import threading
from typing import Final

from cdc_worker.stop import HANG
from cdc_worker.vitals import Vitals

INTERVAL: Final = 5.0
"""Seconds between two words to it, at most; half of the time that it gives us, where that is less."""

BEGINNING: Final = 0.1
"""Seconds between two looks until it has begun."""


def tell(vitals: Vitals) -> None:
    """Tell it from now on, if there is one that wants to know, in a thread of its own.

    The worker has begun when it records, stands by, or waits for a server: that may take longer than any start. It is
    alive while its loop turns.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        threading.Thread(target=_tell, args=(vitals, address), name="service manager", daemon=True).start()


def _tell(vitals: Vitals, address: str) -> None:
    watchdog = int(os.environ.get("WATCHDOG_USEC") or 0) / 1_000_000
    interval = min(INTERVAL, watchdog / 2) if watchdog else INTERVAL
    pause = threading.Event()
    while not vitals.begun:
        pause.wait(BEGINNING)
    _say(address, "READY=1")
    while True:
        problems = "; ".join(vitals.problems.values())
        said = [f"STATUS={vitals.role}{f': {problems}' if problems else ''}"]
        if vitals.still < HANG:
            said.append("WATCHDOG=1")
        _say(address, *said)
        pause.wait(interval)


def _say(address: str, *lines: str) -> None:
    # A name that begins with @ is abstract.
    name = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
        try:
            one.sendto("\n".join(lines).encode(), name)
        except OSError:
            return  # it is gone, and says itself what became of us
