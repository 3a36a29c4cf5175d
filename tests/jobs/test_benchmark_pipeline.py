"""The pipeline benchmark: the model alone answers what the job asks, and the overhead is what the rows say."""

from datetime import UTC, datetime, timedelta

import pytest

from jobs.benchmark_pipeline import between, compared, engine, prepare, statistics_of
from tests.pipeline.rows import row, rows

_NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def _row(id_, begin_s, end_s, wait_s, actor="x"):
    times = {"started_at": _NOON + timedelta(seconds=begin_s), "finished_at": _NOON + timedelta(seconds=end_s)}
    seconds = {"wait_s": wait_s, "queue_s": wait_s / 2, "encode_s": 1.0, "prefill_s": 2.0, "generate_s": 1.0}
    return row(id_, actor=actor, **times, **seconds)


def test_steady_time_begins_with_the_first_frames_in_the_model():
    measured = compared(10.0, 7.0, rows(_row("b", 8, 13, 0.5), _row("a", 0, 7.5, 2.0)))
    assert measured["steady_s"] == 11.0
    assert measured["overhead"] == pytest.approx(0.1)
    assert measured["waited_s"] == 0.5
    assert measured["queued_s"] == 0.25


def test_overhead_is_that_of_the_model_and_what_is_around_it():
    measured = compared(10.0, 7.0, rows(_row("a", 0, 7.5, 2.0), _row("b", 8, 13, 0.5)))
    assert measured["overhead_model"] == pytest.approx(0.1)
    assert measured["overhead_around"] == pytest.approx(0.0)


def test_what_is_added_to_a_clip_is_told_in_milliseconds():
    measured = compared(8.0, 7.0, rows(_row("a", 0, 7.5, 2.0), _row("b", 8, 13, 0.5)))
    parts = {name: measured[f"{name}_ms_per_clip"] for name in ("engine", "model", "around")}
    assert parts == pytest.approx({"engine": 4000, "model": 500, "around": 1000})


def test_rows_of_several_actors_are_refused():
    with pytest.raises(ValueError, match=r"ray\.actors\.max"):
        compared(10.0, 7.0, rows(_row("a", 0, 7, 2.0), _row("b", 0, 7, 2.0, "y")))


def test_the_model_alone_is_the_mean_of_a_run_before_and_one_after_and_drift_is_their_difference():
    before, after = ({"engine_s": s, "model_s": s - 3, "decode_cpu_s": 1.0, "decode_s": 1.0} for s in (9.0, 11.0))
    found = rows(_row("a", 0, 7.5, 2.0), _row("b", 8, 13, 0.5))
    measured = between(before, after, found)
    assert {name: measured[name] for name in compared(10.0, 7.0, found)} == compared(10.0, 7.0, found)
    assert measured["drift"] == between(after, before, found)["drift"] == pytest.approx(0.2)


def test_every_figure_has_median_and_range():
    assert statistics_of([{"a_s": 3.0}, {"a_s": 1.0}, {"a_s": 2.0}]) == {"a_s": {"median": 2.0, "min": 1.0, "max": 3.0}}


def test_engine_answers_every_clip_from_memory(tmp_path):
    job = prepare(tmp_path, 2, ["model.max_new_tokens=4", "frames.max_frames=2"])
    alone = engine(job)
    assert sorted(uri.rsplit("/", 1)[1] for uri in alone["answers"]) == ["clip-000.mp4", "clip-001.mp4"]
    assert all(alone["answers"].values())
    assert alone["engine_s"] > alone["model_s"] > 0
    assert alone["decode_cpu_s"] > 0
