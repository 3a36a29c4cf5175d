"""What a video holds: its frames' timestamps in presentation order, its shape as displayed, whether it is whole.

Read from the packets, which is cheap, and by one library for every decoder, so that all choose the same frames.
"""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import av
import av.error
import numpy as np

from pipeline.config import Frames
from pipeline.errors import UnitError
from pipeline.frames import choose_frames, target_times

# Playlists and other formats that make FFmpeg open further files or addresses are left out.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,live_flv,asf,ogg,mxf,nut,ivf,gif,apng,"
    "dv,rm,wtv,h264,hevc,obu,m4v,mjpeg,y4m,yuv4mpegpipe,swf,nsv,vob,gxf"
)
_SPARSE_S = 10.0  # further apart, frames are looked up one by one instead of reading everything between them
_KEEP_BYTES = 128 << 20  # packets of a window that are kept, so that they are fetched once
_ORIGIN_PACKETS = 32  # read to find the first frame; more than any codec reorders
_REORDERED_PACKETS = 16
_STEPS_BACK_S = (0.0, 2.0, 10.0, None)  # before the wanted time, until a key frame is found in time; None: the start
_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv")  # decord loses its way in others


@dataclass(frozen=True)
class Shape:
    """A frame as displayed: with square pixels, after `quarters` turns of 90° counter-clockwise."""

    height: int
    width: int
    quarters: int


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video, or of the part of it that a unit needs.

    `pts` int64 `[N]` ascending in the stream's time base, `times_s` float64 `[N]` seconds since the video's first
    frame, `keys` int64 `[K]` pts of the frames that decoding can start at. `complete`: nothing is left out, so a
    frame's position is its number in the file. `counted`: the file has no presentation times, pts are frame numbers.
    `plain`: key frames are clean cuts and frames lie in the file as counted, which decord relies on without checking.
    `segments`: the packets in decoding order, in one piece or several; None when they are too large to keep.
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


def open_video(source: Any, uri: str) -> Any:
    """A PyAV container with a video stream. Raises `UnitError` (decode): NotAVideo, NoVideoStream."""
    try:
        container = av.open(source, options={"format_whitelist": _FORMATS}, metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.ArgumentError, av.error.EOFError) as error:
        raise UnitError(
            "decode", "NotAVideo", f"not a video, or cut off before its index ({error.strerror}): {uri}"
        ) from error
    streams = [s for s in container.streams.video if "attached_pic" not in str(s.disposition)]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        container.close()
        raise UnitError("decode", "NoVideoStream", f"expected a video stream, found {', '.join(kinds)}: {uri}")
    if streams[0].codec_context is None:
        container.close()
        raise UnitError("decode", "Unsupported", f"no decoder for the video stream of {uri}")
    streams[0].codec_context.thread_count = 1
    return container


def video_stream(container: Any) -> Any:
    return next(s for s in container.streams.video if "attached_pic" not in str(s.disposition))


def index_whole(container: Any, uri: str) -> VideoIndex:
    """All frames; reads the container, which must be at its beginning, to the end."""
    stream = video_stream(container)
    found, shape = _Found(stream, keep_bytes=0), None
    for packet in _packets(container, stream):
        found.add(packet)
        shape = shape or decoded_shape(packet, stream)
    shape = shape or decoded_shape(None, stream)
    if shape is None:
        raise UnitError("decode", "Corrupt", f"no frame could be decoded: {uri}")
    return found.index(shape, origin=None, complete=True)


def index_window(container: Any, uri: str, start_s: float | None, end_s: float | None, frames: Frames) -> VideoIndex:
    """The frames that `choose_frames` needs to see for this window, reading as little as that takes."""
    stream = video_stream(container)
    head, shape = [], None
    for packet in itertools.islice(_packets(container, stream), _ORIGIN_PACKETS):
        shape = shape or decoded_shape(packet, stream)
        if not packet.is_discard:
            head.append(packet.pts)
    shape = shape or decoded_shape(None, stream)
    if shape and head and None not in head and not _misstamped(stream):
        window = _Window(container, stream, min(head), start_s, end_s)
        for search in (window.sparse, window.dense):
            with suppress(CannotSeekError, av.error.FFmpegError):
                return search(frames).index(shape, origin=window.origin, complete=False)
    rewind(container)
    return index_whole(container, uri)


def _misstamped(stream: Any) -> bool:
    """AVI stores no presentation times; what is read instead is wrong as soon as frames are reordered."""
    return bool(stream.container.format.name == "avi" and stream.codec_context.has_b_frames)


class CannotSeekError(Exception):
    """Jumping into the middle of this video does not find what is needed."""


def rewind(container: Any) -> None:
    """Back to the first packet; some formats skip the first key frame when asked for its own time."""
    try:
        container.seek(min(container.start_time or 0, 0) - 10 * av.time_base)
    except av.error.FFmpegError:
        container.seek(0)


