"""`attend` on packed sequences in one launch, for prefill, decode steps, or a mix of both.

The result of a sequence depends on its own tokens only, not on the other sequences of the launch.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.attend import attend_fused, attend_torch, check_states
from lightkv.ops.dispatch import use_fused, use_triton
from lightkv.ops.ragged import Keys, Sequences


def attend_packed(q: Tensor, keys: Keys, q_sequences: Sequences, k_sequences: Sequences, scale: float) -> Tensor:
    """Returns attention [N, Hq, d] in q's dtype, without gradient; 0 for queries that see no key.

    q            [N, Hq, d] fp32, bf16 or fp16, d ≤ 256, any strides
    keys         k, v [M, Hkv, d] of that dtype and bias [M]; query head h uses key head h // (Hq / Hkv)
    q_sequences  bounds of R sequences of queries, from 0 to N, starts on q's device
    k_sequences  bounds of the keys of the same sequences; a sequence's queries are the last of its keys. A sequence may
                 have no queries, or no keys either. Keys outside all sequences are not read

    Softmax and sums are fp32. Raises ConfigError for arguments that do not fit. Only the twin checks the values in
    starts; the kernels trust them.
    """
    _check(q, keys, q_sequences, k_sequences)
    if use_triton(q):
        from lightkv.ops.attend_kernel import attend_packed_triton

        return attend_packed_triton(q, keys, q_sequences, k_sequences, scale)
    if use_fused(q):
        return _one_by_one(partial(attend_fused, scale=scale), q, keys, q_sequences, k_sequences)
    return attend_packed_torch(q, keys, q_sequences, k_sequences, scale)


def attend_packed_torch(q: Tensor, keys: Keys, q_sequences: Sequences, k_sequences: Sequences, scale: float) -> Tensor:
    """The twin: `attend_torch`, one sequence at a time."""
    twin = partial(attend_torch, first=None, scale=scale)
    return _one_by_one(twin, q, keys, q_sequences, k_sequences)


def _one_by_one(
    attention: Callable[..., Tensor], q: Tensor, keys: Keys, q_sequences: Sequences, k_sequences: Sequences
) -> Tensor:
    """`attention(q, k, v, bias)` on batches of one. Raises ConfigError where the starts do not fit."""
    ends_q, ends_k = q_sequences.starts.tolist(), k_sequences.starts.tolist()
    _check_bounds(ends_q, ends_k, len(q), len(keys.k))
    _check_lengths(ends_q, ends_k, q_sequences.longest, k_sequences.longest)
    out = q.new_empty(q.shape)
    q, k, v = (states.transpose(0, 1)[None] for states in (q, keys.k, keys.v))
    for mine, theirs in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        of_q, of_k = slice(*mine), slice(*theirs)
        if mine[0] < mine[1]:
            bias = None if keys.bias is None else keys.bias[None, of_k]
            out[of_q] = attention(q[:, :, of_q], k[:, :, of_k], v[:, :, of_k], bias)[0]
    return out


def _check(q: Tensor, keys: Keys, q_sequences: Sequences, k_sequences: Sequences) -> None:
    check_states(q, keys.k, keys.v, 3, "q [N, Hq, d] and k, v [M, Hkv, d]")
    bias, starts_q, starts_k = keys.bias, q_sequences.starts, k_sequences.starts
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != keys.k.shape[:1]):
        raise ConfigError(f"bias must be float32 {[len(keys.k)]}, got {bias.dtype} {list(bias.shape)}")
    for name, starts in (("q_sequences", starts_q), ("k_sequences", starts_k)):
        if starts.dtype != torch.int64 or starts.ndim != 1 or starts.device != q.device:
            got = f"{starts.dtype} {list(starts.shape)} on {starts.device}"
            raise ConfigError(f"{name}.starts must be int64 with one dimension on {q.device}, got {got}")
    sequences, longest = len(starts_q) - 1, q_sequences.longest
    if sequences < 0 or len(starts_k) - 1 != sequences:
        raise ConfigError(f"starts must be sequences + 1 on both sides, got {len(starts_q)} and {len(starts_k)}")
    if sequences * longest < len(q):
        raise ConfigError(f"{sequences} sequences of at most {longest} queries (longest) cannot have {len(q)}")


def _check_bounds(ends_q: list[int], ends_k: list[int], queries: int, keys: int) -> None:
    if ends_q[0] != 0 or ends_q[-1] != queries or not 0 <= ends_k[0] <= ends_k[-1] <= keys:
        ends = f"{ends_q[0]} to {ends_q[-1]} and {ends_k[0]} to {ends_k[-1]}"
        raise ConfigError(f"starts must go from 0 to {queries} for queries and stay within {keys} for keys, got {ends}")


def _check_lengths(ends_q: list[int], ends_k: list[int], longest_q: int, longest_k: int) -> None:
    sizes = [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True)]
    for queries, keys in sizes:
        if not 0 <= queries <= keys:
            raise ConfigError(f"expected at most as many queries as keys in a sequence, got {queries} of {keys}")
        if queries > longest_q or keys > longest_k:
            raise ConfigError(f"longest must be at least {queries} and {keys}, got {longest_q} and {longest_k}")
