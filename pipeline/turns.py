"""A model actor's side of `Attempts`: turns asked for before they are needed, ends told along with the next question.

Asking takes milliseconds in which the model would stand still. So a unit's turn is asked for one unit ahead; that its
process ends before the unit has entered the model costs it a start, as it costs those beside it.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue

import ray
from ray.actor import ActorHandle

from pipeline.attempts import End, Turn
from pipeline.priority import wake_nobody


class Turns:
    """Asks in a thread of its own, in order; `ask`, `end` and `tell` return at once."""

    def __init__(self, attempts: ActorHandle) -> None:
        self._attempts = attempts
        self._calls = ThreadPoolExecutor(1, "turns", initializer=wake_nobody)
        self._ended: SimpleQueue[End] = SimpleQueue()  # and not yet told

    def begun(self, unit_ids: Sequence[str]) -> dict[str, int]:
        """Of these units, those with starts that have no end: how many."""
        found: dict[str, int] = ray.get(self._attempts.begun.remote(unit_ids))
        return found

    def ask(self, unit_id: str) -> Future[Turn]:
        """The turn of a unit; from then on its start counts."""
        return self._calls.submit(self._start, unit_id, self._taken())

    def end(self, end: End) -> None:
        """A unit has its row; told with the next question or by `tell`."""
        self._ended.put(end)

    def tell(self) -> None:
        """Tell what ended now, before rows leave."""
        if ended := self._taken():
            self._calls.submit(self._attempts.end.remote, ended)

    def _start(self, unit_id: str, ended: list[End]) -> Turn:
        turn: Turn = ray.get(self._attempts.start.remote(unit_id, ended))
        return turn

    def _taken(self) -> list[End]:
        ended = []
        with suppress(Empty):
            while True:
                ended.append(self._ended.get_nowait())
        return ended
