"""A model actor's client of `Attempts`: requests permissions to start, and reports ended units with the next request.

Permission is requested one unit ahead to hide the latency of the call, which is milliseconds. If the process dies
before that unit enters the model, the unit is charged one start, like the units in the model. The model's thread makes
the calls itself: a helper thread would cost more in waits for the GIL than the call takes.
"""

from collections.abc import Sequence

import ray
from ray.actor import ActorHandle

from pipeline.cluster.attempts import End, Turn


class Turns:
    """Sends requests in order. `ask`, `end` and `tell` return at once; call them from one thread only."""

    def __init__(self, attempts: ActorHandle) -> None:
        self._attempts = attempts
        self._ended: list[End] = []  # not reported yet

    def begun(self, unit_ids: Sequence[str]) -> dict[str, int]:
        """Return unit id → how many earlier starts never ended, for those of these units that have such starts."""
        found: dict[str, int] = ray.get(self._attempts.begun.remote(unit_ids))
        return found

    def ask(self, unit_id: str) -> "ray.ObjectRef[Turn]":
        """Request permission for a unit to start; the start counts from now on."""
        ended, self._ended = self._ended, []
        asked: ray.ObjectRef[Turn] = self._attempts.start.remote(unit_id, ended)
        return asked

    def end(self, end: End) -> None:
        """Note that a unit has its row; reported with the next request or by `tell`."""
        self._ended.append(end)

    def tell(self) -> None:
        """Report all ended units now, before their rows leave the actor."""
        if self._ended:
            ended, self._ended = self._ended, []
            self._attempts.end.remote(ended)
