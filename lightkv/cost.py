"""What a prefill costs, from a model's configuration alone: FLOPs and KV bytes, with and without compression."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightkv.config import LightKVConfig
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
    """One decoder layer in prefill."""

    tokens: int
    flops: int
    kv_bytes: int


@dataclass(frozen=True)
class Cost:
    """Prefill of one prompt: all decoder layers, the stages, and the logits of the last token.

    flops      multiply and add counted as two
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
) -> Cost:
    """Cost of prefilling `vision_tokens` + `text_tokens`, compressed by `config` or (None) not at all.

    Windows are taken as large: each stage leaves round((1 - drop) · tokens). Raises ConfigError for bad counts.
    """
    if vision_tokens < 0 or text_tokens < 0 or dtype_bytes < 1:
        raise ConfigError(
            f"token counts must be at least 0 and dtype_bytes at least 1, got {vision_tokens}, {text_tokens} "
            f"and {dtype_bytes}"
        )
    shape = Shape.of(model_config)
    stages = config.stages if config is not None else ()
    if config is not None:
        config.check_depth(shape.layers)
    drops = {stage.layer: stage.drop for stage in stages}
    layers: list[LayerCost] = []
    vision, held = vision_tokens, 0
    for layer in range(shape.layers):
        tokens = vision + text_tokens
        flops = shape.layer_flops(tokens)
        if layer in drops:
            flops += 2 * tokens * text_tokens * shape.heads * shape.head_dim  # guidance: text keys against all queries
        layers.append(LayerCost(tokens, flops, shape.kv_bytes(tokens, dtype_bytes)))
        held += vision
        vision -= int(vision * drops.get(layer, 0.0) + 1e-9)
    return Cost(
        flops=sum(layer.flops for layer in layers) + 2 * shape.hidden * shape.vocabulary,
        kv_bytes=sum(layer.kv_bytes for layer in layers),
        retention=held / (vision_tokens * shape.layers) if vision_tokens else 1.0,
        per_layer=tuple(layers),
    )
