"""Fire a schedule: claim a firing in storage, submit it to a cluster and watch it until it ends."""

import datetime
import itertools
import logging
import os
import re
import signal
import socket
import time
import zoneinfo
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import cronsim

from jobs.schedule.firings import Firing, Firings
from jobs.schedule.submission import Submission
from pipeline import logs
from pipeline.config import JobConfig
from pipeline.errors import ConfigError, RunError
from pipeline.run.directory import RunDirectory

LOG = logging.getLogger("jobs.schedule")
_POLL_S, _IDLE_S = 15.0, 60.0  # between checks of a run, and of an idle schedule
_ON_TIME_S = 60.0  # a firing that starts later was missed
_CLAIM_S = 120.0  # a claim that is older and not submitted may be submitted by any scheduler
_BACKOFF_S, _LONGEST_BACKOFF_S = 5.0, 300.0
_SHOWN_LINES = 20


@dataclass(frozen=True)
class Schedule:
    """When to fire, and what to do about missed and failed firings."""

    name: str
    cron: str
    timezone: zoneinfo.ZoneInfo
    missed: Literal["catch-up", "skip"] = "catch-up"
    attempts: int = 3

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", self.name):
            raise ConfigError(f"--name: expected lower case letters, digits and dashes, got {self.name!r}")
        if self.attempts < 1:
            raise ConfigError(f"--attempts: expected at least 1, got {self.attempts}")
        try:
            next(self.after(datetime.datetime.now(datetime.UTC)))
        except (cronsim.CronSimError, StopIteration) as error:
            reason = str(error) or "no such day in fifty years"
            raise ConfigError(
                f"--cron: expected five fields as in '30 2 * * 1-5', got {self.cron!r} ({reason})"
            ) from None

    def after(self, moment: datetime.datetime) -> Iterator[datetime.datetime]:
        """Firing times after `moment`, in UTC; clock changes are handled like in Debian's cron."""
        for local in cronsim.CronSim(self.cron, moment.astimezone(self.timezone)):
            yield local.astimezone(datetime.UTC)


class Jobs(Protocol):
    """Submits and finds jobs: `jobs.schedule.submission.Cluster`, or a test double."""

    def submit(self, id: str, job: JobConfig) -> bool: ...
    def find(self, id: str) -> Submission | None: ...
    def log_tail(self, id: str, lines: int) -> str: ...


class Clock:
    """The current time, and sleep that `stop` interrupts."""

    def __init__(self) -> None:
        self.stopping = False

    def now(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC)

    def sleep(self, seconds: float) -> None:
        """Sleep; returns at most a second after `stop`."""
        end = time.monotonic() + seconds
        while not self.stopping and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))

    def stop(self, *_: object) -> None:
        """Ask for the end; usable as a signal handler."""
        self.stopping = True


