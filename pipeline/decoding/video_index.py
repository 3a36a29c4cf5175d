"""Lists a video's frames and their times from its packets, without decoding; all decoders use this index."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import av.error
import numpy as np

from pipeline.config import Frames
from pipeline.decoding.frames import choose_frames, target_times
from pipeline.decoding.video import (
    CannotSeekError,
    Shape,
    decoded_shape,
    misstamped,
    packets,
    packets_from,
    rewind,
    video_stream,
)
from pipeline.errors import UnitError

_SPARSE_S = 10.0  # frames further apart are found by one seek each, instead of reading all packets between them
_KEEP_BYTES = 128 << 20  # packets of a window kept in memory, so that they are fetched once
_ORIGIN_PACKETS = 32  # read to find the first frame's pts; more than any codec reorders
_REORDERED_PACKETS = 16
_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv")  # decord seeks wrongly in other formats


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video, or of the part that a unit needs.

    pts       int64 `[N]`, ascending, in the stream's time base
    times_s   float64 `[N]`, seconds since the video's first frame
    keys      int64 `[K]`, pts of the key frames, where decoding can start
    complete  all frames of the video are listed, so an index is the frame number in the file
    counted   the file has no presentation times; pts are frame numbers
    plain     all GOPs are closed and the container lists every frame once; decord assumes both without a check
    segments  packets in decoding order, in one or more runs; None if they are too large to keep
    """

    pts: np.ndarray
    times_s: np.ndarray
    keys: np.ndarray
    shape: Shape
    codec: str
    complete: bool
    counted: bool
    plain: bool
    segments: tuple[tuple[Any, ...], ...] | None


def index_whole(container: Any, uri: str) -> VideoIndex:
    """The index of all frames. Reads the container, which must be at its start, to the end."""
    stream = video_stream(container)
    found, shape = _Found(stream, keep_bytes=0), None
    for packet in packets(container, stream):
        found.add(packet)
        shape = shape or decoded_shape(packet, stream)
    shape = shape or decoded_shape(None, stream)
    if shape is None:
        raise UnitError("decode", "Corrupt", f"no frame could be decoded: {uri}")
    return found.index(shape, origin=None, complete=True)


def index_window(container: Any, uri: str, start_s: float | None, end_s: float | None, frames: Frames) -> VideoIndex:
    """The index of the frames that `choose_frames` needs for this window; reads as few packets as possible."""
    stream = video_stream(container)
    head, shape = [], None
    for packet in itertools.islice(packets(container, stream), _ORIGIN_PACKETS):
        shape = shape or decoded_shape(packet, stream)
        if not packet.is_discard:
            head.append(packet.pts)
    shape = shape or decoded_shape(None, stream)
    if shape and head and None not in head and not misstamped(stream):
        window = _Window(container, stream, min(head), start_s, end_s)
        for search in (window.sparse, window.dense):
            with suppress(CannotSeekError, av.error.FFmpegError):
                return search(frames).index(shape, origin=window.origin, complete=False)
    rewind(container)
    return index_whole(container, uri)


