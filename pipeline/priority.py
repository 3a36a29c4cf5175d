"""Who waits where the CPUs are few: the model never for what only serves it.

Linux alone has these policies; elsewhere, and where a sandbox forbids them, nothing changes. None needs a privilege,
and from SCHED_BATCH one may go back.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_LINUX = sys.platform == "linux"


@contextmanager
def waking_nobody() -> Iterator[None]:
    """Processes and threads that begin in the block, and this thread, take no CPU from one that runs (SCHED_BATCH).

    They have their fair share as before, but at its turn: what serves a model wakes up a thousand times a second for
    moments, and each of them would cost the model its CPU and what is in its caches.
    """
    if not _LINUX:
        yield
        return
    before, param = os.sched_getscheduler(0), os.sched_getparam(0)
    _take(os.SCHED_BATCH)
    try:
        yield
    finally:
        _take(before, param)


def wake_nobody() -> None:
    """This thread, and those that it begins, take no CPU from one that runs (SCHED_BATCH)."""
    if _LINUX:
        _take(os.SCHED_BATCH)


def as_usual() -> None:
    """This thread, and those that it begins, may interrupt others (SCHED_OTHER), whatever began it."""
    if _LINUX:
        _take(os.SCHED_OTHER)


def behind_all() -> None:
    """This thread runs where nobody else wants to (SCHED_IDLE, nice 19), for good: going back takes a privilege."""
    if _LINUX:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        _take(os.SCHED_IDLE)


def _take(policy: int, param: "os.sched_param | None" = None) -> None:
    with suppress(OSError):
        os.sched_setscheduler(threading.get_native_id(), policy, param or os.sched_param(0))
