"""Time several functions in turns, so that other load on the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Works = Mapping[str, Callable[[], object]]
Seconds = dict[str, list[float]]


def in_turns(works: Works, rounds: int, budget_s: float, device: torch.device) -> Seconds:
    """Seconds of each function per round; runs rounds for `budget_s` seconds, at least `rounds`.

    Every other round runs in reverse order. Each function runs once before, untimed.
    """
    for work in works.values():
        work()
    found: Seconds = {name: [] for name in works}
    started, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - started < budget_s:
        for name in list(works)[:: -1 if done % 2 else 1]:
            began = time.perf_counter()
            works[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found[name].append(time.perf_counter() - began)
        done += 1
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios, each taken within a round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])
