"""Caption or question a folder, bucket or manifest of videos and image sets.

Plans the units, runs them through model actors on Ray, writes Parquet. Killed and started again with the same
command, it does what is left.
"""

import json
import time

from pipeline.plan import plan_units

from jobs.cli import load, main_guard, parser
from pipeline.captioner import lightkv_config
from pipeline.cluster import connect, progress_display
from pipeline.config import JobConfig
from pipeline.encode import encoder_for
from pipeline.graph import execute
from pipeline.models import describe, pick_device
from pipeline.run import RunDirectory, Work, read_table
from pipeline.summary import columns, summarise, table


def main() -> int:
    """Run the job; 0 when every unit has its row, whatever the rows say."""
    arguments = parser(
        __doc__ or "",
        epilog="""examples:
  python -m jobs.caption --config configs/caption.yaml --set source.uri=videos --set sink.uri=captions
  python -m jobs.caption --config configs/caption.yaml --set source.uri=s3://bucket/videos --set sink.uri=s3://bucket/out
  ray job submit --address http://HEAD:8265 --working-dir . -- python -m jobs.caption --config configs/caption.yaml

Exit code 0: every unit has its row (error rows included). 2: the configuration, source or output refuses.""",
    ).parse_args()
    caption(load(arguments))
    return 0


def caption(job: JobConfig) -> None:
    """Start the run under `job.sink.uri`, or take it up again, and finish it."""
    check_model(job)
    run = RunDirectory(job)
    with run.lock():
        work = run.open()
        if not work.has_manifest():
            work.write_manifest(plan_units(job))
        run_units(job, run, work, work)


def check_model(job: JobConfig) -> None:
    """Refuse a model that cannot be had or compressed before anything starts."""
    card = describe(job.model)
    encoder_for(card.config, card.preprocessor).sizing(job.frames)
    lightkv_config(job, card.config)
    if job.ray.address is None:
        pick_device(job.model.device)


def run_units(job: JobConfig, run: RunDirectory, main_work: Work, work: Work) -> int:
    """Do the open units of `work` and write the summary of the run; returns the units done now."""
    total, done_before = work.prepare()
    started = time.monotonic()
    if total > done_before:
        with connect(job), progress_display(job, total, done_before) as counter:
            execute(job, work, counter)
    wall_s = time.monotonic() - started
    if work is main_work:
        write_summary(job, run, work, wall_s=wall_s, done_before=done_before)
    return total - done_before


def write_summary(job: JobConfig, run: RunDirectory, work: Work, *, wall_s: float, done_before: int) -> None:
    """Print the run's summary and keep it as `_run/summary.json`."""
    summary = summarise(
        read_table(work.manifest, job.storage),
        work.rows(columns()),
        run_id=work.run_id,
        wall_s=wall_s,
        done_before=done_before,
    )
    run.write("summary.json", json.dumps(summary, indent=2).encode())
    print(table(summary))
    print(f"rows: {work.data}\nsummary: {run.meta}/summary.json")


if __name__ == "__main__":
    main_guard(main)
