"""How often each unit was started without an end: what tells a unit that kills its model process from bad luck.

One `Attempts` serves a pass over units; every model actor asks it before a unit enters the model. The counts are kept
in one small file, so that starts add up over kills of the driver, too. It also carries the request to drain, and
the reason when going on makes no sense.
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
_LOADS_IN_A_ROW = 4  # of one model process; Ray restarts it without end


@dataclass(frozen=True)
class Turn:
    """What to do with a unit. `go`: its `attempt`-th start; else it is given up or, when draining, left for later."""

    go: bool
    attempt: int = 0
    draining: bool = False


@dataclass(frozen=True)
class End:
    """A unit has its row; `tried`: it had been let into the model for it."""

    unit_id: str
    status: str
    tried: bool


@dataclass(frozen=True)
class _Report:
    at: float
    worked: int
    waits_for: str | None


class Attempts:
    """Counts starts and ends of units. Every method may be called by many model actors, one call at a time."""

    def __init__(self, uri: str, config: Storage, run: Run) -> None:
        self._uri = uri
        self._config = config
        self._run = run
        self._starts: dict[str, int] = self._read()  # of units that have not ended
        self._loads: dict[str, int] = {}  # of model processes that are not up yet
        self._loading: dict[str, float] = {}  # since when they load
        self._loaded = 0
        self._reports: dict[str, _Report] = {}
        self._given_up = 0  # in a row
        self._units: dict[str, int] = {}
        self._draining = False
        self._fault: str | None = None
        self._stalled: str | None = None
        self._changed = threading.Event()
        threading.Thread(target=self._keep, name="attempts", daemon=True).start()

    def start(self, unit_id: str, ended: Sequence[End] = ()) -> Turn:
        """Whether a unit may enter the model, now that others have ended."""
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
        """Of these units, those with starts that have no end: how many."""
        return {unit_id: self._starts[unit_id] for unit_id in unit_ids if unit_id in self._starts}

    def end(self, ended: Sequence[End]) -> None:
        """Units have their rows. Should a row be lost on its way, its unit's starts count anew."""
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
        """A model process is up."""
        self._loads.pop(process, None)
        self._loading.pop(process, None)
        self._loaded += 1

    def report(self, process: str, worked: int, waits_for: str | None) -> bool:
        """What a model process has computed so far, and what it waits for; returns whether units are held back."""
        self._reports[process] = _Report(time.monotonic(), worked, waits_for)
        return self._draining

    def drain(self) -> None:
        """From now on no unit enters a model."""
        self._draining = True

    def stall(self, reason: str) -> None:
        """Nothing moves any more: the job ends at once."""
        self._stalled = self._fault = reason
        self._draining = True

    def orders(self) -> tuple[bool, str | None]:
        """Whether units are held back, on request or because going on makes no sense; why to end at once, if so."""
        return self._draining, self._stalled

    def state(self) -> dict[str, Any]:
        """Units that ended since the start, by status; what model processes do; why the job should end, if it should.

        actors: of each process that reported, rounds of the engine that computed something, what it waits for, and how
        long it has been silent · loading_s: how long models have been loading · loaded: models that were loaded
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
            except storage.StorageError:  # away for a while: the next write has all of it
                self._changed.set()
            pause.wait(_WRITE_EVERY_S)
