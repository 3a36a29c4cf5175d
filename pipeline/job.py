"""Runs a captioning job from configuration to summary: a new run, a resumed one, or a retry of error rows."""

import json
import logging
import time

from pipeline import logs
from pipeline.captioning.captioner import lightkv_config
from pipeline.captioning.encode import encoder_for
from pipeline.captioning.models import describe, pick_device
from pipeline.cluster.connect import attempts_of, cluster_address, connect, progress_display
from pipeline.cluster.graph import execute
from pipeline.config import JobConfig
from pipeline.errors import RunError, StoppedError
from pipeline.planning.plan import plan_units
from pipeline.run.directory import RunDirectory, Work, read_table
from pipeline.run.report import write_report
from pipeline.run.retry import merge_rows, open_retry
from pipeline.run.summary import UNIT_COLUMNS, columns, summarise, table
from pipeline.run.termination import Termination

_LOG = logging.getLogger(__name__)


def caption(job: JobConfig) -> Work:
    """Start or resume the run under `job.sink.uri` and finish it; print its summary and write it to the run.

    Raises `StoppedError` if SIGTERM came before every unit had its row.
    """
    check_model(job)
    run = RunDirectory(job)
    with logs.to_terminal(job.run.log_format), Termination(job.run.grace_s) as termination, run.lock():
        work = run.open()
        if not work.has_manifest():
            units = plan_units(job)
            work.write_manifest(units)
            if job.source.known:
                left_out = int(units.schema.metadata[b"known_units"])
                new = f"{len(units):,} are new" if len(units) else "nothing is new"
                print(f"{left_out:,} units have their row under {job.source.known}, {new}")
        started = time.monotonic()
        _do_open_units(job, work, termination)
        _summarise(run, work, work, wall_s=time.monotonic() - started)
        _check_complete(work, work, termination)
    return work


def retry(job: JobConfig) -> Work:
    """Repeat the units with error rows of the run under `job.sink.uri` and replace those rows.

    Raises `StoppedError` on SIGTERM; the next call resumes this retry and keeps its finished rows.
    """
    check_model(job)
    run = RunDirectory(job)
    with logs.to_terminal(job.run.log_format), Termination(job.run.grace_s) as termination, run.lock():
        work = run.resume_only()
        started = time.monotonic()
        number, again = open_retry(run, work)
        _do_open_units(job, again, termination)
        _check_complete(again, work, termination)
        merge_rows(run, work, number)
        _summarise(run, work, again, wall_s=time.monotonic() - started)
    return work


def check_model(job: JobConfig) -> None:
    """Raise before anything starts if the model cannot be found, is not supported, or cannot be compressed."""
    card = describe(job.model)
    encoder_for(card.config, card.preprocessor).sizing(job.frames)
    lightkv_config(job, card.config)
    if cluster_address(job) is None:
        pick_device(job.model.device)


def _do_open_units(job: JobConfig, work: Work, termination: Termination) -> None:
    """Run the units of `work` that have no row yet."""
    total, done_before = work.prepare()
    logs.event(_LOG, "run started", run=work.run_id, units=total, done_before=done_before, output=work.data)
    if total > done_before:
        with (
            connect(job),
            attempts_of(job, work) as attempts,
            progress_display(job, work, attempts, total, done_before),
            termination.draining(attempts.drain.remote),
        ):
            execute(job, work, attempts)


def _check_complete(work: Work, main: Work, termination: Termination) -> None:
    total, done = work.counts()
    if done < total:
        state = f"{done:,} of {total:,} units have a row in {main.data}"
        if termination.asked:
            raise StoppedError(f"the job was asked to end; {state}")
        raise RunError(f"expected a row for every unit, got fewer: {state}; run the same command again for the others")


def _summarise(run: RunDirectory, work: Work, done: Work, *, wall_s: float) -> None:
    """Write and print the summary of `work`; `done` is the work of this start."""
    units = read_table(work.manifest, run.job.storage, UNIT_COLUMNS)
    opened = read_table(done.open_units, run.job.storage, ["id"])
    summary = summarise(units, work.rows(columns()), run_id=work.run_id, wall_s=wall_s, this_start=opened["id"])
    run.write("summary.json", json.dumps(summary, indent=2).encode())
    page = write_report(run)
    if run.job.run.log_format == "json":
        logs.event(_LOG, "run ended", run=work.run_id, output=work.data, summary=summary)
        return
    print(table(summary))
    print(f"rows: {work.data}\nsummary: {run.meta}/summary.json")
    if page is not None:
        print(f"page: {page}")
