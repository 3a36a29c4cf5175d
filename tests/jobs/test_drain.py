"""A head that terminates stops its jobs and waits until they end."""

import sys
import types

import pytest

from jobs import drain


class Status:
    def __init__(self, over):
        self.over = over

    def is_terminal(self):
        return self.over


class Client:
    """A fake head whose jobs end after a number of polls; None: never. Jobs without a submission id are drivers."""

    looks, stopped = {}, []

    def __init__(self, address):
        assert address == "http://head"

    def list_jobs(self):
        for id, left in self.looks.items():
            if left and id in self.stopped:
                self.looks[id] = left - 1
        driver = types.SimpleNamespace(submission_id=None, status=Status(False))
        jobs = [types.SimpleNamespace(submission_id=id, status=Status(left == 0)) for id, left in self.looks.items()]
        return [driver, *jobs]

    def stop_job(self, id):
        self.stopped.append(id)


@pytest.fixture
def run(monkeypatch):
    seconds = [0.0]
    monkeypatch.setitem(sys.modules, "ray.job_submission", types.SimpleNamespace(JobSubmissionClient=Client))
    monkeypatch.setattr(drain.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(drain.time, "sleep", lambda s: seconds.__setitem__(0, seconds[0] + s))
    monkeypatch.setattr(sys, "argv", ["jobs.drain", "--address", "http://head", "--timeout-s", "10"])

    def call(**looks):
        monkeypatch.setattr(Client, "looks", looks)
        monkeypatch.setattr(Client, "stopped", [])
        return drain.main()

    return call


def test_every_running_job_is_stopped_once_and_waited_for(run):
    assert run(a=3, b=7, done=0) == 0
    assert Client.stopped == ["a", "b"]


def test_nothing_to_stop_is_no_error(run):
    assert run(done=0) == 0
    assert Client.stopped == []


def test_a_job_that_does_not_end_is_not_waited_for_forever(run, capsys):
    assert run(a=1, stuck=None) == 1
    assert "still running after 10 s: stuck" in capsys.readouterr().err
