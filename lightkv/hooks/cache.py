"""Makes cache layers that hold fewer tokens than the model has seen, and reads how many they hold."""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class ShortLayer(DynamicLayer):
    """Layer 0 after a stage on the embeddings: counts `missing` prompt tokens that it never receives.

    `generate` and the model take the position of the next token from layer 0's length. `held_tokens` gives the number
    of tokens that the layer holds.
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
    """Replaces layer 0 of an empty DynamicCache by one that counts `missing` tokens more than it receives."""
    cache.layers[:1] = [ShortLayer(missing)]


def held_tokens(cache: Cache, layer: int) -> int:
    """Number of tokens whose keys and values this layer holds."""
    return DynamicLayer.get_seq_length(cache.layers[layer]) if layer < len(cache.layers) else 0


def cache_holding(tokens: int) -> DynamicCache:
    """A cache without data whose length is `tokens`, for transformers' mask functions, which read the length only."""
    layer = DynamicLayer()
    layer.keys, layer.is_initialized = torch.empty(1).expand(1, 1, tokens, 1), True
    cache = DynamicCache()
    cache.layers = [layer]
    return cache
