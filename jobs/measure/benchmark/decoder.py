"""Build decoders of real shapes with random weights on the device, from transformers' own classes, one at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
)

from jobs.measure.benchmark.cell import free
from lightkv import LightKVConfig
from lightkv.cost import Shape

POSITIONS = 1 << 17  # at least the tokens of the longest prompt and its answer


@dataclass(frozen=True)
class Kind:
    """How to build a model from a shape: configuration, transformers' auto class, number of RoPE axes."""

    config: Callable[[Shape], PreTrainedConfig]
    auto: Any
    axes: int


def _dimensions(shape: Shape) -> dict[str, Any]:
    return dict(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=POSITIONS,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def llama(shape: Shape) -> PreTrainedConfig:
    """Configuration for Vicuna, a Llama, and InternLM2, which differs only in how its checkpoint packs projections."""
    return LlamaConfig(head_dim=shape.head_dim, **_dimensions(shape))


def qwen2_5_vl(shape: Shape) -> PreTrainedConfig:
    """Axes share the angles 2 : 3 : 3, as published; the vision tower never runs and is minimal."""
    sections = [shape.head_dim // 8, shape.head_dim * 3 // 16, shape.head_dim * 3 // 16]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    tower = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=shape.hidden)
    return Qwen2_5_VLConfig(text_config={**_dimensions(shape), "rope_parameters": rope}, vision_config=tower)


LLAMA = Kind(llama, AutoModelForCausalLM, axes=1)
QWEN2_5_VL = Kind(qwen2_5_vl, AutoModelForImageTextToText, axes=3)


@dataclass(frozen=True)
class Decoder:
    """A model of the tables; `published` is its schedule in the paper."""

    name: str
    shape: Shape
    kind: Kind
    published: LightKVConfig

    def config(self) -> PreTrainedConfig:
        return self.kind.config(self.shape)

    def ours(self, retention: float) -> LightKVConfig:
        return LightKVConfig.for_model(self.config(), retention)

    def build(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """Build the model with transformers' initial weights: normal, standard deviation 0.02."""
        with torch.device(device):
            model = self.kind.auto.from_config(self.config(), dtype=dtype, attn_implementation="sdpa")
        return model.eval()


class Resident:
    """Holds the one model on the device; frees it before another is built."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.decoder: Decoder | None = None
        self.model: PreTrainedModel | None = None

    def get(self, decoder: Decoder) -> PreTrainedModel:
        if self.model is None or self.decoder != decoder:
            self.model = None
            free()
            self.model, self.decoder = decoder.build(self.device, self.dtype), decoder
        return self.model


def weight_bytes(shape: Shape, element: int) -> int:
    """Bytes of the projections and MLPs of all layers, of embeddings and head."""
    projections = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    layer = projections + 3 * shape.hidden * shape.intermediate
    return (shape.layers * layer + 2 * shape.vocabulary * shape.hidden) * element
