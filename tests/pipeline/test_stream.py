"""Which units are left out by their length."""

import pytest

from pipeline.config import Clips
from pipeline.errors import SkippedError
from pipeline.stream import check_length

_LIMITS = Clips(skip_shorter_s=2.0, skip_longer_s=60.0)


def _unit(start_s=None, end_s=None, duration_s=None):
    return {"start_s": start_s, "end_s": end_s, "duration_s": duration_s}


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
