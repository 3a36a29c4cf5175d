"""The clock that ends a model process which is silent for too long."""

import subprocess
import sys

import pytest

_START = "import time\nfrom pipeline.actor import _Watch\n"
_WORKS_TOO_LONG = "with _Watch(0.3): time.sleep(30)"
_WORKS_TOO_LONG_ON_A_BATCH = """
with _Watch(0.3) as watch:
    for _ in watch.over([1]):
        time.sleep(30)
"""
_WAITS_FOR_FRAMES = """
def slow():
    for _ in range(3):
        time.sleep(0.5)
        yield 1

with _Watch(0.4) as watch:
    list(watch.over(slow()))
time.sleep(0.5)
print("alive")
"""


def _run(code):
    return subprocess.run([sys.executable, "-c", _START + code], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("code", [_WORKS_TOO_LONG, _WORKS_TOO_LONG_ON_A_BATCH])
def test_silence_ends_the_process_and_tells_where_it_was(code):
    ended = _run(code)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "line" in ended.stderr


def test_waiting_for_frames_does_not_count():
    assert _run(_WAITS_FOR_FRAMES).stdout == "alive\n"
