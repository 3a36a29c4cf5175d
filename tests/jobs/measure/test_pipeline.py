"""The pipeline benchmark: the model alone answers the job's prompts, and the overhead follows from the rows."""

from datetime import UTC, datetime, timedelta
from operator import sub

import pytest

from jobs.measure.pipeline import check_answers, compared, engine, prepare, statistics_of
from tests.pipeline.rows import row, rows

_NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def _row(id_, begin_s, end_s, wait_s, actor="x"):
    times = {"started_at": _NOON + timedelta(seconds=begin_s), "finished_at": _NOON + timedelta(seconds=end_s)}
    return row(id_, actor=actor, wait_s=wait_s, **times)


def _compared(engine_ran, pipeline_ran, *found):
    engine = {"began": 100.0, "ended": 120.0, "decode_cpu_s": 1.0, "decode_s": 1.0}
    return compared(engine, engine_ran, rows(*found), pipeline_ran)


def test_overhead_is_of_the_seconds_in_which_each_ran():
    asked = []
    measured = _compared(
        lambda begin, end: asked.append((begin, end)) or 10.0,
        lambda begin, end: asked.append((begin - _NOON.timestamp(), end - _NOON.timestamp())) or 11.0,
        *(_row("b", 8, 13, 0.5), _row("a", 0, 7.5, 2.0)),
    )
    steady = (2.0, 13.0)  # from the first frames in the model
    assert asked == [steady, (100.0, 120.0)]
    assert measured["overhead"] == pytest.approx(0.1)
    assert {name: measured[f"{name}_ms_per_clip"] for name in ("engine", "added")} == {"engine": 5000, "added": 500}


def test_rows_of_several_actors_are_refused():
    with pytest.raises(ValueError, match=r"ray\.actors\.max"):
        _compared(sub, sub, _row("a", 0, 7, 2.0), _row("b", 0, 7, 2.0, "y"))


def test_an_answer_that_differs_is_refused():
    found = rows(row("a", uri="a", text="a dog"), row("b", uri="b", text="a cat"))
    check_answers(found, {"a": "a dog", "b": "a cat"})
    with pytest.raises(RuntimeError, match=r"1 of 2 differ: \['b'\]"):
        check_answers(found, {"a": "a dog", "b": "a cow"})


def test_every_figure_has_median_and_range():
    assert statistics_of([{"a_s": 3.0}, {"a_s": 1.0}, {"a_s": 2.0}]) == {"a_s": {"median": 2.0, "min": 1.0, "max": 3.0}}


def test_engine_answers_every_clip_from_memory(tmp_path):
    job = prepare(tmp_path, 2, ["model.max_new_tokens=4", "frames.max_frames=2"])
    alone = engine(job, lambda: None)
    assert sorted(uri.rsplit("/", 1)[1] for uri in alone["answers"]) == ["clip-000.mp4", "clip-001.mp4"]
    assert all(alone["answers"].values())
    assert alone["ended"] > alone["began"]
    assert alone["decode_cpu_s"] > 0
