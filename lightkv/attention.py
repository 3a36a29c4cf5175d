"""An attention implementation that lets a stage see queries and keys, and that hears a merged token as its members.

transformers picks attention and mask functions by name. For a base name such as "sdpa" we register
"lightkv_sdpa": the same mask function, and an attention function that looks up what the module's AttentionHook asks
for and then calls the base. Registration is process-wide and changes nothing until a model selects the name.

Proportional attention: with a bias of log n_j on the score of key j, a token that stands for n_j equal ones takes
the attention that these took. No S × S mask is built for it. For many queries the bias travels in extra head
dimensions, q · k + bias = [q, 1, 1] · [k, high, low] with high + low = bias / scale: every kernel takes them,
`is_causal` stays, and half precision loses nothing. For one query a row is added to the mask, in the query's dtype.
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

Tap = Callable[[Tensor, Tensor, float], None]  # q [B, Hq, S, d], k [B, Hkv, S, d], scale
Bias = Callable[[], Tensor | None]  # fp32 [B, keys], or None where nothing is to be added

ROW_MASKS = ("sdpa", "eager")  # bases that take a mask [B, 1, queries, keys]
FLASH_DIMS = 256  # what FlashAttention's kernels take at most
EXTRA_DIMS = 8  # two are used; kernels want a head dimension that is a multiple of 8


@dataclass(frozen=True)
class AttentionHook:
    """What one attention module does beside its kernel: show q and k to `tap`, add `bias()` to its scores."""

    tap: Tap | None = None
    bias: Bias | None = None


HOOKS: WeakKeyDictionary[nn.Module, AttentionHook] = WeakKeyDictionary()
NO_HOOK = AttentionHook()


def hooked(base: str) -> str:
    """The name under which attention `base` runs with hooks, registered on first use.

    Raises UnsupportedModelError for a base without a mask function: padding would be dropped silently.
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
    # Eager attention, and any override of a kernel, lives in the module that defines the attention class.
    home = sys.modules[type(module).__module__]
    functions = getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    forward = functions.get_interface(base, getattr(home, "eager_attention_forward", None))
    bias = hook.bias() if hook.bias is not None else None
    if bias is None:
        return forward(module, query, key, value, attention_mask, **kwargs)
    bias = bias.to(query.device)
    if query.shape[2] == 1 and base in ROW_MASKS:
        return forward(module, query, key, value, _with_row(attention_mask, bias, query.dtype), **kwargs)
    wide = _widened(query, key, value, bias / scale)
    output, weights = forward(module, *wide, attention_mask, **{**kwargs, "scaling": scale})
    return output[..., : value.shape[-1]], weights


def _with_row(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias [B, keys] as a mask [B, 1, 1, keys], on top of the boolean or additive mask that is there."""
    row = bias.to(dtype)[:, None, None]
    if mask is None:
        return row
    return row.masked_fill(~mask, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + row


def _widened(query: Tensor, key: Tensor, value: Tensor, extra: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with EXTRA_DIMS more dimensions, so that q · k grows by extra [B, keys] and v by zeros."""
    high = extra.to(key.dtype)
    low = (extra - high.float()).to(key.dtype)
    parts = F.pad(torch.stack([high, low], dim=-1), (0, EXTRA_DIMS - 2))
    ones = F.pad(query.new_ones(2), (0, EXTRA_DIMS - 2))
    return (
        torch.cat([query, ones.expand(*query.shape[:-1], -1)], dim=-1),
        torch.cat([key, parts[:, None].expand(-1, key.shape[1], -1, -1)], dim=-1),
        F.pad(value, (0, EXTRA_DIMS)),
    )
