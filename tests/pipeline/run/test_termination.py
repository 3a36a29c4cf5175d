"""Tests of SIGTERM, sent to a separate process while planning, draining and stuck."""

import signal
import subprocess
import sys
import time

import pytest

_START = """
import sys, threading, time
from jobs.cli import main_guard
from pipeline.run.termination import Termination

asked = threading.Event()

def ready():
    print("ready", flush=True)
"""
_PLANNING = """
def main():
    with Termination(grace_s=60):
        ready()
        time.sleep(60)
"""
_DRAINS = """
def main():
    with Termination(grace_s=60) as termination, termination.draining(asked.set):
        ready()
        asked.wait(60)
        print("drained", termination.asked, flush=True)
    return 7
"""
_STUCK = """
def main():
    with Termination(grace_s=0.2) as termination, termination.draining(asked.set):
        ready()
        threading.Event().wait(60)
"""
_PATIENT = _STUCK.replace("grace_s=0.2", "grace_s=60")
_FROM_A_THREAD = """
def main():
    with Termination(grace_s=0.1) as termination, termination.draining(asked.set):
        ready()
        threading.Thread(target=termination.request).start()
        threading.Event().wait(60)
"""


def _run(code, signals):
    process = subprocess.Popen(
        [sys.executable, "-c", f"{_START}\n{code}\nmain_guard(main)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize(("code", "signals"), [(_PLANNING, 1), (_STUCK, 1), (_PATIENT, 2), (_FROM_A_THREAD, 0)])
def test_end_on_request_is_exit_code_0_and_a_line(code, signals):
    status, out, err = _run(code, signals)
    assert (status, out) == (0, "")
    assert err == "the job was asked to end; the same command continues where this one stopped\n"


def test_block_that_drains_in_time_ends_in_its_own_way():
    assert _run(_DRAINS, 1) == (7, "drained True\n", "")


def test_handler_of_before_is_back_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    from pipeline.run.termination import Termination

    with Termination(1.0) as termination, termination.draining(lambda: None):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
