"""Stop every job of a Ray cluster and wait until they have ended; a head runs this before it terminates.

A captioning job that is asked to stop finishes the units in its models within `run.grace_s`. The same job, submitted
again, does the rest.
"""

import argparse
import sys
import time

from jobs.cli import main_guard


def main() -> int:
    """Stop the jobs; return 0 when all have ended in time, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="address of the cluster's head")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="seconds to wait for their end")
    arguments = parser.parse_args()
    from ray.job_submission import JobSubmissionClient  # importing it takes a second, which help must not

    client = JobSubmissionClient(arguments.address)
    deadline = time.monotonic() + arguments.timeout_s
    asked: set[str] = set()
    while going := {
        job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()
    }:
        for id in sorted(going - asked):
            print(f"stopping {id}", flush=True)
            client.stop_job(id)
        asked |= going
        if time.monotonic() > deadline:
            print(f"still running after {arguments.timeout_s:g} s: {', '.join(sorted(going))}", file=sys.stderr)
            return 1
        time.sleep(0.5)
    return 0


if __name__ == "__main__":
    main_guard(main)
