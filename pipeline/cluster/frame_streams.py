"""Reads frames from decode tasks. A task runs in a process of its own and may crash, hang or fail; the reader goes on.

Reading never blocks: the reader takes frames of whichever unit has some. `decode_tasks` explains why every unit gets a
CPU to be decoded on.
"""

import pickle
import time
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Any

import ray

from pipeline.cluster.decode_tasks import AHEAD, ReadCounts, decode_stream
from pipeline.config import JobConfig
from pipeline.decoding.decode import FrameBatch
from pipeline.decoding.frames import Sizing
from pipeline.errors import UnitError

_LOOK_EVERY_S = 0.001  # shortest time between two calls of `ray.wait`


class FrameStreams:
    """Opens the streams of one reader, and polls all of them with one call to Ray."""

    def __init__(self, job: JobConfig, sizing: Sizing) -> None:
        self.timeout_s, self.tries = job.decode.timeout_s, job.decode.max_retries + 1
        self._settings = pickle.dumps((job.clips, job.frames, job.decode, job.storage, sizing))
        self._task = decode_stream.options(
            num_cpus=job.decode.num_cpus, max_retries=job.decode.max_retries, num_returns="streaming"
        )
        streams = job.ray.actors.batch_units + job.decode.prefetch_units + 1
        counter: Any = ray.remote(ReadCounts).options(num_cpus=0, max_concurrency=100 + 4 * streams)
        self.counts = counter.remote()
        self._names = map(str, count())
        self._open: dict[str, FrameStream] = {}
        self._looked_at = 0.0

    def open(self, unit: dict[str, Any], refusal: UnitError | None = None) -> "FrameStream":
        """Request a unit's frames. With `refusal` no task is started, and reading raises `refusal`."""
        name = next(self._names)
        refs = None if refusal is not None else self._task.remote(unit, self._settings, name, self.counts)
        stream = FrameStream(self, name, refs, refusal)
        self._open[name] = stream
        return stream

    def look(self) -> None:
        """Collect the messages that have arrived, and end decode tasks that take too long."""
        now = time.perf_counter()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = now
        asked = {stream.refs: stream for stream in self._open.values() if stream.refs is not None}
        ready = ray.wait(list(asked), num_returns=len(asked), timeout=0)[0] if asked else []
        for refs in ready:
            asked.pop(refs).take()
        for stream in asked.values():
            stream.end_if_late(now)

    def closed(self, stream: "FrameStream") -> None:
        """Forget a stream that is not read any more."""
        self._open.pop(stream.name, None)

    @property
    def asked(self) -> int:
        """Number of open streams."""
        return len(self._open)

    @property
    def running(self) -> int:
        """Number of open streams whose decode tasks have, or had, a CPU and a process."""
        return sum(stream.running for stream in list(self._open.values()))  # a copy: called from other threads, too


class FrameStream:
    """The frame batches of one unit. A crash, hang or failure of its decode task is raised as a `UnitError`.

    Iterating yields None while the next batch is not ready.

    queue_s   seconds from the first read until the decode task had a CPU and a process
    running   whether the decode task is known to have started
    refs      the decode task's messages; None once the last one has arrived
    """

    def __init__(
        self, streams: FrameStreams, name: str, refs: "ray.ObjectRefGenerator | None", refusal: UnitError | None = None
    ) -> None:
        self.name, self.refs = name, refs
        self.queue_s = 0.0
        self._streams = streams
        self._running_at: float | None = None
        self._busy_since = 0.0  # when the decode task last could go on
        self._came = self._read = self._told = 0  # messages that arrived, that were read, that the task knows were read
        # Arrived and not read yet: messages, the error that ended the stream, or None for its regular end.
        self._found: deque[ray.ObjectRef | UnitError | None] = deque([] if refusal is None else [refusal])

    def __iter__(self) -> Iterator[FrameBatch | None]:
        began = time.perf_counter()
        while True:
            if not self._found:
                self._streams.look()
            if not self._found:
                yield None
                continue
            if self._running_at is not None:
                self.queue_s = max(0.0, self._running_at - began)
            found = self._found.popleft()
            if found is None:
                return
            if isinstance(found, UnitError):
                raise found
            message = self._got(found)
            del found  # so that Ray frees the batch
            self._read += 1
            self._busy_since = time.perf_counter()
            self._tell()
            if isinstance(message, UnitError):
                raise message
            yield from message

    @property
    def ready(self) -> bool:
        """Whether the next batch, or the end of the stream, is known to have arrived."""
        return bool(self._found)

    @property
    def running(self) -> bool:
        return self._running_at is not None

    def take(self) -> None:
        """Take over the next message, which has arrived."""
        assert self.refs is not None
        try:
            message = next(self.refs)
            if self._running_at is None:
                ray.get(message)  # the first message says that the task runs, or raises why it cannot
                self._running_at = self._busy_since = time.perf_counter()
                return
        except StopIteration:
            self._end(None)
            return
        except ray.exceptions.RayError as error:
            self._end(self._crash(error))
            return
        self._found.append(message)
        self._came += 1
        self._busy_since = time.perf_counter()
        self._tell()

    def end_if_late(self, now: float) -> None:
        """End a decode task that has worked on one message too long. Waits for a CPU or the reader have no limit."""
        works = self._running_at is not None and self._came - self._read < AHEAD
        if works and now - self._busy_since > self._streams.timeout_s:
            ray.cancel(self.refs, force=True)
            limit = f"decode.timeout_s = {self._streams.timeout_s:g} s"
            self._end(UnitError("decode", "Timeout", f"expected a batch of frames within {limit}, got none"))

    def close(self) -> None:
        """End the task, even if it hangs in native code."""
        if self.refs is not None:
            ray.cancel(self.refs, force=True)
            self._end(None)
        self._streams.closed(self)

    def _end(self, how: UnitError | None) -> None:
        self._found.append(how)
        self.refs = None
        if self._told:
            self._streams.counts.close.remote(self.name)

    def _tell(self) -> None:
        """Report how far messages were read, if the decode task may be waiting for that."""
        if self.refs is not None and self._came >= AHEAD and self._read > self._told:
            self._told = self._read
            self._streams.counts.read.remote(self.name, self._read)

    def _got(self, ref: "ray.ObjectRef") -> Any:
        try:
            return ray.get(ref)
        except ray.exceptions.RayError as error:
            raise self._crash(error) from None

    def _crash(self, error: ray.exceptions.RayError) -> UnitError:
        tries = self._streams.tries
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return UnitError("decode", "OutOfMemory", f"the decoder ran out of memory, {tries} tries")
        if isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.ObjectLostError):
            return UnitError("decode", "DecoderCrashed", f"the decoding process died, {tries} tries")
        return UnitError("decode", type(error).__name__, (str(error).strip() or repr(error)).splitlines()[0])
