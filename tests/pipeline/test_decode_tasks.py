"""Which units are left out by their length, what decoding leaves to others, and how a unit's end is told."""

import os
import pickle
import subprocess
import sys

import pytest

from pipeline.config import Clips, Decode, Frames, Storage
from pipeline.decode_tasks import _decoded, _in_background, check_length
from pipeline.errors import SkippedError, UnitError
from pipeline.frames import Sizing

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
    ("unit", "stage", "kind"),
    [
        (_unit(duration_s=1.0), "plan", "TooShort"),
        ({**_unit(), "id": "a", "uris": ["/nowhere/a.mp4"]}, "fetch", "NotFound"),
        ({}, "decode", "KeyError"),
    ],
)
def test_what_keeps_a_unit_from_being_decoded_is_its_last_item(unit, stage, kind):
    settings = pickle.dumps((_LIMITS, Frames(), Decode(), Storage(), Sizing(28, 28 * 28, 56 * 56)))
    (error,) = _decoded(unit, settings)
    assert isinstance(error, UnitError)
    assert (error.stage, error.error_type) == (stage, kind)


def test_a_process_takes_a_task_before_it_has_read_any_decoder():
    """Reading them takes a quarter of a second of a CPU, and belongs behind all others."""
    heavy = {"av", "decord", "pyarrow.fs", "pipeline.config", "pipeline.decode"}
    code = f"import sys, pipeline.decode_tasks; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
