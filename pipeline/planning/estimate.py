"""Estimates the frames, vision tokens, KV bytes and prefill FLOPs of a plan, from probes and the model's configuration.

No video is decoded and no weights are loaded. Text tokens are estimated from the prompts' length. The vision tower is
not counted.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from lightkv import Bits, Cost, LightKVConfig, estimate
from lightkv.cost import Shape
from pipeline.config import Frames, JobConfig
from pipeline.decoding.frames import Sizing, target_times

if TYPE_CHECKING:
    from pipeline.errors import UnitError

_TEMPLATE_TOKENS = 24  # of the chat template around a prompt
_CHARACTERS_PER_TOKEN = 4.0


class FrameSizes(Protocol):
    """The frame sizes and token counts of a model family; every `FrameEncoder` implements it."""

    def sizing(self, frames: Frames) -> Sizing:
        """How frames are resized."""

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens (t, y, x) of `frames` frames of `height` × `width` pixels."""


@dataclass
class Totals:
    """Sums over units. Tokens, KV bytes and FLOPs are 0 without a model; KV bytes are of each unit's first prompt.

    `too_long` and the fields after it cover probed units only; `unprobed` counts the others.
    """

    units: int = 0
    unprobed: int = 0
    videos: int = 0  # distinct files, or images
    bytes: int = 0
    too_long: int = 0  # longer than the model's context: an error row without decoding
    hours: float = 0.0
    frames: int = 0
    vision_tokens: int = 0
    text_tokens: int = 0
    kv_bytes: int = 0
    kv_bytes_uncompressed: int = 0
    largest_kv_bytes: int = 0
    largest_kv_bytes_uncompressed: int = 0
    flops: int = 0
    flops_uncompressed: int = 0

    def add(self, other: "Totals") -> None:
        for one in fields(self):
            join = max if one.name.startswith("largest") else lambda a, b: a + b
            setattr(self, one.name, join(getattr(self, one.name), getattr(other, one.name)))


@dataclass
class PlanSummary:
    """Totals of the plan and per kind of unit, and counts of what the plan leaves out."""

    total: Totals = field(default_factory=Totals)
    by_kind: dict[str, Totals] = field(default_factory=dict)
    ignored_files: int = 0
    repeated_rows: int = 0
    known_units: int = 0  # not planned: they have a row in an earlier run
    probe_errors: dict[str, str] = field(default_factory=dict)  # uri → error
    refusals: dict[str, str] = field(default_factory=dict)  # id of a unit longer than the model's context → error


def estimate_plan(
    table: pa.Table,
    config: JobConfig,
    *,
    model_config: Any = None,
    encoder: FrameSizes | None = None,
    compression: LightKVConfig | None = None,
    refusal: "Callable[[dict[str, Any], Frames], UnitError | None] | None" = None,
) -> PlanSummary:
    """Sum up `table` (UNIT_SCHEMA); tokens and costs need transformers' `model_config` and its `encoder`.

    `refusal` (`ContextLimit.refusal`) returns an error for a unit longer than the model's context.
    """
    tokens = _token_counter(encoder, config.frames) if encoder is not None else None
    cost = _cost_counter(model_config, compression, config)
    summary = PlanSummary()
    for name, count in (table.schema.metadata or {}).items():
        setattr(summary, name.decode(), int(count))
    seen: set[str] = set()
    for batch in table.to_batches(max_chunksize=4096):
        for unit in batch.to_pylist():
            one = _unit_totals(unit, config.frames, tokens, cost)
            refused = refusal(unit, config.frames) if refusal is not None else None
            if refused is not None:
                one.too_long = 1
                summary.refusals[unit["id"]] = refused.message
            one.videos = sum(uri not in seen for uri in unit["uris"])
            one.bytes = (unit["size_bytes"] or 0) if unit["uris"][0] not in seen else 0
            seen.update(unit["uris"])
            summary.by_kind.setdefault(unit["kind"], Totals()).add(one)
            summary.total.add(one)
            if unit["probe_error"]:
                summary.probe_errors[unit["uris"][0]] = unit["probe_error"]
    return summary


