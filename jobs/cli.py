"""What every job's command line shares: --config, --set, and errors in one line."""

import argparse
import sys
from collections.abc import Callable

from pipeline.config import JobConfig, load_config
from pipeline.errors import PipelineError


def parser(description: str, *, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser with `--config` and `--set`."""
    result = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--config", metavar="FILE", help="YAML configuration, see configs/ for documented ones")
    result.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override one key, e.g. --set frames.fps=2 --set source.uri=s3://bucket/videos; repeatable",
    )
    return result


def load(arguments: argparse.Namespace) -> JobConfig:
    """The checked configuration of a parsed command line."""
    return load_config(arguments.config, arguments.overrides)


def main_guard(main: Callable[[], int]) -> None:
    """Run a job's `main` and exit: user errors become one line on stderr and exit code 2."""
    try:
        sys.exit(main())
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(130)
