"""What the pipeline costs on top of its model: the same clips through both, in turns, on the CPU.

The model alone: one process decodes every clip into memory, then answers them (`engine`). The pipeline:
`jobs.caption` with one model actor on a local Ray; it decodes, queues, hands over and writes while it answers. Both
load the embedded model, answer as many units together, compute in as many threads as OMP_NUM_THREADS says (set to
--threads for both), run at the same priority (Ray would lower that of its workers) and answer from the first unit on
without warming up. Every answer must be the same word for word.

    overhead = steady ÷ engine − 1
    engine   seconds of the model alone on all clips, frames in memory: the mean of a run before and one after
    steady   from the first frames that enter the actor's model to the end of its last row
    drift    of the machine: by how much of their mean these two differ; a run beyond --drift does not count

The seconds between the two are told apart: `model`, which the model itself took longer for the same units (decoders,
Ray and the driver want cores, too), and `around`, what the actor did besides (waiting for frames, handing over). Both
are there as shares of the engine's time, and per clip in milliseconds: what another model would have on top of its own.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import JobConfig, load_config

PACKAGES = ("torch", "transformers", "ray", "decord", "pyarrow")
WORK = ("encode_s", "prefill_s", "generate_s")


def main() -> int:
    """Render, measure `--repeats` times in turns, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", metavar="N", type=int, default=200)
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="runs of the pipeline")
    parser.add_argument("--drift", metavar="SHARE", type=float, default=0.05, help="of the machine, at most")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="of the model, in both")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("jobs/results/pipeline.json"))
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides")
    parser.add_argument("--engine", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine is not None:
        print(json.dumps(engine(load_config(arguments.engine))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), arguments.clips, arguments.overrides)
        pairs = []
        for pair in measure(job, arguments.threads, arguments.repeats):
            pairs.append(pair)
            print(json.dumps(pair), file=sys.stderr, flush=True)
    counted = [pair for pair in pairs if pair["drift"] <= arguments.drift]
    if not counted:
        raise SystemExit(f"the machine changed its speed by more than {arguments.drift:.0%} around every run")
    result = {
        "command": " ".join(["python -m jobs.benchmark_pipeline", *(f"--set {o}" for o in arguments.overrides)]),
        "machine": f"{len(os.sched_getaffinity(0))} CPUs, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
        "clips": arguments.clips,
        "repeats": len(counted),
        "left_out": len(pairs) - len(counted),
        "most_drift": arguments.drift,
        "model_threads": arguments.threads,
        **statistics_of(counted),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


def prepare(folder: Path, clips: int, overrides: list[str]) -> JobConfig:
    """Render the clips; the job asks for a caption of each."""
    from pipeline.mini.world import render_demo

    truth = render_demo(folder / "clips", clips).read_text(encoding="utf-8").splitlines()
    with (folder / "clips" / "manifest.jsonl").open("w", encoding="utf-8") as lines:
        for row in map(json.loads, truth):
            (asked,) = (qa["question"] for qa in row["answers"] if qa["family"] == "caption")
            lines.write(json.dumps({"uri": row["file"], "prompt": asked}) + "\n")
    keys = [f"source.uri={folder / 'clips' / 'manifest.jsonl'}", f"sink.uri={folder / 'rows'}", "model.device=cpu"]
    keys += ["frames.fps=2", "frames.max_frames=16", "model.max_new_tokens=48", "report.enabled=false"]
    return load_config(None, [*keys, *overrides])


def measure(job: JobConfig, threads: int, repeats: int) -> Iterator[dict[str, float]]:
    """Runs of the pipeline, each between two of the engine; raises `RuntimeError` where an answer differs."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
    config = Path(job.sink.uri).with_suffix(".yaml")
    config.write_text(job.to_yaml(), encoding="utf-8")
    engine_alone = [sys.executable, "-m", "jobs.benchmark_pipeline", "--engine", str(config)]
    before = json.loads(_run(engine_alone, environment))
    for _ in range(repeats):
        shutil.rmtree(job.sink.uri, ignore_errors=True)
        began = time.perf_counter()
        _run([sys.executable, "-m", "jobs.caption", "--config", str(config)], environment)
        wall_s = time.perf_counter() - began
        after = json.loads(_run(engine_alone, environment))
        yield between(before, after, _rows(job, before["answers"])) | {"wall_s": wall_s}
        before = after


def _rows(job: JobConfig, expected: dict[str, str]) -> pa.Table:
    from pipeline.run import RunDirectory

    rows = RunDirectory(job).resume_only().rows()
    answers = {row["uri"]: row["text"] for row in rows.select(["uri", "text"]).to_pylist()}
    if answers != expected:
        differing = sorted(uri for uri in expected if answers.get(uri) != expected[uri])
        raise RuntimeError(f"expected the same answers, {len(differing)} of {len(answers)} differ: {differing[:3]}")
    return rows


def between(before: dict[str, Any], after: dict[str, Any], rows: pa.Table) -> dict[str, float]:
    """The rows of a pipeline run compared with the mean of the engine's runs before and after it, and their drift."""
    names = ("engine_s", "model_s", "decode_cpu_s", "decode_s")
    alone = {name: statistics.mean((before[name], after[name])) for name in names}
    return compared(alone["engine_s"], alone["model_s"], rows) | {
        "drift": abs(after["engine_s"] - before["engine_s"]) / alone["engine_s"],
        "decode_cpu_s": alone["decode_cpu_s"],
        "decode_s": alone["decode_s"],
    }


def compared(engine_s: float, engine_model_s: float, rows: pa.Table) -> dict[str, float]:
    """Overhead and its parts from the rows of one actor and the model alone: all its seconds, those in the model."""
    taken = rows.sort_by("started_at").to_pylist()
    if len({row["actor"] for row in taken}) != 1:
        raise ValueError("expected the rows of one actor: with more, their times overlap; set ray.actors.max=1")
    entered_s = taken[0]["started_at"].timestamp() + taken[0]["wait_s"]
    steady_s = max(row["finished_at"] for row in taken).timestamp() - entered_s
    model_s = sum(row[name] for row in taken for name in WORK) - engine_model_s
    around_s = steady_s - engine_s - model_s
    return {
        "engine_s": engine_s,
        "steady_s": steady_s,
        "overhead": steady_s / engine_s - 1,
        "overhead_model": model_s / engine_s,
        "overhead_around": around_s / engine_s,
        "engine_ms_per_clip": 1e3 * engine_s / len(taken),
        "model_ms_per_clip": 1e3 * model_s / len(taken),
        "around_ms_per_clip": 1e3 * around_s / len(taken),
        "waited_s": sum(row["wait_s"] for row in taken[1:]),
        "queued_s": sum(row["queue_s"] for row in taken[1:]),
    }


def statistics_of(pairs: list[dict[str, float]]) -> dict[str, Any]:
    """Median, least and most of every figure; ratios are taken within a pair of runs."""
    return {
        name: {
            "median": round(statistics.median(values), 4),
            "min": round(min(values), 4),
            "max": round(max(values), 4),
        }
        for name in pairs[0]
        for values in [[pair[name] for pair in pairs]]
    }


def engine(job: JobConfig) -> dict[str, Any]:
    """The model alone on frames in memory: seconds for all units, answers, and what decoding them beforehand took."""
    import torch

    from pipeline.captioner import Captioner, Given
    from pipeline.decode import decode_unit
    from pipeline.plan import plan_units

    captioner = Captioner(job, "engine")
    units = plan_units(job).to_pylist()
    began, began_cpu = time.perf_counter(), time.process_time()
    clips = [
        list(decode_unit(unit, frames=job.frames, decode=job.decode, storage=job.storage, sizing=captioner.sizing))
        for unit in units
    ]
    decode_s, decode_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    began = time.perf_counter()
    rows = list(captioner.rows(Given(unit, batches) for unit, batches in zip(units, clips, strict=True)))
    engine_s = time.perf_counter() - began
    if any(row["text"] is None for row in rows):
        raise RuntimeError(f"expected an answer to every clip, got {[row['error_message'] for row in rows]}")
    return {
        "engine_s": engine_s,
        "model_s": sum(row[name] for row in rows for name in WORK),
        "decode_s": decode_s,
        "decode_cpu_s": decode_cpu_s,
        "threads": torch.get_num_threads(),
        "answers": {row["uri"]: row["text"] for row in rows},
    }


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
