"""A thread on a CPU of its own."""

import os
import threading

import pytest

from pipeline.pinning import keep_to_one_cpu


def in_a_thread(call):
    """What `call` gives in a thread that ends, and that thread's CPUs afterwards."""
    found = []
    thread = threading.Thread(target=lambda: found.extend([call(), os.sched_getaffinity(0)]))
    thread.start()
    thread.join()
    return found


def test_every_holder_has_a_cpu_of_its_own_until_there_is_none_left(tmp_path):
    cpus = os.sched_getaffinity(0)
    held = [in_a_thread(lambda: keep_to_one_cpu(tmp_path)) for _ in cpus]
    assert [affinity for _, affinity in held] == [{cpu} for cpu in sorted(cpus)]
    assert in_a_thread(lambda: keep_to_one_cpu(tmp_path)) == [None, cpus]
    held[0][0][1].close()
    assert in_a_thread(lambda: keep_to_one_cpu(tmp_path))[1] == {min(cpus)}
    assert os.sched_getaffinity(0) == cpus  # of this thread


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        keep_to_one_cpu(tmp_path / "gone")
