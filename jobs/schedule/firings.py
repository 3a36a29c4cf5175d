"""Record a schedule's firings in object storage: one numbered JSON file per firing.

Only one of several schedulers can create the next number, so that a firing is claimed once. The highest number is the
last firing; the next one is created only after it has ended.
"""

import datetime
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from pipeline.config import Storage
from pipeline.storage import files as st

State = Literal["claimed", "submitted", "ended"]


@dataclass(frozen=True)
class Firing:
    """One firing: `claimed` by a scheduler, `submitted` to the cluster, `ended` with the job's status."""

    number: int
    time: datetime.datetime  # when it was due, UTC, whole seconds
    owner: str  # the scheduler that claimed it
    since: datetime.datetime  # when the state began
    state: State = "claimed"
    attempt: int = 1  # number of submissions so far, this one included
    status: str | None = None  # once ended: SUCCEEDED | FAILED | STOPPED, or LOST if the cluster does not know the job
    exit_code: int | None = None

    @property
    def stamp(self) -> str:
        """The time as names contain it."""
        return f"{self.time:%Y-%m-%dT%H-%M-%SZ}"

    def become(self, state: State, since: datetime.datetime, **changes: Any) -> Self:
        """The firing in its next state."""
        return replace(self, state=state, since=since, **changes)


class Firings:
    """The firings of one schedule, under `uri`."""

    def __init__(self, uri: str, config: Storage) -> None:
        self._uri = uri.rstrip("/")
        self._config = config

    def last(self) -> Firing | None:
        """The firing with the highest number."""
        numbers = st.numbered(self._uri, self._config)
        return self._read(numbers[-1]) if numbers else None

    def at(self, time: datetime.datetime) -> Firing | None:
        """The firing that was due at `time`, or None; later firings have later times."""
        for number in reversed(st.numbered(self._uri, self._config)):
            firing = self._read(number)
            if firing.time <= time:
                return firing if firing.time == time else None
        return None

    def claim(self, firing: Firing) -> bool:
        """Create a firing; False if another scheduler has created its number."""
        return st.create_exclusive(self._path(firing.number), _content(firing), self._config)

    def write(self, firing: Firing) -> None:
        """Overwrite a firing with its new state."""
        st.write_bytes_atomic(self._path(firing.number), _content(firing), self._config)

    def _path(self, number: int) -> str:
        return f"{self._uri}/{number:08d}.json"

    def _read(self, number: int) -> Firing:
        fields = json.loads(st.read_bytes(self._path(number), self._config))
        times = {name: datetime.datetime.fromisoformat(fields[name]) for name in ("time", "since")}
        return Firing(**fields | times)


def _content(firing: Firing) -> bytes:
    times = {"time": firing.time.isoformat(), "since": firing.since.isoformat()}
    return json.dumps(asdict(firing) | times).encode()
