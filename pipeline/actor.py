"""The model actor: a resident captioner, fed by frame streams."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from ray.actor import ActorHandle

from pipeline.captioner import Captioner
from pipeline.config import JobConfig
from pipeline.schema import rows_table
from pipeline.stream import FrameStream


class CaptionActor:
    """What Ray Data keeps alive: takes blocks of units, gives blocks of rows, one row per unit."""

    def __init__(self, job: JobConfig, run_id: str, progress: ActorHandle) -> None:
        self._job = job
        self._progress = progress
        self._captioner = Captioner(job, run_id)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        waiting = deque(batch.to_pylist())
        streams: deque[tuple[dict[str, Any], FrameStream]] = deque()
        while waiting or streams:
            while waiting and len(streams) <= self._job.decode.prefetch_units:
                unit = waiting.popleft()
                streams.append((unit, FrameStream(unit, self._job, self._captioner.sizing)))
            unit, stream = streams.popleft()
            row = self._captioner.row(unit, stream)
            stream.close()
            self._progress.add.remote(row["status"], len(row["frame_times_s"]), row["error_type"])
            yield rows_table([row])
