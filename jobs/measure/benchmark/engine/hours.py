"""Part "hours": the KV cache of an hour of video in Qwen2.5-VL-7B, and how much video fits, computed from shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jobs.measure.benchmark.cell import Cell, Place, Values
from jobs.measure.benchmark.decoder import qwen2_5_vl
from jobs.measure.benchmark.timer import Timer
from lightkv import Bits, LightKVConfig
from lightkv.cost import prefill_cost
from lightkv.engine.layerkv import GROWTH
from lightkv.paper import QWEN2_5_7B

STEPS, TOKENS = 1800, 16 * 16  # of an hour at 1 fps, 448 × 448 px: two frames per step, 28 × 28 px per token
ELEMENT = 2  # bytes, bf16
WEIGHTS_BYTES = 15.5e9
PIECE_BYTES = 2e9  # a piece of 4,096 tokens in the layers, 16 frames in the vision tower, and the device's context
LAYERS_TWICE = 2  # layers with a second copy in the model's dtype: unpacked, growing, or being copied into a slot
CARDS = (24, 80)  # GB


@dataclass(frozen=True)
class Hour:
    """Bytes per hour of video: `kv_bytes` at the end of prefill, `most_bytes` at its peak."""

    kv_bytes: float
    most_bytes: float

    def fit(self, memory_bytes: float) -> float:
        """Hours of video that fit beside the weights and a piece; 0 if these do not fit."""
        return max(0.0, memory_bytes - WEIGHTS_BYTES - PIECE_BYTES) / self.most_bytes


def hour(config: LightKVConfig | None, fold: bool = False, bits: int = 16) -> Hour:
    """Cost of the vision tokens, prefilled in pieces. Without `config` too: one whole prompt would fit less."""
    cost = prefill_cost(QWEN2_5_7B, STEPS * TOKENS, 0, config, ELEMENT, STEPS)
    layers = [layer.kv_bytes for layer in cost.per_layer]
    if fold:
        layers = [layers[-1]] * len(layers)
    kv = sum(layers) * Bits(bits).per_number(QWEN2_5_7B.head_dim) / 16
    room = GROWTH if bits == 16 else 1.0  # a cache that is not packed has spare capacity, at most this factor
    return Hour(kv, kv * room + LAYERS_TWICE * max(layers))


def rows() -> dict[str, Hour]:
    """Variants by name; each of ours adds to the one before it."""
    of_model = partial(LightKVConfig.for_model, qwen2_5_vl(QWEN2_5_7B))
    ours = of_model(0.25)
    return {
        "plain": hour(None),
        "published 55%": hour(of_model(0.55, method="published")),
        "lightkv 25%": hour(ours),
        "+ folded": hour(ours, fold=True),
        "+ 8 bits": hour(ours, fold=True, bits=8),
        "+ 4 bits": hour(ours, fold=True, bits=4),
    }


def cells() -> list[Cell]:
    at: Place = {"model": "qwen2.5-vl-7b", "frame_px": 448, "fps": 1}
    return [Cell("hours", name, at, partial(_measure, of)) for name, of in rows().items()]


def _measure(of: Hour, timer: Timer) -> Values:
    fits = {str(card): of.fit(card * 1e9) for card in CARDS}
    return {"kv_bytes": of.kv_bytes, "most_bytes": of.most_bytes, "fits_hours": fits}
