"""Decoder backends that misbehave, by file name."""

import os
import time

from pipeline.frame_sources import DecordSource


def dangerous(path, index, size):
    """decord, but `crash…` kills the process and `hang…` never comes back."""
    name = os.path.basename(path)
    if name.startswith("crash"):
        os.kill(os.getpid(), 9)
    if name.startswith("hang"):
        time.sleep(3600)
    return DecordSource(path, index, size)
