"""Counts of starts: which unit is given up, what survives a kill, when the job has to end."""

import json
import time

import pytest
from pydantic import ValidationError

from pipeline.cluster.attempts import Attempts, End, Turn
from pipeline.config import Run, Storage


@pytest.fixture
def file(tmp_path):
    return tmp_path / "attempts.json"


def attempts(file, **settings):
    return Attempts(str(file), Storage(), Run(**settings))


def written(file, expected):
    deadline = time.monotonic() + 10
    while not file.exists() or json.loads(file.read_text()) != expected:
        assert time.monotonic() < deadline, file.read_text() if file.exists() else "no file"
        time.sleep(0.01)
    return True


def test_unit_that_never_ends_is_given_up_after_so_many_starts(file):
    counting = attempts(file, max_attempts=2)
    assert [counting.start("a") for _ in range(3)] == [Turn(True, 1), Turn(True, 2), Turn(False, 2)]


def test_unit_that_ends_starts_anew(file):
    counting = attempts(file)
    counting.start("a")
    counting.end([End("a", "ok", tried=True)])
    assert counting.start("a") == Turn(True, 1)


def test_what_ended_is_told_along_with_the_next_start(file):
    counting = attempts(file)
    counting.start("a")
    assert counting.start("a", [End("a", "ok", tried=True)]) == Turn(True, 1)
    assert counting.state()["units"] == {"ok": 1}


def test_units_are_counted_apart(file):
    counting = attempts(file, max_attempts=2)
    counting.start("a")
    counting.start("a")
    assert counting.start("b").go
    assert not counting.start("a").go


def test_one_start_is_no_proof(file):
    with pytest.raises(ValidationError, match="max_attempts"):
        attempts(file, max_attempts=1)


def test_starts_without_an_end_outlive_a_kill(file):
    before = attempts(file, max_attempts=3)
    before.start("a")
    before.start("a")
    before.start("b")
    before.end([End("b", "ok", tried=True)])
    assert written(file, {"a": 2})
    after = attempts(file, max_attempts=3)
    assert after.start("a") == Turn(True, 3)
    assert after.start("b") == Turn(True, 1)


def test_draining_lets_nothing_pass_and_charges_nobody(file):
    counting = attempts(file)
    counting.drain()
    assert counting.start("a") == Turn(False, 0, draining=True)
    assert not file.exists()


def test_units_by_status_are_counted(file):
    counting = attempts(file)
    for unit, status in {"a": "ok", "b": "ok", "c": "error"}.items():
        counting.start(unit)
        counting.end([End(unit, status, tried=True)])
    state = counting.state()
    assert (state["units"], state["fault"]) == ({"ok": 2, "error": 1}, None)


def test_what_processes_load_compute_and_wait_for_is_told(file):
    counting = attempts(file)
    counting.loading("a")
    assert len(counting.state()["loading_s"]) == 1
    counting.loaded("a")
    assert counting.report("a", 7, "cpu") is False
    state = counting.state()
    assert (state["loading_s"], state["loaded"]) == ([], 1)
    assert (state["actors"]["a"]["worked"], state["actors"]["a"]["waits_for"]) == (7, "cpu")
    counting.drain()
    assert counting.report("a", 8, None) is True


def test_a_job_that_stands_still_ends_at_once_with_the_reason(file):
    counting = attempts(file)
    assert counting.orders() == (False, None)
    counting.drain()
    assert counting.orders() == (True, None)
    counting.stall("waiting for a CPU")
    assert counting.orders() == (True, "waiting for a CPU")
    assert counting.state()["fault"] == "waiting for a CPU"


def _give_up(counting, unit):
    counting.start(unit)
    counting.start(unit)
    assert counting.start(unit).go is False
    counting.end([End(unit, "error", tried=False)])


def test_too_many_units_given_up_in_a_row_end_the_job(file):
    counting = attempts(file, max_attempts=2, max_given_up=2)
    _give_up(counting, "a")
    _give_up(counting, "b")
    assert counting.state()["fault"] is None
    _give_up(counting, "c")
    assert "3 units in a row" in counting.state()["fault"]
    assert counting.start("d").draining


def test_a_unit_that_is_finished_breaks_the_row(file):
    counting = attempts(file, max_attempts=2, max_given_up=2)
    for unit in "abcdef":
        _give_up(counting, unit)
        counting.start(f"good {unit}")
        counting.end([End(f"good {unit}", "ok", tried=True)])
    assert counting.state()["fault"] is None


def test_model_process_that_never_comes_up_ends_the_job(file):
    counting = attempts(file)
    for _ in range(4):
        counting.loading("one")
        counting.loading("another")
        counting.loaded("another")
    assert counting.state()["fault"] is None
    counting.loading("one")
    assert "while it loaded" in counting.state()["fault"]
    assert counting.start("a").draining


def test_storage_that_is_away_is_written_to_when_it_is_back(tmp_path):
    counting = Attempts(str(tmp_path / "late" / "attempts.json"), Storage(), Run())
    (tmp_path / "late").write_text("in the way")
    counting.start("a")
    time.sleep(0.1)
    (tmp_path / "late").unlink()
    assert written(tmp_path / "late" / "attempts.json", {"a": 1})
