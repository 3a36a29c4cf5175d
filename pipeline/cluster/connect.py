"""Joins or starts a Ray cluster, starts the `Attempts` actor on it, and displays progress."""

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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import pipeline
from pipeline import logs
from pipeline.cluster.attempts import Attempts
from pipeline.cluster.metrics import DriverMetrics
from pipeline.cluster.waits import SHOWN_S, Wait, Waits
from pipeline.config import JobConfig
from pipeline.errors import RunError, StoppedError
from pipeline.run.directory import Work
from pipeline.run.summary import clock

_LOG = logging.getLogger(__name__)
_POLL_S = 2.0


def cluster_address(job: JobConfig) -> str | None:
    """The address of an existing cluster: the configured one, or the one this job was submitted to. None: start one."""
    return job.ray.address or os.environ.get("RAY_ADDRESS")


@contextmanager
def connect(job: JobConfig) -> Iterator[None]:
    """Connect to a cluster for the block: the configured one, the one this job was submitted to, or a new local one."""
    address = cluster_address(job)
    # Ray prefixes what workers print, so it would not be JSON.
    options: dict[str, object] = {"log_to_driver": job.run.log_format == "text", "logging_level": logging.WARNING}
    if address:
        options["address"] = address
        source = Path(pipeline.__path__[0]).parent
        # Without a submitted working_dir and without an installation (an image has one), send the code along.
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ and (source / "pyproject.toml").exists():
            options["runtime_env"] = {"working_dir": str(source)}
    else:
        options |= {
            "address": "local",
            "num_cpus": job.ray.num_cpus,
            "object_store_memory": job.ray.object_store_bytes,
            "include_dashboard": False,
        }
    try:
        ray.init(**options)
    except SystemExit:  # Ray raises it on a SIGTERM while it starts
        raise StoppedError("the job was asked to end") from None
    except Exception as error:  # Ray raises plain exceptions, e.g. when a node starts too slowly on a busy machine
        reason = " ".join(str(error).split())[:300]
        what = f"reached at {address}" if address else "started"
        raise RunError(f"Ray cannot be {what}: {reason}; run the same command again") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def attempts_of(job: JobConfig, work: Work) -> Iterator[ActorHandle]:
    """Start the actor that counts starts of the units of `work`, on the driver's node: the run ends with the driver."""
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    handle = actor.options(scheduling_strategy=here).remote(work.attempts, job.storage, job.run)
    ray.get(handle.state.remote())
    yield handle
    fault = ray.get(handle.state.remote())["fault"]
    if fault is not None:
        raise RunError(fault)


def gpus_of_actor(job: JobConfig) -> float:
    """GPUs per model actor."""
    if job.ray.actors.num_gpus is not None:
        return job.ray.actors.num_gpus
    if job.model.device != "auto":
        return 0.0 if job.model.device == "cpu" else 1.0
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def actor_fits(job: JobConfig) -> bool:
    """Whether some live node has the resources of a model actor, in use or not."""
    wanted = {"GPU": gpus_of_actor(job), "CPU": job.ray.actors.num_cpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(node.get(name, 0.0) >= count for name, count in wanted.items()) for node in nodes)


@contextmanager
def progress_display(job: JobConfig, work: Work, attempts: ActorHandle, total: int, done_before: int) -> Iterator[None]:
    """Show progress (one updated line in a terminal, one line per interval in a log), and set the driver's metrics.

    Ends the job once it has stalled (`run.stall_s`).
    """
    stop = threading.Event()
    display = _Display(total, done_before, job.run.log_format)
    interval_s = min(job.run.progress_interval_s, 1.0) if display.terminal else job.run.progress_interval_s

    poll_s = min(interval_s, _POLL_S, job.run.stall_s / 4)
    waits = Waits(time.monotonic(), total - done_before, job.model.timeout_s)

    def watch() -> None:
        shown_at = time.monotonic()
        with DriverMetrics(work.run_id) as metrics:
            metrics.open_units(total - done_before)
            while not stop.wait(poll_s):
                now = time.monotonic()
                try:
                    state = ray.get(attempts.state.remote(), timeout=_POLL_S)
                    wait = waits.see(now, state, actor_fits(job))
                    if wait is not None and wait.all and wait.seconds > job.run.stall_s:
                        attempts.stall.remote(
                            f"the job has stalled: {wait} (run.stall_s is {job.run.stall_s:g} s); "
                            "run the same command again to continue"
                        )
                except ray.exceptions.RayError:  # the display must never end a job
                    continue
                metrics.open_units(total - done_before - sum(state["units"].values()))
                metrics.waiting(wait)
                if now - shown_at >= interval_s:
                    shown_at = now
                    display.show(state["units"], wait if wait is not None and wait.seconds > SHOWN_S else None)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        display.end()


class _Display:
    def __init__(self, total: int, done_before: int, log_format: str) -> None:
        self.terminal = sys.stderr.isatty() and log_format == "text"
        self._json = log_format == "json"
        self._total = total
        self._before = done_before
        self._started = time.monotonic()

    def show(self, units: dict[str, int], wait: Wait | None = None) -> None:
        now = sum(units.values())
        elapsed_s = time.monotonic() - self._started
        per_hour = 3600 * now / elapsed_s
        left_s = (self._total - self._before - now) / now * elapsed_s if now else None
        if self._json:
            told: dict[str, Any] = {}
            if wait is not None:
                told = {"waits_for": wait.reason, "waits_s": round(wait.seconds), "all_wait": wait.all}
            done, per_hour = self._before + now, round(per_hour)
            logs.event(_LOG, "progress", units=units, done=done, total=self._total, per_hour=per_hour, **told)
            return
        counts = " ".join(f"{status} {count}" for status, count in sorted(units.items()))
        done = self._before + now
        share = done / self._total if self._total else 1.0
        left = "?" if left_s is None else clock(left_s)
        line = f"{done:,}/{self._total:,} units ({share:.0%})  {counts or 'starting'}  {per_hour:,.0f}/h  left {left}"
        line += "" if wait is None else f"  {wait}"
        if self.terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{clock(elapsed_s)}  {line}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
