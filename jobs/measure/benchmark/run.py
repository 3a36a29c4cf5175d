"""Run the cells of all suites within a time limit; a suite may use its share and what earlier suites left."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch

from jobs.measure.benchmark.cell import MEASURED, Cell, Values, attempt, not_measured
from jobs.measure.benchmark.result import ResultFile
from jobs.measure.benchmark.timer import Timer

SHARES = {"ops": 0.3, "stage": 0.1, "prefill": 0.45, "decode": 0.15}  # of the time, relative to the chosen suites
OUT_OF_TIME = "out of time"


def ends(shares: Mapping[str, float], limit_s: float) -> dict[str, float]:
    """Seconds after the start by which each suite must have ended; the last one's is the limit."""
    total, done, found = sum(shares.values()), 0.0, {}
    for suite, share in shares.items():
        done += share
        found[suite] = limit_s * done / total
    return found


say_now = partial(print, flush=True)


def run(
    cells: Sequence[Cell],
    result: ResultFile,
    timer: Timer,
    until: dict[str, float],
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], object] = say_now,
) -> None:
    """Measure all cells in order; a cell that would end after its suite's time is "not measured: out of time"."""
    started = clock()
    for index, cell in enumerate(cells):
        began = clock() - started
        if cell.skip:
            values = not_measured(cell.skip)
        elif began + cell.estimate_s >= until[cell.suite]:
            values = not_measured(OUT_OF_TIME)
        else:
            values = attempt(partial(_measure, cell, timer))
        result.header["spent_s"] = round(clock() - started, 1)
        result.put(index, values)
        at = " ".join(f"{key} {value}" for key, value in cell.at.items())
        said = "" if values["status"] == MEASURED else f": {values['why']}"
        say(f"{clock() - started:6.1f} s  {cell.suite}  {cell.name}  {at}  {values['status']}{said}")


def _measure(cell: Cell, timer: Timer) -> Values:
    """Measure with a fixed seed, so that random numbers do not depend on the chosen cells."""
    torch.manual_seed(0)
    with torch.inference_mode():
        return cell.measure(timer)


def timing(timer: Timer, work: Callable[[], object], before: Callable[[], object] | None = None) -> Values:
    """Time `work`: {"seconds": …} for a cell's values."""
    return {"seconds": asdict(timer.time(work, before))}
