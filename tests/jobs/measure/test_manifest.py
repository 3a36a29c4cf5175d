"""The manifest benchmark measures what its result says."""

import json

import pytest

from jobs.measure.manifest import measure


@pytest.mark.parametrize("units", [100, 3000])
def test_small_size_is_planned_half_of_it_resumed_and_its_errors_repeated(units):
    result = measure(units)
    assert set(result) == {
        *(f"{name}_s" for name in ("plan", "resume", "summary", "retry")),
        *("files", "manifest_bytes", "memory_bytes", "summary_memory_bytes"),
    }
    assert json.loads(json.dumps(result)) == result
    assert result["plan_s"] > 0
    assert result["files"] == -(-units // 2 // 64)
