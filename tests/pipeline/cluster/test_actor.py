"""How an actor serves its blocks, and the clock that ends a model process which is silent for too long."""

import subprocess
import sys
import threading
import time
from collections import Counter, deque
from types import SimpleNamespace

import pytest

from pipeline.cluster import actor, turns
from pipeline.cluster.attempts import End, Turn
from pipeline.config import load_config
from pipeline.schema import ROW_SCHEMA, units_table
from tests.pipeline.rows import row

_START = "import time\nfrom pipeline.cluster.actor import _Watch\n"
_WORKS_TOO_LONG = "with _Watch(0.3): time.sleep(30)"
_WORKS_TOO_LONG_AFTER_A_BEAT = """
with _Watch(0.3) as watch:
    for _ in range(4):
        time.sleep(0.1)
        watch.beat()
    time.sleep(30)
"""
_GIVES_SIGNS_AND_PAUSES = """
with _Watch(0.4) as watch:
    for _ in range(10):
        time.sleep(0.1)
        watch.beat()
    watch.pause()
    time.sleep(1.0)
    watch.beat()
time.sleep(0.6)
print("alive")
"""


def _run(code):
    return subprocess.run([sys.executable, "-c", _START + code], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("code", [_WORKS_TOO_LONG, _WORKS_TOO_LONG_AFTER_A_BEAT])
def test_silence_ends_the_process_and_tells_where_it_was(code):
    ended = _run(code)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "line" in ended.stderr


def test_signs_of_life_and_pauses_keep_it_alive():
    assert _run(_GIVES_SIGNS_AND_PAUSES).stdout == "alive\n"


class _Remote:
    """An `Attempts` that lets all pass, until it is told to drain."""

    def __init__(self):
        self.drain = False
        self.started, self.ended = [], []
        self.begun = SimpleNamespace(remote=lambda ids: {})
        self.loading = self.loaded = SimpleNamespace(remote=lambda process: None)
        self.report = SimpleNamespace(remote=lambda process, worked, waits_for: self.drain)
        self.start = SimpleNamespace(remote=self._start)
        self.end = SimpleNamespace(remote=self.ended.extend)

    def _start(self, unit_id, ended):
        self.ended.extend(ended)
        self.started.append(unit_id)
        return Turn(go=not self.drain, attempt=1, draining=self.drain)


class _Stream:
    """One batch of frames; with `ready` off it is late."""

    running, queue_s = True, 0.0

    def __init__(self, ready=True):
        self.ready = ready

    def __iter__(self):
        return iter(["frames"])

    def close(self):
        pass


class _Captioner:
    """Has `room` for three units; their answers are through in the order in which they came, or `broken`."""

    def __init__(self):
        self.room = 3
        self.together = []
        self.broken = None

    def refusal(self, unit):
        return None

    def rows(self, units, beat, wait):
        units, inside = iter(units), []
        while True:
            given = next(units, ...) if len(inside) < self.room else None
            if given is ... and not inside:
                return
            if given not in (None, ...):
                inside.append(given)
                continue
            if not inside:
                continue
            if self.broken:
                raise self.broken
            self.together.append({one.unit["id"] for one in inside})
            first = inside.pop(0)
            try:
                list(first.batches)
                status = "ok"
            except actor.UnitError:
                status = "error"
            yield row(first.unit["id"], status=status, wait_s=0.0)


@pytest.fixture
def served(monkeypatch, tmp_path):
    context = SimpleNamespace(
        get_actor_id=lambda: "a", get_temp_dir=lambda: tmp_path, get_session_name=lambda: "session"
    )
    (tmp_path / "session" / "logs").mkdir(parents=True)
    monkeypatch.setattr(actor, "ray", SimpleNamespace(get=lambda value: value, get_runtime_context=lambda: context))
    monkeypatch.setattr(turns, "ray", SimpleNamespace(get=lambda value: value))
    monkeypatch.setattr(
        actor, "ActorMetrics", lambda run_id: SimpleNamespace(streams=_ignore, observe=_ignore, waiting=_ignore)
    )
    monkeypatch.setattr(actor, "_REPORT_EVERY_S", 3600.0)
    monkeypatch.setattr(actor.CaptionActor, "_load", lambda self, run_id: _Captioner())
    monkeypatch.setattr(actor.CaptionActor, "_decoders", lambda self: _streams(lambda unit: _Stream()))
    attempts = _Remote()
    made = actor.CaptionActor(load_config(None, ["source.uri=/v", "sink.uri=/out"]), "run", attempts)
    made.attempts = attempts
    yield made
    made._logs.close()


def _ignore(*_, **__):
    pass


def _streams(open_):
    return _Streams(open_)


class _Streams:
    """Frames of a unit that is late come once nothing else is ready for some looks."""

    asked = running = 0

    def __init__(self, open_):
        self._open, self._late, self._looks = open_, [], 0

    def open(self, unit, refusal):
        stream = self._open(unit)
        self._late += [] if stream.ready else [stream]
        return stream

    def look(self):
        self._looks += 1
        if self._late and self._looks % 50 == 0:
            self._late.pop(0).ready = True


def _block(*ids):
    unit = {"uris": ["v.mp4"], "kind": "video", "attempts": 0, "prompts": [{"prompt_id": "p", "prompt": "?"}]}
    return units_table([unit | {"id": id_} for id_ in ids])


def _at_once(call, *blocks):
    """What a call of each block gives, or raises."""
    found = {}

    def ask(number, block):
        try:
            found[number] = call(block)
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=ask, args=numbered) for numbered in enumerate(blocks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[number] for number in range(len(blocks))]


