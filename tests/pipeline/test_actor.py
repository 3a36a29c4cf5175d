"""The clock that ends a model process which is silent for too long."""

import subprocess
import sys

import pytest

_START = "import time\nfrom pipeline.actor import _Watch\n"
_WORKS_TOO_LONG = "with _Watch(0.3): time.sleep(30)"
_WORKS_TOO_LONG_AFTER_A_BEAT = """
with _Watch(0.3) as watch:
    for _ in range(4):
        time.sleep(0.1)
        watch.beat()
    time.sleep(30)
"""
_GIVES_SIGNS_AND_PAUSES = """
with _Watch(0.4) as watch:
    for _ in range(10):
        time.sleep(0.1)
        watch.beat()
    watch.pause()
    time.sleep(1.0)
    watch.beat()
time.sleep(0.6)
print("alive")
"""


def _run(code):
    return subprocess.run([sys.executable, "-c", _START + code], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("code", [_WORKS_TOO_LONG, _WORKS_TOO_LONG_AFTER_A_BEAT])
def test_silence_ends_the_process_and_tells_where_it_was(code):
    ended = _run(code)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "line" in ended.stderr


def test_signs_of_life_and_pauses_keep_it_alive():
    assert _run(_GIVES_SIGNS_AND_PAUSES).stdout == "alive\n"
