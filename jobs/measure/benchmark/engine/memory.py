"""Part "memory": peak memory of prefill, cache and answer against the length of a streamed video.

On a CPU every point runs in its own process; the peak is the growth of its resident memory after the model was loaded
and has answered once. On a GPU it is the memory that torch allocated on top of the weights.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from jobs.measure.benchmark.cell import Cell, Place, Values, free
from jobs.measure.benchmark.engine.scale import PLAIN, STREAMED, VARIANTS, EngineScale
from jobs.measure.benchmark.engine.subject import Said, Subject, Video, request
from jobs.measure.benchmark.timer import Timer
from lightkv import Engine

WARM = 60  # frames
_KEPT_BYTES = 1 << 17  # of freed memory; fixed, because glibc raises its limit over time
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def cells(scale: EngineScale) -> list[Cell]:
    """All variants at every length; without compression only up to `plain_minutes`."""
    found = []
    for minutes in scale.minutes:
        for name in (PLAIN, *VARIANTS):
            at: Place = {"model": scale.name, "minutes": minutes, "frame_px": scale.side_px}
            far = name in (PLAIN, STREAMED) and minutes > scale.plain_minutes
            skip = "takes too long without compression" if far else ""
            found.append(Cell("memory", name, at, partial(_measure, scale, name, minutes), skip=skip))
    return found


def _measure(scale: EngineScale, name: str, minutes: int, timer: Timer) -> Values:
    return alone(scale, name, minutes) if scale.device.type == "cpu" else on_device(scale, name, minutes)


def alone(scale: EngineScale, name: str, minutes: int) -> Values:
    """Measure in a new process. Raises RuntimeError if it ends without a result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_process, args=(theirs, scale, name, minutes))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        raise RuntimeError("the process that measures ended without a result") from None
    finally:
        process.join()
    if isinstance(found, Exception):
        raise found
    return found


def _in_process(result: Connection, scale: EngineScale, name: str, minutes: int) -> None:
    try:
        _return_freed_memory()
        with torch.inference_mode():
            subject = scale.subject()
            answer(scale, subject, name, Video(1, WARM, scale.side_px))
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before, began = _resident("VmRSS"), time.perf_counter()
            said = answer(scale, subject, name, Video(0, 60 * minutes, scale.side_px))
            spent_s = time.perf_counter() - began
        result.send(_values(_resident("VmHWM") - before, said, spent_s))
    except Exception as error:
        result.send(error)


def _return_freed_memory() -> None:
    """Make glibc return freed memory at once, so that the resident size is the memory in use."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


def on_device(scale: EngineScale, name: str, minutes: int) -> Values:
    """Measure in this process with torch's memory counter."""
    free()
    subject = scale.subject()
    answer(scale, subject, name, Video(1, WARM, scale.side_px))
    free()
    torch.cuda.reset_peak_memory_stats(scale.device)
    before, began = torch.cuda.memory_allocated(scale.device), time.perf_counter()
    said = answer(scale, subject, name, Video(0, 60 * minutes, scale.side_px))
    spent_s = time.perf_counter() - began
    return _values(torch.cuda.max_memory_allocated(scale.device) - before, said, spent_s)


def answer(scale: EngineScale, subject: Subject, name: str, video: Video) -> Said:
    """A caption of the video, whose frames are generated on demand."""
    if name == PLAIN:
        return subject.plain(subject.batches(video))
    config, memory = scale.variants(subject.model)[name]
    asked = request(subject, 0, subject.vision(subject.batches(video)))
    (result,) = Engine(subject.model, config, memory).run([asked])
    if result.error is not None:
        raise result.error
    return subject.said(result.answers[0])


def _values(peak_bytes: int, said: Said, spent_s: float) -> Values:
    return {"peak_bytes": peak_bytes, "kv_bytes": said.kv_bytes, "spent_s": spent_s}


def _resident(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
