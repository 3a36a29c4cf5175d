"""Refuses calls that compression does not support, before any computation."""

from collections.abc import Mapping
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lightkv.errors import UnsupportedCallError
from lightkv.hooks.cache import ShortLayer

# (option of generate, supported values, why others are not supported)
GENERATION_OPTIONS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("cache_implementation", (None, "dynamic", "dynamic_full"), "layers of different length need a DynamicCache"),
    ("assistant_model", (None,), "assisted decoding feeds several tokens at a time"),
    ("prompt_lookup_num_tokens", (None,), "assisted decoding feeds several tokens at a time"),
    ("prefill_chunk_size", (None,), "a stage must see the whole prompt"),
    ("use_cache", (None, True), "compression acts on the KV cache"),
)


def refuse_generation(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Raises UnsupportedCallError for unsupported options of `generate`, passed or configured."""
    defaults = kwargs.get("generation_config") or model.generation_config
    for name, allowed, reason in GENERATION_OPTIONS:
        value = kwargs[name] if name in kwargs else getattr(defaults, name, None)
        if value not in allowed:
            raise UnsupportedCallError(f"generate({name}={value!r}) cannot be compressed: {reason}")
    if seen_tokens(kwargs.get("past_key_values")):
        raise UnsupportedCallError("generate got a filled cache: start from the prompt again")
    if kwargs.get("past_key_values") is not None:
        refuse_cache(kwargs["past_key_values"], True)


def refuse_cache(cache: Cache | None, use_cache: bool | None) -> None:
    """Raises UnsupportedCallError unless each layer of the cache to be filled can have its own length."""
    if cache is None:
        if use_cache is False:
            raise UnsupportedCallError("compression acts on the KV cache: call with use_cache=True")
    elif type(cache) is not DynamicCache or any(
        type(layer) not in (DynamicLayer, ShortLayer) for layer in cache.layers
    ):
        raise UnsupportedCallError(
            f"layers of different length need a DynamicCache of full-attention layers, got {cache}"
        )


def refuse_reuse(cache: Cache, compressed_here: bool, new_tokens: int) -> None:
    """Raises UnsupportedCallError if a filled cache gets more than one new token, or was filled in another scope."""
    if compressed_here and new_tokens > 1:
        raise UnsupportedCallError(
            f"{new_tokens} tokens were fed to a compressed cache, which takes one at a time: start from the prompt "
            "again (no reuse across turns, no assisted decoding, no chunked prefill)"
        )
    if not compressed_here and len({layer.get_seq_length() for layer in cache.layers}) > 1:
        raise UnsupportedCallError("this cache was compressed in another scope: start from the prompt again")


def seen_tokens(cache: Cache | None) -> int:
    """Number of prompt tokens that a cache already covers."""
    return 0 if cache is None else cache.get_seq_length()
