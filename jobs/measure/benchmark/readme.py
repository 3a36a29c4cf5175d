"""The benchmark's sections of the pages: operations, stages, prefill and decoding, and the engine.

Results of a CPU test the benchmark and say nothing about speed, so they are not shown. The engine's results are shown
for CPUs too: the engine is compared with a loop around `generate` on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.measure.benchmark.engine.tables import hours
from jobs.measure.benchmark.engine.tables import report as engine_report
from jobs.measure.benchmark.tables import report

NOT_MEASURED = (
    "On a GPU: not measured. `python -m jobs.measure.benchmark --device cuda --json jobs/results/benchmark-GPU.json` "
    "times the operations, the stages, prefill and decoding in eight minutes at most, and "
    "`python -m jobs.measure.readme` puts its tables here."
)
ENGINE_NOT_MEASURED = (
    "Not measured (`python -m jobs.measure.benchmark --device cpu --suite engine --json jobs/results/engine-cpu.json`)."
)
GPU_NOT_MEASURED = "On a GPU: not measured (`--device cuda` takes random weights in the shape of Qwen2.5-VL-7B)."


def speed(results: Sequence[dict[str, Any]]) -> str:
    """The tables of every GPU, or a note that none was measured."""
    on_gpus = [result for result in results if result["device"]["type"] == "cuda"]
    return "\n\n".join(map(report, on_gpus)) if on_gpus else NOT_MEASURED


def longest(results: Sequence[dict[str, Any]]) -> str:
    """The cache of an hour of video and the longest video that fits, computed from shapes."""
    return hours(results[0]["cells"]) if results else ENGINE_NOT_MEASURED


def engine(results: Sequence[dict[str, Any]]) -> str:
    """The table that holds for any device, then the tables of every device."""
    if not results:
        return ENGINE_NOT_MEASURED
    missing = "" if any(result["device"]["type"] == "cuda" for result in results) else GPU_NOT_MEASURED
    return "\n\n".join(filter(None, [hours(results[0]["cells"]), *map(engine_report, results), missing]))
