"""The model actor: a resident captioner, fed by frame streams. It may die at any moment; what it worked on is known."""

import faulthandler
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.actor import ActorHandle

from pipeline import logs
from pipeline.attempts import Turn
from pipeline.captioner import Captioner
from pipeline.config import JobConfig
from pipeline.decode import FrameBatch
from pipeline.errors import UnitError
from pipeline.metrics import ActorMetrics
from pipeline.samples import Sampling
from pipeline.schema import rows_table
from pipeline.stream import FrameStream

_LOG = logging.getLogger(__name__)


class CaptionActor:
    """What Ray Data keeps alive: takes blocks of units, gives blocks of rows, one row per unit.

    Only a unit that `attempts` lets pass enters the model; while the job drains, units give no row and stay open.
    """

    def __init__(self, job: JobConfig, run_id: str, attempts: ActorHandle, sampling: Sampling | None = None) -> None:
        self._job = job
        self._sampling = sampling
        self._attempts = attempts
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
        waiting = deque(batch.to_pylist())
        streams: deque[tuple[dict[str, Any], FrameStream]] = deque()
        while waiting or streams:
            while waiting and len(streams) <= self._job.decode.prefetch_units:
                unit = waiting.popleft()
                streams.append((unit, self._open(unit)))
            self._metrics.streams(asked=len(streams), running=sum(stream.running() for _, stream in streams))
            unit, stream = streams.popleft()
            started = datetime.now(UTC)
            turn = ray.get(self._attempts.start.remote(unit["id"]))
            if turn.draining:
                for _, late in [(unit, stream), *streams]:
                    late.close()
                yield rows_table([])
                return
            row = self._row(unit, stream, turn)
            row |= {"queue_s": stream.queue_s, "actor": self._id}
            row |= {"started_at": started, "finished_at": datetime.now(UTC)}
            self._tell(unit, row, turn)
            yield rows_table([row])
        self._metrics.streams(asked=0, running=0)

    def _load(self, run_id: str) -> Captioner:
        return Captioner(self._job, run_id, self._sampling)

    def _open(self, unit: dict[str, Any]) -> FrameStream:
        return FrameStream(unit, self._job, self._captioner.sizing)

    def _tell(self, unit: dict[str, Any], row: dict[str, Any], turn: Turn) -> None:
        """Metrics and logs: what came of a unit, and that an earlier start of it ended with its process."""
        if turn.attempt > int(turn.go):
            self._metrics.crashed_attempt()
        self._metrics.observe(row)
        logs.unit_ended(_LOG, unit, row)

    def _row(self, unit: dict[str, Any], stream: FrameStream, turn: Turn) -> dict[str, Any]:
        unit = unit | {"attempts": unit["attempts"] + turn.attempt - 1}
        try:
            if turn.go:
                with _Watch(self._job.model.timeout_s) as watch:
                    row = self._captioner.row(unit, watch.over(stream))
            else:
                row = self._captioner.failed_row(unit, self._given_up(turn))
        except torch.AcceleratorError:
            # The device is lost to this process: a new one gets the unit, as after any other death.
            _LOG.exception("the device failed on unit %s", unit["id"])
            os._exit(1)
        finally:
            stream.close()
        self._attempts.end.remote(unit["id"], row["status"], tried=turn.go)
        return row

    def _given_up(self, turn: Turn) -> UnitError:
        return UnitError(
            "generate",
            "ModelCrashed",
            f"the model's process ended {turn.attempt} times while it worked on this unit: killed, out of memory, or "
            f"silent for model.timeout_s = {self._job.model.timeout_s:g} s; jobs.retry tries it again",
        )


class _Watch:
    """Ends this process when the model is silent for too long, even in native code; waiting for frames does not count.

    The decoders have a limit of their own, and waiting for a free CPU has none.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def __enter__(self) -> "_Watch":
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def over(self, batches: Iterable[FrameBatch]) -> Iterator[FrameBatch]:
        """The batches, with the clock stopped while the next one is awaited."""
        faulthandler.cancel_dump_traceback_later()
        for batch in batches:
            self._begin()
            yield batch
            faulthandler.cancel_dump_traceback_later()
        self._begin()

    def _begin(self) -> None:
        faulthandler.dump_traceback_later(self._timeout_s, exit=True)
