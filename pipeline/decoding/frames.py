"""Chooses which frames of a unit to decode, and at what size, from timestamps and sizes alone: no I/O.

A frame is *on display* from its own timestamp until the next frame's. Frames are chosen by target times, not by frame
number, so videos with a variable frame rate are sampled evenly in time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from pipeline.config import Frames

_ROUNDING_S = 1e-3  # containers such as Matroska round timestamps to milliseconds


def choose_frames(times_s: np.ndarray, start_s: float | None, end_s: float | None, frames: Frames) -> np.ndarray:
    """Indices of the frames to decode, ascending, int64 `[T]`; empty if no frame is in the window.

    `times_s` `[N]`: timestamps of all frames in presentation order. The window is `start_s <= time < end_s`; None is
    an open end. The chosen frames are those on display at `target_times`. Several targets may hit one frame: with a
    frame rate it is chosen once, as long as `min_frames` remain. A fixed count (`uniform`, `max_frames`,
    `min_frames`) is filled up with neighbouring frames, if the window has enough.
    """
    times = np.asarray(times_s, dtype=np.float64)
    if times.ndim != 1 or np.any(np.diff(times) <= 0):
        raise ValueError(f"expected strictly ascending timestamps [N], got shape {times.shape}")
    first = 0 if start_s is None else int(np.searchsorted(times, start_s))
    last = len(times) if end_s is None else int(np.searchsorted(times, end_s))
    if first >= last:
        return np.empty(0, dtype=np.int64)
    window = times[first:last]
    picks = _on_display(window, target_times(float(window[0]), float(window[-1]), frames))
    if not _by_rate(float(window[-1] - window[0]), frames):
        picks = _distinct(picks, len(window))
    elif len(np.unique(picks)) < min(frames.min_frames, len(window)):
        picks = _on_display(window, _even(float(window[0]), float(window[-1]), frames.min_frames))
        picks = _distinct(picks, len(window))
    return first + np.unique(picks).astype(np.int64)


def target_times(first_s: float, last_s: float, frames: Frames) -> np.ndarray:
    """Target times, ascending float64 `[T]`, from the times of the window's first and last frame.

    Strategy `fps`: every `1 / fps` seconds from the first frame, but at least `min_frames` and at most `max_frames`
    times. Strategy `uniform`: `count` times. A bounded or fixed number is spread evenly from the first to the last
    frame, both included; a single time is in the middle.
    """
    span = last_s - first_s
    if _by_rate(span, frames):
        return first_s + np.arange(_rate_count(span, frames)) / frames.fps
    if frames.strategy == "uniform":
        return _even(first_s, last_s, frames.count)
    wanted = min(max(_rate_count(span, frames), frames.min_frames), frames.max_frames)
    return _even(first_s, last_s, wanted)


def _rate_count(span_s: float, frames: Frames) -> int:
    return math.floor((span_s + _ROUNDING_S) * frames.fps) + 1


def _by_rate(span_s: float, frames: Frames) -> bool:
    return frames.strategy == "fps" and frames.min_frames <= _rate_count(span_s, frames) <= frames.max_frames


def _even(first_s: float, last_s: float, count: int) -> np.ndarray:
    if count == 1:
        return np.array([(first_s + last_s) / 2])
    return np.linspace(first_s, last_s, count)


def _on_display(times_s: np.ndarray, targets_s: np.ndarray) -> np.ndarray:
    return np.searchsorted(times_s, targets_s + _ROUNDING_S, side="right") - 1


def _distinct(shown: np.ndarray, available: int) -> np.ndarray:
    """`shown` (ascending) with repeated indices moved to the nearest free ones below `available`; all if too many."""
    if len(shown) >= available:
        return np.arange(available)
    steps = np.arange(len(shown))
    forward = np.maximum.accumulate(shown - steps) + steps
    return np.minimum(forward, available - len(shown) + steps)


class Size(NamedTuple):
    """A frame is resized to `resize_h` × `resize_w`, then its centre `crop_h` × `crop_w` is kept."""

    resize_h: int
    resize_w: int
    crop_h: int
    crop_w: int


@dataclass(frozen=True)
class Sizing:
    """How frames are resized: sides are multiples of `multiple`, area in `min_px`..`max_px`, aspect ratio roughly kept.

    The rule of Qwen's `smart_resize`, except that extreme shapes are reduced to `max_px` instead of rejected. With
    `square(side)` the short side becomes `side` and the centre square is kept, as in CLIP and LLaVA.
    """

    multiple: int
    min_px: int
    max_px: int
    side: int | None = None

    def __post_init__(self) -> None:
        if self.multiple < 1 or not self.multiple**2 <= self.max_px or self.min_px > self.max_px:
            raise ValueError(
                f"expected min_px <= max_px and max_px of at least one {self.multiple} × {self.multiple} patch, "
                f"got min_px {self.min_px}, max_px {self.max_px}; raise frames.max_px"
            )

    @classmethod
    def square(cls, side: int) -> Self:
        return cls(multiple=1, min_px=side * side, max_px=side * side, side=side)

    def of(self, height: int, width: int) -> Size:
        """The `Size` for a frame displayed at `height` × `width` pixels."""
        if height < 1 or width < 1:
            raise ValueError(f"expected a frame with pixels, got {width} × {height}")
        if self.side is not None:
            short = min(height, width)
            resize_h = max(self.side, int(self.side * height / short))
            resize_w = max(self.side, int(self.side * width / short))
            return Size(resize_h, resize_w, self.side, self.side)
        h, w = self._whole(round, height), self._whole(round, width)
        if h * w < self.min_px:
            scale = math.sqrt(self.min_px / (height * width))
            h, w = self._whole(math.ceil, height * scale), self._whole(math.ceil, width * scale)
        if h * w > self.max_px:
            scale = math.sqrt(self.max_px / (height * width))
            h, w = self._whole(math.floor, height * scale), self._whole(math.floor, width * scale)
            # A side is at least one multiple, so the other one may still be too long.
            h = min(h, self._whole(math.floor, self.max_px / w))
            w = min(w, self._whole(math.floor, self.max_px / h))
        return Size(h, w, h, w)

    def _whole(self, rounding: Callable[[float], int], side: float) -> int:
        return max(self.multiple, rounding(side / self.multiple) * self.multiple)
