"""Measure what the pipeline costs per unit: a run on a local Ray without decoding, with a model that answers at once.

Everything else is the real job: plan, Ray graph, count of attempts, metrics, logs, checkpoints, Parquet files. With
`--bare` the actors make the rows of a block at once, without counting, metrics and logs per unit: only the graph and
its files remain. Each size runs in its own process. Half way the job is asked to end as by SIGTERM, then resumed and
finished; every unit must have exactly one row. Writes one JSON result file.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.captioning.captioner import Captioner, Given
from pipeline.cluster.actor import CaptionActor
from pipeline.cluster.attempts import End
from pipeline.cluster.connect import attempts_of, connect
from pipeline.cluster.frame_streams import FrameStream, FrameStreams
from pipeline.cluster.graph import execute
from pipeline.config import JobConfig, load_config
from pipeline.decoding.decode import FrameBatch
from pipeline.errors import StoppedError, UnitError
from pipeline.planning.plan import plan_units
from pipeline.run.directory import RunDirectory, Work, read_table
from pipeline.run.summary import columns, summarise
from pipeline.run.termination import Termination
from pipeline.schema import ROW_SCHEMA, rows_table
from pipeline.storage import files as storage

_WATCHED = {"driver": "jobs.measure.scale", "gcs": "gcs_server", "raylet": "raylet/raylet", "attempts": "Attempts"}
_WATCH_EVERY_S = 2.0
_ANSWER = "a red ball and a blue cube move over a grey floor ; the ball passes behind the cube ."


def main() -> None:
    """Measure every size and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", metavar="N", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--batch-units", metavar="N", type=int, default=8, help="ray.actors.batch_units")
    parser.add_argument("--rows-per-file", metavar="N", type=int, default=64, help="sink.rows_per_file")
    parser.add_argument("--actors", metavar="N", type=int, default=2, help="ray.actors.min and max")
    parser.add_argument("--bare", action="store_true", help="measure only the graph and its files")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("jobs/results/scale.json"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = [
        f"ray.actors.batch_units={arguments.batch_units}",
        f"sink.rows_per_file={arguments.rows_per_file}",
        f"ray.actors.min={arguments.actors}",
        f"ray.actors.max={arguments.actors}",
    ]
    if arguments.one:
        with tempfile.TemporaryDirectory(prefix="scale-") as name:
            print(json.dumps(measure(arguments.units[0], Path(name), settings, bare=arguments.bare)))
        return
    result = {
        "command": " ".join(["python -m jobs.measure.scale", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}",
        "versions": {"ray": ray.__version__, "pyarrow": pa.__version__},
        "settings": settings,
        "sizes": [_alone(count) for count in arguments.units],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _alone(count: int) -> dict[str, Any]:
    """Run `measure` in a new process with this process's arguments."""
    command = [sys.executable, "-m", "jobs.measure.scale", *sys.argv[1:], "--one", "--units", str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(count: int, folder: Path, settings: Iterable[str], *, bare: bool) -> dict[str, Any]:
    """Run `count` units, stopped half way and resumed; return seconds, bytes of memory and storage, and files."""
    manifest = folder / "units.jsonl"
    with manifest.open("w") as lines:
        for i in range(count):
            unit = {"id": f"unit-{i:08d}", "uri": f"s3://bucket/videos/{i:08d}.mp4", "prompt": "what is it ?"}
            lines.write(json.dumps(unit) + "\n")
    job = load_config(
        None,
        [f"source.uri={manifest}", f"sink.uri={folder / 'out'}", "source.probe=false", "run.grace_s=3600", *settings],
    )
    found: dict[str, Any] = {"units": count}
    run, actor = RunDirectory(job), BareActor if bare else StubActor
    work = run.open()
    with _timed(found, "plan_s"):
        work.write_manifest(plan_units(job))
    found["manifest_bytes"] = Path(work.manifest).stat().st_size
    first = _start(job, work, actor, stop_at=count // 2)
    with _timed(found, "find_open_units_s"):
        total, done_before = work.counts()
    second = _start(job, work, actor, stop_at=None)
    with _timed(found, "summary_s"):
        units, opened = (read_table(uri, job.storage) for uri in (work.manifest, work.open_units))
        rows = work.rows(columns())
        summary = summarise(units, rows, run_id=work.run_id, wall_s=second["wall_s"], this_start=opened["id"])
    if rows.num_rows != total or pc.count_distinct(rows["id"]).as_py() != total:
        raise RuntimeError(f"expected {total} rows, one per unit, got {rows.num_rows}")
    if summary["units"]["finished"] != total:
        raise RuntimeError(f"expected {total} finished units in the summary, got {summary['units']}")
    data, checkpoints = (storage.list_files(uri, job.storage) for uri in (work.data, work.checkpoint))
    return found | {
        "stopped": first | {"done": done_before},
        "resumed": second | {"units_per_s": round((total - done_before) / second["execute_s"], 1)},
        "data_files": len(data),
        "data_bytes": sum(entry.size_bytes for entry in data),
        "checkpoint_files": len(checkpoints),
        "benchmark_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _start(job: JobConfig, work: Work, actor: type[CaptionActor], *, stop_at: int | None) -> dict[str, Any]:
    """Start the job once; it is asked to end when `stop_at` units have their rows."""
    found: dict[str, Any] = {}
    began = time.perf_counter()
    with _timed(found, "prepare_s"):
        work.prepare()
    with (
        Termination(job.run.grace_s) as termination,
        connect(job),
        attempts_of(job, work) as attempts,
        _watching(job, work, termination, stop_at) as seen,
    ):
        with _timed(found, "execute_s"), termination.draining(attempts.drain.remote):
            execute(job, work, attempts, actor)
        ended = time.perf_counter()
    if stop_at is not None:
        if not termination.asked:
            raise StoppedError(f"expected a request to end after {stop_at} units, but the job finished before")
        found["drain_s"] = round(ended - seen.pop("asked_at"), 2)
    return found | {"wall_s": round(time.perf_counter() - began, 2), "peak_bytes": dict(sorted(seen.items()))}


@contextmanager
def _watching(job: JobConfig, work: Work, termination: Termination, stop_at: int | None) -> Iterator[dict[str, Any]]:
    """Record the peak bytes of the object store and of the processes whose memory grows with the number of units."""
    seen: dict[str, Any] = dict.fromkeys([*_WATCHED, "object_store"], 0)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_WATCH_EVERY_S):
            for name, size in _sizes().items():
                seen[name] = max(seen[name], size)
            if stop_at is None or "asked_at" in seen:
                continue
            if len(work.data_files()) * job.sink.rows_per_file >= stop_at:
                seen["asked_at"] = time.perf_counter()
                termination.request()

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def _sizes() -> dict[str, int]:
    sizes = {"driver": psutil.Process().memory_info().rss}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            name = next((name for name, part in _WATCHED.items() if part in command), None)
            if name is not None:
                sizes[name] = process.memory_info().rss
        except psutil.Error:  # the process has just ended
            continue
    total, free = (f().get("object_store_memory", 0) for f in (ray.cluster_resources, ray.available_resources))
    return sizes | {"object_store": int(total - free)}


@contextmanager
def _timed(found: dict[str, Any], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    found[name] = round(time.perf_counter() - began, 2)


class StubActor(CaptionActor):
    """The model actor with an immediate answer and no frames to wait for."""

    def _load(self, run_id: str) -> Captioner:
        return StubCaptioner(self._job, run_id)

    def _decoders(self) -> FrameStreams:
        return _NoDecoders()


class BareActor(StubActor):
    """The model actor that makes all rows of a block at once."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        first = batch["id"][0].as_py()
        if ray.get(self._turns.ask(first)).draining:
            return rows_table([])
        self._turns.end(End(first, "ok", tried=True))
        self._turns.tell()
        return rows_table([self._captioner.row(unit, ()) for unit in batch.to_pylist()])


class StubCaptioner(Captioner):
    """A captioner without a model: gives every unit the same answer."""

    def __init__(self, job: JobConfig, run_id: str) -> None:
        self._fixed = dict.fromkeys(ROW_SCHEMA.names) | {
            "run_id": run_id,
            "model": "none",
            "code_version": "none",
            "config_hash": job.hash(),
            "frame_times_s": [float(second) for second in range(16)],
            "status": "ok",
            "text": _ANSWER,
        }

    def refusal(self, unit: dict[str, Any]) -> UnitError | None:
        return None

    def rows(
        self,
        units: Iterable[Given | None],
        beat: Callable[[], None] | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> Iterator[dict[str, Any]]:
        for given in filter(None, units):
            deque(given.batches, maxlen=0)  # iterating counts what enters the model
            yield self._stub(given.unit)

    def _stub(self, unit: dict[str, Any]) -> dict[str, Any]:
        answers = [
            {**prompt, "text": _ANSWER, "status": "ok", "prompt_tokens": 9, "output_tokens": 21}
            for prompt in unit["prompts"]
        ]
        return self._of(unit) | {"answers": answers}

    def _of(self, unit: dict[str, Any]) -> dict[str, Any]:
        named = {key: unit[key] for key in ("id", "uris", "etag", "size_bytes", "start_s", "end_s")}
        return self._fixed | named | {"uri": unit["uris"][0], "attempts": unit["attempts"] + 1}


class _NoDecoders(FrameStreams):
    asked = running = 0

    def __init__(self) -> None: ...

    def open(self, unit: dict[str, Any], refusal: UnitError | None = None) -> FrameStream:
        return _NoFrames()

    def look(self) -> None: ...


class _NoFrames(FrameStream):
    ready = running = True

    def __init__(self) -> None:
        self.queue_s = 0.0

    def __iter__(self) -> Iterator[FrameBatch | None]:
        return iter(())

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main()
