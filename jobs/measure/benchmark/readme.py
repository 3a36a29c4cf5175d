"""What the README says of the benchmark's results: of operations, stages, prefill and decoding, and of the engine.

Results of a CPU are a test of the benchmark, no statement on speed: they are not shown. The engine's are: it is
compared with a loop around `generate` on the same device.
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
    "`python -m jobs.measure.readme --results jobs/results --readme README.md` puts its tables here."
)
GPU_NOT_MEASURED = "On a GPU: not measured (`--device cuda` takes random weights in the shape of Qwen2.5-VL-7B)."


def speed(results: Sequence[dict[str, Any]]) -> str:
    """The tables of every GPU, or that there is none."""
    on_gpus = [result for result in results if result["device"]["type"] == "cuda"]
    return "\n\n".join(map(report, on_gpus)) if on_gpus else NOT_MEASURED


def engine(results: Sequence[dict[str, Any]]) -> str:
    """What holds anywhere, once, then the tables of every device."""
    if not results:
        return (
            "Not measured (`python -m jobs.measure.benchmark --device cpu --suite engine "
            "--json jobs/results/engine-cpu.json`)."
        )
    missing = "" if any(result["device"]["type"] == "cuda" for result in results) else GPU_NOT_MEASURED
    return "\n\n".join(filter(None, [hours(results[0]["cells"]), *map(engine_report, results), missing]))
