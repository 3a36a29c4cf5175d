"""Set up attention with a bias per key as layers call it, and the alternatives that it is compared with.

"sdpa" is torch's scaled_dot_product_attention without bias, the lower bound. "no kernel" is what
lightkv/hooks/attention.py does without its kernel: widened heads in prefill, a row added to the mask in decode. "flex"
is torch's flex_attention with the bias, compiled.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jobs.measure.benchmark.ops.bytes import attend_bytes, attend_packed_bytes, causal_flops, pair_flops
from jobs.measure.benchmark.ops.op import OpWork
from jobs.measure.benchmark.scale import Scale
from lightkv.hooks.attention import HOOKS, AttentionHook, KeyWeights, hooked
from lightkv.ops.attend import attend, attend_torch
from lightkv.ops.attend_packed import attend_packed, attend_packed_torch
from lightkv.ops.ragged import Keys, Sequences
from lightkv.vision.packing import Packing

Flex = Callable[..., Tensor]

LARGEST = 64.0  # largest size of a key's token
SEQUENCES = 8  # sequences in a packed prefill
FLEX = "flex"


def prefill(scale: Scale, tokens: int) -> OpWork:
    """Attention with as many queries as keys."""
    flops = causal_flops(tokens, scale.shape.heads, scale.shape.head_dim)
    return _attend(scale, tokens, tokens, flops)


def decode(scale: Scale, tokens: int) -> OpWork:
    """Attention with one query."""
    return _attend(scale, 1, tokens, 2 * pair_flops(tokens, scale.shape.heads * scale.shape.head_dim))


def _attend(scale: Scale, queries: int, keys: int, flops: int) -> OpWork:
    shape = scale.shape
    make = partial(torch.randn, device=scale.device, dtype=scale.dtype)
    q = make(1, queries, shape.heads, shape.head_dim).transpose(1, 2)
    k, v = (make(1, shape.kv_heads, keys, shape.head_dim) for _ in range(2))
    bias, factor = _bias(scale, keys)[None], shape.head_dim**-0.5
    beside = {"sdpa": _plain(q, k, v, factor), "no kernel": without_kernel(q, k, v, bias, factor)}
    missing = {}
    if queries > 1 and scale.device.type == "cuda":
        beside[FLEX] = flex(q, k, v, bias[0], factor, flex_compiled())
    elif queries > 1:
        missing[FLEX] = f"{FLEX}, compiled, is for GPUs"
    return OpWork(
        partial(attend, q, k, v, bias, None, factor),
        partial(attend_torch, q, k, v, bias, None, factor),
        attend_bytes(queries, keys, shape.heads, shape.kv_heads, shape.head_dim, scale.element),
        flops,
        beside,
        missing,
    )


def packed(scale: Scale, tokens: int) -> OpWork:
    """SEQUENCES prefills of lengths 1 : 2 : 3 : … in one launch, `tokens` in all.

    "padded" is `attend` on them as one padded batch; "sdpa" and "no kernel" run one sequence after another.
    """
    shape, factor = scale.shape, scale.shape.head_dim**-0.5
    shares = list(accumulate(range(SEQUENCES + 1)))
    ends = [tokens * share // shares[-1] for share in shares]
    lengths = tuple(end - begin for begin, end in pairwise(ends))
    make = partial(torch.randn, device=scale.device, dtype=scale.dtype)
    q, k, v = (make(tokens, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    bias, sequences = _bias(scale, tokens), Sequences.of(lengths, scale.device)
    arguments = (q, Keys(k, v, bias), sequences, sequences, factor)
    rows = Packing(lengths, max(lengths), scale.device)
    batch_q, batch_k, batch_v = (rows.pad(states).transpose(1, 2) for states in (q, k, v))
    plain, without = [], []
    for parts in zip(*(x.split(lengths) for x in (q, k, v, bias)), strict=True):
        row_q, row_k, row_v = (part.transpose(0, 1)[None] for part in parts[:3])
        plain.append(_plain(row_q, row_k, row_v, factor))
        without.append(without_kernel(row_q, row_k, row_v, parts[3][None], factor))
    return OpWork(
        partial(attend_packed, *arguments),
        partial(attend_packed_torch, *arguments),
        attend_packed_bytes(tokens, SEQUENCES, shape.heads, shape.kv_heads, shape.head_dim, scale.element),
        sum(causal_flops(length, shape.heads, shape.head_dim) for length in lengths),
        {
            "sdpa": _in_turn(plain),
            "no kernel": _in_turn(without),
            "padded": partial(attend, batch_q, batch_k, batch_v, rows.pad(bias), rows.first, factor),
        },
    )


def _bias(scale: Scale, keys: int) -> Tensor:
    """fp32 [keys], logarithms of random sizes from 1 to LARGEST."""
    return (1 + (LARGEST - 1) * torch.rand(keys, device=scale.device)).log()


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Tensor]:
    """torch's attention without bias; gives [B, Hq, L, d]."""
    causal = q.shape[2] > 1
    return partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, scale=scale, enable_gqa=True)


@cache
def flex_compiled() -> Flex:
    """flex_attention compiled for any number of tokens, so that only the first two sizes compile."""
    return torch.compile(flex_attention, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, attention: Flex) -> Callable[[], Tensor]:
    """flex_attention with a causal mask and bias [K]; gives [B, Hq, L, d]. The first call builds the block mask."""

    def biased(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[key]

    @cache
    def mask() -> BlockMask:
        return create_block_mask(_causal, None, None, q.shape[2], k.shape[2], device=q.device)

    return lambda: attention(q, k, v, score_mod=biased, block_mask=mask(), scale=scale, enable_gqa=True)


def _causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _in_turn(forms: list[Callable[[], Tensor]]) -> Callable[[], list[Tensor]]:
    return lambda: [form() for form in forms]


class _Attention(nn.Module):
    """The attributes that transformers' attention functions read from an attention module."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.is_causal = True
        self.num_key_value_groups = group


def without_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Callable[[], Tensor]:
    """lightkv's sdpa attention with its kernels switched off; gives [B, L, Hq, d]."""
    module = _Attention(q.shape[1] // k.shape[1])
    HOOKS[module] = AttentionHook(weights=lambda: KeyWeights(bias, None))
    forward = ALL_ATTENTION_FUNCTIONS[hooked("sdpa")]

    def run() -> Tensor:
        with torch_only():
            return forward(module, q, k, v, None, scaling=scale)[0]

    return run


@contextmanager
def torch_only() -> Iterator[None]:
    """Set LIGHTKV_OPS=torch in the scope and restore it afterwards."""
    before = os.environ.get("LIGHTKV_OPS")
    os.environ["LIGHTKV_OPS"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIGHTKV_OPS"]
        else:
            os.environ["LIGHTKV_OPS"] = before
