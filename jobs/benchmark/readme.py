"""The README's speed tables, written from the benchmark's GPU results between the page's two markers.

python -m jobs.benchmark.readme --results jobs/results --readme README.md

Results of a CPU are a test of the benchmark, no statement on speed: they are not shown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.benchmark.tables import report
from jobs.cli import main_guard
from jobs.markers import between

BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"
FILES = "benchmark-*.json"
NOT_MEASURED = (
    "On a GPU: not measured. `python -m jobs.benchmark --device cuda --json jobs/results/benchmark-GPU.json` times the "
    "operations, the stages, prefill and decoding in eight minutes at most, and `python -m jobs.benchmark.readme "
    "--results jobs/results --readme README.md` puts its tables here."
)


def with_tables(page: str, results: Sequence[dict[str, Any]]) -> str:
    """The page with the text between its markers. Raises ConfigError unless it has exactly one pair of them."""
    return between(page, BEGIN, END, section(results))


def section(results: Sequence[dict[str, Any]]) -> str:
    """The tables of every GPU, or that there is none."""
    on_gpus = [result for result in results if result["device"]["type"] == "cuda"]
    return "\n\n".join(map(report, on_gpus)) if on_gpus else NOT_MEASURED


def read(folder: Path) -> list[dict[str, Any]]:
    """The benchmark's result files in `folder`, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(FILES))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    parser.add_argument("--readme", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        parser.error(f"--results: expected a folder, got {args.results}")
    page = with_tables(args.readme.read_text(encoding="utf-8"), read(args.results))
    args.readme.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    main_guard(main)
