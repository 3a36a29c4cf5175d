"""The decode tasks, which run in processes of their own, and the count of batches that tells them when to go on.

Only light imports here, because every decoding process and the counter load this module before their first task; the
decoders are imported by the first unit that is decoded.

Why no unit waits for ever for a CPU to be decoded on:

    A decode task holds a CPU only while it decodes. It may be `AHEAD` batches ahead of its reader; before the next one
    it waits in `ray.get` for the reader to have read far enough, and Ray gives the CPU of a task that waits there to
    others. So every CPU is held by a decoder that will finish its batch in finite time (or die, or be ended by
    `decode.timeout_s`) and then ends, or waits without a CPU. A unit that was asked for therefore gets a CPU, whatever
    the reader does with the other units, and in whatever order Ray starts the tasks.
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

AHEAD = 4  # messages that a decoder may be ahead of its reader


class ReadCounts:
    """How many messages of each stream were read; decoders wait here. An asyncio actor, one per reader."""

    def __init__(self) -> None:
        self._read: dict[str, int] = {}
        self._changed: dict[str, asyncio.Event] = {}

    async def wait(self, stream: str, count: int, timeout_s: float = 60.0) -> bool:
        """Whether `count` messages of a stream were read, or it was closed, within `timeout_s`.

        The limit ends waits of decoders that are gone; those that are there ask again.
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
        """Note that `count` messages were read, and wake the decoder."""
        self._read[stream] = max(count, self._read.get(stream, 0))
        self._wake(stream)

    async def close(self, stream: str) -> None:
        """Forget a stream that nobody reads any more, and wake its decoder."""
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
    """One unit's messages: None once the task runs, then lists of frame batches, or the error that ended them."""
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
        del message  # only one batch is in memory while the next one is decoded
        number += 1


def wait_until_read(counts: ActorHandle, stream: str, count: int) -> None:
    """Wait without a CPU until the reader has read `count` messages. A counter that died holds nobody back."""
    try:
        while not ray.get(counts.wait.remote(stream, count)):
            pass
    except ray.exceptions.RayActorError:
        return


def decoded(unit: dict[str, Any], settings: bytes) -> "Iterator[list[FrameBatch] | UnitError]":
    """A unit's frame batches in messages: a video's one by one, of an image set `frames.batch_frames` together."""
    message: list[FrameBatch] = []
    error: UnitError | None = None
    try:
        from pipeline.decoding.decode import decode_unit

        clips, frames, decode, storage, sizing = _settings(settings)
        check_length(unit, clips)
        together = frames.batch_frames if unit["kind"] == "images" else 1
        for batch in decode_unit(unit, frames=frames, decode=decode, storage=storage, sizing=sizing):
            message.append(batch)
            del batch  # only one batch is in memory while the next one is decoded
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
    """What is the same for all units of a job; a process that decodes one after another reads it once."""
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
