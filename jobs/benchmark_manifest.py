"""How long planning and resuming take, and how much memory, against the number of units; no model, no Ray.

Each size runs in a process of its own: a JSONL manifest of tiny units is planned, half of the units are marked as
committed in files of `sink.rows_per_file`, and the open ones are found again. Writes one JSON result file.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import JobConfig, load_config
from pipeline.plan import plan_units
from pipeline.run import RunDirectory, read_table


def main() -> None:
    """Measure every size `--repeats` times and write medians and spreads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", metavar="N", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", metavar="N", type=int, default=3)
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("jobs/results/manifest.json"))
    parser.add_argument("--one", metavar="N", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return
    result = {
        "command": "python -m jobs.benchmark_manifest",
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}",
        "pyarrow": pa.__version__,
        "repeats": arguments.repeats,
        "sizes": [_repeated(count, arguments.repeats) for count in arguments.units],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for size in result["sizes"]:
        print("  ".join(f"{key} {value}" for key, value in size.items()))


def measure(count: int) -> dict[str, float]:
    """Seconds and peak memory of planning `count` units and of resuming with half of them done."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = folder / "units.jsonl"
        with manifest.open("w") as lines:
            for i in range(count):
                unit = {"id": f"unit-{i:08d}", "uri": f"video-{i}.mp4", "prompt": "what is it ?"}
                lines.write(json.dumps(unit) + "\n")
        job = load_config(None, [f"source.uri={manifest}", f"sink.uri={folder / 'out'}", "source.probe=false"])
        before = _peak_bytes()
        started = time.perf_counter()
        units = plan_units(job)
        planned = time.perf_counter()
        work = RunDirectory(job).open()
        work.write_manifest(units)
        _commit_half(job, work.manifest, Path(work.checkpoint))
        resumed = time.perf_counter()
        total, done = work.prepare()
        ended = time.perf_counter()
        if (total, done) != (count, count // 2):
            raise RuntimeError(f"expected {count} units and {count // 2} done, got {total} and {done}")
        return {"plan_s": planned - started, "resume_s": ended - resumed, "memory_bytes": _peak_bytes() - before}


def _commit_half(job: JobConfig, manifest: str, checkpoint: Path) -> None:
    checkpoint.mkdir(parents=True)
    ids = read_table(manifest, job.storage)["id"]
    half = len(ids) // 2
    for start in range(0, half, job.sink.rows_per_file):
        part = ids.slice(start, min(job.sink.rows_per_file, half - start))
        pq.write_table(pa.table({"id": part}), checkpoint / f"{start:09d}.parquet")


def _repeated(count: int, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.benchmark_manifest", "--one", str(count)]
    runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats)]
    row: dict[str, Any] = {"units": count}
    for key in ("plan_s", "resume_s"):
        values = [run[key] for run in runs]
        row |= {key: round(statistics.median(values), 3), f"{key[:-2]}_spread_s": round(max(values) - min(values), 3)}
    row["memory_mib"] = round(max(run["memory_bytes"] for run in runs) / 2**20, 1)
    return row


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
