"""Handles SIGTERM: units in the model are finished, and the same command resumes the rest."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from pipeline.errors import StoppedError


class Termination:
    """Context manager of the main thread. Within it SIGTERM raises `StoppedError`; in `draining` after `grace_s` only.

    asked   whether SIGTERM came while draining was possible
    """

    def __init__(self, grace_s: float) -> None:
        self.asked = False
        self._grace_s = grace_s
        self._drain: Callable[[], None] | None = None
        self._drained = threading.Event()
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @contextmanager
    def draining(self, drain: Callable[[], None]) -> Iterator[None]:
        """A block in which SIGTERM calls `drain()`, and raises `StoppedError` if it has not ended `grace_s` later."""
        self._drain = drain
        self._drained.clear()
        signal.signal(signal.SIGTERM, self._on_signal)  # libraries install their own handlers when they start
        try:
            yield
        finally:
            self._drained.set()
            self._drain = None

    def request(self) -> None:
        """Send SIGTERM to the main thread, from any thread."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self._drain is None:
            raise StoppedError("the job was asked to end")
        self.asked = True
        threading.Thread(target=self._end, args=(self._drain,), name="drain", daemon=True).start()

    def _end(self, drain: Callable[[], None]) -> None:
        drain()
        if not self._drained.wait(self._grace_s):
            self.request()
