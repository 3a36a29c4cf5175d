"""Suite "prefill": time to the first token of complete decoders, plain and compressed, with memory and cache."""

from functools import partial
from typing import Any

import torch

from jobs.measure.benchmark.cell import Cell, Values
from jobs.measure.benchmark.decoder import Resident
from jobs.measure.benchmark.model import Load, place, prefill, variants
from jobs.measure.benchmark.run import timing
from jobs.measure.benchmark.scale import Scale
from jobs.measure.benchmark.timer import Timer
from lightkv.hooks.report import cache_bytes

LONG_S = 20
PASSES = 3  # of a long cell: one to warm up and two timed


def cells(scale: Scale, resident: Resident) -> list[Cell]:
    """Single prompts on every model first, then batches; the longest last, because time may run out."""
    found = []
    for batch in scale.prefill_batches:
        for decoder in scale.decoders:
            for vision in scale.prefill_vision:
                for name, config in variants(decoder, published=True).items():
                    load = Load(decoder, config, vision, batch)
                    estimate = PASSES * scale.estimate_s(batch * load.cost(scale.element).flops)
                    measure = partial(_measure, scale, resident, load)
                    found.append(Cell("prefill", name, place(load), measure, estimate, load.skip(scale)))
    return sorted(found, key=lambda cell: cell.estimate_s > LONG_S)


def _measure(scale: Scale, resident: Resident, load: Load, timer: Timer) -> Values:
    """Time from embeddings, vision encoded, to the token with the largest logit."""
    model, prompt = resident.get(load.decoder), load.prompt(scale)
    plain, cost = (Load(load.decoder, c, load.vision, load.batch).cost(scale.element) for c in (None, load.config))
    last: dict[str, Any] = {}

    def run() -> None:
        output = prefill(model, prompt)
        last.update(token=output.logits.argmax(-1), kv_bytes=cache_bytes(output.past_key_values))

    with load.scope(model, prompt) as report:
        _reset_peak(scale.device)
        found = timing(timer, run)
        return {
            **found,
            "peak_bytes": _peak(scale.device),
            "kv_bytes": last["kv_bytes"],
            "retention": 1.0 if report is None else report.retention,
            "analytic_speedup": plain.flops / cost.flops,
            "flops": load.batch * cost.flops,
        }


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    """Peak bytes of tensors, weights included; None on a device without the counter."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
