"""The README's speed tables and the engine's, written from the benchmark's results between two markers each.

python -m jobs.benchmark.readme --results jobs/results --readme README.md

Results of a CPU are a test of the benchmark, no statement on speed: they are not shown. The engine's are: it
is compared with a loop around `generate` on the same device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.benchmark.engine.tables import hours
from jobs.benchmark.engine.tables import report as engine_report
from jobs.benchmark.tables import report
from jobs.cli import main_guard
from jobs.markers import between

BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"
FILES = "benchmark-*.json"
ENGINE_BEGIN, ENGINE_END = "<!-- engine -->", "<!-- /engine -->"
ENGINE_FILES = "engine-*.json"
NOT_MEASURED = (
    "On a GPU: not measured. `python -m jobs.benchmark --device cuda --json jobs/results/benchmark-GPU.json` times the "
    "operations, the stages, prefill and decoding in eight minutes at most, and `python -m jobs.benchmark.readme "
    "--results jobs/results --readme README.md` puts its tables here."
)
GPU_NOT_MEASURED = "On a GPU: not measured (`--device cuda` takes random weights in the shape of Qwen2.5-VL-7B)."


def with_tables(page: str, results: Sequence[dict[str, Any]]) -> str:
    """The page with the text between its markers. Raises ConfigError unless it has exactly one pair of them."""
    return between(page, BEGIN, END, section(results))


def section(results: Sequence[dict[str, Any]]) -> str:
    """The tables of every GPU, or that there is none."""
    on_gpus = [result for result in results if result["device"]["type"] == "cuda"]
    return "\n\n".join(map(report, on_gpus)) if on_gpus else NOT_MEASURED


def with_engine(page: str, results: Sequence[dict[str, Any]]) -> str:
    """The page with the engine's tables. Raises ConfigError unless it has exactly one pair of their markers."""
    return between(page, ENGINE_BEGIN, ENGINE_END, engine_section(results))


def engine_section(results: Sequence[dict[str, Any]]) -> str:
    """What holds anywhere, once, then the tables of every device."""
    if not results:
        return (
            "Not measured (`python -m jobs.benchmark --device cpu --suite engine --json jobs/results/engine-cpu.json`)."
        )
    missing = "" if any(result["device"]["type"] == "cuda" for result in results) else GPU_NOT_MEASURED
    return "\n\n".join(filter(None, [hours(results[0]["cells"]), *map(engine_report, results), missing]))


def read(folder: Path, files: str = FILES) -> list[dict[str, Any]]:
    """The benchmark's result files in `folder`, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(files))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    parser.add_argument("--readme", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        parser.error(f"--results: expected a folder, got {args.results}")
    page = with_tables(args.readme.read_text(encoding="utf-8"), read(args.results))
    page = with_engine(page, read(args.results, ENGINE_FILES))
    args.readme.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    main_guard(main)
