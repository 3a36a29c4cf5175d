"""Measure what the pipeline costs on top of its model: the same clips through both, in turns, on the CPU.

The model alone (`engine`): one process decodes every clip into memory, then answers them. The pipeline: `jobs.caption`
with one model actor on a local Ray, which decodes, queues, transfers and writes while it answers. Both load the
embedded model, answer the same number of units together, compute in --threads threads (OMP_NUM_THREADS), run at the
same priority, and answer from the first unit without warm-up. Every answer must be the same word for word.

The speed of a machine changes within seconds, by more than the difference that is measured. The two therefore take
turns: every --turn seconds all processes of one are stopped (SIGSTOP) and those of the other continue. Only the time in
which a process ran counts.

    overhead = steady ÷ engine − 1
    engine   seconds of the model alone on all clips, frames in memory
    steady   from the first frames that enter the actor's model to the end of its last row

The result also has the added milliseconds per clip, which another model would have on top of its own time. They include
CPU and cache contention with decoders and Ray, and waits for frames and turns.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.measure.taking_turns import Process, take_turns
from pipeline.config import JobConfig, load_config
from pipeline.run.directory import RunDirectory

PACKAGES = ("torch", "transformers", "ray", "decord", "pyarrow")
_READY = "frames are in memory"
Ran = Callable[[float, float], float]


def main() -> int:
    """Render, measure `--repeats` times in turns and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", metavar="N", type=int, default=200)
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="runs of the pipeline")
    parser.add_argument("--turn", metavar="SECONDS", type=float, default=2.0)
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="threads of the model, in both")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("jobs/results/pipeline.json"))
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides")
    parser.add_argument("--engine", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine is not None:
        print(json.dumps(engine(load_config(arguments.engine), _wait_for_go)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), arguments.clips, arguments.overrides)
        pairs = []
        for _ in range(arguments.repeats):
            pairs.append(measure(job, arguments.threads, arguments.turn))
            print(json.dumps(pairs[-1]), file=sys.stderr, flush=True)
    settings = [f"--set {override}" for override in arguments.overrides]
    result = {
        "command": " ".join([f"python -m jobs.measure.pipeline --repeats {arguments.repeats}", *settings]),
        "machine": f"{len(os.sched_getaffinity(0))} CPUs, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
        "clips": arguments.clips,
        "repeats": arguments.repeats,
        "turn_s": arguments.turn,
        "model_threads": arguments.threads,
        **statistics_of(pairs),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


def prepare(folder: Path, clips: int, overrides: list[str]) -> JobConfig:
    """Render the clips and return a job that asks for a caption of each."""
    from pipeline.mini.world import render_demo

    truth = render_demo(folder / "clips", clips).read_text(encoding="utf-8").splitlines()
    with (folder / "clips" / "manifest.jsonl").open("w", encoding="utf-8") as lines:
        for row in map(json.loads, truth):
            (asked,) = (qa["question"] for qa in row["answers"] if qa["family"] == "caption")
            lines.write(json.dumps({"uri": row["file"], "prompt": asked}) + "\n")
    keys = [f"source.uri={folder / 'clips' / 'manifest.jsonl'}", f"sink.uri={folder / 'rows'}", "model.device=cpu"]
    keys += ["frames.fps=2", "frames.max_frames=16", "model.max_new_tokens=48", "report.enabled=false"]
    return load_config(None, [*keys, *overrides])


def measure(job: JobConfig, threads: int, turn_s: float) -> dict[str, float]:
    """Run each once, in turns; raises `RuntimeError` if one fails or an answer differs."""
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    run = RunDirectory(job)
    config = Path(run.uri).with_suffix(".yaml")
    config.write_text(job.to_yaml(), encoding="utf-8")
    shutil.rmtree(run.uri, ignore_errors=True)
    first_start = Path(run.meta, "attempts.json")  # written when the first unit may enter the model
    with Process("jobs.measure.pipeline", "--engine", str(config), **environment) as alone:
        while _READY not in alone.output():
            time.sleep(0.1)
        with Process("jobs.caption", "--config", str(config), **environment) as pipeline:
            while not first_start.exists():
                pipeline.output()
                time.sleep(0.02)
            alone.tell("go")
            take_turns(alone, pipeline, turn_s)
            pipeline.output()
            engine = json.loads(alone.output().splitlines()[-1])
            rows = run.resume_only().rows()
            check_answers(rows, engine["answers"])
            return compared(engine, alone.ran, rows, pipeline.ran)


def check_answers(rows: pa.Table, expected: dict[str, str]) -> None:
    """Raise `RuntimeError` if a row's answer differs from that of the model alone."""
    answers = {row["uri"]: row["text"] for row in rows.select(["uri", "text"]).to_pylist()}
    if answers != expected:
        differing = sorted(uri for uri in expected if answers.get(uri) != expected[uri])
        raise RuntimeError(f"expected the same answers, {len(differing)} of {len(answers)} differ: {differing[:3]}")


def compared(engine: dict[str, Any], engine_ran: Ran, rows: pa.Table, pipeline_ran: Ran) -> dict[str, float]:
    """Overhead of the rows of one actor over the model alone.

    `…_ran(begin, end)` gives the seconds between two moments in which that process ran.
    """
    taken = rows.sort_by("started_at").to_pylist()
    if len({row["actor"] for row in taken}) != 1:
        raise ValueError("expected the rows of one actor: with more, their times overlap; set ray.actors.max=1")
    entered = taken[0]["started_at"].timestamp() + taken[0]["wait_s"]
    steady_s = pipeline_ran(entered, max(row["finished_at"] for row in taken).timestamp())
    engine_s = engine_ran(engine["began"], engine["ended"])
    return {
        "engine_s": engine_s,
        "steady_s": steady_s,
        "overhead": steady_s / engine_s - 1,
        "engine_ms_per_clip": 1e3 * engine_s / len(taken),
        "added_ms_per_clip": 1e3 * (steady_s - engine_s) / len(taken),
        "decode_cpu_s": engine["decode_cpu_s"],
        "decode_s": engine["decode_s"],
    }


def statistics_of(pairs: list[dict[str, float]]) -> dict[str, Any]:
    """Median, minimum and maximum of every figure; ratios are taken within a pair of runs."""
    return {
        name: {
            "median": round(statistics.median(values), 4),
            "min": round(min(values), 4),
            "max": round(max(values), 4),
        }
        for name in pairs[0]
        for values in [[pair[name] for pair in pairs]]
    }


def engine(job: JobConfig, ready: Callable[[], object]) -> dict[str, Any]:
    """Decode all clips, wait for `ready`, answer them; return begin, end, answers and the seconds of decoding."""
    import torch

    from pipeline.captioning.captioner import Captioner, Given
    from pipeline.decoding.decode import decode_unit
    from pipeline.planning.plan import plan_units

    captioner = Captioner(job, "engine")
    units = plan_units(job).to_pylist()
    began, began_cpu = time.perf_counter(), time.process_time()
    clips = [
        list(decode_unit(unit, frames=job.frames, decode=job.decode, storage=job.storage, sizing=captioner.sizing))
        for unit in units
    ]
    decode_s, decode_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    ready()
    began_at = time.time()
    rows = list(captioner.rows(Given(unit, batches) for unit, batches in zip(units, clips, strict=True)))
    ended_at = time.time()
    if any(row["text"] is None for row in rows):
        raise RuntimeError(f"expected an answer to every clip, got {[row['error_message'] for row in rows]}")
    return {
        "began": began_at,
        "ended": ended_at,
        "decode_s": decode_s,
        "decode_cpu_s": decode_cpu_s,
        "threads": torch.get_num_threads(),
        "answers": {row["uri"]: row["text"] for row in rows},
    }


def _wait_for_go() -> None:
    print(_READY, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    sys.exit(main())
