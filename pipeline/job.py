"""A captioning job from configuration to summary: new, taken up again, or repeated over its error rows."""

import json
import time

from pipeline.captioner import lightkv_config
from pipeline.cluster import attempts_of, cluster_address, connect, progress_display
from pipeline.config import JobConfig
from pipeline.encode import encoder_for
from pipeline.errors import RunError, StoppedError
from pipeline.graph import execute
from pipeline.models import describe, pick_device
from pipeline.plan import plan_units
from pipeline.retry import merge_rows, open_retry
from pipeline.run import RunDirectory, Work, read_table
from pipeline.summary import columns, summarise, table
from pipeline.termination import Termination


def caption(job: JobConfig) -> Work:
    """Start the run under `job.sink.uri`, or take it up again, and finish it; prints and keeps its summary.

    Raises `StoppedError` when SIGTERM asked for an end before every unit had its row.
    """
    check_model(job)
    run = RunDirectory(job)
    with Termination(job.run.grace_s) as termination, run.lock():
        work = run.open()
        if not work.has_manifest():
            work.write_manifest(plan_units(job))
        started = time.monotonic()
        done_before = _do_open_units(job, work, termination)
        _summarise(run, work, wall_s=time.monotonic() - started, done_before=done_before)
        _check_complete(work, work, termination)
    return work


def retry(job: JobConfig) -> Work:
    """Do the error rows of the run under `job.sink.uri` again and put the new rows in their places.

    Raises `StoppedError` when SIGTERM asked for an end; the rows that are there by then wait for the next retry.
    """
    check_model(job)
    run = RunDirectory(job)
    with Termination(job.run.grace_s) as termination, run.lock():
        work = run.resume_only()
        started = time.monotonic()
        number, again = open_retry(run, work)
        _do_open_units(job, again, termination)
        _check_complete(again, work, termination)
        repeated = merge_rows(run, work, number)
        rows = work.rows(["id"]).num_rows
        _summarise(run, work, wall_s=time.monotonic() - started, done_before=rows - repeated)
    return work


def check_model(job: JobConfig) -> None:
    """Refuse a model that cannot be had, fed or compressed before anything starts."""
    card = describe(job.model)
    encoder_for(card.config, card.preprocessor).sizing(job.frames)
    lightkv_config(job, card.config)
    if cluster_address(job) is None:
        pick_device(job.model.device)


def _do_open_units(job: JobConfig, work: Work, termination: Termination) -> int:
    """Run what is not done of `work`; returns how many units were done before."""
    total, done_before = work.prepare()
    if total > done_before:
        with (
            connect(job),
            attempts_of(job, work) as attempts,
            progress_display(job, attempts, total, done_before),
            termination.draining(attempts.drain.remote),
        ):
            execute(job, work, attempts)
    return done_before


def _check_complete(work: Work, main: Work, termination: Termination) -> None:
    total, done = work.counts()
    if done < total:
        state = f"{done:,} of {total:,} units have their rows in {main.data}"
        if termination.asked:
            raise StoppedError(f"the job was asked to end; {state}")
        raise RunError(f"expected a row of every unit, but {state}; the same command does the others")


def _summarise(run: RunDirectory, work: Work, *, wall_s: float, done_before: int) -> None:
    summary = summarise(
        read_table(work.manifest, run.job.storage),
        work.rows(columns()),
        run_id=work.run_id,
        wall_s=wall_s,
        done_before=done_before,
    )
    run.write("summary.json", json.dumps(summary, indent=2).encode())
    print(table(summary))
    print(f"rows: {work.data}\nsummary: {run.meta}/summary.json")
