"""Counts per unit the starts that never ended, to find units that kill their model process.

Every model actor asks one `Attempts` for permission before a unit enters the model. The counts are kept in one small
file, so that they survive a killed driver. `Attempts` also carries the request to drain, and the reason why the job
cannot succeed.
"""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Run, Storage
from pipeline.storage import files as storage

_WRITE_EVERY_S = 0.5
_LOADS_IN_A_ROW = 4  # of one model process, without success; Ray alone would restart it for ever


@dataclass(frozen=True)
class Turn:
    """Answer to a request to start. `go`: permission for start number `attempt`; else given up, or open (draining)."""

    go: bool
    attempt: int = 0
    draining: bool = False


@dataclass(frozen=True)
class End:
    """A unit has its row. `tried`: the unit had permission to start."""

    unit_id: str
    status: str
    tried: bool


@dataclass(frozen=True)
class _Report:
    at: float
    worked: int
    waits_for: str | None


class Attempts:
    """Counts starts and ends of units. Called by many model actors; Ray runs one call at a time."""

    def __init__(self, uri: str, config: Storage, run: Run) -> None:
        self._uri = uri
        self._config = config
        self._run = run
        self._starts: dict[str, int] = self._read()  # unit id → starts that have not ended
        self._loads: dict[str, int] = {}  # model process → loads so far, until one succeeds
        self._loading: dict[str, float] = {}  # model process → time.monotonic() when it began to load
        self._loaded = 0
        self._reports: dict[str, _Report] = {}
        self._given_up = 0  # given-up units in a row
        self._units: dict[str, int] = {}
        self._draining = False
        self._fault: str | None = None
        self._stalled: str | None = None
        self._changed = threading.Event()
        threading.Thread(target=self._keep, name="attempts", daemon=True).start()

    def start(self, unit_id: str, ended: Sequence[End] = ()) -> Turn:
        """Whether a unit may start; `ended` are units that have ended since the last request."""
        self.end(ended)
        if self._draining:
            return Turn(go=False, draining=True)
        begun = self._starts.get(unit_id, 0)
        if begun >= self._run.max_attempts:
            self._given_up += 1
            if self._given_up > self._run.max_given_up:
                self._fault = (
                    f"{self._given_up} units in a row, none finished in between, were given up because the model's "
                    "process ended on them (run.max_given_up); see the workers' logs, then run the same command again"
                )
                self._draining = True
            return Turn(go=False, attempt=begun)
        self._starts = {**self._starts, unit_id: begun + 1}
        self._changed.set()
        return Turn(go=True, attempt=begun + 1)

    def begun(self, unit_ids: Sequence[str]) -> dict[str, int]:
        """Return unit id → starts that never ended, for those of these units that have such starts."""
        return {unit_id: self._starts[unit_id] for unit_id in unit_ids if unit_id in self._starts}

    def end(self, ended: Sequence[End]) -> None:
        """Units have their rows. If such a row is lost before it is written, its unit's starts count from 0 again."""
        for end in ended:
            self._starts = {id_: count for id_, count in self._starts.items() if id_ != end.unit_id}
            self._units[end.status] = self._units.get(end.status, 0) + 1
            if end.tried:
                self._given_up = 0
            self._changed.set()

    def loading(self, process: str) -> None:
        """A model process begins to load."""
        self._loads[process] = self._loads.get(process, 0) + 1
        self._loading[process] = time.monotonic()
        if self._loads[process] > _LOADS_IN_A_ROW:
            self._fault = f"the model's process ended {_LOADS_IN_A_ROW} times while it loaded; see the workers' logs"
            self._draining = True

    def loaded(self, process: str) -> None:
        """A model process has finished loading."""
        self._loads.pop(process, None)
        self._loading.pop(process, None)
        self._loaded += 1

    def report(self, process: str, worked: int, waits_for: str | None) -> bool:
        """Note a model process's rounds with work so far and what it waits for; return whether the job drains."""
        self._reports[process] = _Report(time.monotonic(), worked, waits_for)
        return self._draining

    def drain(self) -> None:
        """From now on no unit may start."""
        self._draining = True

    def stall(self, reason: str) -> None:
        """Nothing has moved for too long: the job ends at once with `reason`."""
        self._stalled = self._fault = reason
        self._draining = True

    def orders(self) -> tuple[bool, str | None]:
        """Return whether the job drains (on request or after a fault), and the reason to end at once, if any."""
        return self._draining, self._stalled

    def state(self) -> dict[str, Any]:
        """Return units that ended so far by status, what the model processes do, and the fault that ends the job.

        actors      per process that reported: engine rounds with work, what it waits for, seconds since its report
        loading_s   per model that is loading: seconds so far
        loaded      number of models that have loaded
        """
        now = time.monotonic()
        return {
            "units": dict(self._units),
            "fault": self._fault,
            "loaded": self._loaded,
            "loading_s": [now - since for since in self._loading.values()],
            "actors": {
                process: {"worked": one.worked, "waits_for": one.waits_for, "silent_s": now - one.at}
                for process, one in self._reports.items()
            },
        }

    def _read(self) -> dict[str, int]:
        if not storage.exists(self._uri, self._config):
            return {}
        found: dict[str, int] = json.loads(storage.read_bytes(self._uri, self._config))
        return found

    def _keep(self) -> None:
        pause = threading.Event()
        while True:
            self._changed.wait()
            self._changed.clear()
            try:
                storage.write_bytes_atomic(self._uri, json.dumps(self._starts).encode(), self._config)
            except storage.StorageError:  # unreachable for a while: the next write holds all counts
                self._changed.set()
            pause.wait(_WRITE_EVERY_S)
