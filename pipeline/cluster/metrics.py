"""Exports a run's metrics to Prometheus through Ray: every node's metrics endpoint has them as `ray_lightkv_…`.

Properties of Ray's metrics (2.60) that this code works around:

- Counters are exact. A histogram's sum is built from the middles of its buckets. So seconds are counters, and the
  histogram serves only quantiles.
- A gauge vanishes two report intervals after it was set. So a thread sets it again.
- What a killed process had not reported yet (at most 10 s) is lost. The rows hold the exact figures.

Labels are bounded: run, status, stage and error type, never a unit. Ray adds node and process.
"""

import threading
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Self

from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.cluster.waits import REASONS, Wait

_BOUNDS_S = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
_REPEAT_S = 5.0


@dataclass(frozen=True)
class Spec:
    """Definition of one metric; every metric also has the label `run`."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    description: str
    labels: tuple[str, ...] = ()

    def exported(self) -> tuple[str, ...]:
        """The names of its Prometheus series."""
        name = f"ray_{self.name}"
        if self.kind == "counter":
            return (f"{name}_total",)
        if self.kind == "histogram":
            return (f"{name}_bucket", f"{name}_sum", f"{name}_count")
        return (name,)


UNITS = Spec("counter", "lightkv_units", "Units with a row", ("status",))
ERRORS = Spec("counter", "lightkv_errors", "Error rows", ("stage", "type"))
FRAMES = Spec("counter", "lightkv_frames", "Frames that entered the model")
VISION_TOKENS = Spec("counter", "lightkv_vision_tokens", "Vision tokens of answered units before compression")
KEPT_TOKENS = Spec("counter", "lightkv_kept_tokens", "Vision tokens of answered units in the last layers")
KV_BYTES = Spec("counter", "lightkv_kv_bytes", "KV cache bytes of answered units after prefill")
KV_BYTES_SAVED = Spec("counter", "lightkv_kv_bytes_saved", "KV cache bytes of answered units saved by compression")
ACTOR_SECONDS = Spec("counter", "lightkv_actor_seconds", "Time model actors spent on units, by stage", ("stage",))
DECODE_SECONDS = Spec("counter", "lightkv_decode_seconds", "Time decode tasks worked")
CRASHED_ATTEMPTS = Spec("counter", "lightkv_crashed_attempts", "Starts of units whose model actor died")
UNIT_SECONDS = Spec("histogram", "lightkv_unit_seconds", "Time per unit; the sum is not exact", ("stage",))
STREAMS = Spec("gauge", "lightkv_streams", "Decode streams of an actor: requested, or running", ("state",))
WAITING_SECONDS = Spec(
    "gauge", "lightkv_waiting_seconds", "How long a model actor has waited so far, else 0", ("reason",)
)
JOB_WAITING_SECONDS = Spec(
    "gauge", "lightkv_job_waiting_seconds", "How long the whole job has waited so far, else 0", ("reason",)
)
OPEN_UNITS = Spec("gauge", "lightkv_open_units", "Units of the run without a row")

SPECS = (
    UNITS,
    ERRORS,
    FRAMES,
    VISION_TOKENS,
    KEPT_TOKENS,
    KV_BYTES,
    KV_BYTES_SAVED,
    ACTOR_SECONDS,
    DECODE_SECONDS,
    CRASHED_ATTEMPTS,
    UNIT_SECONDS,
    STREAMS,
    WAITING_SECONDS,
    JOB_WAITING_SECONDS,
    OPEN_UNITS,
)
_DRIVER = (OPEN_UNITS, JOB_WAITING_SECONDS)
_ACTOR = tuple(spec for spec in SPECS if spec not in _DRIVER)
_METRICS = {
    "counter": Counter,
    "gauge": Gauge,
    "histogram": lambda name, text, labels: Histogram(name, text, _BOUNDS_S, labels),
}


class _Run:
    """The registered metrics of one process, labelled with its run; gauges are set again until `close`."""

    def __init__(self, run_id: str, specs: tuple[Spec, ...]) -> None:
        self._gauges: dict[tuple[Spec, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()  # gauges are set by several threads
        self._stop = threading.Event()
        self._metrics: dict[Spec, Any] = {
            spec: _METRICS[spec.kind](spec.name, spec.description, ("run", *spec.labels)).set_default_tags(
                {"run": run_id}
            )
            for spec in specs
        }
        threading.Thread(target=self._repeat, name="metrics", daemon=True).start()

    def count(self, spec: Spec, value: float | None, **labels: str) -> None:
        if value:
            self._metrics[spec].inc(value, labels)

    def observe(self, spec: Spec, value: float, **labels: str) -> None:
        self._metrics[spec].observe(value, labels)

    def set(self, spec: Spec, value: float, **labels: str) -> None:
        """Set a gauge: at once if it is new, else with the next repeat, which comes before Ray's next report."""
        key = (spec, tuple(labels.items()))
        if key not in self._gauges:
            self._metrics[spec].set(value, labels)
        with self._lock:
            self._gauges = {**self._gauges, key: value}

    def close(self) -> None:
        self._stop.set()

    def _repeat(self) -> None:
        while not self._stop.wait(_REPEAT_S):
            for (spec, labels), value in self._gauges.items():
                self._metrics[spec].set(value, dict(labels))


