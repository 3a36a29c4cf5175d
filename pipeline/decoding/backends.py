"""Video decoders with one interface: decord for local files, PyAV for containers read by range.

`decode.backend: package.module:function` names another one. The function is called as

    function(path: str, index: VideoIndex, size: Size) -> FrameSource

with the path of a local file of the whole video. It may raise any exception for a video that it cannot decode.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import av.error
import numpy as np

from pipeline.decoding.frames import Size
from pipeline.decoding.video import packets, packets_from, rewind, video_stream
from pipeline.decoding.video_index import VideoIndex
from pipeline.errors import ConfigError, UnitError

_TIME_TOLERANCE_S = 2e-3  # decord stores times as float32


class FrameSource(Protocol):
    """Decodes chosen frames of one video, resized and rotated upright."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames uint8 `[T, resize_h, resize_w, 3]` at `indices` `[T]` of the VideoIndex, ascending over all calls."""

    def close(self) -> None:
        """Free all resources."""


OpenSource = Callable[[str, VideoIndex, Size], FrameSource]


class UnsuitableError(Exception):
    """This decoder may return wrong frames for this video; another one may decode it."""


class DecordSource:
    """Decodes with decord, in one thread, resizing while it decodes.

    decord counts frames from the key frame it seeks to, and fills gaps with neighbouring frames without an error. It is
    therefore used only for videos where the count is right, and its timestamps are checked.
    """

    def __init__(self, path: str, index: VideoIndex, size: Size) -> None:
        if not index.plain:
            raise UnsuitableError(
                "decord miscounts frames in open GOPs, with edit lists, and without an index of times"
            )
        import decord  # loads its own FFmpeg; not available on every platform

        decord.logging.set_level(decord.logging.QUIET)
        self._reader = decord.VideoReader(
            path, ctx=decord.cpu(0), width=size.resize_w, height=size.resize_h, num_threads=1
        )
        self._index = index
        if len(self._reader) != len(index.pts):
            raise UnsuitableError(f"decord counts {len(self._reader)} frames, the container has {len(index.pts)}")
        self._zero = float(self._reader.get_frame_timestamp([0])[0, 0])

    def read(self, indices: np.ndarray) -> np.ndarray:
        wanted = self._index.times_s[indices]
        times = self._reader.get_frame_timestamp(indices.tolist())[:, 0] - self._zero
        tolerance = _TIME_TOLERANCE_S + wanted * 2**-22
        if np.any(np.abs(times - wanted) > tolerance):
            raise UnsuitableError(f"decord has frames at {times.tolist()} s where {wanted.tolist()} s were expected")
        frames: np.ndarray = self._reader.get_batch(indices.tolist()).asnumpy()
        self._reader.seek(0)  # otherwise it keeps decoding ahead without a limit
        return frames

    def close(self) -> None:
        del self._reader


class PyAVSource:
    """Decodes with PyAV from an open container; one decoded frame is in memory at a time."""

    def __init__(self, container: Any, index: VideoIndex, size: Size, uri: str) -> None:
        self._container = container
        self._stream = video_stream(container)
        self._codec = self._stream.codec_context
        self._index, self._size, self._uri = index, size, uri
        self._decoded: Iterator[tuple[int, Any]] | None = None
        self._at = -(1 << 62)  # pts of the last decoded frame
        self._damaged = False

    def read(self, indices: np.ndarray) -> np.ndarray:
        size = self._size
        frames = np.empty((len(indices), size.resize_h, size.resize_w, 3), dtype=np.uint8)
        for row, pts in zip(frames, self._index.pts[indices].tolist(), strict=True):
            row[:] = self._upright(self._frame(pts))
        return frames

    def close(self) -> None:
        self._decoded = None

    def _frame(self, pts: int) -> Any:
        key = int(self._index.keys[max(int(np.searchsorted(self._index.keys, pts, side="right")) - 1, 0)])
        if self._decoded is None or key > self._at:
            self._start(key)
        for self._at, frame in self._decoded or ():  # noqa: B020
            if self._at == pts and not self._damaged:
                return frame
            if self._at == pts:
                raise UnitError("decode", "Corrupt", f"the data around this frame is damaged{self._where(pts)}")
            if self._at > pts:
                break
        raise UnitError(
            "decode", "MissingFrame", f"a frame that the container lists cannot be decoded{self._where(pts)}"
        )

    def _where(self, pts: int) -> str:
        at = self._index.times_s[np.searchsorted(self._index.pts, pts)]
        return f" (at {at:.3f} s): {self._uri}"

    def _start(self, key: int) -> None:
        """Start decoding at the key frame with pts `key`."""
        self._damaged = False
        self._decoded = self._numbered(self._packets(key))

    def _packets(self, key: int) -> Iterator[Any]:
        for segment in self._index.segments or ():
            start = next((i for i, p in enumerate(segment) if p.is_keyframe and p.pts == key), None)
            if start is not None:
                self._codec.flush_buffers()
                yield from segment[start:]
                return
        if self._index.counted:
            rewind(self._container)
            yield from packets(self._container, self._stream)
        else:
            yield from packets_from(self._container, self._stream, key)

    def _numbered(self, packets: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        for number, frame in enumerate(self._decode(packets)):
            if frame.key_frame:
                self._damaged = False
            pts = number if self._index.counted else frame.pts
            yield (self._at if pts is None else pts), frame

    def _decode(self, packets: Iterator[Any]) -> Iterator[Any]:
        for packet in packets:
            try:
                yield from self._codec.decode(packet)
            except av.error.InvalidDataError:
                self._damaged = True
        yield from self._codec.decode(None)

    def _upright(self, frame: Any) -> np.ndarray:
        quarters = self._index.shape.quarters
        height, width = self._size.resize_h, self._size.resize_w
        if quarters % 2:
            height, width = width, height
        # Colour space and range come from the frame. BILINEAR, because decord resizes with it.
        rgb = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR", threads=1)
        return np.rot90(rgb.to_ndarray(), quarters)


def named_source(backend: str) -> OpenSource:
    """The decoder named `decord` or `package.module:function`. Raises `ConfigError` if it cannot be imported."""
    if backend == "decord":
        return DecordSource
    module, _, name = backend.partition(":")
    try:
        found: OpenSource = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"decode.backend: expected an importable package.module:function, got {backend!r} ({error})"
        ) from error
    return found
