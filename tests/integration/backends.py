"""Decoder backends that take their time, or misbehave by file name: `crash…`, `hang…`, and `poison…` in the model."""

import os
import time

import numpy as np

from pipeline.frame_sources import DecordSource


def slow(path, index, size):
    """decord, a second later: a job that is still there when something happens to its nodes."""
    time.sleep(1.0)
    return DecordSource(path, index, size)


def dangerous(path, index, size):
    """decord, but `crash…` kills its process, `hang…` never comes back, and `poison…` kills who takes its frames.

    A `poison-once…` does so the first time only, which a file beside it remembers.
    """
    name = os.path.basename(path)
    if name.startswith("crash"):
        os.kill(os.getpid(), 9)
    if name.startswith("hang"):
        time.sleep(3600)
    source = DecordSource(path, index, size)
    if name.startswith("poison"):
        return _Poisoned(source, f"{path}.taken" if name.startswith("poison-once") else None)
    return source


class _Poisoned:
    def __init__(self, source, marker):
        self._source, self._marker = source, marker

    def read(self, picks):
        frames = self._source.read(picks).view(_Frames)
        frames.marker = self._marker
        return frames

    def close(self):
        self._source.close()


class _Frames(np.ndarray):
    """Frames that kill the process which unpickles them; with a `marker`, the first one only."""

    marker = None

    def __reduce_ex__(self, protocol):
        return _take, (np.array(self), self.marker)


def _take(frames, marker):
    if marker is not None:
        if os.path.exists(marker):
            return frames
        open(marker, "x").close()
    os.kill(os.getpid(), 9)
