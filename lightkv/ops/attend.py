"""Causal attention in which a key has a weight of its own: out_i = Σ_j w_ij v_j / Σ_j w_ij,
w_ij = exp(q_i · k_j · scale + bias_j), over first ≤ j ≤ K − L + i.

Proportional attention: with bias_j = log n_j a token that stands for n_j equal ones takes the attention that these
took. Queries are the last L of the K keys; left padding is the keys before `first`. No L × K mask is built.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.dispatch import use_fused, use_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIMS = 256  # of a head; the kernels hold whole heads in registers
SCORES_AT_ONCE = 2**24  # of the twin, over the batch and all heads: 64 MiB each for scores and weights
MASK_AT_ONCE = 2**22  # numbers of the mask that torch's own attention is given: 16 MiB


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: Tensor | None, scale: float) -> Tensor:
    """[B, L, Hq, d] in q's dtype, without gradient; softmax and sums in fp32; 0 for queries that see no key.

    q      [B, Hq, L, d] fp32, bf16 or fp16, d ≤ 256
    k, v   [B, Hkv, K, d] of that dtype, L ≤ K; query head h uses key head h // (Hq / Hkv)
    bias   fp32 [B, K] added to the scaled scores of each key, or None
    first  int64 [B] how many keys on the left are padding (what they and their bias hold is not read), or None

    Raises ConfigError where shapes or dtypes do not fit.
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
    """The same by torch's own attention, without padding: the bias is in a mask, some queries at a time."""
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
    """The definition: dense scores, some queries at a time."""
    (batch, heads, length, dims), (key_heads, keys) = q.shape, k.shape[1:3]
    column = torch.arange(keys, device=q.device)
    padding = (column < (0 if first is None else first[:, None])).expand(batch, keys)
    k, v = (states.float().masked_fill(padding[:, None, :, None], 0.0) for states in (k, v))
    extra = 0.0 if bias is None else bias[:, None, None]
    out = q.new_empty(batch, length, heads, dims)
    step = max(1, SCORES_AT_ONCE // max(1, batch * heads * keys))
    for begin in range(0, length, step):
        end = min(begin + step, length)
        rows = q[:, :, begin:end].float().unflatten(1, (key_heads, -1)).flatten(2, 3)  # a key head's, one under another
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
    """Raises ConfigError unless q, k, v have so many dimensions, heads in the second, and go together."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"q, k, v must share a dtype of {DTYPES}, got {q.dtype}, {k.dtype}, {v.dtype}")
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == ndim or k.shape != v.shape:
        raise ConfigError(f"expected {expected}, {shapes}")
    heads, key_heads, dims = q.shape[1], k.shape[1], q.shape[-1]
    if dims != k.shape[-1] or not 1 <= dims <= MAX_DIMS:
        raise ConfigError(f"q, k, v must share a head dimension, which is 1 to {MAX_DIMS}, {shapes}")
    if not key_heads or heads % key_heads or not heads:
        raise ConfigError(f"query heads must be a multiple of key heads, {shapes}")


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: Tensor | None) -> None:
    check_states(q, k, v, 4, "q [B, Hq, L, d] and k, v [B, Hkv, K, d]")
    batch, length, keys = len(q), q.shape[2], k.shape[2]
    shapes = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if batch != len(k):
        raise ConfigError(f"q, k, v must share the batch, {shapes}")
    if length > keys:
        raise ConfigError(f"queries are the last of the keys and cannot be more, {shapes}")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (batch, keys)):
        raise ConfigError(f"bias must be float32 {[batch, keys]}, got {bias.dtype} {list(bias.shape)}")
    if first is not None and (first.dtype != torch.int64 or first.shape != (batch,)):
        raise ConfigError(f"first must be int64 {[batch]}, got {first.dtype} {list(first.shape)}")