class ActorMetrics:
    """Metrics of one model actor. Create one per process and `observe` every row; a call takes far less than 1 ms."""

    def __init__(self, run_id: str) -> None:
        self._run = _Run(run_id, _ACTOR)
        self._waits_since: float | None = None
        self._covered_to: datetime | None = None  # end of the time that `_other` has counted
        self._unnamed_s = 0.0  # time with units in the model minus the time of named stages; may be negative

    def observe(self, row: dict[str, Any]) -> None:
        """Count one row (`ROW_SCHEMA`); call it in the order in which rows were finished."""
        run = self._run
        run.count(UNITS, 1, status=row["status"])
        if row["status"] == "error":
            run.count(ERRORS, 1, stage=row["error_stage"], type=row["error_type"])
        run.count(FRAMES, len(row["frame_times_s"] or ()))
        if row["kv_bytes"] is not None:
            run.count(VISION_TOKENS, row["vision_tokens"])
            run.count(KEPT_TOKENS, row["kept_tokens"])
            run.count(KV_BYTES, row["kv_bytes"])
            run.count(KV_BYTES_SAVED, max(row["kv_bytes_uncompressed"] - row["kv_bytes"], 0))
        run.count(DECODE_SECONDS, row["decode_s"])
        run.observe(UNIT_SECONDS, row["decode_s"] or 0.0, stage="decode")
        for stage, seconds in (actor_seconds(row) | {"other": self._other(row)}).items():
            run.count(ACTOR_SECONDS, seconds, stage=stage)
            run.observe(UNIT_SECONDS, seconds, stage=stage)

    def _other(self, row: dict[str, Any]) -> float:
        """Seconds with units in the model that belong to no named stage: tokenising, permissions, failed units."""
        begun = row["started_at"] if self._covered_to is None else max(row["started_at"], self._covered_to)
        self._covered_to = max(row["finished_at"], begun)
        self._unnamed_s += (self._covered_to - begun).total_seconds() - sum(actor_seconds(row).values())
        other = max(self._unnamed_s, 0.0)
        self._unnamed_s -= other
        return other

    def crashed_attempt(self) -> None:
        """Count an earlier start of a unit during which its model actor's process died."""
        self._run.count(CRASHED_ATTEMPTS, 1)

    def streams(self, *, asked: int, running: int) -> None:
        """Set how many decode streams this actor has requested, and how many of them are known to have started."""
        self._run.set(STREAMS, asked, state="asked")
        self._run.set(STREAMS, running, state="running")

    def waiting(self, reason: str | None) -> None:
        """Set what this actor waits for (a key of `waits.REASONS`); None: it computes."""
        now = time.monotonic()
        self._waits_since = None if reason is None else self._waits_since or now
        _set_waiting(self._run, WAITING_SECONDS, reason, now - (self._waits_since or now))


def _set_waiting(run: _Run, spec: Spec, reason: str | None, seconds: float) -> None:
    for name in REASONS:
        run.set(spec, seconds if name == reason else 0.0, reason=name)


class DriverMetrics:
    """Metrics of the driver, for a `with` block: open units, and what the whole job waits for."""

    def __init__(self, run_id: str) -> None:
        self._run = _Run(run_id, _DRIVER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._run.close()

    def open_units(self, count: int) -> None:
        """Set how many units have no row yet."""
        self._run.set(OPEN_UNITS, count)

    def waiting(self, wait: Wait | None) -> None:
        """Set what the whole job waits for."""
        if wait is not None and wait.all:
            _set_waiting(self._run, JOB_WAITING_SECONDS, wait.reason, wait.seconds)
        else:
            _set_waiting(self._run, JOB_WAITING_SECONDS, None, 0.0)


def actor_seconds(row: dict[str, Any]) -> dict[str, float]:
    """Seconds of its model actor that a unit took, by stage. While one unit waits, others may be in other stages.

    queue: until the decode task had a CPU and a process; wait: for the frames after that.
    """
    queue = row["queue_s"] or 0.0
    parts = {"queue": queue, "wait": max((row["wait_s"] or 0.0) - queue, 0.0)}
    return parts | {stage: row[f"{stage}_s"] or 0.0 for stage in ("encode", "prefill", "generate")}
