"""The model actor: a resident captioner fed by decode tasks that may crash, hang or fail without harming it."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from pipeline.captioner import Captioner
from pipeline.config import Decode, Frames, JobConfig, Storage
from pipeline.decode import FrameBatch, decode_unit
from pipeline.errors import UnitError
from pipeline.frames import Sizing
from pipeline.schema import rows_table


@ray.remote
def decode_task(
    unit: dict[str, Any], frames: Frames, decode: Decode, storage: Storage, sizing: Sizing
) -> Iterator[FrameBatch | UnitError | None]:
    """One unit's frame batches as a stream: None once the task runs, then batches, or the error that ended them."""
    yield None
    try:
        yield from decode_unit(unit, frames=frames, decode=decode, storage=storage, sizing=sizing)
    except UnitError as error:
        yield error
    except Exception as error:
        yield UnitError("decode", type(error).__name__, str(error) or repr(error))


class FrameStream:
    """A running decode task, read batch by batch; its crash, hang or failure is raised as a `UnitError`."""

    def __init__(self, unit: dict[str, Any], job: JobConfig, sizing: Sizing) -> None:
        self._decode = job.decode
        self._refs = decode_task.options(
            num_cpus=job.decode.num_cpus,
            max_retries=job.decode.max_retries,
            num_returns="streaming",
            # Two batches ahead: the decoder works while the model does, and frames never pile up.
            _generator_backpressure_num_objects=2,
        ).remote(unit, job.frames, job.decode, job.storage, sizing)

    def __iter__(self) -> Iterator[FrameBatch]:
        running = False
        while True:
            # Waiting for a free CPU has no limit (the cluster may be growing); a running decoder has one.
            ready, _ = ray.wait([self._refs], timeout=self._decode.timeout_s if running else None)
            if not ready:
                self.close()
                raise UnitError(
                    "decode",
                    "Timeout",
                    f"expected a batch of frames within decode.timeout_s = {self._decode.timeout_s:g} s, got none",
                )
            try:
                item = ray.get(next(self._refs))
            except StopIteration:
                return
            except ray.exceptions.RayError as error:
                raise self._crash(error) from None
            if isinstance(item, UnitError):
                raise item
            if item is None:
                running = True
            else:
                yield item

    def close(self) -> None:
        """End the task, also one that hangs in native code."""
        ray.cancel(self._refs, force=True)

    def _crash(self, error: ray.exceptions.RayError) -> UnitError:
        tries = self._decode.max_retries + 1
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return UnitError("decode", "OutOfMemory", f"the decoder ran out of memory, {tries} tries")
        if isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.ObjectLostError):
            return UnitError("decode", "DecoderCrashed", f"the decoding process died, {tries} tries")
        return UnitError("decode", type(error).__name__, str(error).strip().splitlines()[0])


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
