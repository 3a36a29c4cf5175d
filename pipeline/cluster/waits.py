"""What a job waits for, as the driver sees it: for the progress line, the metrics, and the end of a job that is stuck.

A job waits while no model actor computes, no model loads and no unit ends. Frames that are slow are no fault of the
job, and a cluster may take minutes to grow; but when nothing at all has moved for `run.stall_s`, the job ends with the
reason, and units that have no row yet stay open.
"""

from dataclasses import dataclass, field
from typing import Any

REASONS = {
    "node": "a node with the resources of a model actor",
    "actor": "a model actor to start",
    "units": "units to reach a model actor",
    "cpu": "a CPU to decode on",
    "frames": "frames",
    "rows": "rows to be written",
}
SHOWN_S = 5.0  # shorter waits are not shown
_SILENT_S = 60.0  # an actor that has not reported for so long is gone


@dataclass(frozen=True)
class Wait:
    """What is waited for (a key of REASONS), how long by now, and whether the whole job waits or only some actors."""

    reason: str
    seconds: float
    all: bool = True

    def __str__(self) -> str:
        return f"{'waiting' if self.all else 'some actors wait'} {self.seconds:.0f} s for {REASONS[self.reason]}"


@dataclass
class Waits:
    """Fed with the state of `Attempts` every few seconds.

    open_units   units without a row when the job began
    load_s       a model that has been loading for longer counts as waiting
    """

    now: float
    open_units: int
    load_s: float
    _moved_at: float = field(init=False)
    _since: dict[str, float] = field(default_factory=dict, init=False)  # actor → since when it waits
    _seen: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._moved_at = self.now

    def see(self, now: float, state: dict[str, Any], fits: bool) -> Wait | None:
        """What the job waits for, if anything; `fits`: the cluster has the resources of a model actor."""
        actors = {name: one for name, one in state["actors"].items() if one["silent_s"] < _SILENT_S}
        seen = (state["units"], {name: one["worked"] for name, one in state["actors"].items()}, state["loaded"])
        computes = any(one["waits_for"] is None for one in actors.values())
        loads = any(seconds < self.load_s for seconds in state["loading_s"])
        if seen != self._seen or computes or loads:
            self._moved_at, self._seen = now, seen
        waiting = {name: one["waits_for"] for name, one in actors.items() if one["waits_for"] not in (None, "units")}
        self._since = {name: self._since.get(name, now) for name in waiting}
        if sum(state["units"].values()) >= self.open_units:
            reason = "rows"
        elif not actors:
            reason = "actor" if fits else "node"
        else:
            reason = min(waiting, key=self._since.__getitem__) if waiting else "units"
            reason = waiting.get(reason, reason)
        if now > self._moved_at:
            return Wait(reason, now - self._moved_at)
        if waiting:
            name = min(waiting, key=self._since.__getitem__)
            return Wait(waiting[name], now - self._since[name], all=False)
        return None
