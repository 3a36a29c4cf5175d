"""Who gives way to whom on the CPUs: threads, processes, and what they begin."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.priority import as_usual, behind_all, wake_nobody, waking_nobody

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has these policies")


@pytest.fixture(autouse=True)
def _usual():
    """Encoders that other tests call may have changed the policy of this thread (SVT-AV1 does, as root)."""
    before, param = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    yield
    os.sched_setscheduler(0, before, param)


def _policy():
    return os.sched_getscheduler(0)


def _in_thread(call):
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def test_threads_and_processes_of_the_block_wake_nobody_and_its_own_thread_is_as_before_at_the_end():
    before = _policy()
    with waking_nobody():
        assert _policy() == os.SCHED_BATCH
        assert _in_thread(_policy) == os.SCHED_BATCH
        told = subprocess.run(
            [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"], capture_output=True, check=True
        )
        assert int(told.stdout) == os.SCHED_BATCH
    assert _policy() == before == os.SCHED_OTHER
    with pytest.raises(KeyError), waking_nobody():
        raise KeyError
    assert _policy() == before


def test_a_thread_of_the_block_may_be_as_usual_without_the_others():
    def inner():
        as_usual()
        return _policy(), threading.get_native_id()

    with waking_nobody():
        policy, thread = _in_thread(inner)
        assert thread != os.getpid()
        assert (policy, _policy()) == (os.SCHED_OTHER, os.SCHED_BATCH)


def test_a_process_of_the_block_may_be_as_usual_and_a_policy_from_elsewhere_stays():
    code = "import os; from pipeline.priority import as_usual; as_usual(); print(os.sched_getscheduler(0))"

    def told():
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)

    with waking_nobody():
        assert told() == os.SCHED_OTHER
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    assert told() == os.SCHED_BATCH


def test_a_thread_that_wakes_nobody_begins_others_that_do_not_either():
    def inner():
        wake_nobody()
        return _policy(), _in_thread(_policy)

    before = _policy()
    assert _in_thread(inner) == (os.SCHED_BATCH, os.SCHED_BATCH)
    assert _policy() == before


def test_a_thread_behind_all_leaves_its_process_alone():
    def inner():
        behind_all()
        return _policy(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = _policy(), os.getpriority(os.PRIO_PROCESS, 0)
    assert _in_thread(inner) == (os.SCHED_IDLE, 19)
    assert (_policy(), os.getpriority(os.PRIO_PROCESS, 0)) == before


def test_where_it_is_forbidden_nothing_changes(monkeypatch):
    def forbidden(*_):
        raise PermissionError("not here")

    before = _policy()
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with waking_nobody():
        as_usual()
        assert _policy() == before
    assert _policy() == before
