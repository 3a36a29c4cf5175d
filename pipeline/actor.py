"""The model actor: a resident captioner, fed by frame streams. It may die at any moment; what it worked on is known."""

import faulthandler
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.actor import ActorHandle

from pipeline import logs
from pipeline.attempts import Turn
from pipeline.captioner import Captioner, Given
from pipeline.config import JobConfig
from pipeline.decode import FrameBatch
from pipeline.errors import UnitError
from pipeline.metrics import ActorMetrics
from pipeline.samples import Sampling
from pipeline.schema import rows_table
from pipeline.stream import FrameStream

_LOG = logging.getLogger(__name__)
_NOT_YET = Turn(go=False)


@dataclass
class _InModel:
    """A unit that the captioner has taken; its turn is asked for when it takes the first frames."""

    unit: dict[str, Any]
    stream: FrameStream
    turn: Turn = _NOT_YET
    started: datetime | None = None


class CaptionActor:
    """What Ray Data keeps alive: takes blocks of units, gives blocks of rows, one row per unit.

    Only a unit that `attempts` lets pass enters the model; while the job drains, units give no row and stay open. A
    unit that was in the model when a process ended has the next one to itself: so the one that ends processes is told
    from those that were beside it.
    """

    def __init__(self, job: JobConfig, run_id: str, attempts: ActorHandle, sampling: Sampling | None = None) -> None:
        self._job = job
        self._sampling = sampling
        self._attempts = attempts
        self._draining = False  # for good, once a turn has said so
        self._metrics = ActorMetrics(run_id)
        self._logs = ExitStack()  # open as long as this process
        context = ray.get_runtime_context()
        self._id = context.get_actor_id()
        folder = Path(context.get_temp_dir(), context.get_session_name(), "logs")
        self._logs.enter_context(logs.to_folder(folder, f"actor-{os.getpid()}", run=run_id, actor=self._id))
        ray.get(attempts.loading.remote(self._id))
        began = time.perf_counter()
        self._captioner = self._load(run_id)
        attempts.loaded.remote(self._id)
        load_s = round(time.perf_counter() - began, 3)
        threads = torch.get_num_threads()
        logs.event(_LOG, "actor started", model=job.model.name, load_s=load_s, pid=os.getpid(), threads=threads)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        units = batch.to_pylist()
        begun = ray.get(self._attempts.begun.remote([unit["id"] for unit in units]))
        # Suspects first: what ends this process then takes the least with it.
        units.sort(key=lambda unit: -begun.get(unit["id"], 0))
        in_model: dict[str, _InModel] = {}
        with _Watch(self._job.model.timeout_s) as watch:
            try:
                for row in self._captioner.rows(self._given(units, begun, in_model), watch.beat):
                    done = in_model.pop(row["id"])
                    done.stream.close()
                    if not done.turn.draining:
                        watch.pause()  # whoever takes the rows may be busy
                        yield rows_table([self._told(row, done)])
            except torch.AcceleratorError:
                # The device is lost to this process: a new one gets the units, as after any other death.
                _LOG.exception("the device failed on units %s", sorted(in_model))
                os._exit(1)
        self._metrics.streams(asked=0, running=0)
        yield rows_table([])

    def _given(
        self, units: list[dict[str, Any]], begun: dict[str, int], in_model: dict[str, _InModel]
    ) -> Iterator[Given]:
        """Units as the captioner has room for them, the next ones' frames being decoded already."""
        waiting = deque(units)
        ahead: deque[_InModel] = deque()
        while waiting or ahead:
            while waiting and len(ahead) <= self._job.decode.prefetch_units:
                unit = waiting.popleft()
                ahead.append(_InModel(unit, self._open(unit)))
            streams = [one.stream for one in (*ahead, *in_model.values())]
            self._metrics.streams(asked=len(streams), running=sum(stream.running() for stream in streams))
            if self._draining:
                break
            one = ahead.popleft()
            in_model[one.unit["id"]] = one
            yield Given(one.unit, self._frames(one), alone=one.unit["id"] in begun)
        for late in ahead:
            late.stream.close()

    def _frames(self, one: _InModel) -> Iterator[FrameBatch | None]:
        """A unit's frames, once it may enter the model."""
        one.started = datetime.now(UTC)
        one.turn = ray.get(self._attempts.start.remote(one.unit["id"]))
        if one.turn.draining:
            self._draining = True
            raise UnitError("generate", "Draining", "the job is about to end: this unit stays open")
        if not one.turn.go:
            raise self._given_up(one.turn)
        yield from one.stream

    def _told(self, row: dict[str, Any], done: _InModel) -> dict[str, Any]:
        """The row with what the actor knows; counters, metrics and logs hear of it."""
        now = datetime.now(UTC)
        row |= {
            "attempts": done.unit["attempts"] + done.turn.attempt,
            "queue_s": min(done.stream.queue_s, row["wait_s"]),
            "actor": self._id,
            "started_at": done.started or now,
            "finished_at": now,
        }
        self._attempts.end.remote(row["id"], row["status"], tried=done.turn.go)
        if done.turn.attempt > int(done.turn.go):
            self._metrics.crashed_attempt()  # an earlier start of it ended with its process
        self._metrics.observe(row)
        logs.unit_ended(_LOG, done.unit, row)
        return row

    def _load(self, run_id: str) -> Captioner:
        return Captioner(self._job, run_id, self._sampling)

    def _open(self, unit: dict[str, Any]) -> FrameStream:
        return FrameStream(unit, self._job, self._captioner.sizing)

    def _given_up(self, turn: Turn) -> UnitError:
        return UnitError(
            "generate",
            "ModelCrashed",
            f"the model's process ended {turn.attempt} times while it worked on this unit: killed, out of memory, or "
            f"silent for model.timeout_s = {self._job.model.timeout_s:g} s; jobs.retry tries it again",
        )


class _Watch:
    """Ends this process when the model gives no sign for too long, even in native code."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._beaten = 0.0

    def __enter__(self) -> "_Watch":
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def beat(self) -> None:
        """A sign of life. The clock is set anew a few times per timeout at most: it takes a thread each time."""
        now = time.monotonic()
        if now - self._beaten > self._timeout_s / 8:
            faulthandler.dump_traceback_later(self._timeout_s, exit=True)
            self._beaten = now

    def pause(self) -> None:
        """Stop the clock until the next beat."""
        faulthandler.cancel_dump_traceback_later()
        self._beaten = 0.0
