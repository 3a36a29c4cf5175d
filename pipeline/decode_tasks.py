"""The decode tasks, which run in processes of their own.

Here is only what a process needs to take one. The rest comes in a thread that waits for all others: it takes a CPU for
a quarter of a second, which decoders that are through with it, and models, would have to wait for.
"""

import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import ray

from pipeline.errors import SkippedError, UnitError
from pipeline.priority import behind_all

if TYPE_CHECKING:
    from pipeline.config import Clips, Decode, Frames, Storage
    from pipeline.decode import FrameBatch
    from pipeline.frames import Sizing


@ray.remote
def decode_stream(unit: dict[str, Any], settings: bytes) -> "Iterator[FrameBatch | UnitError | None]":
    """One unit's frame batches as they come: None once the task runs, then batches, or the error that ended them."""
    yield None
    yield from _in_background(_decoded(unit, settings))


@ray.remote
def decode_whole(unit: dict[str, Any], settings: bytes) -> "Whole":
    """One unit's frame batches in one message: half a stream's CPU time, but no word of when the task begins."""
    began = time.perf_counter()
    items = list(_in_background(_decoded(unit, settings)))
    return Whole(time.perf_counter() - began, items)


@dataclass(frozen=True)
class Whole:
    """All of a unit, and how long it took: batches, and the error that ended them if one did."""

    took_s: float
    items: "list[FrameBatch | UnitError]"


def _decoded(unit: dict[str, Any], settings: bytes) -> "Iterator[FrameBatch | UnitError]":
    try:
        from pipeline.decode import decode_unit

        clips, frames, decode, storage, sizing = _settings(settings)
        check_length(unit, clips)
        yield from decode_unit(unit, frames=frames, decode=decode, storage=storage, sizing=sizing)
    except UnitError as error:
        yield error
    except Exception as error:
        yield UnitError("decode", type(error).__name__, str(error) or repr(error))


def _in_background(items: "Iterator[FrameBatch | UnitError]") -> "Iterator[FrameBatch | UnitError]":
    """The same items, made in a thread that leaves the CPUs to whoever else wants them.

    Of a node's processes the models must not wait, and they do for every decoder that is put on their CPU. A process
    could not go back to its priority and may be a model's next; a thread of it need not.
    """
    thread = _background()
    while (item := thread.submit(next, items, None).result()) is not None:
        yield item


@cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "decode", initializer=behind_all)


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
