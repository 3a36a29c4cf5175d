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
_MARK = "LIGHTKV_WAKING_NOBODY"  # in the environment of what begins in such a block


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
    wake_nobody()
    os.environ[_MARK] = "1"
    try:
        yield
    finally:
        os.environ.pop(_MARK, None)
        _take(before, param)


def wake_nobody() -> None:
    """This thread, and those that it begins, take no CPU from one that runs (SCHED_BATCH)."""
    if _LINUX:
        _take(os.SCHED_BATCH)


def as_usual() -> None:
    """What `waking_nobody` did to this thread is taken back (SCHED_OTHER); any other policy is its owner's."""
    if _LINUX and _MARK in os.environ:
        _take(os.SCHED_OTHER)


def behind_all() -> None:
    """This thread runs where nobody else wants to (SCHED_IDLE, nice 19), for good: going back takes a privilege."""
    if _LINUX:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        _take(os.SCHED_IDLE)


def _take(policy: int, param: "os.sched_param | None" = None) -> None:
    with suppress(OSError):
        os.sched_setscheduler(threading.get_native_id(), policy, param or os.sched_param(0))
