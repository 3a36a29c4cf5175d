"""Which units are left out by their length, and what decoding leaves to others."""

import os
import sys
from queue import SimpleQueue

import pytest

from pipeline import stream
from pipeline.config import Clips, Frames, JobConfig
from pipeline.errors import SkippedError
from pipeline.stream import FrameStreams, _in_background, check_length, is_one_batch

_LIMITS = Clips(skip_shorter_s=2.0, skip_longer_s=60.0)


def _unit(start_s=None, end_s=None, duration_s=None):
    return {"kind": "video", "uris": ["a.mp4"], "start_s": start_s, "end_s": end_s, "duration_s": duration_s}


@pytest.mark.parametrize("unit", [_unit(duration_s=2.0), _unit(duration_s=60.0), _unit(5.0, 10.0, 3600.0), _unit()])
def test_units_within_the_limits_or_of_unknown_length_are_captioned(unit):
    check_length(unit, _LIMITS)


@pytest.mark.parametrize(
    ("unit", "kind"),
    [(_unit(duration_s=1.9), "TooShort"), (_unit(59.0, None, 60.0), "TooShort"), (_unit(0.0, 61.0), "TooLong")],
)
def test_units_outside_the_limits_are_skipped(unit, kind):
    with pytest.raises(SkippedError) as error:
        check_length(unit, _LIMITS)
    assert error.value.error_type == kind


def test_nothing_is_skipped_by_default():
    check_length(_unit(duration_s=1e9), Clips())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has this policy")
def test_batches_are_made_behind_all_others_and_their_reader_stays_where_it_was():
    before = os.sched_getscheduler(0)
    made = (os.sched_getscheduler(0) for _ in range(3))
    assert list(_in_background(made)) == [os.SCHED_IDLE] * 3
    assert os.sched_getscheduler(0) == before != os.SCHED_IDLE


def test_what_ends_the_batches_is_raised_after_those_before_it():
    def batches():
        yield "first"
        raise OSError("the disk is full")

    seen = _in_background(batches())
    assert next(seen) == "first"
    with pytest.raises(OSError, match="the disk is full"):
        next(seen)


@pytest.mark.parametrize(
    ("unit", "frames", "expected"),
    [
        (_unit(), Frames(max_frames=16, batch_frames=16), True),
        (_unit(), Frames(max_frames=17, batch_frames=16), False),
        (_unit(10.0, 20.0), Frames(fps=1.5, max_frames=17, batch_frames=16), True),
        (_unit(10.0, 20.1), Frames(fps=1.6, max_frames=17, batch_frames=16), False),
        (_unit(10.0, None), Frames(fps=0.1, max_frames=17, batch_frames=16), False),
        (_unit(), Frames(strategy="uniform", count=8, batch_frames=8), True),
        (_unit(), Frames(strategy="uniform", count=9, batch_frames=8), False),
        ({"kind": "images", "uris": ["a"]}, Frames(batch_frames=1), True),
        ({"kind": "images", "uris": ["a", "b"]}, Frames(batch_frames=16), False),
    ],
)
def test_a_unit_comes_whole_where_it_cannot_have_a_second_batch(unit, frames, expected):
    assert is_one_batch(unit, frames) is expected


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has this policy")
def test_frames_are_asked_for_by_threads_that_wake_nobody(monkeypatch):
    policies = SimpleQueue()
    monkeypatch.setattr(stream.FrameStream, "fetch", lambda *_: policies.put(os.sched_getscheduler(0)))
    job = JobConfig.model_validate({"source": {"uri": "videos"}, "sink": {"uri": "rows"}})
    FrameStreams(job, sizing=None).open(_unit())
    assert policies.get(timeout=10) == os.SCHED_BATCH