def packets_from(container: Any, stream: Any, pts: int) -> Iterator[Any]:
    """Packets from a key frame at or before `pts` to the end, wherever the format lands when asked to jump there."""
    for back_s in _STEPS_BACK_S:
        if back_s is None:
            rewind(container)
        else:
            with suppress(av.error.FFmpegError):
                container.seek(pts - round(back_s / stream.time_base), stream=stream, backward=True)
        packets = itertools.dropwhile(lambda packet: not packet.is_keyframe, _packets(container, stream))
        first = next(packets, None)
        if first is not None and first.pts is not None and first.pts <= pts:
            yield first
            yield from packets
            return
    raise CannotSeekError


class _Window:
    """Packets of `start_s <= time < end_s`, found by seeking."""

    def __init__(self, container: Any, stream: Any, origin: int, start_s: float | None, end_s: float | None) -> None:
        self.container, self.stream, self.origin = container, stream, origin
        self.start_s, self.end_s = start_s, end_s
        self.low = origin if start_s is None else self._pts(start_s)
        self.high = 1 << 60 if end_s is None else self._pts(end_s)

    def dense(self, frames: Frames) -> "_Found":
        """All packets from the key frame before the window to its end."""
        found = _Found(self.stream, keep_bytes=_KEEP_BYTES)
        for packet in self._around(self.low, self.high):
            found.add(packet)
        return found

    def sparse(self, frames: Frames) -> "_Found":
        """Packets around every target only; raises where targets are close or the choice would be in doubt."""
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
            if len(set(found.starts)) < len(found.starts):  # one key frame for several targets: read on instead
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
        """Packets from the key frame at or before `low` until all up to `high`, and what they wait for, have come."""
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
    """What an index needs of the packets seen; the packets themselves while they are few."""

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
        """What follows is not the continuation of what came."""
        self._fresh = True

    def add(self, packet: Any) -> None:
        if self._fresh:
            self.starts.append(packet.pts)
            self._segments.append([])
        self._fresh = False
        # VP8 stores reference frames that are never shown in packets of their own.
        shown = not packet.is_discard and (not self._vp8 or bool(bytes(packet)[0] >> 4 & 1))
        if shown:
            self.pts.append(packet.pts)
            self._dts.append(packet.dts)
        if packet.is_keyframe and packet.pts is not None:
            self.keys.append(packet.pts)
            self._last_key = packet.pts
        # A frame shown before its key frame but stored after it needs the group before: an open group.
        clean = self._last_key is not None and packet.pts is not None and packet.pts >= self._last_key
        self._plain = self._plain and shown and clean and not packet.is_corrupt
        self._room -= packet.size
        if self._room >= 0:
            self._segments[-1].append(packet)
        else:
            self._segments = [[]]

    def index(self, shape: Shape, *, origin: int | None, complete: bool) -> VideoIndex:
        base = float(self._stream.time_base)
        counted = None in self.pts or _misstamped(self._stream)
        if counted:
            pts = np.arange(len(self.pts), dtype=np.int64)
            times: np.ndarray = pts / float(self._stream.average_rate or 25)
            if None not in self._dts:  # decoding times are as far apart as those of presentation
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


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    return (packet for packet in container.demux(stream) if packet.size)


def decoded_shape(packet: Any, stream: Any) -> Shape | None:
    """How the first frame that comes out is displayed; None while none does."""
    try:
        decoded = stream.codec_context.decode(packet)
    except (av.error.InvalidDataError, av.error.EOFError):
        return None
    if not decoded:
        return None
    frame = decoded[0]
    aspect = float(stream.sample_aspect_ratio or 1)
    width = round(frame.width * aspect) if 0.25 <= aspect <= 4 else frame.width
    quarters = round(frame.rotation / 90) % 4
    height, width = (width, frame.height) if quarters % 2 else (frame.height, width)
    return Shape(height, width, quarters)


def missing_bytes(container: Any, head: bytes, size_bytes: int) -> int:
    """How many bytes longer the file must have been, going by its own header; 0 when whole or when it does not say."""
    if container.format.name.startswith("mov"):
        entries = video_stream(container).index_entries
        return max(0, max((entry.pos + entry.size for entry in entries), default=0) - size_bytes)
    return max(0, (declared_bytes(head) or 0) - size_bytes)


def declared_bytes(head: bytes) -> int | None:
    """The length a Matroska or AVI file states in its first bytes; None for other formats and live recordings."""
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    at = head.find(b"\x18\x53\x80\x67") if head[:4] == b"\x1aE\xdf\xa3" else -1
    if at < 0 or at + 5 > len(head):
        return None
    length = 9 - head[at + 4].bit_length()
    if length > 8 or at + 4 + length > len(head):
        return None
    value = int.from_bytes(head[at + 4 : at + 4 + length], "big") & ((1 << 7 * length) - 1)
    return None if value == (1 << 7 * length) - 1 else at + 4 + length + value
