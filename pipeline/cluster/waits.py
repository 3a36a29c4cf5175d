"""Determines what a job waits for, seen from the driver: for the progress line, the metrics and the stall check.

A job waits while no model actor computes, no model loads and no unit ends. Slow frames are no fault of the job, and a
cluster may take minutes to grow. If nothing at all has moved for `run.stall_s`, the job ends with the reason, and units
without a row stay open.
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
_SILENT_S = 60.0  # an actor without a report for this long counts as dead


@dataclass(frozen=True)
class Wait:
    """What is waited for (a key of REASONS), for how long, and whether the whole job or only some actors wait."""

    reason: str
    seconds: float
    all: bool = True

    def __str__(self) -> str:
        return f"{'waiting' if self.all else 'some actors wait'} {self.seconds:.0f} s for {REASONS[self.reason]}"


@dataclass
class Waits:
    """Keeps track of waits; call `see` with the state of `Attempts` every few seconds.

    open_units   units without a row when the job began
    load_s       a model that has been loading for longer counts as waiting
    """

    now: float
    open_units: int
    load_s: float
    _moved_at: float = field(init=False)
    _since: dict[str, float] = field(default_factory=dict, init=False)  # actor → time since which it waits
    _seen: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._moved_at = self.now

    def see(self, now: float, state: dict[str, Any], fits: bool) -> Wait | None:
        """Return what the job waits for, if anything; `fits`: some node has the resources of a model actor."""
        actors = {name: one for name, one in state["actors"].items() if one["silent_s"] < _SILENT_S}
        seen = (state["units"], {name: one["worked"] for name, one in state["actors"].items()}, state["loaded"])
        computes = any(one["waits_for"] is None for one in actors.values())
        loads = any(seconds < self.load_s for seconds in state["loading_s"])
        if seen != self._seen or computes or loads:
            self._moved_at, self._seen = now, seen
        waiting = {name: one["waits_for"] for name, one in actors.items() if one["waits_for"] not in (None, "units")}
        self._since = {name: self._since.get(name, now) for name in waiting}
        longest = min(waiting, key=self._since.__getitem__, default=None)
        if sum(state["units"].values()) >= self.open_units:
            reason = "rows"
        elif not actors:
            reason = "actor" if fits else "node"
        else:
            reason = "units" if longest is None else waiting[longest]
        if now > self._moved_at:
            return Wait(reason, now - self._moved_at)
        if longest is not None:
            return Wait(waiting[longest], now - self._since[longest], all=False)
        return None
