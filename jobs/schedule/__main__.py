"""Caption new videos by a cron expression, on a Ray cluster without Kubernetes.

Every firing submits `jobs.caption` to the cluster with its own output folder under `sink.uri`
(`sink.uri/run=2026-11-23T02-00-00Z`, UTC). It leaves out the units that runs under `sink.uri` have (`source.known`).
`sink.uri/_schedule/NAME` records the firings, so that schedulers may be stopped, moved and started twice. A schedule
has one run at a time: a firing waits until the previous run has ended.
"""

import argparse
import datetime
import logging
import signal
import zoneinfo
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.cli import load, main_guard, parser
from jobs.schedule.scheduler import LOG, Clock, Schedule, Scheduler
from jobs.schedule.submission import Cluster
from pipeline import logs
from pipeline.errors import ConfigError


@contextmanager
def _logging() -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(logs.JsonLines())
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    cli = parser(
        __doc__ or "",
        epilog="""examples:
  python -m jobs.schedule --name nightly --cron '0 2 * * *' --timezone Europe/Berlin --address http://HEAD:8265 \\
      --config configs/caption.yaml --set source.uri=s3://bucket/videos --set sink.uri=s3://bucket/captions
  python -m jobs.schedule --name nightly --once --address http://HEAD:8265 --config configs/caption.yaml …

Logs one JSON object per line. SIGTERM ends the scheduler, not the job. Exit code with --once: the job's.""",
    )
    cli.prog = "python -m jobs.schedule"
    cli.add_argument("--name", default="captions", help="name of the schedule, part of its submissions' ids")
    cli.add_argument(
        "--cron", metavar="EXPRESSION", default="0 2 * * *", help="minute hour day month weekday; 0 and 7 are Sunday"
    )
    cli.add_argument(
        "--once",
        metavar="TIME",
        nargs="?",
        const="",
        help="fire now and wait for the end; with a TIME (2026-11-23T02:00) the same firing is never run twice",
    )
    cli.add_argument("--timezone", default="UTC", help="time zone of the expression, e.g. Europe/Berlin")
    cli.add_argument("--address", default="http://127.0.0.1:8265", help="address of the cluster's head")
    cli.add_argument("--working-dir", metavar="DIR", help="code to send to the cluster, if its image has none")
    cli.add_argument(
        "--missed",
        choices=["catch-up", "skip"],
        default="catch-up",
        help="firings missed while no scheduler ran or the previous run was in progress: one run for all, or none",
    )
    cli.add_argument(
        "--attempts", metavar="N", type=int, default=3, help="of a run that fails; each continues the last"
    )
    return cli


def main() -> int:
    """Schedule until SIGTERM and return 0, or fire once and return the job's exit code."""
    arguments = _parser().parse_args()
    try:
        timezone = zoneinfo.ZoneInfo(arguments.timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError):
        raise ConfigError(f"--timezone: expected a name such as Europe/Berlin, got {arguments.timezone!r}") from None
    schedule = Schedule(arguments.name, arguments.cron, timezone, arguments.missed, arguments.attempts)
    clock, cluster = Clock(), Cluster(arguments.address, arguments.working_dir)
    scheduler = Scheduler(schedule, lambda: load(arguments), cluster, clock)
    signal.signal(signal.SIGTERM, clock.stop)
    with _logging():
        if arguments.once is None:
            scheduler.run()
            return 0
        return scheduler.once(
            _moment(arguments.once, timezone) if arguments.once else clock.now().replace(microsecond=0)
        )


def _moment(text: str, timezone: zoneinfo.ZoneInfo) -> datetime.datetime:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--once: expected a time such as 2026-11-23T02:00, got {text!r}") from None
    return (
        (moment if moment.tzinfo else moment.replace(tzinfo=timezone)).astimezone(datetime.UTC).replace(microsecond=0)
    )


if __name__ == "__main__":
    main_guard(main)
