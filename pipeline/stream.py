"""Frames from decode tasks: processes of their own, which may crash, hang or fail without harming their reader."""

import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

import ray

from pipeline.config import Frames, JobConfig
from pipeline.decode import FrameBatch
from pipeline.decode_tasks import Whole, decode_stream, decode_whole
from pipeline.errors import UnitError
from pipeline.frames import Sizing, most_frames
from pipeline.priority import wake_nobody

_AHEAD = 2  # batches that wait for their reader


class FrameStreams:
    """Opens the streams of one reader, which share their settings and a pool of threads."""

    def __init__(self, job: JobConfig, sizing: Sizing) -> None:
        self.timeout_s, self.tries = job.decode.timeout_s, job.decode.max_retries + 1
        self._settings = pickle.dumps((job.clips, job.frames, job.decode, job.storage, sizing))
        self._frames = job.frames
        resources = {"num_cpus": job.decode.num_cpus, "max_retries": job.decode.max_retries}
        self._whole = decode_whole.options(**resources)
        self._stream = decode_stream.options(
            **resources,
            num_returns="streaming",
            # Beside those that wait: the decoder works while the model does, and frames never pile up.
            _generator_backpressure_num_objects=1,
        )
        threads = 2 * (job.ray.actors.batch_units + job.decode.prefetch_units + 1)  # half of them may be about to end
        self._threads = ThreadPoolExecutor(threads, "frames", initializer=wake_nobody)

    def open(self, unit: dict[str, Any]) -> "FrameStream":
        """Start to decode a unit."""
        return FrameStream(self, unit)

    def look(self, streams: Iterable["FrameStream"]) -> None:
        """Note which of these are there: of all that come whole, Ray is asked at once."""
        open_ = {stream.whole: stream for stream in streams if stream.whole is not None and not stream.running}
        there = ray.wait(list(open_), num_returns=len(open_), timeout=0)[0] if open_ else []
        for ref in there:
            open_.pop(ref).running = True
        for stream in open_.values():
            stream.again_if_late()

    def whole(self, unit: dict[str, Any]) -> ray.ObjectRef | None:
        """Submit the unit's `decode_whole`; None where several batches may come, one by one as they are made."""
        return self._whole.remote(unit, self._settings) if is_one_batch(unit, self._frames) else None

    def stream(self, unit: dict[str, Any]) -> ray.ObjectRefGenerator:
        """Submit the unit's `decode_stream`."""
        refs: ray.ObjectRefGenerator = self._stream.remote(unit, self._settings)
        return refs

    def background(self, call: Callable[[], None]) -> None:
        """Call it in a thread of the pool."""
        self._threads.submit(call)


def is_one_batch(unit: dict[str, Any], frames: Frames) -> bool:
    """Whether a unit has one frame batch at most, as short clips and single images have."""
    if unit["kind"] == "images":
        return len(unit["uris"]) == 1
    return most_frames(unit["start_s"], unit["end_s"], frames) <= frames.batch_frames


class FrameStream:
    """A running decode task, read batch by batch; its crash, hang or failure is raised as a `UnitError`.

    Reading never waits: None says that the next batch is not there yet. Of a unit that does not come whole, a thread
    asks Ray for what comes while the reader is busy. It opens no batch, though: what a batch does to this process
    happens once its unit is read.

    queue_s   time from the first look until the task had a CPU and a process
    running   whether it is known to have them, also when it is through; a unit that comes whole is known to then
    """

    def __init__(self, streams: FrameStreams, unit: dict[str, Any]) -> None:
        self.queue_s = 0.0
        self.running = False
        self._running_at = 0.0
        self._streams = streams
        self._unit = unit
        self._asked_at = time.perf_counter()
        self.whole = streams.whole(unit)
        self._there: SimpleQueue[ray.ObjectRef | UnitError | None] = SimpleQueue()  # None: that was the last
        self._room = threading.Semaphore(_AHEAD)
        self._refs: ray.ObjectRefGenerator | None = None
        self._closed = False
        if self.whole is None:
            streams.background(self._fetch)

    def __iter__(self) -> Iterator[FrameBatch | None]:
        began = time.perf_counter()
        while self.whole is not None:
            self._streams.look([self])
            if self.running:
                yield from self._at_once(self.whole, began)
                return
            yield None
        while True:
            try:
                found = self._there.get_nowait()
            except Empty:
                yield None
                continue
            self.queue_s = max(0.0, self._running_at - began)
            if found is None:
                return
            if isinstance(found, UnitError):
                raise found
            self._room.release()
            yield _batch(self._got(found))

    @property
    def ready(self) -> bool:
        """Whether the next batch, or what ended them, is known to be there."""
        return self.running if self.whole is not None else not self._there.empty()

    def again_if_late(self) -> None:
        """Ask for a unit that has not come whole in time as a stream: that tells waiting for a CPU from hanging."""
        if time.perf_counter() - self._asked_at > self._streams.timeout_s:
            ray.cancel(self.whole, force=True)
            self.whole = None
            self._streams.background(self._fetch)

    def _at_once(self, ref: ray.ObjectRef, began: float) -> Iterator[FrameBatch]:
        there_at = time.perf_counter()
        whole: Whole = self._got(ref)
        self.whole = None
        self.queue_s = max(0.0, there_at - whole.took_s - began)
        for item in whole.items:
            yield _batch(item)

    def _got(self, ref: ray.ObjectRef) -> Any:
        try:
            return ray.get(ref)
        except ray.exceptions.RayError as error:
            raise self._crash(error) from None

    def close(self) -> None:
        """End the task, also one that hangs in native code."""
        self._closed = True
        self._room.release()
        for refs in (self.whole, self._refs):
            if refs is not None:
                ray.cancel(refs, force=True)

    def _fetch(self) -> None:
        """Put the unit's batches and what ended them where the reader finds them."""
        try:
            self._refs = self._streams.stream(self._unit)
            end = self._batches(self._refs)
        except ray.exceptions.RayError as error:
            end = self._crash(error)
        except Exception as error:
            end = UnitError("decode", type(error).__name__, str(error) or repr(error))
        self._refs = None  # to let go of them asks Ray, too
        self._there.put(end)

    def _batches(self, refs: ray.ObjectRefGenerator) -> UnitError | None:
        """Look for a batch whenever there is room; the error that ended them, None after the last."""
        while self._room.acquire() and not self._closed:
            # Waiting for a free CPU has no limit (the cluster may be growing); a running decoder has one.
            if self.running and not ray.wait([refs], timeout=self._streams.timeout_s)[0]:
                break
            try:
                item = next(refs)
            except StopIteration:
                return None
            if self.running:
                self._there.put(item)
                continue
            ray.get(item)  # raises what keeps the task from running
            self._running_at, self.running = time.perf_counter(), True
            self._room.release()
        ray.cancel(refs, force=True)
        return UnitError(
            "decode",
            "Timeout",
            f"expected a batch of frames within decode.timeout_s = {self._streams.timeout_s:g} s, got none",
        )

    def _crash(self, error: ray.exceptions.RayError) -> UnitError:
        tries = self._streams.tries
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return UnitError("decode", "OutOfMemory", f"the decoder ran out of memory, {tries} tries")
        if isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.ObjectLostError):
            return UnitError("decode", "DecoderCrashed", f"the decoding process died, {tries} tries")
        return UnitError("decode", type(error).__name__, (str(error).strip() or repr(error)).splitlines()[0])


def _batch(item: FrameBatch | UnitError) -> FrameBatch:
    if isinstance(item, UnitError):
        raise item
    return item