class _Window:
    """Packets of `start_s <= time < end_s`, found by seeking."""

    def __init__(self, container: Any, stream: Any, origin: int, start_s: float | None, end_s: float | None) -> None:
        self.container, self.stream, self.origin = container, stream, origin
        self.start_s, self.end_s = start_s, end_s
        self.low = origin if start_s is None else self._pts(start_s)
        self.high = 1 << 60 if end_s is None else self._pts(end_s)

    def dense(self, frames: Frames) -> "_Found":
        """Collect all packets from the key frame before the window to its end."""
        found = _Found(self.stream, keep_bytes=_KEEP_BYTES)
        for packet in self._around(self.low, self.high):
            found.add(packet)
        return found

    def sparse(self, frames: Frames) -> "_Found":
        """Collect packets around every target. Raises CannotSeekError if targets are close or the choice is unsure."""
        first, last = self._ends()
        targets = target_times(self._seconds(first), self._seconds(last), frames)
        if len(targets) < 2 or targets[1] - targets[0] < _SPARSE_S:
            raise CannotSeekError
        found = _Found(self.stream, keep_bytes=_KEEP_BYTES)
        for target in targets:
            pts = self._pts(float(target))
            found.begin()
            for packet in self._around(pts, pts):
                found.add(packet)
            if len(set(found.starts)) < len(found.starts):  # several targets share a key frame: `dense` is cheaper
                raise CannotSeekError
        times = self._seconds(np.unique(np.array(found.pts, dtype=np.int64)))
        if len(choose_frames(times, self.start_s, self.end_s, frames)) < len(targets):
            raise CannotSeekError
        return found

    def _ends(self) -> tuple[int, int]:
        """pts of the first and the last frame inside the window."""
        seen = [p.pts for at in (self.low, self.high - 1) for p in self._around(at, at)]
        inside = [pts for pts in seen if self.low <= pts < self.high]
        if not inside:
            raise CannotSeekError
        return min(inside), max(inside)

    def _around(self, low: int, high: int) -> Iterator[Any]:
        """Packets from the key frame at or before `low` until every frame up to `high` is in, reordered ones too."""
        beyond = 0
        for packet in packets_from(self.container, self.stream, max(low, self.origin)):
            if packet.pts is None:
                raise CannotSeekError
            yield packet
            beyond += (packet.pts if packet.dts is None else packet.dts) > high
            if beyond > _REORDERED_PACKETS:
                return

    def _pts(self, time_s: float) -> int:
        return self.origin + round(time_s / self.stream.time_base)

    def _seconds(self, pts: Any) -> Any:
        return (pts - self.origin) * float(self.stream.time_base)


class _Found:
    """Collects the index data of packets, and the packets themselves up to `keep_bytes`."""

    def __init__(self, stream: Any, keep_bytes: int) -> None:
        self._format = stream.container.format.name
        self.pts: list[int | None] = []
        self._dts: list[int | None] = []
        self.keys: list[int] = []
        self.starts: list[int | None] = []  # pts of the first packet of each segment
        self._stream = stream
        self._room = keep_bytes
        self._segments: list[list[Any]] = []
        self._last_key: int | None = None
        self._plain = True
        self._vp8 = stream.codec_context.codec.canonical_name == "vp8"
        self.begin()

    def begin(self) -> None:
        """Start a new segment: the next packet does not follow the last one."""
        self._fresh = True

    def add(self, packet: Any) -> None:
        if self._fresh:
            self.starts.append(packet.pts)
            self._segments.append([])
        self._fresh = False
        # VP8 has packets with reference frames that are never shown.
        shown = not packet.is_discard and (not self._vp8 or bool(bytes(packet)[0] >> 4 & 1))
        if shown:
            self.pts.append(packet.pts)
            self._dts.append(packet.dts)
        if packet.is_keyframe and packet.pts is not None:
            self.keys.append(packet.pts)
            self._last_key = packet.pts
        # A frame shown before its key frame but stored after it depends on the previous GOP: an open GOP.
        clean = self._last_key is not None and packet.pts is not None and packet.pts >= self._last_key
        self._plain = self._plain and shown and clean and not packet.is_corrupt
        self._room -= packet.size
        if self._room >= 0:
            self._segments[-1].append(packet)
        else:
            self._segments = [[]]

    def index(self, shape: Shape, *, origin: int | None, complete: bool) -> VideoIndex:
        base = float(self._stream.time_base)
        counted = None in self.pts or misstamped(self._stream)
        if counted:
            pts = np.arange(len(self.pts), dtype=np.int64)
            times: np.ndarray = pts / float(self._stream.average_rate or 25)
            if None not in self._dts:  # decoding times have the same intervals as presentation times
                times = np.sort(np.array(self._dts, dtype=np.int64)) * base
                times -= times[:1]
        else:
            pts = np.unique(np.array(self.pts, dtype=np.int64))
            zero = origin if origin is not None else pts[:1]
            times = (pts - zero) * base
        return VideoIndex(
            pts=pts,
            times_s=times,
            keys=pts[:1] if counted else np.unique(np.array(self.keys, dtype=np.int64)),
            shape=shape,
            codec=self._stream.codec_context.codec.canonical_name,
            complete=complete,
            counted=counted,
            plain=complete and self._plain and not counted and len(pts) == len(self.pts) and self._format in _INDEXED,
            segments=tuple(map(tuple, self._segments)) if self._room >= 0 else None,
        )
