"""Decoder backends that are slow, or that fail by file name.

`crash…` and `hang…` fail in the decoder, `poison…` and `silent…` in the model.
"""

import ctypes
import os
import time

import numpy as np

from pipeline.decoding.backends import DecordSource


def slow(path, index, size):
    """decord, one second later, so that the job still runs when something happens to its nodes."""
    time.sleep(1.0)
    return DecordSource(path, index, size)


def dangerous(path, index, size):
    """decord, except that `crash…` kills its process, `hang…` never returns, `poison…` kills the process that reads its
    frames, and the process that computes on the frames of `silent…` hangs in native code.

    `poison-once…` kills only the first time; a file next to it records that.
    """
    name = os.path.basename(path)
    if name.startswith("crash"):
        os.kill(os.getpid(), 9)
    if name.startswith("hang"):
        time.sleep(3600)
    source = DecordSource(path, index, size)
    if name.startswith("poison"):
        return _Trapped(source, _kill, f"{path}.taken" if name.startswith("poison-once") else None)
    if name.startswith("silent"):
        return _Trapped(source, _silence)
    return source


class _Trapped:
    def __init__(self, source, *trap):
        self._source, self._trap = source, trap

    def read(self, picks):
        frames = self._source.read(picks).view(_Frames)
        frames.trap = self._trap
        return frames

    def close(self):
        self._source.close()


class _Frames(np.ndarray):
    """Frames with a trap: a function and its arguments, called with the frames in the process that unpickles them."""

    trap = None

    def __reduce_ex__(self, protocol):
        trap, *arguments = self.trap
        return trap, (np.array(self), *arguments)


def _kill(frames, marker):
    """Kill the process; with a `marker` only the first time."""
    if marker is not None:
        if os.path.exists(marker):
            return frames
        open(marker, "x").close()
    os.kill(os.getpid(), 9)


def _silence(frames):
    return frames.view(_Silent)


class _Silent(np.ndarray):
    """Frames that hang on access; no other thread of the process runs any more, either."""

    def __getitem__(self, _):
        ctypes.PyDLL(None).sleep(3600)  # a call that does not release the GIL
