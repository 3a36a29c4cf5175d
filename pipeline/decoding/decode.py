"""Decodes a unit's frames in batches: chosen by time, resized while decoding, never all in memory.

The functions do not use Ray. A decoder crash kills its process, so callers run them in a process that can be replaced.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import Decode, Frames, Storage
from pipeline.decoding.backends import FrameSource, PyAVSource, UnsuitableError, named_source
from pipeline.decoding.frames import Size, Sizing, choose_frames
from pipeline.decoding.images import load_image
from pipeline.decoding.media import Media, decoding
from pipeline.decoding.video import missing_bytes, open_video
from pipeline.decoding.video_index import VideoIndex, index_whole, index_window
from pipeline.errors import PipelineError, UnitError

_COPY_ALWAYS_BYTES = 64 << 20  # smaller objects are copied even if the unit needs a short part only
_COPY_SHARE = 0.5  # a larger object is copied if the unit needs at least this share of its length
_RESTART_SHARE = 0.1  # most frames decoded twice, as decord starts every batch at a key frame; else PyAV


@dataclass(frozen=True)
class FrameBatch:
    """Decoded frames of one size.

    item        index of the image in an image set; 0 for a video
    frames      uint8 `[T, H, W, 3]`
    times_s     float64 `[T]` since the video's first frame; 0 for images
    decode_s    time to decode this batch
    interval_s  mean time between the unit's frames over all its batches; None for images and for one frame
    """

    unit_id: str
    item: int
    frames: np.ndarray
    times_s: np.ndarray
    decode_s: float
    interval_s: float | None = None


def decode_unit(
    unit: dict[str, Any], *, frames: Frames, decode: Decode, storage: Storage, sizing: Sizing
) -> Iterator[FrameBatch]:
    """Decode `unit`, a row of UNIT_SCHEMA, in batches of at most `frames.batch_frames` frames.

    Raises `UnitError` of stage fetch (NotFound, NotAFile, AccessDenied, Credentials, Unreachable, Changed, Empty,
    TooLarge, InvalidUri, Storage) or decode (NotAVideo, NoVideoStream, Unsupported, Truncated, Corrupt, MissingFrame,
    EmptyWindow, NotAnImage, TooLarge, OutOfMemory), also after the first batches.
    """
    if unit["kind"] == "images":
        return _image_batches(unit, storage, sizing)
    return _video_batches(unit, frames, decode, storage, sizing)


def _image_batches(unit: dict[str, Any], storage: Storage, sizing: Sizing) -> Iterator[FrameBatch]:
    for item, uri in enumerate(unit["uris"]):
        began = time.perf_counter()
        etag = unit.get("etag") if item == 0 else None
        with closing(Media(uri, storage, etag=etag)) as media, decoding(uri):
            image = load_image(media, sizing)
        yield FrameBatch(unit["id"], item, image[None], np.zeros(1), time.perf_counter() - began)


def _video_batches(
    unit: dict[str, Any], frames: Frames, decode: Decode, storage: Storage, sizing: Sizing
) -> Iterator[FrameBatch]:
    began = time.perf_counter()
    (uri,) = unit["uris"]
    with (
        closing(Media(uri, storage, etag=unit.get("etag"))) as media,
        decoding(uri),
        closing(_Reading(media, unit, frames, decode, sizing)) as reading,
    ):
        times_s = reading.index.times_s[reading.picks]
        interval_s = float(np.mean(np.diff(times_s))) if len(times_s) > 1 else None
        for first in range(0, len(reading.picks), frames.batch_frames):
            picks = reading.picks[first : first + frames.batch_frames]
            # No variable holds the batch: it must be freed before the next one is decoded.
            yield FrameBatch(
                unit["id"],
                0,
                reading.read(picks),
                reading.index.times_s[picks],
                time.perf_counter() - began,
                interval_s,
            )
            began = time.perf_counter()


class _Reading:
    """One open video: its chosen frames, and the decoders to try, in order."""

    def __init__(self, media: Media, unit: dict[str, Any], frames: Frames, decode: Decode, sizing: Sizing) -> None:
        self._media, self._decode = media, decode
        window = unit.get("start_s"), unit.get("end_s")
        self._container: Any = None
        self._source: FrameSource | None = None
        self._path = self._whole_file(*window)
        if self._container is None:
            self._container = self._container_of(self._path)
        missing = missing_bytes(self._container, media.head(), media.entry.size_bytes)
        if missing and window[1] is None:
            self._cut_off(missing)
        try:
            if self._path is None or decode.backend == "pyav":
                self.index = index_window(self._container, media.uri, *window, frames)
            else:
                self.index = index_whole(self._container, media.uri)
        except UnitError:
            media.check()
            if missing:
                self._cut_off(missing)
            raise
        media.check()
        self.picks = choose_frames(self.index.times_s, *window, frames)
        if missing and window[1] > self.index.times_s.max(initial=0.0):
            self._cut_off(missing)
        if not len(self.picks):
            raise UnitError("decode", "EmptyWindow", self._no_frames(*window))
        self._size = sizing.of(self.index.shape.height, self.index.shape.width)
        self._backends = self._order(frames.batch_frames)

    def read(self, picks: np.ndarray) -> np.ndarray:
        """Decode uint8 `[T, crop_h, crop_w, 3]`; if a decoder fails, the next one decodes the same frames."""
        size = self._size
        while True:
            try:
                if self._source is None:
                    self._source = self._opened(self._backends[0])
                pixels = self._source.read(picks)
                self._media.check()
                if pixels.shape != (len(picks), size.resize_h, size.resize_w, 3) or pixels.dtype != np.uint8:
                    raise UnsuitableError(
                        f"expected {len(picks)} frames of {size.resize_w} × {size.resize_h}, got {pixels.shape}"
                    )
                return _cropped(pixels, size)
            except PipelineError:  # PyAV's error, final
                self._media.check()
                raise
            except Exception as error:  # decord and other decoders raise any type
                self._source = None
                failed = self._backends.pop(0)
                if not self._backends:
                    raise self._failure(failed, error) from error

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        if self._container is not None:
            self._container.close()

    def _whole_file(self, start_s: float | None, end_s: float | None) -> str | None:
        """The path of a local file of the whole video; None: read by range."""
        media, limit = self._media, self._decode.max_object_bytes
        if not media.remote:
            return media.local_path(limit)
        if self._decode.backend == "pyav":
            return None
        if self._decode.backend == "auto":
            if media.entry.size_bytes > limit:
                return None
            if media.entry.size_bytes > _COPY_ALWAYS_BYTES and (start_s, end_s) != (None, None):
                self._container = self._container_of(None)
                length_s = (self._container.duration or 0) / 1e6
                needed_s = min(end_s or length_s, length_s) - (start_s or 0.0)
                if needed_s < _COPY_SHARE * length_s:
                    return None
                self._container.close()
                self._container = None
        return media.local_path(limit)

    def _container_of(self, path: str | None) -> Any:
        try:
            return open_video(path or self._media.ranged(), self._media.uri)
        except UnitError:
            self._media.check()
            raise

    def _order(self, batch_frames: int) -> list[str]:
        if self._path is None or self._decode.backend == "pyav":
            return ["pyav"]
        if self._decode.backend != "auto":
            return [self._decode.backend]
        if not self.index.plain or _restarts_dearly(self.index, self.picks, batch_frames):
            return ["pyav"]
        return ["decord", "pyav"]

    def _opened(self, backend: str) -> FrameSource:
        if backend == "pyav":
            return PyAVSource(self._container, self.index, self._size, self._media.uri)
        assert self._path is not None
        return named_source(backend)(self._path, self.index, self._size)

    def _failure(self, backend: str, error: Exception) -> UnitError:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        kind = "Unsupported" if isinstance(error, UnsuitableError) else "Corrupt"
        return UnitError(
            "decode", kind, f"{backend} cannot decode the video ({detail}): {self._media.uri}; try decode.backend: auto"
        )

    def _cut_off(self, missing: int) -> None:
        raise UnitError(
            "decode",
            "Truncated",
            f"the file is cut off: {missing} bytes declared by its header are missing: {self._media.uri}",
        )

    def _no_frames(self, start_s: float | None, end_s: float | None) -> str:
        times, end = self.index.times_s, "the end" if end_s is None else f"{end_s} s"
        seen = f"frames were seen from {times[0]:.3f} to {times[-1]:.3f} s" if len(times) else "the video has none"
        return f"no frame from {start_s or 0} s to {end}; {seen}: {self._media.uri}"


def _restarts_dearly(index: VideoIndex, picks: np.ndarray, batch_frames: int) -> bool:
    """Whether seeking to a key frame for every batch decodes more than `_RESTART_SHARE` of the frames twice."""
    firsts = index.pts[picks[::batch_frames]]
    keys = index.keys[np.maximum(np.searchsorted(index.keys, firsts, side="right") - 1, 0)]
    repeated = np.searchsorted(index.pts, firsts) - np.searchsorted(index.pts, keys)
    return bool(repeated[1:].sum() > _RESTART_SHARE * (picks[-1] - picks[0] + 1))


def _cropped(pixels: np.ndarray, size: Size) -> np.ndarray:
    if (size.crop_h, size.crop_w) == (size.resize_h, size.resize_w):
        return pixels
    top, left = (size.resize_h - size.crop_h) // 2, (size.resize_w - size.crop_w) // 2
    return np.ascontiguousarray(pixels[:, top : top + size.crop_h, left : left + size.crop_w])
