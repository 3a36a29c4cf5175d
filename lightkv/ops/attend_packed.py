"""`attend` on many sequences in one launch, laid end to end without padding: prefill, decode, and both at once.

What a sequence gets depends on its own tokens alone, not on what else is in the launch.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.attend import attend_fused, attend_torch, check_states
from lightkv.ops.dispatch import use_fused, use_triton


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    starts_q: Tensor,
    starts_k: Tensor,
    scale: float,
    most_q: int,
    most_k: int,
) -> Tensor:
    """[N, Hq, d] in q's dtype, without gradient; softmax and sums in fp32; 0 for queries that see no key.

    q      [N, Hq, d] fp32, bf16 or fp16, d ≤ 256, any strides
    k, v   [M, Hkv, d] of that dtype; query head h uses key head h // (Hq / Hkv)
    bias   fp32 [M] added to the scaled scores of each key, or None
    starts int64 [R + 1] per side, on q's device: sequence r owns q[starts_q[r] : starts_q[r + 1]] and likewise k. Its
           queries are the last of its keys; it may have no queries, or neither. Queries go from 0 to N; keys before
           starts_k[0] and from starts_k[R] on belong to none and are not read
    most   the most queries and keys of a sequence, or more: kernels are sized by it, without waiting for the device

    Raises ConfigError for what does not fit. What the starts hold is checked by the twin alone: the kernels trust it.
    """
    _check(q, k, v, bias, starts_q, starts_k, most_q)
    if use_triton(q):
        from lightkv.ops.attend_kernel import attend_packed_triton

        return attend_packed_triton(q, k, v, bias, starts_q, starts_k, scale, most_q, most_k)
    if use_fused(q):
        fused = partial(attend_fused, scale=scale)
        return _one_by_one(fused, q, k, v, bias, starts_q, starts_k, most_q, most_k)
    return attend_packed_torch(q, k, v, bias, starts_q, starts_k, scale, most_q, most_k)


def attend_packed_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    starts_q: Tensor,
    starts_k: Tensor,
    scale: float,
    most_q: int,
    most_k: int,
) -> Tensor:
    """The definition: the twin of `attend`, a sequence at a time."""
    twin = partial(attend_torch, first=None, scale=scale)
    return _one_by_one(twin, q, k, v, bias, starts_q, starts_k, most_q, most_k)


def _one_by_one(
    attention: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    starts_q: Tensor,
    starts_k: Tensor,
    most_q: int,
    most_k: int,
) -> Tensor:
    """`attention(q, k, v, bias)` on batches of one. Raises ConfigError for starts that say what cannot be."""
    ends_q, ends_k = starts_q.tolist(), starts_k.tolist()
    _check_starts(ends_q, ends_k, len(q), len(k), most_q, most_k)
    out = q.new_empty(q.shape)
    q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
    for mine, theirs in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        queries, keys = slice(*mine), slice(*theirs)
        if mine[0] < mine[1]:
            own = None if bias is None else bias[None, keys]
            out[queries] = attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], own)[0]
    return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, starts_q: Tensor, starts_k: Tensor, most_q: int
) -> None:
    check_states(q, k, v, 3, "q [N, Hq, d] and k, v [M, Hkv, d]")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != k.shape[:1]):
        raise ConfigError(f"bias must be float32 {[len(k)]}, got {bias.dtype} {list(bias.shape)}")
    for name, starts in (("starts_q", starts_q), ("starts_k", starts_k)):
        if starts.dtype != torch.int64 or starts.ndim != 1 or starts.device != q.device:
            got = f"{starts.dtype} {list(starts.shape)} on {starts.device}"
            raise ConfigError(f"{name} must be int64 with one dimension on {q.device}, got {got}")
    sequences = len(starts_q) - 1
    if sequences < 0 or len(starts_k) - 1 != sequences:
        raise ConfigError(f"starts must be sequences + 1 on both sides, got {len(starts_q)} and {len(starts_k)}")
    if sequences * most_q < len(q):
        raise ConfigError(f"{sequences} sequences of at most most_q = {most_q} queries cannot have {len(q)}")


def _check_starts(ends_q: list[int], ends_k: list[int], queries: int, keys: int, most_q: int, most_k: int) -> None:
    if ends_q[0] != 0 or ends_q[-1] != queries or not 0 <= ends_k[0] <= ends_k[-1] <= keys:
        ends = f"{ends_q[0]} to {ends_q[-1]} and {ends_k[0]} to {ends_k[-1]}"
        raise ConfigError(f"starts must go from 0 to {queries} for queries and stay within {keys} for keys, got {ends}")
    sizes = [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True)]
    for length, reach in sizes:
        if not 0 <= length <= reach:
            raise ConfigError(f"queries are the last of their sequence's keys, got {length} of {reach}")
        if length > most_q or reach > most_k:
            raise ConfigError(f"most_q and most_k must be at least {length} and {reach}, got {most_q} and {most_k}")
