"""One measurement of the benchmark: its name, its sizes and its function; failures are values."""

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

    measure     sets up, times, and returns the result
    estimate_s  expected seconds of `measure`, if it may take long
    skip        why it is not measured; empty: it is
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
    """The result of `measure` with status "measured"; after an error a status and `why`, with device memory freed."""
    try:
        return {"status": MEASURED, **measure()}
    except torch.OutOfMemoryError as error:
        values = not_measured(f"out of memory: {_first_line(error)}")
    except Exception as error:
        values = {"status": FAILED, "why": f"{type(error).__name__}: {_first_line(error)}"}
    with suppress(RuntimeError):  # an error of a broken device must not hide the first one
        free()
    return values


def parts(values: Values) -> list[Values]:
    """The parts of a cell with a status: the forms of an operation, else the cell itself."""
    return list(values["forms"].values()) if "forms" in values else [values]


def not_measured(why: str) -> Values:
    return {"status": NOT_MEASURED, "why": why}


def free() -> None:
    """Free unreferenced memory, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
