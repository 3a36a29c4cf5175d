"""When frames are there, and what is told when they are not."""

import os
import sys
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import ray

from pipeline import stream
from pipeline.config import Frames, JobConfig
from pipeline.decode_tasks import Whole
from pipeline.errors import UnitError
from pipeline.stream import FrameStreams, is_one_batch


def _unit(start_s=None, end_s=None):
    return {"kind": "video", "uris": ["a.mp4"], "start_s": start_s, "end_s": end_s}


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
    monkeypatch.setattr(stream.FrameStream, "_fetch", lambda _: policies.put(os.sched_getscheduler(0)))
    job = JobConfig.model_validate({"source": {"uri": "videos"}, "sink": {"uri": "rows"}})
    FrameStreams(job, sizing=None).open(_unit())
    assert policies.get(timeout=10) == os.SCHED_BATCH


class _Ref:
    """The message of a task that runs until `comes` is called."""

    def __init__(self):
        self.there, self.cancelled, self.value = False, False, None

    def comes(self, value):
        self.there, self.value = True, value


def _get(ref):
    if isinstance(ref.value, Exception):
        raise ref.value
    return ref.value


@pytest.fixture
def clock(monkeypatch):
    """The time that streams see; moved by adding to `now`."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stream, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def whole(monkeypatch):
    """Opens a unit that comes whole: its stream, its message, and what the pool of threads was asked to do."""
    fake = SimpleNamespace(
        exceptions=ray.exceptions,
        wait=lambda refs, timeout, num_returns=1: ([ref for ref in refs if ref.there], []),
        get=_get,
        cancel=lambda ref, force: setattr(ref, "cancelled", force),
    )
    monkeypatch.setattr(stream, "ray", fake)

    def open_():
        ref, calls = _Ref(), []
        streams = SimpleNamespace(whole=lambda unit: ref, background=calls.append, timeout_s=60.0, tries=3)
        streams.look = partial(FrameStreams.look, streams)
        return stream.FrameStream(streams, _unit()), ref, calls

    return open_


def test_a_whole_unit_is_not_there_until_it_is(whole, clock):
    one, ref, calls = whole()
    read = iter(one)
    assert next(read) is None
    assert next(read) is None
    clock.now += 5.0
    ref.comes(Whole(2.0, ["batch"]))
    assert list(read) == ["batch"]
    assert one.queue_s == 3.0
    assert one.running
    assert not calls
    one.close()
    assert not ref.cancelled, "it is through"


def test_a_whole_unit_that_was_there_before_it_was_looked_for_has_not_queued(whole):
    one, ref, _ = whole()
    ref.comes(Whole(0.01, ["batch"]))
    assert list(one) == ["batch"]
    assert one.queue_s == 0


def test_a_whole_unit_is_ready_once_somebody_has_looked_and_it_was_there(whole):
    one, ref, _ = whole()
    one._streams.look([one])
    assert not one.ready
    ref.comes(Whole(0.01, ["batch"]))
    one._streams.look([one])
    assert one.ready
    assert list(one) == ["batch"]


def test_a_whole_unit_that_is_late_is_asked_for_as_a_stream_while_nobody_reads_it(whole, clock):
    one, ref, calls = whole()
    clock.now += 61.0
    one._streams.look([one])
    assert ref.cancelled
    assert calls == [one._fetch]
    assert not one.ready
    one._there.put(UnitError("decode", "Timeout", "nothing came"))
    assert one.ready
    with pytest.raises(UnitError, match="nothing came"):
        list(one)


def test_the_error_of_a_whole_unit_is_raised_after_its_batch(whole):
    one, ref, _ = whole()
    ref.comes(Whole(0.01, ["batch", UnitError("decode", "Corrupt", "cut off")]))
    read = iter(one)
    assert next(read) == "batch"
    with pytest.raises(UnitError, match="cut off"):
        next(read)


def test_a_decoder_that_died_is_told_by_the_unit(whole):
    one, ref, _ = whole()
    ref.comes(ray.exceptions.WorkerCrashedError())
    with pytest.raises(UnitError) as error:
        list(one)
    assert (error.value.stage, error.value.error_type) == ("decode", "DecoderCrashed")


def test_a_whole_unit_that_takes_too_long_is_asked_for_as_a_stream(whole, clock):
    one, ref, calls = whole()
    read = iter(one)
    clock.now += 59.0
    assert next(read) is None
    assert not ref.cancelled
    assert not calls
    clock.now += 2.0
    assert next(read) is None
    assert ref.cancelled
    assert calls == [one._fetch]


def test_a_whole_unit_that_nobody_reads_any_more_is_ended(whole):
    one, ref, _ = whole()
    one.close()
    assert ref.cancelled