def test_every_block_gets_the_rows_of_its_own_units(served):
    blocks = [[f"{block}-{number}" for number in range(count)] for block, count in enumerate([5, 1, 0, 7])]
    found = _at_once(served, *(_block(*ids) for ids in blocks))
    assert [table["id"].to_pylist() for table in found] == blocks
    assert all(table.schema == ROW_SCHEMA for table in found)
    assert Counter(served.attempts.ended) == Counter(End(id_, "ok", tried=True) for ids in blocks for id_ in ids)
    assert sorted(served.attempts.started) == sorted(id_ for ids in blocks for id_ in ids)


def _with_next(served, first, following):
    """Serve a block during which the `following` one arrives; who was in the model together."""

    head = first.units[0]

    def look(unit):
        if unit is head:
            served._arrived.put(following)
        return _Stream()

    served._streams = _streams(look)
    served._arrived.put(first)
    assert first.result.result(60)
    assert following.result.result(60)
    return served._captioner.together


def _arriving(*ids, begun=()):
    return actor._Block(deque(_block(*ids).to_pylist()), dict.fromkeys(begun, 1), len(ids))


def test_units_of_the_next_block_enter_beside_the_last_ones_of_the_block_before(served):
    assert {"b", "c", "d"} in _with_next(served, _arriving("a", "b"), _arriving("c", "d"))


@pytest.mark.parametrize(("first", "following"), [((), ("d",)), (("a",), ()), (("a",), ("d",))])
def test_a_block_with_units_that_were_in_a_model_that_ended_stays_by_itself(served, first, following):
    together = _with_next(served, _arriving("a", "b", begun=first), _arriving("c", "d", begun=following))
    assert not any(ids & {"a", "b"} and ids & {"c", "d"} for ids in together)


def test_no_more_units_are_in_the_model_than_are_handed_over(served):
    served._job = load_config(None, ["source.uri=/v", "sink.uri=/out", "ray.actors.batch_units=2"])
    together = _with_next(served, _arriving("a", "b"), _arriving("c", "d"))
    assert max(map(len, together)) == 2
    assert {"b", "c"} in together


