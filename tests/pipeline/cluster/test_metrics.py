"""Metrics: the sums over rows, and bounded names and labels."""

import time
from collections import defaultdict
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.cluster import metrics
from tests.pipeline.rows import row

_BEGAN = datetime(2026, 1, 31, 12, tzinfo=UTC)
_ANSWERED = {
    "started_at": _BEGAN,
    "finished_at": _BEGAN + timedelta(seconds=10),
    "frame_times_s": [0.0, 1.0],
    "vision_tokens": 100,
    "kept_tokens": 20,
    "kv_bytes": 600,
    "kv_bytes_uncompressed": 1000,
    "decode_s": 4.0,
    "wait_s": 3.0,
    "queue_s": 2.0,
    "encode_s": 1.0,
    "prefill_s": 3.0,
    "generate_s": 1.5,
}
_FAILED = {"started_at": _BEGAN, "finished_at": _BEGAN + timedelta(seconds=1), "wait_s": 0.25, "queue_s": 0.0}


@pytest.fixture
def recorded(monkeypatch):
    """Records metrics: name → labels → value (counters: the sum; histograms: the observations)."""
    values = defaultdict(dict)

    class Metric:
        def __init__(self, name, text, *rest):
            self._name, self._labels = name, rest[-1]
            assert text

        def set_default_tags(self, tags):
            self._default = tags
            return self

        def _key(self, tags):
            tags = self._default | tags
            assert set(tags) == set(self._labels)
            assert all(isinstance(value, str) for value in tags.values())
            return tuple(tags[name] for name in self._labels)

        def inc(self, value, tags):
            assert value > 0
            values[self._name][self._key(tags)] = values[self._name].get(self._key(tags), 0) + value

        def observe(self, value, tags):
            values[self._name].setdefault(self._key(tags), []).append(value)

        def set(self, value, tags=None):
            values[self._name][self._key(tags or {})] = value

    kinds = {"counter": Metric, "gauge": Metric, "histogram": lambda name, text, labels: Metric(name, text, labels)}
    monkeypatch.setattr(metrics, "_METRICS", kinds)
    return values


def test_answered_rows_add_up(recorded):
    told = metrics.ActorMetrics("r")
    for status in ("ok", "ok", "truncated"):
        told.observe(row("a", status, **_ANSWERED))
    assert recorded["lightkv_units"] == {("r", "ok"): 2, ("r", "truncated"): 1}
    assert recorded["lightkv_frames"] == {("r",): 6}
    assert recorded["lightkv_vision_tokens"] == {("r",): 300}
    assert recorded["lightkv_kept_tokens"] == {("r",): 60}
    assert recorded["lightkv_kv_bytes"] == {("r",): 1800}
    assert recorded["lightkv_kv_bytes_saved"] == {("r",): 1200}
    assert recorded["lightkv_decode_seconds"] == {("r",): 12.0}
    assert "lightkv_errors" not in recorded


def test_error_rows_count_by_stage_and_type_and_skipped_ones_do_not(recorded):
    told = metrics.ActorMetrics("r")
    told.observe(row("a", "error", **_FAILED))
    told.observe(row("b", "error", **_FAILED, error_type="Timeout"))
    told.observe(row("c", "skipped", **_FAILED, error_stage="plan", error_type="TooShort"))
    assert recorded["lightkv_units"] == {("r", "error"): 2, ("r", "skipped"): 1}
    assert recorded["lightkv_errors"] == {("r", "decode", "Broken"): 1, ("r", "decode", "Timeout"): 1}
    assert "lightkv_kv_bytes" not in recorded


def test_stages_of_a_unit_add_up_to_its_time_in_the_actor(recorded):
    metrics.ActorMetrics("r").observe(row("a", **_ANSWERED))
    expected = {"queue": 2.0, "wait": 1.0, "encode": 1.0, "prefill": 3.0, "generate": 1.5, "other": 1.5}
    assert recorded["lightkv_actor_seconds"] == {("r", stage): seconds for stage, seconds in expected.items()}
    assert sum(expected.values()) == 10
    assert recorded["lightkv_unit_seconds"] == {("r", s): [v] for s, v in (expected | {"decode": 4.0}).items()}


def test_units_that_failed_have_their_time_under_other(recorded):
    metrics.ActorMetrics("r").observe(row("a", "error", **_FAILED))
    assert recorded["lightkv_actor_seconds"][("r", "other")] == 0.75


def test_gauges_are_there_at_once_and_hold_the_last_value(recorded, monkeypatch):
    monkeypatch.setattr(metrics, "_REPEAT_S", 0.01)
    told = metrics.ActorMetrics("r")
    told.streams(asked=2, running=0)
    metrics.DriverMetrics("r").open_units(7)
    assert recorded["lightkv_streams"] == {("r", "asked"): 2, ("r", "running"): 0}
    assert recorded["lightkv_open_units"] == {("r",): 7}
    told.streams(asked=2, running=1)
    deadline = time.monotonic() + 10
    while recorded["lightkv_streams"] != {("r", "asked"): 2, ("r", "running"): 1}:
        assert time.monotonic() < deadline, recorded["lightkv_streams"]
        time.sleep(0.01)


def test_crashed_attempts_are_counted(recorded):
    told = metrics.ActorMetrics("r")
    told.crashed_attempt()
    told.crashed_attempt()
    assert recorded["lightkv_crashed_attempts"] == {("r",): 2}


def test_names_and_labels_are_ones_that_ray_takes():
    """For a bad metric name Ray only warns and drops the metric. Registering needs no cluster."""
    for spec in metrics.SPECS:
        metric = metrics._METRICS[spec.kind](spec.name, spec.description, ("run", *spec.labels))
        assert metric.info["name"] == spec.name
        assert not metric._discard_metric


def test_no_label_can_hold_a_unit():
    labels = {label for spec in metrics.SPECS for label in spec.labels}
    assert labels == {"status", "stage", "type", "state", "reason"}


def test_stages_of_units_that_overlap_add_up_to_the_time_in_the_model(recorded):
    told = metrics.ActorMetrics("r")
    times = dict.fromkeys(("wait_s", "queue_s", "encode_s", "prefill_s"), 0.0)
    for begin, end, generate_s in ((0, 4, 2.0), (1, 5, 2.0), (3, 6, 1.5), (8, 9, 0.5)):
        span = {"started_at": _BEGAN + timedelta(seconds=begin), "finished_at": _BEGAN + timedelta(seconds=end)}
        told.observe(row("a", **(_ANSWERED | times | span | {"generate_s": generate_s})))
    seconds = recorded["lightkv_actor_seconds"]
    # Units were in the model for 7 s. Of the first 4 only 2 are named when the first unit ends: as much as was in the
    # model with it may be counted twice, once.
    assert seconds == {("r", "generate"): 6.0, ("r", "other"): 2.0}