def window_s(unit: dict[str, Any]) -> float:
    """Seconds of video that a unit of known length covers, 0 at least."""
    end_s: float = min(unit["end_s"] or math.inf, unit["duration_s"])
    return max(0.0, end_s - (unit["start_s"] or 0.0))


def expected_frames(window_s: float, fps: float, frames: Frames) -> int:
    """How many frames `choose_frames` chooses from `window_s` seconds of video at a constant `fps`."""
    available = max(1, math.floor(window_s * fps + 1e-6))
    return min(available, len(target_times(0.0, (available - 1) / fps, frames)))


def _unit_totals(
    unit: dict[str, Any],
    frames: Frames,
    tokens: Callable[[str, int, int, int], int] | None,
    cost: Callable[[int, int], tuple[int, int, int, int]],
) -> Totals:
    one = Totals(units=1)
    if unit["kind"] == "video":
        if unit["duration_s"] is None or unit["width"] is None:
            return Totals(units=1, unprobed=1)
        window = window_s(unit)
        one.hours = window / 3600
        one.frames = expected_frames(window, unit["fps"] or 25.0, frames) if window else 0
    elif unit["width"] is None:
        return Totals(units=1, unprobed=1)
    else:
        one.frames = len(unit["uris"])
    if tokens is None:
        return one
    one.vision_tokens = tokens(unit["kind"], one.frames, unit["height"], unit["width"])
    for number, prompt in enumerate(unit["prompts"]):
        text = _TEMPLATE_TOKENS + math.ceil(len(prompt["prompt"]) / _CHARACTERS_PER_TOKEN)
        kv, kv_plain, flops, flops_plain = cost(one.vision_tokens, text)
        one.text_tokens += text
        one.flops += flops
        one.flops_uncompressed += flops_plain
        if number == 0:
            one.kv_bytes = one.largest_kv_bytes = kv
            one.kv_bytes_uncompressed = one.largest_kv_bytes_uncompressed = kv_plain
    return one


def _token_counter(encoder: FrameSizes, frames: Frames) -> Callable[[str, int, int, int], int]:
    sizing = encoder.sizing(frames)

    @functools.lru_cache(maxsize=4096)
    def count(kind: str, number: int, height: int, width: int) -> int:
        size = sizing.of(height, width)
        # Every image is one item; all are assumed to have the first one's size.
        items, frames_each = (number, 1) if kind == "images" else (1, number)
        return items * math.prod(encoder.grid(frames_each, size.crop_h, size.crop_w))

    return count


def _cost_counter(
    model_config: Any, compression: LightKVConfig | None, config: JobConfig
) -> Callable[[int, int], tuple[int, int, int, int]]:
    wide = config.model.dtype == "float32" or (config.model.dtype == "auto" and config.model.device == "cpu")

    @functools.lru_cache(maxsize=4096)
    def cost(vision: int, text: int) -> tuple[int, int, int, int]:
        options = {"vision_tokens": vision, "text_tokens": text, "dtype_bytes": 4 if wide else 2}
        plain = estimate(model_config, config=None, **options)
        less = plain if compression is None else estimate(model_config, config=compression, **options)
        return _held_bytes(less, text, model_config, config), plain.kv_bytes, less.flops, plain.flops

    return cost


def _held_bytes(cost: Cost, text: int, model_config: Any, config: JobConfig) -> int:
    """KV bytes in the engine's cache under the job's `fold`, `silent_layers`, `kv_bits` and `budget`.

    Text counts in the model's dtype. Quantisation scales are assumed to take the same share in fp32 as in 16 bits.
    """
    engine, budget = config.engine, config.budget.kv_bytes
    bits = Bits(engine.kv_bits, engine.kv_group).per_number(Shape.of(model_config).head_dim) / 16
    folded = cost.per_layer[-1].tokens - text if engine.fold or budget is not None else None
    vision_bytes = text_bytes = 0.0
    for number, layer in enumerate(cost.per_layer):
        token = layer.kv_bytes / max(1, layer.tokens)
        vision = layer.tokens - text if folded is None else folded
        text_bytes += text * token
        vision_bytes += 0 if number in engine.silent_layers else vision * token * bits
    return round(text_bytes + min(vision_bytes, vision_bytes if budget is None else budget))
