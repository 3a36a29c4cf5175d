"""One measurement of the benchmark: what it is, where, and how it is made; failures are values."""

import gc
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from jobs.measure.benchmark.timer import Timer

Values = dict[str, Any]
Place = Mapping[str, int | str]

MEASURED, NOT_MEASURED, FAILED = "measured", "not measured", "failed"


@dataclass(frozen=True)
class Cell:
    """`name` at `at` (tokens, model, batch …), one row of a suite.

    measure     sets up, times, and returns what it found
    estimate_s  how long that is expected to take, where it may be long
    skip        why it is not tried at all
    """

    suite: str
    name: str
    at: Place
    measure: Callable[[Timer], Values]
    estimate_s: float = 0.0
    skip: str = ""

    @property
    def key(self) -> Values:
        return {"suite": self.suite, "name": self.name, "at": dict(self.at)}


def attempt(measure: Callable[[], Values]) -> Values:
    """What `measure` returns with status "measured"; else a status and `why`, and the device's memory free again."""
    try:
        return {"status": MEASURED, **measure()}
    except torch.OutOfMemoryError as error:
        values = not_measured(f"out of memory: {_first_line(error)}")
    except Exception as error:
        values = {"status": FAILED, "why": f"{type(error).__name__}: {_first_line(error)}"}
    with suppress(RuntimeError):  # a device that is beyond repair must not hide why
        free()
    return values


def parts(values: Values) -> list[Values]:
    """What of a cell was timed or not: the forms of an operation, else the cell itself."""
    return list(values["forms"].values()) if "forms" in values else [values]


def not_measured(why: str) -> Values:
    return {"status": NOT_MEASURED, "why": why}


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
