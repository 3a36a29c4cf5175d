"""What a prefill costs, from a model's configuration alone: FLOPs and KV bytes, with and without compression."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightkv.config import LightKVConfig, Stage
from lightkv.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder that its cost depends on (gated MLP, grouped-query attention)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, model_config: "PreTrainedConfig") -> "Shape":
        """Read off a transformers config, composite or text. Raises ConfigError when a dimension is missing."""
        text = model_config.get_text_config()
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        missing = [name for name in names if getattr(text, name, None) is None]
        if missing:
            raise ConfigError(f"{type(text).__name__} lacks {missing}: its cost cannot be estimated")
        layers, hidden, intermediate, heads, vocabulary = (getattr(text, name) for name in names)
        return cls(
            layers,
            hidden,
            intermediate,
            heads,
            getattr(text, "num_key_value_heads", None) or heads,
            getattr(text, "head_dim", None) or hidden // heads,
            vocabulary,
        )

    def layer_flops(self, tokens: int) -> int:
        """Projections, MLP and attention (all query–key pairs, as kernels are usually counted) of one layer."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return (
            2 * tokens * (attention + 3 * self.hidden * self.intermediate) + 4 * tokens**2 * self.heads * self.head_dim
        )

    def kv_bytes(self, tokens: int, dtype_bytes: int) -> int:
        """Keys and values of one layer."""
        return 2 * tokens * self.kv_heads * self.head_dim * dtype_bytes


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer in prefill, with the stage that follows it."""

    tokens: int
    flops: int
    kv_bytes: int


@dataclass(frozen=True)
class Cost:
    """Prefill of one prompt: all decoder layers, the stages, and the logits of the last token.

    flops      matrix products, multiply and add counted as two
    kv_bytes   the cache at the end of prefill, text included
    retention  layer-averaged share of vision KV entries kept
    """

    flops: int
    kv_bytes: int
    retention: float
    per_layer: tuple[LayerCost, ...]


def estimate(
    model_config: "PreTrainedConfig",
    *,
    vision_tokens: int,
    text_tokens: int,
    config: LightKVConfig | None,
    dtype_bytes: int = 2,
    frames: int = 1,
) -> Cost:
    """Cost of prefilling `vision_tokens` (in `frames` equal grids) and `text_tokens`, compressed by `config` or not.

    Windows are taken as near-equal, which is exact where they divide the grids. Raises ConfigError for bad counts.
    """
    return prefill_cost(Shape.of(model_config), vision_tokens, text_tokens, config, dtype_bytes, frames)


def prefill_cost(
    shape: Shape, vision_tokens: int, text_tokens: int, config: LightKVConfig | None, dtype_bytes: int, frames: int
) -> Cost:
    """`estimate` for a decoder that is known by its dimensions only."""
    if min(vision_tokens, text_tokens) < 0 or min(dtype_bytes, frames) < 1:
        raise ConfigError(
            f"token counts must be at least 0, dtype_bytes and frames at least 1, got vision_tokens={vision_tokens}, "
            f"text_tokens={text_tokens}, dtype_bytes={dtype_bytes}, frames={frames}"
        )
    if config is not None:
        config.check_depth(shape.layers)
    stages = {stage.layer: stage for stage in config.stages} if config is not None else {}
    layers: list[LayerCost] = []
    vision, held = vision_tokens, 0
    for layer in range(shape.layers):
        tokens, held = vision + text_tokens, held + vision
        flops = shape.layer_flops(tokens)
        if config is not None and layer in stages and vision:
            if config.guidance != "uniform":
                flops += 2 * tokens * text_tokens * shape.heads * shape.head_dim  # votes: text keys × all queries
            vision, matching = _after_stage(vision, stages[layer], config, frames, shape.hidden)
            flops += matching
        layers.append(LayerCost(tokens, flops, shape.kv_bytes(tokens, dtype_bytes)))
    return Cost(
        flops=sum(layer.flops for layer in layers) + 2 * shape.hidden * shape.vocabulary,
        kv_bytes=sum(layer.kv_bytes for layer in layers),
        retention=held / (vision_tokens * shape.layers) if vision_tokens else 1.0,
        per_layer=tuple(layers),
    )


def _frame_groups(config: LightKVConfig, frames: int) -> int:
    """Sets of frames that share windows: the release takes a whole video for one image."""
    span = config.frames_per_window if config.windows != "released" else None
    return math.ceil(frames / span) if span else 1


def _after_stage(vision: int, stage: Stage, config: LightKVConfig, frames: int, width: int) -> tuple[int, int]:
    """Vision tokens that are left, and FLOPs of the similarities, with windows as equal as the count allows."""
    count = _frame_groups(config, frames) * stage.windows**2
    room = max(0, vision - count)  # every window keeps a token
    budget = min(int(vision * stage.drop + 1e-9), room)
    left, flops = 0, 0
    for size, windows in ((vision // count + 1, vision % count), (vision // count, count - vision % count)):
        quota, now = min(int(size * stage.drop + 1e-9), max(0, size - 1)), size
        if config.budget == "item":
            quota = math.ceil(budget * max(0, size - 1) / max(1, room))
        while quota > 0:
            flops += windows * 2 * ((now + 1) // 2) * (now // 2) * width
            step = min(quota, now // 2)
            quota, now = quota - step, now - step
        left += windows * now
    return (vision - budget if config.budget == "item" else left), flops
