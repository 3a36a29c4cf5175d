"""When frames are ready, how far ahead decode tasks are, and what is raised if frames do not arrive."""

from random import Random
from types import SimpleNamespace

import pytest
import ray

from pipeline.cluster import frame_streams as stream
from pipeline.cluster.decode_tasks import AHEAD
from pipeline.cluster.frame_streams import FrameStreams
from pipeline.config import JobConfig
from pipeline.errors import UnitError
from tests.pipeline.cluster.simulated import SimulatedRay, on_ray

_UNIT = {"kind": "video", "uris": ["a.mp4"]}


@pytest.fixture
def clock(monkeypatch):
    """The clock of the streams; each look takes a second."""
    clock = SimpleNamespace(now=100.0)

    def tick():
        clock.now += 1.0
        return clock.now

    monkeypatch.setattr(stream, "time", SimpleNamespace(perf_counter=tick))
    return clock


def _opened(monkeypatch, messages, cpus=1, **simulation):
    """A stream with these messages on a simulated Ray."""
    simulated = SimulatedRay(cpus, Random(0), **simulation)
    on_ray(monkeypatch, simulated, lambda unit: iter(messages))
    job = JobConfig.model_validate({"source": {"uri": "v"}, "sink": {"uri": "r"}, "decode": {"timeout_s": 60.0}})
    streams = FrameStreams(job, sizing=None)
    return streams.open(_UNIT), streams, simulated


def _settle(simulated):
    while simulated.move():
        pass


def test_batches_come_in_order_and_none_stands_for_what_is_not_ready(monkeypatch, clock):
    one, _, simulated = _opened(monkeypatch, [["a", "b"], ["c"]])
    read = iter(one)
    assert next(read) is None
    assert not one.ready
    _settle(simulated)
    assert [batch for batch in read if batch is not None] == ["a", "b", "c"]


def test_a_decoder_is_a_few_messages_ahead_of_its_reader_and_then_waits_without_a_cpu(monkeypatch, clock):
    count = 3 * AHEAD
    _, streams, simulated = _opened(monkeypatch, [[number] for number in range(count)])
    other = streams.open(_UNIT)
    _settle(simulated)
    assert simulated.most_ahead == AHEAD
    read, found = iter(other), []
    while len(found) < count:  # all of the other unit arrives while nobody reads the first one
        batch = next(read)
        found += [] if batch is None else [batch]
        _settle(simulated)
    assert found == list(range(count))
    assert simulated.most_ahead == AHEAD


def test_waiting_for_a_cpu_is_told_apart_from_waiting_for_frames(monkeypatch, clock):
    one, streams, simulated = _opened(monkeypatch, [["a"]])
    read = iter(one)
    assert next(read) is None
    assert (streams.asked, streams.running) == (1, 0)
    clock.now += 1000.0
    assert next(read) is None, "waiting for a CPU has no limit"
    _settle(simulated)
    assert [batch for batch in read if batch is not None] == ["a"]
    assert one.queue_s > 1000.0
    assert streams.running == 1


def test_a_stream_that_was_ready_before_anybody_read_it_has_not_queued(monkeypatch, clock):
    one, streams, simulated = _opened(monkeypatch, [["a"]])
    _settle(simulated)
    streams.look()
    streams.look()
    assert one.ready
    assert [batch for batch in one if batch is not None] == ["a"]
    assert one.queue_s == 0.0


def test_the_error_that_ended_the_batches_is_raised_after_them(monkeypatch, clock):
    one, _, simulated = _opened(monkeypatch, [["a"], UnitError("decode", "Corrupt", "cut off")])
    _settle(simulated)
    read = iter(one)
    assert next(batch for batch in read if batch is not None) == "a"
    with pytest.raises(UnitError, match="cut off"):
        list(read)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ray.exceptions.WorkerCrashedError(), "DecoderCrashed"),
        (ray.exceptions.OutOfMemoryError("killed"), "OutOfMemory"),
        (ray.exceptions.RaySystemError("lost"), "RaySystemError"),
    ],
)
def test_a_decoder_that_dies_is_an_error_of_its_unit(monkeypatch, clock, error, kind):
    one, _, simulated = _opened(monkeypatch, [error, ["a"]])
    _settle(simulated)
    with pytest.raises(UnitError) as raised:
        list(one)
    assert (raised.value.stage, raised.value.error_type) == ("decode", kind)


def test_a_decoder_that_dies_too_often_is_an_error_of_its_unit(monkeypatch, clock):
    one, _, simulated = _opened(monkeypatch, [["a"]], deaths=1.0)
    _settle(simulated)
    with pytest.raises(UnitError, match="died, 3 tries"):
        list(one)


def test_a_decoder_that_takes_too_long_for_a_batch_is_ended(monkeypatch, clock):
    one, _, simulated = _opened(monkeypatch, [["a"], ["b"]])
    simulated.move()  # the task starts
    simulated.move()  # and sends its initial None
    read = iter(one)
    assert next(read) is None
    clock.now += 55.0
    assert next(read) is None
    clock.now += 10.0
    with pytest.raises(UnitError, match=r"decode\.timeout_s = 60 s"):
        list(read)
    assert not simulated.tasks


def test_a_decoder_that_waits_for_its_reader_has_all_the_time(monkeypatch, clock):
    one, streams, simulated = _opened(monkeypatch, [[number] for number in range(2 * AHEAD)])
    _settle(simulated)
    for _ in range(AHEAD + 2):
        streams.look()
    clock.now += 1000.0
    streams.look()
    read, found = iter(one), []
    while len(found) < 2 * AHEAD:
        found += [batch for batch in [next(read)] if batch is not None]
        _settle(simulated)
    assert found == list(range(2 * AHEAD))


def test_a_stream_that_is_not_read_any_more_ends_its_task(monkeypatch, clock):
    one, streams, simulated = _opened(monkeypatch, [["a"]])
    one.close()
    assert not simulated.tasks
    assert streams.asked == 0


def test_a_unit_that_is_refused_is_not_decoded(monkeypatch, clock):
    _, streams, simulated = _opened(monkeypatch, [["a"]])
    refused = streams.open(_UNIT, UnitError("prepare", "ContextTooLong", "too long"))
    assert len(simulated.tasks) == 1
    assert refused.ready
    with pytest.raises(UnitError, match="too long"):
        list(refused)
