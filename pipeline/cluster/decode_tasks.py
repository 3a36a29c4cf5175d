"""Decode tasks, each in a process of its own, and the actor that tells them how far their messages were read.

Only light imports here: every decoding process and the counter load this module before their first task. The decoders
are imported when the first unit is decoded.

Why every unit gets a CPU to be decoded on, in finite time:

1. A decode task holds a CPU only while it decodes. When it is `AHEAD` messages ahead of its reader, it waits in
   `ray.get` until the reader has read further. Ray gives the CPU of a task that waits in `ray.get` to other tasks.
2. So a task that holds a CPU is decoding a message. It finishes in finite time, unless its process dies or the reader
   cancels it after `decode.timeout_s`; then the CPU is free as well. Ray restarts a task whose process died at most
   `decode.max_retries` times.
3. After each message the task ends, waits without a CPU, or decodes the next one. A unit has finitely many messages, so
   the task ends or waits in finite time. No CPU is held for ever.
4. So every task that needs a CPU, new or woken by its reader, gets one, and every unit whose frames were requested is
   started. This does not depend on which units the reader reads, nor on the order in which Ray starts the tasks.
"""

import asyncio
import pickle
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from pipeline.errors import SkippedError, UnitError

if TYPE_CHECKING:
    from pipeline.config import Clips, Decode, Frames, Storage
    from pipeline.decoding.decode import FrameBatch
    from pipeline.decoding.frames import Sizing

AHEAD = 4  # messages that a decode task may be ahead of its reader


class ReadCounts:
    """Counts how many messages of each stream were read; decode tasks wait on it. An asyncio actor, one per reader."""

    def __init__(self) -> None:
        self._read: dict[str, int] = {}
        self._changed: dict[str, asyncio.Event] = {}

    async def wait(self, stream: str, count: int, timeout_s: float = 60.0) -> bool:
        """Return True once `count` messages of a stream were read or the stream is closed; False after `timeout_s`.

        The timeout removes the waits of decode tasks that died; a live task calls again.
        """
        while self._read.get(stream, 0) < count:
            changed = self._changed.setdefault(stream, asyncio.Event())
            try:
                await asyncio.wait_for(changed.wait(), timeout_s)
            except TimeoutError:
                return False
            if stream not in self._read:
                return True
        return True

    async def read(self, stream: str, count: int) -> None:
        """Note that `count` messages were read, and wake the decode task."""
        self._read[stream] = max(count, self._read.get(stream, 0))
        self._wake(stream)

    async def close(self, stream: str) -> None:
        """Forget a stream that nobody reads any more, and wake its decode task."""
        self._read.pop(stream, None)
        self._wake(stream)

    def _wake(self, stream: str) -> None:
        changed = self._changed.pop(stream, None)
        if changed is not None:
            changed.set()


@ray.remote
def decode_stream(
    unit: dict[str, Any], settings: bytes, stream: str, counts: ActorHandle
) -> "Iterator[list[FrameBatch] | UnitError | None]":
    """Yield a unit's messages: None once the task runs, then lists of frame batches, then the error if it failed."""
    yield None
    messages = decoded(unit, settings)
    number = 0
    while True:
        if number >= AHEAD:
            wait_until_read(counts, stream, number - AHEAD + 1)
        message = next(messages, None)
        if message is None:
            return
        yield message
        del message  # else two messages are in memory while the next one is decoded
        number += 1


def wait_until_read(counts: ActorHandle, stream: str, count: int) -> None:
    """Wait, without a CPU, until the reader has read `count` messages. Returns at once if the counter died."""
    try:
        while not ray.get(counts.wait.remote(stream, count)):
            pass
    except ray.exceptions.RayActorError:
        return


def decoded(unit: dict[str, Any], settings: bytes) -> "Iterator[list[FrameBatch] | UnitError]":
    """Yield a unit's messages: for a video one batch each, for an image set `frames.batch_frames` images each."""
    message: list[FrameBatch] = []
    error: UnitError | None = None
    try:
        from pipeline.decoding.decode import decode_unit

        clips, frames, decode, storage, sizing = _settings(settings)
        check_length(unit, clips)
        together = frames.batch_frames if unit["kind"] == "images" else 1
        for batch in decode_unit(unit, frames=frames, decode=decode, storage=storage, sizing=sizing):
            message.append(batch)
            del batch  # else two batches are in memory while the next one is decoded
            if len(message) == together:
                yield message
                message = []
    except UnitError as raised:
        error = raised
    except Exception as raised:
        error = UnitError("decode", type(raised).__name__, str(raised) or repr(raised))
    if message:
        yield message
    if error is not None:
        yield error


@cache
def _settings(pickled: bytes) -> "tuple[Clips, Frames, Decode, Storage, Sizing]":
    """Unpickle the settings that all units of a job share, once per process."""
    found: tuple[Clips, Frames, Decode, Storage, Sizing] = pickle.loads(pickled)
    return found


def check_length(unit: dict[str, Any], clips: "Clips") -> None:
    """Raise `SkippedError` for a unit whose known length is outside the configured limits."""
    end_s = unit["duration_s"] if unit["end_s"] is None else unit["end_s"]
    if end_s is None:
        return
    length_s = end_s - (unit["start_s"] or 0.0)
    if clips.skip_shorter_s is not None and length_s < clips.skip_shorter_s:
        raise SkippedError("plan", "TooShort", f"{length_s:g} s long, clips.skip_shorter_s is {clips.skip_shorter_s:g}")
    if clips.skip_longer_s is not None and length_s > clips.skip_longer_s:
        raise SkippedError("plan", "TooLong", f"{length_s:g} s long, clips.skip_longer_s is {clips.skip_longer_s:g}")
