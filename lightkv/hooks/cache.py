"""Cache layers that hold fewer tokens than the model has seen."""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class ShortLayer(DynamicLayer):
    """Layer 0 after a stage on the embeddings: it never saw `missing` of the prompt's tokens, but counts them.

    `generate` and the model take the position of the next token from layer 0. What the layer really holds says
    `held_tokens`.
    """

    def __init__(self, missing: int) -> None:
        super().__init__()
        self.missing = missing

    def get_seq_length(self) -> int:
        held = super().get_seq_length()
        return held + self.missing if held else 0

    def reset(self) -> None:
        self.missing = 0
        super().reset()


def put_short_layer(cache: Cache, missing: int) -> None:
    """Make layer 0 of an empty DynamicCache one that counts `missing` tokens which it will not be given."""
    cache.layers[:1] = [ShortLayer(missing)]


def held_tokens(cache: Cache, layer: int) -> int:
    """Tokens whose keys and values this layer holds."""
    return DynamicLayer.get_seq_length(cache.layers[layer]) if layer < len(cache.layers) else 0


def cache_holding(tokens: int) -> DynamicCache:
    """An empty shell that says it holds so many tokens: what transformers' mask functions ask a cache for."""
    layer = DynamicLayer()
    layer.keys, layer.is_initialized = torch.empty(1).expand(1, 1, tokens, 1), True
    cache = DynamicCache()
    cache.layers = [layer]
    return cache
