"""Frames from decode tasks: processes of their own, which may crash, hang or fail without harming their reader.

Imports no torch, so that a decoding process starts in a moment.
"""

import time
from collections.abc import Iterator
from typing import Any

import ray

from pipeline.config import Clips, Decode, Frames, JobConfig, Storage
from pipeline.decode import FrameBatch, decode_unit
from pipeline.errors import SkippedError, UnitError
from pipeline.frames import Sizing


@ray.remote
def decode_task(
    unit: dict[str, Any], clips: Clips, frames: Frames, decode: Decode, storage: Storage, sizing: Sizing
) -> Iterator[FrameBatch | UnitError | None]:
    """One unit's frame batches as a stream: None once the task runs, then batches, or the error that ended them."""
    yield None
    try:
        check_length(unit, clips)
        yield from decode_unit(unit, frames=frames, decode=decode, storage=storage, sizing=sizing)
    except UnitError as error:
        yield error
    except Exception as error:
        yield UnitError("decode", type(error).__name__, str(error) or repr(error))


def check_length(unit: dict[str, Any], clips: Clips) -> None:
    """Raise `SkippedError` for a unit whose known length is outside the configured limits."""
    end_s = unit["duration_s"] if unit["end_s"] is None else unit["end_s"]
    if end_s is None:
        return
    length_s = end_s - (unit["start_s"] or 0.0)
    if clips.skip_shorter_s is not None and length_s < clips.skip_shorter_s:
        raise SkippedError("plan", "TooShort", f"{length_s:g} s long, clips.skip_shorter_s is {clips.skip_shorter_s:g}")
    if clips.skip_longer_s is not None and length_s > clips.skip_longer_s:
        raise SkippedError("plan", "TooLong", f"{length_s:g} s long, clips.skip_longer_s is {clips.skip_longer_s:g}")


class FrameStream:
    """A running decode task, read batch by batch; its crash, hang or failure is raised as a `UnitError`.

    Reading never waits: None says that the next batch is not there yet.

    queue_s   time from the first look until the task had a CPU and a process
    """

    def __init__(self, unit: dict[str, Any], job: JobConfig, sizing: Sizing) -> None:
        self.queue_s = 0.0
        self._decode = job.decode
        self._refs = decode_task.options(
            num_cpus=job.decode.num_cpus,
            max_retries=job.decode.max_retries,
            num_returns="streaming",
            # Two batches ahead: the decoder works while the model does, and frames never pile up.
            _generator_backpressure_num_objects=2,
        ).remote(unit, job.clips, job.frames, job.decode, job.storage, sizing)

    def __iter__(self) -> Iterator[FrameBatch | None]:
        running = False
        began = since = time.perf_counter()
        while True:
            ready, _ = ray.wait([self._refs], timeout=0)
            if not ready:
                # Waiting for a free CPU has no limit (the cluster may be growing); a running decoder has one.
                if running and time.perf_counter() - since > self._decode.timeout_s:
                    self.close()
                    raise UnitError(
                        "decode",
                        "Timeout",
                        f"expected a batch of frames within decode.timeout_s = {self._decode.timeout_s:g} s, got none",
                    )
                yield None
                continue
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
                self.queue_s = time.perf_counter() - began
            else:
                yield item
            since = time.perf_counter()

    def running(self) -> bool:
        """Whether the task got its CPU, also when it is through; to be asked before reading only."""
        ready, _ = ray.wait([self._refs], timeout=0)
        return bool(ready)

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
