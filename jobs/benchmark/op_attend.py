"""Attention with a bias per key, set up as layers call it, beside the attention that hears no bias and ours without it.

"sdpa" is torch's scaled_dot_product_attention without bias: the floor. "no kernel" is what lightkv/attention.py does
where its kernel is not to be had: widened heads in prefill, a row added to the mask in decode.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jobs.benchmark.bytes import attend_bytes, causal_flops, pair_flops
from jobs.benchmark.op import OpWork
from jobs.benchmark.scale import Scale
from lightkv.attention import HOOKS, AttentionHook, KeyWeights, hooked
from lightkv.ops.attend import attend, attend_torch

LARGEST = 64.0  # tokens that one key stands for, at most


def prefill(scale: Scale, tokens: int) -> OpWork:
    """As many queries as keys."""
    flops = causal_flops(tokens, scale.shape.heads, scale.shape.head_dim)
    return _attend(scale, tokens, tokens, flops)


def decode(scale: Scale, tokens: int) -> OpWork:
    """One query."""
    return _attend(scale, 1, tokens, 2 * pair_flops(tokens, scale.shape.heads * scale.shape.head_dim))


def _attend(scale: Scale, queries: int, keys: int, flops: int) -> OpWork:
    shape = scale.shape
    make = partial(torch.randn, device=scale.device, dtype=scale.dtype)
    q = make(1, queries, shape.heads, shape.head_dim).transpose(1, 2)
    k, v = (make(1, shape.kv_heads, keys, shape.head_dim) for _ in range(2))
    bias = (1 + (LARGEST - 1) * torch.rand(1, keys, device=scale.device)).log()
    factor = shape.head_dim**-0.5
    plain = partial(F.scaled_dot_product_attention, q, k, v, is_causal=queries > 1, scale=factor, enable_gqa=True)
    return OpWork(
        partial(attend, q, k, v, bias, None, factor),
        partial(attend_torch, q, k, v, bias, None, factor),
        attend_bytes(queries, keys, shape.heads, shape.kv_heads, shape.head_dim, scale.element),
        flops,
        {"sdpa": plain, "no kernel": without_kernel(q, k, v, bias, factor)},
    )


class _Attention(nn.Module):
    """What transformers' attention functions read off an attention module."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.is_causal = True
        self.num_key_value_groups = group


def without_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Callable[[], Tensor]:
    """lightkv's sdpa attention with its kernels switched off: [B, L, Hq, d]."""
    module = _Attention(q.shape[1] // k.shape[1])
    HOOKS[module] = AttentionHook(weights=lambda: KeyWeights(bias, None))
    forward = ALL_ATTENTION_FUNCTIONS[hooked("sdpa")]

    def run() -> Tensor:
        with torch_only():
            return forward(module, q, k, v, None, scaling=scale)[0]

    return run


@contextmanager
def torch_only() -> Iterator[None]:
    """LIGHTKV_OPS=torch inside, whatever it was outside."""
    before = os.environ.get("LIGHTKV_OPS")
    os.environ["LIGHTKV_OPS"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIGHTKV_OPS"]
        else:
            os.environ["LIGHTKV_OPS"] = before
