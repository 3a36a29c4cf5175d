"""What a run tells Prometheus, through Ray: the metrics endpoint of every node carries it as `ray_lightkv_…`.

Facts about Ray's metrics (2.60) that shaped this: counters are exact; the sum of a histogram is made of the middles of
its buckets, so seconds are counters and the histogram serves quantiles alone; a gauge fades two report intervals after
it was set, so a thread sets it again; what a killed process had not reported yet (10 s at most) is lost. The truth
stands in the rows. Labels are bounded: run, status, stage and error type, never a unit; Ray adds node and process.
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
    """One metric as it is registered; every one has the label `run`, too."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    description: str
    labels: tuple[str, ...] = ()

    def exported(self) -> tuple[str, ...]:
        """The names of its series in Prometheus."""
        name = f"ray_{self.name}"
        if self.kind == "counter":
            return (f"{name}_total",)
        if self.kind == "histogram":
            return (f"{name}_bucket", f"{name}_sum", f"{name}_count")
        return (name,)


UNITS = Spec("counter", "lightkv_units", "Units that have their row", ("status",))
ERRORS = Spec("counter", "lightkv_errors", "Error rows", ("stage", "type"))
FRAMES = Spec("counter", "lightkv_frames", "Frames that entered the model")
VISION_TOKENS = Spec("counter", "lightkv_vision_tokens", "Vision tokens before compression, answered units")
KEPT_TOKENS = Spec("counter", "lightkv_kept_tokens", "Vision tokens in the last layers, answered units")
KV_BYTES = Spec("counter", "lightkv_kv_bytes", "KV cache at the end of prefill, answered units")
KV_BYTES_SAVED = Spec("counter", "lightkv_kv_bytes_saved", "KV cache that compression spared, answered units")
ACTOR_SECONDS = Spec("counter", "lightkv_actor_seconds", "Time of model actors on units; stages add up", ("stage",))
DECODE_SECONDS = Spec("counter", "lightkv_decode_seconds", "Time decoders worked, beside the model actors")
CRASHED_ATTEMPTS = Spec("counter", "lightkv_crashed_attempts", "Starts of units that ended with their model actor")
UNIT_SECONDS = Spec("histogram", "lightkv_unit_seconds", "Time per unit; the sum is not exact", ("stage",))
STREAMS = Spec("gauge", "lightkv_streams", "Decode streams of an actor: asked for, or running", ("state",))
WAITING_SECONDS = Spec(
    "gauge", "lightkv_waiting_seconds", "How long a model actor has waited by now, 0: not", ("reason",)
)
JOB_WAITING_SECONDS = Spec(
    "gauge", "lightkv_job_waiting_seconds", "How long the whole job has waited by now", ("reason",)
)
OPEN_UNITS = Spec("gauge", "lightkv_open_units", "Units of the run that have no row yet")

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
    """Registered metrics of one process, labelled with its run; gauges are set again until `close`."""

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
        """At once where it is new, else with the next repeat, which is before Ray reports."""
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
    """What one model actor tells: create one per process, `observe` every row; a call costs far less than 1 ms."""

    def __init__(self, run_id: str) -> None:
        self._run = _Run(run_id, _ACTOR)
        self._waits_since: float | None = None
        self._covered_to: datetime | None = None  # up to here units were in the model
        self._unnamed_s = 0.0  # time with units in the model that no stage has named; negative: named beforehand

    def observe(self, row: dict[str, Any]) -> None:
        """Count one row (`ROW_SCHEMA`), in the order in which they were finished."""
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
        """What no stage names of the time in which units were in the model: tokenising, turns, units that failed."""
        begun = row["started_at"] if self._covered_to is None else max(row["started_at"], self._covered_to)
        self._covered_to = max(row["finished_at"], begun)
        self._unnamed_s += (self._covered_to - begun).total_seconds() - sum(actor_seconds(row).values())
        other = max(self._unnamed_s, 0.0)
        self._unnamed_s -= other
        return other

    def crashed_attempt(self) -> None:
        """Count an earlier start of a unit that ended with the process of its model actor."""
        self._run.count(CRASHED_ATTEMPTS, 1)

    def streams(self, *, asked: int, running: int) -> None:
        """How many decode streams this actor asked for, and how many of them are known to run, or ended."""
        self._run.set(STREAMS, asked, state="asked")
        self._run.set(STREAMS, running, state="running")

    def waiting(self, reason: str | None) -> None:
        """What this actor waits for (of `waits.REASONS`), None: it computes."""
        now = time.monotonic()
        self._waits_since = None if reason is None else self._waits_since or now
        _set_waiting(self._run, WAITING_SECONDS, reason, now - (self._waits_since or now))


def _set_waiting(run: _Run, spec: Spec, reason: str | None, seconds: float) -> None:
    for name in REASONS:
        run.set(spec, seconds if name == reason else 0.0, reason=name)


class DriverMetrics:
    """What the driver tells for a `with` block: how much there is left to do."""

    def __init__(self, run_id: str) -> None:
        self._run = _Run(run_id, _DRIVER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._run.close()

    def open_units(self, count: int) -> None:
        """How many units have no row yet."""
        self._run.set(OPEN_UNITS, count)

    def waiting(self, wait: Wait | None) -> None:
        """What the whole job waits for."""
        if wait is not None and wait.all:
            _set_waiting(self._run, JOB_WAITING_SECONDS, wait.reason, wait.seconds)
        else:
            _set_waiting(self._run, JOB_WAITING_SECONDS, None, 0.0)


def actor_seconds(row: dict[str, Any]) -> dict[str, float]:
    """Time of its actor that a unit took by stage; while one waits or is decoded, others may be in other stages.

    queue: the model waited for a CPU and a process to decode in; wait: for the frames themselves.
    """
    queue = row["queue_s"] or 0.0
    parts = {"queue": queue, "wait": max((row["wait_s"] or 0.0) - queue, 0.0)}
    return parts | {stage: row[f"{stage}_s"] or 0.0 for stage in ("encode", "prefill", "generate")}
