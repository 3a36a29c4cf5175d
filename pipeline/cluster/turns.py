"""A model actor's side of `Attempts`: turns asked for before they are needed, ends told along with the next question.

Asking takes milliseconds in which the model would stand still. So a unit's turn is asked for one unit ahead; that its
process ends before the unit has entered the model costs it a start, as it costs those beside it. The model's thread
asks by itself: a thread for it would have it wait for the interpreter longer than the question takes.
"""

from collections.abc import Sequence

import ray
from ray.actor import ActorHandle

from pipeline.cluster.attempts import End, Turn


class Turns:
    """Asks in order; `ask`, `end` and `tell` return at once and belong to one thread."""

    def __init__(self, attempts: ActorHandle) -> None:
        self._attempts = attempts
        self._ended: list[End] = []  # and not yet told

    def begun(self, unit_ids: Sequence[str]) -> dict[str, int]:
        """Of these units, those with starts that have no end: how many."""
        found: dict[str, int] = ray.get(self._attempts.begun.remote(unit_ids))
        return found

    def ask(self, unit_id: str) -> "ray.ObjectRef[Turn]":
        """The turn of a unit, to come; from now on its start counts."""
        ended, self._ended = self._ended, []
        asked: ray.ObjectRef[Turn] = self._attempts.start.remote(unit_id, ended)
        return asked

    def end(self, end: End) -> None:
        """A unit has its row; told with the next question or by `tell`."""
        self._ended.append(end)

    def tell(self) -> None:
        """Tell what ended now, before rows leave."""
        if self._ended:
            ended, self._ended = self._ended, []
            self._attempts.end.remote(ended)
