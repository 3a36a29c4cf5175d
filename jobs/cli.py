"""The command line that all jobs share: --config, --set, and errors in one line."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.config import JobConfig, load_config
from pipeline.errors import PipelineError, StoppedError


def parser(description: str, *, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser with `--config` and `--set`."""
    result = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--config", metavar="FILE", help="YAML configuration; configs/ has documented examples")
    result.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override one key, e.g. --set frames.fps=2 --set source.uri=s3://bucket/videos; repeatable",
    )
    result.add_argument(
        "--help-config", action=_HelpConfig, help="show every key with its default and meaning, and exit"
    )
    return result


class _HelpConfig(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print("\n".join(_keys(JobConfig)))
        parser.exit()


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        key, kind = f"{prefix}{name}", field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield f"\n{key}: {(kind.__doc__ or '').strip()}"
            yield from _keys(kind, f"{key}.")
            continue
        default = "required" if field.default is PydanticUndefined else _plain(field.default)
        meaning = f"  # {field.description}" if field.description else ""
        yield f"  {key} = {default}{meaning}"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, BaseModel):
        return str(value.model_dump())
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def load(arguments: argparse.Namespace) -> JobConfig:
    """The checked configuration of a parsed command line."""
    return load_config(arguments.config, arguments.overrides)


def main_guard(main: Callable[[], int]) -> None:
    """Run a job's `main` and exit: user errors print one line on stderr and exit with 2, requested ends with 0."""
    try:
        sys.exit(main())
    except StoppedError as stopped:
        print(f"{stopped}; the same command continues where this one stopped", file=sys.stderr)
        sys.exit(0)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `… | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one stopped", file=sys.stderr)
        sys.exit(130)
