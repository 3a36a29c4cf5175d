"""A CPU for a thread of its own: beside other processes on few CPUs, one that is moved about runs cold."""

import fcntl
import os
from pathlib import Path
from typing import IO


def keep_to_one_cpu(folder: Path) -> tuple[int, IO[str]] | None:
    """Keep the calling thread, and those it starts, to the first CPU that no other process holds by a lock in `folder`.

    Gives the CPU and its lock, which lasts as long as the file is open; None where all are held: nothing changes then.
    """
    for cpu in sorted(os.sched_getaffinity(0)):
        lock = (folder / f"cpu-{cpu}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        os.sched_setaffinity(0, {cpu})
        return cpu, lock
    return None
