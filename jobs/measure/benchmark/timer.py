"""Time a function: warm-up, then repeats within a time budget; CUDA events on a GPU, the clock on a CPU."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one repeat."""

    median_s: float
    min_s: float
    max_s: float
    repeats: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


@dataclass(frozen=True)
class Timer:
    """Repeats for `budget_s` seconds, `least` to `most` times; only twice if these take `longest_s` seconds."""

    device: torch.device
    budget_s: float
    longest_s: float = 3.0
    least: int = 3
    most: int = 100

    def time(self, work: Work, before: Work | None = None) -> Timing:
        """Time `work` after one warm-up run; `before` runs before every repeat, untimed."""
        sample = _gpu_sample if self.device.type == "cuda" else _cpu_sample
        work()
        samples: list[float] = []
        started = time.perf_counter()
        while not self._enough(len(samples), time.perf_counter() - started):
            if before is not None:
                before()
            samples.append(sample(work))
        return Timing.of(samples)

    def _enough(self, repeats: int, spent_s: float) -> bool:
        if repeats < self.least:
            return repeats >= 2 and spent_s >= self.longest_s
        return repeats >= self.most or spent_s >= self.budget_s


def _gpu_sample(work: Work) -> float:
    """Seconds from the GPU's start of the work to its end, waits for the host included."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _cpu_sample(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
