"""Causal attention with a bias per key: out_i = Σ_j w_ij v_j / Σ_j w_ij,
w_ij = exp(q_i · k_j · scale + bias_j), over first ≤ j ≤ K − L + i.

With bias_j = log n_j, a token that stands for n_j equal tokens gets the attention that they had together (proportional
attention). The queries are the last L of the K keys. Keys before `first` are left padding. No L × K mask is built.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.dispatch import use_fused, use_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIMS = 256  # head dimension; the kernels hold all of it in registers
SCORES_AT_ONCE = 2**24  # scores in the twin, over the batch and all heads: 64 MiB for scores and 64 MiB for weights
MASK_AT_ONCE = 2**22  # elements of the mask given to torch's own attention: 16 MiB


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: Tensor | None, scale: float) -> Tensor:
    """Returns attention [B, L, Hq, d] in q's dtype, without gradient; 0 for queries that see no key.

    q      [B, Hq, L, d] fp32, bf16 or fp16, d ≤ 256
    k, v   [B, Hkv, K, d] of the same dtype, L ≤ K; query head h uses key head h // (Hq / Hkv)
    bias   fp32 [B, K], added to the scaled scores of each key, or None
    first  int64 [B], number of padding keys on the left, or None; padding keys and their bias are not read

    Softmax and sums are fp32. Raises ConfigError for shapes or dtypes that do not fit.
    """
    _check(q, k, v, bias, first)
    if use_triton(q):
        from lightkv.ops.attend_kernel import attend_triton

        return attend_triton(q, k, v, bias, first, scale)
    if use_fused(q) and first is None and k.shape[2]:
        return attend_fused(q, k, v, bias, scale)
    return attend_torch(q, k, v, bias, first, scale)


@torch.no_grad()
def attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Computes `attend` without padding by torch's own attention, with the bias in a mask, in chunks of queries."""
    (batch, heads, length, dims), keys = q.shape, k.shape[2]
    bias = q.new_zeros(batch, keys) if bias is None else bias
    out = q.new_empty(batch, length, heads, dims)
    step = max(1, MASK_AT_ONCE // max(1, batch * keys))
    for begin in range(0, length, step):
        end = min(begin + step, length)
        seen = keys - length + end
        mask = bias[:, None, :seen].expand(-1, end - begin, -1)
        if end - begin > 1:
            later = torch.full((end - begin, end - begin), -torch.inf, device=q.device).triu_(1)
            mask = mask.clone()
            mask[:, :, keys - length + begin :] += later
        states = q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen]
        mixed = F.scaled_dot_product_attention(*states, attn_mask=mask[:, None], scale=scale, enable_gqa=True)
        out[:, begin:end] = mixed.transpose(1, 2)
    return out


@torch.no_grad()
def attend_torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: Tensor | None, scale: float) -> Tensor:
    """The twin: dense scores, in chunks of queries."""
    (batch, heads, length, dims), (key_heads, keys) = q.shape, k.shape[1:3]
    column = torch.arange(keys, device=q.device)
    padding = (column < (0 if first is None else first[:, None])).expand(batch, keys)
    k, v = (states.float().masked_fill(padding[:, None, :, None], 0.0) for states in (k, v))
    extra = 0.0 if bias is None else bias[:, None, None]
    out = q.new_empty(batch, length, heads, dims)
    step = max(1, SCORES_AT_ONCE // max(1, batch * heads * keys))
    for begin in range(0, length, step):
        end = min(begin + step, length)
        rows = q[:, :, begin:end].float().unflatten(1, (key_heads, -1)).flatten(2, 3)  # [B, Hkv, its queries, d]
        scores = (rows @ k.transpose(2, 3)).view(batch, heads, end - begin, keys) * scale + extra
        position = torch.arange(begin, end, device=q.device) + keys - length
        unseen = (column > position[:, None]) | padding[:, None]  # [B, queries, K]
        scores.masked_fill_(unseen[:, None], -torch.inf)
        deaf = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.softmax(-1).masked_fill(deaf, 0.0)
        mixed = weights.view(*rows.shape[:3], keys) @ v
        out[:, begin:end] = mixed.view(batch, heads, end - begin, dims).transpose(1, 2)
    return out


def check_states(q: Tensor, k: Tensor, v: Tensor, ndim: int, expected: str) -> None:
    """Raises ConfigError unless q, k, v have `ndim` dimensions, heads in dimension 1, and fitting shapes and dtypes."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"q, k, v must share a dtype of {DTYPES}, got {q.dtype}, {k.dtype}, {v.dtype}")
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == ndim or k.shape != v.shape:
        raise ConfigError(f"expected {expected}, {shapes}")
    heads, key_heads, dims = q.shape[1], k.shape[1], q.shape[-1]
    if dims != k.shape[-1] or not 1 <= dims <= MAX_DIMS:
        raise ConfigError(f"q, k, v must share a head dimension of 1 to {MAX_DIMS}, {shapes}")
    if not key_heads or heads % key_heads or not heads:
        raise ConfigError(f"query heads must be a multiple of key heads, {shapes}")


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: Tensor | None) -> None:
    check_states(q, k, v, 4, "q [B, Hq, L, d] and k, v [B, Hkv, K, d]")
    batch, length, keys = len(q), q.shape[2], k.shape[2]
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if batch != len(k):
        raise ConfigError(f"q, k, v must share the batch, {shapes}")
    if length > keys:
        raise ConfigError(f"expected at most as many queries as keys, {shapes}")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (batch, keys)):
        raise ConfigError(f"bias must be float32 {[batch, keys]}, got {bias.dtype} {list(bias.shape)}")
    if first is not None and (first.dtype != torch.int64 or first.shape != (batch,)):
        raise ConfigError(f"first must be int64 {[batch]}, got {first.dtype} {list(first.shape)}")
