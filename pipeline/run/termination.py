"""SIGTERM as a request to end: units in the model are finished, the rest is left to the same command."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from pipeline.errors import StoppedError


class Termination:
    """Context manager of the main thread: inside it SIGTERM raises `StoppedError`, in `draining` only after a grace.

    asked   whether the job was asked to end
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
        """A block that ends by itself soon after `drain()`; if not within the grace, `StoppedError` is raised in it."""
        self._drain = drain
        self._drained.clear()
        signal.signal(signal.SIGTERM, self._on_signal)  # libraries set their own when they start
        try:
            yield
        finally:
            self._drained.set()
            self._drain = None

    def request(self) -> None:
        """Ask as SIGTERM does; from any thread."""
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
