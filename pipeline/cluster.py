"""Joining or starting a Ray cluster, and the progress display."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

import pipeline
from pipeline.config import JobConfig
from pipeline.summary import clock


def cluster_address(job: JobConfig) -> str | None:
    """The cluster that is there: the configured one, or the one this job was submitted to; None: start a local one."""
    return job.ray.address or os.environ.get("RAY_ADDRESS")


@contextmanager
def connect(job: JobConfig) -> Iterator[None]:
    """A cluster for the block: the one this job was submitted to, the configured one, or a local one."""
    address = cluster_address(job)
    options: dict[str, object] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if address:
        options["address"] = address
        source = Path(pipeline.__path__[0]).parent
        # Neither submitted with its code nor installed, as it is on nodes of an image: bring the code along.
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ and (source / "pyproject.toml").exists():
            options["runtime_env"] = {"working_dir": str(source)}
    else:
        options |= {
            "address": "local",
            "num_cpus": job.ray.num_cpus,
            "object_store_memory": job.ray.object_store_bytes,
            "include_dashboard": False,
        }
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def progress_display(job: JobConfig, total: int, done_before: int) -> Iterator[ActorHandle]:
    """A line that is kept up to date in a terminal, and a line per interval in a log; yields the counting actor."""
    actor: Any = ray.remote(num_cpus=0)(Progress)
    counter = actor.remote()
    ray.get(counter.state.remote())
    stop = threading.Event()
    display = _Display(total, done_before)
    interval_s = min(job.run.progress_interval_s, 1.0) if display.terminal else job.run.progress_interval_s

    def watch() -> None:
        while not stop.wait(interval_s):
            try:
                display.show(ray.get(counter.state.remote(), timeout=interval_s))
            except ray.exceptions.RayError:  # a display never ends a job
                continue

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield counter
    finally:
        stop.set()
        thread.join()
        display.end()


class Progress:
    """Counts finished units while the job runs. Only a display: what is true stands in the rows."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._errors: dict[str, int] = {}
        self._frames = 0

    def add(self, status: str, frames: int, error_type: str | None) -> None:
        """Count one unit."""
        self._counts[status] = self._counts.get(status, 0) + 1
        self._frames += frames
        if error_type is not None:
            self._errors[error_type] = self._errors.get(error_type, 0) + 1

    def state(self) -> dict[str, Any]:
        """Counts so far."""
        return {"units": dict(self._counts), "frames": self._frames, "errors": dict(self._errors)}


class _Display:
    def __init__(self, total: int, done_before: int) -> None:
        self.terminal = sys.stderr.isatty()
        self._total = total
        self._before = done_before
        self._started = time.monotonic()

    def show(self, state: dict[str, dict[str, int]]) -> None:
        now = sum(state["units"].values())
        elapsed_s = time.monotonic() - self._started
        per_hour = 3600 * now / elapsed_s
        left_s = (self._total - self._before - now) / now * elapsed_s if now else None
        counts = " ".join(f"{status} {count}" for status, count in sorted(state["units"].items()))
        done = self._before + now
        share = done / self._total if self._total else 1.0
        left = "?" if left_s is None else clock(left_s)
        line = f"{done:,}/{self._total:,} units ({share:.0%})  {counts or 'starting'}  {per_hour:,.0f}/h  left {left}"
        if self.terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{clock(elapsed_s)}  {line}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
