"""Decode attention over quantised keys and values (codes.py) and a tail in full precision."""

from itertools import pairwise

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.attend import DTYPES
from lightkv.ops.codes import ABSENT, Quantised, dequantise
from lightkv.ops.dispatch import use_triton
from lightkv.ops.ragged import Keys, Sequences


def attend_quantised(
    q: Tensor, packed: Quantised, sequences: Sequences, bias: Tensor | None, tail: Keys, scale: float
) -> Tensor:
    """Returns [B, Hq, d] in q's dtype: one query per sequence attends to its packed keys and its tail in one softmax.

    q          [B, Hq, d] fp32, bf16 or fp16; query head h uses key head h // (Hq / Hkv)
    packed     quantised keys and values of all sequences, N tokens end to end
    sequences  bounds of the B sequences in packed: from 0 to N, multiples of group
    bias       fp32 [N] added to the scaled scores of each packed key, or None
    tail       k, v [B, Hkv, T, d] of q's dtype, T ≥ 0, and bias [B, T]

    Keys with a bias ≤ -1e30 are masked out; in the tail, their k and v are not read. Softmax and sums are fp32, without
    gradient. Queries without any key get 0. Raises ConfigError for shapes or dtypes that do not fit.
    """
    _check(q, packed, sequences, bias, tail)
    if use_triton(q):
        from lightkv.ops.quantised_kernel import attend_quantised_triton as run
    else:
        run = attend_quantised_torch
    return run(q, packed, sequences, bias, tail, scale)


@torch.no_grad()
def attend_quantised_torch(
    q: Tensor, packed: Quantised, sequences: Sequences, bias: Tensor | None, tail: Keys, scale: float
) -> Tensor:
    """The twin: dense scores over dequantised keys, one sequence at a time.

    Raises ConfigError if starts do not fit the packed tokens or a sequence is longer than `longest`.
    """
    ends, tail_bias, most = sequences.starts.tolist(), tail.bias, sequences.longest
    longest = max((end - begin for begin, end in pairwise(ends)), default=0)
    if (ends[0], ends[-1]) != (0, len(packed)) or ends != sorted(ends):
        raise ConfigError(f"starts must ascend from 0 to the {len(packed)} packed tokens, got {ends}")
    if longest > most:
        raise ConfigError(f"sequences.longest must be at least the longest sequence, {longest}, got {most}")
    bias = q.new_zeros(len(packed), dtype=torch.float32) if bias is None else bias
    tail_bias = q.new_zeros(len(q), tail.k.shape[2], dtype=torch.float32) if tail_bias is None else tail_bias
    of_each = q.shape[1] // packed.heads
    rows = q.float().unflatten(1, (packed.heads, of_each)) * scale  # [B, Hkv, its queries, d]
    tail_scores = rows @ tail.k.float().mT
    tail_v = tail.v.float().masked_fill(~(tail_bias > ABSENT)[:, None, :, None], 0.0)
    out = torch.empty_like(rows)
    for b, (begin, end) in enumerate(pairwise(ends)):
        k, v = dequantise(packed.between(begin, end), torch.float32)
        biases = torch.cat([bias[begin:end], tail_bias[b]])
        absent = ~(biases > ABSENT)
        scores = torch.cat([rows[b] @ k.mT, tail_scores[b]], -1).add_(biases).masked_fill_(absent, -torch.inf)
        weights = scores.softmax(-1).masked_fill_(absent, 0.0)  # softmax is NaN where all keys are absent
        out[b] = weights[..., : end - begin] @ v + weights[..., end - begin :] @ tail_v[b]
    return out.flatten(1, 2).to(q.dtype)


def _check(q: Tensor, packed: Quantised, sequences: Sequences, bias: Tensor | None, tail: Keys) -> None:
    tail_k, tail_v = tail.k, tail.v
    if q.dtype not in DTYPES or not q.dtype == tail_k.dtype == tail_v.dtype:
        raise ConfigError(
            f"q and the tail must share a dtype of {DTYPES}, got {q.dtype}, {tail_k.dtype}, {tail_v.dtype}"
        )
    if q.ndim != 3 or q.shape[2] != packed.dims:
        raise ConfigError(f"expected q [B, Hq, {packed.dims}] for the packed keys, got {list(q.shape)}")
    batch, heads, dims = q.shape
    if not heads or not packed.heads or heads % packed.heads:
        raise ConfigError(f"query heads must be a multiple of the {packed.heads} key heads, got {heads}")
    shape = (batch, packed.heads, tail_k.shape[-2] if tail_k.ndim == 4 else 0, dims)
    if tail_k.shape != shape or tail_v.shape != shape:
        expected = f"[{batch}, {packed.heads}, T, {dims}]"
        raise ConfigError(f"expected tail.k, tail.v {expected}, got {list(tail_k.shape)}, {list(tail_v.shape)}")
    for name, x, dtype, size in (
        ("starts", sequences.starts, torch.int64, (batch + 1,)),
        ("bias", bias, torch.float32, (len(packed),)),
        ("tail.bias", tail.bias, torch.float32, (batch, shape[2])),
    ):
        if x is not None and (x.dtype != dtype or x.shape != size):
            raise ConfigError(f"{name} must be {dtype} {list(size)}, got {x.dtype} {list(x.shape)}")