def test_units_that_came_when_the_job_drains_have_no_row(served):
    served.attempts.drain = True
    first, second = _at_once(served, _block("a", "b", "c", "d", "e"), _block("f"))
    assert first.num_rows == second.num_rows == 0
    assert served(_block("g")).num_rows == 0


def test_a_unit_that_was_in_a_model_that_ended_enters_once_the_rows_before_it_have_left(served, monkeypatch):
    monkeypatch.setattr(actor, "_LEAVE_S", 0.5)
    given, entered = [], []

    class Noting(_Stream):
        def __iter__(self):
            entered.append(time.monotonic())
            return super().__iter__()

    served._streams = _streams(lambda unit: Noting() if unit["id"] == "b" else _Stream())
    first, following = _arriving("a"), _arriving("b", begun=("b",))
    first.result.add_done_callback(lambda _: given.append(time.monotonic()))
    served._arrived.put(first)
    served._arrived.put(following)
    assert following.result.result(60)
    assert entered[0] - given[0] >= 0.5


def _asked_by(served, block, late=()):
    """For each unit: who had asked for a turn when it entered the model; of the `late`, frames are not there yet."""
    asked = {}

    class Noting(_Stream):
        def __init__(self, unit):
            super().__init__(unit["id"] not in late)
            self.unit = unit

        def __iter__(self):
            asked[self.unit["id"]] = list(served.attempts.started)
            return super().__iter__()

    served._captioner.room = 1
    served._streams = _streams(Noting)
    served._arrived.put(block)
    assert block.result.result(60)
    return asked


def test_a_turn_is_asked_for_one_unit_ahead(served):
    assert _asked_by(served, _arriving("a", "b", "c")) == {"a": ["a", "b"], "b": ["a", "b", "c"], "c": ["a", "b", "c"]}


def test_no_turn_is_asked_for_beside_a_unit_that_was_in_a_model_that_ended(served):
    asked = _asked_by(served, _arriving("a", "b", "c", "d", begun=("a", "b")))
    assert asked == {"a": ["a"], "b": ["a", "b"], "c": ["a", "b", "c", "d"], "d": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(
    ("came", "begun", "entered"), [("abcd", "", "acdb"), ("bacd", "b", "bacd"), ("abc", "ab", "abc")]
)
def test_units_whose_frames_are_there_pass_one_that_is_late_unless_it_is_alone(served, came, begun, entered):
    served._streams = _streams(lambda unit: _Stream(ready=unit["id"] != "b"))
    block = _arriving(*came, begun=begun)
    served._arrived.put(block)
    assert "".join(row["id"] for row in block.result.result(60)) == entered


def test_no_turn_is_asked_for_before_the_frames_are_there(served):
    asked = _asked_by(served, _arriving("a", "b", "c", "d"), late={"b", "c"})
    assert asked == {"a": ["a", "d"], "d": ["a", "d"], "b": ["a", "d", "b"], "c": ["a", "d", "b", "c"]}


def test_what_breaks_the_captioner_is_told_to_every_block_and_the_next_one_is_served(served):
    served._captioner.broken = OSError("the disk is full")
    assert all(isinstance(error, OSError) for error in _at_once(served, _block("a"), _block("b")))
    served._captioner.broken = None
    assert served(_block("c"))["id"].to_pylist() == ["c"]


def test_whether_the_model_computes_or_waits_is_told(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(actor, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=lambda seconds: None))
    activity = actor.Activity()
    assert activity.look() == (0, True), "nothing has begun"
    activity.round()
    activity.round()
    assert activity.look() == (1, False), "a round has computed something"
    clock.now += 60.0
    assert activity.look() == (1, False), "and another one still does"
    for _ in range(3):
        activity.round()
        activity.wait(0.002)
    assert activity.look() == (2, False)
    for _ in range(3):
        activity.round()
        activity.wait(0.002)
    activity.round()  # it has only begun
    assert activity.look() == (2, True)
    activity.end()
    assert activity.look() == (3, False)
