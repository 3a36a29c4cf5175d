"""The manifest benchmark measures what it says it does."""

import json

from jobs.benchmark_manifest import measure


def test_small_size_is_planned_and_half_of_it_resumed():
    result = measure(100)
    assert set(result) == {"plan_s", "resume_s", "memory_bytes"}
    assert json.loads(json.dumps(result)) == result
    assert result["plan_s"] > 0
