"""Do the error rows of a run again, and put the new rows in their places.

Takes the configuration of the run, where `decode`, `ray` and `storage` may be changed. Killed and started again, it
goes on.
"""

import time

from jobs.caption import check_model, run_units, write_summary
from jobs.cli import load, main_guard, parser
from pipeline.retry import merge_rows, open_retry
from pipeline.run import RunDirectory


def main() -> int:
    """Repeat the error rows; 0 when every one has been tried again."""
    arguments = parser(
        __doc__ or "",
        epilog="""example:
  python -m jobs.retry --config configs/caption.yaml --set decode.backend=pyav --set decode.timeout_s=1200""",
    ).parse_args()
    job = load(arguments)
    check_model(job)
    run = RunDirectory(job)
    with run.lock():
        main_work = run.resume_only()
        started = time.monotonic()
        number, work = open_retry(run, main_work)
        repeated = run_units(job, run, main_work, work)
        merge_rows(run, main_work, number)
        wall_s = time.monotonic() - started
        finished = main_work.rows(["id"]).num_rows
        write_summary(job, run, main_work, wall_s=wall_s, done_before=finished - repeated)
    return 0


if __name__ == "__main__":
    main_guard(main)
