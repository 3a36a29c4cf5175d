"""Measure the seconds and memory of a run's bookkeeping against the number of units; no model, no Ray.

Each size runs in its own process. It plans a JSONL manifest of tiny units, commits rows of half of the units in files
of `sink.rows_per_file`, finds the open units and summarises the rows. One row in a thousand is an error; it repeats
those units and replaces their rows. Writes one JSON result file.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import JobConfig, load_config
from pipeline.planning.plan import plan_units
from pipeline.run.directory import RunDirectory, Work, read_table
from pipeline.run.retry import merge_rows, open_retry
from pipeline.run.summary import columns, summarise
from pipeline.schema import ROW_SCHEMA, rows_table

_ERROR_EVERY = 1000
_FRAMES = 64


def main() -> None:
    """Measure every size `--repeats` times and write medians and spreads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", metavar="N", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", metavar="N", type=int, default=3)
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("jobs/results/manifest.json"))
    parser.add_argument("--one", metavar="N", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return
    result = {
        "command": " ".join(["python -m jobs.measure.manifest", *sys.argv[1:]]),
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
    """Plan `count` units, resume with half of them done, summarise that half and retry its errors.

    Returns seconds, bytes and files. Memory is the process's peak so far, above that of its imports.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = folder / "units.jsonl"
        with manifest.open("w") as lines:
            for i in range(count):
                unit = {"id": f"unit-{i:08d}", "uri": f"video-{i}.mp4", "prompt": "what is it ?"}
                lines.write(json.dumps(unit) + "\n")
        job = load_config(None, [f"source.uri={manifest}", f"sink.uri={folder / 'out'}", "source.probe=false"])
        base, found = _peak_bytes(), dict[str, float]()
        with _timed(found, "plan"):
            units = plan_units(job)
        run = RunDirectory(job)
        work = run.open()
        work.write_manifest(units)
        ids = units["id"].to_pylist()[: count // 2]
        found["manifest_bytes"] = Path(work.manifest).stat().st_size
        _commit(job, work, ids)
        with _timed(found, "resume"):
            total, done = work.prepare()
        if (total, done) != (count, count // 2):
            raise RuntimeError(f"expected {count} units and {count // 2} done, got {total} and {done}")
        found |= {"files": len(work.data_files()), "memory_bytes": _peak_bytes() - base}
        with _timed(found, "summary"):
            planned, opened = (read_table(uri, job.storage) for uri in (work.manifest, work.open_units))
            summary = summarise(planned, work.rows(columns()), run_id=work.run_id, wall_s=1.0, this_start=opened["id"])
        found["summary_memory_bytes"] = _peak_bytes() - base
        with _timed(found, "retry"):
            number, again = open_retry(run, work)
            repeated = read_table(again.manifest, job.storage)["id"].to_pylist()
            _commit(job, again, repeated, error_every=None)
            merge_rows(run, work, number)
        if (summary["units"]["finished"], summary["units"]["error"]) != (done, len(repeated)):
            raise RuntimeError(f"expected {done} rows, {len(repeated)} of them errors, got {summary['units']}")
        return found


def _commit(job: JobConfig, work: Work, ids: Sequence[str], error_every: int | None = _ERROR_EVERY) -> None:
    """Write rows and checkpoints of these units, in files like a run's."""
    data, checkpoint = Path(work.data), Path(work.checkpoint)
    for folder in (data, checkpoint):
        folder.mkdir(parents=True)
    size = job.sink.rows_per_file
    fixed = dict.fromkeys(ROW_SCHEMA.names) | {
        "run_id": work.run_id,
        "uri": "video.mp4",
        "uris": ["video.mp4"],
        "frame_times_s": [float(second) for second in range(_FRAMES)],
        "attempts": 1,
        "text": "a red ball and a blue cube move over a grey floor",
        "model": "none",
        "code_version": "none",
        "config_hash": job.hash(),
    }
    full = rows_table([fixed | {"id": "", "status": "ok"}] * size)
    for start in range(0, len(ids), size):
        part = pa.array(ids[start : start + size])
        status = ["error" if error_every and (start + i) % error_every == 0 else "ok" for i in range(len(part))]
        rows = full.slice(0, len(part))
        for name, column in (("id", part), ("status", pa.array(status))):
            rows = rows.set_column(ROW_SCHEMA.get_field_index(name), ROW_SCHEMA.field(name), column)
        pq.write_table(rows, data / f"{start:09d}.parquet", compression=job.sink.compression)
        pq.write_table(pa.table({"id": part}), checkpoint / f"{start:09d}.parquet")


@contextmanager
def _timed(found: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    found[f"{name}_s"] = time.perf_counter() - began


def _repeated(count: int, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.measure.manifest", "--one", str(count)]
    runs = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(repeats)]
    row: dict[str, Any] = {"units": count, "manifest_bytes": runs[0]["manifest_bytes"], "files": runs[0]["files"]}
    for key in ("plan_s", "resume_s", "summary_s", "retry_s"):
        values = [run[key] for run in runs]
        row |= {key: round(statistics.median(values), 3), f"{key[:-2]}_spread_s": round(max(values) - min(values), 3)}
    for key in ("memory", "summary_memory"):
        row[f"{key}_mib"] = round(max(run[f"{key}_bytes"] for run in runs) / 2**20, 1)
    return row


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
