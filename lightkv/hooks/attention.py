"""Wraps an attention implementation: passes queries and keys to a stage, and weighs merged tokens by their sizes.

transformers selects attention and mask functions by name. For a base name such as "sdpa" we register "lightkv_sdpa":
the same mask function, and an attention function that looks up the module's AttentionHook and then calls the base.
Registration is process-wide and changes nothing until a model selects the name.

Proportional attention: a bias of log n_j on the score of key j gives a token merged from n_j equal tokens the attention
that these had together. No S × S mask is built for it:

    on GPUs         our kernel adds the bias (ops/attend.py)
    many queries    otherwise, extra head dimensions carry it: q · k + bias = [q, 1, 1] · [k, high, low] with
                    high + low = bias / scale. Every kernel takes them, `is_causal` stays, half precision loses nothing
    one query       otherwise, a row is added to the mask, in the query's dtype
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightkv.errors import UnsupportedModelError
from lightkv.ops.attend import attend
from lightkv.ops.dispatch import use_triton

Tap = Callable[[Tensor, Tensor, float], None]  # q [B, Hq, S, d], k [B, Hkv, S, d], scale
Weights = Callable[[], "KeyWeights | None"]  # None if all keys count equally

ROW_MASKS = ("sdpa", "eager")  # bases that take a mask [B, 1, queries, keys]
FLASH_DIMS = 256  # the largest head dimension of FlashAttention's kernels
EXTRA_DIMS = 8  # two are used; kernels need a head dimension that is a multiple of 8


@dataclass(frozen=True)
class KeyWeights:
    """Weight of each key: bias fp32 [B, keys] is added to its scores.

    first int64 [B] is the number of padding keys on the left; None without padding.
    """

    bias: Tensor
    first: Tensor | None


@dataclass(frozen=True)
class AttentionHook:
    """Additions to one attention module: it calls `tap` with q and k, and weighs keys by `weights()`."""

    tap: Tap | None = None
    weights: Weights | None = None


HOOKS: WeakKeyDictionary[nn.Module, AttentionHook] = WeakKeyDictionary()
NO_HOOK = AttentionHook()


def hooked(base: str) -> str:
    """The name of attention `base` with hooks, registered on first use.

    Raises UnsupportedModelError for a base without a mask function: padding would silently be ignored.
    """
    if base not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"attention implementation {base!r} has no mask function in AttentionMaskInterface; "
            "use sdpa, eager or flash_attention_2, or register one"
        )
    name = f"lightkv_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attend, base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _attend(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    hook = HOOKS.get(module, NO_HOOK)
    given = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if given is None else given
    if hook.tap is not None:
        hook.tap(query, key, scale)
    # Eager attention and overridden kernels are found in the module that defines the attention class.
    home = sys.modules[type(module).__module__]
    functions = getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    forward = functions.get_interface(base, getattr(home, "eager_attention_forward", None))
    weights = hook.weights() if hook.weights is not None else None
    if weights is None:
        return forward(module, query, key, value, attention_mask, **kwargs)
    bias = weights.bias.to(query.device)
    trained = torch.is_grad_enabled() and query.requires_grad  # attend has no gradient
    if base != "eager" and use_triton(query) and not trained and not _unusual(kwargs):
        first = None if weights.first is None else weights.first.to(query.device)
        return attend(query, key, value, bias, first, scale), None
    if query.shape[2] == 1 and base in ROW_MASKS:
        return forward(module, query, key, value, _with_row(attention_mask, bias, query.dtype), **kwargs)
    wide = _widened(query, key, value, bias / scale)
    output, seen = forward(module, *wide, attention_mask, **{**kwargs, "scaling": scale})
    return output[..., : value.shape[-1]], seen


def _unusual(kwargs: dict[str, Any]) -> bool:
    """Whether a model needs an attention feature that ops/attend.py does not have."""
    return kwargs.get("s_aux") is not None or any(kwargs.get(name) for name in ("dropout", "softcap", "sliding_window"))


def _with_row(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias [B, keys] as a mask [B, 1, 1, keys], combined with the given boolean or additive mask."""
    row = bias.to(dtype)[:, None, None]
    if mask is None:
        return row
    return row.masked_fill(~mask, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + row


def _widened(query: Tensor, key: Tensor, value: Tensor, extra: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with EXTRA_DIMS more dimensions: q · k grows by `extra` [B, keys], v is padded with zeros."""
    high = extra.to(key.dtype)
    low = (extra - high.float()).to(key.dtype)
    parts = F.pad(torch.stack([high, low], dim=-1), (0, EXTRA_DIMS - 2))
    ones = F.pad(query.new_ones(2), (0, EXTRA_DIMS - 2))
    return (
        torch.cat([query, ones.expand(*query.shape[:-1], -1)], dim=-1),
        torch.cat([key, parts[:, None].expand(-1, key.shape[1], -1, -1)], dim=-1),
        F.pad(value, (0, EXTRA_DIMS)),
    )
