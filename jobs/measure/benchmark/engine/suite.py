"""The suite "engine": its parts, and the share of time of each."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jobs.measure.benchmark.cell import Cell
from jobs.measure.benchmark.engine import hours, memory, prompts, streamed, throughput
from jobs.measure.benchmark.engine.scale import EngineScale, on_cpu, on_gpu

SHARES = {"hours": 0.01, "streamed": 0.09, "prompts": 0.17, "throughput": 0.33, "memory": 0.4}


def scale_of(device: torch.device) -> EngineScale:
    return on_gpu(device) if device.type == "cuda" else on_cpu()


def cells(scale: EngineScale) -> list[Cell]:
    """Cells of all parts, in the order of measurement."""
    parts: dict[str, Callable[[], list[Cell]]] = {
        "hours": hours.cells,
        "streamed": lambda: streamed.cells(scale),
        "prompts": lambda: prompts.cells(scale),
        "throughput": lambda: throughput.cells(scale),
        "memory": lambda: memory.cells(scale),
    }
    return [cell for name in SHARES for cell in parts[name]()]
