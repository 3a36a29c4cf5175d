"""Write the inspection page of a run: one HTML file that opens from disk and makes no network requests.

A run writes its page at its end. This command writes it again, or writes one for a run that is in progress or
was killed.
"""

from pathlib import Path

from jobs.cli import load, main_guard, parser
from pipeline.config import JobConfig, load_config
from pipeline.errors import ConfigError
from pipeline.run.report import build_report
from pipeline.storage import files as storage


def main() -> int:
    """Write the page and print its path; return 0 if the run exists."""
    cli = parser(
        __doc__ or "",
        epilog="""examples:
  python -m jobs.report --config configs/caption.yaml --set source.uri=videos --set sink.uri=captions
  python -m jobs.report --run captions --out report.html
  python -m jobs.report --run s3://bucket/out --set storage.endpoint_url=https://storage.example""",
    )
    cli.add_argument("--run", metavar="URI", help="the run's output folder, instead of a configuration's sink.uri")
    cli.add_argument("--out", metavar="FILE", type=Path, help="default: _run/report.html in the run's folder")
    arguments = cli.parse_args()
    if arguments.run is None:
        job = load(arguments)
    elif arguments.config is not None:
        raise ConfigError("expected --run or --config, got both: --run needs no configuration")
    else:
        job = _only_storage(arguments.run, arguments.overrides)
    page = build_report(job.sink.uri, job.storage)
    target = f"{job.sink.uri.rstrip('/')}/_run/report.html" if arguments.out is None else str(arguments.out)
    storage.write_bytes_atomic(target, page, job.storage)
    print(f"{target}: {len(page) / 2**20:.1f} MiB")
    return 0


def _only_storage(run: str, overrides: list[str]) -> JobConfig:
    """A configuration with the run's location and storage only; the run holds its own configuration."""
    job = load_config(None, ["source.uri=unused", "sink.uri=unused", *overrides])
    return job.model_copy(update={"sink": job.sink.model_copy(update={"uri": run})})


if __name__ == "__main__":
    main_guard(main)
