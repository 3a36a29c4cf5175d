"""Suite "stage": one stage, from queries and keys to survivors, and one decoder layer's prefill of as many tokens."""

from dataclasses import replace
from functools import partial

import torch

from jobs.measure.benchmark.cell import Cell, Values
from jobs.measure.benchmark.decoder import Decoder
from jobs.measure.benchmark.derive import LAYER
from jobs.measure.benchmark.prompt import TEXT, Prompt, layout_of, states_of
from jobs.measure.benchmark.run import timing
from jobs.measure.benchmark.scale import Scale
from jobs.measure.benchmark.timer import Timer
from lightkv import LightKVConfig, Tokens
from lightkv.methods.table import METHODS
from lightkv.vision.packing import Packing

RETENTION = 0.25  # retention of the schedule whose stages "lightkv" uses


def cells(scale: Scale) -> list[Cell]:
    """Cells per size: the layer, both stages of "lightkv", the first stage of "published"."""
    decoder = next(decoder for decoder in scale.decoders if decoder.shape == scale.shape)
    ours = decoder.ours(RETENTION)
    stages = {
        "lightkv, first stage": (ours, 0),
        "lightkv, second stage": (ours, 1),
        "published, first stage": (decoder.published, 0),
    }
    found = []
    for tokens in scale.stage_tokens:
        found.append(Cell("stage", LAYER, {"tokens": tokens}, partial(_layer, scale, decoder, tokens)))
        for name, (config, number) in stages.items():
            measure = partial(_stage, scale, config, number, tokens)
            found.append(Cell("stage", name, {"tokens": tokens}, measure))
    return found


def _stage(scale: Scale, config: LightKVConfig, number: int, tokens: int, timer: Timer) -> Values:
    """Time a stage: scores from queries and keys, if the method needs them, then the method itself."""
    shape, method, stage, length = scale.shape, METHODS[config.method], config.stages[number], tokens + TEXT
    scorer = method.scorer(config, number)
    layout = layout_of(tokens)
    hidden = states_of(layout, 1, shape.hidden, scale.device, scale.dtype)[0]
    layout, size = layout.to(scale.device), torch.ones(length, device=scale.device)
    q, k = (
        torch.randn(1, heads, length, shape.head_dim, device=scale.device, dtype=scale.dtype)
        for heads in (shape.heads, shape.kv_heads)
    )
    packing, factor = Packing((length,), length, scale.device), shape.head_dim**-0.5

    def run() -> int:
        score = scorer(q, k, layout, packing, factor) if scorer is not None else None
        result = method.compress(Tokens(hidden, layout, size, score, (length,)), stage, config)
        return len(result.kept)

    return {"drop": stage.drop, "kept": run(), **timing(timer, run)}


def _layer(scale: Scale, decoder: Decoder, tokens: int, timer: Timer) -> Values:
    """Time a layer's projections, attention and MLP, without a cache."""
    alone = replace(decoder, shape=replace(decoder.shape, layers=1, vocabulary=128))
    model = alone.build(scale.device, scale.dtype).get_decoder()
    prompt = Prompt.of(tokens, 1, scale.shape.hidden, decoder.kind.axes, scale.device, scale.dtype)
    positions = prompt.positions
    if positions is None:
        positions = torch.arange(tokens + TEXT, device=scale.device)[None]
    angles = model.rotary_emb(prompt.embeds, positions)
    layer = partial(model.layers[0], prompt.embeds, attention_mask=None, position_embeddings=angles)
    return timing(timer, layer)
