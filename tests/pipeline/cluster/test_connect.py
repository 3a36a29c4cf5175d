"""The progress display, in a terminal and in a log."""

import io
import json
import sys

import pytest
import ray

from pipeline import logs
from pipeline.cluster.connect import _Display, connect
from pipeline.cluster.waits import Wait
from pipeline.config import load_config
from pipeline.errors import RunError


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _show(monkeypatch, stream, log_format="text"):
    monkeypatch.setattr(sys, "stderr", stream)
    with logs.to_terminal(log_format):
        display = _Display(total=10, done_before=3, log_format=log_format)
        display.show({"ok": 1, "error": 1})
        display.show({"ok": 1, "error": 1})
        display.end()
    return stream.getvalue()


def test_log_gets_whole_lines(monkeypatch):
    text = _show(monkeypatch, io.StringIO())
    assert text.count("\n") == 2
    assert "5/10 units (50%)  error 1 ok 1" in text
    assert "\r" not in text


def test_terminal_line_is_overwritten_and_cleared(monkeypatch):
    text = _show(monkeypatch, _Terminal())
    assert "\n" not in text
    assert text.startswith("\r")
    assert text.endswith("\r\033[K")


def test_progress_as_json_is_an_event_per_interval(monkeypatch):
    lines = [json.loads(line) for line in _show(monkeypatch, _Terminal(), "json").splitlines()]
    assert len(lines) == 2
    assert {"event": "progress", "done": 5, "total": 10, "units": {"ok": 1, "error": 1}}.items() <= lines[0].items()


@pytest.mark.parametrize(("options", "what"), [([], "started"), (["ray.address=10.0.0.1:6379"], "reached at 10.0.0.1")])
def test_ray_that_does_not_come_up_is_told_in_a_line(monkeypatch, options, what):
    def init(**_):
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    job = load_config(None, ["source.uri=a", "sink.uri=b", *options])
    with (
        pytest.raises(RunError, match=f"Ray cannot be {what}.*: The current node timed out during startup"),
        connect(job),
    ):
        pass


@pytest.mark.parametrize(("all_", "begins"), [(True, "waiting 12 s for"), (False, "some actors wait 12 s for")])
def test_what_is_waited_for_stands_in_the_line(monkeypatch, all_, begins):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    _Display(total=10, done_before=3, log_format="text").show({"ok": 1}, Wait("cpu", 12.3, all_))
    assert terminal.getvalue().endswith(f"  {begins} a CPU to decode on\n")


def test_what_is_waited_for_stands_in_the_event(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with logs.to_terminal("json"):
        _Display(total=10, done_before=3, log_format="json").show({"ok": 1}, Wait("frames", 12.3))
    event = json.loads(terminal.getvalue())
    assert {"waits_for": "frames", "waits_s": 12, "all_wait": True}.items() <= event.items()
