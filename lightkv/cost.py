"""Computes the cost of a prefill from a model's configuration: FLOPs and KV bytes, with and without compression."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightkv.errors import ConfigError
from lightkv.hooks.attention import EXTRA_DIMS
from lightkv.methods.config import LightKVConfig
from lightkv.methods.table import METHODS
from lightkv.vision.families import EMBEDDINGS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder that determine its cost (gated MLP, grouped-query attention)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, model_config: "PreTrainedConfig") -> "Shape":
        """Reads a transformers config, composite or text. Raises ConfigError if a dimension is missing."""
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

    def layer_flops(self, tokens: int, extra_dims: int = 0) -> int:
        """FLOPs of one layer: projections, MLP and attention (all query–key pairs, the usual count for kernels).

        `extra_dims` is the number of head dimensions that carry the sizes of merged tokens (hooks/attention.py).
        """
        projections = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        products = self.heads * (self.head_dim + extra_dims)
        return 2 * tokens * (projections + 3 * self.hidden * self.intermediate) + 4 * tokens**2 * products

    def kv_bytes(self, tokens: int, dtype_bytes: int) -> int:
        """Bytes of the keys and values of one layer."""
        return 2 * tokens * self.kv_heads * self.head_dim * dtype_bytes


@dataclass(frozen=True)
class LayerCost:
    """Cost of one decoder layer in prefill and the stage after it; layer 0 includes a stage on the embeddings."""

    tokens: int
    flops: int
    kv_bytes: int


@dataclass(frozen=True)
class Cost:
    """Cost of one prompt's prefill: all decoder layers, the stages, and the logits of the last token.

    flops      matrix products, multiply and add counted as two
    kv_bytes   the cache at the end of prefill, text included
    retention  share of vision KV entries kept, averaged over layers
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
    """Cost of the prefill of `vision_tokens` (in `frames` equal grids) and `text_tokens`; config=None: uncompressed.

    The vision tokens count as one item, and windows as near-equal. This is exact if the windows divide the grids.
    Raises ConfigError for impossible counts.
    """
    return prefill_cost(Shape.of(model_config), vision_tokens, text_tokens, config, dtype_bytes, frames)


def prefill_cost(
    shape: Shape, vision_tokens: int, text_tokens: int, config: LightKVConfig | None, dtype_bytes: int, frames: int
) -> Cost:
    """`estimate` for a decoder given by its dimensions."""
    if min(vision_tokens, text_tokens) < 0 or min(dtype_bytes, frames) < 1:
        raise ConfigError(
            f"token counts must be at least 0, dtype_bytes and frames at least 1, got vision_tokens={vision_tokens}, "
            f"text_tokens={text_tokens}, dtype_bytes={dtype_bytes}, frames={frames}"
        )
    if config is not None:
        config.check_depth(shape.layers)
    proportional = config is not None and METHODS[config.method].proportional
    vision, flops = _stage_after(EMBEDDINGS, shape, config, vision_tokens, text_tokens, frames)
    layers: list[LayerCost] = []
    held = 0
    for layer in range(shape.layers):
        tokens, held = vision + text_tokens, held + vision
        flops += shape.layer_flops(tokens, EXTRA_DIMS if proportional and vision < vision_tokens else 0)
        vision, matching = _stage_after(layer, shape, config, vision, text_tokens, frames)
        layers.append(LayerCost(tokens, flops + matching, shape.kv_bytes(tokens, dtype_bytes)))
        flops = 0
    return Cost(
        flops=sum(layer.flops for layer in layers) + 2 * shape.hidden * shape.vocabulary,
        kv_bytes=sum(layer.kv_bytes for layer in layers),
        retention=held / (vision_tokens * shape.layers) if vision_tokens else 1.0,
        per_layer=tuple(layers),
    )


def _stage_after(
    layer: int, shape: Shape, config: LightKVConfig | None, vision: int, text: int, frames: int
) -> tuple[int, int]:
    """(vision tokens left, FLOPs) of the stage after `layer`; (`vision`, 0) if there is none."""
    layers = [stage.layer for stage in config.stages] if config is not None else []
    if config is None or layer not in layers or not vision:
        return vision, 0
    method, number = METHODS[config.method], layers.index(layer)
    stage, scorer = config.stages[number], method.scorer(config, number)
    left, matching = method.cost(vision, stage, config, frames, shape.hidden)
    pairs = scorer.pairs(vision + text, text) if scorer is not None else 0
    return left, matching + 2 * pairs * shape.heads * shape.head_dim
