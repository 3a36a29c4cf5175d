"""Runs the jobs as a user does: as processes, some of which are killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
# Small frames, few tokens: these tests are about the job's machinery, not the model's throughput.
SMALL = [
    "frames.fps=2",
    "frames.max_frames=8",
    "frames.max_px=9216",
    "model.max_new_tokens=12",
    "ray.object_store_bytes=200000000",
    "run.progress_interval_s=2",
]


def command(job, *overrides):
    """The command line of a job with small settings."""
    return [sys.executable, "-m", f"jobs.{job}", *(f"--set={o}" for o in [*SMALL, *overrides])]


def environment(**extra):
    """This process's environment, made deterministic and offline."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # `python` of a submitted job
        **extra,
    }


def run(job, *overrides, check=True, **extra):
    """Run a job to its end; the result has its output."""
    done = subprocess.run(
        command(job, *overrides), cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def started(job, *overrides, **extra):
    """Run a job as a process for the duration of the block."""
    process = subprocess.Popen(
        command(job, *overrides),
        cwd=ROOT,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition, process, seconds=240):
    """Wait until `condition()` is True; fail with the job's output if the job ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError("\n".join(process.communicate()))
        time.sleep(0.05)


def run_and_kill(job, *overrides, when, **extra):
    """Start a job, and SIGKILL its driver as soon as `when()` is True; return whether it was still running then."""
    process = subprocess.Popen(
        command(job, *overrides), cwd=ROOT, env=environment(**extra), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 240
    while not when():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"the job ended before it could be killed:\n{process.communicate()[1].decode()}")
        time.sleep(0.05)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


def rows_by_name(folder):
    """Output rows by file name; fails if a unit has more than one."""
    rows = pq.read_table(folder).to_pylist()
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == len(ids)
    return {Path(row["uri"]).name: row for row in rows}


def committed(out):
    """The checkpoint files of a run on local disk: they name the units whose rows are committed."""
    return [p for p in (out / "_run" / "checkpoint").glob("*.parquet") if "pending" not in p.name]
