"""Locks a run directory, on local disk or object storage, so that two jobs never write one output.

The owner's file has the highest number in `lock/`, and the owner rewrites it as a heartbeat. If there is no heartbeat
for `timeout_s`, or the owner's process is dead on this host, another job takes over: it creates the next number, which
only one job can do. An owner that was suspended detects this, and its job ends.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Self

from pipeline.config import Storage
from pipeline.errors import RunError
from pipeline.storage import files as storage


class RunLock:
    """Context manager. Raises `RunError` on entry if another live job owns the lock, on exit if it was taken over."""

    def __init__(self, uri: str, config: Storage, timeout_s: float) -> None:
        self._uri = uri.rstrip("/")
        self._config = config
        self._timeout_s = timeout_s
        self._number = 0
        self._owner = uuid.uuid4().hex
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self.lost = threading.Event()  # set once another job has taken over

    def __enter__(self) -> Self:
        numbers = storage.numbered(self._uri, self._config)
        for number in numbers:
            self._refuse_if_alive(number)
        self._number = numbers[-1] + 1 if numbers else 1
        if not storage.create_exclusive(self._path(self._number), self._content(), self._config):
            raise RunError(f"{self._uri}: another job took the lock at the same time; run one job per sink.uri")
        for number in numbers:
            storage.delete(self._path(number), self._config)
        self._heart = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._heart is not None:
            self._heart.join()
        if self.lost.is_set():
            raise RunError(
                f"{self._uri}: another job took over the lock, because this one had no heartbeat for too long"
            )
        storage.delete(self._path(self._number), self._config)

    def _beat(self) -> None:
        while not self._stop.wait(self._timeout_s / 4):
            try:
                if storage.numbered(self._uri, self._config)[-1:] != [self._number]:
                    self.lost.set()
                    signal.pthread_kill(
                        threading.main_thread().ident or 0, signal.SIGINT
                    )  # interrupts native waits too
                    return
                storage.write_bytes_atomic(self._path(self._number), self._content(), self._config)
            except Exception:  # an unreachable storage must not end the job; a late heartbeat still counts
                continue

    def _refuse_if_alive(self, number: int) -> None:
        try:
            holder = json.loads(storage.read_bytes(self._path(number), self._config))
        except (storage.StorageError, ValueError):  # just released, or written incompletely
            return
        age_s = time.time() - holder["sign_of_life"]
        if age_s > self._timeout_s or _died_here(holder):
            return
        raise RunError(
            f"{self._uri}: locked by process {holder['pid']} on {holder['host']}, last heartbeat {age_s:.0f} s ago; "
            f"wait until it ends, or, if it is dead, {max(self._timeout_s - age_s, 0):.0f} s more (run.lock_timeout_s)"
        )

    def _path(self, number: int) -> str:
        return f"{self._uri}/{number:06d}.json"

    def _content(self) -> bytes:
        content: dict[str, Any] = {
            "owner": self._owner,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "sign_of_life": time.time(),
        }
        return json.dumps(content).encode()


def _died_here(holder: dict[str, Any]) -> bool:
    """Whether the owner ran on this host since its last boot, and its process no longer exists."""
    if holder["host"] != socket.gethostname() or holder["boot"] != _boot_id() or not holder["boot"]:
        return False
    return _process_started(holder["pid"]) != holder["process_started"]


def _boot_id() -> str:
    """Boot id and PID namespace: process ids are comparable only if both are equal."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process_started(pid: int) -> str | None:
    """Start time of the process in clock ticks since boot; None if it does not exist."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
