"""Suite "decode": time per new token after a prefill, plain and compressed.

transformers' DynamicCache copies a layer's keys and values to append a token's. These times include the copies, as in
any generation with that cache; a smaller cache copies less.
"""

from functools import partial
from itertools import count

import torch

from jobs.measure.benchmark.cell import Cell, Values
from jobs.measure.benchmark.decoder import Resident
from jobs.measure.benchmark.model import Load, place, prefill, variants
from jobs.measure.benchmark.run import timing
from jobs.measure.benchmark.scale import Scale
from jobs.measure.benchmark.timer import Timer
from lightkv.hooks.report import cache_bytes


def cells(scale: Scale, resident: Resident) -> list[Cell]:
    """Every model at every batch size, after prompts of the same length."""
    found = []
    for decoder in scale.decoders:
        for batch in scale.decode_batches:
            for name, config in variants(decoder, published=False).items():
                load = Load(decoder, config, scale.decode_vision, batch)
                estimate = scale.estimate_s(batch * load.cost(scale.element).flops)
                measure = partial(_measure, scale, resident, load)
                found.append(Cell("decode", name, place(load), measure, estimate, load.skip(scale)))
    return found


def _measure(scale: Scale, resident: Resident, load: Load, timer: Timer) -> Values:
    """Time one decode step, which adds one token to every prompt of the batch and to the cache."""
    model, prompt = resident.get(load.decoder), load.prompt(scale)
    with load.scope(model, prompt):
        cache = prefill(model, prompt).past_key_values
        held = cache_bytes(cache)
        word = torch.randn(load.batch, 1, load.decoder.shape.hidden, device=scale.device, dtype=scale.dtype)
        steps = count()

        def step() -> torch.Tensor:
            positions = prompt.next_positions(next(steps))
            where = {} if positions is None else {"position_ids": positions}
            output = model(inputs_embeds=word, past_key_values=cache, use_cache=True, logits_to_keep=1, **where)
            return output.logits.argmax(-1)

        return {**timing(timer, step), "kv_bytes": held}
