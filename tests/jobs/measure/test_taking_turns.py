"""Two processes run in turns: never together, each to its end, and each counts its own seconds."""

import sys
import time
from itertools import pairwise

import pytest

from jobs.measure.taking_turns import Process, take_turns

_WORK = r"""
import subprocess, sys, time

def note(name, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        print(f"{name} {time.time()}\n", end="", flush=True)  # one write, whole
        time.sleep(0.005)

if len(sys.argv) > 2:
    child = subprocess.Popen([sys.executable, __file__, "child"])
    note(sys.argv[1], float(sys.argv[2]))
    child.wait()
else:
    note(sys.argv[1], 1.2)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stops processes by signals")


@pytest.fixture
def module(tmp_path):
    (tmp_path / "at_work.py").write_text(_WORK)
    return {"PYTHONPATH": str(tmp_path)}


def _times(process):
    return [float(line.split()[1]) for line in process.output().splitlines()]


def test_they_never_run_together_and_neither_do_their_children(module):
    with Process("at_work", "a", "1.2", **module) as one, Process("at_work", "b", "1.2", **module) as other:
        while not (one.output().count("child") and other.output().count("child")):
            time.sleep(0.01)
        began = time.time()
        take_turns(one, other, 0.3)
        ended = time.time()
        of_one, of_other = ([t for t in _times(process) if t > began + 0.05] for process in (one, other))
        runs = [name for _, name in sorted([(t, "one") for t in of_one] + [(t, "other") for t in of_other])]
        changes = sum(a != b for a, b in pairwise(runs))
        assert 3 <= changes <= 16, "whole turns, not line by line"
        assert one.ran(began, ended) + other.ran(began, ended) == pytest.approx(ended - began, rel=0.2)
        assert all(process.ran(began, ended) < 0.8 * (ended - began) for process in (one, other))


def test_a_moment_in_which_it_was_stopped_is_none_of_its_own(module):
    with Process("at_work", "a", "1.2", **module) as process:
        process.stop()
        stopped = time.time()
        time.sleep(0.2)
        assert not process.wait(0)
        process.go_on()
        went_on = time.time()
        assert process.wait(20)
        assert process.ran(stopped, went_on) < 0.1
        assert process.ran(went_on, went_on + 0.5) == pytest.approx(0.5, abs=0.05)


def test_the_end_of_what_a_failing_process_said_is_raised(module):
    with Process("at_work", "a", "no number", **module) as process:
        assert process.wait(20)
        with pytest.raises(RuntimeError, match=r"(?s)at_work a no number ended with 1:.*could not convert"):
            process.output()
