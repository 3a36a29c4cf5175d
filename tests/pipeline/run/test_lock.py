"""Tests of the run lock: one owner, a live one keeps the lock, a dead one loses it."""

import json
import os
import subprocess
import sys
import time

import pytest

from pipeline.config import Storage
from pipeline.errors import RunError
from pipeline.run.lock import RunLock


def _lock(folder, timeout_s=60.0):
    return RunLock(str(folder / "lock"), Storage(), timeout_s)


def _files(folder):
    return sorted(os.listdir(folder / "lock"))


def test_second_holder_is_refused_and_told_who_holds_it(tmp_path):
    with _lock(tmp_path), pytest.raises(RunError, match=f"locked by process {os.getpid()}"), _lock(tmp_path):
        pass


def test_released_lock_leaves_nothing_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        with _lock(tmp_path):
            assert len(_files(tmp_path)) == 1
        assert _files(tmp_path) == []


def test_lock_is_released_after_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), _lock(tmp_path):
        _ = 1 / 0
    assert _files(tmp_path) == []


def test_lock_of_a_process_killed_on_this_host_is_taken_over_at_once(tmp_path):
    code = (
        "import os, signal, sys; from pipeline.run.lock import RunLock; from pipeline.config import Storage\n"
        "RunLock(sys.argv[1], Storage(), 3600.0).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], check=False)
    assert killed.returncode == -9
    assert _files(tmp_path) == ["000001.json"]
    with _lock(tmp_path):
        assert _files(tmp_path) == ["000002.json"]


def test_lock_of_another_host_is_respected_until_its_signs_of_life_are_too_old(tmp_path):
    (tmp_path / "lock").mkdir()
    holder = {"host": "elsewhere", "boot": "b", "pid": 1, "process_started": "1", "owner": "x"}
    path = tmp_path / "lock" / "000004.json"
    path.write_text(json.dumps(holder | {"sign_of_life": time.time() - 30}))
    with pytest.raises(RunError, match="on elsewhere"), _lock(tmp_path):
        pass
    path.write_text(json.dumps(holder | {"sign_of_life": time.time() - 61}))
    with _lock(tmp_path):
        assert _files(tmp_path) == ["000005.json"]


def test_holder_gives_signs_of_life(tmp_path):
    with _lock(tmp_path, timeout_s=0.2):
        first = json.loads((tmp_path / "lock" / "000001.json").read_text())["sign_of_life"]
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / "lock" / "000001.json").read_text())["sign_of_life"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_holder_that_was_overtaken_is_interrupted_and_leaves_the_new_holders_lock_alone(tmp_path):
    def overtaken():
        with _lock(tmp_path, timeout_s=0.2):
            (tmp_path / "lock" / "000002.json").write_text("{}")
            time.sleep(10)

    with pytest.raises(RunError, match="took over"):
        overtaken()
    assert "000002.json" in _files(tmp_path)