class Scheduler:
    """Fires a schedule: claims a due firing in storage, submits it to the cluster and watches it until it ends."""

    def __init__(self, schedule: Schedule, load: Callable[[], JobConfig], jobs: Jobs, clock: Clock) -> None:
        self._schedule, self._load, self._jobs, self._clock = schedule, load, jobs, clock
        job = load()
        if job.source.known not in (None, job.sink.uri):
            raise ConfigError(
                f"source.known: a schedule sets it to sink.uri ({job.sink.uri}), got {job.source.known}; "
                "put earlier runs below sink.uri"
            )
        self._base = job.sink.uri.rstrip("/")
        self._firings = Firings(f"{self._base}/_schedule/{schedule.name}", job.storage)
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{id(self)}"
        self._started = clock.now()  # before the first start no firing counts as missed
        self._skipped: datetime.datetime | None = None

    def run(self) -> None:
        """Fire until the clock is stopped; errors are logged and retried."""
        self._log("started", cron=self._schedule.cron, timezone=self._schedule.timezone.key, base=self._base)
        self._repeat(self.step, lambda: False)
        self._log("stopped")

    def once(self, moment: datetime.datetime) -> int:
        """Fire for `moment`, or find that firing, and wait until it ends; the job's exit code, or 143 if stopped."""
        firing = self._firings.at(moment) or self._claim(moment)

        def step() -> float:
            nonlocal firing
            firing = self._advance(self._firings.at(moment) or firing)
            mine = firing.state == "claimed" and firing.owner == self._owner
            return 0.0 if mine or firing.state == "ended" else _POLL_S

        self._repeat(step, lambda: firing.state == "ended", ConfigError, RunError)
        if firing.state != "ended":
            self._log("stopped", firing=firing.stamp, note="the job continues")
            return 128 + signal.SIGTERM
        return firing.exit_code if firing.exit_code is not None else int(firing.status != "SUCCEEDED")

    def step(self) -> float:
        """Advance the schedule once; return the seconds until the next step."""
        last = self._firings.last()
        if last is not None and last.state != "ended":
            last = self._advance(last)
            if last.state != "ended":
                return _POLL_S
        now = self._clock.now()
        due = self._due(last, now)
        if due is None:
            return min(_IDLE_S, (next(self._schedule.after(now)) - now).total_seconds())
        try:
            firing = self._claim(due)
        except RunError as taken:
            self._log("not fired", reason=str(taken))
            return _POLL_S
        self._advance(firing)
        return _POLL_S

    def _due(self, last: Firing | None, now: datetime.datetime) -> datetime.datetime | None:
        """The time that is due, or None; if several were missed, the latest."""
        start = last.time if last else self._started
        if self._skipped:
            start = max(start, self._skipped)
        due = list(itertools.takewhile(lambda moment: moment <= now, self._schedule.after(start)))
        if not due:
            return None
        late = (now - due[-1]).total_seconds() > _ON_TIME_S
        if missed := len(due) - (not late):
            self._log("missed", count=missed, policy=self._schedule.missed)
        if late and self._schedule.missed == "skip":
            self._skipped = due[-1]
            return None
        return due[-1]

    def _claim(self, moment: datetime.datetime) -> Firing:
        last = self._firings.last()
        if last is not None and last.state != "ended":
            raise RunError(f"firing {last.stamp} of {self._schedule.name} has not ended: one run at a time")
        if last is not None and last.time >= moment:
            raise RunError(f"firing {last.stamp} of {self._schedule.name} exists: expected a later time")
        firing = Firing(last.number + 1 if last else 1, moment, self._owner, self._clock.now())
        if not self._firings.claim(firing):
            raise RunError(f"another scheduler of {self._schedule.name} fired this moment: one run at a time")
        return firing

    def _advance(self, firing: Firing) -> Firing:
        """Submit a claimed firing, or see whether a submitted one has ended; an ended one stays."""
        now = self._clock.now()
        if firing.state == "claimed":
            if firing.owner != self._owner and (now - firing.since).total_seconds() < _CLAIM_S:
                return firing
            new = self._jobs.submit(self._id(firing), self._job(firing))
            self._log("submitted" if new else "was submitted", firing=firing.stamp, submission=self._id(firing))
            firing = firing.become("submitted", now)
            self._firings.write(firing)
        elif firing.state == "submitted":
            firing = self._watch(firing, now)
        return firing

    def _watch(self, firing: Firing, now: datetime.datetime) -> Firing:
        found = self._jobs.find(self._id(firing))
        if (found is not None and not found.ended) or self._holds_its_lock(firing):
            return firing
        status, exit_code = (found.status, found.exit_code) if found else ("LOST", None)
        failed = status in ("FAILED", "LOST")
        if failed and firing.attempt < self._schedule.attempts:  # the next attempt continues where this one stopped
            after = firing.become("claimed", now, owner=self._owner, attempt=firing.attempt + 1)
        else:
            after = firing.become("ended", now, status=status, exit_code=exit_code)
        self._firings.write(after)
        level = logging.ERROR if failed else logging.INFO
        fields = {"firing": firing.stamp, "submission": self._id(firing), "status": status, "exit_code": exit_code}
        seconds = round((now - firing.since).total_seconds(), 1)
        self._log("ended", level=level, **fields, seconds=seconds, attempt=firing.attempt)
        if failed and found:
            self._log("output", level=level, tail=self._jobs.log_tail(self._id(firing), _SHOWN_LINES))
        return after

    def _holds_its_lock(self, firing: Firing) -> bool:
        """Whether the run's lock is held. A new cluster does not know a job that is still running on the old one."""
        try:
            with RunDirectory(self._job(firing)).lock():
                return False
        except RunError:
            return True

    def _id(self, firing: Firing) -> str:
        again = f"-{firing.attempt}" if firing.attempt > 1 else ""
        return f"{self._schedule.name}-{firing.stamp}{again}"

    def _job(self, firing: Firing) -> JobConfig:
        job = self._load()
        source = job.source.model_copy(update={"known": self._base})
        sink = job.sink.model_copy(update={"uri": f"{self._base}/run={firing.stamp}"})
        return job.model_copy(update={"source": source, "sink": sink})

    def _repeat(self, step: Callable[[], float], ended: Callable[[], bool], *fatal: type[Exception]) -> None:
        failures = 0
        while not (self._clock.stopping or ended()):
            try:
                wait_s = step()
                failures = 0
            except fatal:
                raise
            except Exception as error:  # the head, the storage or the configuration may work again later
                wait_s = min(_BACKOFF_S * 2**failures, _LONGEST_BACKOFF_S)
                failures += 1
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                self._log("failed", level=logging.ERROR, error=reason, again_in_s=wait_s)
            self._clock.sleep(wait_s)

    def _log(self, name: str, *, level: int = logging.INFO, **fields: Any) -> None:
        logs.event(LOG, name, level=level, schedule=self._schedule.name, **fields)
